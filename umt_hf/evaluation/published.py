"""A measured figure beside the published one: whether a checkpoint does here what it did there.

Source of the interval: Wilson, Journal of the American Statistical Association 22, 1927 (the score interval).
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runs.folder import CONVERSION_FILE
from ..runs.summary import read_optional_json
from ..zoo import PublishedFigure, find_entry, load_zoo

NORMAL_QUANTILE = 1.959964  # of 0.975: 95 % lie within


@dataclass(frozen=True)
class PublishedComparison:
    """A share of videos that were right, and the published share.

    Args:
        model: Our name of the checkpoint.
        figure: Published.
        value: Measured, percent.
        num_videos: That it was measured on.
        interval: Within which the figure of all videos is with 95 % confidence, percent.
        views: Frames x crops x clips of the measurement.
    """

    model: str
    figure: PublishedFigure
    value: float
    num_videos: int
    interval: tuple[float, float]
    views: str

    @property
    def agrees(self) -> bool:
        """Whether the published figure is within the interval."""
        return self.interval[0] <= self.figure.value <= self.interval[1]

    def format(self) -> str:
        """One line."""
        low, high = self.interval
        place = "within" if self.agrees else "below" if self.figure.value < low else "above"
        return (
            f"{self.model} on {self.num_videos:,} videos, {self.views} views: {self.figure.metric} {self.value:.1f} % "
            f"(95 % confidence: {low:.1f} to {high:.1f}); published for {self.figure.data_set}, {self.figure.views} "
            f"views: {self.figure.value:.1f} %, {place} the interval."
        )

    def to_dict(self) -> dict[str, Any]:
        """For the report."""
        return {**dataclasses.asdict(self), "agrees": self.agrees}


def require_conversion(name: str, folder: str) -> None:
    """Refuse a folder that has the name of a released checkpoint, and holds another model.

    Raises:
        ValueError: If no conversion of that checkpoint has written it.
    """
    found = read_optional_json(Path(folder, CONVERSION_FILE)).get("name")
    if found != name:
        raise ValueError(
            f"published: the folder {folder} is not {name} as released ({CONVERSION_FILE} "
            f"{'is not there' if found is None else f'says {found}'}): rename it, or run the test in another folder."
        )


def find_published_accuracy(name: str) -> PublishedFigure:
    """Published top-1 accuracy of a released classifier.

    Raises:
        ValueError: If there is no such checkpoint, or none is published for it.
    """
    figure = next((own for own in find_entry(name).figures if own.protocol == "classification"), None)
    if figure is None:
        known = [entry.name for entry in load_zoo().values() if entry.task == "classification"]
        raise ValueError(f"published: {name} has no published accuracy; those with one are {', '.join(known)}.")
    return figure


def compare_with_published(
    model: str, accuracy: float, num_videos: int, num_frames: int, num_crops: int, num_clips: int
) -> PublishedComparison:
    """Compare a measured top-1 accuracy with the published one.

    Args:
        model: Our name of the checkpoint.
        accuracy: Measured, from 0 to 1.
        num_videos: That it was measured on; independent, as if drawn from all.
        num_frames: Frames of a view.
        num_crops: Crops of a clip.
        num_clips: Clips of a video.
    """
    low, high = compute_wilson_interval(accuracy, num_videos)
    return PublishedComparison(
        model=model,
        figure=find_published_accuracy(model),
        value=100 * accuracy,
        num_videos=num_videos,
        interval=(100 * low, 100 * high),
        views=f"{num_frames}x{num_crops}x{num_clips}",
    )


def compute_wilson_interval(share: float, number: int) -> tuple[float, float]:
    """Interval of 95 % confidence of a share that was found in `number` independent trials, from 0 to 1."""
    squared = NORMAL_QUANTILE**2 / number
    middle = (share + squared / 2) / (1 + squared)
    half = (share * (1 - share) * squared + squared**2 / 4) ** 0.5 / (1 + squared)
    return max(0.0, middle - half), min(1.0, middle + half)
