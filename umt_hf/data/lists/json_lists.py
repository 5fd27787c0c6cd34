"""Lists of videos as JSON: a list of objects, or an object per line, read a chunk at a time in bounded memory."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

import pyarrow as pa

from ..labels import LABEL, check_labels
from .columns import VIDEO, describe_mixed, join_paths, split_chunks
from .paths import join_root
from .text_files import describe_encoding, parse_json

JSON_SUFFIXES = {".json", ".jsonl", ".ndjson"}
READ_CHARACTERS = 1 << 22
SPACE = re.compile(r"[ \t\n\r]*")
COMMA = re.compile(r"[ \t\n\r]*,[ \t\n\r]*")
# An escape or a word such as `-Infinity` that the end of what was read cuts in two is found wrong at its beginning.
LONGEST_WORD = 16
LONGEST_TAIL = 2  # of a number that is read as a shorter one, such as `1e+`

Columns = dict[str, list[Any]]


def read_json(path: Path, root: str, video_column: str = VIDEO, needs_labels: bool = True) -> Iterator[pa.Table]:
    """Read a JSON list, or lines, of objects with a `video` key (and whatever else, `caption` for example).

    An object with a list of videos gives a row for each. Where a key holds a list in one object and a single value in
    another, the value becomes a list of one. A key that some objects lack is null there, as one with null.

    Args:
        path: The file, in UTF-8.
        root: Folder that relative paths start from.
        video_column: Key that holds the video.
        needs_labels: Whether labels are read.

    Yields:
        Chunks with `video` and the other keys.

    Raises:
        ValueError: If it is not a list, or an object has no video, naming file and position.
    """
    number = 0
    try:
        for objects in split_chunks(_stream_list(path) if path.suffix.lower() == ".json" else _stream_lines(path)):
            columns = _collect(objects, video_column) or _collect_odd(path, number, objects, video_column)
            number += len(objects)
            videos = columns.pop(VIDEO)
            labels = columns.get(LABEL)
            if labels is not None and needs_labels:
                columns[LABEL] = check_labels(labels, [join_root(root, video) for video in videos], str(path))
            elif labels is not None:
                del columns[LABEL]
            if videos:
                yield _build_chunk(path, root, videos, columns)
    except UnicodeDecodeError as error:
        raise ValueError(describe_encoding(path, error)) from error


def _build_chunk(path: Path, root: str, videos: list[str], columns: Columns) -> pa.Table:
    try:
        arrays = {name: pa.array(values) for name, values in columns.items()}
        return pa.table({**arrays, VIDEO: join_paths(root, pa.array(videos, pa.string()))})
    except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
        raise ValueError(describe_mixed(str(path), error)) from error


def _collect(objects: list[Any], video_column: str) -> Columns | None:
    """Columns of objects that all have the same keys and one video, as in nearly all long lists; else `None`."""
    names = objects[0].keys() if isinstance(objects[0], dict) else ()
    if video_column not in names or not all(type(row) is dict and row.keys() == names for row in objects):
        return None
    columns = {name: [row[name] for row in objects] for name in names}
    videos = columns.pop(video_column)
    if not all(type(video) is str and video for video in videos):
        return None
    for name, values in columns.items():
        kinds = set(map(type, values))
        if list in kinds and len(kinds) > 1:
            columns[name] = [value if isinstance(value, list | None) else [value] for value in values]
    return {**columns, VIDEO: videos}


def _collect_odd(path: Path, first: int, objects: list[Any], video_column: str) -> Columns:
    """Columns of objects of any form.

    Raises:
        ValueError: If one has no video.
    """
    rows = []
    for number, row in enumerate(objects, start=first):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, object {number}: expected an object with {video_column!r}, got {row!r}.")
        if video_column not in row:
            raise ValueError(
                f"{path}, object {number}: expected a string under {video_column!r}; its keys are {sorted(row)}."
            )
        videos = row[video_column]
        videos = [videos] if isinstance(videos, str) else videos
        if not isinstance(videos, list) or not all(isinstance(video, str) and video for video in videos):
            raise ValueError(f"{path}, object {number}: expected a string under {video_column!r}.")
        others = {name: value for name, value in row.items() if name != video_column}
        rows += [{**others, VIDEO: video} for video in videos]
    _unify_lists(rows)
    names = dict.fromkeys(name for row in rows for name in row) or {VIDEO: None}
    return {name: [row.get(name) for row in rows] for name in names}


def _unify_lists(rows: list[dict[str, Any]]) -> None:
    """Make a column that holds a list in one row hold lists in all of them, which a table needs."""
    listed = {name for row in rows for name, value in row.items() if isinstance(value, list)}
    for row in rows:
        for name in listed & row.keys():
            if not isinstance(row[name], list | None):
                row[name] = [row[name]]


def _stream_lines(path: Path) -> Iterator[Any]:
    decode = json.JSONDecoder().raw_decode
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            text = line.strip()
            if not text:
                continue
            try:
                value, end = decode(text)
            except json.JSONDecodeError:
                value, end = None, -1
            # In full words, and with all that is wrong.
            yield value if end == len(text) else parse_json(f"{path}, line {number}", line)


def _stream_list(path: Path) -> Iterator[Any]:
    """Items of a JSON list, of which no more is held than a few million characters, or the longest item.

    Raises:
        ValueError: If the file is not a JSON list; it says where.
    """
    with path.open(encoding="utf-8-sig") as file:
        text = _Window(path, file)
        text.skip_space()
        if text.next_character != "[":
            text.refuse_other()
        text.place += 1
        text.skip_space()
        if text.next_character == "]":
            text.place += 1
        else:
            yield from _stream_items(text)
        text.skip_space()
        if text.next_character:
            text.fail("Extra data", text.place)


def _stream_items(text: "_Window") -> Iterator[Any]:
    decode = json.JSONDecoder().raw_decode
    while True:
        try:
            value, end = decode(text.text, text.place)
        except json.JSONDecodeError as error:
            beyond = error.pos - text.place
            is_cut = error.pos >= len(text.text) - LONGEST_WORD or error.msg.startswith("Unterminated string")
            if is_cut and text.read_more():
                continue
            text.fail(error.msg, text.place + beyond)
        if end >= len(text.text) - LONGEST_TAIL:  # a number may go on
            length = end - text.place
            if text.read_more():
                continue
            end = text.place + length
        yield value
        comma = COMMA.match(text.text, end)
        if comma is not None and comma.end() < len(text.text):
            text.place = comma.end()
            continue
        text.place = end
        text.skip_space()
        delimiter = text.next_character
        if delimiter not in {",", "]"}:
            text.fail("Expecting ',' delimiter", text.place)
        text.place += 1
        if delimiter == "]":
            return
        text.skip_space()


class _Window:
    """A piece of a text file, which moves on.

    Args:
        path: The file, for errors.
        file: It, open.
    """

    def __init__(self, path: Path, file: TextIO):
        self.path, self.file = path, file
        self.text, self.place, self.is_end = "", 0, False
        self.lines = self.characters = self.column = 0  # before the piece

    @property
    def next_character(self) -> str:
        """The one at `place`; empty at the end of the file."""
        return self.text[self.place : self.place + 1]

    def read_more(self) -> bool:
        """Leave out what is before `place` and add what comes behind; whether there was any."""
        self.drop(self.place)
        more = self.file.read(max(READ_CHARACTERS, len(self.text)))
        self.text += more
        self.is_end = not more
        return bool(more)

    def drop(self, count: int) -> int:
        """Leave out the first characters; how many they were."""
        self.lines += self.text.count("\n", 0, count)
        last = self.text.rfind("\n", 0, count)
        self.column = count - last - 1 if last >= 0 else self.column + count
        self.characters += count
        self.text, self.place = self.text[count:], max(self.place - count, 0)
        return count

    def skip_space(self) -> None:
        """Move `place` to the next character that is not a space."""
        while True:
            self.place = SPACE.match(self.text, self.place).end()  # pyrefly: ignore[missing-attribute]  it matches everywhere
            if self.place < len(self.text) or not self.read_more():
                return

    def refuse_other(self) -> NoReturn:
        """Refuse a file that holds something else than a list."""
        if self.next_character == "{":
            raise ValueError(
                f"{self.path}: expected a JSON list of objects, got dict. A file with an object per line is called "
                ".jsonl."
            )
        content = parse_json(self.path, self.text[self.place :] + self.file.read())
        raise ValueError(f"{self.path}: expected a JSON list of objects, got {type(content).__name__}.")

    def fail(self, message: str, place: int) -> NoReturn:
        """Refuse a file that is not JSON."""
        line = self.lines + self.text.count("\n", 0, place) + 1
        last = self.text.rfind("\n", 0, place)
        column = place - last if last >= 0 else self.column + place + 1
        where = f"line {line} column {column} (char {self.characters + place})"
        raise ValueError(f"{self.path} is not valid JSON: {message}: {where}")
