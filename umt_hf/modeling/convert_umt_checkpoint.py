# Copyright 2026 The umt_hf authors. Licensed under the Apache License, Version 2.0.
"""Released `.pth` checkpoints to Transformers folders: strict both ways, with a report of every tensor."""

import os
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.modeling_utils import PreTrainedModel

from .configuration_umt_video import UMTVideoConfig
from .modeling_umt_video import (
    UMTVideoForPreTraining,
    UMTVideoForVideoClassification,
    compute_sinusoid_table,
    interpolate_position_table,
)

TASK_CLASSES: dict[str, type[PreTrainedModel]] = {
    "pretraining": UMTVideoForPreTraining,
    "classification": UMTVideoForVideoClassification,
}

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
LABEL_COUNTS = {"k400": 400, "k600": 600, "k700": 700, "k710": 710, "mit": 339, "ssv2": 174}

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


def build_published_config(name: str) -> tuple[UMTVideoConfig, str]:
    """Configuration and task of a released single-modality checkpoint, by our name for it.

    Args:
        name: `umt-vit-{b16,l16}` (stage 1), or with `-{k400,k600,k700,k710,mit,ssv2}` (fine-tuned) and then `-f16`
            (16 frames) or `-384` (pixels).

    Returns:
        The configuration and the task, "pretraining" or "classification".

    Raises:
        ValueError: If the name is none of these.
    """
    match = re.fullmatch(rf"umt-vit-(b16|l16)(?:-({'|'.join(LABEL_COUNTS)})(-f16)?(-384)?)?", name)
    if match is None:
        raise ValueError(
            f"Unknown checkpoint name {name!r}; expected umt-vit-b16 or umt-vit-l16, alone or with "
            f"-{{{','.join(LABEL_COUNTS)}}} and then -f16 or -384."
        )
    size, labels, long_clip, large_image = match.groups()
    fields = {**ARCHITECTURES[size], **TEACHERS[size]}
    if labels is None:
        return UMTVideoConfig(**fields), "pretraining"
    config = UMTVideoConfig(
        **fields,
        num_labels=LABEL_COUNTS[labels],
        num_frames=16 if long_clip else 8,
        image_size=384 if large_image else 224,
        use_final_norm=False,
    )
    return config, "classification"


def convert_state_dict(
    state_dict: dict[str, torch.Tensor], config: UMTVideoConfig, task: str, report: ConversionReport | None = None
) -> dict[str, torch.Tensor]:
    """Rename and reshape the tensors of a published checkpoint.

    Args:
        state_dict: Published names -> tensors.
        config: Configuration of the model they belong to.
        task: "pretraining" or "classification".
        report: Filled with what became of each tensor.

    Returns:
        State dict that loads strictly into the task's model.

    Raises:
        ValueError: If the task is unknown, a tensor has no place, one is missing or has another shape than the
            model's, or a stored position table is not the one that `config` computes.
    """
    if task not in TASK_CLASSES:
        raise ValueError(f"task must be one of {sorted(TASK_CLASSES)}, got {task!r}.")
    report = report if report is not None else ConversionReport()
    converted: dict[str, torch.Tensor] = {}
    unknown = []
    for name, tensor in state_dict.items():
        bare = re.sub(r"^(?:backbone\.|encoder\.)", "", name)
        if bare == "pos_embed" and not config.learnable_position_embedding:
            _check_position_table(name, tensor, config)
            report.set_aside[name] = "equals the sinusoid table that the configuration computes"
            continue
        parts = _convert_tensor(bare, tensor, config)
        if parts is None:
            unknown.append(name)
            continue
        converted.update(parts)
        report.used[name] = sorted(parts)
    _check_complete(converted, unknown, _expected_shapes(config, task), task)
    return converted


def convert_checkpoint(
    path: str | os.PathLike, config: UMTVideoConfig | str, task: str | None, output_dir: str | os.PathLike
) -> ConversionReport:
    """Convert a released `.pth` file to a folder that `from_pretrained` loads.

    Args:
        path: The file. It is read with `weights_only=True`.
        config: Configuration, or our name of the checkpoint (see `build_published_config`).
        task: "pretraining" or "classification"; `None` with a name takes the name's own.
        output_dir: Folder to write, with safetensors weights and `config.json`.

    Returns:
        What became of each tensor.

    Raises:
        ValueError: As for `convert_state_dict`, or if the file holds no state dict.
    """
    if isinstance(config, str):
        config, named_task = build_published_config(config)
        task = task or named_task
    report = ConversionReport()
    converted = convert_state_dict(load_published_state_dict(path), config, task or "", report)
    model = TASK_CLASSES[task].from_pretrained(None, config=config, state_dict=converted)
    model.save_pretrained(output_dir)
    return report


def load_published_state_dict(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Read a published `.pth` file: the dict under `model`, else under `module`, else the file itself.

    Raises:
        ValueError: If there are other things than tensors in it.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("model", "module"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path}: no state dict found, neither at the top nor under 'model' or 'module'.")
    return content


def _convert_tensor(name: str, tensor: torch.Tensor, config: UMTVideoConfig) -> dict[str, torch.Tensor] | None:
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


def _expected_shapes(config: UMTVideoConfig, task: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = TASK_CLASSES[task](config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _check_position_table(name: str, stored: torch.Tensor, config: UMTVideoConfig) -> None:
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


__all__ = ["ConversionReport", "build_published_config", "convert_checkpoint", "convert_state_dict"]
