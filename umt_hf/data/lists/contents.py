"""What a folder of data holds, and as what it is read: videos, tars or Parquet files. One rule for all scripts."""

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ...processing.frame_folders import holds_frames
from .folders import SYSTEM_FOLDERS, UNPACKING, VIDEO_SUFFIXES, is_folder, is_packed_tar
from .sharing import find_once

logger = logging.getLogger(__name__)

NAMED_FILES = 3


@dataclass
class FolderContents:
    """Files below a folder, hidden ones and folders of systems left out.

    Args:
        num_videos: Video files, and folders of frames without tars beside them.
        num_parquet: Parquet files.
        tars: Tars without compression, in order of their paths.
        packed: Tars with compression.
    """

    num_videos: int = 0
    num_parquet: int = 0
    tars: list[str] = field(default_factory=list)
    packed: list[str] = field(default_factory=list)

    @property
    def is_of_tars(self) -> bool:
        """Whether the folder is read as tars.

        Beside videos a tar is what they were unpacked from; a Parquet file beside tars describes them.
        """
        return bool(self.tars) and not self.num_videos

    @property
    def is_of_parquet(self) -> bool:
        """Whether the folder is read as Parquet files."""
        return self.num_parquet > 0 and not self.is_of_tars


def look_through(folder: str | os.PathLike) -> FolderContents:
    """Find what is below a folder, through links too; once for all processes of a machine that start together."""

    def write(path: Path) -> None:
        path.write_text(json.dumps(asdict(_look(folder))), encoding="utf-8")

    found = find_once(f"{os.path.abspath(folder)} holds", write)
    return _look(folder) if found is None else FolderContents(**json.loads(found.read_text(encoding="utf-8")))


def _look(folder: str | os.PathLike) -> FolderContents:
    contents = FolderContents()
    for place, names in _walk(os.fspath(folder), set()):
        suffixes = [os.path.splitext(name)[1].lower() for name in names]
        tars = [name for name, suffix in zip(names, suffixes, strict=True) if suffix == ".tar"]
        contents.tars += [os.path.join(place, name) for name in tars]
        contents.packed += [os.path.join(place, name) for name in names if is_packed_tar(name)]
        contents.num_parquet += suffixes.count(".parquet")
        num_videos = sum(suffix in VIDEO_SUFFIXES for suffix in suffixes)
        contents.num_videos += num_videos or (not tars and holds_frames(place))
    contents.tars.sort()
    contents.packed.sort()
    return contents


def _walk(folder: str, visited: set[str]) -> Iterator[tuple[str, list[str]]]:
    """Names of the files in a folder and in each below it, each folder once."""
    if (real := os.path.realpath(folder)) in visited:
        return
    visited.add(real)
    try:
        with os.scandir(folder) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError:
        return  # it is said where videos are listed
    below = [entry for entry in shown if is_folder(entry)]
    yield folder, [entry.name for entry in shown if not is_folder(entry)]
    for entry in sorted(below, key=lambda entry: entry.name):
        if entry.name.casefold() not in SYSTEM_FOLDERS:
            yield from _walk(entry.path, visited)


def refuse_packed(source: str, packed: list[str]) -> None:
    """Refuse tars with compression, which cannot be read at random.

    Raises:
        ValueError: With their names and how to unpack them, if there are any.
    """
    if not packed:
        return
    names = [os.path.relpath(path, source) if os.path.isdir(source) else os.path.basename(path) for path in packed]
    named = ", ".join(names[:NAMED_FILES]) + (" ..." if len(names) > NAMED_FILES else "")
    command = UNPACKING[os.path.splitext(names[0])[1].lower()]
    raise ValueError(
        f"{source}: {len(names)} tar(s) with compression ({named}): no video in one can be read by itself. Remove "
        f"the compression (`{command} {names[0]}`), or move them elsewhere."
    )


def say_left_out(source: str, read: str, left_out: dict[str, int]) -> None:
    """Warn in one line of what a folder holds and is not read.

    Args:
        source: The folder.
        read: What is read of it, in words.
        left_out: Number of files by kind; those that are 0 are not said.
    """
    if counts := [f"{count} {kind}" for kind, count in left_out.items() if count]:
        logger.warning("%s: %s; left out: %s.", source, read, ", ".join(counts))
