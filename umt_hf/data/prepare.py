"""Videos to shards for pre-training: some frames of each, small, as JPEG pictures in WebDataset tars.

A shard holds a fixed part of the list, so the same list and settings give the same bytes, and a shard is complete or
absent under its name: a run that was ended at any moment goes on with the shards that are missing.
"""

import hashlib
import io
import json
import logging
import multiprocessing
import os
import tarfile
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image

from ..processing.decoding import STORED_SUFFIX, open_video
from ..processing.media_files import TAR_PLACE, VideoDecodingError, find_holder
from ..processing.sampling import sample_frame_indices
from ..runs.cores import count_workers
from ..runs.disk import hold_lock, name_unfinished, put_file, write_text
from ..runs.folder import UNREADABLE_FILE
from ..runs.mistakes import MachineError, naming_full_disk, read_rank
from .annotations import name_video
from .in_flight import end_with_parent
from .labels import LABEL, get_label_names
from .lists.contents import look_through
from .lists.fingerprints import digest_columns
from .lists.folders import VIDEO_SUFFIXES, is_packed_tar
from .lists.paths import is_remote, is_url
from .lists.stores import split_address
from .lists.tar_rows import CAPTION, PREPARED_SUFFIX, find_notes, name_label
from .sources import get_source, load_videos
from .streams import count_stored_frames, name_splits
from .video_files import list_videos

logger = logging.getLogger(__name__)

DONE_FOLDER = "done"
TEXTS_KEY = "captions_and_labels"  # of the note; those of earlier versions lack it
NAMED_VIDEOS = 65_536  # hashed at a time
LIST_SUFFIXES = frozenset({
    ".csv", ".tsv", ".txt", ".lst", ".json", ".jsonl", ".ndjson", ".db", ".sqlite", ".sqlite3", ".parquet", ".tar",
})  # fmt: skip

Row = dict[str, Any]
FileState = list[int] | None  # bytes, and nanoseconds of the last change


@dataclass(frozen=True)
class ShardSettings:
    """What is kept of a video, and where.

    Args:
        num_frames: Frames kept of each video, the middles of as many equal parts; all of a shorter one.
        short_side: Pixels that the shorter side of larger frames is reduced to.
        quality: Of JPEG, 1 to 100; colours have half the resolution (4:2:0).
        videos_per_shard: Videos in a shard.
        split: Beginning of the names of the shards.
    """

    num_frames: int = 32
    short_side: int = 256
    quality: int = 85
    videos_per_shard: int = 256
    split: str = "train"

    def __post_init__(self) -> None:
        for name in ("num_frames", "short_side", "quality", "videos_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.quality > 100:
            raise ValueError(f"quality must be at most 100, got {self.quality}.")


@dataclass
class PrepareReport:
    """What was written.

    Args:
        out: Folder of the shards.
        num_videos: Videos listed.
        num_shards: Shards that they make.
        num_written: Shards written by this process.
        num_missing: Shards that other processes are still to write.
        num_unreadable: Videos that are left out, listed in `unreadable.txt` with those of other splits.
        num_bytes: Size of the shards.
    """

    out: str
    num_videos: int
    num_shards: int
    num_written: int = 0
    num_missing: int = 0
    num_unreadable: int = 0
    num_bytes: int = 0

    def format(self) -> str:
        """Lines for people."""
        lines = [
            f"{self.out}: {self.num_shards - self.num_missing} of {self.num_shards} shards, {self.num_written} of "
            f"them written now, {self.num_bytes / 2**20:,.1f} MiB of {self.num_videos} videos."
        ]
        if self.num_unreadable:
            lines.append(f"{self.num_unreadable} videos could not be read; {self.out}/{UNREADABLE_FILE} lists them.")
        return "\n".join(lines)


@dataclass(frozen=True)
class ShardJob:
    """A shard to be written.

    Args:
        path: Its tar.
        first: Number of its first video.
        rows: Videos, with captions and labels.
        settings: What is kept of them.
    """

    path: Path
    first: int
    rows: list[Row]
    settings: ShardSettings


@dataclass
class VideoList:
    """Videos from several sources, by number.

    Args:
        tables: Rows of each source.
    """

    tables: list[Dataset] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(map(len, self.tables))

    def read(self, first: int, count: int) -> list[Row]:
        """Rows from a number on; fewer at the end."""
        rows: list[Row] = []
        for table in self.tables:
            if first < len(table) and len(rows) < count:
                part: Any = table.select(range(first, min(first + count - len(rows), len(table))))
                rows += _name_labels(part.to_list(), get_label_names(table.features))
            first = max(first - len(table), 0)
        return rows

    def hash(self) -> str:
        """Sixteen digits that stand for the names of all videos; those of bytes count by number."""
        digest = hashlib.blake2b(digest_size=8)
        for table in self.tables:
            digest.update(f"{len(table)} {table.column_names}".encode())
            paths = table.select_columns(["video"]).flatten()
            for name in paths.column_names:
                if name in ("video", "video.path"):
                    for first in range(0, len(paths), NAMED_VIDEOS):
                        digest.update(repr(paths[first : first + NAMED_VIDEOS][name]).encode(errors="replace"))
        return digest.hexdigest()

    def hash_texts(self) -> str:
        """Digits that stand for the captions and labels of all videos, which are written into the shards too."""
        found = [digest_columns(table, (CAPTION, LABEL)) for table in self.tables]
        return hashlib.blake2b(" ".join(found).encode(), digest_size=8).hexdigest()


def _name_labels(rows: list[Row], names: Sequence[str] | None) -> list[Row]:
    """Rows with their labels by name, where classes have names: sources number them each in its own way."""
    if names is None:
        return rows
    return [{**row, LABEL: name_label(row[LABEL], names)} if row.get(LABEL) is not None else row for row in rows]


def prepare_shards(
    sources: Sequence[str],
    out: str | os.PathLike,
    settings: ShardSettings | None = None,
    data_root: str | None = None,
    num_workers: int | None = None,
    announce: Callable[[str], None] = logger.info,
) -> PrepareReport:
    """Write shards of videos, or those that are missing or have an unreadable video whose file has changed since.

    Started in several processes at once (`accelerate launch` and the like, also on several machines that share the
    folder), each writes the shards of its number and waits for no other.

    Args:
        sources: Videos and folders of them, lists with captions and labels, tars, Parquet files.
        out: Folder of the shards.
        settings: What is kept; `None` = the defaults.
        data_root: Folder that relative paths of lists start from; `None` = that of the list.
        num_workers: Processes that read and write; 0 = this one; `None` = as many as the machine has cores, up to 4.
        announce: Called with a line for each shard that is written.

    Returns:
        What the folder holds.

    Raises:
        FileNotFoundError: If a source does not exist.
        MachineError: If a worker was ended, or the disk is full.
        ValueError: If there are no videos, shards hold fewer or smaller frames than are to be kept, or the folder
            holds shards of other videos or settings.
    """
    settings, folder = settings or ShardSettings(), Path(out)
    rank, num_processes = read_rank(), int(os.environ.get("WORLD_SIZE", "1"))
    (folder / DONE_FOLDER).mkdir(parents=True, exist_ok=True)
    with hold_lock(folder / f".lock-{settings.split}-{rank}", f"{folder} (process {rank})"):
        videos = list_rows(sources, data_root, settings)
        _check_settings(folder, settings, videos, rank)
        count = settings.videos_per_shard
        paths = [folder / f"{settings.split}-{number:06d}.tar" for number in range(-(-len(videos) // count))]
        missing = [number for number in range(rank, len(paths), num_processes) if _is_due(paths[number])]
        jobs = (
            ShardJob(paths[number], number * count, videos.read(number * count, count), settings) for number in missing
        )
        for number, line in enumerate(_run(jobs, len(missing), num_workers), start=1):
            announce(f"{number}/{len(missing)}: {line}")
        return _sum_up(folder, settings.split, paths, len(videos), len(missing))


def list_rows(
    sources: Sequence[str], data_root: str | None = None, settings: ShardSettings | None = None
) -> VideoList:
    """Rows of all sources in order, with `video` and, where known, `caption` and `label`.

    Args:
        sources: As for `prepare_shards`.
        data_root: Folder that relative paths of lists start from; `None` = that of the list.
        settings: What is to be kept: of tars whose names have splits, those of its split are read.

    Raises:
        ValueError: If there are no videos, or more or larger frames are to be kept than shards hold.
    """
    settings = settings or ShardSettings(num_frames=1, short_side=1)
    files = [source for source in sources if _is_video_file(source)]
    videos = VideoList()
    if files:
        found, _ = list_videos(files)
        videos.tables.append(Dataset.from_dict({"video": [video.path for video in found]}))
    for source in sources:
        if source in files:
            continue
        split = settings.split if name_splits(source) else "train"
        try:
            table = load_videos(source, data_root, split=split)
        except ValueError as error:
            table = load_videos(source, data_root, needs_labels=False, split=split)
            logger.info("%s: labels are left out: %s", source, error)
        _check_kept(source, table, settings)
        videos.tables.append(table)
    if not len(videos):
        raise ValueError("Give at least one video: a file, a folder or a list.")
    return videos


def _is_video_file(source: str) -> bool:
    if is_remote(source):
        return Path(split_address(source)[1]).suffix.lower() in VIDEO_SUFFIXES
    path = Path(source)
    return path.is_file() and path.suffix.lower() not in LIST_SUFFIXES and not is_packed_tar(path.name)


def _check_kept(source: str, table: Dataset, settings: ShardSettings) -> None:
    """Refuse to make frames of shards that these do not hold.

    Raises:
        ValueError: If more or larger frames are asked for than were kept.
    """
    if (num_frames := count_stored_frames(table) if len(table) else None) is None:
        return
    path = Path(source)
    tars = look_through(path).tars if path.is_dir() else [source] if path.is_file() else []
    notes = [json.loads(file.read_text(encoding="utf-8")) for file in {*map(find_notes, tars)} if file.is_file()]
    kept = {"num_frames": num_frames, "short_side": None}
    for name in kept:  # short videos have fewer frames than were to be kept
        kept[name] = min((note[name] for note in notes if name in note), default=kept[name])
    for name, most in kept.items():
        if most is not None and getattr(settings, name) > most:
            raise ValueError(
                f"{source}: --{name.replace('_', '-')} {getattr(settings, name)} is more than the {most} that are "
                "kept in these shards. Lower it, or prepare the videos themselves."
            )


def _check_settings(folder: Path, settings: ShardSettings, videos: VideoList, rank: int) -> None:
    names = [get_label_names(table.features) for table in videos.tables]
    own = asdict(settings) | {"num_videos": len(videos), "list": videos.hash(), "label_names": names}
    own[TEXTS_KEY] = videos.hash_texts()
    file = folder / f"{settings.split}{PREPARED_SUFFIX}"
    if file.exists():
        former = {TEXTS_KEY: own[TEXTS_KEY]} | json.loads(file.read_text(encoding="utf-8"))
        if changed := sorted(name for name, value in own.items() if former.get(name) != value):
            if "list" in changed and TEXTS_KEY in changed:  # of other videos they are others anyway
                changed.remove(TEXTS_KEY)
            raise ValueError(
                f"{folder} holds shards with other settings or videos ({', '.join(changed)}). Choose another folder, "
                "or give the same list and settings."
            )
    elif rank == 0:
        write_text(file, json.dumps(own, indent=2) + "\n")


def _name_done(path: Path) -> Path:
    return path.parent / DONE_FOLDER / f"{path.stem}.json"


def _is_done(path: Path) -> bool:
    return path.exists() and _name_done(path).exists()


def _is_due(path: Path) -> bool:
    """Whether a shard is missing, or the file of one of its unreadable videos is another one since it was tried."""
    if not _is_done(path):
        return True
    note = json.loads(_name_done(path).read_text(encoding="utf-8"))
    if note["unreadable"] and "tried" not in note:  # of an earlier version
        return True
    states = ((_read_state(file), former) for file, former in note.get("tried", {}).items())
    return any(state is not None and state != former for state, former in states)


def _run(jobs: Iterator[ShardJob], count: int, num_workers: int | None) -> Iterator[str]:
    workers = min(count_workers() if num_workers is None else num_workers, count)
    if workers < 1:
        yield from map(write_shard, jobs)
        return
    # Not forked: libraries with threads are loaded already.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
        waiting = []
        try:
            for job in jobs:
                waiting.append(pool.submit(write_shard, job))
                if len(waiting) > 2 * workers:  # rows may hold bytes: a few shards of them at a time
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        except BrokenProcessPool as error:
            raise MachineError(
                "A worker process was ended from outside (out of memory?). The same command goes on with the shards "
                "that are missing; set fewer --num-workers."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def write_shard(job: ShardJob) -> str:
    """Write a shard, complete or not at all, and the list of its unreadable videos; returns a line about it.

    Videos that a complete shard holds already are taken from it, so that they stay where their files have gone.
    """
    unfinished, num_videos = name_unfinished(job.path), 0
    unreadable: list[str] = []
    tried: dict[str, FileState] = {}
    with (
        naming_full_disk(job.path),
        _open_former(job.path) as former,
        tarfile.open(unfinished, "w", format=tarfile.PAX_FORMAT, encoding="utf-8") as tar,
    ):
        for number, row in enumerate(job.rows, start=job.first):
            names = f"{number:09d}{STORED_SUFFIX}", f"{number:09d}.json"
            if former is not None and names[0] in former.getnames():
                contents = [_read_member(former, name) for name in names]
            else:
                file = _find_file(row["video"])
                state = _read_state(file)
                try:
                    pictures = encode_frames(row, job.settings)
                except VideoDecodingError as error:
                    unreadable.append(str(error))
                    tried |= {file: state} if file else {}
                    continue
                notes = {name: row[name] for name in (CAPTION, LABEL) if row.get(name) is not None}
                notes["source"] = TAR_PLACE.sub(r"\1", name_video(row["video"], number))
                contents = [pictures, json.dumps(notes).encode()]
            num_videos += 1
            for name, content in zip(names, contents, strict=True):
                _add(tar, name, content)
    with naming_full_disk(job.path):
        put_file(unfinished, job.path)
    note = {"videos": num_videos, "unreadable": unreadable, "tried": tried}
    write_text(_name_done(job.path), json.dumps(note) + "\n")
    return f"{job.path} has {num_videos} videos" + (f", {len(unreadable)} unreadable" if unreadable else "")


@contextmanager
def _open_former(path: Path) -> Generator[tarfile.TarFile | None]:
    """The shard that is there, if it is complete."""
    if not _is_done(path):
        yield None
        return
    with tarfile.open(path, "r:", encoding="utf-8") as tar:
        yield tar


def _read_member(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    assert file is not None, "It was written as a file."
    return file.read()


def _find_file(video: Any) -> str:
    """The file that holds a video, or a folder of frames; empty for bytes and URLs."""
    path = video if isinstance(video, str) else video.get("path") if isinstance(video, dict) else None
    has_bytes = isinstance(video, dict) and video.get("bytes")
    return "" if not path or has_bytes or is_url(path) else find_holder(os.path.expanduser(path))


def _read_state(path: str) -> FileState:
    """What changes where a file is written again: size and time, of a folder those of what is in it; `None` if absent.

    Args:
        path: Empty for none.
    """
    try:
        found = [entry.stat() for entry in os.scandir(path)] if os.path.isdir(path) else [os.stat(path)]
    except OSError:
        return None
    return [sum(status.st_size for status in found), max((status.st_mtime_ns for status in found), default=0)]


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # without time or owner: the same videos give the same bytes
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def encode_frames(row: Row, settings: ShardSettings) -> bytes:
    """The kept frames of a video as JPEG pictures, one after the other.

    Raises:
        VideoDecodingError: If it cannot be read.
    """
    video = row["video"]
    source = video if isinstance(video, dict) and video.get("bytes") else get_source(video)
    with open_video(source) as reader:
        if reader.num_frames <= settings.num_frames:
            indices = list(range(reader.num_frames))
        else:
            indices = sample_frame_indices(reader.num_frames, settings.num_frames, "middle")
        frames = reader.get_frames(indices)
    return b"".join(_encode(frame, settings) for frame in frames)


def _encode(frame: np.ndarray, settings: ShardSettings) -> bytes:
    picture = Image.fromarray(frame)
    short = min(picture.size)
    if short > settings.short_side:
        width, height = (max(1, round(side * settings.short_side / short)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=settings.quality, subsampling="4:2:0")
    return file.getvalue()


def _sum_up(folder: Path, split: str, paths: list[Path], num_videos: int, num_written: int) -> PrepareReport:
    """Count what is there, and list all unreadable videos in one file; the last process to end has all of them."""
    report = PrepareReport(str(folder), num_videos, len(paths), num_written)
    for path in paths:
        if not _is_done(path):
            report.num_missing += 1
            continue
        report.num_bytes += path.stat().st_size
        report.num_unreadable += len(_read_unreadable(_name_done(path)))
    # Of all splits: each command for the folder leaves the lines of the others.
    notes = sorted((folder / DONE_FOLDER).glob("*.json"))
    lines = dict.fromkeys(line for note in notes for line in _read_unreadable(note))
    file = folder / UNREADABLE_FILE
    if not lines:
        file.unlink(missing_ok=True)
        return report
    unfinished = name_unfinished(folder / f"{UNREADABLE_FILE}.{split}-{read_rank()}")  # processes may end together
    with naming_full_disk(file):
        unfinished.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
        put_file(unfinished, file)
    return report


def _read_unreadable(note: Path) -> list[str]:
    return json.loads(note.read_text(encoding="utf-8"))["unreadable"]
