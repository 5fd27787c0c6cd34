"""Figures of classifiers beside accuracy: F1, and for several labels per video average precision.

Legend: V videos, C classes.
"""

import numpy as np

THRESHOLD = 0.5


def compute_f1(predicted: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """Micro and macro F1, 2 TP / (2 TP + FP + FN).

    Args:
        predicted: Classes that are said of each video, boolean `(V, C)`.
        true: Classes that it shows, boolean `(V, C)`.

    Returns:
        F1 of all pairs of video and class together, and the mean over classes. Classes that are neither said nor shown
        have no F1 and count in no mean; without any it is 0.
    """
    hits = (predicted & true).sum(axis=0)
    both = predicted.sum(axis=0) + true.sum(axis=0)
    if not both.any():
        return 0.0, 0.0
    occurs = both > 0
    return float(2 * hits.sum() / both.sum()), float((2 * hits[occurs] / both[occurs]).mean())


def compute_ranking_precision(scores: np.ndarray, is_true: np.ndarray) -> float | None:
    """Area under the curve of precision over recall of one class: the sum of precision times each step of recall.

    Videos of equal scores are found together, so that their order does not matter.

    Args:
        scores: Of the class `(V,)`; NaN where a video was never scored, which is then never found.
        is_true: Whether the videos show the class, boolean `(V,)`.

    Returns:
        In [0, 1]; `None` if no video shows the class.

    Source: the curve without interpolation, as scikit-learn's `average_precision_score` has it.
    """
    if not is_true.any():
        return None
    is_scored = ~np.isnan(scores)
    values, hits = scores[is_scored], is_true[is_scored]
    order = np.argsort(-values, kind="stable")
    values, hits = values[order], hits[order].cumsum()
    # The last of the videos that share a score.
    ends = np.flatnonzero(np.append(np.diff(values) != 0, [True] * bool(len(values))))
    precision = hits[ends] / (ends + 1)
    steps = np.diff(hits[ends], prepend=0)
    return float((steps * precision).sum() / is_true.sum())


def compute_ranking_precisions(scores: np.ndarray, true: np.ndarray) -> list[float | None]:
    """Average precision of each class of `(V, C)`; see `compute_ranking_precision`."""
    return [compute_ranking_precision(*columns) for columns in zip(scores.T, true.T, strict=True)]
