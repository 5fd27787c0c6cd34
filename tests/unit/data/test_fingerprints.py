"""What stands for the rows of a training table."""

import time

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, concatenate_datasets

from umt_hf.data.lists.fingerprints import describe_changes, fingerprint_rows

NAMES = [f"videos/clip_{number:05d}.mp4" for number in range(200)]


def build(names=NAMES, **columns) -> Dataset:
    return Dataset.from_dict({"video": names, **columns})


@pytest.mark.parametrize(
    "other",
    [NAMES[:100], NAMES[::-1], [*NAMES[:-1], "videos/clip.mp4"], [NAMES[1], NAMES[0], *NAMES[2:]]],
    ids=["shorter", "reversed", "renamed", "swapped"],
)
def test_other_rows_have_other_fingerprints(other):
    assert fingerprint_rows(build()) != fingerprint_rows(build(other))


def test_equal_rows_are_equal_however_they_are_stored():
    """In one piece or in several, as strings with short or long offsets."""
    parts = concatenate_datasets([build(NAMES[:70]), build(NAMES[70:])])
    large = Dataset(pa.table({"video": pa.array(NAMES, pa.large_string())}))
    assert fingerprint_rows(build()) == fingerprint_rows(parts) == fingerprint_rows(large)


def test_captions_labels_and_the_order_of_a_selection_count():
    captions = ["a red circle", ["a", "b"], None]
    found = {
        fingerprint_rows(table)["names"]
        for table in (
            build(),
            build(caption=[captions[0]] * 200),
            build(caption=[captions[1]] * 200),
            build(label=[0] * 200),
            build(label=[1] * 200),
            build().select(list(range(200))[::-1]),
        )
    }
    assert len(found) == 6


def test_rows_of_bytes_count_without_being_read():
    rows = [{"bytes": b"x" * size, "path": None} for size in (10, 20, 30)]
    assert fingerprint_rows(build(rows)) != fingerprint_rows(build(rows[::-1]))
    assert fingerprint_rows(build(rows)) == fingerprint_rows(build(list(rows)))


def test_a_million_names_take_a_fraction_of_a_second():
    table = build([f"/data/videos/part_{number % 997}/clip_{number:08d}.mp4" for number in range(1_000_000)])
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        fingerprint_rows(table)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.0, np.round(seconds, 3)


def test_changes_are_named_with_their_corpus():
    then = [{"rows": 5, "names": "a"}, {"rows": 6, "names": "b"}]
    assert describe_changes(then, {"x": {"rows": 5, "names": "a"}, "y": {"rows": 6, "names": "b"}}) is None
    assert describe_changes(then, {"x": {"rows": 5, "names": "a"}}) == "2 corpora then and 1 now"
    said = describe_changes(then, {"x": {"rows": 5, "names": "c"}, "y": {"rows": 7, "names": "d"}})
    assert said is not None and "x has its 5 rows under other names" in said and "y had 6 rows then" in said
