"""The report of an evaluation: what a number depends on, and the files it is written to."""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel

from ..data.lists.folders import list_folder
from ..data.lists.paths import is_remote
from ..data.lists.stores import fetch_list, list_addresses
from ..data.splits import FOLDER, has_splits, name_kind
from ..data.video_files import describe_file
from ..inference.engine import allows_tf32
from ..inference.loading import describe_kept_tokens
from ..processing.processing_umt_video_text import UMTVideoTextProcessor
from ..processing.video_processing_umt_video import UMTVideoProcessor
from ..runs.arguments import EvaluatedModelArguments
from ..runs.disk import write_text
from ..runs.folder import PREDICTIONS_FILE, REPORT_FILE, collect_versions, hash_source

logger = logging.getLogger(__name__)


def describe_run(
    model: PreTrainedModel,
    processor: UMTVideoProcessor | UMTVideoTextProcessor,
    accelerator: Accelerator,
    model_args: EvaluatedModelArguments,
    data: Any,
) -> dict[str, Any]:
    """Settings that affect the result, for the report; the task adds what only it has.

    Args:
        model: The model that is tested.
        processor: Its processor, with the settings of the run.
        accelerator: Of the run.
        model_args: Arguments that name the model.
        data: Arguments that name the data; `split` is recorded where the data has splits.
    """
    video = processor if isinstance(processor, UMTVideoProcessor) else processor.video_processor
    # Enough to repeat the number: another decoder, precision or attention gives another one.
    record = {
        "model": model_args.model_name_or_path,
        "data": data.data,
        "split": data.split if hasattr(data, "split") and has_splits(data.data) else None,
        # One process writes the report, and need alone look at the files.
        "data_sha256": fingerprint_data(data.data) if accelerator.is_main_process else None,
        "num_frames": video.num_frames,
        "frame_sampling": video.sampling_strategy,
        "frame_size": dict(video.crop_size if video.do_center_crop else video.size),
        "decoder": video.decoder,
        "dtype": str(model.dtype).removeprefix("torch."),
        "mixed_precision": accelerator.mixed_precision,
        "tf32": allows_tf32(accelerator.device),
        "attn_implementation": model.config._attn_implementation,
        "kept_tokens": describe_kept_tokens(model.config, model_args.teacher_name_or_path),
        "device": accelerator.device.type,
        "num_processes": accelerator.num_processes,
        "versions": collect_versions(),
    }
    if isinstance(processor, UMTVideoTextProcessor):
        record |= {
            "frame_sampling": "middle",  # of models of video and text, whatever the processor's own strategy
            "frame_size": dict(video.crop_size),
            "first_seconds": video.first_seconds,
            "max_text_tokens": processor.tokenizer.model_max_length,
            "clean_text": processor.clean_text,
        }
    return record


def fingerprint_data(source: str) -> str | None:
    """SHA-256 that changes with the data: of a file its bytes, of a folder names, sizes and times (in a store, names).

    The bytes of videos are not read: they are many times those of a test, and would be read in vain.

    Args:
        source: What `load_videos` takes.

    Returns:
        `None` for a dataset of the Hub.
    """
    if is_remote(source):
        if name_kind(source) != FOLDER:
            return hash_source(str(fetch_list(source)))
        return hashlib.sha256("\0".join(list_addresses(source)).encode()).hexdigest()
    if not os.path.isdir(source):
        return hash_source(source)
    walked = [os.path.join(folder, name) for folder, _, names in os.walk(source) for name in names]
    is_table = any(path.endswith((".parquet", ".arrow")) for path in walked)
    paths = sorted(walked) if is_table else [video.path for video in list_folder(source).videos]
    digest = hashlib.sha256()
    for path in paths:
        file = describe_file(path)
        digest.update(f"{os.path.relpath(path, source)}\0{file.size_bytes}\0{file.modified_ns}\0".encode())
    return digest.hexdigest()


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
    write_text(folder / REPORT_FILE, json.dumps(report, indent=2) + "\n")
    if predictions is not None:
        write_text(folder / PREDICTIONS_FILE, json.dumps(predictions, indent=2) + "\n")
    lines = [f"  {name:<36} {value:10.4f}" for name, value in report["metrics"].items()]
    split = "" if report["split"] is None else f", split {report['split']}"
    logger.info("%s on %s%s:\n%s", report["model"], report["data"], split, "\n".join(lines))
    logger.info("Report: %s", folder / REPORT_FILE)
