"""The report of an evaluation: what a number depends on, and the files it is written to."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel

from ..processing.processing_umt_video_text import UMTVideoTextProcessor
from ..runs.arguments import EvaluatedModelArguments, EvaluationDataArguments
from ..runs.folder import collect_versions, hash_source

logger = logging.getLogger(__name__)


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
