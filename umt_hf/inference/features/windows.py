"""Windows that slide over the frames of videos, and what an encoder sees in them.

Frames stream from the decoder: of each video that is being read a few windows' worth is held, never the decoded video.

Legend: N frames, T frames of a window, S time steps (tubelets) of a video, W windows, D width.
"""

import multiprocessing
import os
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch.utils.data import IterableDataset

from ...data.in_flight import noted
from ...modeling.modeling_umt_video import UMTVideoModel
from ...modeling.selection_umt_video import spread_tokens
from ...processing.decoding import (
    DecodedFramesReader,
    FrameFolderReader,
    VideoDecodingError,
    VideoReader,
    open_video,
)
from ...processing.video_processing_umt_video import UMTVideoProcessor
from ..engine import in_model, without_gradients

FeatureLevel = Literal["frame", "clip", "tubelet"]


@dataclass(frozen=True)
class WindowPlan:
    """Which frames of a video each window sees.

    Attributes:
        frames: Numbers of the frames chosen, `(N,)`, rising.
        seconds: Their times from the video's first frame, `(N,)`.
        starts: First place of each window among the frames, rising.
        window: Frames of a window.
        num_padded: Times that the last frame is repeated: to fill the only window of a shorter video, or its last
            tubelet.
        num_even: Windows at even distances; the last one, moved back to end with the video, may be one more.
    """

    frames: np.ndarray
    seconds: np.ndarray
    starts: list[int]
    window: int
    num_padded: int
    num_even: int

    def list_seen(self) -> np.ndarray:
        """Places of the frames that a window sees, rising, without the repeats."""
        is_seen = np.zeros(len(self.frames) + self.num_padded, dtype=bool)
        for start in self.starts:
            is_seen[start : start + self.window] = True
        return is_seen[: len(self.frames)].nonzero()[0]


@dataclass(frozen=True)
class VideoFeatures:
    """Features of a video in the order of time; row by row they belong to the frames from `first` to `last`.

    Attributes:
        features: Float32; `(N, D)` for frames, `(W, D)` for clips, `(S, rows, columns, D)` for tubelets.
        first_frame: Number of the first frame of a row, int64.
        last_frame: Number of the last one.
        start_seconds: Time of the first frame, counted from the first of the video, float64; NaN where the video is a
            folder of pictures or an array, which have no times.
        end_seconds: Time of the last one.
        num_padded_frames: Times that the last frame was repeated; see `WindowPlan`.
        num_even_rows: Rows at even distances; of clips the last one, moved back to end with the video, may come after.
    """

    features: np.ndarray
    first_frame: np.ndarray
    last_frame: np.ndarray
    start_seconds: np.ndarray
    end_seconds: np.ndarray
    num_padded_frames: int
    num_even_rows: int


def choose_frames(seconds: np.ndarray, fps: float | None) -> np.ndarray:
    """Choose frames at an even rate in time.

    Args:
        seconds: Times of all frames, `(num_frames,)`, rising from 0.
        fps: Frames per second; default: every frame.

    Returns:
        Numbers of the frames nearest to `0, 1 / fps, 2 / fps, ...`, each once: never more than the video has.
    """
    if fps is None:
        return np.arange(len(seconds))
    ticks = np.arange(int(seconds[-1] * fps + 1e-6) + 1) / fps
    after = np.searchsorted(seconds, ticks).clip(max=len(seconds) - 1)
    before = (after - 1).clip(min=0)
    return np.unique(np.where(ticks - seconds[before] < seconds[after] - ticks, before, after))


def plan_windows(
    seconds: np.ndarray,
    window: int,
    stride: int | None,
    tubelet_size: int,
    fps: float | None,
    stride_seconds: float | None = None,
) -> WindowPlan:
    """Lay windows over a video; the last one is moved back to end with it.

    Args:
        seconds: Times of all frames, rising from 0.
        window: Frames of a window, a multiple of `tubelet_size`.
        stride: Frames from one window to the next, likewise.
        tubelet_size: Frames of a token.
        fps: Frames per second to read; default: every frame.
        stride_seconds: Time from one window to the next instead: a window starts at the frame nearest to it.
    """
    frames = choose_frames(seconds, fps)
    padded = max(window, -(-len(frames) // tubelet_size) * tubelet_size)
    last = padded - window
    if stride_seconds is not None:
        ticks = choose_frames(seconds[frames], 1 / stride_seconds)
        # At the borders of tubelets, since those of two windows would not meet otherwise.
        even = [int(start) for start in np.unique(ticks // tubelet_size * tubelet_size) if start <= last] or [0]
    else:
        even = list(range(0, last + 1, stride or window))
    # The last window is moved back instead of being padded: repeated frames would look like a pause.
    starts = even if even[-1] == last else [*even, last]
    return WindowPlan(frames, seconds[frames], starts, window, padded - len(frames), len(even))


@dataclass(frozen=True)
class SlidingWindows:
    """How windows slide; see `extract_features`.

    Attributes:
        level: What has a feature.
        window: Frames of a window.
        stride: Frames from one window to the next; `None`: `stride_seconds` holds.
        stride_seconds: Time from one window to the next.
        fps: Frames per second that are read; `None`: every frame.
        tubelet_size: Frames of a token.
    """

    level: FeatureLevel
    window: int
    stride: int | None
    stride_seconds: float | None
    fps: float | None
    tubelet_size: int

    def plan(self, reader: VideoReader) -> WindowPlan:
        """Lay windows over a video.

        Raises:
            VideoDecodingError: If times are needed, and the video has none.
        """
        needs_times = self.fps is not None or self.stride_seconds is not None
        if not needs_times and isinstance(reader, FrameFolderReader | DecodedFramesReader):
            seconds = np.full(reader.num_frames, np.nan)  # pictures and arrays have no times
        else:
            seconds = reader.compute_timestamps()
        return plan_windows(seconds, self.window, self.stride, self.tubelet_size, self.fps, self.stride_seconds)


def resolve_windows(
    model: UMTVideoModel,
    level: FeatureLevel,
    window: int | None,
    stride: int | None,
    fps: float | None,
    stride_seconds: float | None = None,
) -> SlidingWindows:
    """Fill in and check how windows slide.

    Raises:
        ValueError: If the level is unknown, window or stride is not positive or cuts a tubelet, both strides are
            given, the stride leaves frames out that have to have a feature, or `fps` or the time is not positive.
    """
    if level not in get_args(FeatureLevel):
        raise ValueError(f"level must be one of {list(get_args(FeatureLevel))}, got {level!r}.")
    tubelet = model.config.tubelet_size
    window = model.config.num_frames if window is None else window
    if stride is not None and stride_seconds is not None:
        raise ValueError(f"Give stride={stride} or stride_seconds={stride_seconds:g}, not both.")
    if stride is None and stride_seconds is None:
        stride = window  # every frame once
    for name, value in (("window", window), ("stride", stride)):
        if value is not None and (value < 1 or value % tubelet):
            raise ValueError(f"{name} must be a positive multiple of the model's tubelet_size {tubelet}, got {value}.")
    if level != "clip" and (stride_seconds is not None or (stride or 0) > window):
        given = f"stride {stride} is longer than window {window} and" if stride_seconds is None else "stride_seconds"
        raise ValueError(f"{given} may leave frames out, and with level={level} each has a feature: take level=clip.")
    for name, rate in (("fps", fps), ("stride_seconds", stride_seconds)):
        if rate is not None and not 0 < rate < float("inf"):
            raise ValueError(f"{name} must be positive, got {rate}.")
    return SlidingWindows(level, window, stride, stride_seconds, fps, tubelet)


class FrameBlock(NamedTuple):
    """Frames of a video that follow each other, as a reader hands them on; of a video that cannot be read, the reason.

    Attributes:
        number: Of the video.
        pixel_values: `(n, C, H, W)`, n at most the frames of a window and the repeats at the end.
        plan: Of the video's windows; with its first block only.
        is_last: Whether the video has no further block.
        reason: Why it cannot be read.
    """

    number: int
    pixel_values: torch.Tensor | None
    plan: WindowPlan | None
    is_last: bool
    reason: str | None = None


def read_blocks(
    number: int, video: Any, processor: UMTVideoProcessor, settings: SlidingWindows, dtype: torch.dtype
) -> Iterator[FrameBlock]:
    """Decode and prepare a video, a window's worth of frames at a time.

    Raises:
        VideoDecodingError: If it cannot be read.
    """
    with open_video(video, processor.decoder) as reader:
        plan = settings.plan(reader)
        places = plan.list_seen()
        frames = reader.iterate_frames(plan.frames[places].tolist())
        num_blocks = -(-len(places) // plan.window)
        for block in range(num_blocks):
            pictures = np.stack(list(islice(frames, plan.window)))
            batch = processor(pictures, do_sample_frames=False, num_clips=1, num_crops=1, return_tensors="pt")
            pixel_values, is_last = batch["pixel_values"][0].to(dtype), block == num_blocks - 1
            if is_last and plan.num_padded:
                pixel_values = torch.cat([pixel_values, pixel_values[-1:].expand(plan.num_padded, -1, -1, -1)])
            yield FrameBlock(number, pixel_values, None if block else plan, is_last)


class BlockStream(IterableDataset):
    """Blocks of many videos; a worker that has read one takes the next that nobody has."""

    def __init__(self, paths: Sequence[str], *options: Any):
        self.paths, self.options = paths, options
        self.num_taken = multiprocessing.Value("q", 0)

    def __iter__(self) -> Iterator[FrameBlock]:
        while (number := self._take()) < len(self.paths):
            path = self.paths[number]
            try:
                with noted(path, number):
                    yield from read_blocks(number, path, *self.options)
            except (VideoDecodingError, OSError) as error:
                yield FrameBlock(number, None, None, True, str(error).removeprefix(f"{path}: "))

    def _take(self) -> int:
        with self.num_taken.get_lock():
            self.num_taken.value += 1
            return self.num_taken.value - 1


class _OpenVideo:
    """A video between its first and its last window.

    Args:
        plan: Of its windows.
        settings: How they slide.
    """

    def __init__(self, plan: WindowPlan, settings: SlidingWindows):
        self.plan, self.settings = plan, settings
        self.held: list[torch.Tensor] = []
        self.num_cut, self.num_encoded = 0, 0
        self.rows: list[np.ndarray] = []  # of clips
        self.sums, self.counts = np.zeros(0, np.float32), np.zeros(0, np.float32)  # of time steps

    def cut(self, frames: torch.Tensor) -> Iterator[torch.Tensor]:
        """Windows `(T, C, H, W)` that are complete with further frames; only what the next one needs is kept."""
        starts, window = self.plan.starts, self.plan.window
        for frame in frames:
            self.held.append(frame)
            if len(self.held) == window:
                yield torch.stack(self.held)
                self.num_cut += 1
                if self.num_cut < len(starts):
                    gap = starts[self.num_cut] - starts[self.num_cut - 1]
                    self.held = self.held[gap:]

    def add(self, features: np.ndarray) -> None:
        """Take the next window's features: `(D,)` of clips, `(steps, D)` or `(steps, rows, columns, D)` of others."""
        start, tubelet = self.plan.starts[self.num_encoded], self.settings.tubelet_size
        self.num_encoded += 1
        if self.settings.level == "clip":
            self.rows.append(features)
            return
        if not self.counts.size:  # the first window says how wide features are
            num_steps = (len(self.plan.frames) + self.plan.num_padded) // tubelet
            self.sums = np.zeros((num_steps, *features.shape[1:]), np.float32)
            self.counts = np.zeros(num_steps, np.float32)
        steps = slice(start // tubelet, start // tubelet + len(features))
        # Sums, since all windows of a long video would not fit into memory.
        self.sums[steps] += features
        self.counts[steps] += 1

    @property
    def is_complete(self) -> bool:
        """Whether all windows have their features."""
        return self.num_encoded == len(self.plan.starts)

    def finish(self) -> VideoFeatures:
        """Features of all windows; those of a time step are the mean over the windows that see it."""
        plan, level, tubelet = self.plan, self.settings.level, self.settings.tubelet_size
        total = len(plan.frames)
        if level == "clip":
            features, first, length = np.stack(self.rows), np.array(plan.starts), plan.window
        else:
            self.sums /= self.counts.reshape(-1, *[1] * (self.sums.ndim - 1))
            # Without the steps of repeats alone.
            features, first, length = self.sums[: -(-total // tubelet)], np.arange(0, total, tubelet), tubelet
        if level == "frame":
            features, first, length = features.repeat(tubelet, axis=0)[:total], np.arange(total), 1
        last = (first + length - 1).clip(max=total - 1)
        return VideoFeatures(
            features,
            plan.frames[first],
            plan.frames[last],
            plan.seconds[first],
            plan.seconds[last],
            plan.num_padded,
            plan.num_even if level == "clip" else len(features),
        )


def slide(
    blocks: Iterable[FrameBlock],
    model: UMTVideoModel,
    settings: SlidingWindows,
    batch_size: int,
    shares_batches: bool = False,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Generator[tuple[int, VideoFeatures | str]]:
    """Encode the windows of videos.

    Args:
        blocks: Of one video after the other, or of several in turn; those of one in order.
        model: In evaluation mode.
        settings: How windows slide.
        batch_size: Windows that go through the model at a time.
        shares_batches: Whether windows of several videos go through together, always `batch_size` of them: the last
            batch is filled with repeats, so that a window's features do not depend on which others came with it.
            Otherwise a batch holds windows of one video alone, as `extract_features` forms them.
        autocast: Gives the precision of the model.

    Yields:
        Number of each video and its features, or why it cannot be read, as they come.
    """
    videos: dict[int, _OpenVideo] = {}
    queues: defaultdict[int, list[tuple[_OpenVideo, torch.Tensor]]] = defaultdict(list)

    launched: deque[tuple[list[_OpenVideo], torch.Tensor]] = deque()

    def encode(queue: list[tuple[_OpenVideo, torch.Tensor]]) -> None:
        windows = [window for _, window in queue]
        windows += [windows[-1]] * (batch_size - len(windows) if shares_batches else 0)
        with autocast():
            launched.append(([video for video, _ in queue], _encode(windows, model, settings.level)))
        queue.clear()
        # A GPU computes a batch while the windows of the next one are put together.
        deliver(1 if shares_batches else 0)

    def deliver(num_left: int) -> None:
        while len(launched) > num_left:
            owners, encoded = launched.popleft()
            with in_model():
                rows = encoded.cpu().numpy()
            for video, features in zip(owners, rows, strict=False):
                video.add(features)

    for block in blocks:
        queue = queues[0 if shares_batches else block.number]
        if block.pixel_values is None:
            damaged = videos.pop(block.number, None)
            queue[:] = [entry for entry in queue if entry[0] is not damaged]
            yield block.number, str(block.reason)
            continue
        if block.plan is not None:
            videos[block.number] = _OpenVideo(block.plan, settings)
        video = videos[block.number]
        for window in video.cut(block.pixel_values.to(model.device, non_blocking=True)):
            queue.append((video, window))
            if len(queue) == batch_size:
                encode(queue)
        if block.is_last and not shares_batches:
            if queue:
                encode(queue)
            del queues[block.number]
        for number in [number for number, video in videos.items() if video.is_complete]:
            yield number, videos.pop(number).finish()
    for queue in queues.values():
        if queue:
            encode(queue)
    deliver(0)
    for number, video in videos.items():
        yield number, video.finish()


def _encode(windows: list[torch.Tensor], model: UMTVideoModel, level: FeatureLevel) -> torch.Tensor:
    """Float32 `(B, D)`, `(B, steps, D)` or `(B, steps, rows, columns, D)` of windows `(T, C, H, W)`, on the device."""
    with in_model(), without_gradients(model.device, is_standalone=True):
        pixel_values = torch.stack(windows)
        outputs = model(pixel_values=pixel_values)
        if level == "clip":
            return outputs.pooler_output.float()
        grid = model.embeddings.patch_embeddings.compute_grid(pixel_values)
        features, kept = outputs.last_hidden_state.float(), outputs.kept_indices
        if level == "frame":  # each has as many tokens, whatever share of them is kept
            return features.unflatten(1, (grid[0], -1)).mean(dim=2)
        features = features if kept is None else spread_tokens(features, kept, grid[0] * grid[1] * grid[2])
        return features.unflatten(1, grid)


def extract_features(
    video: str | os.PathLike,
    model: UMTVideoModel,
    processor: UMTVideoProcessor,
    level: FeatureLevel = "clip",
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    fps: float | None = None,
    stride_seconds: float | None = None,
) -> VideoFeatures:
    """Slide a model over a video.

    A clip's feature is the mean over the window's tokens (`pooler_output`). A tubelet's is the token itself, a frame's
    the mean over the tokens of its tubelet; where windows overlap, both are averaged over the windows that see them.
    With a `keep_ratio` below 1 means are over the tokens that are kept, and tubelets without a token are 0.

    Args:
        video: What `open_video` takes.
        model: In evaluation mode.
        processor: Prepares the frames; its sampling plays no part.
        level: What has a feature.
        window: Frames the model sees at a time; default: its `num_frames`.
        stride: Frames from one window to the next; default: a window, so that each frame is seen once. A longer one
            leaves frames out, which only clips allow.
        batch_size: Windows that go through the model at a time.
        fps: Frames per second that are read; default: every frame.
        stride_seconds: Seconds from one window to the next instead of frames.

    Returns:
        Features with the frames and times they belong to. The last window ends with the video; a video shorter than a
        window is filled with its last frame.

    Raises:
        VideoDecodingError: If the video cannot be read.
        ValueError: If an argument makes no sense.

    Examples:
        >>> from umt_hf.inference.features import extract_features, load_encoder
        >>> model, processor = load_encoder("umt-vit-b16")
        >>> found = extract_features("video.mp4", model, processor, stride=8)
        >>> found.features.shape[0]  # 24 frames, three windows of 8
        3
    """
    settings = resolve_windows(model, level, window, stride, fps, stride_seconds)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    blocks = read_blocks(0, video, processor, settings, model.dtype)
    (found,) = (found for _, found in slide(blocks, model, settings, batch_size))
    assert isinstance(found, VideoFeatures)  # a video that cannot be read has raised
    return found


__all__ = ["VideoFeatures", "choose_frames", "extract_features", "plan_windows"]
