"""What stands for the rows of a training table."""

import time

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, concatenate_datasets

from tests.unit.shard_files import write_parquets, write_tar
from umt_hf.data.lists.fingerprints import describe_changes, fingerprint_rows
from umt_hf.data.streams import load_shards

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


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("question", ["which colour?", "which shape?"]),
        ("answers", [["red"], ["red", "blue"]]),
        ("answer_weights", [[0.25, 0.75], [0.75, 0.25]]),
        ("answer", [0, 1]),
        ("boxes", [[[0.0, 0.0, 5.0, 5.0]], [[0.0, 0.0, 5.0, 6.0]]]),
        ("labels", [[[0]], [[1]]]),
        ("key_seconds", [1.0, 1.5]),
        ("caption", ["", None]),
    ],
)
def test_what_a_task_reads_counts(name, values):
    former, present = (build(**{name: [value] * 199 + [values[0]]}) for value in values)
    if name == "caption":
        present = present.cast(former.features)
    assert fingerprint_rows(former) != fingerprint_rows(present)
    assert fingerprint_rows(present) == fingerprint_rows(
        concatenate_datasets([present.select(range(9)), present.select(range(9, 200))]).flatten_indices()
    )


@pytest.mark.parametrize("suffix", ["txt", "json"])
def test_tars_with_other_captions_of_the_same_length_have_other_fingerprints(tmp_path, suffix):
    """Tars are padded, so that their sizes stay."""

    def write(folder: str, colour: str) -> dict[bool, dict]:
        text = f"a {colour} ring" if suffix == "txt" else {"caption": f"a {colour} ring"}
        rows: list[dict] = [{"mp4": b"x" * 600, suffix: "a white ring" if suffix == "txt" else {"caption": "none"}}]
        write_tar(tmp_path / folder / "a.tar", [*rows, {"mp4": b"y" * 600, suffix: text}])
        source = str(tmp_path / folder / "a.tar")
        return {reads: fingerprint_rows(load_shards(source, reads_captions=reads)) for reads in (True, False)}

    former, same, other, longer = write("a", "pink"), write("b", "pink"), write("c", "blue"), write("d", "orange")
    assert former == same and former[True] not in (other[True], longer[True])
    assert former[False] == other[False] == longer[False]  # a run that reads no text goes on with the same videos


def test_parquet_shards_with_other_captions_of_the_same_length_have_other_fingerprints(tmp_path):
    found = []
    for folder, colour in (("a", "pink"), ("b", "blue"), ("c", "pink")):
        captions = [f"{colour} {number % 3}" for number in range(40)]
        rows = [{"video": {"bytes": b"x" * 90, "path": None}, "caption": caption} for caption in captions]
        write_parquets(tmp_path / folder, rows, 25)
        found.append(fingerprint_rows(load_shards(str(tmp_path / folder), needs_captions=True)))
    assert found[0] == found[2] != found[1]
