"""Moments: windows of some seconds that slide over videos of any length, read, encoded and named.

A video is read piece by piece, so that an hour of it is never held.

Legend: W windows, T frames of a window, D projection width.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers.video_utils import VideoMetadata

from ..data.video_files import SkippedVideo, VideoFile, split_name
from ..processing.decoding import VideoDecodingError, VideoReader, VideoSource, open_video
from ..processing.video_processing_umt_video import UMTVideoProcessor
from ..runs.disk import name_unfinished, put_file
from ..runs.mistakes import naming_full_disk
from .engine import read_ahead

STRIP_FRAMES = 6
STRIP_HEIGHT = 160
STRIP_WIDTH = 65_500  # at most; what JPEG can hold
STRIP_COMMENT = "A strip of umt-hf search"  # by which later searches know them
MIN_STRIDE = 0.01  # seconds, which few cameras show a frame for
EPSILON = 1e-6  # seconds; times of frames are multiples of a rate, and windows of a decimal number
CHANGED = "It changed while it was read; start the command again once it is complete."


@dataclass(frozen=True)
class WindowSettings:
    """How windows slide over a video.

    Attributes:
        window_seconds: Length of a window.
        stride_seconds: From the start of a window to that of the next.

    Raises:
        ValueError: If one is not positive, the stride would leave parts of a video out, or is shorter than a frame.
    """

    window_seconds: float
    stride_seconds: float

    def __post_init__(self) -> None:
        for name, value in (("window", self.window_seconds), ("stride", self.stride_seconds)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number of seconds, got {value}.")
        if self.stride_seconds > self.window_seconds:
            raise ValueError(
                f"stride {self.stride_seconds:g} is longer than window {self.window_seconds:g} and leaves parts of "
                "the videos out; make it shorter."
            )
        if self.stride_seconds < MIN_STRIDE:
            raise ValueError(
                f"stride {self.stride_seconds:g} would make over {1 / MIN_STRIDE:.0f} moments of each second; it is "
                f"in seconds, {MIN_STRIDE:g} or more."
            )


def resolve_moments(window: float | None, stride: float | None) -> WindowSettings | None:
    """Settings of windows; `None` where complete videos are wanted.

    Args:
        window: Seconds of a window; default: the complete video.
        stride: Seconds from one window to the next; default: the window's length, so that none overlap.

    Raises:
        ValueError: If there is a stride without a window, or they make no sense.
    """
    if window is None:
        if stride is not None:
            raise ValueError("A stride needs a window: give both, or neither for complete videos.")
        return None
    return WindowSettings(float(window), float(window if stride is None else stride))


@dataclass(frozen=True)
class Moment:
    """A window of a video.

    Attributes:
        start_seconds: From the first frame of the video.
        end_seconds: Likewise.
        first_frame: Number of its first frame.
        num_frames: Frames shown in it.
    """

    start_seconds: float
    end_seconds: float
    first_frame: int
    num_frames: int


def plan_moments(seconds: np.ndarray, windows: WindowSettings) -> list[Moment]:
    """Lay windows over a video; the last one is moved back to end with it, a shorter video is one window.

    Args:
        seconds: Times of all frames, `(N,)`, rising from 0. The last frame is shown as long as the others on average.
        windows: Length and distance.
    """
    duration = float(seconds[-1]) + (float(seconds[-1]) / (len(seconds) - 1) if len(seconds) > 1 else 0.0)
    length, stride = windows.window_seconds, windows.stride_seconds
    last = max(duration - length, 0.0)
    starts = [round(i * stride, 6) for i in range(max(math.ceil((duration - length) / stride - EPSILON), 0))]
    return [cut_moment(seconds, start, min(start + length, duration)) for start in [*starts, last]]


def cut_moment(seconds: np.ndarray, start: float, end: float) -> Moment:
    """Part of a video from a time to another, with the frames whose times are in it; the one on the screen if none is.

    Args:
        seconds: Times of all frames, `(N,)`, rising from 0.
        start: In seconds.
        end: In seconds.
    """
    first, stop = (int(np.searchsorted(seconds, time - EPSILON, side="left")) for time in (start, end))
    if stop <= first:
        first = min(max(int(np.searchsorted(seconds, start + EPSILON, side="right")) - 1, 0), len(seconds) - 1)
        stop = first + 1
    return Moment(round(start, 6), round(end, 6), first, stop - first)


@dataclass(frozen=True)
class MomentPart:
    """Neighbouring windows of a video, which are read together.

    Attributes:
        file: The video.
        first: Number of the first window.
        stop: Number of the one after the last.
        total: Windows of the video.
    """

    file: VideoFile
    first: int
    stop: int
    total: int


@dataclass(frozen=True)
class MomentClips:
    """What was read of a part.

    Attributes:
        part: The part.
        moments: Its windows.
        pixel_values: Their frames, `(W, T, C, H, W)`; the same for all in size.
        num_frames: Frames of the video.
        duration_seconds: Of the video; `None` where its file does not say.
    """

    part: MomentPart
    moments: list[Moment]
    pixel_values: torch.Tensor
    num_frames: int
    duration_seconds: float | None


class MomentReads(Dataset):
    """Reads parts of videos, and keeps the last video open for the next part.

    Args:
        processor: Gives number of frames, how they are chosen within a window, size and decoder.
        windows: Length and distance.
        num_frames: Frames read per window; default: the processor's.
        sources: What is read in place of a path, such as the bytes of a video.
    """

    def __init__(
        self,
        processor: UMTVideoProcessor,
        windows: WindowSettings,
        num_frames: int | None = None,
        sources: Mapping[str, VideoSource] | None = None,
    ):
        self.processor, self.windows, self.num_frames = processor, windows, num_frames
        self.sources = sources or {}
        self._path: str | None = None
        self._reader: VideoReader | None = None
        self._moments: list[Moment] = []

    def __getstate__(self) -> dict[str, Any]:
        # An open file does not go to another process.
        return self.__dict__ | {"_path": None, "_reader": None, "_moments": []}

    def __getitem__(self, index: MomentPart) -> MomentClips | SkippedVideo:
        part = index
        try:
            reader = self._open(part.file.path)
            # Between counting and reading a file may have grown, or become another one.
            if len(self._moments) != part.total:
                return SkippedVideo(part.file.path, CHANGED)
            moments = self._moments[part.first : part.stop]
            clips = read_clips(reader, moments, self.processor, self.num_frames)
        except (VideoDecodingError, OSError) as error:
            self.close()
            return build_skip(part.file, error)
        return MomentClips(part, moments, clips, reader.num_frames, reader.duration_seconds)

    def count(self, file: VideoFile) -> int:
        """Windows of a video; 0 of one that cannot be read, which reading it says again."""
        try:
            self._open(file.path)
        except (VideoDecodingError, OSError):
            self.close()
            return 0
        return len(self._moments)

    def close(self) -> None:
        """Close the video that is open, if one is."""
        if self._reader is not None:
            self._reader.close()
        self._path, self._reader, self._moments = None, None, []

    def _open(self, path: str) -> VideoReader:
        if self._reader is None or path != self._path:
            self.close()
            self._reader = open_video(self.sources.get(path, path), self.processor.decoder)
            self._path = path
            self._moments = plan_moments(self._reader.compute_timestamps(), self.windows)
        return self._reader


def read_clips(
    reader: VideoReader, moments: Sequence[Moment], processor: UMTVideoProcessor, num_frames: int | None = None
) -> torch.Tensor:
    """Frames of windows, chosen in each as the processor chooses them in a video, `(W, T, C, H, W)`.

    Args:
        reader: An open video.
        moments: Windows.
        processor: Of the model.
        num_frames: Frames per window; default: the processor's.

    Raises:
        VideoDecodingError: If a frame cannot be decoded.
    """
    chosen = np.stack(
        [
            moment.first_frame
            + processor.sample_frames(
                VideoMetadata(total_num_frames=moment.num_frames, fps=reader.fps), num_frames=num_frames, num_clips=1
            )
            for moment in moments
        ]
    )
    # Frames that windows share are decoded and prepared once.
    frames, places = np.unique(chosen, return_inverse=True)
    batch = processor(
        reader.get_frames(frames.tolist()), do_sample_frames=False, num_clips=1, num_crops=1, return_tensors="pt"
    )
    return batch["pixel_values"][0][torch.from_numpy(places.reshape(chosen.shape))]


def build_skip(file: VideoFile, error: Exception) -> SkippedVideo:
    """A video that cannot be read, with the reason and without its name in it."""
    return SkippedVideo(file.path, str(error).removeprefix(f"{file.path}: "))


def plan_parts(
    files: Iterable[VideoFile], reads: MomentReads, batch_size: int, is_joined: bool = True
) -> Iterator[list[MomentPart]]:
    """Parts of videos that are read together, in order, each batch with about as many windows.

    Args:
        files: Videos.
        reads: Says how many windows a video has.
        batch_size: Windows of a batch.
        is_joined: Whether a batch may have windows of several videos.
    """
    batch: list[MomentPart] = []
    room = batch_size
    for file in files:
        total = reads.count(file)
        first = 0
        while first < max(total, 1):
            stop = min(first + room, total)
            batch.append(MomentPart(file, first, stop, total))
            room -= max(stop - first, 1)
            first = max(stop, first + 1)
            if room <= 0 or not (is_joined or first < total):
                yield batch
                batch, room = [], batch_size
    if batch:
        yield batch


@dataclass
class MomentRows:
    """What is known of a video's windows so far.

    Attributes:
        file: The video.
        num_frames: Its frames.
        duration_seconds: Its length, if known.
        moments: Windows.
        values: What a model says of each.
    """

    file: VideoFile
    num_frames: int
    duration_seconds: float | None
    moments: list[Moment] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)


class MomentCollector:
    """Puts the parts of videos together again: with its last part each comes out, complete or as skipped."""

    def __init__(self) -> None:
        self._open: dict[str, MomentRows] = {}
        self._skipped: set[str] = set()

    def skip(self, video: SkippedVideo) -> list[SkippedVideo]:
        """Note a part that could not be read; gives the video at its first such part."""
        self._open.pop(video.path, None)
        if video.path in self._skipped:
            return []
        self._skipped.add(video.path)
        return [video]

    def add(self, clips: MomentClips, values: np.ndarray) -> MomentRows | SkippedVideo | None:
        """Note what a model says of a part, a row per window; gives the video with its last part.

        Args:
            clips: The part. Parts of a video come in order.
            values: Rows.
        """
        file = clips.part.file
        if file.path in self._skipped:
            return None
        rows = self._open.setdefault(file.path, MomentRows(file, clips.num_frames, clips.duration_seconds))
        rows.moments += clips.moments
        rows.values += list(values)
        if clips.part.stop < clips.part.total:
            return None
        if len(rows.moments) != clips.part.total or clips.num_frames != rows.num_frames:
            return next(iter(self.skip(SkippedVideo(file.path, CHANGED))))
        return self._open.pop(file.path)


class _PartNames(Mapping[MomentPart, str]):
    """By which a part that is never read is named: its video."""

    def __getitem__(self, part: MomentPart) -> str:
        return part.file.path

    def __iter__(self) -> Iterator[MomentPart]:
        return iter(())

    def __len__(self) -> int:
        return 0


def read_moments(
    files: Sequence[VideoFile],
    processor: UMTVideoProcessor,
    windows: WindowSettings,
    batch_size: int,
    num_workers: int | None = 0,
    num_frames: int | None = None,
    is_joined: bool = True,
    sources: Mapping[str, VideoSource] | None = None,
) -> Iterator[list[MomentClips | SkippedVideo]]:
    """Read videos window by window, in order, some windows at a time.

    Args:
        files: Videos.
        processor: Gives number of frames, how they are chosen, size and decoder.
        windows: Length and distance.
        batch_size: Windows read at a time; long videos are read in several parts.
        num_workers: Processes that read ahead; 0: this one reads; default: as the machine has cores, 1 to 4.
        num_frames: Frames per window; default: the processor's.
        is_joined: Whether windows of several videos are read together.
        sources: What is read in place of a path, such as the bytes of a video.
    """
    reads = MomentReads(processor, windows, num_frames, sources)
    # Here a second reader counts the windows: those of the workers are theirs.
    counts = MomentReads(processor, windows, num_frames, sources) if num_workers != 0 else reads
    parts = plan_parts(files, counts, batch_size, is_joined)
    try:
        yield from read_ahead(reads, parts, num_workers, videos=_PartNames(), collate_fn=list)
    finally:
        reads.close()
        counts.close()


def read_files_moments(
    paths: Sequence[str], moments: Sequence[tuple[float, float]], processor: UMTVideoProcessor, num_frames: int | None
) -> tuple[list[torch.Tensor | None], list[SkippedVideo]]:
    """Read one moment of each of some files.

    Args:
        paths: Files.
        moments: Start and end in seconds, one per file.
        processor: As for `read_moments`.
        num_frames: As for `read_moments`.

    Returns:
        Frames `(T, C, H, W)` of each, `None` where it cannot be read; and those files with the reasons.
    """
    clips: list[torch.Tensor | None] = []
    skipped = []
    for path, (start, end) in zip(paths, moments, strict=True):
        try:
            with open_video(path, processor.decoder) as reader:
                moment = cut_moment(reader.compute_timestamps(), start, end)
                clips.append(read_clips(reader, [moment], processor, num_frames)[0])
        except (VideoDecodingError, OSError) as error:
            clips.append(None)
            skipped.append(build_skip(VideoFile(path, 0, 0), error))
    return clips, skipped


def compute_overlap(first: tuple[float, float], second: tuple[float, float]) -> float:
    """Intersection over union of two stretches of time, each start and end in seconds."""
    shared = max(min(first[1], second[1]) - max(first[0], second[0]), 0.0)
    covered = (first[1] - first[0]) + (second[1] - second[0]) - shared
    return shared / covered if covered > 0 else float(first == second)


def choose_apart(moments: Sequence[tuple[float, float]], limit: float = 0.0, count: int | None = None) -> list[int]:
    """Places of those moments, best first, that overlap none of the better ones by more than a share.

    Args:
        moments: Start and end of each, best first.
        limit: Largest intersection over union with one that was kept, in [0, 1].
        count: Moments wanted at most; default: all.
    """
    if not len(moments):
        return []
    spans = np.asarray(moments, dtype=np.float64).reshape(-1, 2)
    # In order of their starts, those that can overlap one are a few neighbours, also in a film of many hours.
    order = np.argsort(spans[:, 0], kind="stable")
    starts, ends = spans[order].T
    longest = float((ends - starts).max())
    is_free = np.ones(len(spans), dtype=bool)
    kept: list[int] = []
    for place, (start, end) in enumerate(spans):
        if not is_free[place]:
            continue
        kept.append(place)
        if len(kept) == count:
            break
        near = slice(
            int(np.searchsorted(starts, start - longest - EPSILON, side="left")),
            int(np.searchsorted(starts, end + EPSILON, side="right")),
        )
        is_free[order[near][_compute_overlaps(start, end, starts[near], ends[near]) > limit]] = False
    return kept


def _compute_overlaps(start: float, end: float, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """`compute_overlap` of one stretch of time with many, `(W,)`."""
    shared = np.maximum(np.minimum(end, ends) - np.maximum(start, starts), 0.0)
    covered = (end - start) + (ends - starts) - shared
    is_same = (starts == start) & (ends == end)
    return np.divide(shared, covered, out=is_same.astype(np.float64), where=covered > 0)


def draw_strip(video: str | os.PathLike, start: float | None = None, end: float | None = None) -> Image.Image:
    """A video's frames, or those of a moment of it, side by side.

    Args:
        video: What `open_video` takes.
        start: Seconds at which the moment begins; default: the start of the video.
        end: Seconds at which it ends; default: the end.

    Raises:
        VideoDecodingError: If the video cannot be read.
    """
    with open_video(video) as reader:
        if start is None or end is None:
            moment = Moment(0.0, 0.0, 0, reader.num_frames)
        else:
            moment = cut_moment(reader.compute_timestamps(), start, end)
        count = min(STRIP_FRAMES, moment.num_frames)
        places = ((np.arange(count) + 0.5) * moment.num_frames / count).astype(int) + moment.first_frame
        pictures = [Image.fromarray(frame) for frame in reader.get_frames(places.tolist())]
    width = min(max(round(pictures[0].width * STRIP_HEIGHT / pictures[0].height), 1), STRIP_WIDTH // STRIP_FRAMES)
    strip = Image.new("RGB", (count * width, STRIP_HEIGHT))
    for i, picture in enumerate(pictures):
        strip.paste(picture.resize((width, STRIP_HEIGHT)), (i * width, 0))
    return strip


def save_strips(
    found: Iterable[tuple[str, float | None, float | None]], folder: str | os.PathLike
) -> tuple[list[Path], list[SkippedVideo]]:
    """Write a strip of pictures of each video or moment that was found; those of an earlier call in the folder go.

    Args:
        found: Path, start and end of each, best first.
        folder: Made if need be. Files are named by rank, name and second; a comment in them says what they are.

    Returns:
        Files written, and the videos that cannot be read, with the reasons.

    Raises:
        MachineError: If the disk is full.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("*.jpg"):
        if _is_strip(file):
            file.unlink()
    names = {}
    for rank, (path, start, end) in enumerate(found, start=1):
        at = "" if start is None else f"-{start:.1f}s"
        names[f"{rank:02d}-{split_name(path)[0]}{at}.jpg"] = (path, start, end)
    written, skipped = [], []
    for name, (path, start, end) in names.items():
        try:
            strip = draw_strip(path, start, end)
        except (VideoDecodingError, OSError) as error:
            skipped.append(build_skip(VideoFile(path, 0, 0), error))
            continue
        file = folder / name
        with naming_full_disk(file):
            strip.save(name_unfinished(file), "JPEG", quality=90, comment=STRIP_COMMENT)
            put_file(name_unfinished(file), file)
        written.append(file)
    return written, skipped


def _is_strip(file: Path) -> bool:
    """Whether `save_strips` has written a picture."""
    try:
        with Image.open(file) as picture:
            return picture.info.get("comment") == STRIP_COMMENT.encode()
    except OSError:  # something else
        return False
