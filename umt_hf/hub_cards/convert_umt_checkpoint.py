# Copyright 2026 The umt_hf authors. Licensed under the Apache License, Version 2.0.
"""Weights under other names to ours: released `.pth` checkpoints, strictly and with a report."""

import argparse
import dataclasses
import os
import pickle
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.modeling_utils import PreTrainedModel

from ..data.ava_labels import AVA_LABELS
from ..inference.loading import get_model_class
from ..modeling.configuration_umt_video import UMTVideoConfig
from ..modeling.configuration_umt_video_text import STAGE2_VISION_FIELDS, UMTVideoTextConfig
from ..modeling.modeling_umt_video import compute_sinusoid_table, interpolate_position_table
from ..modeling.towers_umt_video_text import rename_bert_weight
from ..runs.models import MODELS_BY_TASK
from ..zoo import ZooEntry, find_entry, load_zoo, read_zoo_file
from .label_names import load_known_names

TASK_CLASSES: dict[str, type[PreTrainedModel]] = {task: get_model_class(row) for task, row in MODELS_BY_TASK.items()}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "b16": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "l16": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}
TEACHERS: dict[str, dict[str, Any]] = {
    "b16": {
        "teacher_name_or_path": "openai/clip-vit-base-patch16",
        "teacher_hidden_size": 512,
        "teacher_image_size": 224,
    },
    "l16": {
        "teacher_name_or_path": "openai/clip-vit-large-patch14",
        "teacher_hidden_size": 768,
        "teacher_image_size": 196,
    },
}
DATA_SETS: dict[str, dict[str, Any]] = read_zoo_file()["data_sets"]
LABELLED_SETS = ("k400", "k600", "k700", "k710", "mit", "ssv2")
TEXT_TOWERS: dict[str, dict[str, Any]] = {  # BERT base and large
    size: {**fields, "encoder_width": fields["hidden_size"], "fusion_layer": fusion_layer}
    for (size, fields), fusion_layer in zip(ARCHITECTURES.items(), (9, 19), strict=True)
}
CORPORA = ("5m", "17m", "25m")
RETRIEVAL_SETS = ("msrvtt", "didemo", "anet", "lsmdc", "msvd", "ssv2-label", "ssv2-template")
QUESTION_SETS = ("msrvtt", "anet", "msvd")

# Published name -> ours, below the encoder. `qkv.weight` and the stored position table need more than a new name.
RENAMES = (
    (r"blocks\.(\d+)\.norm1\.", r"layers.\1.layernorm_before."),
    (r"blocks\.(\d+)\.norm2\.", r"layers.\1.layernorm_after."),
    (r"blocks\.(\d+)\.attn\.q_bias$", r"layers.\1.attention.q_proj.bias"),
    (r"blocks\.(\d+)\.attn\.v_bias$", r"layers.\1.attention.v_proj.bias"),
    (r"blocks\.(\d+)\.attn\.proj\.", r"layers.\1.attention.o_proj."),
    (r"blocks\.(\d+)\.mlp\.(fc[12])\.", r"layers.\1.mlp.\2."),
    (r"blocks\.(\d+)\.gamma_1$", r"layers.\1.attention_residual.layer_scale"),
    (r"blocks\.(\d+)\.gamma_2$", r"layers.\1.mlp_residual.layer_scale"),
    (r"patch_embed\.proj\.", r"embeddings.patch_embeddings.projection."),
    (r"norm\.", r"norm."),
)
HEAD_RENAMES = (
    (r"clip_decoder\.(\d+)\.head\.", r"alignment_heads.\1.dense."),
    (r"clip_decoder\.(\d+)\.norm\.", r"alignment_heads.\1.norm."),
    (r"fc_norm\.", r"fc_norm."),
    (r"head\.", r"classifier."),
)
VIDEO_TEXT_RENAMES = (
    (r"vision_encoder\.pool_norm\.", "video_norm."),
    (r"vision_proj\.", "video_projection."),
    (r"text_proj\.", "text_projection."),
    (r"itm_head\.", "matching_head."),
)
POSITION_TOLERANCE = 1e-3  # a table stored in half precision differs from the computed one by up to 5e-4


@dataclass
class ConversionReport:
    """What became of each tensor of a source.

    Args:
        used: Source name -> the names it became.
        set_aside: Source name -> why it is not needed.
    """

    used: dict[str, list[str]] = field(default_factory=dict)
    set_aside: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.used)} tensors used, {len(self.set_aside)} set aside"]
        lines += [f"  {name}: {reason}" for name, reason in self.set_aside.items()]
        return "\n".join(lines)


def build_published_config(name: str) -> tuple[UMTVideoConfig | UMTVideoTextConfig, str]:
    """Configuration and task of a released checkpoint, by our name for it.

    Args:
        name: `umt-vit-{b16,l16}` (stage 1), or with `-{k400,k600,k700,k710,mit,ssv2}` (fine-tuned) and then `-f16`
            (16 frames) or `-384` (pixels), or with `-ava` (action detection). With `-{5m,17m,25m}` stage 2, then with
            `-{msrvtt,didemo,anet,lsmdc,msvd,ssv2-label,ssv2-template}` retrieval, and with `-{msrvtt,anet,msvd}-qa`
            question answering.

    Returns:
        The configuration and the task, one of `TASK_CLASSES`.

    Raises:
        ValueError: If the name is none of these.

    Examples:
        >>> from umt_hf.hub_cards import convert_umt_checkpoint
        >>> config, task = convert_umt_checkpoint.build_published_config(
        ...     "umt-vit-l16-k400-f16"
        ... )
        >>> task, config.num_frames, config.num_labels
        ('classification', 16, 400)
    """
    if match := re.fullmatch(rf"umt-vit-(b16|l16)-(?:{'|'.join(CORPORA)})(?:-(.+))?", name):
        return _build_video_text_config(name, *match.groups())
    if match := re.fullmatch(r"umt-vit-(b16|l16)-ava", name):
        fields = {**ARCHITECTURES[match[1]], **TEACHERS[match[1]], **build_label_maps(AVA_LABELS)}
        return UMTVideoConfig(**fields), "detection"
    match = re.fullmatch(rf"umt-vit-(b16|l16)(?:-({'|'.join(LABELLED_SETS)})(-f16)?(-384)?)?", name)
    if match is None:
        raise ValueError(
            f"Unknown checkpoint name {name!r}; expected umt-vit-b16 or umt-vit-l16, alone, "
            f"with -{{{','.join(LABELLED_SETS)}}} and then -f16 or -384, with -ava, "
            f"or with -{{{','.join(CORPORA)}}} and then a data set."
        )
    size, labels, long_clip, large_image = match.groups()
    fields = {**ARCHITECTURES[size], **TEACHERS[size]}
    if labels is None:
        return UMTVideoConfig(**fields), "pretraining"
    fields |= {
        "num_labels": DATA_SETS[labels]["num_labels"],
        "num_frames": 16 if long_clip else 8,
        "image_size": 384 if large_image else 224,
        "use_final_norm": False,
    }
    if file := DATA_SETS[labels].get("class_names"):
        fields |= build_label_maps(load_known_names(file, fields.pop("num_labels")))
    return UMTVideoConfig(**fields), "classification"


def build_label_maps(names: Sequence[str]) -> dict[str, Any]:
    """Names of the classes as fields of a configuration: `id2label` and `label2id`."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def _build_video_text_config(name: str, size: str, data_set: str | None) -> tuple[UMTVideoTextConfig, str]:
    task = "video_text_pretraining"
    if data_set is not None:
        task = "question_answering" if data_set.endswith("-qa") else "retrieval"
        known = [f"{x}-qa" for x in QUESTION_SETS] if task == "question_answering" else RETRIEVAL_SETS
        if data_set not in known:
            raise ValueError(f"Unknown data set in checkpoint name {name!r}; expected one of {', '.join(known)}.")
    num_frames = 4 if data_set is None else 12
    vision_fields = {**STAGE2_VISION_FIELDS, **ARCHITECTURES[size], **TEACHERS[size], "num_frames": num_frames}
    fields: dict[str, Any] = {"vision_config": vision_fields, "text_config": TEXT_TOWERS[size]}
    return UMTVideoTextConfig(**fields, projection_dim=TEACHERS[size]["teacher_hidden_size"]), task


def describe_checkpoint(name: str) -> ZooEntry:
    """As `find_entry`, and also for models that the published code trains, but that were never released.

    Args:
        name: As `build_published_config` takes it, for example `umt-vit-b16-17m-msrvtt`; settings are then those of
            the released model of the same data set, and there are no figures.

    Raises:
        ValueError: If no such model exists.

    Examples:
        >>> from umt_hf.hub_cards import convert_umt_checkpoint
        >>> entry = convert_umt_checkpoint.describe_checkpoint("umt-vit-b16-k400")
        >>> entry.task, entry.frames, entry.resolution
        ('classification', 8, 224)
    """
    sibling = re.sub(r"(?:-f16|-384)+$", "", re.sub(r"-(?:5m|17m)-", "-25m-", name))
    if name in load_zoo() or sibling not in load_zoo():
        return find_entry(name)
    config = build_published_config(name)[0]
    config = getattr(config, "vision_config", config)
    return dataclasses.replace(
        load_zoo()[sibling],
        name=name,
        file=None,
        frames=config.num_frames,
        resolution=config.image_size,
        trained_on=(),
        starts_from=None,
        recipe=None,
        figures=(),
        notes=(),
    )


def convert_state_dict(
    state_dict: dict[str, torch.Tensor],
    config: UMTVideoConfig | UMTVideoTextConfig,
    task: str,
    report: ConversionReport | None = None,
) -> dict[str, torch.Tensor]:
    """Rename and reshape the tensors of a published checkpoint.

    Args:
        state_dict: Published names -> tensors.
        config: Configuration of the model they belong to.
        task: "pretraining", "classification", "detection", "video_text_pretraining", "retrieval" or
            "question_answering".
        report: Filled with what became of each tensor.

    Returns:
        State dict that loads strictly into the task's model.

    Raises:
        ValueError: If the task is unknown, a tensor has no place, one is missing or has another shape than the
            model's, a stored position table is not the one that `config` computes, or tied tensors differ.
    """
    if task not in TASK_CLASSES:
        raise ValueError(f"task must be one of {sorted(TASK_CLASSES)}, got {task!r}.")
    report = report if report is not None else ConversionReport()
    converted: dict[str, torch.Tensor] = {}
    unknown = []
    for name, tensor in state_dict.items():
        if isinstance(config, UMTVideoTextConfig):
            reason, parts = _find_reason_to_leave(name, state_dict, config), _convert_video_text_tensor(name, tensor)
        else:
            bare = re.sub(r"^(?:backbone\.|encoder\.)", "", name)
            reason, parts = _check_position_table(name, bare, tensor, config), _convert_tensor(bare, tensor)
        if reason is not None:
            report.set_aside[name] = reason
        elif parts is None:
            unknown.append(name)
        else:
            converted.update(parts)
            report.used[name] = sorted(parts)
    _check_complete(converted, unknown, _expected_shapes(config, task), task)
    return converted


def convert_checkpoint(
    path: str | os.PathLike,
    config: UMTVideoConfig | UMTVideoTextConfig | str,
    task: str | None,
    output_dir: str | os.PathLike,
    max_shard_size: str = "5GB",
) -> ConversionReport:
    """Convert a released `.pth` file to a folder that `from_pretrained` loads.

    Args:
        path: The file. It is read with `weights_only=True`.
        config: Configuration, or our name of the checkpoint (see `build_published_config`).
        task: As for `convert_state_dict`; `None` with a name takes the name's own.
        output_dir: Folder to write, with safetensors weights and `config.json`.
        max_shard_size: Size of the largest weight file; larger models are split.

    Returns:
        What became of each tensor.

    Raises:
        ValueError: As for `convert_state_dict`, or if the file holds no state dict.
    """
    if isinstance(config, str):
        config, named_task = build_published_config(config)
        task = task or named_task
    if task is None:
        raise ValueError(f"Name the task of the configuration: one of {', '.join(TASK_CLASSES)}.")
    report = ConversionReport()
    converted = convert_state_dict(load_published_state_dict(path), config, task, report)
    load_converted_model(converted, config, task).save_pretrained(output_dir, max_shard_size=max_shard_size)
    return report


def load_converted_model(
    converted: dict[str, torch.Tensor], config: UMTVideoConfig | UMTVideoTextConfig, task: str
) -> PreTrainedModel:
    """The model that holds the tensors themselves, uncopied, in their precision; in float32 if they have several.

    Args:
        converted: From `convert_state_dict`.
        config: Configuration of the model.
        task: As for `convert_state_dict`.
    """
    precisions = {tensor.dtype for tensor in converted.values() if tensor.is_floating_point()}
    dtype = precisions.pop() if len(precisions) == 1 else torch.float32
    return TASK_CLASSES[task].from_pretrained(None, config=config, state_dict=converted, dtype=dtype)


def load_published_state_dict(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Map a published `.pth` file into memory: the dict under `model`, else under `module`, else the file itself.

    Raises:
        ValueError: If there are other things than tensors in it.
    """
    try:
        # Training scripts keep their parsed arguments beside the weights: attributes alone, no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Files of PyTorch before 1.6 are not archives, and are read at once.
            is_mapped = zipfile.is_zipfile(path)
            content = torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=is_mapped)
    except (pickle.UnpicklingError, EOFError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path} cannot be read as tensors alone ({reason}). It is damaged, no checkpoint, or holds other "
            "objects, which are not loaded since a pickle can run code."
        ) from error
    for key in ("model", "module"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path}: no state dict found, neither at the top nor under 'model' or 'module'.")
    return content


def _convert_tensor(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor] | None:
    if match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.weight", name):
        prefix = f"vision_model.layers.{match[1]}.attention"
        return {f"{prefix}.{x}_proj.weight": part.contiguous() for x, part in zip("qkv", tensor.chunk(3), strict=True)}
    if name == "pos_embed":
        return {"vision_model.embeddings.position_embeddings": tensor}
    if name == "patch_embed.proj.weight":
        tensor = tensor.flatten(1)
    for prefix, renames in (("vision_model.", RENAMES), ("", HEAD_RENAMES)):
        for pattern, replacement in renames:
            if re.match(pattern, name):
                return {prefix + re.sub(pattern, replacement, name): tensor}
    return None


def _convert_video_text_tensor(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor] | None:
    if match := re.fullmatch(r"vision_encoder\.(?:encoder\.|(?=clip_decoder\.))(.+)", name):
        return _convert_tensor(match[1], tensor)
    if match := re.fullmatch(r"text_(encoder|decoder)\.(bert\.|(?=cls\.))?(.+)", name):
        prefix = "" if match[2] == "" else "bert."  # retrieval and question encoders are stored without it
        ours = rename_bert_weight(prefix + match[3])
        if match[1] == "decoder":
            ours = "answer_decoder." + ours.replace("mlm_head.", "lm_head.")
        return {ours: tensor}
    if name == "temp":
        return {"temperature": tensor.reshape(1)}
    for pattern, replacement in VIDEO_TEXT_RENAMES:
        if re.match(pattern, name):
            return {re.sub(pattern, replacement, name): tensor}
    return None


def _find_reason_to_leave(name: str, state_dict: dict[str, torch.Tensor], config: UMTVideoTextConfig) -> str | None:
    """Why a tensor of a video-text checkpoint is not needed, if so.

    Raises:
        ValueError: If a tensor that repeats another is not equal to it.
    """
    if name.startswith("clip_teacher."):
        vision: Any = config.vision_config
        return f"part of the frozen teacher, which is loaded from {vision.teacher_name_or_path}"
    if name.endswith("embeddings.position_ids"):
        return "numbers of the tokens, which the model counts itself"
    for repeated, original in (
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ):
        other = name.replace(repeated, original)
        if other != name and other in state_dict:
            if not state_dict[name].is_meta and not torch.equal(state_dict[name], state_dict[other]):
                raise ValueError(f"{name} and {other} are one tensor in the model, but differ in the checkpoint.")
            return f"repeats {other}" if name.endswith(".bias") else None
    return None


def _expected_shapes(config: UMTVideoConfig | UMTVideoTextConfig, task: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = TASK_CLASSES[task](config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _check_position_table(name: str, bare: str, stored: torch.Tensor, config: UMTVideoConfig) -> str | None:
    """Why a stored position table is not needed: it is the one that the configuration computes."""
    if bare != "pos_embed" or config.learnable_position_embedding:
        return None
    side = config.image_size // config.patch_size
    run_grid = (config.num_frames // config.tubelet_size, side, side)
    base_grid = config.position_embedding_grid if config.position_embedding_frames else run_grid
    table = compute_sinusoid_table(base_grid[0] * base_grid[1] * base_grid[2], config.hidden_size)
    table = interpolate_position_table(table, base_grid, run_grid)
    if stored.shape != table.shape:
        raise ValueError(
            f"{name} has {stored.shape[1]} rows, but {config.num_frames} frames of {config.image_size} pixels make "
            f"{table.shape[1]}; set num_frames and image_size of the configuration to the checkpoint's own."
        )
    if not stored.is_meta and (stored.float() - table).abs().max() > POSITION_TOLERANCE:
        raise ValueError(
            f"{name} is not the sinusoid table that the configuration computes. To keep the stored one, set "
            f"learnable_position_embedding=True, position_embedding_frames={config.num_frames} and "
            f"position_embedding_image_size={config.image_size}."
        )
    return "equals the sinusoid table that the configuration computes"


def _check_complete(
    converted: dict[str, torch.Tensor], unknown: list[str], expected: dict[str, tuple[int, ...]], task: str
) -> None:
    problems = [f"no place for {name}" for name in unknown]
    problems += [f"no place for {name} {tuple(converted[name].shape)}" for name in converted.keys() - expected.keys()]
    problems += [f"missing {name} {expected[name]}" for name in expected.keys() - converted.keys()]
    problems += [
        f"{name} is {tuple(converted[name].shape)}, the model has {shape}"
        for name, shape in expected.items()
        if name in converted and tuple(converted[name].shape) != shape
    ]
    if problems:
        shown = "\n  ".join(sorted(problems)[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"The checkpoint does not fit a {task} model of this configuration:\n  {shown}{more}")


__all__ = [
    "ConversionReport",
    "build_published_config",
    "convert_checkpoint",
    "convert_state_dict",
    "describe_checkpoint",
    "load_converted_model",
    "load_published_state_dict",
]
