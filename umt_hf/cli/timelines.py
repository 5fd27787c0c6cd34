"""What `umt-hf classify` does with moments: settings of windows, results as they come, and their pictures."""

from collections.abc import Callable, Generator, Iterable
from pathlib import Path

from accelerate import PartialState

from ..data.video_files import SkippedVideo
from ..inference.classification import LabelledVideo, LabelOptions, VideoClassifier
from ..inference.labels.files import VideoTimeline, iterate_timelines, save_timeline
from ..inference.moments import WindowSettings, resolve_moments
from .results import announce

Draw = Callable[[VideoTimeline], object]


def plan_timelines(
    window: float | None, stride: float | None, plot: Path | None
) -> tuple[WindowSettings | None, Draw | None]:
    """Settings of moments, if there are any, and what draws a video's timeline, if that is wanted.

    Raises:
        ValueError: If there is a stride or a folder of pictures without a window.
    """
    windows = resolve_moments(window, stride)
    if plot is None:
        return windows, None
    if windows is None:
        raise ValueError("--plot draws timelines of moments: give --window, the seconds of one.")
    return windows, lambda video: save_timeline(video, plot)


def iterate_labels(
    classifier: VideoClassifier,
    sources: Iterable[str],
    options: LabelOptions,
    windows: WindowSettings | None,
    draw: Draw | None,
) -> Generator[LabelledVideo | VideoTimeline | SkippedVideo]:
    """The results of `umt-hf classify` as they come: of complete videos, or timelines, which are drawn on the way."""
    if windows is None:
        yield from classifier.iterate_files(sources, options, announce)
        return
    for video in iterate_timelines(classifier, sources, windows, options, announce):
        if draw is not None and isinstance(video, VideoTimeline) and PartialState().is_main_process:
            draw(video)
        yield video
