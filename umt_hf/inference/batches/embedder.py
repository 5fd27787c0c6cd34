"""A class that engines call with batches of videos, and that gives the rows of an index for them.

Legend: N rows, D width of a vector.
"""

import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...data.lists.paths import is_url
from ...data.video_files import VideoFile, describe_file
from ...processing.decoding import VideoSource
from ...runs.arguments import KeptTokenArguments
from ..arguments import require_count
from ..engine import DType, choose_dtype
from ..moments import resolve_moments
from ..search import RowEncoder, VideoTextEncoder, describe_index, find_dual_encoder
from ..video_index import FACTS, VECTOR_COLUMN

COUNTS = ("size_bytes", "modified_ns", "num_frames", "num_rows")
SECONDS = ("duration_seconds", "start_seconds", "end_seconds")
TEXTS = ("path", "reason", "encoder")
COLUMNS = (*FACTS, "num_rows", "reason", "encoder", VECTOR_COLUMN)
# Of the standard library, and of `datasets`: each knows its own workers alone.
PROCESS_MODULES = ("multiprocessing.process", "multiprocess.process")


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
        self._process: tuple[int, int | None] | None = None  # this one, and, of a worker, that which started it

    def __getstate__(self) -> dict[str, Any]:
        # Weights do not go to another process, which loads them.
        return self.__dict__ | {"_encoder": None, "_description": "", "_process": None}

    def describe(self) -> dict[str, Any]:
        """What makes its rows comparable with others, as the index records it; loads the model."""
        return describe_index(self._load(), self.windows)

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
        videos = _list_rows(batch)
        rows: dict[int, list[dict[str, Any]]] = defaultdict(list)
        reasons = {place: video.reason for place, video in enumerate(videos) if video.reason}
        for places in _split_repeats(videos):
            by_path = {videos[place].file.path: place for place in places}
            files = [videos[place].file for place in places]
            sources = {v.file.path: v.source for v in (videos[place] for place in places) if v.source is not None}
            for encoded in RowEncoder(encoder, sources=sources).encode(files, self.windows, self.batch_size):
                for row in encoded.rows:
                    rows[by_path[row["path"]]].append(row)
                reasons.update({by_path[video.path]: video.reason for video in encoded.skipped})
        empty = np.full(encoder.model.config.projection_dim, np.nan, np.float32)
        columns: list[dict[str, Any]] = []
        for place, video in enumerate(videos):
            if place in reasons:
                columns.append({**asdict(video.file), "reason": reasons[place], VECTOR_COLUMN: empty})
            columns += [row | {"num_rows": len(rows[place])} for row in rows[place]]
        return _build_batch(columns, self._description, len(empty))

    def _load(self, rank: int | None = None) -> VideoTextEncoder:
        """The encoder in this process."""
        self._know_process()
        if self._encoder is None:
            device = choose_device(self.device, rank)
            dtype = choose_dtype(self.dtype, device)
            self._encoder = VideoTextEncoder(self.model, self.num_frames, device, tokens=self.tokens, dtype=dtype)
            self._description = json.dumps(describe_index(self._encoder, self.windows))
        return self._encoder

    def _know_process(self) -> None:
        """Prepare a process that encodes for the first time, and end a worker that nobody waits for any more."""
        if self._process is None or self._process[0] != os.getpid():
            is_worker = _is_worker()
            if is_worker:
                # As many workers as cores; and threads of OpenMP do not survive a fork.
                torch.set_num_threads(1)
            self._process = (os.getpid(), os.getppid() if is_worker else None)
        if self._process[1] not in (None, os.getppid()):
            raise SystemExit("The process that started this worker is gone, and nobody waits for its rows.")


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
