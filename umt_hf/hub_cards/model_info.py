"""Facts of a model folder or Hub repository, found without loading a weight.

The network is built on the meta device, which counts parameters and operations without memory; names and shapes of the
stored weights come from the headers of their safetensors files.

Legend: T frames, H and W height and width, N tokens.
"""

import json
import math
import os
import shlex
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import get_safetensors_metadata, is_offline_mode, snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..inference.loading import get_model_class, list_class_names, load_video_processor
from ..inference.starts import (
    describe_bad_config,
    locate_model,
    read_model_fields,
    require_model_type,
    require_start,
    require_weight_files,
)
from ..modeling.configuration_umt_video import UMTVideoConfig
from ..modeling.masking_umt_video import sample_random_mask, sample_tube_mask
from ..modeling.modeling_umt_video import UMTVideoForVideoClassification
from ..processing.video_processing_umt_video import UMTVideoProcessor
from ..runs.folder import (
    CONVERSION_FILE,
    IMAGE_PROCESSOR_FILE,
    PROCESSOR_FILE,
    RECIPE_FILE,
    TOKENIZER_FILE,
    VERSIONS_FILE,
    VIDEO_PROCESSOR_FILE,
    WEIGHTS_FILE,
    WEIGHTS_INDEX_FILE,
)
from ..runs.models import MODEL_TYPES, MODELS_BY_NAME, ModelClass

PARTS = {"vision_model": "vision", "text_model": "text", "answer_decoder": "answer_decoder"}
SMALL_FILES = ["*.json", "*.yaml", "*.txt"]
PROCESSOR_SETTINGS = (
    "num_frames", "sampling_strategy", "frame_stride", "fps", "first_seconds", "num_clips", "num_crops", "size",
    "do_center_crop", "crop_size", "decoder",
)  # fmt: skip
SHOWN_LABELS = SHOWN_WEIGHTS = 5
RUN_SETTINGS = (
    "train_data", "train_corpora", "validation_data", "teacher_name_or_path", "model_name_or_path",
    "vision_name_or_path", "max_steps",
    "num_train_epochs", "per_device_train_batch_size", "learning_rate", "mixed_precision", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class ForwardCost:
    """Operations of a forward pass of one part over one clip or text.

    Attributes:
        part: What runs.
        num_tokens: Tokens that it sees.
        flops: Floating-point operations of all matrix products, two for a multiplication with its addition.
    """

    part: str
    num_tokens: int
    flops: int


@dataclass(frozen=True)
class StoredWeights:
    """What the safetensors files hold, by their headers.

    Attributes:
        num_tensors: Their number.
        dtypes: Names of their types, as safetensors writes them.
        size_bytes: Bytes of the numbers.
        missing: Weights of the model that are not stored, or in another shape.
        unexpected: Stored tensors that the model does not have.
    """

    num_tensors: int
    dtypes: tuple[str, ...]
    size_bytes: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


@dataclass(frozen=True)
class ModelInfo:
    """What `describe_model` finds.

    Attributes:
        name: Folder or Hub id.
        architecture: Class of the model.
        task: What it is for.
        command: Example of a command for it.
        parameters: Numbers of parameters by part, and their `total`; shared ones count once.
        num_frames: Frames of a clip.
        image_size: Height and width of a frame as the model sees it.
        tokens_per_clip: Tokens of a clip when none is masked.
        costs: Forward passes, float32 and without a mask unless the part says otherwise.
        num_views: Clips times crops of a video in `views_flops`.
        views_flops: Operations of all views of a video: `num_views` times the first of `costs`.
        labels: Names of the classes, in order; none without a classifier.
        unnamed: Why some or all classes of a released model have no names.
        processor: Settings of the video processor; empty without one.
        max_text_tokens: Tokens of a text; `None` without a tokenizer.
        weights: `None` where there are no safetensors files.
        size_bytes: Bytes of the files in the folder, sub-folders not counted; of a Hub id, those on this machine.
        versions: Content of `versions.json`.
        run: Chosen settings of `run.yaml`.
    """

    name: str
    architecture: str
    task: str
    command: str
    parameters: dict[str, int]
    num_frames: int
    image_size: tuple[int, int]
    tokens_per_clip: int
    costs: tuple[ForwardCost, ...]
    num_views: int
    views_flops: int
    labels: tuple[str, ...]
    unnamed: str | None
    processor: dict[str, Any]
    max_text_tokens: int | None
    weights: StoredWeights | None
    size_bytes: int
    versions: dict[str, str]
    run: dict[str, Any]

    def format(self) -> str:
        """Write it as lines for people."""
        height, width = self.image_size
        counts = [f"{part.replace('_', ' ')} {_shorten(count).strip()}" for part, count in self.parameters.items()]
        lines = [
            ("model", self.name),
            ("class", f"{self.architecture}: {self.task}"),
            ("try", self.command),
            ("parameters", ", ".join(counts)),
            ("clip", f"{self.num_frames} frames of {height} x {width}, {self.tokens_per_clip} tokens"),
        ]
        lines += [
            ("cost" if i == 0 else "", f"{_shorten(cost.flops)}FLOPs  {cost.part}, {cost.num_tokens} tokens")
            for i, cost in enumerate(self.costs)
        ]
        if self.num_views > 1:
            lines.append(("", f"{_shorten(self.views_flops)}FLOPs  all {self.num_views} views of a video"))
        lines.append(("", "(2 FLOPs a multiply-add, forward)"))
        if self.labels:
            more = ", ..." if len(self.labels) > SHOWN_LABELS else ""
            why = "" if self.unnamed is None else f"; {self.unnamed}, and `umt-hf convert --labels FILE` sets them"
            lines.append(("labels", f"{len(self.labels)}: {', '.join(self.labels[:SHOWN_LABELS])}{more}{why}"))
        lines.append(("processor", "none in the folder" if not self.processor else _list_settings(self.processor)))
        if self.max_text_tokens is not None:
            lines.append(("texts", f"up to {self.max_text_tokens} tokens"))
        lines += [("weights" if i == 0 else "", line) for i, line in enumerate(self._format_weights())]
        lines.append(("on disk", f"{_shorten(self.size_bytes)}B"))
        if self.versions:
            lines.append(("made with", _list_settings(self.versions)))
        if self.run:
            lines.append(("run", _list_settings(self.run)))
        layout = {"width": 80, "subsequent_indent": " " * 12, "break_long_words": False, "break_on_hyphens": False}
        return "\n".join(textwrap.fill(f"{name:<12}{text}", **layout) for name, text in lines)

    def _format_weights(self) -> list[str]:
        weights = self.weights
        if weights is None:
            return ["no safetensors files here"]
        lines = [f"{weights.num_tensors} tensors, {', '.join(weights.dtypes)}, {_shorten(weights.size_bytes)}B"]
        for names, what in ((weights.missing, "missing"), (weights.unexpected, "unexpected")):
            if names:
                more = ", ..." if len(names) > SHOWN_WEIGHTS else ""
                lines.append(f"{len(names)} {what}: {', '.join(names[:SHOWN_WEIGHTS])}{more}")
        return lines


def describe_model(model: str | os.PathLike, num_clips: int | None = None, num_crops: int | None = None) -> ModelInfo:
    """Describe what a model is and what it costs.

    Args:
        model: Folder, or Hub id, of which only small files and the headers of the weights are read.
        num_clips: Clips per video; default: the processor's.
        num_crops: Crops per clip, likewise.

    Raises:
        FileNotFoundError: If there is no such folder, it has no configuration, or the Hub does not know it.
        ValueError: If it holds no UMT model.
    """
    located = locate_model(model)
    folder = _find_folder(located)
    require_model_type(model, read_model_fields(folder), MODEL_TYPES, "a UMT model folder")
    config, row, network = _build_network(folder, str(model))
    vision_config: Any = getattr(config, "vision_config", config)
    processor = _load_processor(folder)
    num_frames, height, width = _find_clip_shape(processor, vision_config)
    clip = torch.empty(1, num_frames, vision_config.num_channels, height, width, device="meta")
    max_text_tokens = _read(folder / TOKENIZER_FILE, json.loads).get("model_max_length")
    costs = measure_costs(network, clip, max_text_tokens)
    settings = {} if processor is None else json.loads(processor.to_json_string())
    num_views = (num_clips or settings.get("num_clips", 1)) * (num_crops or settings.get("num_crops", 1))
    return ModelInfo(
        name=str(model),
        architecture=row.name,
        task=row.title,
        command=row.command.format(model=shlex.quote(str(model))),
        parameters=count_parameters(network),
        num_frames=num_frames,
        image_size=(height, width),
        tokens_per_clip=costs[0].num_tokens,
        costs=costs,
        num_views=num_views,
        views_flops=num_views * costs[0].flops,
        labels=tuple(list_class_names(config)) if hasattr(network, "classifier") else (),
        unnamed=_read(folder / CONVERSION_FILE, json.loads).get("unnamed"),
        processor={name: settings[name] for name in PROCESSOR_SETTINGS if settings.get(name) is not None},
        max_text_tokens=max_text_tokens,
        weights=compare_weights(network, _read_headers(folder, located)),
        size_bytes=sum(file.stat().st_size for file in folder.iterdir() if file.is_file()),
        versions=_read(folder / VERSIONS_FILE, json.loads),
        run=_select_run_settings(_read(folder / RECIPE_FILE, yaml.safe_load)),
    )


def _build_network(folder: Path, name: str) -> tuple[Any, ModelClass, Any]:
    """A folder's configuration, what is known of its class, and its network on the meta device."""
    try:
        config = AutoConfig.from_pretrained(folder)
    except StrictDataclassError as error:
        raise ValueError(describe_bad_config(name, error)) from error
    row = find_row(config, name)
    # Shapes without memory, so that a model of any size is described at once.
    with torch.device("meta"):
        network: Any = get_model_class(row)(config).eval().requires_grad_(False)
    network.to("meta")  # the position table too, which PyTorch before 2.7 leaves behind
    return config, row, network


def require_stored_weights(folder: Path) -> None:
    """Make sure, without loading one, that a folder holds all weights of the model that it is said to be.

    Raises:
        OSError: If there is no such folder, or it has no weights.
        ValueError: If it is not a UMT model, or lacks weights; the first of them are named.
    """
    require_start(folder, "any")
    _, row, network = _build_network(folder, str(folder))
    stored = compare_weights(network, _read_headers(folder, folder))
    assert stored is not None, "There are weights."
    if stored.missing:
        found = f", and holds {stored.unexpected[0]}, which it should not" if stored.unexpected else ""
        raise ValueError(
            f"{folder} is not a complete {row.name}: it lacks {', '.join(stored.missing[:SHOWN_WEIGHTS])}"
            f"{' ...' if len(stored.missing) > SHOWN_WEIGHTS else ''}{found}."
        )


def find_row(config: PreTrainedConfig, name: str) -> ModelClass:
    """What is known of the class that a folder was saved from.

    Args:
        config: Of the folder.
        name: What errors call the folder.

    Raises:
        ValueError: If it is not a UMT model.
    """
    architecture = (config.architectures or ["no architecture"])[0]
    if architecture not in MODELS_BY_NAME:
        raise ValueError(
            f"{name} is not a UMT model folder: its config.json is of type {config.model_type!r} and names "
            f"{architecture}. Known classes are {', '.join(MODELS_BY_NAME)}."
        )
    return MODELS_BY_NAME[architecture]


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Numbers of parameters: `vision`, `text`, `answer_decoder` and `head` where the model has them, and `total`."""
    is_encoder_alone = not hasattr(model, "vision_model")
    counts = dict.fromkeys(("vision", "text", "answer_decoder", "head"), 0)
    for name, parameter in model.named_parameters():
        part = "vision" if is_encoder_alone else PARTS.get(name.split(".")[0], "head")
        counts[part] += parameter.numel()
    return {**{part: count for part, count in counts.items() if count}, "total": sum(counts.values())}


def measure_costs(model: Any, clip: torch.Tensor, max_text_tokens: int | None = None) -> tuple[ForwardCost, ...]:
    """Count the operations of a model's parts; nothing is computed on the meta device.

    Args:
        model: On the meta device.
        clip: `(1, T, channels, H, W)`, there too.
        max_text_tokens: Tokens of a text; default: 32, as in stage 2.

    Returns:
        First a clip with all its tokens, through the complete model where it takes nothing but a clip; in pre-training
        also the clip's visible tokens; with texts also a text alone, and together with the clip's tokens.

    Raises:
        ValueError: If the clip does not fit the patch grid.
    """
    encoder: Any = getattr(model, "vision_model", model)
    time, rows, columns = encoder.embeddings.patch_embeddings.compute_grid(clip)
    num_tokens = time * rows * columns
    is_classifier = isinstance(model, UMTVideoForVideoClassification)
    network, part = (model, "video encoder and classifier") if is_classifier else (encoder, "video encoder")
    costs = [ForwardCost(part, num_tokens, _count_flops(lambda: network(clip)))]
    if hasattr(model, "alignment_heads"):
        config = encoder.config
        if config.mask_type == "random":
            mask = sample_random_mask(1, num_tokens, config.mask_ratio)
        else:
            mask = sample_tube_mask(1, time, rows * columns, config.mask_ratio)
        visible = torch.zeros(1, int((~mask).sum()), dtype=torch.long, device="meta")
        has_heads = not hasattr(model, "text_model")
        part = f"{'student with alignment heads' if has_heads else 'video encoder'}, {config.mask_ratio:.0%} masked"
        student = model if has_heads else encoder
        costs.append(ForwardCost(part, visible.shape[1], _count_flops(lambda: student(clip, visible_indices=visible))))
    if (text_model := getattr(model, "text_model", None)) is not None:
        length = max_text_tokens or 32
        words = torch.zeros(1, length, dtype=torch.long, device="meta")
        states = torch.empty(1, length, text_model.config.hidden_size, device="meta")
        seen = torch.empty(1, num_tokens, encoder.config.hidden_size, device="meta")
        if hasattr(model, "answer_decoder"):
            flops = _count_flops(lambda: text_model(words, encoder_hidden_states=seen, mode="multi_modal"))
            costs.append(ForwardCost("question that looks at the video", length, flops))
        else:
            costs.append(ForwardCost("text encoder", length, _count_flops(lambda: text_model(words))))
        if hasattr(model, "matching_head"):
            flops = _count_flops(lambda: model.match(seen, states))
            costs.append(ForwardCost("matching of a text with the video", length, flops))
    return tuple(costs)


def compare_weights(
    model: PreTrainedModel, headers: dict[str, tuple[tuple[int, ...], str]] | None
) -> StoredWeights | None:
    """Compare what is stored with what a model needs.

    Args:
        model: May be on the meta device.
        headers: Shape and type of each stored tensor by its name; `None` if nothing is stored.
    """
    if headers is None:
        return None
    needed = model.state_dict(keep_vars=True)
    # By identity: tied weights are stored under one of their names.
    stored = {id(needed[name]) for name, (shape, _) in headers.items() if _has_shape(needed, name, shape)}
    sizes = [_count_bytes(shape, dtype) for shape, dtype in headers.values()]
    return StoredWeights(
        num_tensors=len(headers),
        dtypes=tuple(sorted({dtype for _, dtype in headers.values()})),
        size_bytes=sum(sizes),
        # Tensors that share their memory are stored once.
        missing=tuple(name for name, tensor in needed.items() if id(tensor) not in stored),
        unexpected=tuple(sorted(headers.keys() - needed.keys())),
    )


def _has_shape(tensors: dict[str, torch.Tensor], name: str, shape: tuple[int, ...]) -> bool:
    return name in tensors and tuple(tensors[name].shape) == shape


def _count_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of a tensor whose type safetensors calls `F32`, `BF16`, `I64`, `F8_E4M3`, `BOOL`, ..."""
    # Names end with their bits; of F8_E4M3 the first part counts.
    bits = 8 if dtype == "BOOL" else int("".join(filter(str.isdigit, dtype.split("_")[0])))
    return math.prod(shape) * bits // 8


def _count_flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def _find_folder(name: str) -> Path:
    """The folder, or that of the small files of a Hub repository."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=SMALL_FILES))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{name} is not a folder here, and cannot be read from the Hub: {error}") from error


def _read_headers(folder: Path, model: str | os.PathLike) -> dict[str, tuple[tuple[int, ...], str]] | None:
    """Shape and type of every stored tensor; of a Hub repository, over the network where it is not on this machine."""
    index = _read(folder / WEIGHTS_INDEX_FILE, json.loads)
    if Path(model).is_dir() and (index or (folder / WEIGHTS_FILE).is_file()):
        require_weight_files(folder)
    names = sorted(set(index["weight_map"].values())) if index else [WEIGHTS_FILE]
    files = [folder / name for name in names]
    if all(file.is_file() for file in files):
        headers = {}
        for file in files:
            with safe_open(file, "pt") as stored:
                for name in stored.keys():  # noqa: SIM118, not a mapping
                    tensor = stored.get_slice(name)
                    headers[name] = (tuple(tensor.get_shape()), tensor.get_dtype())
        return headers
    # Only the Hub gives headers without the files.
    if Path(model).is_dir() or is_offline_mode():
        return None
    found = get_safetensors_metadata(str(model))
    return {
        name: (tuple(tensor.shape), tensor.dtype)
        for file in found.files_metadata.values()
        for name, tensor in file.tensors.items()
    }


def _load_processor(folder: Path) -> UMTVideoProcessor | None:
    names = (VIDEO_PROCESSOR_FILE, IMAGE_PROCESSOR_FILE, PROCESSOR_FILE)
    if not any((folder / name).is_file() for name in names):
        return None
    return load_video_processor(folder)


def _find_clip_shape(processor: UMTVideoProcessor | None, config: UMTVideoConfig) -> tuple[int, int, int]:
    """Frames, height and width that the model sees: as the processor makes them, or else as configured."""
    if processor is None:
        return config.num_frames, config.image_size, config.image_size
    size: Any = processor.crop_size if processor.do_center_crop else processor.size
    if not size.height or not size.width:  # frames of any shape
        return processor.num_frames, config.image_size, config.image_size
    return processor.num_frames, size.height, size.width


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    """Content of a file; empty where there is none."""
    return parse(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _select_run_settings(run: dict[str, Any]) -> dict[str, Any]:
    settings = {name: value for section in run.values() for name, value in section.items()}
    return {name: settings[name] for name in RUN_SETTINGS if settings.get(name) is not None}


def _list_settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_flatten(value)}" for name, value in settings.items())


def _flatten(value: Any) -> str:
    """Write `{"height": 224, "width": 224}` as `height 224 width 224`, and a list likewise."""
    if isinstance(value, dict):
        return " ".join(f"{name} {number}" for name, number in value.items() if number is not None)
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _shorten(number: int) -> str:
    """Write a number with three digits and a unit prefix, for example `86.4 M`."""
    for prefix, unit in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= unit:
            return f"{number / unit:.{2 if number < 10 * unit else 1 if number < 100 * unit else 0}f} {prefix}"
    return f"{number} "


__all__ = ["ForwardCost", "ModelInfo", "StoredWeights", "describe_model"]
