"""What the evaluation scripts share: arguments, loading of a whole model, and the report of a run."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from transformers import PreTrainedModel

from ..processing.processing_umt_video_text import UMTVideoTextProcessor
from ..training.arguments import describe
from ..training.checkpointing import collect_versions

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class EvaluatedModelArguments:
    """The model."""

    model_name_or_path: str | None = describe(None, "Folder or Hub id of the model with its processor.")
    attn_implementation: str = describe("sdpa", "Attention: sdpa, eager, flash_attention_2, ...")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = describe(None, "none = as `accelerate` is configured.")


@dataclass(kw_only=True)
class EvaluationDataArguments:
    """Held-out videos and how they are read; what is left out is as the model's processor says."""

    data: str | None = describe(None, "JSON list, folder of Parquet files, or `datasets` name.")
    data_root: str | None = describe(None, "Folder that relative paths start from; none = the annotation's own.")
    dataset_config_name: str | None = describe(None, "Configuration of a `datasets` dataset.")
    split: str = describe("test", "Split of a `datasets` dataset.")
    video_column: str = describe("video", "Column that holds the video; `image` for images.")
    num_frames: int | None = describe(None, "Frames of a clip; 1 for images.")
    first_seconds: float | None = describe(None, "Sample from a video's first seconds alone (DiDeMo: 30).")
    max_text_tokens: int | None = describe(None, "Tokens of a text, [CLS] included.")
    decoder: Literal["pyav", "decord", "torchcodec"] | None = describe(None, "Video reader.")
    dataloader_num_workers: int = describe(4, "Worker processes that decode, for each process.")

    def source_options(self) -> dict[str, Any]:
        """Arguments of `load_videos`."""
        return {
            "data_root": self.data_root,
            "config_name": self.dataset_config_name,
            "split": self.split,
            "video_column": self.video_column,
        }


@dataclass(kw_only=True)
class ReportArguments:
    """How much at a time, and where the report goes."""

    output_dir: str = describe("outputs/evaluation", "Folder for report.json (and predictions.json).")
    per_device_eval_batch_size: int = describe(32, "Videos, texts or pairs a process takes at a time.")

    def __post_init__(self) -> None:
        if self.per_device_eval_batch_size < 1:
            raise ValueError(f"per_device_eval_batch_size must be at least 1, got {self.per_device_eval_batch_size}.")


def load_whole_model(model_class: type[PreTrainedModel], args: EvaluatedModelArguments) -> PreTrainedModel:
    """The model with all its weights.

    Raises:
        ValueError: If the folder lacks weights: random ones would give a number too.
    """
    model, info = model_class.from_pretrained(
        args.model_name_or_path, attn_implementation=args.attn_implementation, output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError(
            f"{args.model_name_or_path} is no whole {model_class.__name__}: it lacks "
            f"{', '.join(sorted(info['missing_keys'])[:5])}."
        )
    return model


def require_names(model: EvaluatedModelArguments, data: EvaluationDataArguments) -> None:
    """Make sure that model and data are named.

    Raises:
        ValueError: If one of them is not.
    """
    for name, value in (("model_name_or_path", model.model_name_or_path), ("data", data.data)):
        if value is None:
            raise ValueError(f"Set {name}.")


def load_model_and_processor(
    model_class: type[PreTrainedModel], model: EvaluatedModelArguments, data: EvaluationDataArguments
) -> tuple[PreTrainedModel, UMTVideoTextProcessor]:
    """The model with all its weights, and its processor with the settings of the run.

    Raises:
        ValueError: If model or data are not named, or the folder lacks weights.
    """
    require_names(model, data)
    loaded = load_whole_model(model_class, model)
    processor = UMTVideoTextProcessor.from_pretrained(model.model_name_or_path)
    for name in ("num_frames", "first_seconds", "decoder"):
        if (value := getattr(data, name)) is not None:
            setattr(processor.video_processor, name, value)
    if data.max_text_tokens is not None:
        processor.tokenizer.model_max_length = data.max_text_tokens
    return loaded, processor


def describe_run(
    model: PreTrainedModel,
    processor: UMTVideoTextProcessor,
    accelerator: Accelerator,
    model_args: EvaluatedModelArguments,
    data: EvaluationDataArguments,
) -> dict[str, Any]:
    """What a number hangs on, apart from the task's own arguments."""
    return {
        "model": model_args.model_name_or_path,
        "data": data.data,
        "data_sha256": hash_source(data.data),
        "split": data.split if not Path(data.data).is_file() else None,
        "num_frames": processor.video_processor.num_frames,
        "frame_sampling": "middle",
        "first_seconds": processor.video_processor.first_seconds,
        "frame_size": dict(processor.video_processor.crop_size),
        "max_text_tokens": processor.tokenizer.model_max_length,
        "clean_text": processor.clean_text,
        "decoder": processor.video_processor.decoder,
        "dtype": str(model.dtype).removeprefix("torch."),
        "mixed_precision": accelerator.mixed_precision,
        "attn_implementation": model.config._attn_implementation,
        "device": accelerator.device.type,
        "num_processes": accelerator.num_processes,
        "versions": collect_versions(),
    }


def hash_source(source: str) -> str | None:
    """SHA-256 of a file, or of the names and contents of a folder's files; `None` for a dataset of the Hub."""
    path = Path(source)
    if not path.exists():
        return None
    digest = hashlib.sha256()
    if path.is_file():
        _update(digest, path)
        return digest.hexdigest()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(str(file.relative_to(path)).encode())
        _update(digest, file)
    return digest.hexdigest()


def _update(digest: Any, path: Path) -> None:
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)


def write_report(
    accelerator: Accelerator,
    output_dir: str,
    report: dict[str, Any],
    predictions: Sequence[dict[str, Any]] | None = None,
) -> None:
    """Write `report.json`, with predictions `predictions.json`, and log the figures; the main process does."""
    if not accelerator.is_main_process:
        return
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    if predictions is not None:
        (folder / "predictions.json").write_text(json.dumps(predictions, indent=2) + "\n")
    lines = [f"  {name:<36} {value:10.4f}" for name, value in report["metrics"].items()]
    logger.info("%s on %s:\n%s", report["model"], report["data"], "\n".join(lines))
    logger.info("Report: %s", folder / "report.json")
