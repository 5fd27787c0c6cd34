"""Annotation files, folders and `datasets` datasets as one kind of table: rows with a `video` and its labels."""

import glob
import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast, overload

import numpy as np
import pyarrow as pa
from datasets import (
    ClassLabel,
    Dataset,
    DatasetInfo,
    Features,
    Image,
    IterableDataset,
    Value,
    Video,
    load_dataset,
    load_from_disk,
)

from ..processing.media_files import VideoDecodingError
from .arrow_cache import SHORTEST_CACHED_BYTES, ListFile, load_rows, map_once
from .labels import LABEL, align_labels
from .lists.columns import join_paths
from .lists.csv_lists import TEXT_SUFFIXES, read_csv
from .lists.folders import read_folder
from .lists.json_lists import JSON_SUFFIXES, read_json
from .lists.paths import is_remote, join_root
from .lists.sharing import find_once
from .lists.sqlite_lists import read_sqlite
from .lists.stores import fetch_list, refuse_own_files, split_address
from .lists.tar_rows import find_notes, read_class_order, read_tars
from .splits import CSV, FOLDER, JSON, PARQUET, SAVED, SQLITE, TARS, name_kind, refuse_idle_options
from .streams import fetch_hub_tars, find_tars, index_tars

logger = logging.getLogger(__name__)

JOINED_ROWS = 65_536  # at a time


@overload
def load_videos(
    source: str,
    data_root: str | None = None,
    csv_separator: str | None = None,
    config_name: str | None = None,
    split: str = "train",
    video_column: str = "video",
    streaming: Literal[False] = False,
    class_names: Sequence[str] | None = None,
    needs_labels: bool = True,
) -> Dataset: ...


@overload
def load_videos(
    source: str,
    data_root: str | None = None,
    csv_separator: str | None = None,
    config_name: str | None = None,
    split: str = "train",
    video_column: str = "video",
    streaming: bool = False,
    class_names: Sequence[str] | None = None,
    needs_labels: bool = True,
) -> Dataset | IterableDataset: ...


def load_videos(
    source: str,
    data_root: str | None = None,
    csv_separator: str | None = None,
    config_name: str | None = None,
    split: str = "train",
    video_column: str = "video",
    streaming: bool = False,
    class_names: Sequence[str] | None = None,
    needs_labels: bool = True,
) -> Dataset | IterableDataset:
    """Read a list of videos from any of the supported forms.

    Args:
        source: CSV file (`.csv`, `.tsv`, `.txt`; see `csv_lists` for its forms), JSON list of objects, or JSON lines,
            with a `video` key, SQLite base with a table `annos` (id, file name, caption), folder of videos
            (sub-folders are classes; see `folders`), tar or folder of tars (WebDataset, as `umt-hf prepare` writes
            them), folder written by `Dataset.save_to_disk`, Parquet file or folder of such files, or name of a dataset
            on the Hub. A list, Parquet file or folder of videos may be an address (`s3://bucket/train.csv`).
        data_root: Folder that relative paths start from; `None` = that of the annotation file.
        csv_separator: Separator of CSV columns; `None` = found.
        config_name: Configuration of a Hub dataset.
        split: Split of a dataset.
        video_column: Column that holds the video. A dataset without a column `video` may have a single one of type
            `Video`.
        streaming: Whether a dataset of the Hub, or of Parquet files, is streamed; refused for others.
        class_names: Names of the classes in the order of their labels; `None` = those of the source. Give held-out
            data the names of the training data: labels that have names then get the numbers of `class_names`.
        needs_labels: Whether the labels matter: of a folder, a few videos beside class folders are then left out. If
            not, lists come without labels.

    Returns:
        Rows with a `video` (path, or `{"path", "bytes"}`), where known a `label` (int, or list of ints), and the
        source's own columns. Where the classes have names, the feature of `label` is a `ClassLabel`, or a `List` of
        one (see `labels.get_label_names`).

    Raises:
        FileNotFoundError: If a file or folder does not exist.
        ValueError: If it holds no videos or a line cannot be read; the message names file and line. If an option has
            no effect on such a source.

    Examples:
        >>> from umt_hf.data.sources import load_videos
        >>> rows = load_videos("videos")  # a sub-folder per class
        >>> rows.features["label"].names
        ['cooking egg', 'dancing ballet']
        >>> rows[0]["label"], rows[0]["video"]
        (0, '...b0.mp4')
    """
    if is_remote(source):
        options = {"csv_separator": csv_separator, "streaming": streaming, "config_name": config_name}
        refuse_idle_options(source, name_kind(source), {**options, "video_column": video_column})
        return _load_remote(source, data_root, csv_separator, video_column, streaming, class_names, needs_labels)
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix in TEXT_SUFFIXES | JSON_SUFFIXES and not path.is_file():
        kind = "is a folder" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{source}: {kind}; a list of videos is expected there. Check the path.")
    kind = name_kind(source)
    options = {"csv_separator": csv_separator, "streaming": streaming, "config_name": config_name}
    refuse_idle_options(source, kind, {**options, "video_column": video_column, "data_root": data_root})
    if kind in (CSV, JSON, SQLITE):
        return _load_list(path, source, data_root, csv_separator, video_column, class_names, needs_labels)
    if kind == TARS:
        return _load_tars(source, *find_tars(source, split), class_names, needs_labels)
    if kind == SAVED:
        table = _choose_split(source, load_from_disk(source), split)
    elif suffix == ".parquet" and path.is_file():
        table = load_dataset("parquet", data_files=glob.escape(source), split="train", streaming=streaming)
    elif kind == FOLDER:
        return _load_folder(path, class_names, needs_labels)
    else:
        options = {"class_names": class_names, "needs_labels": needs_labels}
        table = _load_from_hub(source, config_name, split, streaming, **options)
    table = _undecoded(table, source, video_column, data_root)
    return align_labels(table, source, class_names) if needs_labels else table


def _load_remote(
    source: str,
    data_root: str | None,
    csv_separator: str | None,
    video_column: str,
    streaming: bool,
    class_names: Sequence[str] | None,
    needs_labels: bool,
) -> Dataset:
    """Rows of a list at an address, of which a copy is read, or of a folder in an object store."""
    kind = name_kind(source)
    if kind == FOLDER:
        refuse_idle_options(source, kind, {"data_root": data_root})
        return _load_folder(source, class_names, needs_labels)
    if streaming:
        raise ValueError(f"{source}: a list at an address is fetched, not streamed. Leave out streaming.")
    copy = str(fetch_list(source))
    logger.info("%s: read from its copy %s.", source, copy)
    folder = split_address(source)[0]
    root = data_root or (None if kind == PARQUET else folder)
    try:
        table = load_videos(
            copy, root, csv_separator, video_column=video_column, class_names=class_names, needs_labels=needs_labels
        )
    except (FileNotFoundError, ValueError) as error:
        kind_of_error = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind_of_error(str(error).replace(copy, source)) from error
    if root is None and (not pa.types.is_struct(table.data.schema.field("video").type) or _has_paths_alone(table)):
        table = cast("Dataset", _join_roots(table, source, folder))
    refuse_own_files(source, table.data.column("video"), data_root or None)
    return table


def _load_folder(path: str | Path, class_names: Sequence[str] | None, needs_labels: bool) -> Dataset:
    """Videos of a folder, as this process lists them, or another one of this machine has in this start."""

    def read() -> Dataset:
        rows, feature = read_folder(path, class_names, needs_labels)
        features = Features.from_arrow_schema(rows.schema)
        return Dataset(
            rows, DatasetInfo(features=features if feature is None else Features({**features, LABEL: feature}))
        )

    def write(file: Path) -> None:
        table = read()
        rows = table.data.table.cast(table.features.arrow_schema)
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, rows.schema) as stream:
            stream.write_table(rows)

    names = None if class_names is None else list(class_names)
    found = find_once(json.dumps([str(path), names, needs_labels]), write)
    if found is None:
        return read()
    return Dataset.from_file(str(found), in_memory=found.stat().st_size < SHORTEST_CACHED_BYTES)


def _load_list(
    path: Path,
    source: str,
    data_root: str | None,
    csv_separator: str | None,
    video_column: str,
    class_names: Sequence[str] | None,
    needs_labels: bool,
) -> Dataset:
    suffix = path.suffix.lower()
    root = data_root if data_root is not None else str(path.parent)
    options = {"root": root, "csv_separator": csv_separator, "video_column": video_column}
    file = ListFile(source, options, class_names, needs_labels)
    looked_up: list[str] = []

    def read() -> Iterator[pa.Table]:
        if suffix in TEXT_SUFFIXES:
            return read_csv(path, root, csv_separator, video_column, needs_labels, looked_up)
        if suffix in JSON_SUFFIXES:
            return read_json(path, root, video_column, needs_labels)
        return read_sqlite(path, root)

    return load_rows(file, read, lambda: not looked_up)


def _load_tars(
    source: str, tars: list[str], index: np.ndarray, class_names: Sequence[str] | None, needs_labels: bool
) -> Dataset:
    """Rows of tars, by the place of each video."""
    known = {tuple(names) for tar in tars if (names := read_class_order(tar)) is not None}
    if class_names is None and len(known) == 1:
        class_names = list(next(iter(known)))  # with those that no video has, in their order
    notes = sorted({str(file) for tar in tars if (file := find_notes(tar)).is_file()})
    file = ListFile(source, {"kind": TARS}, class_names, needs_labels, (*tars, *notes))
    return load_rows(file, lambda: read_tars(tars, index, needs_labels))


def _choose_split(source: str, table: Any, split: str) -> Dataset:
    if not isinstance(table, dict):
        return table
    if split not in table:
        raise ValueError(f"{source}: has no split {split!r}; it has {sorted(table)}.")
    return table[split]


HUB_NAME = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?")


def _load_from_hub(
    source: str,
    config_name: str | None,
    split: str,
    streaming: bool,
    class_names: Sequence[str] | None,
    needs_labels: bool,
) -> Dataset | IterableDataset:
    """A dataset of the Hub, or a folder of Parquet files."""
    path = Path(source)
    if path.is_file():
        raise ValueError(
            f"{source}: expected a .csv, .json, .jsonl, .parquet or .sqlite file, a folder, or the name of a dataset."
        )
    # Ids of the Hub have one slash at most: anything else is meant as a path, and reported as missing like one.
    looks_local = path.is_absolute() or source.startswith((".", "~")) or source.endswith("/") or source.count("/") > 1
    looks_local = looks_local or not HUB_NAME.fullmatch(source)
    if not path.exists() and looks_local:
        raise FileNotFoundError(f"{source}: no such file or folder.")
    # `datasets` would decode videos in tars, and does not know frames that are kept.
    if not streaming and not path.exists() and (tars := fetch_hub_tars(source, config_name, split)) is not None:
        return _load_tars(source, tars, index_tars(source, tars), class_names, needs_labels)
    try:
        return load_dataset(source, config_name, split=split, streaming=streaming)
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(f"{source}: no such file or folder, and no dataset of that name ({error}).") from error
    except ValueError as error:  # an unknown split or configuration, which the message lists
        raise ValueError(f"{source}: {error}") from error


def get_source(video: str | bytes | dict[str, Any] | None) -> str | bytes:
    """What a reader opens of a row's `video`: its path, or the bytes that a data set holds.

    Raises:
        VideoDecodingError: If the row has neither.
    """
    source = (video.get("bytes") or video.get("path")) if isinstance(video, dict) else video
    if not source:
        raise VideoDecodingError("<row without a video>: has neither a path nor bytes. Fill it in or leave it out.")
    return source


def _undecoded(
    table: Dataset | IterableDataset, source: str, video_column: str, data_root: str | None
) -> Dataset | IterableDataset:
    """Name the columns `video` and `label`, and leave the videos as they are stored."""
    features = table.features
    if features is None:
        return table if video_column == "video" else table.rename_column(video_column, "video")
    if video_column not in features:
        kind = {"video": Video, "image": Image}.get(video_column, ())
        typed = [name for name, feature in features.items() if isinstance(feature, kind)]
        if len(typed) != 1:
            raise ValueError(f"{source}: the dataset has no column {video_column!r}; it has {sorted(features)}.")
        logger.info("%s: each %s is in the column %r, the only one of that type.", source, video_column, typed[0])
        video_column = typed[0]
    feature = features[video_column]
    # Bytes stay bytes: our readers decode the frames of a clip alone, `datasets` would decode all of them.
    if not isinstance(feature, Value):
        if not isinstance(feature, Image | Video) and not (
            isinstance(feature, dict) and {"bytes", "path"} & set(feature)
        ):
            raise ValueError(
                f"{source}: the column {video_column!r} holds {feature}; expected paths, bytes or `Video`."
            )
        kind = Image if isinstance(feature, Image) else Video
        table = table.cast_column(video_column, kind(decode=False))
    if video_column != "video":
        table = table.rename_column(video_column, "video")
    named = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if LABEL not in features and len(named) == 1:
        table = table.rename_column(named[0], LABEL)
        logger.info("%s: the labels are those of the column %r, the one of type ClassLabel.", source, named[0])
    return table if data_root is None else _join_roots(table, source, data_root)


def _join_roots(table: Dataset | IterableDataset, source: str, data_root: str) -> Dataset | IterableDataset:
    """Let relative paths start at a folder, where rows have paths and no bytes."""
    assert table.features is not None, "Its column was looked up there."
    feature = table.features["video"]
    is_text = isinstance(feature, Value) and feature.dtype in ("string", "large_string")
    if isinstance(table, IterableDataset):
        return table.map(_join_row, fn_kwargs={"root": data_root}, features=table.features)
    if not is_text and not _has_paths_alone(table):
        logger.warning("%s: data_root=%s is not used, since the rows hold the videos themselves.", source, data_root)
        return table
    options: dict[str, Any] = {"fn_kwargs": {"root": data_root}, "batched": True, "features": table.features}
    with map_once(table):
        joined: Any = table.with_format("arrow").map(_join_column, batch_size=JOINED_ROWS, **options)
    return joined.with_format(None)


def _has_paths_alone(table: Dataset) -> bool:
    kind = table.data.schema.field("video").type
    if not pa.types.is_struct(kind) or "path" not in [field.name for field in kind]:
        return False
    videos = table.data.column("video")
    names = [field.name for field in kind]
    return "bytes" not in names or all(chunk.field("bytes").null_count == len(chunk) for chunk in videos.chunks)


def _join_column(rows: pa.Table, root: str) -> pa.Table:
    videos: Any = rows.column("video").combine_chunks()
    is_struct = pa.types.is_struct(videos.type)
    texts = videos.field("path") if is_struct else videos
    joined = join_paths(root, texts.cast(pa.string())).cast(texts.type)
    if is_struct:
        fields = [joined if field.name == "path" else videos.field(field.name) for field in videos.type]
        joined = pa.StructArray.from_arrays(fields, fields=list(videos.type), mask=videos.is_null())
    return rows.set_column(rows.column_names.index("video"), "video", joined)


def _join_row(row: dict[str, Any], root: str) -> dict[str, Any]:
    video = row["video"]
    if isinstance(video, dict):
        path = video.get("path")
        return row if video.get("bytes") or not path else {**row, "video": {**video, "path": join_root(root, path)}}
    return {**row, "video": join_root(root, video)} if isinstance(video, str) else row
