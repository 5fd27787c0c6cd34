"""Annotation files, folders and `datasets` datasets as one kind of table: rows with a `video` and its labels."""

import csv
import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, overload

from datasets import Dataset, Image, IterableDataset, Value, Video, load_dataset, load_from_disk

from ..processing.media_files import VideoDecodingError

VIDEO_SUFFIXES = {".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"}
SQLITE_SUFFIXES = {".db", ".sqlite", ".sqlite3"}


@overload
def load_videos(
    source: str,
    data_root: str | None = None,
    csv_separator: str = ",",
    config_name: str | None = None,
    split: str = "train",
    video_column: str = "video",
    streaming: Literal[False] = False,
    class_names: list[str] | None = None,
) -> Dataset: ...


@overload
def load_videos(
    source: str,
    data_root: str | None = None,
    csv_separator: str = ",",
    config_name: str | None = None,
    split: str = "train",
    video_column: str = "video",
    streaming: bool = False,
    class_names: list[str] | None = None,
) -> Dataset | IterableDataset: ...


def load_videos(
    source: str,
    data_root: str | None = None,
    csv_separator: str = ",",
    config_name: str | None = None,
    split: str = "train",
    video_column: str = "video",
    streaming: bool = False,
    class_names: list[str] | None = None,
) -> Dataset | IterableDataset:
    """Read a list of videos from any of the supported forms.

    Args:
        source: CSV file without header (`path,label`; a name without a suffix gets `.mp4`), JSON list of objects with
            a `video` key, SQLite base with a table `annos` (id, file name, caption), folder of videos (sub-folders are
            classes), folder written by `Dataset.save_to_disk`, folder of Parquet files, or name of a dataset on the
            Hub.
        data_root: Folder that relative paths start from; `None` = that of the annotation file.
        csv_separator: Separator of CSV columns.
        config_name: Configuration of a Hub dataset.
        split: Split of a dataset.
        video_column: Column that holds the video.
        streaming: Whether a dataset of the Hub, or of Parquet files, is streamed.
        class_names: Names of a folder's classes in the order of their labels; `None` = its sub-folders, sorted. Give a
            held-out folder the training folder's, so that labels agree.

    Returns:
        Rows with a `video` (path, or `{"path", "bytes"}`) and, where known, `label` (int) or the source's own columns.

    Raises:
        FileNotFoundError: If a file or folder does not exist.
        ValueError: If it holds no videos or a line cannot be read; the message names file and line.
    """
    path = Path(source)
    if path.suffix == ".csv":
        return _keep_paths(read_csv(path, data_root, csv_separator), path)
    if path.suffix == ".json":
        return _keep_paths(read_json(path, data_root, video_column), path)
    if path.suffix in SQLITE_SUFFIXES and path.is_file():
        return _keep_paths(read_sqlite(path, data_root), path)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        table = load_from_disk(source)
        table = table[split] if isinstance(table, dict) else table
        return _undecoded(table, video_column)
    if path.is_dir() and not any(path.rglob("*.parquet")):
        return _keep_paths(read_folder(path, class_names), path)
    if path.is_file():
        raise ValueError(f"{source}: expected a .csv, .json or .sqlite file, a folder, or the name of a dataset.")
    # Ids of the Hub have one slash at most: anything else is meant as a path, and reported as missing like one.
    looks_local = path.is_absolute() or source.startswith((".", "~")) or source.endswith("/") or source.count("/") > 1
    if not path.exists() and looks_local:
        raise FileNotFoundError(f"{source}: no such file or folder.")
    try:
        table = load_dataset(source, config_name, split=split, streaming=streaming)
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(f"{source}: no such file or folder, and no dataset of that name ({error}).") from error
    return _undecoded(table, video_column)


def get_source(video: str | dict[str, Any] | None) -> str | bytes:
    """What a reader opens of a row's `video`: its path, or the bytes that a data set holds.

    Raises:
        VideoDecodingError: If the row has neither.
    """
    source = video if isinstance(video, str) else (video or {}).get("bytes") or (video or {}).get("path")
    if not source:
        raise VideoDecodingError("<row without a video>: has neither a path nor bytes. Fill it in or leave it out.")
    return source


def read_csv(path: Path, data_root: str | None = None, separator: str = ",") -> list[dict[str, Any]]:
    """Read `path<separator>label` lines.

    A path that itself contains the separator is understood if it is quoted, or if the label is the last column.

    Raises:
        ValueError: If a line has no integer label, naming file and line.
    """
    root = Path(data_root) if data_root is not None else path.parent
    rows = []
    with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte-order mark
        for number, columns in enumerate(csv.reader(file, delimiter=separator), start=1):
            columns = [column for column in columns if column]
            if not columns:
                continue
            # Published files may carry further columns behind the label, and paths may contain the separator.
            has_label_second = len(columns) > 1 and columns[1].strip().isdigit()
            name, label = (columns[0], columns[1]) if has_label_second else (separator.join(columns[:-1]), columns[-1])
            if not name or not label.strip().isdigit():
                raise ValueError(
                    f"{path}, line {number}: expected `path{separator}label` with an integer label, got "
                    f"{separator.join(columns)!r}."
                )
            name = name if "." in os.path.basename(name) else name + ".mp4"
            rows.append({"video": os.path.join(root, name), "label": int(label)})
    return rows


def read_json(path: Path, data_root: str | None = None, video_column: str = "video") -> list[dict[str, Any]]:
    """Read a JSON list of objects with a `video` key (and whatever else, `caption` for example).

    An object with a list of videos gives a row for each. Where a key holds a list in one object and a single value in
    another, the value becomes a list of one.

    Raises:
        ValueError: If it is not a list, or an object has no video, naming file and position.
    """
    root = Path(data_root) if data_root is not None else path.parent
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, list):
        raise ValueError(f"{path}: expected a JSON list of objects, got {type(content).__name__}.")
    rows = []
    for number, row in enumerate(content):
        videos = row.get(video_column) if isinstance(row, dict) else None
        videos = [videos] if isinstance(videos, str) else videos
        if not isinstance(videos, list) or not all(isinstance(video, str) for video in videos):
            raise ValueError(f"{path}, object {number}: expected a string under {video_column!r}.")
        others = {name: value for name, value in row.items() if name != video_column}
        rows += [{**others, "video": os.path.join(root, video)} for video in videos]
    return _unify_lists(rows)


def read_sqlite(path: Path, data_root: str | None = None) -> list[dict[str, Any]]:
    """Read the table `annos` (id, file name, caption) of an SQLite base, as published for large corpora.

    Raises:
        ValueError: If there is no such table.
    """
    root = Path(data_root) if data_root is not None else path.parent
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as base:
            # Sorted: without it the order of rows, and so the order of training, is up to SQLite.
            rows = base.execute("SELECT * FROM annos ORDER BY 1").fetchall()
    except sqlite3.Error as error:
        raise ValueError(
            f"{path}: not an SQLite base with a table `annos` (id, file name, caption): {error}"
        ) from error
    return [{"video": os.path.join(root, name), "caption": caption} for _, name, caption in rows]


def _unify_lists(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make a column that holds a list in one row hold lists in all of them, which a table needs."""
    listed = {name for row in rows for name, value in row.items() if isinstance(value, list)}
    for row in rows:
        for name in listed & row.keys():
            if not isinstance(row[name], list):
                row[name] = [row[name]]
    return rows


def read_folder(path: Path, class_names: list[str] | None = None) -> list[dict[str, Any]]:
    """List the videos below a folder in order of name; where all lie in sub-folders, these are their classes.

    Raises:
        ValueError: If there are no videos, or `class_names` lacks a sub-folder's name.
    """
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in VIDEO_SUFFIXES)
    if not files:
        raise ValueError(f"{path}: no videos found; known suffixes are {', '.join(sorted(VIDEO_SUFFIXES))}.")
    if any(file.parent == path for file in files):
        return [{"video": str(file)} for file in files]
    classes = [file.relative_to(path).parts[0] for file in files]
    names = sorted(set(classes)) if class_names is None else class_names
    if unknown := sorted(set(classes) - set(names)):
        raise ValueError(f"{path}: the sub-folders {unknown} are not classes; the classes are {names}.")
    return [{"video": str(file), "label": names.index(name)} for file, name in zip(files, classes, strict=True)]


def _keep_paths(rows: list[dict[str, Any]], source: Path) -> Dataset:
    if not rows:
        raise ValueError(f"{source} lists no videos.")
    return Dataset.from_list(rows)


def _undecoded(table: Dataset | IterableDataset, video_column: str) -> Dataset | IterableDataset:
    features = table.features
    if features is not None:
        if video_column not in features:
            raise ValueError(f"The dataset has no column {video_column!r}; it has {sorted(features)}.")
        feature = features[video_column]
        # Bytes stay bytes: our readers decode the frames of a clip alone, `datasets` would decode all of them.
        if not isinstance(feature, Value):
            kind = Image if isinstance(feature, Image) else Video
            table = table.cast_column(video_column, kind(decode=False))
    return table if video_column == "video" else table.rename_column(video_column, "video")
