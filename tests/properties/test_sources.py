"""Lists and folders of videos as other people's programs write them: every row right, or the file named."""

import csv
import io
import json
import os
import tempfile
import unicodedata
from pathlib import Path
from typing import Any

from datasets import ClassLabel
from hypothesis import example, given
from hypothesis import strategies as st

from umt_hf.data.sources import get_source, load_videos
from umt_hf.processing.media_files import VideoDecodingError

PRINTABLE = st.characters(codec="utf-8", exclude_categories=("C", "Zl", "Zp", "Zs", "Mn"), exclude_characters="\\/")
words = st.text(PRINTABLE, min_size=1, max_size=5) | st.sampled_from(
    ["a", "été", "走る", "a b", "x,y", "x;y", 'say "go"', "1"]
)
stems = (
    st.lists(words, min_size=1, max_size=3).map("/".join).filter(lambda stem: "//" not in stem and ".." not in stem)
)
names = st.sampled_from(["run", "jump high", "naïve", "笑", "x,y", 'a "b"', "up;down"]) | st.text(
    st.characters(categories=("Lu", "Ll")), min_size=1, max_size=4
)
SEPARATORS = ",\t; "


@st.composite
def lists(draw) -> tuple[list[str], list[Any], dict[str, Any], bytes]:
    """Paths, labels, options to read them with, and the file."""
    paths = [
        f"{stem}.{draw(st.sampled_from(['mp4', 'MKV', 'webm']))}"
        for stem in draw(st.lists(stems, min_size=1, max_size=5))
    ]
    has_names = draw(st.booleans())
    labels = [draw(names if has_names else st.integers(0, 300)) for _ in paths]
    separator = draw(st.sampled_from(SEPARATORS))
    header = draw(st.sampled_from([None, None, ("video", "label"), ("Path", "Class Name")]))
    file = io.StringIO(newline="")
    writer = csv.writer(
        file,
        delimiter=separator,
        lineterminator=draw(st.sampled_from(["\n", "\r\n"])),
        quoting=draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])),
    )
    for row in ([header] if header else []) + list(zip(paths, labels, strict=True)):
        writer.writerow(row)
        file.write(draw(st.sampled_from(["", "", "\n"])))  # a blank line
    # What is found is for ordinary names; where they contain other separators, a user says which one it is.
    is_plain = not any(mark in text for text in [*paths, *map(str, labels)] for mark in f'{SEPARATORS}|"')
    options = {} if is_plain and draw(st.booleans()) else {"csv_separator": separator}
    encoding = draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
    return paths, labels, options, file.getvalue().encode(encoding)


def read(name: str, content: bytes, **options: Any) -> tuple[list[dict[str, Any]], list[str] | None]:
    """Rows with paths relative to the list's folder, and the names of the classes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        table = load_videos(str(path), **options)
        feature = table.features.get("label")
        rows = [{**row, "video": row["video"].removeprefix(f"{folder}/")} for row in table]
        return rows, feature.names if isinstance(feature, ClassLabel) else None


def normal(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


@given(lists())
def test_lists_of_paths_and_labels(case):
    paths, labels, options, content = case
    rows, classes = read("list.csv", content, **options)
    assert [row["video"] for row in rows] == paths
    if isinstance(labels[0], int):
        assert classes is None and [row["label"] for row in rows] == labels
    else:
        assert classes == sorted({normal(label) for label in labels})
        assert [classes[row["label"]] for row in rows] == [normal(label) for label in labels]


@given(lists(), st.randoms(use_true_random=False))
def test_numbers_follow_the_names_that_are_given(case, shuffle):
    """Held-out lists are numbered as the training data is, whichever of its classes they show."""
    _, labels, options, content = case
    if isinstance(labels[0], int):
        return
    classes = [*sorted({normal(label) for label in labels}), "another one"]
    shuffle.shuffle(classes)
    rows, found = read("list.csv", content, class_names=classes, **options)
    assert found == classes and [classes[row["label"]] for row in rows] == [normal(label) for label in labels]


PIECES = [
    "a.mp4",
    "b",
    ",",
    "\t",
    ";",
    " ",
    "\n",
    "\r",
    '"',
    "0",
    "-1",
    "video",
    "label",
    "\x00",
    "é",
    "http://x/y.mp4",
]
texts = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


@given(texts.map(str.encode) | st.binary(max_size=40), st.sampled_from(["list.csv", "list.tsv", "list.txt"]))
@example(content=b"\xff\xfe\x00", name="list.csv")
@example(content=b"\xff\xfe", name="list.csv")
def test_any_text_is_a_list_or_named(content, name):
    try:
        rows, _ = read(name, content)
    except ValueError as error:
        assert name in str(error)
        return
    assert rows and all(row["video"] and isinstance(row.get("label", 0), int) for row in rows)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**30) | st.floats() | st.sampled_from(["a.mp4", "b", "", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["video", "label", "caption", "a", ""]), inner, max_size=3)
    ),
    max_leaves=8,
)
videos = st.just("a.mp4") | st.lists(st.just("b.mp4"), min_size=1, max_size=2)
others = {"label": json_values, "caption": json_values}
records = st.lists(st.fixed_dictionaries({"video": videos}, optional=others), min_size=1, max_size=3)


@given(json_values | records, st.sampled_from(["list.json", "list.jsonl"]))
@example(content=[{"video": "a.mp4", "label": 10**30}], name="list.json")
def test_any_json_is_a_list_or_named(content, name):
    lines = content if name.endswith("l") and isinstance(content, list) else [content]
    text = "\n".join(json.dumps(line) for line in lines)
    try:
        rows, _ = read(name, text.encode())
    except ValueError as error:
        assert name in str(error)
        return
    found = [
        video
        for row in (lines if name.endswith("l") else content)
        for video in ([row["video"]] if isinstance(row["video"], str) else row["video"])
    ]
    assert [row["video"] for row in rows] == found


@given(
    st.lists(st.tuples(stems, st.integers(0, 50), st.text(max_size=8)), min_size=1, max_size=5),
    st.sampled_from(["list.json", "list.jsonl"]),
    st.booleans(),
    st.booleans(),
)
def test_json_keeps_its_keys(items, name, is_ascii, has_mark):
    rows = [{"video": f"{stem}.mp4", "label": label, "caption": caption} for stem, label, caption in items]
    dump = [json.dumps(row, ensure_ascii=is_ascii) for row in rows]
    text = "\n".join(dump) if name.endswith("l") else f"[{','.join(dump)}]"
    try:
        content = text.encode("utf-8-sig" if has_mark else "utf-8")
    except UnicodeEncodeError:  # half of a pair of characters
        return
    assert read(name, content) == (rows, None)


folder_names = st.sampled_from(["run", "jump", "été", "Ω", "a b", "x.y", ".hidden", "Run"])
file_names = st.sampled_from(
    ["a.mp4", "B.MKV", "c d.webm", "é.avi", "._a.mp4", ".b.mp4", "notes.txt", "a.mp4.part", "x"]
)


@given(st.lists(st.tuples(folder_names, st.none() | folder_names, file_names), min_size=1, max_size=8), st.data())
def test_class_folders(entries, data):
    """Classes are the sorted sub-folders that hold a video; hidden ones and other files are left out."""
    expected = set()
    with tempfile.TemporaryDirectory() as folder:
        for first, second, name in entries:
            place = Path(folder, first, second or "")
            place.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(b"")
            is_shown = not any(part.startswith(".") for part in (first, second or "", name))
            if is_shown and name.lower().endswith((".mp4", ".mkv", ".webm", ".avi")):
                expected.add((str(place / name), first))
        classes = sorted({first for _, first in expected})
        try:
            table = load_videos(folder)
        except ValueError as error:
            assert folder in str(error) and not expected
            return
        names = table.features["label"].names
        assert names == classes
        assert {(row["video"], names[row["label"]]) for row in table} == expected and len(table) == len(expected)
        if data.draw(st.booleans()):
            return
        given_names = data.draw(st.permutations([*classes, "other"]))
        again = load_videos(folder, class_names=given_names)
        assert again["video"][:] == table["video"][:]
        assert {(row["video"], given_names[row["label"]]) for row in again} == expected


@given(st.lists(file_names, min_size=1, max_size=8, unique=True))
def test_a_folder_of_videos_without_classes(found):
    with tempfile.TemporaryDirectory() as folder:
        for name in found:
            Path(folder, name).write_bytes(b"")
        expected = sorted(
            name for name in found if name.lower().endswith((".mp4", ".mkv", ".webm", ".avi")) and name[0] != "."
        )
        try:
            table = load_videos(folder)
        except ValueError as error:
            assert folder in str(error) and not expected
            return
        assert [os.path.basename(row["video"]) for row in table] == expected and "label" not in table.features


@given(
    st.none()
    | st.text(max_size=3)
    | st.binary(max_size=3)
    | st.fixed_dictionaries(
        {}, optional={"path": st.none() | st.text(max_size=3), "bytes": st.none() | st.binary(max_size=3)}
    )
)
def test_a_row_has_a_source_or_is_named(video):
    wanted = (video.get("bytes") or video.get("path")) if isinstance(video, dict) else video
    try:
        assert get_source(video) == wanted and len(wanted) > 0
    except VideoDecodingError as error:
        assert not wanted and "neither a path nor bytes" in str(error)
