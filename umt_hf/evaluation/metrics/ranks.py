"""Ranks and recall of a search, with ties counted against the searcher."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import torch

RECALL_AT = (1, 5, 10)


def mark_right_items(right_items: Sequence[Sequence[int]], num_items: int) -> torch.Tensor:
    """Which items each query is looking for.

    Args:
        right_items: For each query, the indices of its right items.
        num_items: Items that are searched.

    Returns:
        Boolean `(queries, num_items)`.
    """
    marks = torch.zeros(len(right_items), num_items, dtype=torch.bool)
    rows = np.repeat(np.arange(len(right_items)), [len(items) for items in right_items])
    columns = [item for items in right_items for item in items]
    marks[torch.from_numpy(rows), torch.tensor(columns, dtype=torch.long)] = True
    return marks


def compute_ranks(scores: torch.Tensor, is_right: torch.Tensor) -> torch.Tensor:
    """Place of each query's best right item, counted from 1.

    Wrong items of the same score come before it: a model that scores everything alike finds nothing. So the rank
    depends neither on the order of the items nor on a sorting algorithm.

    Args:
        scores: `(queries, items)`, higher is better.
        is_right: Boolean of the same shape; every row has a right item, or several of which the best one counts.

    Returns:
        Integers `(queries,)`.

    Raises:
        ValueError: If a query has no right item, or a score is NaN or infinite.

    Examples:
        >>> import torch
        >>> from umt_hf.evaluation.metrics.ranks import compute_ranks
        >>> scores = torch.tensor([[0.9, 0.1, 0.3], [0.2, 0.5, 0.5]])
        >>> compute_ranks(scores, torch.eye(3, dtype=torch.bool)[:2])
        tensor([1, 2])
    """
    if not torch.isfinite(scores).all():
        raise ValueError("Scores hold NaN or infinite values: the model's outputs overflow; try another precision.")
    if not is_right.any(dim=1).all():
        row = int((~is_right.any(dim=1)).nonzero()[0])
        raise ValueError(f"Query {row} has no right item to be found.")
    # Of several right items the best one counts.
    best = scores.masked_fill(~is_right, -torch.inf).amax(dim=1, keepdim=True)
    return 1 + ((scores >= best) & ~is_right).sum(dim=1)


class RetrievalRecall(evaluate.Metric):
    """Share of queries found among the first 1, 5 and 10 items, the mean of these, and the median rank.

    It takes ranks instead of scores, since the scores of a large set fit in no memory: see `compute_ranks`.

    Examples:
        >>> from umt_hf.evaluation.metrics.ranks import RetrievalRecall
        >>> RetrievalRecall().compute(predictions=[1, 1, 4, 12])
        {'r1': 0.5, 'r5': 0.75, 'r10': 0.75, 'mean_recall': 0.66..., 'median_rank': 2.5}
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="",
            inputs_description="predictions: rank of each query's best right item, counted from 1.",
            features=datasets.Features({"predictions": datasets.Value("int64")}),
        )

    # pyrefly: ignore[bad-override]  `evaluate` calls it with these columns by name
    def _compute(self, predictions: Any) -> dict[str, float]:
        ranks = np.asarray(predictions)
        recalls = {f"r{k}": float((ranks <= k).mean()) for k in RECALL_AT}
        mean = sum(recalls.values()) / len(recalls)
        return {**recalls, "mean_recall": mean, "median_rank": float(np.median(ranks))}
