"""Tars of videos as a list: the place of each video, and the caption and label beside it."""

import json
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ...processing.media_files import TAR_BLOCK, name_tar_place
from ..labels import LABEL, check_labels
from .columns import VIDEO

CAPTION = "caption"
PREPARED_SUFFIX = ".prepare.json"  # beside tars that `umt-hf prepare` wrote: <split>.prepare.json
BAD_TEXT = "the text beside it is not UTF-8 or JSON"
READING_THREADS = 16

Row = dict[str, Any]


def read_tars(paths: Sequence[str], index: np.ndarray, needs_labels: bool) -> Iterator[pa.Table]:
    """Rows of tars with `video`, a path that `open_video` takes, and `caption` and `label` where some have them.

    Args:
        paths: Of the tars.
        index: Where each video is, and the text beside it (`streams.TAR_INDEX`), tar by tar.
        needs_labels: Whether labels are read.

    Yields:
        The rows of a tar.

    Raises:
        ValueError: If a text is not UTF-8 or JSON, labels are of several kinds, or a tar has changed meanwhile.
    """
    starts = np.searchsorted(index["shard"], np.arange(len(paths) + 1))
    places = [index[first:last] for first, last in zip(starts[:-1], starts[1:], strict=True)]
    with ThreadPoolExecutor(READING_THREADS) as pool:
        for tar, rows in zip(paths, pool.map(_read_tar, paths, places), strict=True):
            if rows:
                yield _join_rows(rows, tar, needs_labels)


def _read_tar(tar: str, places: np.ndarray) -> list[Row]:
    names = read_class_order(tar)
    with open(tar, "rb") as file:
        return [_read_row(tar, file, place, names) for place in places]


def _join_rows(rows: Sequence[Row], tar: str, needs_labels: bool) -> pa.Table:
    columns: dict[str, Any] = {VIDEO: pa.array([row[VIDEO] for row in rows], pa.string())}
    for name in (CAPTION, LABEL) if needs_labels else (CAPTION,):
        values = [row.get(name) for row in rows]
        if name == LABEL:
            values = check_labels(values, [row[VIDEO] for row in rows], tar)
        if any(isinstance(value, list) for value in values):  # a single one is a list of one
            values = [value if value is None or isinstance(value, list) else [value] for value in values]
        if any(value is not None for value in values):
            columns[name] = pa.array(values)
    return pa.table(columns)


def _read_row(tar: str, file: Any, place: Any, names: Sequence[str] | None) -> Row:
    offset, size = int(place["offset"]), int(place["size"])
    file.seek(offset - TAR_BLOCK)
    try:
        member = tarfile.TarInfo.frombuf(file.read(TAR_BLOCK), "utf-8", "replace").name
    except tarfile.TarError as error:
        raise ValueError(f"{tar}: has changed while it was read ({error}). Start again.") from error
    file.seek(int(place["text"]))
    try:
        notes = parse_text(file.read(int(place["text_size"])), bool(place["json"]))
    except ValueError as error:
        raise ValueError(f"{tar}/{member}: {BAD_TEXT} ({error}). Write it again, or leave the video out.") from error
    row: Row = {VIDEO: name_tar_place(tar, member, offset, size)}
    row |= {name: notes[name] for name in (CAPTION, LABEL) if notes.get(name) is not None}
    if LABEL in row:
        row[LABEL] = name_label(row[LABEL], names)
    return row


def parse_text(text: bytes, is_json: bool) -> Row:
    """What the text beside a video says: a caption, or JSON with one and more.

    Raises:
        ValueError: If it is not UTF-8 or JSON.
    """
    if not text:
        return {}
    if not is_json:
        return {CAPTION: text.decode().strip()}
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("too many brackets within each other") from error
    return content if isinstance(content, dict) else {}


def name_label(label: Any, names: Sequence[str] | None) -> Any:
    """A label, or a list of them, by name where the classes have names."""
    if isinstance(label, list):
        return [name_label(item, names) for item in label]
    is_number = isinstance(label, int) and not isinstance(label, bool)
    return names[label] if names is not None and is_number and 0 <= label < len(names) else label


def read_class_order(tar: str) -> list[str] | None:
    """Names of the classes in the order of their numbers, where `umt-hf prepare` noted them beside a tar."""
    file = find_notes(tar)
    if not file.is_file():
        return None
    found = [names for names in json.loads(file.read_text(encoding="utf-8")).get("label_names", []) if names]
    return found[0] if len({tuple(names) for names in found}) == 1 else None


def find_notes(tar: str) -> Path:
    """Where `umt-hf prepare` notes what it wrote into a tar and its like."""
    path = Path(tar)
    return path.with_name(path.stem.rpartition("-")[0] + PREPARED_SUFFIX)
