"""What a run found, counted without a look at the files, and which videos two sets share."""

import functools
import os

import pytest
from datasets import Dataset, Features, Value, Video

from umt_hf.evaluation.found import (
    count_texts,
    describe_choices,
    describe_questions,
    list_names,
    list_shared,
    name_media,
    resolve_places,
)


def test_rows_of_bytes_are_named_without_reading_them(monkeypatch):
    rows = [
        {"path": "deep/a.mp4", "bytes": b"xyz"}, {"path": "b.mp4", "bytes": None}, {"path": None, "bytes": b"x"}, None
    ]  # fmt: skip
    features = Features({"video": Video(decode=False), "label": Value("int64")})
    table = Dataset.from_dict({"video": rows, "label": [0] * 4}, features=features)
    assert list_names(table) == ["a.mp4 of 3 bytes", "b.mp4", "row 2", "row 3"] == name_media(rows)
    assert list_names(table.select([1, 0])) == ["b.mp4", "a.mp4 of 3 bytes"]
    assert list_names(Dataset.from_dict({"video": ["a.mp4", None]})) == ["a.mp4", "row 1"]
    # Rows without a name are not each other's twins.
    assert list_shared(["row 2", "a.mp4"], {"validation": ["row 2"]}) == []


@pytest.mark.parametrize("num_files", [3, 300])
def test_places_are_those_of_realpath(tmp_path, num_files):
    """Links to files and to folders, chains of links, missing files, relative paths; few and many in a folder."""
    (tmp_path / "real").mkdir()
    for number in range(num_files):
        (tmp_path / "real" / f"{number}.mp4").touch()
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "link.mp4").symlink_to(tmp_path / "real" / "0.mp4")
    (tmp_path / "real" / "chain.mp4").symlink_to("link.mp4")
    inside = [*(f"{number}.mp4" for number in range(num_files)), "link.mp4", "chain.mp4", "missing.mp4"]
    paths = [str(tmp_path / folder / name) for folder in ("real", "linked", "real/../linked") for name in inside]
    paths += [os.path.relpath(paths[0]), "missing/a.mp4"]
    assert resolve_places(paths) == [os.path.realpath(path) for path in paths]
    assert resolve_places(["https://a.b/c.mp4", "row 1"]) == ["https://a.b/c.mp4", "row 1"]


def test_a_folder_costs_one_look(tmp_path, monkeypatch):
    """Of many files none is looked at by itself, which takes a request each on a network disk."""
    for number in range(300):
        (tmp_path / f"{number}.mp4").touch()
    asked = []
    for name in ("lstat", "stat", "readlink"):
        monkeypatch.setattr(
            os,
            name,
            functools.partial(
                lambda own, path, *rest, **named: asked.append(path) or own(path, *rest, **named), getattr(os, name)
            ),
        )
    resolve_places([str(tmp_path / f"{number}.mp4") for number in range(300)])
    assert len(asked) < 20


def test_words():
    assert count_texts(6, 6) == "6 videos with 6 captions"
    assert count_texts(6, 9000) == "6 videos with 9,000 captions (1500.0 per video)"
    table = Dataset.from_dict({"video": ["a", "a", "b"], "answers": [["x"], ["y", "x"], []]})
    assert describe_questions(table) == "2 videos with 3 questions (1.5 per video) and 2 different answers"
    without = Dataset.from_dict({"video": ["a"], "answers": [[]]})
    assert describe_questions(without) == "1 videos with 1 questions, without answers"
    table = Dataset.from_dict({"video": ["a", "b"], "caption": [["x", "y"], ["x", "y", "z"]]})
    assert describe_choices(table) == "2 videos with 2 questions, each of 2 to 3 captions"
