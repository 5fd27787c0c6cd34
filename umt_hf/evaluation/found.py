"""What a run has found, counted without reading a video, and which videos two sets of it share."""

import itertools
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pyarrow.compute
from datasets import Dataset

from ..data.key_frames import KeyFrame
from ..data.lists.paths import is_url
from ..processing.media_files import find_holder

logger = logging.getLogger(__name__)

# Held-out files that are looked for before a run starts; more would take long on a network disk.
MOST_LOOKED_FOR = 10_000
BYTES_NAME = re.compile(r" of \d+ bytes$")
# Of fewer files the links are found one by one, not by listing their folder, which may hold millions of others.
MIN_TO_LIST = 256
NAMED_FILES = 3
NAMES_AT_ONCE = 100_000


def list_names(table: Dataset) -> list[str]:
    """What stands for each video of a table: its path, or its name and number of bytes; no bytes are read.

    Args:
        table: With `video`. Rows of bytes without a name count as different videos.
    """
    flat: Any = table.select_columns(["video"]).flatten()
    if "video" in flat.column_names:
        return [str(video) if video else f"row {row}" for row, video in enumerate(flat["video"][:])]
    paths = flat["video.path"][:] if "video.path" in flat.column_names else [None] * len(flat)
    sizes = _measure_bytes(flat) if "video.bytes" in flat.column_names else [None] * len(flat)
    return [_name(row, path, size) for row, (path, size) in enumerate(zip(paths, sizes, strict=True))]


def iterate_names(table: Dataset) -> Iterator[str]:
    """The same for a long table, of which only a part is held at a time."""
    for start in range(0, len(table), NAMES_AT_ONCE):
        part: Any = table.select(range(start, min(start + NAMES_AT_ONCE, len(table))))
        yield from list_names(part)


def _name(row: int, path: str | None, num_bytes: int | None) -> str:
    # The path of a row with bytes is often a mere file name, which videos of several folders share.
    if not path:
        return f"row {row}"
    return f"{os.path.basename(path)} of {num_bytes} bytes" if num_bytes else path


def _measure_bytes(flat: Any) -> list[int | None]:
    """Number of bytes of each row, from Arrow's offsets alone."""
    sizes = pyarrow.compute.call_function("binary_length", [flat.data.column("video.bytes")]).to_pylist()
    rows = flat._indices
    return sizes if rows is None else [sizes[row] for row in rows.column(0).to_pylist()]


def name_media(videos: Iterable[Any]) -> list[str]:
    """The same of videos that are loaded already: paths, or `{"path", "bytes"}`."""
    pairs = ((video.get("path"), video.get("bytes")) if isinstance(video, dict) else (video, None) for video in videos)
    return [_name(row, path, len(content or b"")) for row, (path, content) in enumerate(pairs)]


def refuse_missing(names: Iterable[str], role: str, allowed_ratio: float = 0.0) -> None:
    """Refuse held-out data whose files are not there, before a run that could not be tested; a few are warned of.

    Args:
        names: Of the videos, as `list_names` gives them; not looked for are URLs, bytes, and more than
            `MOST_LOOKED_FOR` files.
        role: Of the data: "validation", "test".
        allowed_ratio: Share of the names that may be unreadable when the model is tested.

    Raises:
        ValueError: If more of them are missing.
    """
    rows = list(names)
    different = set(rows)
    files = [name for name in different if not (is_url(name) or name.startswith("row ") or BYTES_NAME.search(name))]
    if len(files) > MOST_LOOKED_FOR:
        return
    missing = {file for file in files if not os.path.exists(find_holder(file))}
    if not missing:
        return
    found = f"{len(missing)} of {len(different)} {role} videos are not there, such as {min(missing)}"
    if sum(row in missing for row in rows) > allowed_ratio * len(rows):
        raise ValueError(f"{found}: correct the list, or the folder that its paths start from, before training.")
    logger.warning("%s.", found)


def resolve_places(names: Sequence[str]) -> list[str]:
    """Where files are, links followed, for a fraction of what `os.path.realpath` of each costs on a network disk.

    A folder is resolved once, and only names that are links are looked at.

    Args:
        names: Paths; URLs and names of bytes stay as they are.
    """
    split = [None if is_url(name) or name.startswith("row ") else os.path.split(name) for name in names]
    own: dict[str, list[str]] = {}
    for place in split:
        if place is not None:
            own.setdefault(place[0], []).append(place[1])
    # With the separator behind it, so that names are only appended.
    folders = {folder: os.path.join(os.path.realpath(folder), "") for folder in own}
    links = {folder: _find_links(folder, files) for folder, files in own.items()}
    return [
        name
        if place is None
        else os.path.realpath(name)
        if place[1] in links[place[0]]
        else folders[place[0]] + place[1]
        for name, place in zip(names, split, strict=True)
    ]


def _find_links(folder: str, files: list[str]) -> set[str]:
    """Which of a folder's files are links."""
    if len(files) < MIN_TO_LIST:
        return {file for file in files if os.path.islink(os.path.join(folder, file))}
    try:
        with os.scandir(folder or ".") as entries:  # the type of an entry comes with its name
            return {entry.name for entry in entries if entry.is_symlink()}
    except OSError:  # said where its videos are read
        return set()


def list_shared(train: Iterable[str], held_out: dict[str, Sequence[str]], kind: str = "videos") -> list[str]:
    """A sentence for each held-out set that shares videos with the training set.

    Args:
        train: Names of the training videos, as `list_names` or `iterate_names` gives them.
        held_out: Names of held-out videos by role.
        kind: What a name stands for, in the plural.
    """
    places_of = {role: dict(zip(resolve_places(names), names, strict=True)) for role, names in held_out.items()}
    tested = {place for places in places_of.values() for place in places if not place.startswith("row ")}
    known: set[str] = set()
    names_left = iter(train)
    # Of the training videos no more is kept than what is held out too.
    while tested and (names := list(itertools.islice(names_left, NAMES_AT_ONCE))):
        known |= tested.intersection(resolve_places(names))
    doubts = []
    for role, places in places_of.items():
        if shared := sorted(name for place, name in places.items() if place in known):
            named = ", ".join(shared[:NAMED_FILES]) + (" ..." if len(shared) > NAMED_FILES else "")
            doubts.append(
                f"{len(shared)} of {len(places)} {role} {kind} are training {kind}, so that their figures say "
                f"nothing of new {kind}: {named}."
            )
    return doubts


def count_texts(num_videos: int, num_texts: int, kind: str = "captions", media: str = "videos") -> str:
    """Words such as: 6 videos with 12 captions (2.0 per video)."""
    share = f" ({num_texts / num_videos:.1f} per {media[:-1]})" if num_videos and num_texts != num_videos else ""
    return f"{num_videos:,} {media} with {num_texts:,} {kind}{share}"


def count_key_frames(frames: Sequence[KeyFrame]) -> str:
    """Words such as: 24 key frames with 40 boxes of people, in 3 videos."""
    num_boxes, num_videos = sum(len(frame.boxes) for frame in frames), len({frame.name for frame in frames})
    return f"{len(frames):,} key frames with {num_boxes:,} boxes of people, in {num_videos:,} videos"


def describe_questions(table: Dataset) -> str:
    """Words such as: 4 videos with 9 questions (2.2 per video) and 5 different answers."""
    answers = {answer for own in table["answers"] for answer in own}
    found = f" and {len(answers):,} different answers" if answers else ", without answers"
    return count_texts(len(set(list_names(table))), len(table), "questions") + found


def describe_choices(table: Dataset) -> str:
    """Words such as: 5 videos with 5 questions, each of 4 captions."""
    counts = sorted({len(options) for options in table["caption"]})
    each = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return count_texts(len(set(list_names(table))), len(table), "questions") + f", each of {each} captions"


def join_roles(found: dict[str, str]) -> str:
    """One line of what was found for each role: "training: 24 videos ...; validation: 6 videos ..."."""
    return "; ".join(f"{role}: {text}" for role, text in found.items()) + "."


Announce = Callable[[str], object]
