"""Test a UMT action detector on held-out key frames: frame mAP at IoU 0.5, results in AVA's format, a picture.

    accelerate launch -m umt_hf.evaluation.detection --model_name_or_path outputs/detector \
        --data validation.json --output_dir outputs/detector/test

Source: Gu et al., "AVA", CVPR 2018 (metric); Li et al., "Unmasked Teacher", ICCV 2023, section 4.
"""

import dataclasses
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from accelerate import Accelerator

from ..inference.detection import (
    DetectedActions,
    DetectionData,
    compute_detection_metrics,
    detect_actions,
    list_detections,
    list_truth,
    load_detection_data,
    write_results,
)
from ..modeling.modeling_umt_video import UMTVideoForActionDetection
from ..processing.key_clips import read_key_clip
from ..processing.video_processing_umt_video import UMTVideoProcessor
from ..training.arguments import describe, parse_config
from ..training.checkpointing import collect_versions
from .report import (
    EvaluatedModelArguments,
    ReportArguments,
    hash_source,
    load_whole_model,
    require_names,
    write_report,
)

logger = logging.getLogger(__name__)

MAX_PICTURED_NAMES = 4


@dataclass(kw_only=True)
class TestedKeyFrameArguments:
    """Held-out key frames; how clips are taken is as the model's processor says, unless it is set here."""

    data: str | None = describe(None, "Key frames: AVA's CSV or JSON, or a JSON list.")
    data_root: str | None = describe(None, "Folder of the videos; none = that of the file.")
    label_keys: list[str] = describe(["labels"], "Keys of an object in a JSON list that hold its labels.")
    detector_boxes: str | None = describe(
        None, "Boxes of a detector to test with; none = the annotated boxes, which no detector has to find then."
    )
    min_box_score: float = describe(0.8, "Score below which a detector's box is left out.")
    box_noise: float = describe(0.0, "Move each edge of a box at random by up to this share of its side.")
    ground_truth: str | None = describe(None, "Annotations to test against; none = those of data.")
    excluded: str | None = describe(None, "CSV of key frames that are not tested (movie,second).")
    label_map: str | None = describe(None, "Label map (.pbtxt) of the classes that count; none = all, of AVA 60.")
    sampling_strategy: Literal["dense", "segments"] | None = describe(None, "How frames are chosen.")
    frame_stride: int | None = describe(None, "Frames from one to the next of a dense clip.")
    frame_span: int | None = describe(None, "Frames around the key frame that segments are parts of.")
    decoder: Literal["pyav", "decord", "torchcodec"] | None = describe(None, "Video reader.")
    dataloader_num_workers: int = describe(4, "Worker processes that decode, for each process.")
    max_skipped_ratio: float = describe(0.05, "Share of unreadable videos past which there is no result.")


@dataclass(kw_only=True)
class DetectionReportArguments(ReportArguments):
    """How much at a time, and what is written; a batch counts clips."""

    num_pictured: int = describe(8, "Key frames in the picture; 0 = no picture.")
    min_pictured_score: float = describe(0.3, "Score from which a class is written at its box.")


SECTIONS = {
    "model": EvaluatedModelArguments,
    "data": TestedKeyFrameArguments,
    "evaluation": DetectionReportArguments,
}


def load_detector(
    args: EvaluatedModelArguments, data: TestedKeyFrameArguments
) -> tuple[UMTVideoForActionDetection, UMTVideoProcessor]:
    """The detector with all its weights, and its processor with the settings of the run.

    Raises:
        ValueError: If model or data are not named, or the folder lacks weights: random ones give a number too.
    """
    require_names(args, data)
    model = load_whole_model(UMTVideoForActionDetection, args)
    processor = UMTVideoProcessor.from_pretrained(args.model_name_or_path)
    for name in ("sampling_strategy", "frame_stride", "frame_span", "decoder"):
        if (value := getattr(data, name)) is not None:
            setattr(processor, name, value)
    return model, processor


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Parse, load, detect, report; also the results as CSV and a picture.

    Args:
        arguments: Command line; `None` = the process's own.

    Returns:
        `map50`, and the number of unreadable key frames.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    model_args, data_args, args = parse_config(SECTIONS, sys.argv[1:] if arguments is None else arguments)
    accelerator = Accelerator(mixed_precision=model_args.mixed_precision)
    model, processor = load_detector(model_args, data_args)
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    data = load_detection_data(
        data_args.data,
        data_root=data_args.data_root,
        class_names=names,
        label_keys=data_args.label_keys,
        detector_boxes=data_args.detector_boxes,
        min_box_score=data_args.min_box_score,
        ground_truth=data_args.ground_truth,
        excluded=data_args.excluded,
        label_map=data_args.label_map,
        box_noise=data_args.box_noise,
    )
    found = detect_actions(
        model.to(accelerator.device),
        processor,
        data.frames,
        accelerator,
        batch_size=args.per_device_eval_batch_size,
        num_workers=data_args.dataloader_num_workers,
        max_skipped_ratio=data_args.max_skipped_ratio,
    )
    scores = compute_detection_metrics(data, found)
    metrics = {"map50": scores["map50"], "unreadable_videos": float(len(found.unreadable))}
    if accelerator.is_main_process:
        report = {
            "task": "action_detection",
            "metrics": metrics,
            "average_precision": {names[label]: value for label, value in scores["ap50_per_class"].items()},
            "unreadable": list(found.unreadable.values()),
            "num_key_frames": len(data.frames),
            "num_boxes": len(found.scores),
            "num_key_frames_with_truth": len(data.truth),
            "boxes": describe_boxes(data_args),
            "model": model_args.model_name_or_path,
            **dataclasses.asdict(data_args),
            "data_sha256": hash_source(data_args.data),
            "num_frames": processor.num_frames,
            "sampling_strategy": processor.sampling_strategy,
            "frame_stride": processor.frame_stride,
            "frame_span": processor.frame_span,
            "frame_size": dict(processor.size),
            "decoder": processor.decoder,
            "dtype": str(model.dtype).removeprefix("torch."),
            "mixed_precision": accelerator.mixed_precision,
            "attn_implementation": model.config._attn_implementation,
            "device": accelerator.device.type,
            "num_processes": accelerator.num_processes,
            "versions": collect_versions(),
            **dataclasses.asdict(args),
        }
        write_report(accelerator, args.output_dir, report)
        write_results(data, found, Path(args.output_dir) / "results.csv")
        if args.num_pictured:
            draw_detections(data, found, processor, args)
    accelerator.wait_for_everyone()
    return metrics


def describe_boxes(args: TestedKeyFrameArguments) -> str:
    """Where the boxes of a test came from: a number hangs on that."""
    source = "annotations" if args.detector_boxes is None else "detector"
    return source if not args.box_noise else f"{source}, edges moved by up to {args.box_noise:g} of a side"


def draw_detections(
    data: DetectionData, found: DetectedActions, processor: UMTVideoProcessor, args: DetectionReportArguments
) -> None:
    """Write `detections.png`: key frames spread over the data, with boxes, labels and scores."""
    from ..plots import PicturedFrame, plot_detections  # matplotlib is not needed to detect

    readable = [number for number in range(len(data.frames)) if number not in found.unreadable]
    places = np.linspace(0, len(readable) - 1, min(args.num_pictured, len(readable))).astype(int)
    detections, truth = list_detections(data, found), {frame.key: frame for frame in data.truth}
    pictured = []
    for number in (readable[place] for place in places):
        frame, detection = data.frames[number], detections[number]
        best = [
            sorted(data.evaluated, key=lambda label: -own[label])[:MAX_PICTURED_NAMES] for own in detection["scores"]
        ]
        true_boxes, true_labels = list_truth(truth.get(frame.key), found.sizes[number], data.evaluated)
        pictured.append(
            PicturedFrame(
                image=read_key_clip(
                    frame.video,
                    [0],
                    key_seconds=frame.key_seconds,
                    key_frame=frame.key_frame,
                    decoder=processor.decoder,
                )[0],
                title=f"{frame.name}, {frame.moment}",
                boxes=detection["boxes"],
                labels=[
                    [(data.names[label], own[label]) for label in labels if own[label] >= args.min_pictured_score]
                    for own, labels in zip(detection["scores"], best, strict=True)
                ],
                true_boxes=true_boxes,
                true_labels=[[data.names[label] for label in labels] for labels in true_labels],
            )
        )
    picture = Path(args.output_dir) / "detections.png"
    plot_detections(pictured, picture)
    logger.info("Picture: %s", picture)


if __name__ == "__main__":
    main()
