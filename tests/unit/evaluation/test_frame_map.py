"""AVA's frame mAP against a direct, slow implementation on random boxes."""

import random

import pytest

from umt_hf.evaluation.metrics.frame_map import FrameMeanAveragePrecision


def overlap(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def slow_average_precision(found, truth, label):
    rows = [
        (score, number, box)
        for number, frame in enumerate(found)
        for box, name, score in zip(frame["boxes"], frame["classes"], frame["scores"], strict=True)
        if name == label
    ]
    boxes = [[b for b, c in zip(f["boxes"], f["classes"], strict=True) if c == label] for f in truth]
    total, taken, points = sum(map(len, boxes)), set(), []
    for count, (_, number, box) in enumerate(sorted(rows, key=lambda row: -row[0]), start=1):
        overlaps = [overlap(box, other) for other in boxes[number]]
        if overlaps and max(overlaps) >= 0.5:
            taken.add((number, overlaps.index(max(overlaps))))
        points.append((len(taken) / total, len(taken) / count))
    steps = [max((p for r, p in points if r >= hit / total - 1e-9), default=0) for hit in range(1, total + 1)]
    return sum(steps) / total


@pytest.mark.parametrize("seed", range(5))
def test_random_boxes_match_the_slow_implementation(seed):
    draw = random.Random(seed)
    found, truth = [], []
    for _ in range(12):
        true = [[x := draw.random() / 2, y := draw.random() / 2, x + 0.3, y + 0.4] for _ in range(draw.randint(0, 4))]
        near = [[value + draw.uniform(-0.06, 0.06) for value in box] for box in true * 2]
        truth.append({"boxes": true, "classes": [draw.randrange(3) for _ in true]})
        classes = [draw.randrange(4) for _ in near]
        found.append({"boxes": near, "classes": classes, "scores": [draw.random() for _ in near]})
    result = FrameMeanAveragePrecision()._compute(found, truth)
    for label, value in result["ap50_per_class"].items():
        assert value == pytest.approx(slow_average_precision(found, truth, label))
    assert 0 < result["map50"] < 1
    public = FrameMeanAveragePrecision().compute(predictions=found, references=truth)
    assert public["map50"] == pytest.approx(result["map50"])


def test_frame_without_detection_counts():
    truth = [{"boxes": [[0, 0, 1, 1]], "classes": [0]}] * 2
    found = [{"boxes": [[0, 0, 1, 1]], "classes": [0], "scores": [0.9]}, {"boxes": [], "classes": [], "scores": []}]
    assert FrameMeanAveragePrecision()._compute(found, truth)["map50"] == 0.5
