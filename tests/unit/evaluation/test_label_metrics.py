"""F1, mean class accuracy and average precision, against counts by hand and formulas that share no code."""

import itertools

import numpy as np
import pytest

from umt_hf.evaluation.classification import ClassifiedVideos, TaggedVideos, list_metric_names
from umt_hf.evaluation.metrics.labels import compute_f1, compute_ranking_precision, compute_ranking_precisions


def count_average_precision(scores: list[float], truth: list[bool]) -> float:
    """By definition: for each true video, the share of true ones among those that score as high or higher."""
    shares = []
    for score, is_true in zip(scores, truth, strict=True):
        if is_true:
            above = [other for value, other in zip(scores, truth, strict=True) if value >= score]
            shares.append(sum(above) / len(above))
    return sum(shares) / len(shares)


def test_average_precision_by_hand():
    """Ranked: true, false, true, false; precision 1 at the first step of recall, 2/3 at the second."""
    scores, truth = np.array([0.9, 0.8, 0.7, 0.1]), np.array([True, False, True, False])
    assert compute_ranking_precision(scores, truth) == pytest.approx((1 + 2 / 3) / 2)
    assert compute_ranking_precision(-scores, truth) == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert compute_ranking_precision(scores, ~truth & False) is None


def test_average_precision_equals_its_definition_with_ties():
    rng = np.random.default_rng(0)
    for _ in range(200):
        scores = rng.integers(0, 5, 12) / 4
        truth = rng.random(12) < 0.4
        if truth.any():
            found = compute_ranking_precision(scores, truth)
            assert found == pytest.approx(count_average_precision(scores.tolist(), truth.tolist()))
            order = rng.permutation(12)
            assert compute_ranking_precision(scores[order], truth[order]) == pytest.approx(found)


def test_a_video_that_was_never_scored_is_never_found():
    scores, truth = np.array([0.9, np.nan, 0.1]), np.array([True, True, False])
    assert compute_ranking_precision(scores, truth) == pytest.approx(1 / 2)
    assert compute_ranking_precision(np.full(3, np.nan), truth) == 0
    assert compute_ranking_precisions(np.stack([scores, scores], 1), np.stack([truth, ~truth], 1)) == pytest.approx(
        [1 / 2, 1 / 2]
    )


def test_f1_by_hand():
    """Class 0: 1 hit, 1 false alarm; class 1: 1 hit, 1 miss; class 2: 1 miss; class 3 does not occur."""
    said = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=bool)
    shown = np.array([[1, 0, 1, 0], [0, 1, 0, 0], [0, 1, 0, 0]], dtype=bool)
    micro, macro = compute_f1(said, shown)
    assert micro == pytest.approx(2 * 2 / (2 * 2 + 1 + 2))
    assert macro == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert compute_f1(said & False, shown & False) == (0, 0)


def test_macro_f1_and_mean_class_accuracy_of_single_labels():
    said, labels = [0, 0, 1, 2, 0, 1], [0, 0, 0, 1, 1, 1]
    found = ClassifiedVideos(np.eye(4, dtype=np.float32)[said], np.array(labels), {}).compute_metrics()
    assert found["mean_class_accuracy"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    # Class 0: 2 of 3 said and 2 of 3 shown; class 1: 1 of 2 and 1 of 3; class 2 is said once; class 3 not at all.
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 * 1 / (2 + 3) + 0) / 3)
    assert found["top1_accuracy"] == 1 / 2


def test_an_unreadable_video_is_wrong_in_every_figure():
    scores = np.eye(2, dtype=np.float32)[[0, 1, 0]]
    scores[2] = 0
    found = ClassifiedVideos(scores, np.array([0, 1, 0]), {2: "bad.mp4: cut"}).compute_metrics()
    assert found["mean_class_accuracy"] == pytest.approx((1 / 2 + 1) / 2)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)
    shown = np.array([[1, 0], [0, 1], [1, 0]], dtype=bool)
    found = TaggedVideos(scores, shown, {2: "bad.mp4: cut"}).compute_metrics()
    assert found["map"] == pytest.approx((1 / 2 + 1) / 2) and found["unreadable_videos"] == 1
    assert found["micro_f1"] == pytest.approx(4 / 5) and found["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)


def test_mean_average_precision_is_over_classes_that_are_shown():
    scores = np.array([[0.9, 0.2, 0.6], [0.4, 0.8, 0.6], [0.6, 0.7, 0.6]], dtype=np.float32)
    shown = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0]], dtype=bool)
    found = TaggedVideos(scores, shown, {})
    assert found.compute_class_precisions() == [pytest.approx((1 + 2 / 3) / 2), 1.0, None]
    assert found.compute_metrics()["map"] == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)
    with pytest.raises(ValueError, match="No held-out video has a label"):
        TaggedVideos(scores, shown & False, {}).compute_metrics()


@pytest.mark.parametrize(("num_classes", "many_labels"), itertools.product([2, 6], [False, True]))
def test_the_names_of_metrics_are_those_that_are_measured(num_classes, many_labels):
    scores = np.eye(num_classes, dtype=np.float32)
    found = (
        TaggedVideos(scores, scores > 0, {}) if many_labels else ClassifiedVideos(scores, np.arange(num_classes), {})
    )
    assert list_metric_names(num_classes, many_labels) == [
        name for name in found.compute_metrics() if name != "unreadable_videos"
    ]
