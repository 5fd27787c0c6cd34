"""From the rows of `VideoEmbedder` into an index, by any number of processes."""

import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ...data.video_files import SkippedVideo, list_videos
from ..arguments import require_count
from ..search import EmbedReport
from ..video_index import FACTS, ROWS_PER_COMMIT, VECTOR_COLUMN, RowWriter, VideoIndex, require_lancedb
from .embedder import COLUMNS, COUNTS, SECONDS, TEXTS

_is_forked_beside_lancedb = False


def _note_fork() -> None:
    global _is_forked_beside_lancedb
    _is_forked_beside_lancedb = "lancedb" in sys.modules


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def list_new_videos(sources: Iterable[str], folder: str | os.PathLike) -> list[str]:
    """Videos that an index does not hold, or that have changed since; those that it holds need no second encoding.

    Args:
        sources: Video files, and folders with videos at any depth.
        folder: The index, which need not be there yet.

    Returns:
        Their absolute paths, in order, and those that do not exist, so that the index can say so.

    Raises:
        ImportError: If LanceDB is not installed.
        OSError: If none of the sources exists.
        ValueError: If a folder holds no videos, or the index is one of an earlier version.

    Examples:
        >>> from umt_hf import embed_videos
        >>> from umt_hf.inference.batches import list_new_videos
        >>> len(list_new_videos(["videos"], "index"))
        4
        >>> report = embed_videos(["videos"], "umt-vit-b16-25m", "index")
        >>> len(list_new_videos(["videos", "video.mp4"], "index"))
        1
    """
    require_lancedb()
    files, missing = list_videos(sources)
    index = VideoIndex(folder)
    new = index.select_new(files) if index.exists() else files
    return [video.path for video in [*new, *missing]]


def write_rows(rows: Any, folder: str | os.PathLike, rows_per_commit: int = ROWS_PER_COMMIT) -> EmbedReport:
    """Put rows of `VideoEmbedder` into an index, which is made or added to.

    Any number of processes may do so at the same time, each with the rows of other videos, unless they were forked
    after LanceDB had been loaded. A video goes in once all of its rows are there, in any order.

    Args:
        rows: A dataset of `datasets` or of Ray, whose batches are read as they come, or batches or rows.
        folder: The index: a folder, or an address in object storage such as `s3://bucket/index`.
        rows_per_commit: Rows that are written at a time; fewer where they take longer than half a minute.

    Returns:
        What was written. Videos without a vector are in `skipped` and lose the rows that they had.

    Raises:
        FileExistsError: If the folder holds something other than an index.
        ImportError: If LanceDB is not installed.
        RuntimeError: If this process was forked after LanceDB had been loaded.
        ValueError: If there are no rows and no index, columns are missing, or the rows were made by another encoder
            than each other or than those of the index.

    Examples:
        >>> from umt_hf import VideoEmbedder
        >>> from umt_hf.inference.batches import write_rows
        >>> embedder = VideoEmbedder("umt-vit-b16-25m")
        >>> rows = embedder({"path": ["video.mp4", "gone.mp4"]})
        >>> report = write_rows(rows, "index")
        >>> report.num_in_index, len(report.skipped)
        (1, 1)
    """
    require_lancedb()
    if _is_forked_beside_lancedb:
        raise RuntimeError(
            "This process was forked after LanceDB had been loaded, which could leave it waiting for ever. Write from "
            "another process, or start this one by the method 'forkserver' or 'spawn'."
        )
    require_count("rows_per_commit", rows_per_commit)
    index, gathered = VideoIndex(folder), _Gathered()
    writer = RowWriter(index, rows_per_commit)
    known: set[str] = set()
    for batch in _list_batches(rows):
        columns = _read_columns(batch)
        for encoder in set(columns["encoder"]) - known:
            index.check_encoder(json.loads(encoder))
            index.create(json.loads(encoder))
            known.add(encoder)
        writer.write(gathered.take(columns))
    if not known and not index.exists():
        raise ValueError(f"There are no rows to write, and {folder} is not an index.")
    writer.flush()
    skipped = gathered.list_skipped()
    num_videos = index.finish(skipped)
    has_moments = index.read_encoder().get("moments") is not None
    return EmbedReport(
        len(gathered.written), 0, num_videos, tuple(skipped), index.count_rows() if has_moments else None
    )


class _Gathered:
    """Gives rows of videos once all of a video are there, and knows the others."""

    def __init__(self) -> None:
        self.written: set[str] = set()
        self.reasons: dict[str, str] = {}
        self._open: dict[tuple[str, int, int], dict[float | None, dict[str, Any]]] = defaultdict(dict)
        self._wanted: dict[tuple[str, int, int], int] = {}

    def take(self, columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
        """Take rows, and give those of videos that are complete with them, as `VideoIndex.add` wants them."""
        complete: list[dict[str, Any]] = []
        for place, path in enumerate(columns["path"]):
            if columns["reason"][place]:
                self.reasons[path] = columns["reason"][place]
                continue
            row = {name: columns[name][place] for name in (*FACTS, VECTOR_COLUMN)}
            video = (path, row["size_bytes"], row["modified_ns"])
            self._open[video][row["start_seconds"]] = row
            self._wanted[video] = columns["num_rows"][place]
            if len(self._open[video]) == self._wanted[video]:
                self.written.add(path)
                complete += self._open.pop(video).values()
        return complete

    def list_skipped(self) -> list[SkippedVideo]:
        """Videos without a row in the index, in order of their paths."""
        for video, rows in self._open.items():
            wanted = self._wanted[video]
            reason = f"Only {len(rows)} of its {wanted} rows were there; write all rows of a video at once."
            self.reasons.setdefault(video[0], reason)
        return [SkippedVideo(*item) for item in sorted(self.reasons.items()) if item[0] not in self.written]


def _list_batches(rows: Any) -> Iterator[Any]:
    """Batches of rows, whatever they come in."""
    if isinstance(rows, Mapping | pa.Table | pa.RecordBatch):
        yield rows
    elif hasattr(rows, "iter_batches"):  # of Ray
        yield from rows.iter_batches(batch_size=ROWS_PER_COMMIT)
    elif hasattr(rows, "with_format"):  # of `datasets`, whose arrays would be less precise than its tables
        yield from rows.with_format("arrow").iter(batch_size=ROWS_PER_COMMIT)
    else:
        yield from rows


def _read_columns(batch: Any) -> dict[str, Sequence[Any]]:
    """Columns of a batch, or of a single row, as the index wants their values."""
    names = batch.schema.names if isinstance(batch, pa.Table | pa.RecordBatch) else batch
    if missing := [name for name in COLUMNS if name not in names]:
        raise ValueError(f"Rows for an index lack {missing}: give those that VideoEmbedder returns, with all columns.")
    is_row = isinstance(batch["path"], str)
    columns = {name: [batch[name]] if is_row else _read_column(batch[name]) for name in COLUMNS}
    found: dict[str, Sequence[Any]] = {name: [str(value) for value in columns[name]] for name in TEXTS}
    found |= {name: [int(value) for value in columns[name]] for name in COUNTS}
    found |= {name: [None if np.isnan(value) else float(value) for value in columns[name]] for name in SECONDS}
    return found | {VECTOR_COLUMN: [np.asarray(value, np.float32) for value in columns[VECTOR_COLUMN]]}


def _read_column(values: Any) -> Sequence[Any]:
    is_arrow = isinstance(values, pa.Array | pa.ChunkedArray)
    return values.to_numpy(zero_copy_only=False) if is_arrow else values
