r"""Test a UMT action detector on held-out key frames: frame mAP at IoU 0.5, results in AVA's format, a picture.

    umt-hf evaluate detection --model_name_or_path outputs/detector \
        --data validation.json --output_dir outputs/detector/test

Source: Gu et al., "AVA", CVPR 2018 (metric); Li et al., "Unmasked Teacher", ICCV 2023, section 4.
"""

import csv
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..data.ava_labels import AVA_EVALUATED_IDS, AVA_LABELS
from ..data.key_frames import KeyFrame, load_detections, load_key_frames, read_exclusions, read_label_map
from ..data.unreadable import UnreadableVideos
from ..inference.detection import ActionDetector, pad_boxes, read_frames, to_shares
from ..inference.engine import in_model, read_ahead
from ..inference.held_out import build_bar, evaluation_mode, mark_nonfinite, plan_shard, require_finite, share_rows
from ..inference.loading import list_class_names
from ..modeling.modeling_umt_video import UMTVideoForActionDetection
from ..plots import PicturedFrame, plot_detections
from ..processing.decoding import VideoDecodingError
from ..processing.detection_transforms import prepare_test_clip
from ..processing.key_clips import read_key_clip
from ..processing.video_processing_umt_video import UMTVideoProcessor
from ..runs.arguments import (
    EvaluatedModelArguments,
    KeyFrameSamplingArguments,
    NamedDataArguments,
    ReportArguments,
    SkippingArguments,
    SourceArguments,
    TimedWorkerArguments,
)
from ..runs.config import describe, script
from ..runs.disk import name_unfinished, put_file
from ..runs.folder import BOX_PICTURE, BOX_RESULTS_FILE
from .found import count_key_frames
from .metrics.frame_map import compute_frame_map
from .report import describe_run, write_report
from .setup import measured_run, override_settings, require_names, say_tested

logger = logging.getLogger(__name__)

MAX_PICTURED_NAMES = 4
UNKNOWN_SIDE = 10**6  # of a frame that could not be read: keeps its true boxes valid


@dataclass
class DetectionData:
    """Held-out key frames.

    Args:
        frames: What the model is given: boxes, from a detector or the annotations, with scores.
        truth: What is there: key frames with annotated boxes and labels, also those without a detection.
        names: Names of the classes.
        evaluated: Indices of the classes that count.
    """

    frames: list[KeyFrame]
    truth: list[KeyFrame]
    names: list[str]
    evaluated: list[int]


def load_detection_data(
    source: str,
    *,
    data_root: str | None = None,
    class_names: Sequence[str] | None = None,
    label_keys: Sequence[str] = ("labels",),
    detector_boxes: str | None = None,
    min_box_score: float = 0.8,
    ground_truth: str | None = None,
    excluded: str | None = None,
    label_map: str | None = None,
    box_noise: float = 0.0,
) -> DetectionData:
    """Read what a test needs.

    Args:
        source: Key frames; see `load_key_frames`.
        data_root: Folder of the videos.
        class_names: Names of the model's classes.
        label_keys: Keys of an object in a JSON list that hold its labels.
        detector_boxes: Boxes to test with; default: the annotated ones, which are then right by definition.
        min_box_score: Detections below it are left out.
        ground_truth: Annotations to test against; default: those of `source`.
        excluded: Key frames that do not count.
        label_map: Classes that count; default: all, of AVA the 60 that are evaluated.
        box_noise: Move each edge of a box at random by up to this share of its side, as a detector would.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If a file is malformed, or nothing is left to test.
    """
    frames, names = load_key_frames(source, data_root, class_names, label_keys)
    truth = frames
    if ground_truth is not None:
        truth, _ = load_key_frames(ground_truth, data_root, names, label_keys)
    if detector_boxes is not None:
        frames = load_detections(detector_boxes, frames, source, min_box_score)
    left_out = read_exclusions(excluded) if excluded is not None else set()
    frames = [frame for frame in frames if frame.boxes and frame.key not in left_out]
    truth = [frame for frame in truth if frame.boxes and frame.key not in left_out]
    if not frames or not truth:
        raise ValueError(f"{source}: no key frame is left to test; check ground_truth, excluded and min_box_score.")
    if box_noise:
        # Seeded by the key frame's number, so that processes and repeated runs shake alike.
        frames = [shake_boxes(frame, box_noise, np.random.default_rng(number)) for number, frame in enumerate(frames)]
    evaluated = list(range(len(names)))
    if label_map is not None:
        evaluated = read_label_map(label_map)
    # Published AVA figures are means over these 60 of the 80 classes.
    elif names == list(AVA_LABELS):
        evaluated = [number - 1 for number in AVA_EVALUATED_IDS]
    return DetectionData(frames, truth, names, evaluated)


def shake_boxes(frame: KeyFrame, noise: float, rng: np.random.Generator) -> KeyFrame:
    """The same key frame with each edge of each box moved by up to `noise` of its side, uniformly."""
    boxes = np.array(frame.boxes)
    sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    moved: list[list[float]] = [
        list(map(float, box)) for box in boxes + sides * rng.uniform(-noise, noise, boxes.shape)
    ]
    return replace(frame, boxes=moved)


@dataclass
class DetectedActions:
    """Scores of held-out key frames, the same in every process.

    Args:
        scores: Probability of each class for each box `(all boxes, C)`, not yet times the boxes' own scores; 0 where
            the video was unreadable.
        sizes: Width and height of the frame of each key frame `(K, 2)`; 0 where it was unreadable.
        unreadable: Number of each key frame that could not be read -> reason.
    """

    scores: np.ndarray
    sizes: np.ndarray
    unreadable: dict[int, str]


class KeyFrameClips(torch.utils.data.Dataset):
    """The test view of each key frame, or why it cannot be read.

    Args:
        frames: Key frames.
        processor: Of the model.
        patch_size: Of the model.
    """

    def __init__(self, frames: Sequence[KeyFrame], processor: UMTVideoProcessor, patch_size: int):
        self.frames, self.processor, self.patch_size = frames, processor, patch_size

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`index`, `pixel_values (T, 3, H, W)`, `boxes (M, 4)` and the frame's `size`, or `index` and `error`."""
        frame = self.frames[index]
        try:
            pixels = read_frames(self.processor, frame.video, frame.key_seconds, frame.key_frame)
        except VideoDecodingError as error:
            return {"index": index, "error": str(error)}
        height, width = pixels.shape[-2:]
        shares = to_shares(frame.boxes, frame.width or width, frame.height or height)
        clip, boxes = prepare_test_clip(pixels, shares, self.processor, self.patch_size)
        return {"index": index, "pixel_values": clip, "boxes": boxes, "size": (width, height)}


def detect_actions(
    model: UMTVideoForActionDetection,
    processor: UMTVideoProcessor,
    frames: Sequence[KeyFrame],
    accelerator: Accelerator,
    *,
    batch_size: int,
    num_workers: int | None = 0,
    max_skipped_ratio: float = 0.05,
    show_progress: bool = False,
) -> DetectedActions:
    """Score every box once, whatever the number of processes.

    Only clips of one size go through the model together, so that none is padded for another's sake.

    Args:
        model: `UMTVideoForActionDetection`, on the accelerator's device.
        processor: Of the model.
        frames: Key frames with boxes.
        accelerator: Of the run; all processes must call this.
        batch_size: Clips that a process takes at a time.
        num_workers: Worker processes that decode; 0: this one does.
        max_skipped_ratio: Share of unreadable key frames past which there is no result.
        show_progress: Whether the main process draws a bar of its share.

    Raises:
        ValueError: If more key frames than that could not be read, or scores are NaN or infinite; it names the first.
    """
    starts = np.cumsum([0, *(len(frame.boxes) for frame in frames)])
    scores = torch.zeros(int(starts[-1]), len(list_class_names(model.config)))
    sizes = torch.zeros(len(frames), 2)
    failures: list[tuple[int, str]] = []
    clips = KeyFrameClips(frames, processor, model.config.patch_size)
    batches = plan_shard(len(frames), batch_size, accelerator)
    videos, total = [frame.video for frame in frames], sum(map(len, batches))
    loader = read_ahead(clips, batches, num_workers, videos=videos, collate_fn=list)
    with evaluation_mode(model, accelerator), build_bar(total, "frame", accelerator, show_progress) as progress:
        for samples in loader:
            failures += [(sample["index"], sample["error"]) for sample in samples if "error" in sample]
            # Clips of different shapes are not padded: padding would change what convolution and attention see.
            for group in _group_by_size(sample for sample in samples if "error" not in sample):
                batch = pad_boxes([sample["boxes"] for sample in group])
                batch["pixel_values"] = torch.stack([sample["pixel_values"] for sample in group])
                with in_model():
                    batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
                    found = mark_nonfinite(model(**batch).logits).sigmoid().cpu()
                for sample, own in zip(group, found, strict=True):
                    index, start = sample["index"], int(starts[sample["index"]])
                    scores[start : start + len(sample["boxes"])] = own[: len(sample["boxes"])]
                    sizes[index] = torch.tensor(sample["size"])
            progress.update(len(samples))
    share_rows(scores, accelerator)
    share_rows(sizes, accelerator)
    require_finite(model, scores, "boxes", lambda row: _name_box(frames, starts, row))
    unreadable = dict(sorted(gather_object(failures)))
    reasons = list(unreadable.values())
    UnreadableVideos().count(len(frames), reasons, max_skipped_ratio, kind="held-out key frames", error=ValueError)
    return DetectedActions(scores.numpy(), sizes.numpy().astype(int), unreadable)


def _name_box(frames: Sequence[KeyFrame], starts: np.ndarray, row: int) -> str:
    frame = frames[int(np.searchsorted(starts, row, side="right")) - 1]
    return f"a box of {frame.name}, {frame.moment}"


def _group_by_size(samples: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    groups: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for sample in samples:
        groups.setdefault(tuple(sample["pixel_values"].shape), []).append(sample)
    yield from groups.values()


def list_detections(data: DetectionData, found: DetectedActions) -> list[dict[str, np.ndarray]]:
    """Detections of each key frame of `data.frames`: `boxes (M, 4)` as shares of the frame, `scores (M, C)`.

    A score is the class's probability times the box's own score, as published.
    """
    detections, start = [], 0
    for number, frame in enumerate(data.frames):
        end = start + len(frame.boxes)
        if number in found.unreadable:
            # A key frame that cannot be read keeps its true boxes, which then count as missed.
            detections.append({"boxes": np.zeros((0, 4)), "scores": np.zeros((0, found.scores.shape[1]))})
        else:
            width, height = found.sizes[number]
            boxes = to_shares(frame.boxes, frame.width or width, frame.height or height).double().numpy()
            detections.append({"boxes": boxes, "scores": found.scores[start:end] * np.array(frame.scores)[:, None]})
        start = end
    return detections


def compute_detection_metrics(data: DetectionData, found: DetectedActions) -> dict[str, Any]:
    """`map50` and `ap50_per_class` (by index), over all key frames that have true boxes or detections."""
    frame_sizes = {frame.key: size for frame, size in zip(data.frames, found.sizes, strict=True)}
    numbers = {frame.key: i for i, frame in enumerate(data.frames)}
    detections, truth = list_detections(data, found), {frame.key: frame for frame in data.truth}
    predictions, references = [], []
    # Key frames without detections count by their true boxes, those without truth by false alarms.
    for key in dict.fromkeys([*truth, *numbers]):
        prediction: dict[str, Any] = {"boxes": [], "classes": [], "scores": []}
        if key in numbers:
            detection = detections[numbers[key]]
            prediction = {
                # Every box is a detection of every class, as AVA's evaluation takes them.
                "boxes": detection["boxes"].repeat(len(data.evaluated), axis=0),
                "classes": np.tile(data.evaluated, len(detection["boxes"])),
                "scores": detection["scores"][:, data.evaluated].reshape(-1),
            }
        predictions.append(prediction)
        boxes, labels = list_truth(truth.get(key), frame_sizes.get(key, (0, 0)), data.evaluated)
        references.append(
            {
                "boxes": boxes.repeat([len(own) for own in labels], axis=0),
                "classes": np.array([label for own in labels for label in own], dtype=int),
            }
        )
    return compute_frame_map(predictions, references)


def list_truth(
    frame: KeyFrame | None, size: Sequence[int], evaluated: list[int]
) -> tuple[np.ndarray, list[list[int]]]:
    """True boxes of a key frame as shares of it, `(M, 4)`, and the labels of each that count.

    Args:
        frame: Annotations, or `None`.
        size: Width and height of the frame; 0 where it was not read, and then nothing was found in it either.
        evaluated: Classes that count.
    """
    if frame is None:
        return np.zeros((0, 4)), []
    width, height = (
        stated or read or UNKNOWN_SIDE for stated, read in zip((frame.width, frame.height), size, strict=True)
    )
    labels = [[label for label in own if label in evaluated] for own in frame.labels]
    return to_shares(frame.boxes, width, height).double().numpy(), labels


def write_results(data: DetectionData, found: DetectedActions, path: str | Path) -> None:
    """Write every (box, class) pair in AVA's result format: name, moment, box, class from 1 on, score."""
    path = Path(path)
    with name_unfinished(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        for frame, detection in zip(data.frames, list_detections(data, found), strict=True):
            for box, scores in zip(detection["boxes"], detection["scores"], strict=True):
                edges = [f"{value:.5f}" for value in box]
                for label, score in enumerate(scores, start=1):
                    writer.writerow([frame.name, frame.moment, *edges, label, f"{score:.5f}"])
    put_file(name_unfinished(path), path)


@dataclass(kw_only=True)
class TestedBoxArguments:
    """Which boxes are tested, and against what."""

    label_keys: list[str] = describe(["labels"], "Keys of an object in a JSON list that hold its labels.")
    detector_boxes: str | None = describe(
        None, "Boxes of a detector to test with; default: the annotated boxes, which no detector has to find then."
    )
    min_box_score: float = describe(0.8, "Score below which a detector's box is left out.")
    ground_truth: str | None = describe(None, "Annotations to test against; default: those of the tested data.")
    excluded: str | None = describe(None, "CSV of key frames that are not tested (movie,second).")
    label_map: str | None = describe(
        None, "Label map (.pbtxt) of the classes that count; default: all, and 60 classes of AVA."
    )


@dataclass(kw_only=True)
class TestedKeyFrameArguments(
    NamedDataArguments,
    TestedBoxArguments,
    SourceArguments,
    KeyFrameSamplingArguments,
    TimedWorkerArguments,
    SkippingArguments,
):
    """Held-out key frames (AVA's CSV or JSON, or a JSON list); clips are taken as the model's processor does."""

    box_noise: float = describe(0.0, "Move each edge of a box at random by up to this share of its side.")

    def __post_init__(self) -> None:
        KeyFrameSamplingArguments.__post_init__(self)
        TimedWorkerArguments.__post_init__(self)


@dataclass(kw_only=True)
class DetectionReportArguments(ReportArguments):
    """How much at a time, and what is written; a batch counts clips."""

    num_pictured: int = describe(8, "Key frames in the picture; 0: no picture.")
    min_pictured_score: float = describe(0.3, "Score from which a class is written at its box.")


SECTIONS = {
    "model": EvaluatedModelArguments,
    "data": TestedKeyFrameArguments,
    "evaluation": DetectionReportArguments,
}


def load_detector(
    args: EvaluatedModelArguments, data: TestedKeyFrameArguments, device: torch.device
) -> ActionDetector:
    """The detector with all its weights, and its processor with the settings of the run.

    Raises:
        ValueError: If model or data are not named, or the folder lacks weights: random ones give a number too.
    """
    name, _ = require_names(args, data)
    detector = ActionDetector(name, device, args.attn_implementation, torch.float32, tokens=args)
    override_settings(detector.processor, data, ("sampling_strategy", "frame_stride", "frame_span", "decoder"))
    return detector


def load_tested_frames(args: TestedKeyFrameArguments, names: list[str]) -> DetectionData:
    """Read what the arguments name; see `load_detection_data`."""
    return load_detection_data(
        str(args.data),
        data_root=args.data_root,
        class_names=names,
        label_keys=args.label_keys,
        detector_boxes=args.detector_boxes,
        min_box_score=args.min_box_score,
        ground_truth=args.ground_truth,
        excluded=args.excluded,
        label_map=args.label_map,
        box_noise=args.box_noise,
    )


@script(SECTIONS)
def main(
    model_args: EvaluatedModelArguments, data_args: TestedKeyFrameArguments, args: DetectionReportArguments
) -> dict[str, float]:
    """Load, detect, report; also the results as CSV and a picture.

    Returns:
        `map50`, and the number of unreadable key frames.
    """
    accelerator = Accelerator(mixed_precision=model_args.mixed_precision)
    detector = load_detector(model_args, data_args, accelerator.device)
    processor, names = detector.processor, detector.labels
    data = load_tested_frames(data_args, names)
    say_tested(model_args, data_args, count_key_frames(data.frames))
    with measured_run(accelerator, data_args):
        found = detect_actions(
            detector.model,
            processor,
            data.frames,
            accelerator,
            batch_size=args.per_device_eval_batch_size,
            num_workers=data_args.dataloader_num_workers,
            max_skipped_ratio=data_args.max_skipped_ratio,
            show_progress=not args.disable_tqdm,
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
            **dataclasses.asdict(data_args),
            **describe_run(detector.model, processor, accelerator, model_args, data_args),
            "sampling_strategy": processor.sampling_strategy,
            "frame_stride": processor.frame_stride,
            "frame_span": processor.frame_span,
            **dataclasses.asdict(args),
        }
        write_report(accelerator, args.report_folder, report)
        write_results(data, found, Path(args.report_folder) / BOX_RESULTS_FILE)
        if args.num_pictured:
            draw_detections(data, found, processor, args)
    accelerator.wait_for_everyone()
    return metrics


def describe_boxes(args: TestedKeyFrameArguments) -> str:
    """Where the boxes of a test came from: a number depends on that."""
    source = "annotations" if args.detector_boxes is None else "detector"
    return source if not args.box_noise else f"{source}, edges moved by up to {args.box_noise:g} of a side"


def draw_detections(
    data: DetectionData, found: DetectedActions, processor: UMTVideoProcessor, args: DetectionReportArguments
) -> None:
    """Write `detections.png`: key frames spread over the data, with boxes, labels and scores."""
    readable = [number for number in range(len(data.frames)) if number not in found.unreadable]
    # Spread over the data, whose neighbours look alike.
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
    picture = Path(args.report_folder) / BOX_PICTURE
    plot_detections(pictured, picture)
    logger.info("Picture: %s", picture)


if __name__ == "__main__":
    main()
