"""Vectors of videos by an engine that spreads work over processes and machines, and from its rows into an index.

`VideoEmbedder` is what Ray Data's `map_batches` and the `map` of `datasets` call with batches of paths. `write_rows`
puts what comes out into an index, which is that of `umt-hf embed`.

    rows = ray.data.from_items([{"path": path} for path in paths]).map_batches(
        VideoEmbedder,
        fn_constructor_kwargs={"model": "outputs/retrieval"},
        compute=ray.data.ActorPoolStrategy(size=2),
    )
    write_rows(rows, "index")

Legend: N rows, D width of a vector.
"""

import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ..data.lists.paths import is_url
from ..data.video_files import SkippedVideo, VideoFile, describe_file, list_videos
from ..processing.decoding import VideoSource
from ..runs.arguments import KeptTokenArguments
from .arguments import require_count
from .engine import DType, choose_dtype
from .moments import resolve_moments
from .search import EmbedReport, VideoTextEncoder, encode_files, find_dual_encoder
from .video_index import FACTS, ROWS_PER_COMMIT, VECTOR_COLUMN, RowWriter, VideoIndex, require_lancedb

COUNTS = ("size_bytes", "modified_ns", "num_frames", "num_rows")
SECONDS = ("duration_seconds", "start_seconds", "end_seconds")
TEXTS = ("path", "reason", "encoder")
COLUMNS = (*FACTS, "num_rows", "reason", "encoder", VECTOR_COLUMN)
# Of the standard library, and of `datasets`: each knows its own workers alone.
PROCESS_MODULES = ("multiprocessing.process", "multiprocess.process")

_is_forked_beside_lancedb = False


def _note_fork() -> None:
    global _is_forked_beside_lancedb
    _is_forked_beside_lancedb = "lancedb" in sys.modules


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


@dataclass(frozen=True)
class _Video:
    """A row that came in: what is known of its file, what is read in place of the path, or why nothing is."""

    file: VideoFile
    source: VideoSource | None = None
    reason: str = ""


class VideoEmbedder:
    """Encodes batches of videos, in any number of processes and machines that another library starts.

    The model is loaded at the first batch, in the process that encodes it; what goes to a worker are settings. A
    worker process of `datasets` computes on one thread.

    Args:
        model: Folder or Hub id of a stage-2 or retrieval model with its processor, for each worker the same.
        num_frames: Frames read of each video, or of each moment; default: the processor's.
        batch_size: Videos or moments encoded at a time, whatever the number of rows that come together.
        window: Seconds of a moment; default: a row is a complete video.
        stride: Seconds from the start of a moment to that of the next; default: `window`.
        tokens: Which tokens of a video the encoder sees; default: as the model's configuration says.
        dtype: What the model is computed in; default: bfloat16 on a GPU that has it, float32 elsewhere.
        device: Where it runs; default: the accelerator, that of the worker's rank where it is given, or CPU.

    Raises:
        OSError: If there is no such folder or repository.
        ValueError: If the model is of another kind, or a setting makes no sense.

    Examples:
        >>> from datasets import Dataset
        >>> from umt_hf import VideoEmbedder
        >>> videos = Dataset.from_dict({"path": ["video.mp4", "gone.mp4"]})
        >>> embedder = VideoEmbedder("umt-vit-b16-25m", window=1.5)
        >>> rows = videos.map(embedder, batched=True, remove_columns="path")
        >>> [(row["start_seconds"], row["reason"]) for row in rows]
        [(0.0, ''), (1.5, ''), (nan, 'No such file or directory.')]
    """

    def __init__(
        self,
        model: str | os.PathLike,
        num_frames: int | None = None,
        batch_size: int = 8,
        *,
        window: float | None = None,
        stride: float | None = None,
        tokens: KeptTokenArguments | None = None,
        dtype: DType | None = None,
        device: str | None = None,
    ):
        self.windows = resolve_moments(window, stride)
        require_count("num_frames", num_frames)
        require_count("batch_size", batch_size)
        choose_dtype(dtype, torch.device("cpu"))  # for its refusal
        self.model = find_dual_encoder(model)
        self.num_frames, self.batch_size = num_frames, batch_size
        self.tokens, self.dtype, self.device = tokens, dtype, device
        # `datasets` looks for what it computed earlier by a hash of this object, which must see another model.
        self._model_files = _list_states(self.model)
        self._encoder: VideoTextEncoder | None = None
        self._description = ""
        self._starter: int | None = None  # of a worker

    def __getstate__(self) -> dict[str, Any]:
        # Weights do not go to another process, which loads them.
        return self.__dict__ | {"_encoder": None, "_description": "", "_starter": None}

    def describe(self) -> dict[str, Any]:
        """What makes its rows comparable with others, as the index records it; loads the model."""
        return self._load().describe_rows(self.windows)

    @torch.inference_mode()
    def __call__(self, batch: Mapping[str, Any], rank: int | None = None) -> dict[str, np.ndarray]:
        """Encode a batch of videos.

        Args:
            batch: Lists or arrays: `path`, and, if there is a column of that name, `bytes`, the contents of the file
                where they are known, which are read in place of the path.
            rank: Number of the worker, as `with_rank` of `datasets` gives it; says which accelerator it takes.

        Returns:
            A row per video or moment, in order: `path` (absolute, but that of bytes is as it was given), `size_bytes`,
            `modified_ns` (0 of bytes), `num_frames`, `duration_seconds`, `start_seconds` and `end_seconds` (NaN where
            unknown, or of complete videos), `num_rows` of the same video, `vector`, float32 `(N, D)`, `reason` and
            `encoder` (what made the vectors, as JSON). A video that cannot be read is one row with a `reason`, which
            is empty elsewhere, and a vector of NaN.

        Raises:
            ValueError: If there is no column `path`.
        """
        encoder = self._load(rank)
        if self._starter not in (None, os.getppid()):
            raise SystemExit("The process that started this worker is gone, and nobody waits for its rows.")
        videos = _list_rows(batch)
        rows: dict[int, list[dict[str, Any]]] = defaultdict(list)
        reasons = {place: video.reason for place, video in enumerate(videos) if video.reason}
        for places in _split_repeats(videos):
            by_path = {videos[place].file.path: place for place in places}
            files = [videos[place].file for place in places]
            sources = {v.file.path: v.source for v in (videos[place] for place in places) if v.source is not None}
            encoded = encode_files(encoder, files, self.windows, self.batch_size, sources=sources)
            for found, skipped, _ in encoded:
                for row in found:
                    rows[by_path[row["path"]]].append(row)
                reasons.update({by_path[video.path]: video.reason for video in skipped})
        empty = np.full(encoder.model.config.projection_dim, np.nan, np.float32)
        columns: list[dict[str, Any]] = []
        for place, video in enumerate(videos):
            if place in reasons:
                columns.append({**asdict(video.file), "reason": reasons[place], VECTOR_COLUMN: empty})
            columns += [row | {"num_rows": len(rows[place])} for row in rows[place]]
        return _build_batch(columns, self._description, len(empty))

    def _load(self, rank: int | None = None) -> VideoTextEncoder:
        """The encoder in this process."""
        if self._encoder is None:
            if _is_worker():
                # As many workers as cores; and threads of OpenMP do not survive a fork.
                torch.set_num_threads(1)
                self._starter = os.getppid()
            device = choose_device(self.device, rank)
            dtype = choose_dtype(self.dtype, device)
            self._encoder = VideoTextEncoder(self.model, self.num_frames, device, tokens=self.tokens, dtype=dtype)
            self._description = json.dumps(self._encoder.describe_rows(self.windows))
        return self._encoder


def choose_device(name: str | None, rank: int | None = None) -> torch.device:
    """Where a worker computes.

    Args:
        name: Device that was asked for; default: an accelerator if there is one.
        rank: Number of the worker; workers take the accelerators in turn.
    """
    if name is not None:
        return torch.device(name)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return torch.device("cpu")
    if rank is None:
        return accelerator
    return torch.device(accelerator.type, rank % torch.accelerator.device_count())


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


def _list_rows(batch: Mapping[str, Any]) -> list[_Video]:
    """What is to be read."""
    if "path" not in batch:
        raise ValueError(f"A batch of videos needs a column 'path'; these are {sorted(batch)}.")
    paths = batch["path"]
    contents = batch["bytes"] if "bytes" in batch else [None] * len(paths)
    return [_describe_row(path, content) for path, content in zip(paths, contents, strict=True)]


def _describe_row(path: Any, content: Any) -> _Video:
    if not isinstance(path, str) or not path:
        return _Video(VideoFile("", 0, 0), reason=f"The path of its row is {path!r}, which names no video.")
    if content is not None:
        if not isinstance(content, bytes | bytearray | memoryview):
            return _Video(VideoFile(path, 0, 0), reason=f"Its bytes are a {type(content).__name__}.")
        file = VideoFile(path, len(content), 0)
        # Not the file of that name: bytes that are there, but empty, are what the row says.
        return _Video(file, {"path": path, "bytes": content}) if len(content) else _Video(file, reason="It is empty.")
    full = path if is_url(path) else os.path.abspath(os.path.expanduser(path))
    try:
        return _Video(describe_file(full))
    except (OSError, ValueError) as error:  # the second of a path that no system takes
        return _Video(VideoFile(full, 0, 0), reason=f"{getattr(error, 'strerror', None) or error}.")


def _split_repeats(videos: Sequence[_Video]) -> Iterator[list[int]]:
    """Places of videos that are to be read, in turns, so that a path is there once in each turn."""
    turns: dict[int, list[int]] = defaultdict(list)
    seen: Counter[str] = Counter()
    for place, video in enumerate(videos):
        if not video.reason:
            turns[seen[video.file.path]].append(place)
            seen[video.file.path] += 1
    yield from turns.values()


def _build_batch(rows: Sequence[dict[str, Any]], encoder: str, width: int) -> dict[str, np.ndarray]:
    """Columns of rows; what a row lacks is empty, zero or NaN, so that all batches have the same types."""
    columns: dict[str, np.ndarray] = {}
    for name in COLUMNS:
        values = [row.get(name) for row in rows]
        if name in COUNTS:
            columns[name] = np.array([value or 0 for value in values], np.int64)
        elif name in SECONDS:
            columns[name] = np.array([np.nan if value is None else value for value in values], np.float64)
        elif name in TEXTS:
            texts = [encoder if name == "encoder" else value or "" for value in values]
            columns[name] = np.array(texts, object)
        else:
            columns[name] = np.array(values, np.float32).reshape(len(rows), width)
    return columns


def _list_states(model: str) -> list[tuple[str, int, int]]:
    """Name, size and time of the files of a model folder; of the id of one, nothing."""
    files = [file for file in sorted(Path(model).glob("*")) if file.is_file()]
    return [(file.name, (status := file.stat()).st_size, status.st_mtime_ns) for file in files]


def _is_worker() -> bool:
    """Whether another process has started this one to share its work."""
    modules = [sys.modules[name] for name in PROCESS_MODULES if name in sys.modules]
    return any(module.parent_process() is not None for module in modules)


__all__ = ["VideoEmbedder", "list_new_videos", "write_rows"]
