"""Video files and folders as they are given on the command line."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .sources import read_folder


@dataclass(frozen=True)
class VideoFile:
    """A file as it was when it was listed; another size or time means that it has changed."""

    path: str
    size_bytes: int
    modified_ns: int


@dataclass(frozen=True)
class SkippedVideo:
    """A video that is not in the index, and why."""

    path: str
    reason: str


def list_videos(sources: Iterable[str]) -> tuple[list[VideoFile], list[SkippedVideo]]:
    """Find video files.

    Args:
        sources: Files, and folders, which are searched for videos with all their sub-folders.

    Returns:
        Each file once, in order of its absolute path; and the sources that do not exist.

    Raises:
        ValueError: If a folder holds no videos.
    """
    # A set: a file may be given by itself and with its folder.
    paths: set[str] = set()
    # A single path would otherwise be taken for the list of its letters, `/` among them.
    for source in [sources] if isinstance(sources, str | os.PathLike) else sources:
        path = Path(os.path.abspath(os.path.expanduser(source)))
        paths.update([row["video"] for row in read_folder(path)] if path.is_dir() else [str(path)])
    found, missing = [], []
    for path in sorted(paths):
        try:
            status = os.stat(path)
            found.append(VideoFile(path, status.st_size, status.st_mtime_ns))
        except OSError as error:
            missing.append(SkippedVideo(path, f"{error.strerror}."))
    return found, missing
