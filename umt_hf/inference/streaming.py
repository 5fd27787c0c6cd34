r"""Answers about a video while it is written or sent: windows slide over its frames, each answered as it is complete.

    ffmpeg -i camera.mp4 -f mpegts - | umt-hf stream - --model outputs/classifier

Only the frames of a window are held, however long the stream runs. Windows, times and answers are those that
`extract_features` has for the complete file.

Legend: T frames of a window, C channels, H and W pixels, D width.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, TypeVar, cast

import numpy as np
import torch

from ..modeling.modeling_umt_video import UMTVideoForVideoClassification, UMTVideoModel
from ..processing.decoding import VideoStream
from ..processing.media_files import WAIT_SECONDS
from ..processing.video_processing_umt_video import UMTVideoProcessor
from .arguments import require_count
from .classification import VideoClassifier, merge_views
from .export import is_export
from .features import load_encoder
from .features.windows import SlidingWindows, resolve_windows
from .held_out import require_finite
from .labels.scored import ScoredLabel, rank_labels
from .loading import place_model, resolve_device
from .starts import read_model_fields

ResultT = TypeVar("ResultT")
StreamSource = str | os.PathLike | BinaryIO
LAST_TICK = 1e-6  # of a tick may lie beyond the last frame, as in `features.choose_frames`


@dataclass(frozen=True)
class StreamedFrame:
    """A frame that was chosen from a stream.

    Attributes:
        seconds: Since the first frame.
        read: Gives its pixels, uint8 RGB `(H, W, 3)`.
    """

    seconds: float
    read: Callable[[], np.ndarray]


def stream_features(
    source: StreamSource,
    model: UMTVideoModel,
    processor: UMTVideoProcessor,
    window: int | None = None,
    stride: int | None = None,
    fps: float | None = None,
    protocol: str | None = None,
    wait_seconds: float = WAIT_SECONDS,
) -> Generator[tuple[float, float, np.ndarray]]:
    """Slide an encoder over a video that is still being written or sent.

    Args:
        source: Path of a file that grows, or a binary file object such as `sys.stdin.buffer`; with `protocol` a URL.
        model: In evaluation mode, as `load_encoder` gives it.
        processor: Prepares the frames; its sampling plays no part.
        window: Frames the model sees at a time; default: its `num_frames`.
        stride: Frames from one window to the next; default: a window, so that each frame is seen once.
        fps: Frames per second that are read; default: every frame.
        protocol: Of a URL: "tcp", "udp", "rtsp", "rtmp", "srt", "http" or "https". Without it no network is used.
        wait_seconds: The stream is over when nothing has come from a file or a network for that long.

    Yields:
        Times of the first and the last frame of a window, and its feature, float32 `(D,)`: the mean over its tokens.
        The last window ends with the stream; a stream shorter than a window is filled with its last frame.

    Raises:
        VideoDecodingError: If the stream cannot be read; for an MP4 that is, if its index comes last.
        ValueError: If an argument makes no sense.

    Examples:
        >>> from umt_hf.inference.features import load_encoder
        >>> from umt_hf.inference.streaming import stream_features
        >>> model, processor = load_encoder("umt-vit-b16")
        >>> with open("video.mkv", "rb") as pipe:
        ...     windows = stream_features(pipe, model, processor)
        ...     ends = [end for start, end, feature in windows]
        >>> len(ends)  # of 24 frames, 8 in a window
        3
    """

    def encode(pixel_values: torch.Tensor) -> np.ndarray:
        pooled = model(pixel_values=pixel_values.to(model.device, model.dtype)).pooler_output
        return pooled.float().cpu().numpy()[0]

    windows = resolve_windows(model, "clip", window, stride, fps)
    stream = VideoStream(source, protocol, wait_seconds)
    return _answer_windows(stream, encode, processor, windows)


def stream_labels(
    source: StreamSource,
    classifier: VideoClassifier,
    top_k: int = 5,
    window: int | None = None,
    stride: int | None = None,
    fps: float | None = None,
    protocol: str | None = None,
    wait_seconds: float = WAIT_SECONDS,
) -> Generator[tuple[float, float, tuple[ScoredLabel, ...]]]:
    """Classify a video that is still being written or sent, window by window.

    Args:
        source: As for `stream_features`, and so are the others.
        classifier: Loaded from a folder, or from an export.
        top_k: How many classes per window.
        window: Frames the model sees at a time; default: its `num_frames`.
        stride: Frames from one window to the next.
        fps: Frames per second that are read.
        protocol: Of a URL.
        wait_seconds: Without a new byte.

    Yields:
        Times of the first and the last frame of a window, and its likeliest classes, best first.

    Raises:
        VideoDecodingError: If the stream cannot be read.
        ValueError: If an argument makes no sense, or the model gives NaN or infinite values.

    Examples:
        >>> from umt_hf import VideoClassifier
        >>> from umt_hf.inference.streaming import stream_labels
        >>> classifier = VideoClassifier("umt-vit-b16-k400")
        >>> with open("video.mkv", "rb") as pipe:
        ...     windows = list(stream_labels(pipe, classifier, top_k=1))
        >>> start, end, labels = windows[0]
        >>> labels[0].label
        'riding a bike'
    """
    model: Any = classifier.model

    def classify(pixel_values: torch.Tensor) -> tuple[ScoredLabel, ...]:
        logits = model(pixel_values=pixel_values.to(classifier.device, model.dtype)).logits.float()
        probabilities = merge_views(logits, 1, classifier.many_labels)
        require_finite(model, probabilities, "windows", lambda _: "this one")
        return rank_labels(probabilities[0].cpu().numpy(), classifier.labels, top_k)

    require_count("top_k", top_k)
    windows = resolve_windows(model, "clip", window, stride, fps)
    stream = VideoStream(source, protocol, wait_seconds)
    return _answer_windows(stream, classify, classifier.processor, windows)


def _answer_windows(
    stream: VideoStream,
    answer: Callable[[torch.Tensor], ResultT],
    processor: UMTVideoProcessor,
    windows: SlidingWindows,
) -> Generator[tuple[float, float, ResultT]]:
    """Times and answer of each window `(1, T, C, H, W)`, as soon as its last frame is there."""
    with stream:
        frames = (StreamedFrame(seconds, read) for seconds, read in stream.iterate())
        chosen = choose_online(frames, windows.fps)
        stride = cast("int", windows.stride)  # no time is asked for
        for seconds, pixel_values in slide_windows(chosen, processor, windows.window, stride, windows.tubelet_size):
            with torch.inference_mode():
                result = answer(pixel_values)
            yield seconds[0], seconds[-1], result


@dataclass(frozen=True)
class WindowAnswer:
    """What a window of a stream shows.

    Attributes:
        start_seconds: Time of its first frame, from the first of the stream.
        end_seconds: Time of its last one.
        labels: Its likeliest classes, best first; of a classifier.
        features: Its feature, `(D,)`; of any other model.
    """

    start_seconds: float
    end_seconds: float
    labels: tuple[ScoredLabel, ...] | None = None
    features: np.ndarray | None = None

    def to_dict(self) -> dict[str, Any]:
        """Fields for JSON, without the one that it does not have."""
        found: dict[str, Any] = {"start_seconds": self.start_seconds, "end_seconds": self.end_seconds}
        if self.labels is not None:
            found["labels"] = [asdict(scored) for scored in self.labels]
        if self.features is not None:
            found["features"] = self.features.tolist()
        return found

    def format(self) -> str:
        """Write it as a line for people; features are JSON in any case."""
        if self.labels is None:
            return json.dumps(self.to_dict())
        labels = ", ".join(scored.format() for scored in self.labels)
        return f"{self.start_seconds:.2f} to {self.end_seconds:.2f} s: {labels}"


def open_answers(
    source: StreamSource,
    model: str,
    window: int | None = None,
    stride: int | None = None,
    fps: float | None = None,
    top_k: int = 1,
    protocol: str | None = None,
    wait_seconds: float = WAIT_SECONDS,
) -> Iterator[WindowAnswer]:
    """Labels of a stream by a classifier or an exported one, features by any other model; see `stream_features`.

    Args:
        source: As for `stream_features`, and so are the others.
        model: Folder or Hub id.
        window: Frames the model sees at a time.
        stride: Frames from one window to the next.
        fps: Frames per second that are read.
        top_k: How many classes per window.
        protocol: Of a URL.
        wait_seconds: Without a new byte.
    """
    options: dict[str, Any] = {"window": window, "stride": stride, "fps": fps}
    options |= {"protocol": protocol, "wait_seconds": wait_seconds}
    kinds = [] if is_export(model) else read_model_fields(model).get("architectures") or []
    if is_export(model) or UMTVideoForVideoClassification.__name__ in kinds:
        for start, end, labels in stream_labels(source, VideoClassifier(model), top_k, **options):
            yield WindowAnswer(start, end, labels)
        return
    encoder, processor = load_encoder(model)
    encoder = place_model(encoder, resolve_device(None))
    for start, end, features in stream_features(source, encoder, processor, **options):
        yield WindowAnswer(start, end, features=features)


def choose_online(frames: Iterable[StreamedFrame], fps: float | None) -> Iterator[StreamedFrame]:
    """Choose frames at an even rate in time, as `features.choose_frames` does with all times at hand.

    Args:
        frames: In the order of their times.
        fps: Frames per second; default: every frame.

    Yields:
        The frames nearest to `0, 1 / fps, 2 / fps, ...`, each once, one frame late at most.
    """
    if fps is None:
        yield from frames
        return
    tick, before, chosen = 0, None, None
    for frame in frames:
        while tick / fps <= frame.seconds:
            time = tick / fps
            nearest = before if before is not None and time - before.seconds < frame.seconds - time else frame
            if nearest is not chosen:
                yield nearest
                chosen = nearest
            tick += 1
        before = frame
    if before is not None and before is not chosen and tick <= int(before.seconds * fps + LAST_TICK):
        yield before


def slide_windows(
    frames: Iterable[StreamedFrame], processor: UMTVideoProcessor, window: int, stride: int, tubelet: int
) -> Iterator[tuple[list[float], torch.Tensor]]:
    """Lay windows over frames that come one by one, as `features.plan_windows` does over a complete video.

    Args:
        frames: Chosen ones.
        processor: Prepares them.
        window: Frames of a window, a multiple of `tubelet`.
        stride: Frames from one window to the next, likewise.
        tubelet: Frames of a token.

    Yields:
        Times of the frames of a window, without repeats, and its pixels `(1, T, C, H, W)`. The last window is moved
        back to end with the stream; only to fill a tubelet or the only window the last frame is repeated.
    """
    held: deque[tuple[float, torch.Tensor]] = deque(maxlen=window)
    fresh: list[StreamedFrame] = []
    count, answered = 0, -1

    def take_in() -> None:
        # Together, since preparing costs less per frame then; of those that no window sees only the last are kept.
        wanted = fresh[-window:]
        if wanted:
            pixels = np.stack([frame.read() for frame in wanted])
            batch = processor(pixels, do_sample_frames=False, num_clips=1, num_crops=1, return_tensors="pt")
            held.extend(zip((frame.seconds for frame in wanted), batch["pixel_values"][0], strict=True))
        fresh.clear()

    for frame in frames:
        fresh.append(frame)
        if len(fresh) > window:
            del fresh[0]
        count += 1
        start = count - window
        if start >= 0 and start % stride == 0:
            take_in()
            answered = start
            yield [seconds for seconds, _ in held], torch.stack([pixels for _, pixels in held])[None]
    padded = max(window, -(-count // tubelet) * tubelet)
    if answered != padded - window:
        take_in()
        kept = list(held)[max(len(held) - (window - (padded - count)), 0) :]
        repeated = [kept[-1][1]] * (padded - count)
        yield [seconds for seconds, _ in kept], torch.stack([*(pixels for _, pixels in kept), *repeated])[None]


__all__ = ["WindowAnswer", "open_answers", "stream_features", "stream_labels"]
