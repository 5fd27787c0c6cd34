"""Shards that hold many videos: WebDataset tars and Parquet files, read where they are, a row at a time.

An index says where each row is, so that shards are numbered like the rows of a table: a run's place in them is a
number, and going on from it reads nothing that came before. Bytes are read by the worker that decodes them. Rows are
shuffled by shard and within the shards that are mixed at a time, without a buffer that would have to be saved.
"""

import glob
import hashlib
import json
import logging
import os
import posixpath
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Features, Video, load_dataset_builder
from filelock import FileLock
from huggingface_hub import HfFileSystem, snapshot_download

from ..processing.decoding import SPREAD_STRATEGIES, STORED_SUFFIX, open_video
from ..processing.media_files import TAR_BLOCK, TAR_PLACE, VideoDecodingError
from ..runs.folder import UNFINISHED_SUFFIX
from .lists.contents import look_through, refuse_packed, say_left_out
from .lists.folders import VIDEO_SUFFIXES, is_packed_tar
from .lists.paths import is_remote, join_root
from .lists.tar_rows import BAD_TEXT, CAPTION, find_notes, parse_text
from .splits import DATASET, TARS, name_kind, refuse_idle_options
from .unreadable import LOST_SHARD, LostShardError

logger = logging.getLogger(__name__)

FORMAT = 2  # to be raised whenever the same tars would give another index
CACHE_FOLDER = "umt_hf_shards"
SHORTEST_CACHED_BYTES = 1 << 30  # the headers of smaller tars are read in a second or two
READING_THREADS = 16
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
SPLITS = ("train", "validation", "test")
CHANGED = "the shard has changed since the run began. Leave shards as they are, or start again."
# A row of a Parquet file costs the reading of its row group: so many of a group come one after the other.
PARQUET_RUN = 16
OPEN_GROUPS = 2
PROBED_ROWS = 8  # a short video has fewer frames than others

TAR_INDEX = np.dtype(
    [
        ("shard", "<i4"), ("offset", "<i8"), ("size", "<i8"),
        ("text", "<i8"), ("text_size", "<i8"), ("json", "?"), ("text_sum", "<u4"),
    ]
)  # fmt: skip

NO_TEXT = (0, 0, False, 0)
NEIGHBOURS = "Video and text of a name have to be next to each other in the tar: `tar --sort=name -cf x.tar FOLDER`."

Result = TypeVar("Result")


class Shards(torch.utils.data.Dataset):
    """Rows of shards, by number.

    Args:
        starts: Number of the first row of each part that is read together (a tar, a row group), and the count of all.
        shuffle_rows: Rows that are shuffled among each other: as many parts as hold them are mixed.
        run: Rows of a part that stay together when it is shuffled.
        extra: Columns with the same value in every row.
    """

    def __init__(
        self, starts: np.ndarray, shuffle_rows: int = 1000, run: int = 1, extra: dict[str, Any] | None = None
    ):
        self.starts, self.shuffle_rows, self.run, self.extra = starts, shuffle_rows, run, extra or {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    # pyrefly: ignore[bad-override-param-name]  a row has a number, not a place in a list
    def __getitem__(self, number: int) -> dict[str, Any]:
        """A row with `video` (bytes and a name, or a path) and, where there is one, `caption`.

        Raises:
            VideoDecodingError: If the shard has changed or cannot be read.
        """
        if not 0 <= number < len(self):
            raise IndexError(number)
        return {**self._read(number), **self.extra}

    def _read(self, number: int) -> dict[str, Any]:
        raise NotImplementedError

    def sample_order(self, generator: torch.Generator) -> torch.Tensor:
        """Draw an order of all rows: parts in a random order, and the rows of those that are mixed.

        Args:
            generator: Random source; the order depends on nothing else.

        Returns:
            Numbers of rows `(rows,)`.
        """
        mixed: list[torch.Tensor] = []
        orders: list[torch.Tensor] = []
        for part in torch.randperm(len(self.starts) - 1, generator=generator).tolist():
            first, count = int(self.starts[part]), int(self.starts[part + 1] - self.starts[part])
            mixed.append(first + torch.randperm(count, generator=generator))
            if sum(map(len, mixed)) >= self.shuffle_rows:
                orders.append(self._mix(mixed, generator))
                mixed = []
        if mixed:
            orders.append(self._mix(mixed, generator))
        return torch.cat(orders)

    def _mix(self, parts: list[torch.Tensor], generator: torch.Generator) -> torch.Tensor:
        if len(parts) == 1:
            return parts[0]
        if self.run == 1:
            rows = torch.cat(parts)
            return rows[torch.randperm(len(rows), generator=generator)]
        runs = [run for part in parts for run in part.split(self.run)]
        return torch.cat([runs[i] for i in torch.randperm(len(runs), generator=generator).tolist()])


class TarShards(Shards):
    """Rows of WebDataset tars: members with one name up to its first dot make a row.

    Args:
        paths: Tars.
        index: A `TAR_INDEX` record for each row.
        reads_captions: Whether the texts beside the videos are read.
        **options: As for `Shards`.
    """

    def __init__(self, paths: list[str], index: np.ndarray, reads_captions: bool = True, **options: Any):
        counts = np.bincount(index["shard"], minlength=len(paths))
        super().__init__(np.concatenate([[0], np.cumsum(counts)]), **options)
        self.paths, self.index, self.reads_captions = paths, index, reads_captions

    def __getstate__(self) -> dict[str, Any]:
        # Workers that are not forked map the file again instead of getting a copy of the index.
        mapped = isinstance(self.index, np.memmap) and self.index.filename
        return self.__dict__ | {"index": str(mapped) if mapped else self.index}

    def __setstate__(self, state: dict[str, Any]) -> None:
        index = state["index"]
        self.__dict__ = state | {"index": np.load(index, mmap_mode="r") if isinstance(index, str) else index}

    def iterate_names(self) -> Iterator[str]:
        """What stands for each video: its tar, links followed, and its place there."""
        paths = [os.path.realpath(path) for path in self.paths]
        for place in self.index:
            yield f"{paths[int(place['shard'])]} at byte {int(place['offset'])}"

    def _read(self, number: int) -> dict[str, Any]:
        place = self.index[number]
        path = self.paths[int(place["shard"])]
        try:
            with open(path, "rb") as file:
                file.seek(int(place["offset"]) - TAR_BLOCK)
                header = tarfile.TarInfo.frombuf(file.read(TAR_BLOCK), "utf-8", "surrogateescape")
                content = file.read(int(place["size"]))
                text = b""
                if self.reads_captions:
                    file.seek(int(place["text"]))
                    text = file.read(int(place["text_size"]))
        except OSError as error:
            raise LostShardError(f"{path}, row {number}: {error.strerror}. {LOST_SHARD}") from error
        except tarfile.TarError as error:
            raise VideoDecodingError(f"{path}, row {number}: {CHANGED}") from error
        if not len(content) == header.size == int(place["size"]):
            raise VideoDecodingError(f"{path}, row {number}: {CHANGED}")
        name = f"{path}/{header.name}"
        row: dict[str, Any] = {"video": {"bytes": content, "path": name}, "caption": None}
        if text:
            row["caption"] = _read_caption(text, bool(place["json"]), name)
        return row


def _read_caption(text: bytes, is_json: bool, name: str) -> Any:
    try:
        return parse_text(text, is_json).get(CAPTION)
    except ValueError as error:
        raise VideoDecodingError(f"{name}: {BAD_TEXT} ({error}). Write it again.") from error


class ParquetShards(Shards):
    """Rows of Parquet files, here or on the Hub; a row group is read at a time.

    Args:
        paths: Files, or URLs of the Hub (`hf://...`).
        groups: File and row group of each part `(parts, 2)`.
        columns: Columns for `video` and, if any, `caption`.
        data_root: Folder that relative paths start from, where the videos are paths.
        **options: As for `Shards`.
    """

    def __init__(
        self, paths: list[str], groups: np.ndarray, columns: dict[str, str], data_root: str | None, **options: Any
    ):
        super().__init__(run=PARQUET_RUN, **options)
        self.paths, self.groups, self.columns, self.data_root = paths, groups, columns, data_root
        self._tables: dict[int, pa.Table] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tables": {}}

    def _read(self, number: int) -> dict[str, Any]:
        part = int(np.searchsorted(self.starts, number, side="right")) - 1
        if part not in self._tables:
            while len(self._tables) >= OPEN_GROUPS:
                self._tables.pop(next(iter(self._tables)))
            self._tables[part] = self._read_group(*map(int, self.groups[part]))
        table, place = self._tables[part], number - int(self.starts[part])
        row = {name: table.column(column)[place].as_py() for name, column in self.columns.items()}
        video = row["video"]
        if isinstance(video, str) and self.data_root is not None:
            row["video"] = join_root(self.data_root, video)
        elif isinstance(video, bytes):
            row["video"] = {"bytes": video, "path": None}
        elif isinstance(video, dict) and not video.get("bytes") and video.get("path") and self.data_root is not None:
            row["video"] = join_root(self.data_root, video["path"])
        return row

    def _read_group(self, file: int, group: int) -> pa.Table:
        path = self.paths[file]
        try:
            with _open(path) as opened:
                return pq.ParquetFile(opened).read_row_group(group, columns=list(self.columns.values()))
        except (OSError, pa.ArrowException) as error:
            raise LostShardError(f"{path}, row group {group}: cannot be read ({error}). {LOST_SHARD}") from error


def count_stored_frames(table: Shards | datasets.Dataset) -> int | None:
    """Frames that are kept of each video, where `umt-hf prepare` wrote them; `None` for complete videos."""
    counts = []
    for number in np.linspace(0, len(table) - 1, min(PROBED_ROWS, len(table)), dtype=int).tolist():
        video: Any = table[number]["video"]
        name = video.get("path") if isinstance(video, dict) else video
        if not isinstance(name, str) or not (TAR_PLACE.sub(r"\1", name).endswith(STORED_SUFFIX)):
            return None
        with open_video(video) as reader:
            counts.append(reader.num_frames)
    return max(counts, default=None)


def check_stored_frames(
    table: Any, num_frames: int | None, strategy: str = "uniform", first_seconds: float | None = None
) -> None:
    """Refuse a sampling that the frames kept in shards cannot give.

    Args:
        table: Rows with `video`: shards or a table.
        num_frames: Frames of a clip.
        strategy: How they are chosen.
        first_seconds: Length of the video to choose from.

    Raises:
        ValueError: If frames are kept, and too few, or times or frames between them are needed.
    """
    if not isinstance(table, Shards | datasets.Dataset) or (stored := count_stored_frames(table)) is None:
        return
    if strategy not in SPREAD_STRATEGIES:
        raise ValueError(
            f"sampling_strategy={strategy} takes frames at distances that the {stored} frames kept of each video "
            f"cannot give. Set it to {' or '.join(SPREAD_STRATEGIES)}, or read the videos themselves."
        )
    if first_seconds is not None:
        raise ValueError(
            f"first_seconds={first_seconds} needs the times of frames, which the {stored} frames kept of each video "
            "do not have. Leave it out, or read the videos themselves."
        )
    if num_frames is not None and num_frames > stored:
        raise ValueError(
            f"num_frames={num_frames} is more than the {stored} frames kept of each video. Prepare the shards "
            f"with `umt-hf prepare --num-frames {num_frames}` or more, or lower it."
        )


def _open(path: str) -> Any:
    if "://" not in path:
        return open(path, "rb")
    return HfFileSystem().open(path, mode="rb")


def holds_tars(source: str) -> bool:
    """Whether a source is a tar, or a folder that is read as tars (see `splits.name_kind`)."""
    path = Path(source)
    return name_kind(source) == TARS or path.suffix.lower() == ".tar" and not path.is_dir()


def fetch_files(source: str, paths: Sequence[str]) -> list[str]:
    """Paths on this machine; files of the Hub are in its cache afterwards, fetched once for all processes.

    Args:
        source: Name of the dataset, for the log.
        paths: Local paths, or URLs of one repository of the Hub.
    """
    if not any("://" in path for path in paths):
        return list(paths)
    places: list[Any] = [HfFileSystem().resolve_path(path) for path in paths]
    repo, names = places[0], [place.path_in_repo for place in places]
    notes = sorted({find_notes(name).as_posix() for name in names})
    logger.info("%s: %d tars are read from the Hub's cache; those that are not there are fetched.", source, len(names))
    folder = snapshot_download(
        repo.repo_id,
        repo_type=repo.repo_type,
        revision=repo.revision,
        allow_patterns=[glob.escape(name) for name in (*names, *notes)],
    )
    return [os.path.join(folder, *name.split("/")) for name in names]


def fetch_hub_tars(source: str, config_name: str | None, split: str) -> list[str] | None:
    """Tars of a dataset of the Hub, fetched; `None` for one in another form.

    Raises:
        FileNotFoundError: If there is no such dataset.
        ValueError: If it has no such split.
    """
    paths = _list_hub_files(source, config_name, split)
    tars = [path for path in paths if path.lower().endswith(".tar")]
    num_parquet = sum(path.lower().endswith(".parquet") for path in paths)
    packed = [path for path in paths if is_packed_tar(path)]
    if not tars or len(tars) + num_parquet + len(packed) < len(paths):
        return None
    refuse_packed(source, packed)
    say_left_out(source, f"{len(tars)} tar(s) of the split {split!r} are read", {"Parquet files": num_parquet})
    return fetch_files(source, tars)


def find_tars(source: str, split: str) -> tuple[list[str], np.ndarray]:
    """Paths of the tars of a source, and the index of their videos.

    Args:
        source: A tar, or a folder with tars.
        split: Which of them, where their names say.

    Raises:
        ValueError: If there are none of the split, or one is not a complete tar.
    """
    path = Path(source)
    tars = _choose_tars(path, split) if path.is_dir() else [source]
    return tars, index_tars(source, tars)


def index_tars(source: str, tars: list[str]) -> np.ndarray:
    """The index of the videos in some tars.

    Raises:
        ValueError: If there are none, or one is not a complete tar.
    """
    return _load_tar_index(source, tars, "video")


def holds_shards(source: str) -> bool:
    """Whether a source is a tar, Parquet, a folder of either, or may be a dataset of the Hub."""
    path = Path(source)
    if path.is_dir():
        return name_kind(source) in (TARS, DATASET)
    return path.suffix.lower() in (".tar", ".parquet") or not path.suffix or not (path.exists() or path.is_absolute())


def choose_shards(sources: Sequence[str], streaming: bool) -> list[bool]:
    """Which corpora are read as shards: tars, and with `streaming` all that can be, at least one of them.

    If none can, the first one is chosen, so that `load_shards` says why.

    Raises:
        ValueError: If `streaming` has no effect, since only tars are read as shards.
    """
    are_tars = [holds_tars(source) for source in sources]
    chosen = [is_tar or (streaming and holds_shards(source)) for source, is_tar in zip(sources, are_tars, strict=True)]
    if streaming and any(are_tars) and chosen == are_tars:
        refuse_idle_options(sources[are_tars.index(True)], TARS, {"streaming": True})
    return chosen if any(chosen) or not streaming else [True, *chosen[1:]]


def load_shards(
    source: str,
    split: str = "train",
    config_name: str | None = None,
    video_column: str = "video",
    data_root: str | None = None,
    shuffle_rows: int = 1000,
    needs_captions: bool = False,
    extra: dict[str, Any] | None = None,
    reads_captions: bool = True,
) -> Shards:
    """Find the shards of a source, and the place of every row in them.

    Args:
        source: A tar or a folder of tars; a Parquet file or a folder of such files; a dataset of the Hub in either.
        split: Split, of tars a word in the names of files or folders, else as `datasets` knows it.
        config_name: Configuration of a Hub dataset.
        video_column: Column of the videos in Parquet; "image" also makes pictures the media of tars.
        data_root: Folder that relative paths in Parquet start from.
        shuffle_rows: As for `Shards`.
        needs_captions: Whether rows must have a caption.
        extra: As for `Shards`.
        reads_captions: As for `TarShards`.

    Raises:
        FileNotFoundError: If there is no such file, folder or dataset.
        ValueError: If it is in another form, a shard cannot be read, or has no videos or captions.
    """
    paths = _find_files(source, config_name, split)
    suffixes = {posixpath.splitext(path)[1].lower() for path in paths}
    options: dict[str, Any] = {"shuffle_rows": shuffle_rows, "extra": extra}
    if suffixes == {".tar"}:
        paths = fetch_files(source, paths)
        media: Literal["image", "video"] = "image" if video_column == "image" else "video"
        index = _load_tar_index(source, paths, media)
        if needs_captions and not index["text_size"].any():
            raise ValueError(
                f"{source}: no video has a caption; give each a .txt, or a .json with `caption`. {NEIGHBOURS}"
            )
        return TarShards(paths, index, reads_captions, **options)
    if suffixes == {".parquet"}:
        return _load_parquet(source, paths, video_column, needs_captions, data_root, options)
    raise ValueError(
        f"{source}: has {', '.join(sorted(suffixes))} files there; shards are Parquet files, or tars without "
        "compression. Leave out streaming."
    )


def _find_files(source: str, config_name: str | None, split: str) -> list[str]:
    if is_remote(source):
        raise ValueError(f"{source}: what is at an address is fetched or listed, not streamed. Leave out streaming.")
    path = Path(source)
    if path.is_file():
        if path.suffix.lower() not in (".tar", ".parquet"):
            raise ValueError(
                f"{source}: is a list, not shards of videos, so it cannot be streamed. Leave out streaming."
            )
        return [source]
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        raise ValueError(f"{source}: is a saved table, read from its place already. Leave out streaming.")
    if path.is_dir() and not holds_shards(source):
        raise ValueError(
            f"{source}: has neither tars nor Parquet files, so it cannot be streamed. Leave out streaming."
        )
    if not path.exists() and (path.is_absolute() or path.suffix.lower() in (".tar", ".parquet")):
        raise FileNotFoundError(f"{source}: no such file or folder.")
    if path.is_dir() and holds_tars(source):
        return _choose_tars(path, split)
    return _list_hub_files(source, config_name, split)


def _list_hub_files(source: str, config_name: str | None, split: str) -> list[str]:
    """Files of a split of a dataset of the Hub, or of a folder of Parquet files."""
    try:
        files = load_dataset_builder(source, config_name).config.data_files or {}
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(f"{source}: no such file or folder, and no dataset of that name ({error}).") from error
    if split not in files:
        raise ValueError(f"{source}: has no split {split!r}; it has {sorted(map(str, files))}.")
    return sorted(map(str, files[split]))


def name_splits(source: str) -> list[str]:
    """Splits that the names of the tars in a folder have; empty for other sources."""
    if not Path(source).is_dir() or not holds_tars(source):
        return []
    return sorted({name for path in look_through(source).tars if (name := _name_split(path, Path(source)))})


def _name_split(tar: str, folder: Path, split: str = "") -> str:
    """The word of a tar's name or folders that is `split` or a usual split; empty if there is none."""
    words = re.split(r"[^a-z0-9]+", os.path.relpath(tar, folder).lower())
    return next((name for name in (split.lower(), *SPLITS) if name and name in words), "")


def _choose_tars(folder: Path, split: str) -> list[str]:
    """Tars of a split, which is a word of their names or folders; where none names a split, all are to train on."""
    contents = look_through(folder)
    found: dict[str, list[str]] = {}
    for path in contents.tars:
        found.setdefault(_name_split(path, folder, split), []).append(path)
    if found.keys() == {""}:
        found = {"train": found[""]}
    if split.lower() not in found:
        raise ValueError(f"{folder}: has no split {split!r}; it has {sorted(name for name in found if name)}.")
    chosen = found[split.lower()]
    left_out = {"Parquet files": contents.num_parquet, "tars that name no split": len(found.get("", []))}
    say_left_out(str(folder), f"{len(chosen)} tar(s) of the split {split!r} are read", left_out)
    return chosen


def _map_files(function: Callable[[str], Result], paths: Sequence[str]) -> list[Result]:
    with ThreadPoolExecutor(READING_THREADS) as pool:
        return list(pool.map(function, paths))


def _load_tar_index(source: str, paths: list[str], media: Literal["video", "image"]) -> np.ndarray:
    """The index of tars; that of large ones is kept on disk, mapped by all processes of a machine."""
    statuses = [os.stat(path) for path in paths]
    if sum(status.st_size for status in statuses) < SHORTEST_CACHED_BYTES:
        return _build_tar_index(source, paths, media)
    files = [
        (os.path.abspath(path), status.st_size, status.st_mtime_ns)
        for path, status in zip(paths, statuses, strict=True)
    ]
    digest = hashlib.blake2b(json.dumps([FORMAT, media, files]).encode(), digest_size=12).hexdigest()
    kept = Path(datasets.config.HF_DATASETS_CACHE) / CACHE_FOLDER / f"{digest}.npy"
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{kept}.lock"):  # one process reads the headers while the others wait
            if not kept.exists():
                unfinished = kept.with_name(f"{kept.name}.{os.getpid()}{UNFINISHED_SUFFIX}")
                with unfinished.open("wb") as file:
                    np.save(file, _build_tar_index(source, paths, media))
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(unfinished, kept)
        return np.load(kept, mmap_mode="r")
    except OSError as error:
        logger.warning("%s: its index cannot be kept in %s (%s); each process reads the headers.", source, kept, error)
        return _build_tar_index(source, paths, media)


def _build_tar_index(source: str, paths: list[str], media: Literal["video", "image"]) -> np.ndarray:
    suffixes = IMAGE_SUFFIXES if media == "image" else VIDEO_SUFFIXES | {STORED_SUFFIX}
    found = _map_files(lambda path: list(_list_rows(path, suffixes)), paths)
    rows = [(shard, *row[:-1]) for shard, rows in enumerate(found) for row in rows if row[1]]
    apart = sum(row[-1] for rows in found for row in rows if not row[1])
    left_out = sum(map(len, found)) - len(rows) - apart
    if not rows:
        raise ValueError(
            f"{source}: no {media}s in {len(paths)} tar(s); known suffixes are {', '.join(sorted(suffixes))}."
        )
    if left_out:
        logger.warning("%s: %d names in the tars have no %s and are left out.", source, left_out, media)
    if apart:
        logger.warning("%s: %d texts are apart from their %ss and are left out. %s", source, apart, media, NEIGHBOURS)
    return np.array(rows, TAR_INDEX)


def _list_rows(path: str, suffixes: frozenset[str] | set[str]) -> Iterator[tuple[int, int, int, int, bool, int, bool]]:
    """Places of video and caption of each name in a tar, and the caption's checksum; zeros where there is none.

    The last item says whether the name was there before, with others in between.
    """
    key: tuple[str, str] | None = None
    video: tuple[int, int] = (0, 0)
    text: tuple[int, int, bool, int] = NO_TEXT
    seen: set[tuple[str, str]] = set()
    is_again = False
    try:
        with tarfile.open(path, "r:", encoding="utf-8") as tar:
            while (member := tar.next()) is not None:
                tar.__dict__["members"] = []  # else it keeps all of them
                if not member.isfile():
                    continue
                folder, name = posixpath.split(member.name)
                stem, _, ending = name.partition(".")
                if (folder, stem) != key:
                    if key is not None:
                        yield video[0], video[1], text[0], text[1], text[2], text[3], is_again
                    key, video, text = (folder, stem), (0, 0), NO_TEXT
                    is_again = key in seen
                    seen.add(key)
                suffix = "." + ending.rpartition(".")[2].lower()
                if suffix in suffixes or f".{ending}" in suffixes:
                    if video[1]:
                        raise ValueError(f"{path}: several videos are named {stem}; give each another name.")
                    video = (member.offset_data, member.size)
                elif suffix == ".txt" or (suffix == ".json" and not text[1]):
                    content = tar.extractfile(member)
                    assert content is not None, "It is a file."
                    text = (member.offset_data, member.size, suffix == ".json", zlib.crc32(content.read()))
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{path}: not a complete tar without compression ({error}). Write it again.") from error
    if key is not None:
        yield video[0], video[1], text[0], text[1], text[2], text[3], is_again


def _load_parquet(
    source: str,
    paths: list[str],
    video_column: str,
    needs_captions: bool,
    data_root: str | None,
    options: dict[str, Any],
) -> ParquetShards:
    def read_counts(path: str) -> tuple[pa.Schema, list[int]]:
        try:
            with _open(path) as file:
                content = pq.ParquetFile(file)
                groups = [content.metadata.row_group(i).num_rows for i in range(content.metadata.num_row_groups)]
                return content.schema_arrow, groups
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{path}: not a complete Parquet file ({error}). Write it again.") from error

    found = _map_files(read_counts, paths)
    columns = {"video": _choose_column(source, found[0][0], video_column)}
    if needs_captions:
        columns["caption"] = "caption"
    for path, (schema, _) in zip(paths, found, strict=True):
        if missing := [column for column in columns.values() if column not in schema.names]:
            raise ValueError(f"{path}: rows have no {' and no '.join(missing)}; they have {', '.join(schema.names)}.")
    groups = [(file, group, count) for file, (_, counts) in enumerate(found) for group, count in enumerate(counts)]
    parts = np.array([part for part in groups if part[2]], np.int64).reshape(-1, 3)
    if not len(parts):
        raise ValueError(f"{source} lists no videos.")
    starts = np.concatenate([[0], np.cumsum(parts[:, 2])])
    return ParquetShards(paths, parts[:, :2], columns, data_root, starts=starts, **options)


def _choose_column(source: str, schema: pa.Schema, video_column: str) -> str:
    if video_column in schema.names:
        return video_column
    typed = [name for name, feature in Features.from_arrow_schema(schema).items() if isinstance(feature, Video)]
    if len(typed) != 1:
        raise ValueError(f"{source}: the dataset has no column {video_column!r}; it has {sorted(schema.names)}.")
    logger.info("%s: each video is in the column %r, the only one of that type.", source, typed[0])
    return typed[0]
