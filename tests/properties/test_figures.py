"""Learning rates, average precision, ranks and search against formulas written out."""

import math
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from umt_hf.evaluation.metrics.frame_map import compute_average_precision, compute_frame_map, compute_iou
from umt_hf.evaluation.metrics.ranks import compute_ranks, mark_right_items
from umt_hf.inference.video_index import FACTS, VECTOR_COLUMN, compare_all
from umt_hf.training.optimization import Schedule

KINDS = ("cosine_to_minimum", "cosine_above_minimum")
rates = st.floats(1e-9, 1) | st.sampled_from([0.0, 1e-6, 1.5e-4, 1e-3])


@given(st.integers(1, 500), st.floats(0, 1), st.booleans(), rates, rates, rates, st.sampled_from(KINDS), st.data())
def test_rates_rise_linearly_and_fall_by_half_a_cosine(total, warmup, is_whole, peak, minimum, start, kind, data):
    warmup = warmup * total if not is_whole else float(int(warmup * total))
    schedule = Schedule(total, warmup, peak, minimum, start, kind)
    step = data.draw(st.integers(0, total + 3))
    found = schedule(step)
    if kind == "cosine_above_minimum":
        share = (
            step / warmup
            if step < warmup
            else (1 + math.cos(math.pi * min((step - warmup) / max(total - warmup, 1), 1))) / 2
        )
        expected = max(peak * share, minimum) if peak else 0.0
    elif step < warmup:
        expected = start + (peak - start) * step / max(warmup - 1, 1)
    else:
        progress = min(max(step - warmup, 0) / max(total - warmup, 1), 1)
        expected = (peak + minimum) / 2 + (peak - minimum) / 2 * math.cos(math.pi * progress)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert math.isfinite(found) and found >= -1e-12
    bound = max(peak, minimum, start) if kind == "cosine_to_minimum" else max(peak, minimum)
    # A warm-up that ends between two steps passes the peak by less than a step's rise.
    assert found <= bound * (1 + 1e-9) + (peak / max(warmup - 1, 1) if step < warmup else 0)


boxes = st.tuples(*[st.integers(0, 6)] * 4).map(lambda c: (c[0], c[1], c[0] + 1 + c[2], c[1] + 1 + c[3]))
detections = st.lists(st.tuples(boxes, st.integers(0, 2), st.integers(0, 40)), max_size=5)
frames = st.lists(
    st.tuples(detections, st.lists(st.tuples(boxes, st.integers(0, 2)), max_size=4)), min_size=1, max_size=4
)


def overlap(a: tuple[int, ...], b: tuple[int, ...]) -> Fraction:
    """Cells of a grid that both cover, over those that one covers."""
    cells = [{(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])} for box in (a, b)]
    return Fraction(len(cells[0] & cells[1]), len(cells[0] | cells[1]))


def score_class(annotated: list, label: int) -> float:
    """Area under the best precision at each recall or a higher one, by running over thresholds."""
    found = [
        (score, number, place, box)
        for number, (detected, _) in enumerate(annotated)
        for place, (box, kind, score) in enumerate(detected)
        if kind == label
    ]
    truth = [[box for box, kind in true if kind == label] for _, true in annotated]
    num_truth = sum(map(len, truth))
    taken: set[tuple[int, int]] = set()
    points = [(Fraction(0), Fraction(0))]
    hits = 0
    for rank, (_, number, _, box) in enumerate(sorted(found, key=lambda item: (-item[0], item[1], item[2])), start=1):
        overlaps = [overlap(box, true) for true in truth[number]]
        if overlaps and max(overlaps) >= Fraction(1, 2):
            best = overlaps.index(max(overlaps))
            if (number, best) not in taken:
                taken.add((number, best))
                hits += 1
        points.append((Fraction(hits, num_truth), Fraction(hits, rank)))
    area = Fraction(0)
    for before, after in zip(points, points[1:], strict=False):
        area += (after[0] - before[0]) * max(precision for recall, precision in points[1:] if recall >= after[0])
    return float(area)


@given(frames)
def test_average_precision_of_detection(annotated):
    predictions = [
        {
            "boxes": [box for box, _, _ in detected],
            "classes": np.array([kind for _, kind, _ in detected], dtype=int),
            "scores": np.array([score / 40 for _, _, score in detected]),
        }
        for detected, _ in annotated
    ]
    references = [
        {"boxes": [box for box, _ in true], "classes": np.array([kind for _, kind in true], dtype=int)}
        for _, true in annotated
    ]
    labels = sorted({kind for _, true in annotated for _, kind in true})
    if not labels:
        with pytest.raises(ValueError, match="no valid box"):
            compute_frame_map(predictions, references)
        return
    found = compute_frame_map(predictions, references)
    expected = {label: score_class(annotated, label) for label in labels}
    assert found["ap50_per_class"] == pytest.approx(expected)
    assert found["map50"] == pytest.approx(sum(expected.values()) / len(expected))


@given(boxes, boxes)
def test_overlaps_are_counts_of_cells(a, b):
    assert compute_iou(np.array([a], float), np.array([b], float))[0, 0] == pytest.approx(float(overlap(a, b)))


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=20), st.integers(0, 5))
def test_average_precision_is_between_0_and_1(marks, missed):
    scores, hits = np.array([score for score, _ in marks], float), np.array([hit for _, hit in marks])
    num_truth = int(hits.sum()) + missed
    if num_truth:
        found = compute_average_precision(scores, hits, num_truth)
        assert 0 <= found <= 1 and (found > 0) == bool(hits.any())


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True), min_size=1, max_size=5), st.data())
def test_ranks_count_what_is_at_least_as_good(right, data):
    scores = [data.draw(st.lists(st.integers(-3, 3), min_size=6, max_size=6)) for _ in right]
    marks = mark_right_items(right, 6)
    found = compute_ranks(torch.tensor(scores, dtype=torch.float), marks).tolist()
    for rank, row, items in zip(found, scores, right, strict=True):
        best = max(row[item] for item in items)
        assert rank == 1 + len([item for item in range(6) if item not in items and row[item] >= best])


@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 15), st.integers(0, 2**31), st.data())
def test_search_is_sorting_by_inner_product(count, width, top_k, seed, data):
    rng = np.random.default_rng(seed)
    vectors = rng.integers(-3, 4, (count, width)).astype(np.float32)
    query = rng.integers(-3, 4, width).astype(np.float32)
    facts = {name: [str(i) for i in range(count)] if name == "path" else [None] * count for name in FACTS}
    stored = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), width)
    batches = pa.table(facts | {VECTOR_COLUMN: stored}).to_batches(max_chunksize=data.draw(st.integers(1, 12)))
    found, scores = compare_all(batches, query, top_k)
    hits = found.to_pylist()
    products = vectors @ query
    assert len(hits) == min(top_k, count) and len({hit["path"] for hit in hits}) == len(hits)
    named = [products[int(hit["path"])] for hit in hits]
    assert named == sorted(products, reverse=True)[: len(hits)] == scores.tolist()
