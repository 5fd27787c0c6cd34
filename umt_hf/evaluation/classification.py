"""Test a UMT classifier with several views of each video, and write a report.

    accelerate launch -m umt_hf.evaluation.classification --model_name_or_path outputs/classifier \
        --data videos/test --num_clips 4 --num_crops 3 --output_dir outputs/classifier/test

Source: Li et al., "Unmasked Teacher", ICCV 2023, section 4 (test views).
"""

import dataclasses
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from accelerate import Accelerator
from datasets import Dataset

from ..data.annotations import identify_video
from ..data.sources import load_videos
from ..finetuning.classification import check_labels
from ..inference.classification import ClassifiedVideos, classify_videos, load_classifier
from ..training.arguments import describe, parse_config
from ..training.checkpointing import collect_versions
from .report import EvaluatedModelArguments, ReportArguments, hash_source, require_names, write_report

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class LabelledDataArguments:
    """Held-out videos and how they are read; what is left out is as the model's processor says."""

    data: str | None = describe(None, "CSV (path,label) or folder with a sub-folder for each class.")
    data_root: str | None = describe(None, "Folder that relative paths of a CSV start from; none = the CSV's own.")
    csv_separator: str = describe(",", "Separator of CSV columns, one character.")
    decoder: Literal["pyav", "decord", "torchcodec"] | None = describe(None, "Video reader.")
    dataloader_num_workers: int = describe(4, "Worker processes that decode, for each process.")
    max_skipped_ratio: float = describe(0.05, "Share of unreadable videos past which there is no result.")


@dataclass(kw_only=True)
class ViewArguments(ReportArguments):
    """Views of each video; a batch counts views."""

    num_clips: int = describe(4, "Clips of a video; published: 4, Something-Something 2.")
    num_crops: int = describe(3, "Crops of a clip.")


SECTIONS = {"model": EvaluatedModelArguments, "data": LabelledDataArguments, "evaluation": ViewArguments}


def list_predictions(table: Dataset, found: ClassifiedVideos, names: list[str]) -> list[dict[str, Any]]:
    """What was said about each video, in the order of the data."""
    rows = []
    for row, (video, label, best) in enumerate(zip(table["video"], table["label"], found.predictions, strict=True)):
        entry = {"row": row, "video": identify_video(video, row), "label": names[label]}
        if row in found.unreadable:
            rows.append({**entry, "error": found.unreadable[row]})
        else:
            rows.append({**entry, "prediction": names[best], "probability": round(float(found.scores[row, best]), 6)})
    return rows


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Parse, load, classify, report; also a picture of the confusion matrix.

    Args:
        arguments: Command line; `None` = the process's own.

    Returns:
        Top-1 and top-5 accuracy, and the number of unreadable videos.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    model_args, data, args = parse_config(SECTIONS, sys.argv[1:] if arguments is None else arguments)
    accelerator = Accelerator(mixed_precision=model_args.mixed_precision)
    require_names(model_args, data)
    model, processor = load_classifier(model_args)
    if data.decoder is not None:
        processor.decoder = data.decoder
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    table = load_videos(data.data, data.data_root, data.csv_separator, class_names=names)
    check_labels(data.data, table, names)
    found = classify_videos(
        model.to(accelerator.device),
        processor,
        table["video"],
        table["label"],
        accelerator,
        batch_size=args.per_device_eval_batch_size,
        num_clips=args.num_clips,
        num_crops=args.num_crops,
        num_workers=data.dataloader_num_workers,
        max_skipped_ratio=data.max_skipped_ratio,
    )
    metrics = found.compute_metrics()
    if accelerator.is_main_process:
        report = {
            "task": "classification",
            "metrics": metrics,
            "class_accuracy": dict(zip(names, found.compute_class_accuracies(), strict=True)),
            "unreadable": list(found.unreadable.values()),
            "num_videos": len(table),
            "model": model_args.model_name_or_path,
            "data": data.data,
            "data_sha256": hash_source(data.data),
            "num_frames": processor.num_frames,
            "frame_sampling": processor.sampling_strategy,
            "frame_size": dict(processor.crop_size),
            "view_merging": "mean of softmax",
            "decoder": processor.decoder,
            "dtype": str(model.dtype).removeprefix("torch."),
            "mixed_precision": accelerator.mixed_precision,
            "attn_implementation": model.config._attn_implementation,
            "device": accelerator.device.type,
            "num_processes": accelerator.num_processes,
            "versions": collect_versions(),
            **dataclasses.asdict(args),
        }
        write_report(accelerator, args.output_dir, report, list_predictions(table, found, names))
        draw_confusion(found, names, args.output_dir)
    accelerator.wait_for_everyone()
    return metrics


def draw_confusion(found: ClassifiedVideos, names: list[str], output_dir: str) -> None:
    """Write `confusion.png`."""
    from ..plots import plot_confusion_matrix  # matplotlib is not needed to classify

    plot_confusion_matrix(found.compute_confusion(), names, f"{output_dir}/confusion.png")


if __name__ == "__main__":
    main()
