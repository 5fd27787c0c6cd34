"""How well moments of videos are found: R@1 at an overlap in time, and average precision over ranked moments."""

from collections.abc import Sequence

import numpy as np

from ...inference.moments import compute_overlap
from .frame_map import compute_average_precision

Span = tuple[float, float]
RECALL_OVERLAPS = (0.5, 0.7)
MAP_OVERLAPS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))


def compute_moment_figures(found: Sequence[Sequence[Span]], truth: Sequence[Sequence[Span]]) -> dict[str, float]:
    """Figures over queries, each a share in [0, 1].

    Args:
        found: For each query, start and end in seconds of the moments that were found, best first; of some query one
            at least.
        truth: For each query, those that are right.

    Returns:
        `r1_iou_0.5` and `r1_iou_0.7` (the best moment overlaps a right one by as much, as intersection over union in
        time), `map` (mean of the average precision at 0.5, 0.55, ..., 0.95), `map_iou_0.5` and `map_iou_0.75`.

    Raises:
        ValueError: If there are no queries, or one has no right moment.

    Source: Lei et al., "Detecting Moments and Highlights in Videos via Natural Language Queries", NeurIPS 2021.

    Examples:
        >>> from umt_hf.evaluation.metrics.moments import compute_moment_figures
        >>> figures = compute_moment_figures([[(0.0, 3.0), (3.0, 6.0)]], [[(3.0, 6.0)]])
        >>> figures["r1_iou_0.5"], figures["map"]
        (0.0, 0.5)
    """
    if not truth or not all(truth):
        raise ValueError("Every query needs a right moment, and there must be one query at least.")
    firsts = [
        max((compute_overlap(spans[0], right) for right in rights), default=0.0) if spans else 0.0
        for spans, rights in zip(found, truth, strict=True)
    ]
    figures = {f"r1_iou_{limit:g}": float(np.mean(np.array(firsts) >= limit)) for limit in RECALL_OVERLAPS}
    precisions = {
        limit: float(np.mean([score_query(spans, rights, limit) for spans, rights in zip(found, truth, strict=True)]))
        for limit in MAP_OVERLAPS
    }
    figures["map"] = float(np.mean(list(precisions.values())))
    return figures | {f"map_iou_{limit:g}": precisions[limit] for limit in (0.5, 0.75)}


def score_query(found: Sequence[Span], truth: Sequence[Span], limit: float) -> float:
    """Average precision of a query's ranked moments; each right one can be found once.

    Args:
        found: Start and end of each, best first.
        truth: The right ones.
        limit: Intersection over union that counts as found.
    """
    if not found:
        return 0.0
    marks = np.zeros(len(found), dtype=bool)
    taken: set[int] = set()
    for place, span in enumerate(found):
        overlaps = [0.0 if i in taken else compute_overlap(span, right) for i, right in enumerate(truth)]
        best = int(np.argmax(overlaps))
        if overlaps[best] >= limit:
            marks[place] = True
            taken.add(best)
    return compute_average_precision(-np.arange(len(found), dtype=float), marks, len(truth))
