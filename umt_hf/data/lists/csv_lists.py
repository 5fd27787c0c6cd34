"""Lists of videos as text with columns: CSV files as programs, spreadsheets and the published code write them.

Known forms of a line without a header, for any separator:

    path                      a video without a label
    path,label                the label is a number from 0 on, or a name
    path,count,label          a folder of frames, as the published code lists
                              them (the count is not needed)
    path,start,total          of VideoMAE V2: `path 0 -1` is a video,
                              `path 0 157` a folder of frames; no label

A first line that names the columns (`video,label,...`) makes the order free, and further columns are kept.
"""

import csv
import itertools
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..paths import is_url, join_root
from .folders import MEDIA_SUFFIXES

logger = logging.getLogger(__name__)

SEPARATORS = {",": "comma", "\t": "tab", ";": "semicolon", " ": "space"}
# Names that the column of videos has in other people's lists, the clearest first.
VIDEO_HEADERS = (
    "video", "video_path", "path", "file_path", "filepath", "clip_path", "video_file", "file_name", "filename",
    "video_name", "file", "clip", "clip_name", "name",
)  # fmt: skip
LABEL_HEADERS = ("label", "label_name", "class_name", "class", "category", "class_id", "label_id", "target", "labels")
SNIFFED_LINES = 1000
INTEGER = re.compile(r"[+-]?\d+(\.0+)?")  # a spreadsheet with an empty cell writes 3 as 3.0


@dataclass
class CSVRow:
    """What a line says.

    Args:
        path: Of the video or the folder of frames.
        label: Its text, or `None`.
        is_folder: Whether the form of the line is that of a folder of frames.
    """

    path: str
    label: str | None = None
    is_folder: bool = False


def read_csv(
    path: Path, data_root: str | None = None, separator: str | None = None, video_column: str = "video"
) -> list[dict[str, Any]]:
    """Read a list of videos; see the top of this file for its forms.

    Args:
        path: The file: UTF-8, or UTF-16 with its byte-order mark. Blank lines and empty last columns are passed over.
        data_root: Folder that relative paths start from; `None` = that of the file. URLs stay as they are.
        separator: Between columns; `None` = found among comma, tab, semicolon and space, and logged.
        video_column: A header's name of the column of videos, before the usual ones.

    Returns:
        Rows with `video`, where known `label` (an integer, or a name) and the columns that a header names.

    Raises:
        ValueError: If a line has another form, or lines have labels of different kinds; it names file and line.
    """
    root = data_root if data_root is not None else str(path.parent)
    with path.open(newline="", encoding=_choose_encoding(path)) as file:
        try:
            lines, separator = _settle_separator(path, file, separator, video_column)
            rows = list(_parse(path, lines, separator, video_column, root))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: is not UTF-8 text ({error.reason}). Save it with that encoding.") from error
    places = [row.pop("line") for row in rows]
    is_file = [row.pop("is_file") for row in rows]
    if is_file.count(False) == 1 and len(rows) > 1 and not is_file[0]:
        raise ValueError(
            f"{path}, line {places[0]}: does not name a video file, unlike all other lines. If it names the columns, "
            "call that of the videos `video` and that of the labels `label`."
        )
    _unify_labels(path, rows, places)
    kept = [name for name in (rows[0] if rows else {}) if name != "video"]
    logger.info(
        "%s: %d videos, columns separated by %s%s.",
        path, len(rows), SEPARATORS.get(separator, repr(separator)), f", with {', '.join(kept)}" if kept else "",
    )  # fmt: skip
    return rows


def split_table(path: Path, headers: Sequence[set[str]]) -> Iterator[tuple[int, list[str]]]:
    """Lines of a table in a fixed order of columns, such as AVA's, in any encoding and with any separator.

    Args:
        path: The file.
        headers: What a first line may call the first columns; such a line is passed over.

    Yields:
        Number of a line, and its columns without outer spaces and empty last ones.

    Raises:
        ValueError: If the file cannot be split; it names file and line.
    """
    number = 0
    with path.open(newline="", encoding=_choose_encoding(path)) as file:
        try:
            lines = list(file)
            first = next((line for line in lines if line.strip()), "")
            separator = max(SEPARATORS, key=first.count)
            for position, (number, columns) in enumerate(_split(lines, separator)):
                columns = [column.strip() for column in columns]
                names = [column.lower() for column in columns]
                if position or not all(name in known for name, known in zip(names, headers, strict=False)):
                    yield number, columns
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: is not UTF-8 text ({error.reason}). Save it with that encoding.") from error
        except csv.Error as error:
            raise ValueError(f"{path}, line {number + 1}: cannot be split into columns ({error}).") from error


def _choose_encoding(path: Path) -> str:
    with path.open("rb") as file:
        return "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def _settle_separator(
    path: Path, file: Iterable[str], separator: str | None, video_column: str
) -> tuple[Iterator[str], str]:
    """The lines, and what separates their columns; a spreadsheet's own first line `sep=;` says it."""
    lines = iter(file)
    head = list(itertools.islice(lines, SNIFFED_LINES))
    if head and (stated := re.fullmatch(r'"?sep=(.)"?\s*', head[0])):
        # A line that is empty keeps the numbers of the others.
        head[0], separator = "\n", separator or stated[1]
    if separator is None:
        separator = _sniff(head, is_complete=len(head) < SNIFFED_LINES, video_column=video_column)
    elif len(separator) != 1 or separator in '"\r\n':
        raise ValueError(f"{path}: csv_separator={separator!r} is not one character between columns.")
    return itertools.chain(head, lines), separator


def _sniff(head: list[str], is_complete: bool, video_column: str) -> str:
    """The separator with which most lines have a known form with a label; of equals the one that gives numbers."""
    if not is_complete:
        head = head[:-1]  # a quoted field may go on behind it
    best, best_score = ",", (0, 0)
    for separator in SEPARATORS:
        forms, numbers = 0, 0
        try:
            rows = [columns for _, columns in _split(head, separator)]
        except csv.Error:
            continue
        header = bool(rows) and _find_header(rows[0], video_column) is not None
        for columns in rows[header:]:
            try:
                row = None if len(columns) < 2 else CSVRow("") if header else read_form(columns, separator)
            except ValueError:
                continue
            if row is not None:
                forms += 1
                numbers += row.label is None or INTEGER.fullmatch(row.label) is not None
        if (score := (forms + header, numbers)) > best_score:
            best, best_score = separator, score
    return best


def _split(lines: Iterable[str], separator: str) -> Iterator[tuple[int, list[str]]]:
    """Number and columns of each line that has any."""
    reader = csv.reader(lines, delimiter=separator, strict=True)
    for columns in reader:
        while columns and not columns[-1].strip():  # a spreadsheet's export
            columns.pop()
        if separator == " ":
            columns = _join_spaces(columns)
        if columns:
            yield reader.line_num, columns


def _join_spaces(columns: list[str]) -> list[str]:
    """Several spaces in a row line columns up, or are part of a path: they stay at the end of the column before."""
    joined: list[str] = []
    for column in columns:
        if column:
            joined.append(column)
        elif joined:
            joined[-1] += " "
    return joined


def _parse(path: Path, lines: Iterable[str], separator: str, video_column: str, root: str) -> Iterator[dict[str, Any]]:
    """Rows with `line`, their number, and `is_file`, whether the name of the video is that of a file."""
    header: dict[int, str] | None = None
    is_first_file = False
    number = 0
    try:
        for position, (number, columns) in enumerate(_split(lines, separator)):
            if position == 0 and (header := _find_header(columns, video_column)) is not None:
                continue
            try:
                row, others = (read_form(columns, separator), {}) if header is None else _read_named(columns, header)
            except _UnknownForm as error:
                hint = "" if position else " If the line names the columns, call that of the videos `video`."
                raise ValueError(f"{path}, line {number}: {error}{hint}") from error
            # Asked of the others only where the first line does not name a file, as an unknown header.
            is_file = header is not None or is_first_file or _has_suffix(row.path) or is_url(row.path)
            is_first_file = is_file if position == 0 else is_first_file
            yield {"line": number, "is_file": is_file, "video": _locate(row, root), "label": row.label, **others}
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {number + 1}: cannot be split into columns ({error}). Check the quotes from there on."
        ) from error


class _UnknownForm(ValueError):
    """What is wrong with a line, as the end of a message that begins with its place."""


def read_form(columns: list[str], separator: str) -> CSVRow:
    """What a line without a header says, by its columns; the path may contain the separator.

    Raises:
        ValueError: If it has none of the known forms.
    """
    if len(columns) == 2 and columns[0] and columns[1].isdecimal():  # nearly all lines of long lists
        return CSVRow(columns[0].strip(), columns[1])
    line = separator.join(columns).strip()
    if not columns[0].strip():
        raise _UnknownForm(f"{line!r} has no path. Write `path{separator}label`.")
    if len(columns) == 1 and (_has_suffix(line) or is_url(line) or not re.search(r"[\s,;|]", line)):
        return CSVRow(line)
    integers = [INTEGER.fullmatch(column.strip()) is not None for column in columns]
    path, label = separator.join(columns[:-1]).strip(), columns[-1].strip()
    if len(columns) > 2 and integers[-1] and integers[-2]:
        folder, count, last = separator.join(columns[:-2]).strip(), int(float(columns[-2])), int(float(label))
        if (count, last) == (0, -1):
            return CSVRow(folder)
        if not _has_suffix(folder) and count == 0 and last > 0:
            return CSVRow(folder, is_folder=True)
        if not _has_suffix(folder) and count > 0 and last >= 0:
            return CSVRow(folder, label, is_folder=True)
    elif len(columns) == 2 and (integers[1] or not _names_media(label)):
        if integers[1] or separator != " " or _has_suffix(path):
            return CSVRow(path, label)
    elif len(columns) > 2 and integers[-1] and _has_suffix(path) and not any(map(_has_suffix, columns[:-2])):
        return CSVRow(path, label)  # a path that contains the separator
    elif _has_suffix(line) and not any(map(_names_media, columns[:-1])):
        return CSVRow(line)
    raise _UnknownForm(
        f"expected `path{separator}label`, or `folder{separator}count{separator}label` of frames, got {line!r}. Put "
        "quotes around a path or label that contains the separator, or name the columns in a first line "
        f"`video{separator}label`."
    )


def _find_header(columns: list[str], video_column: str) -> dict[int, str] | None:
    """Name of each column, with those of videos and labels as `video` and `label`; `None` if it is not a header."""
    names = [column.strip().lower().replace(" ", "_") for column in columns]
    if any(INTEGER.fullmatch(name) or _names_media(name) for name in names):
        return None
    videos = [name for name in (video_column.lower(), *VIDEO_HEADERS) if name in names]
    if not videos or len(set(names)) < len(names):
        return None
    labels = [name for name in LABEL_HEADERS if name in names and name != videos[0]]
    header = {i: name for i, name in enumerate(names) if name and name not in ("video", "label")}
    header[names.index(videos[0])] = "video"
    if labels:
        header[names.index(labels[0])] = "label"
    return header


def _read_named(columns: list[str], header: dict[int, str]) -> tuple[CSVRow, dict[str, str]]:
    if len(columns) > max(header) + 1:
        raise _UnknownForm(
            f"has {len(columns)} columns and the first line names {max(header) + 1}. Put quotes around what contains "
            "the separator."
        )
    values = {name: columns[i].strip() if i < len(columns) else "" for i, name in header.items()}
    path, label = values.pop("video"), values.pop("label", None)
    if not path:
        raise _UnknownForm("has no path under `video`. Fill it in or leave the line out.")
    if label == "":
        raise _UnknownForm(f"{path!r} has no label. Fill it in or leave the line out.")
    return CSVRow(path, label), values


def _locate(row: CSVRow, root: str) -> str:
    """Full path of a video; a name without a suffix that is not a folder gets `.mp4`."""
    path = join_root(root, row.path)
    if row.is_folder or "." in os.path.basename(row.path) or is_url(path):
        return path
    return path if os.path.isdir(path) else path + ".mp4"


def _unify_labels(path: Path, rows: list[dict[str, Any]], places: list[int]) -> None:
    """Make labels integers where all are; refuse a mixture. -1 in all of them means that there are none."""
    labels = [row["label"] for row in rows]
    present = [label is not None for label in labels]
    texts = {label for label in labels if label is not None}
    numbers_of = {text: int(float(text)) for text in texts if INTEGER.fullmatch(text)}
    integers = [label in numbers_of for label in labels]
    for name, kinds in (("a label", present), ("a number as label", integers)):
        if len(set(kinds)) > 1:
            usual = sum(kinds) * 2 > len(kinds) or kinds[0] and sum(kinds) * 2 == len(kinds)
            odd = kinds.index(not usual)
            raise ValueError(
                f"{path}, line {places[odd]}: {'does not have' if usual else 'has'} {name}, unlike most lines; got "
                f"label {labels[odd]!r}. Use one kind in all of them."
            )
    if not any(present):
        for row in rows:
            del row["label"]
    elif all(integers):
        numbers = [numbers_of[str(label)] for label in labels]
        if set(numbers_of.values()) == {-1}:
            for row in rows:
                del row["label"]
            return
        for row, number, place in zip(rows, numbers, places, strict=True):
            if number < 0:
                raise ValueError(f"{path}, line {place}: label {number}; labels count from 0.")
            row["label"] = number


def _has_suffix(path: str) -> bool:
    return os.path.splitext(path.strip())[1].lower() in MEDIA_SUFFIXES


def _names_media(text: str) -> bool:
    """Whether a text contains the name of a video file, which no label does."""
    return any(map(_has_suffix, text.split()))
