"""Videos that cannot be read: which others take their place in training, and how many are too many."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from ..processing.decoding import VideoDecodingError
from ..runs.disk import append_new_lines
from ..runs.mistakes import MachineError, UserError
from ..runs.scripts import MACHINE_CODE

logger = logging.getLogger(__name__)

MAX_REPLACEMENTS = 8
LOST_SHARD = "Check the shard."  # ends what is said of a shard that was there when the run began

Row = TypeVar("Row")
Sample = TypeVar("Sample")


def sample_replacements(num_rows: int, generator: torch.Generator) -> list[int]:
    """Draw the rows that are tried, one after the other, in place of one that cannot be read."""
    return torch.randint(num_rows, (MAX_REPLACEMENTS,), generator=generator).tolist()


def read_first_readable(rows: Iterable[Row], read: Callable[[Row], Sample]) -> tuple[Sample | None, list[str]]:
    """Read a row, or else the first of its replacements that can be read.

    A replacement brings its own text or label: `read` gets the row, not only its video.

    Args:
        rows: The row that is asked for, then its replacements.
        read: Makes a sample of a row; raises `VideoDecodingError` where the video cannot be read.

    Returns:
        The sample, `None` if no row could be read; and the reason for each row that could not.
    """
    reasons: list[str] = []
    for row in rows:
        try:
            return read(row), reasons
        except VideoDecodingError as error:
            reasons.append(str(error))
    return None, reasons


class LostShardError(VideoDecodingError):
    """A shard that was there when the run began cannot be read any more."""

    exit_code = MACHINE_CODE


def choose_error(reasons: Iterable[str]) -> type[UserError]:
    """What is raised where too many videos are unreadable: a shard that is gone is a fault of the machine."""
    return MachineError if any(reason.endswith(LOST_SHARD) for reason in reasons) else UserError


class UnreadableList:
    """File that names each unreadable video of a run once, whichever process met it and however often.

    Args:
        path: A line for each of them: its name and the reason. Lines of an earlier part of the run stay.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.known: set[str] = set()

    def add(self, reasons: Iterable[str]) -> list[str]:
        """Append the lines that are not there yet, and give those."""
        lines = dict.fromkeys(" ".join(reason.split()) for reason in reasons)
        new = [line for line in lines if line not in self.known]
        if new:
            there = append_new_lines(self.path, new)
            self.known.update(there, new)
            new = [line for line in new if line not in there]
        return new


def say_unreadable(reasons: Sequence[str], unreadable: UnreadableList | None, message: str) -> None:
    """Name videos that cannot be read in the log.

    Args:
        reasons: A line for each.
        unreadable: List of the run, whose entries have been named before; `None` = all are named.
        message: With `%s` for the line.
    """
    for reason in reasons if unreadable is None else unreadable.add(reasons):
        logger.warning(message, reason)


@dataclass
class UnreadableVideos:
    """Tally of the videos that were asked for, and of those that could not be read.

    Args:
        videos: Videos asked for; one that is asked for twice counts twice.
        skipped_videos: Those of them that could not be read.
    """

    videos: int = 0
    skipped_videos: int = 0

    def count(
        self,
        num_videos: int,
        reasons: Sequence[str],
        max_skipped_ratio: float,
        *,
        min_skipped: int = 1,
        kind: str = "videos",
        error: type[Exception] | None = None,
        unreadable: UnreadableList | None = None,
    ) -> None:
        """Add videos to the tally, and name those that could not be read in the log.

        Args:
            num_videos: Videos asked for.
            reasons: A line for each unreadable one, with its name.
            max_skipped_ratio: Share of unreadable videos that is accepted.
            min_skipped: Fewer unreadable videos than this are accepted whatever their share.
            kind: What is counted, for the message.
            error: What is raised where there are more; `None` = as `choose_error` says.
            unreadable: List of the run, whose entries have been named before.

        Raises:
            Exception: An `error`, if the accepted share is exceeded.
        """
        self.videos += num_videos
        self.skipped_videos += len(reasons)
        say_unreadable(reasons, unreadable, "Skipped, since it cannot be read: %s")
        if self.skipped_videos >= min_skipped and self.skipped_videos > max_skipped_ratio * self.videos:
            raise (error or choose_error(reasons))(
                f"{self.skipped_videos} of {self.videos} {kind} could not be read, more than max_skipped_ratio="
                f"{max_skipped_ratio} allows. Fix or remove them, or raise it. One of them: "
                f"{reasons[0] if reasons else 'see the log'}"
            )
