"""Video files and folders as they are given on the command line."""

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ..processing.frame_folders import list_frames
from ..processing.media_files import find_protocol, open_store
from .lists.folders import MEDIA_SUFFIXES, escape_name, format_name, is_text, list_folder, list_store_folder
from .lists.paths import is_in_store, is_url, require_video

NAME_BYTES = 200  # of a video's name in that of a file about it; file systems allow 255 for the complete name
WEB = ("http", "https")
FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]')


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

    def format(self, done: str = "skipped") -> str:
        """Write it as a line for people.

        Args:
            done: What comes of it.
        """
        return f"{done} {format_name(self.path)}: {self.reason}"


def list_videos(sources: Iterable[str]) -> tuple[list[VideoFile], list[SkippedVideo]]:
    """Find video files.

    Args:
        sources: Files, URLs, folders of frames, and folders, which are searched for videos with all their sub-folders,
            here or in an object store (`s3://bucket/videos`).

    Returns:
        Each video once, in order of its absolute path or URL; and the sources that do not exist, or whose names are
        not UTF-8.

    Raises:
        OSError: If none of the sources exists.
        ImportError: If the library of an object store is missing.
        ValueError: If there are none, a folder holds no videos, or the protocol of an address is unknown.
    """
    # A single path would otherwise be taken for the list of its letters, `/` among them.
    given = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    if not given:
        raise ValueError("Give at least one video: a file, a folder or a URL.")
    # By path: a file may be given by itself and with its folder.
    paths: set[str] = set()
    found, missing = [], []
    for source in given:
        if is_url(str(source)):
            addresses = _list_address(str(source))
            paths.update(addresses)
            missing += [] if addresses else [SkippedVideo(str(source), "No such file or folder.")]
            continue
        path = os.path.abspath(os.path.expanduser(source))
        if not os.path.isdir(path):
            paths.add(path)
            continue
        listing = list_folder(path)
        listing.require_videos(path)
        listing.say(path)
        paths.update(video.path for video in listing.videos)
    for path in sorted(paths):
        if not is_text(path):
            shown = escape_name(path)
            missing.append(SkippedVideo(shown, "Its name is not UTF-8, which tables and results need; rename it."))
            continue
        try:
            found.append(describe_file(path))
        except OSError as error:
            missing.append(SkippedVideo(path, f"{error.strerror}."))
    if not found:
        require_video(os.fspath(given[0]))
        if is_url(str(given[0])):
            raise FileNotFoundError(f"{given[0]}: no such file or folder.")
    return found, missing


def _list_address(url: str) -> list[str]:
    """Videos at an address: itself, where it names one, or those below it; none if there is nothing."""
    if find_protocol(url) not in (*WEB, "file"):
        open_store(url)  # whatever is wrong with all addresses of a kind is said before anything is read
    if not is_in_store(url) or Path(url).suffix.lower() in MEDIA_SUFFIXES and not url.endswith("/"):
        return [url]
    listing = list_store_folder(url)
    if listing.videos or listing.left_out:
        listing.require_videos(url)
        listing.say(url)
    return [video.path for video in listing.videos]


def describe_file(path: str) -> VideoFile:
    """Size and time of a video; of a folder of frames, the sum and the newest of its pictures'; of a URL, zeros.

    Raises:
        OSError: If there is no such file.
    """
    if is_url(path):  # nothing is fetched to list it
        return VideoFile(path, 0, 0)
    statuses = [os.stat(file) for file in (list_frames(path) if os.path.isdir(path) else [path])]
    return VideoFile(
        path, sum(status.st_size for status in statuses), max((status.st_mtime_ns for status in statuses), default=0)
    )


def split_name(video: str) -> tuple[str, str]:
    """Name of a video without what a file system does not take, and a digest of its path."""
    path = video if is_url(video) else os.path.abspath(video)
    digest = hashlib.blake2b(path.encode(errors="surrogateescape"), digest_size=4).hexdigest()
    # What follows the name in a web address may hold keys, and characters that a file system does not take.
    name = Path(urlsplit(path).path if find_protocol(path) in WEB else path).stem
    stem = FORBIDDEN.sub("_", name).encode(errors="surrogateescape")[:NAME_BYTES].decode(errors="ignore")
    return stem, digest
