"""Folders of videos: what in them is a video, what its class is, and what is left out.

A video is a file with a known suffix, or, where a tree has no such files, a folder of numbered pictures.
"""

import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
from datasets import ClassLabel

from ...processing.frame_folders import FRAME_SUFFIXES, holds_frames
from ..labels import LabelCoding, encode_labels, normalize_name, shorten, warn_of_case, warn_of_split_folders
from .paths import is_in_store
from .stores import list_addresses

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = {
    ".3g2", ".3gp", ".asf", ".avi", ".divx", ".f4v", ".flv", ".gif", ".m2ts", ".m2v", ".m4v", ".mkv", ".mov", ".mp4",
    ".mpe", ".mpeg", ".mpg", ".mts", ".mxf", ".ogm", ".ogv", ".qt", ".rm", ".rmvb", ".ts", ".vob", ".webm", ".wmv",
}  # fmt: skip
# What a list may name and a folder may not: clips decoded before, which lie beside their videos.
MEDIA_SUFFIXES = VIDEO_SUFFIXES | {".npy"} | FRAME_SUFFIXES
# By the suffix of a compression, and by those of tars that have it.
UNPACKING = {
    ".gz": "gunzip", ".tgz": "gunzip", ".bz2": "bunzip2", ".tbz2": "bunzip2", ".tbz": "bunzip2", ".xz": "unxz",
    ".txz": "unxz", ".lzma": "unlzma", ".zst": "zstd -d", ".tzst": "zstd -d", ".lz4": "lz4 -d",
}  # fmt: skip
# Folders that file systems, archives and network disks put beside one's own.
SYSTEM_FOLDERS = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"}
HIDDEN_FILES, HIDDEN_FOLDERS, STRAY = "hidden files", "hidden or system folders", "videos beside the class folders"
UNSHOWN = {"Cc", "Zl", "Zp"}  # categories of Unicode: controls, ends of lines and paragraphs
UNNAMEABLE = "names that are not UTF-8"
TARS, PARQUET = "tars", "Parquet files"
PICTURES, OTHERS, LOOPS = "folders of pictures beside videos", "other files", "links back to a folder above"


@dataclass(frozen=True)
class FolderVideo:
    """A video in a tree.

    Args:
        path: The file, or its folder of frames.
        parts: Names of the folders from the top to it, and its own.
        identity: Its path without links.
    """

    path: str
    parts: tuple[str, ...]
    identity: str


@dataclass
class FolderListing:
    """The videos of a tree and how much was left out, by reason.

    Args:
        videos: In order of their paths.
        left_out: How many, by reason.
        empty: Folders at the top without a video.
    """

    videos: list[FolderVideo] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    empty: list[str] = field(default_factory=list)

    def require_videos(self, source: str | os.PathLike) -> None:
        """Refuse a tree without videos.

        Raises:
            ValueError: With what is a video, and what is there instead.
        """
        if self.videos:
            return
        self.say(source)
        hint = " The videos in tars are read by `umt-hf prepare`, pre-training, fine-tuning and evaluation alone."
        raise ValueError(
            f"{source}: no videos found; known suffixes are {', '.join(sorted(VIDEO_SUFFIXES))}, and numbered "
            f"pictures are the frames of a video.{hint if self.left_out[TARS] else ''}"
        )

    def say(self, source: str | os.PathLike) -> None:
        """Log what was left out, in one line: a warning where videos may be among it."""
        counts = {reason: count for reason, count in self.left_out.items() if count}
        if counts:
            level = logging.INFO if set(counts) <= {OTHERS} else logging.WARNING
            shown = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
            name = escape_name(os.fspath(source))
            logger.log(level, "%s: %d videos; left out: %s.", name, len(self.videos), shown)


def list_store_folder(address: str) -> FolderListing:
    """Find the videos below an address in an object store, by the rules of folders; it holds no folders of frames.

    Raises:
        ImportError: If the library of the store is missing.
        VideoDecodingError: If it does not answer.
    """
    listing = FolderListing()
    for name in list_addresses(address):
        parts = tuple(name.split("/"))
        suffix = os.path.splitext(name)[1].lower()
        if any(part.startswith(".") or part.casefold() in SYSTEM_FOLDERS for part in parts[:-1]):
            listing.left_out[HIDDEN_FOLDERS] += 1
        elif suffix not in VIDEO_SUFFIXES:
            listing.left_out[_name_other(parts[-1], suffix)] += 1
        elif parts[-1].startswith("."):
            listing.left_out[HIDDEN_FILES] += 1
        else:
            video = f"{address.rstrip('/')}/{name}"
            listing.videos.append(FolderVideo(video, parts, video))
    return listing


def list_folder(path: str | os.PathLike) -> FolderListing:
    """Find the videos below a folder, through links too.

    Hidden files and folders (a name that begins with a dot, as macOS' `._clip.mp4`) and those of systems are left out.

    Returns:
        Videos in order of their paths; numbered pictures are frames only in a tree without video files.
    """
    files, frames, listing = [], [], FolderListing()
    top = os.path.realpath(path)
    if holds_frames(path):
        return FolderListing([FolderVideo(os.fspath(path), (os.path.basename(top),), top)])
    with os.scandir(path) as entries:
        entries = sorted(entries, key=lambda entry: entry.name)
    files += _list_files(entries, (), top, listing)
    for entry in entries:
        if is_folder(entry) and not _is_left_out(entry, listing):
            # Folders are known for each class by itself: two classes may link to one folder, which is warned of.
            found = list(_walk(entry.path, (entry.name,), {top}, listing))
            files += [video for video, is_file in found if is_file]
            frames += [video for video, is_file in found if not is_file]
            if not found:
                listing.empty.append(entry.name)
    listing.videos = sorted(files or frames, key=lambda video: video.path.split(os.sep))
    if files and frames:
        listing.left_out[PICTURES] += len(frames)
    return listing


def _walk(
    path: str, parts: tuple[str, ...], visited: set[str], listing: FolderListing
) -> Iterator[tuple[FolderVideo, bool]]:
    """Videos below a folder, and whether each is a file."""
    real = os.path.realpath(path)
    if real in visited:
        listing.left_out[LOOPS] += 1
        return
    visited.add(real)
    try:
        with os.scandir(path) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        listing.left_out[f"folders that cannot be read ({error.strerror})"] += 1
        return
    videos = _list_files(entries, parts, real, listing)
    yield from ((video, True) for video in videos)
    if not videos and holds_frames(path):
        yield FolderVideo(path, parts, real), False
        return
    for entry in entries:
        if is_folder(entry) and not _is_left_out(entry, listing):
            yield from _walk(entry.path, (*parts, entry.name), visited, listing)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _list_files(
    entries: Sequence[os.DirEntry[str]], parts: tuple[str, ...], real: str, listing: FolderListing
) -> list[FolderVideo]:
    videos = []
    for entry in entries:
        suffix = os.path.splitext(entry.name)[1].lower()
        if is_folder(entry):
            continue
        if suffix not in VIDEO_SUFFIXES:
            listing.left_out[_name_other(entry.name, suffix)] += suffix not in FRAME_SUFFIXES
        elif entry.name.startswith("."):
            listing.left_out[HIDDEN_FILES] += 1
        elif not is_text(entry.name):
            listing.left_out[UNNAMEABLE] += 1
        else:
            identity = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
            videos.append(FolderVideo(entry.path, (*parts, entry.name), identity))
    return videos


def is_packed_tar(name: str) -> bool:
    """Whether a file's name is that of a tar with compression."""
    stem, suffix = os.path.splitext(name.lower())
    return suffix in UNPACKING and (suffix.startswith(".t") or stem.endswith(".tar"))


def _name_other(name: str, suffix: str) -> str:
    """What a file that is not a video counts as."""
    if not name.startswith("."):
        if suffix == ".tar" or is_packed_tar(name):
            return TARS
        if suffix == ".parquet":
            return PARQUET
    return OTHERS


def _is_left_out(entry: os.DirEntry[str], listing: FolderListing) -> bool:
    is_hidden = entry.name.startswith(".") or entry.name.casefold() in SYSTEM_FOLDERS
    is_nameable = is_text(entry.name)
    listing.left_out[HIDDEN_FOLDERS] += is_hidden
    listing.left_out[UNNAMEABLE] += not is_nameable
    return is_hidden or not is_nameable


def escape_name(name: str) -> str:
    """A name as it can be written: each byte that is not UTF-8 becomes an escape sequence."""
    return name.encode(errors="backslashreplace").decode()


def format_name(name: str) -> str:
    """A name as people read it on a line: control characters, which a terminal would obey, become escape sequences."""
    return "".join(
        character.encode("unicode_escape").decode() if unicodedata.category(character) in UNSHOWN else character
        for character in escape_name(name)
    )


def is_text(name: str) -> bool:
    """Whether a name can be written as UTF-8; Linux allows any bytes, and a table does not."""
    try:
        name.encode()
        return True
    except UnicodeEncodeError:
        return False


def read_folder(
    path: str | Path, class_names: Sequence[str] | None = None, needs_labels: bool = True
) -> tuple[pa.Table, ClassLabel | None]:
    """List the videos below a folder in order of name; where they are in sub-folders, these are their classes.

    Args:
        path: The folder, or an address in an object store.
        class_names: Names of the classes by number; `None` = its sub-folders, sorted.
        needs_labels: Whether a few videos beside class folders are left out, so that the others have labels.

    Returns:
        Rows with `video` and, where there are classes, `label`; and the feature of the labels.

    Raises:
        ValueError: If there are no videos, or `class_names` lacks a sub-folder's name.
    """
    listing = list_store_folder(str(path)) if is_in_store(str(path)) else list_folder(path)
    listing.require_videos(path)
    inside = [video for video in listing.videos if len(video.parts) > 1]
    num_strays = len(listing.videos) - len(inside)
    is_labelled = inside and (not num_strays or needs_labels and num_strays < len(inside))
    if is_labelled:
        listing.videos = inside
        listing.left_out[STRAY] += num_strays
    listing.say(path)
    rows = pa.table({"video": pa.array([video.path for video in listing.videos], pa.string())})
    if not is_labelled or not needs_labels:
        return rows, None
    if listing.empty:
        logger.warning("%s: the sub-folders %s have no videos and are not classes.", path, listing.empty)
    names = pa.chunked_array([[normalize_name(video.parts[0]) for video in inside]])
    # A link may lead to a name that is not UTF-8.
    identities = pa.chunked_array([[escape_name(video.identity) for video in inside]])
    coding = _encode(names, identities, str(path), class_names)
    return rows.append_column("label", coding.encode(names)), coding.feature


def _encode(
    labels: pa.ChunkedArray, identities: pa.ChunkedArray, source: str, class_names: Sequence[str] | None
) -> LabelCoding:
    found = sorted(labels.unique().to_pylist())
    warn_of_split_folders(source, found)
    if class_names is None:
        warn_of_case(source, found)
    names = found if class_names is None else list(class_names)
    if unknown := sorted(set(found) - {normalize_name(name) for name in names}):
        raise ValueError(
            f"{source}: the sub-folders {shorten(unknown)} are not classes; the classes are {shorten(names)}."
        )
    # The names of folders are names, though they may be digits.
    coding = encode_labels(labels, identities, source, names)
    assert coding is not None, "Every video has a folder."
    return coding
