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
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..labels import LARGEST_LABEL, describe_large_label, parse_integer
from .columns import CHUNK_ROWS, call, join_paths
from .folders import MEDIA_SUFFIXES
from .paths import is_url, join_root
from .text_files import describe_encoding

logger = logging.getLogger(__name__)

TEXT_SUFFIXES = {".csv", ".tsv", ".txt", ".lst"}
SEPARATORS = {",": "comma", "\t": "tab", ";": "semicolon", " ": "space"}
# Names that the column of videos has in other people's lists, the clearest first.
VIDEO_HEADERS = (
    "video", "video_path", "path", "file_path", "filepath", "clip_path", "video_file", "file_name", "filename",
    "video_name", "file", "clip", "clip_name", "name",
)  # fmt: skip
LABEL_HEADERS = ("label", "label_name", "class_name", "class", "category", "class_id", "label_id", "target", "labels")
SNIFFED_LINES = 1000
# A name with a known suffix, which is not hidden.
PLAIN_FILE = r"[^/\\.][^/\\]*\.(" + "|".join(sorted(suffix[1:] for suffix in MEDIA_SUFFIXES)) + ")$"
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
    path: Path,
    root: str,
    separator: str | None = None,
    video_column: str = "video",
    needs_labels: bool = True,
    looked_up: list[str] | None = None,
) -> Iterator[pa.Table]:
    """Read a list of videos; see the top of this file for its forms.

    Args:
        path: The file: UTF-8, or UTF-16 with its byte-order mark. Blank lines and empty last columns are passed over.
        root: Folder that relative paths start from. URLs stay as they are.
        separator: Between columns; `None` = found among comma, tab, semicolon and space, and logged.
        video_column: A header's name of the column of videos, before the usual ones.
        needs_labels: Whether labels are read; if not, lines may have one or not.
        looked_up: Gets a path whose meaning depends on what is in its folder, if there are such.

    Yields:
        Chunks with `video`, where known `label` (an integer, or a name) and the columns that a header names.

    Raises:
        ValueError: If a line has another form, or lines have labels of different kinds; it names file and line.
    """
    with path.open(newline="", encoding=_choose_encoding(path)) as file:
        try:
            lines, separator = _settle_separator(path, file, separator, video_column)
            reader = _CSVReader(path, root, separator, video_column, needs_labels)
            yield from reader.read(lines)
        except UnicodeDecodeError as error:
            raise ValueError(describe_encoding(path, error)) from error
    if looked_up is not None:
        looked_up += reader.looked_up
    kept = [name for name in reader.names if name != "video"]
    logger.info(
        "%s: %d videos, columns separated by %s%s.",
        path,
        reader.num_rows,
        SEPARATORS.get(separator, repr(separator)),
        f", with {', '.join(kept)}" if kept else "",
    )


class _CSVReader:
    """Lines to chunks of rows: those of the commonest forms column by column, others one by one.

    Args:
        path: The file, for errors.
        root: Folder that relative paths start from.
        separator: Between columns.
        video_column: A header's name of the column of videos.
        needs_labels: Whether labels are read.
    """

    def __init__(self, path: Path, root: str, separator: str, video_column: str, needs_labels: bool):
        self.path, self.root, self.separator, self.video_column = path, root, separator, video_column
        self.header: dict[int, str] | None = None
        self.labels = CSVLabels(path) if needs_labels else None
        self.names: list[str] = []
        self.looked_up: list[str] = []
        self.num_rows = 0
        self.first_line, self.is_first_file, self.num_not_files = 0, False, 0

    def read(self, lines: Iterable[str]) -> Iterator[pa.Table]:
        """Chunks with `video`, where known `label`, and the columns that a header names."""
        for numbers, rows in self._split(lines):
            columns = self._read_plain(rows) or self._read_each(numbers, rows)
            videos = columns.pop("video")
            labels = columns.pop("label", None)
            is_labelled = self.labels is not None and bool(videos)
            numbered = self.labels.add(labels, numbers, len(videos)) if self.labels and is_labelled else None
            self.num_rows += len(videos)
            if videos and not (self.labels and self.labels.are_mixed):
                named = {} if numbered is None else {"label": pa.array(numbered)}
                others = {name: pa.array(values, pa.string()) for name, values in columns.items()}
                chunk = pa.table({"video": self._join(videos), **named, **others})
                self.names = chunk.column_names
                yield chunk
        if self.num_not_files == 1 and self.num_rows > 1 and not self.is_first_file:
            raise ValueError(
                f"{self.path}, line {self.first_line}: does not name a video file, unlike all other lines. If it "
                "names the columns, call that of the videos `video` and that of the labels `label`."
            )
        if self.labels is not None:
            self.labels.check()

    def _split(self, lines: Iterable[str]) -> Iterator[tuple[list[int], list[list[str]]]]:
        """Numbers and columns of lines, without the header."""
        reader = csv.reader(lines, delimiter=self.separator, strict=True)
        is_begun, last = False, 0
        while True:
            numbers, rows, failure = [], [], None
            try:
                for columns in itertools.islice(reader, CHUNK_ROWS):
                    rows.append(columns)
                    numbers.append(reader.line_num)
            except csv.Error as error:
                failure = error
            is_end, last = not numbers, numbers[-1] if numbers else last
            if not is_begun and (first := self._find_first(rows)) is not None:
                is_begun = True
                columns = _trim([*rows[first]], self.separator)
                self.first_line = numbers[first]
                self.header = _find_header(columns, self.video_column)
                self.is_first_file = self.header is not None
                if self.header is None and self.video_column not in ("video", "image"):
                    raise ValueError(
                        f"{self.path}: video_column={self.video_column} has no effect, since no first line names the "
                        "columns. Leave it out."
                    )
                del rows[: first + (self.header is not None)], numbers[: first + (self.header is not None)]
                if self.header is None:
                    self.is_first_file = _is_file(columns, self.separator)
            if not all(rows):
                numbers, rows = [n for n, row in zip(numbers, rows, strict=True) if row], [row for row in rows if row]
            if is_begun:
                yield numbers, rows
            if failure is not None:
                raise ValueError(
                    f"{self.path}, line {last + 1}: cannot be split into columns ({failure}). Check the quotes from "
                    "there on."
                ) from failure
            if is_end:
                return

    def _find_first(self, rows: list[list[str]]) -> int | None:
        return next((number for number, columns in enumerate(rows) if _trim([*columns], self.separator)), None)

    def _read_plain(self, rows: list[list[str]]) -> dict[str, Any] | None:
        """Columns of lines that all have one of the commonest forms and name a file with a known suffix, or `None`."""
        widths = set(map(len, rows))
        if len(widths) != 1 or not (self.header or self.is_first_file):
            return None
        (width,) = widths
        texts = [[row[column] for row in rows] for column in range(width)]  # `zip` would make an iterator of each row
        header = _choose_header(texts) if self.header is None else self.header
        if header is None or max(header) >= width or self.header is not None and width > max(header) + 1:
            return None
        if self.separator == " " and any("" in column for column in texts):
            return None
        columns = {name: [text.strip() for text in texts[i]] for i, name in header.items()}
        is_plain = call("match_substring_regex", pa.array(columns["video"]), pattern=PLAIN_FILE, ignore_case=True)
        if not call("all", is_plain).as_py() or "" in columns.get("label", ()):
            return None
        return {"video": columns.pop("video"), **columns}

    def _read_each(self, numbers: list[int], rows: list[list[str]]) -> dict[str, Any]:
        """Columns of lines of any known form; `numbers` becomes the numbers of the lines that are not blank.

        Raises:
            ValueError: If a line has another form.
        """
        found, places = [], []
        for number, row in zip(numbers, rows, strict=True):
            if columns := _trim(row, self.separator):
                found.append(self._read_row(number, columns))
                places.append(number)
        numbers[:] = places
        names = dict.fromkeys(["video", "label", *(self.header or {}).values()])
        return {name: [row[name] for row in found] for name in names}

    def _read_row(self, number: int, columns: list[str]) -> dict[str, str | None]:
        header = self.header
        try:
            if header is None:
                row, others = read_form(columns, self.separator), {}
            else:
                row, others = _read_named(columns, header, self.labels is not None)
        except _UnknownForm as error:
            hint = (
                "" if number != self.first_line else " If the line names the columns, call that of the videos `video`."
            )
            raise ValueError(f"{self.path}, line {number}: {error}{hint}") from error
        # Asked of the others only where the first line does not name a file, as an unknown header.
        self.num_not_files += not (self.is_first_file or _has_suffix(row.path) or is_url(row.path))
        return {"video": self._locate(row), "label": row.label, **others}

    def _locate(self, row: CSVRow) -> str:
        """Path of a video; a name without a suffix that is not a folder gets `.mp4`."""
        path = join_root(self.root, row.path)
        if row.is_folder or "." in os.path.basename(row.path) or is_url(row.path):
            return row.path
        if is_url(path):  # where folders of frames are not read
            return row.path + ".mp4"
        if not self.looked_up:
            self.looked_up.append(path)
        return row.path if os.path.isdir(path) else row.path + ".mp4"

    def _join(self, videos: list[str]) -> pa.Array:
        return join_paths(self.root, pa.array(videos, pa.string()))


class CSVLabels:
    """Labels of a list as they come, which are numbers in all lines, or names in all, or absent in all.

    -1 in all of them means that there are none.

    Args:
        path: The list, for errors.
    """

    def __init__(self, path: Path):
        self.path = path
        # By whether there is one, and by whether it is a number: how many, the first line, and its label.
        self.kinds: dict[str, dict[bool, tuple[int, int, str | None]]] = {"a label": {}, "a number as label": {}}
        self.negative: tuple[int, int] | None = None
        self.has_others = False

    @property
    def are_mixed(self) -> bool:
        """Whether lines have labels of different kinds, so that an error will come."""
        return any(len(kinds) > 1 for kinds in self.kinds.values()) or self.negative is not None and self.has_others

    def add(self, labels: list[str | None] | None, lines: list[int], count: int) -> list[Any] | None:
        """Take the labels of a chunk.

        Args:
            labels: A text or `None` for each row; `None` where no row has one.
            lines: Where they are.
            count: Number of rows.

        Returns:
            Numbers, or texts; `None` if there are none.

        Raises:
            ValueError: If a number has more than 64 bits.
        """
        texts = set(labels or [None])
        numbers = {text: parse_integer(text) for text in texts if text is not None and INTEGER.fullmatch(text)}
        if labels and any(number > LARGEST_LABEL for number in map(abs, numbers.values())):
            row = next(
                row for row, text in enumerate(labels) if text in numbers and abs(numbers[text]) > LARGEST_LABEL
            )
            raise ValueError(describe_large_label(f"{self.path}, line {lines[row]}", labels[row]))
        self._count("a label", {text: text is not None for text in texts}, labels, lines, count)
        self._count("a number as label", {text: text in numbers for text in texts}, labels, lines, count)
        if labels is None or texts == {None}:
            return None
        found: list[Any] = [label if label is None else numbers.get(label, label) for label in labels]
        if self.negative is None and any(number < 0 for number in numbers.values()):
            row = next(row for row, number in enumerate(found) if isinstance(number, int) and number < 0)
            self.negative = (lines[row], found[row])
        self.has_others |= set(numbers.values()) != {-1} or len(numbers) < len(texts)
        return None if not self.has_others else found

    def _count(
        self,
        name: str,
        kinds: dict[str | None, bool],
        labels: list[str | None] | None,
        lines: list[int],
        count: int,
    ) -> None:
        for kind in set(kinds.values()):
            if labels is None or len(set(kinds.values())) == 1:
                first, number = 0, count
            else:
                of_kind = [row for row, label in enumerate(labels) if kinds[label] == kind]
                first, number = of_kind[0], len(of_kind)
            before = self.kinds[name].get(kind)
            place = (lines[first], labels[first] if labels else None) if before is None else before[1:]
            self.kinds[name][kind] = ((before[0] if before else 0) + number, *place)

    def check(self) -> None:
        """Refuse a mixture, and numbers below 0.

        Raises:
            ValueError: With the first line that is unlike most.
        """
        for name, kinds in self.kinds.items():
            if len(kinds) > 1:
                with_it, without = kinds[True], kinds[False]
                usual = with_it[0] > without[0] or with_it[0] == without[0] and with_it[1] < without[1]
                _, line, label = kinds[not usual]
                raise ValueError(
                    f"{self.path}, line {line}: {'does not have' if usual else 'has'} {name}, unlike most lines; got "
                    f"label {label!r}. Use one kind in all of them."
                )
        if self.negative is not None and self.has_others:
            raise ValueError(f"{self.path}, line {self.negative[0]}: label {self.negative[1]}; labels count from 0.")


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
    """The separator with which most lines have a known form with a label; of equals the one that gives numbers.

    A path alone with empty columns behind it has a known form, too.
    """
    if not is_complete:
        head = head[:-1]  # a quoted field may go on behind it
    scores = {separator: _score(head, separator, video_column, strict=True) for separator in SEPARATORS}
    if not any(forms for forms, _ in scores.values()):  # a stray quote, whose line is named once columns are read
        scores = {separator: _score(head, separator, video_column, strict=False) for separator in SEPARATORS}
    return max(scores, key=lambda separator: scores[separator])


def _score(head: list[str], separator: str, video_column: str, strict: bool) -> tuple[int, int]:
    """Lines that have a known form with a separator, and those of them without a name as label."""
    forms, numbers, alone = 0, 0, 0
    parts = [head] if strict else [[line] for line in head]  # else an open quote would take all lines behind it
    try:
        found = [columns for part in parts for columns in csv.reader(part, delimiter=separator, strict=strict)]
    except csv.Error:
        return 0, 0
    given = [columns for columns in found if "".join(columns).strip()]
    rows = [_trim([*columns], separator) for columns in given]
    header = bool(rows) and _find_header(rows[0], video_column) is not None
    for columns, uncut in zip(rows[header:], given[header:], strict=True):
        if len(columns) == 1 < len(uncut) and (_has_suffix(columns[0]) or is_url(columns[0])):
            alone += 1
            continue
        try:
            row = None if len(columns) < 2 else CSVRow("") if header else read_form(columns, separator)
        except ValueError:
            continue
        if row is not None:
            forms += 1
            numbers += row.label is None or INTEGER.fullmatch(row.label) is not None
    if separator != " " or alone + header == len(rows):  # else a space belongs to the paths
        forms += alone
    return forms + header, numbers


def _split(lines: Iterable[str], separator: str) -> Iterator[tuple[int, list[str]]]:
    """Number and columns of each line that has any."""
    reader = csv.reader(lines, delimiter=separator, strict=True)
    for columns in reader:
        if columns := _trim(columns, separator):
            yield reader.line_num, columns


def _trim(columns: list[str], separator: str) -> list[str]:
    """Columns of a line, which loses the empty last ones; a blank line has none."""
    while columns and not columns[-1].strip():  # a spreadsheet's export
        columns.pop()
    return _join_spaces(columns) if separator == " " else columns


def _join_spaces(columns: list[str]) -> list[str]:
    """Several spaces in a row line columns up, or are part of a path: they stay at the end of the column before."""
    joined: list[str] = []
    for column in columns:
        if column:
            joined.append(column)
        elif joined:
            joined[-1] += " "
    return joined


def _choose_header(texts: list[list[str]]) -> dict[int, str] | None:
    """Names of the columns of lines without a header that all have one of the commonest forms, or `None`."""
    if len(texts) == 1:
        return {0: "video"}
    if len(texts) == 2:
        return {0: "video", 1: "label"} if all(map(_is_plain_label, set(texts[1]))) else None
    if len(texts) == 3 and set(texts[1]) == {"0"} and set(texts[2]) == {"-1"}:
        return {0: "video"}
    return None


@lru_cache(maxsize=CHUNK_ROWS * 64)
def _is_plain_label(text: str) -> bool:
    return bool(text.strip()) and not _names_media(text)


def _is_file(columns: list[str], separator: str) -> bool:
    """Whether a line without a header names a file; one of another form is refused later."""
    try:
        row = read_form(columns, separator)
    except _UnknownForm:
        return False
    return _has_suffix(row.path) or is_url(row.path)


class _UnknownForm(ValueError):
    """What is wrong with a line, as the end of a message that begins with its place."""


def read_form(columns: list[str], separator: str) -> CSVRow:
    """What a line without a header says, by its columns; the path may contain the separator.

    Raises:
        ValueError: If it has none of the known forms.
    """
    if len(columns) == 2 and columns[0].strip() and columns[1].isdecimal():  # nearly all lines of long lists
        return CSVRow(columns[0].strip(), columns[1])
    line = separator.join(columns).strip()
    if not columns[0].strip():
        raise _UnknownForm(f"{line!r} has no path. Write `path{separator}label`.")
    if len(columns) == 1 and (_has_suffix(line) or is_url(line) or not re.search(r"[\s,;|]", line)):
        return CSVRow(line)
    integers = [INTEGER.fullmatch(column.strip()) is not None for column in columns]
    path, label = separator.join(columns[:-1]).strip(), columns[-1].strip()
    if len(columns) > 2 and integers[-1] and integers[-2]:
        folder, count, last = separator.join(columns[:-2]).strip(), parse_integer(columns[-2]), parse_integer(label)
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


def _read_named(columns: list[str], header: dict[int, str], needs_label: bool) -> tuple[CSVRow, dict[str, str]]:
    if len(columns) > max(header) + 1:
        raise _UnknownForm(
            f"has {len(columns)} columns and the first line names {max(header) + 1}. Put quotes around what contains "
            "the separator."
        )
    values = {name: columns[i].strip() if i < len(columns) else "" for i, name in header.items()}
    path, label = values.pop("video"), values.pop("label", None)
    if not path:
        raise _UnknownForm("has no path under `video`. Fill it in or leave the line out.")
    if label == "" and needs_label:
        raise _UnknownForm(f"{path!r} has no label. Fill it in or leave the line out.")
    return CSVRow(path, label), values


def _has_suffix(path: str) -> bool:
    return os.path.splitext(path.strip())[1].lower() in MEDIA_SUFFIXES


def _names_media(text: str) -> bool:
    """Whether a text contains the name of a video file, which no label does."""
    return any(map(_has_suffix, text.split()))
