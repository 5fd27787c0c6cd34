"""Frame mAP at IoU 0.5, as AVA defines it, as a local `evaluate.Metric`."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

IOU_THRESHOLD = 0.5


def compute_iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes `x1 y1 x2 y2`: `(N, 4)` and `(M, 4)` -> `(N, M)`."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=-1)
    areas = [(group[:, 2:] - group[:, :2]).prod(axis=-1) for group in (boxes, others)]
    return shared / (areas[0][:, None] + areas[1][None] - shared)


def mark_true_positives(boxes: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Which detections of one class in one frame, by falling score, are the first to find their true box."""
    marks = np.zeros(len(boxes), dtype=bool)
    if not len(boxes) or not len(truth):
        return marks
    iou = compute_iou(boxes, truth)
    taken = set()
    for row, best in enumerate(iou.argmax(axis=1)):
        # Each true box can be found once; a second detection of it is a false alarm.
        if iou[row, best] >= IOU_THRESHOLD and best not in taken:
            marks[row] = True
            taken.add(best)
    return marks


def compute_average_precision(scores: np.ndarray, is_true: np.ndarray, num_truth: int) -> float:
    """Area under precision, made to fall with recall, summed over every step of recall."""
    hits = is_true[np.argsort(-scores, kind="stable")].cumsum()
    precision = hits / np.arange(1, len(hits) + 1)
    # The published curve takes the best precision at this recall or a higher one.
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(hits, prepend=0) * precision).sum() / num_truth)


class FrameMeanAveragePrecision(evaluate.Metric):
    """Mean over the classes that have true boxes of the average precision at IoU 0.5.

    Rows are key frames; a frame without detections still counts with its true boxes. Empty boxes are left out.

    Source: Gu et al., "AVA", CVPR 2018, section 5; the every-point VOC form of average precision.

    Examples:
        >>> from umt_hf.evaluation.metrics import frame_map
        >>> truth = [{"boxes": [[0, 0, 10, 10]], "classes": [3]}]
        >>> found = [{**truth[0], "scores": [0.9]}]
        >>> metric = frame_map.FrameMeanAveragePrecision()
        >>> metric.compute(predictions=found, references=truth)
        {'map50': 1.0, 'ap50_per_class': {3: 1.0}}
    """

    def _info(self) -> evaluate.MetricInfo:
        boxes = {"boxes": [[datasets.Value("float64")]], "classes": [datasets.Value("int64")]}
        features = {"predictions": {**boxes, "scores": [datasets.Value("float64")]}, "references": boxes}
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="",
            inputs_description="per key frame: boxes x1 y1 x2 y2, the class of each box, and its score.",
            features=datasets.Features(features),
        )

    # pyrefly: ignore[bad-override]  `evaluate` calls it with these columns by name
    def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:
        return compute_frame_map(predictions, references)


def compute_frame_map(predictions: Sequence[dict[str, Any]], references: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What [`FrameMeanAveragePrecision`] computes, from lists or arrays, without a copy in an Arrow table.

    Args:
        predictions: For each key frame its `boxes (n, 4)`, `classes (n,)` and `scores (n,)`.
        references: For each key frame its true `boxes` and `classes`.

    Returns:
        `map50`, and `ap50_per_class` of the classes that have true boxes.

    Raises:
        ValueError: If there are no true boxes.
    """
    found = [_read_boxes(frame) for frame in predictions]
    truth = [_read_boxes(frame) for frame in references]
    classes = sorted({int(label) for frame in truth for label in frame["classes"]})
    if not classes:
        raise ValueError("references hold no valid box: there is nothing to be found.")
    per_class = {label: _score_class(found, truth, label) for label in classes}
    return {"map50": float(np.mean(list(per_class.values()))), "ap50_per_class": per_class}


def _read_boxes(frame: dict[str, Any]) -> dict[str, np.ndarray]:
    boxes = np.asarray(frame["boxes"], dtype=np.float64).reshape(-1, 4)
    is_valid = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    others = {name: np.asarray(values)[is_valid] for name, values in frame.items() if name != "boxes"}
    return {"boxes": boxes[is_valid], **others}


def _score_class(found: list[dict], truth: list[dict], label: int) -> float:
    scores, marks, num_truth = [], [], 0
    for detections, frame in zip(found, truth, strict=True):
        rows = np.flatnonzero(detections["classes"] == label)
        # The best detection takes a box first.
        rows = rows[np.argsort(-detections["scores"][rows], kind="stable")]
        true_boxes = frame["boxes"][frame["classes"] == label]
        num_truth += len(true_boxes)
        scores.append(detections["scores"][rows])
        marks.append(mark_true_positives(detections["boxes"][rows], true_boxes))
    return compute_average_precision(np.concatenate(scores), np.concatenate(marks), num_truth)
