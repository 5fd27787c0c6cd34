"""Ranks, recall and accuracy against cases counted by hand, and what a tie costs."""

import pytest
import torch

from umt_hf.evaluation.metrics.accuracy import ChoiceAccuracy, ExactAnswerAccuracy
from umt_hf.evaluation.metrics.ranks import RetrievalRecall, compute_ranks, mark_right_items


def rank(scores: list[list[float]], right_items: list[list[int]]) -> list[int]:
    scores = torch.tensor(scores)
    return compute_ranks(scores, mark_right_items(right_items, scores.shape[1])).tolist()


def test_ranks_by_hand():
    scores = [[0.9, 0.1, 0.5], [0.2, 0.3, 0.1], [0.3, 0.2, 0.1]]
    assert rank(scores, [[0], [2], [1]]) == [1, 3, 2]
    # The best of several counts, and right ones do not stand in each other's way.
    assert rank(scores, [[1, 2], [0, 1], [0, 1, 2]]) == [2, 1, 1]


def test_ties_count_against_the_searcher_in_any_order():
    assert rank([[0.0] * 4], [[0]]) == rank([[0.0] * 4], [[3]]) == [4]
    assert rank([[0.5, 0.5, 0.5, 0.1]], [[0, 1]]) == [2]
    scores, right = torch.randint(0, 3, (20, 12), generator=torch.Generator().manual_seed(0)).float(), [[0, 5]] * 20
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    moved = [[order.tolist().index(item) for item in items] for items in right]
    assert rank(scores.tolist(), right) == rank(scores[:, order].tolist(), moved)


def test_scores_that_say_nothing():
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="NaN or infinite"):
            rank([[0.0, value]], [[0]])
    with pytest.raises(ValueError, match="Query 1 has no right item"):
        rank([[0.0, 1.0], [0.0, 1.0]], [[0], []])


def test_recall_by_hand():
    found = RetrievalRecall(keep_in_memory=True).compute(predictions=[1, 1, 3, 6, 10, 11])
    assert found == pytest.approx(
        {"r1": 2 / 6, "r5": 3 / 6, "r10": 5 / 6, "mean_recall": (2 + 3 + 5) / 18, "median_rank": 4.5}
    )
    assert RetrievalRecall(keep_in_memory=True).compute(predictions=[7])["median_rank"] == 7


def test_exact_answers_by_hand():
    metric = ExactAnswerAccuracy(keep_in_memory=True)
    answers = ["cat", "Cat", None, "two dogs", ""]
    assert metric.compute(
        predictions=answers, references=[["cat"], ["cat"], ["cat"], ["dog", "two dogs"], ["no"]]
    ) == {"accuracy": 2 / 5}


def test_choices_by_hand():
    metric = ChoiceAccuracy(keep_in_memory=True)
    scores = [[0.1, 0.9], [0.6, 0.4], [0.5, 0.5], [0.2, 0.3, 0.5]]
    assert metric.compute(predictions=scores, references=[1, 1, 0, 2]) == {"accuracy": 2 / 4}
