"""Clips around a key frame, from one video or from a folder with a file per second, as AVA is cut."""

import os
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import accumulate

import numpy as np

from .decoding import DecoderName, VideoDecodingError, VideoReader, VideoSource, open_video
from .frame_folders import holds_frames

SECOND_NAMES = ("{}.mp4", "{:04d}.mp4")


def read_key_clip(
    source: VideoSource,
    offsets: Sequence[int],
    *,
    key_seconds: float | None = None,
    key_frame: int | None = None,
    decoder: DecoderName = "pyav",
) -> np.ndarray:
    """Read frames around a key frame; past the ends of the video its first or last frame takes their place.

    Args:
        source: A video, or a folder of numbered pictures, which needs `key_frame`; or a folder of files of one second
            each, `<second>.mp4`: the key frame is the first of its second, and the neighbouring files join without a
            gap.
        offsets: Distances from the key frame, in frames (see `compute_key_frame_offsets`).
        key_seconds: When the key frame is shown: the first frame at or after that time. A folder needs an integer.
        key_frame: Number of the key frame instead.
        decoder: Video reader.

    Returns:
        RGB frames, uint8 `(len(offsets), height, width, 3)`.

    Raises:
        ValueError: If not exactly one of `key_seconds` and `key_frame` is given, or not what a folder needs.
        VideoDecodingError: If a file cannot be read, or the key frame is outside the video.
    """
    if (key_seconds is None) == (key_frame is None):
        raise ValueError("Give key_seconds or key_frame, one of them.")
    if isinstance(source, str | os.PathLike) and os.path.isdir(source) and not holds_frames(source):
        if key_seconds is None or key_seconds != int(key_seconds):
            raise ValueError(f"{source}: a folder of files of one second needs key_seconds, an integer.")
        return _read_seconds(os.fspath(source), int(key_seconds), offsets, decoder)
    with open_video(source, decoder) as reader:
        key = key_frame if key_seconds is None else _find_frame(reader, key_seconds)
        assert key is not None  # one of the two is given
        if not 0 <= key < reader.num_frames:
            raise VideoDecodingError(
                f"{reader.name}: has {reader.num_frames} frames, so key frame {key} is outside the video."
            )
        return reader.get_frames([min(max(key + offset, 0), reader.num_frames - 1) for offset in offsets])


def _find_frame(reader: VideoReader, seconds: float) -> int:
    """Number of the first frame at or after a time; of the last one within the length of a frame after its start."""
    timestamps = reader.compute_timestamps()
    key = int(np.searchsorted(timestamps, seconds - 1e-4))
    if key == reader.num_frames and reader.fps and seconds < timestamps[-1] + 1 / reader.fps:
        return key - 1
    return key if seconds >= 0 else -1


def _read_seconds(folder: str, second: int, offsets: Sequence[int], decoder: DecoderName) -> np.ndarray:
    with ExitStack() as stack:
        ahead = _open_seconds(stack, folder, second, 1, max(*offsets, 0) + 1, decoder)
        if not ahead:
            raise VideoDecodingError(f"{folder}: has no file {second}.mp4, the second of the key frame.")
        behind = _open_seconds(stack, folder, second - 1, -1, -min(*offsets, 0), decoder)[::-1]
        # Number of the first frame of each file, counted from the key frame.
        ends = list(accumulate(reader.num_frames for reader in behind + ahead))
        before = ends[len(behind) - 1] if behind else 0
        starts = [end - reader.num_frames - before for end, reader in zip(ends, behind + ahead, strict=True)]
        clamped = [min(max(offset, starts[0]), ends[-1] - before - 1) for offset in offsets]
        parts = [bisect_right(starts, offset) - 1 for offset in clamped]
        frames: dict[int, np.ndarray] = {}
        for part in dict.fromkeys(parts):
            wanted = sorted({offset for offset, place in zip(clamped, parts, strict=True) if place == part})
            found = (behind + ahead)[part].get_frames([offset - starts[part] for offset in wanted])
            frames |= dict(zip(wanted, found, strict=True))
    if len({frame.shape for frame in frames.values()}) > 1:
        raise VideoDecodingError(f"{folder}: the files around second {second} have frames of different sizes.")
    return np.stack([frames[offset] for offset in clamped])


def _open_seconds(
    stack: ExitStack, folder: str, second: int, step: int, num_frames: int, decoder: DecoderName
) -> list[VideoReader]:
    """Open neighbouring files until they hold `num_frames` frames, or the movie ends."""
    readers: list[VideoReader] = []
    while sum(reader.num_frames for reader in readers) < num_frames and second >= 0:
        paths = [os.path.join(folder, name.format(second)) for name in SECOND_NAMES]
        path = next((path for path in paths if os.path.isfile(path)), None)
        if path is None:
            break
        readers.append(stack.enter_context(open_video(path, decoder)))
        second += step
    return readers
