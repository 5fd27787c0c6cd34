# Copyright 2026 The umt_hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Read chosen frames of a video file: with `containers`, the only module that knows a video reader.

`open_video` gives a `VideoReader`, the same small interface whichever library decodes:

- `pyav` (default): frame-exact. Index `i` gives the `i`-th frame that decoding the complete file in order
  yields, whatever the container does to its timestamps.
- `decord`: what the published code reads with; the kinds of file that it reads wrong are refused.
- `torchcodec`: needs the FFmpeg libraries of the system; as for decord, what it reads wrong is refused.

A `.npy` file of decoded frames and a folder of numbered pictures are read directly, whatever the decoder: training
that reads short clips repeatedly need not decode them each time. So are the frames that `umt-hf prepare` keeps.

Readers are cheap to open. Open them in the worker that uses them: they cannot be shared between processes.
"""

import contextlib
import functools
import io
import operator
import os
import re
import shutil
import tempfile
import tokenize
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image

from .containers import (
    INDEXED_CODECS,
    INDEXED_CONTAINERS,
    PROGRESSIVE_FIELD_ORDERS,
    NamedMedia,
    OneWayFile,
    PacketIndex,
    PyAVFrames,
    build_packet_index,
    choose_stream,
    describe_address,
    describe_key_frames,
    describe_playlist,
    import_torchcodec,
    is_cover,
    open_container,
    open_one_way,
    open_url,
    read_orientation,
    read_packets,
)
from .frame_folders import holds_frames, list_frames
from .images import read_image
from .media_files import (
    LIMITS,
    MP4_TOP_LEVEL_BOXES,
    WAIT_SECONDS,
    GrowingFile,
    MediaFile,
    VideoDecodingError,
    VideoSource,
    find_file,
    open_source,
    unwrap_row,
)

DecoderName = Literal["pyav", "decord", "torchcodec"]

ITERATED_FRAMES = 16  # decoded at a time by readers that do not give frames singly

# Decoders whose output does not change when the frames that no other frame refers to are left out.
SKIPPING_CODECS = ("h264", "hevc")
MAX_SANE_SECONDS = 10_000_000  # timestamps beyond make decord end the process
KEY_FRAME_NAMES = {"open": "open groups of pictures", "gradual": "intra-refresh"}

ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
# Not ".mjpeg" alone, which cameras write: such a file has a frame rate.
STORED_SUFFIX = ".frames.mjpeg"
SPREAD_STRATEGIES = ("segments", "uniform", "middle")  # over all of a video, whatever its frames are apart
JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"


class VideoReader(NamedMedia, ABC):
    """An open video file.

    Attributes:
        name: What errors call the file: its path, its URL, or a description of the bytes given.
        num_frames: Number of frames that can be asked for.
        fps: Average frames per second; `None` where the file does not state it.
        has_gaps: Whether these are some frames of a video, so that neighbours are not those of the video.
    """

    name: str
    num_frames: int
    fps: float | None
    has_gaps: bool = False

    @abstractmethod
    def _decode(self, indices: list[int]) -> np.ndarray:
        """Decode frames at distinct, rising indices into uint8 RGB `(len(indices), height, width, 3)`."""

    def get_frames(self, indices: Sequence[int]) -> np.ndarray:
        """Decode frames.

        Args:
            indices: Frame numbers from 0 to `num_frames - 1`, in any order; repeats are decoded once.

        Returns:
            RGB frames, uint8 `(len(indices), height, width, 3)`, upright (turned and mirrored as the file says), in
            the order asked for.

        Raises:
            IndexError: If an index is outside the video.
            VideoDecodingError: If a frame cannot be decoded, or more are asked for than `LIMITS` allows.
        """
        indices = [operator.index(i) for i in indices]
        outside = [i for i in indices if not 0 <= i < self.num_frames]
        if outside or not indices:
            raise IndexError(f"{self.name}: frames {outside or indices} asked of a video of {self.num_frames} frames.")
        distinct, places = np.unique(indices, return_inverse=True)
        LIMITS.check_num_frames(self.name, len(indices))
        with self._named_errors():
            frames = self._decode(distinct.tolist())
        return frames if distinct.tolist() == indices else frames[places]

    def iterate_frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Decode frames one by one, holding no more than a few: for videos too long to decode at once.

        Args:
            indices: Distinct, rising frame numbers, at least one.

        Yields:
            RGB frames, uint8 `(height, width, 3)`, as `get_frames` gives them.

        Raises:
            VideoDecodingError: If a frame cannot be decoded.
        """
        for start in range(0, len(indices), ITERATED_FRAMES):
            yield from self.get_frames(indices[start : start + ITERATED_FRAMES])

    def check_strategy(self, strategy: str) -> None:
        """Refuse to choose frames at distances where frames in between are missing.

        Args:
            strategy: As for `sampling.sample_frame_indices`.

        Raises:
            ValueError: If it counts frames or seconds, and only some frames of the video were kept.
        """
        if self.has_gaps and strategy not in SPREAD_STRATEGIES:
            raise ValueError(
                f"{self.name}: holds {self.num_frames} frames of a video, which sampling_strategy={strategy} cannot "
                f"choose from. Set it to {' or '.join(SPREAD_STRATEGIES)}, or read the video itself."
            )

    def compute_timestamps(self) -> np.ndarray:
        """Seconds from the first frame to each, float64 `(num_frames,)`, rising.

        Only `pyav` knows frames that are spaced unevenly; other readers count with the average rate.

        Raises:
            VideoDecodingError: If the file states neither the times of its frames nor their rate.
        """
        if not self.fps:
            raise self._error("has no frame rate, so its frames have no times. Re-encode it.")
        return np.arange(self.num_frames) / self.fps

    @functools.cached_property
    def _upright_size(self) -> tuple[int, int]:
        height, width = self.get_frames([0]).shape[1:3]
        return height, width

    @property
    def height(self) -> int:
        """Height in pixels of the upright frames (decodes the first one)."""
        return self._upright_size[0]

    @property
    def width(self) -> int:
        """Width in pixels of the upright frames (decodes the first one)."""
        return self._upright_size[1]

    @property
    def duration_seconds(self) -> float | None:
        """`num_frames / fps`; `None` where the file does not state its frame rate."""
        return self.num_frames / self.fps if self.fps else None

    @abstractmethod
    def close(self) -> None:
        """Release the file."""

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_video(source: VideoSource, decoder: DecoderName = "pyav") -> VideoReader:
    """Open a video for reading frames by index; use it in a `with` block.

    Nothing but the file given is read: playlists and other files that name further ones are refused, whatever their
    suffix. How much a file may ask for is bounded by `media_files.LIMITS`.

    Args:
        source: A path, an http(s) or file URL, the bytes of a file, a binary file object (read from its start), or a
            row `{"path", "bytes"}`. An http(s) video is downloaded into memory first. A path that ends in `.npy` is a
            file of decoded frames, uint8 RGB `(T, H, W, 3)`; one of a folder of numbered pictures is a video too. A
            name that ends in `.frames.mjpeg` is one of a few frames, JPEG pictures one after the other.
        decoder: Library that decodes.

    Raises:
        VideoDecodingError: If there is no such file, or it holds no video, is cut short, exceeds a limit or cannot be
            decoded.
        ImportError: If the library of `decoder` is missing or does not work.
        ValueError: If `decoder` is not one of the three.

    Examples:
        >>> from umt_hf.processing.decoding import open_video
        >>> with open_video("video.mp4") as video:
        ...     frames = video.get_frames([0, 10, 20])
        >>> frames.shape, frames.dtype
        ((3, 256, 256, 3), dtype('uint8'))
    """
    if decoder not in READERS:
        raise ValueError(f"decoder must be one of {sorted(READERS)}, got {decoder!r}.")
    source = unwrap_row(source)
    if isinstance(source, str | os.PathLike) and os.path.isdir(folder := find_file(os.fsdecode(source))):
        return FrameFolderReader(folder)
    media = open_source(source)
    try:
        if media.path is not None and media.path.endswith(".npy"):
            return DecodedFramesReader(media)
        if media.name.endswith(STORED_SUFFIX):
            return StoredFramesReader(media)
        return READERS[decoder](media)
    except BaseException:
        media.close()
        raise


class DecodedFramesReader(VideoReader):
    """Frames decoded before: a NumPy file, mapped into memory, of uint8 RGB `(T, H, W, 3)`, with no frame rate."""

    fps = None

    def __init__(self, media: MediaFile):
        self.name = media.name
        try:
            # Arrays of objects could run code: `np.load` refuses them by default.
            frames = np.load(str(media.path), mmap_mode="r")
        except (ValueError, OSError, EOFError, OverflowError, TypeError, SyntaxError, tokenize.TokenError) as error:
            raise self._error(f"is not a complete NumPy array ({error}). Write it again or leave it out.") from error
        finally:
            media.close()
        if not isinstance(frames, np.ndarray):
            frames.close()  # an archive
            raise self._error("is an archive of NumPy arrays (.npz). Write the array of frames alone, as .npy.")
        shape, dtype = frames.shape, frames.dtype
        if len(shape) != 4 or shape[-1] != 3 or 0 in shape or dtype != np.uint8:
            raise self._error(
                f"holds {dtype} of shape {shape}; decoded frames are uint8 RGB (frames, height, width, 3)."
            )
        LIMITS.check_frame_size(self.name, *shape[1:3])
        self._frames = frames
        self.num_frames = shape[0]

    def _decode(self, indices: list[int]) -> np.ndarray:
        return np.asarray(self._frames[indices])

    def close(self) -> None:
        """Drop the map; the frames given out are copies."""
        self._frames = np.empty((0, 0, 0, 3), np.uint8)


class FrameFolderReader(VideoReader):
    """A folder of numbered pictures of one size, a frame each in the order of their numbers, with no frame rate."""

    fps = None

    def __init__(self, folder: str):
        self.name = folder
        self._paths = list_frames(folder)
        if not self._paths:
            raise self._error("is not a file, nor a folder of numbered pictures. Check the path.")
        if len(self._paths) > 1 and not holds_frames(folder):
            raise self._error(
                "has pictures whose names differ in more than one number, so that their order is not known. Number "
                "them (frame_0001.jpg, ...), all with one suffix, and keep other pictures elsewhere."
            )
        self.num_frames = len(self._paths)

    def _decode(self, indices: list[int]) -> np.ndarray:
        frames = [read_image(self._paths[index])[0].permute(1, 2, 0).numpy() for index in indices]
        if len({frame.shape for frame in frames}) > 1:
            sizes = sorted({f"{frame.shape[1]} x {frame.shape[0]}" for frame in frames})
            raise self._error(f"has pictures of different sizes: {', '.join(sizes)}. Resize them to one size.")
        return np.stack(frames)

    def close(self) -> None:
        """Nothing is held open."""


class StoredFramesReader(VideoReader):
    """A few frames of a video, kept as JPEG pictures one after the other (`.frames.mjpeg`), with no frame rate."""

    fps = None
    has_gaps = True
    _backend_errors = (OSError, SyntaxError)

    def __init__(self, media: MediaFile):
        self.name = media.name
        try:
            media.file.seek(0)
            content = media.file.read()
        finally:
            media.close()
        if not (content.startswith(JPEG_START) and content.endswith(JPEG_END)):
            raise self._error("is not a complete row of JPEG pictures. Prepare it again or leave it out.")
        # Within a picture, 0xFF is followed by 0 or by the number of a restart.
        parts = content.split(JPEG_END + JPEG_START)
        last = len(parts) - 1
        self._pictures = [
            (JPEG_START if i else b"") + part + (JPEG_END if i < last else b"") for i, part in enumerate(parts)
        ]
        self.num_frames = len(self._pictures)

    def _decode(self, indices: list[int]) -> np.ndarray:
        frames = []
        for index in indices:
            with Image.open(io.BytesIO(self._pictures[index]), formats=["JPEG"]) as picture:
                LIMITS.check_frame_size(self.name, picture.height, picture.width)
                frames.append(np.asarray(picture.convert("RGB")))
        if len({frame.shape for frame in frames}) > 1:
            raise self._error("has pictures of different sizes. Prepare it again or leave it out.")
        return np.stack(frames)

    def close(self) -> None:
        """Drop the pictures."""
        self._pictures = []


class PyAVReader(PyAVFrames, VideoReader):
    """Frame-exact reader over PyAV.

    One pass over the packets, without decoding, gives the timestamp of every frame. A frame is then reached by seeking
    to the key frame before it and decoding from there; frames in between that no other frame refers to are left out.
    Where the timestamps cannot be trusted (see `INDEXED_CONTAINERS`) but packets can be counted (MPEG-TS, MPEG-PS,
    VP8, AVI), packets are passed over up to that key frame; the rest is decoded from its start. One thread decodes.

    Damaged pictures raise an error in H.264 and MPEG-4, whose decoders notice. Those of HEVC, VP8 and VP9 mostly do
    not: of 12 files with one bit flipped, 8 gave a damaged picture, as the `ffmpeg` command does.
    """

    def __init__(self, media: MediaFile):
        self._load_library()
        self.name = media.name
        self._media = media
        self._container: Any = None  # an InputContainer while the file is open
        self._stream_index: int | None = None
        self._frame_pts: list[int] | None = None  # of every frame, rising, where seeking works
        self._packet_index: PacketIndex | None = None  # where it does not, but packets can be counted
        try:
            with self._named_errors():
                self._open()
                rate = self._stream.average_rate or self._stream.guessed_rate
                self.fps = float(rate) if rate else None
                self._build_index()
                self.num_frames = self._count_frames()
            if not self.num_frames:
                raise self._error("holds no video frame. Replace it or leave it out.")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the container (left open, FFmpeg keeps its memory)."""
        if self._container is not None:
            self._container.close()
            self._container = None
        self._media.close()

    def _open(self) -> None:
        """Open the file at its start, closing it first where it is open."""
        if self._container is not None:
            self._container.close()
            self._container = None
        self._container = open_container(self._av, self._media.file, LIMITS.max_frame_pixels)
        if self._stream_index is None:
            self._stream_index, was_read = self._choose_stream()
            if was_read:
                self._open()  # at its start again
                return
        self._stream = self._container.streams[self._stream_index]
        self._codec = self._stream.codec_context
        self._set_up_codec(self._codec)

    def _choose_stream(self) -> tuple[int, bool]:
        index, was_read = choose_stream(self._container)
        if index is not None:
            return index, was_read
        raise self._report_no_stream(self._container.streams.video)

    def _describe_playlist(self) -> str | None:
        return describe_playlist(self._media.file)

    def _build_index(self) -> None:
        """Note the timestamp of every frame and key frame, where one packet is one frame."""
        is_indexable = (
            self._container.format.name.startswith(INDEXED_CONTAINERS)
            and self._codec.name in INDEXED_CODECS
            and int(getattr(self._codec, "field_order", 0)) in PROGRESSIVE_FIELD_ORDERS
        )
        if not is_indexable:
            packets = self._demux()
            self._packet_index = build_packet_index(packets, self._container.format.name, self._codec)
            return
        packet_pts, key_pts, frame_pts = [], [], []
        for packet in self._demux():
            if packet.size == 0:
                continue
            if packet.is_corrupt:
                raise self._error(f"is cut short at frame {len(packet_pts)}. Fetch it again or leave it out.")
            packet_pts.append(packet.pts)
            if packet.is_keyframe:
                key_pts.append(packet.pts)
            if not packet.is_discard:  # an edit list hides the frames before the cut; they only serve as references
                frame_pts.append(packet.pts)
        if None in packet_pts or len(set(packet_pts)) < len(packet_pts) or not frame_pts:
            return
        frame_pts.sort()
        if not key_pts or key_pts != sorted(key_pts) or key_pts[0] > frame_pts[0]:
            return
        self._frame_pts, self._key_pts = frame_pts, key_pts
        self._packet_order = {pts: order for order, pts in enumerate(packet_pts)}

    def find_unusual(self, allows_open_key_frames: bool, allows_edit_lists: bool) -> str | None:
        """Say what about the file other libraries are known to read wrong; `None` for an ordinary one.

        Args:
            allows_open_key_frames: Whether pictures may refer to ones before the last key frame.
            allows_edit_lists: Whether the container may hide frames.
        """
        if self._frame_pts is None:
            interlaced = int(getattr(self._codec, "field_order", 0)) not in PROGRESSIVE_FIELD_ORDERS
            kind = " interlaced" if interlaced else ""
            return f"{self._codec.name}{kind} in {self._container.format.name.split(',')[0]}"
        if len(self._container.streams.video) > 1:
            return f"{len(self._container.streams.video)} video streams"
        base = float(self._stream.time_base)
        if self._frame_pts[0] < 0 or self._frame_pts[-1] * base > MAX_SANE_SECONDS:
            return f"times from {self._frame_pts[0] * base:.3g} to {self._frame_pts[-1] * base:.3g} seconds"
        if not allows_edit_lists and len(self._packet_order) > len(self._frame_pts):
            return "an edit list that hides frames"
        self._open()
        first = next(self._decode_all(), None)
        if first is not None and read_orientation(first).is_mirrored:
            return "a display matrix that mirrors"
        self._open()
        key_frames = describe_key_frames(self._codec.name, self._demux())
        if key_frames == "gradual" or (key_frames == "open" and not allows_open_key_frames):
            return f"pictures that refer to ones before the last key frame ({KEY_FRAME_NAMES[key_frames]})"
        return None

    def _count_frames(self) -> int:
        if self._frame_pts is not None:
            return len(self._frame_pts)
        if self._packet_index is not None:
            return self._packet_index.num_frames
        self._open()
        self._decoded_pts = [frame.pts for frame in self._decode_all()]
        return len(self._decoded_pts)

    def compute_timestamps(self) -> np.ndarray:
        """Seconds from the first frame to each, from the container; evenly spaced where it cannot be trusted."""
        if self._packet_index is not None:
            pts = self._packet_index.pts
        else:
            pts = self._decoded_pts if self._frame_pts is None else self._frame_pts
        known = [value for value in pts if value is not None]
        if len(known) < len(pts) or any(later <= earlier for earlier, later in zip(known, known[1:], strict=False)):
            return super().compute_timestamps()
        time_base = self._stream.time_base
        assert time_base is not None  # a stream whose frames have timestamps has one
        return (np.array(known) - known[0]) * float(time_base)

    def iterate_frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Decode frames in one pass from the start of the file, holding one at a time; see `VideoReader`."""
        size = None
        with self._named_errors():
            for i, frame in self._pass_over(indices):
                pixels = self._to_upright_rgb(frame)
                if size is not None and pixels.shape != size:
                    raise self._error(f"changes its frame size at frame {i}. Re-encode it at one size.")
                size = pixels.shape
                yield pixels

    def _pass_over(self, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Number and PyAV frame of each of `indices`, in one pass."""
        given = 0
        is_sparse = len(indices) < indices[-1] - indices[0] + 1
        if is_sparse and self._frame_pts is not None and self._codec.name in SKIPPING_CODECS:
            for frame in self._decode_sparse([self._frame_pts[i] for i in indices]):
                yield indices[given], frame
                given += 1
        if given == len(indices):
            return
        wanted, last = set(indices[given:]), indices[-1]  # all, where the file does not match its index
        self._open()
        for i, frame in enumerate(self._decode_all()):
            if i in wanted:
                yield i, frame
            if i == last:
                return
        raise self._error(f"ends before frame {last}. Fetch it again or leave it out.")

    def _decode_sparse(self, wanted: list[int]) -> Iterator[Any]:
        """Frames at rising timestamps, without those in between that no other refers to; ends where one is missing."""
        self._open()
        kept, place, previous_pts = set(wanted), 0, None
        for packet in self._packets_up_to(max(wanted, key=self._packet_order.__getitem__)):
            if packet is not None:
                self._codec.skip_frame = "DEFAULT" if packet.pts in kept else "NONREF"
            for frame in self._codec.decode(packet):
                # Timestamps that do not follow the order of the pictures, or a picture that did not come.
                if frame.pts is None or (previous_pts is not None and frame.pts <= previous_pts):
                    return
                previous_pts = frame.pts
                if previous_pts > wanted[place]:
                    return
                if previous_pts == wanted[place]:
                    yield frame
                    place += 1
                    if place == len(wanted):
                        return

    def _decode(self, indices: list[int]) -> np.ndarray:
        frames = None
        if self._frame_pts is not None:
            frames = self._decode_from_key_frames(indices, self._frame_pts)
        elif self._packet_index is not None:
            frames = self._decode_stretches(self._packet_index, indices)
        if frames is None:
            frames = self._decode_from_start(indices)
        sizes = {frame.shape[:2] for frame in frames.values()}
        if len(sizes) > 1:
            raise self._error(f"changes its frame size ({sorted(sizes)}). Re-encode it at one size.")
        return np.stack([frames[i] for i in indices])

    def _decode_from_start(self, indices: list[int]) -> dict[int, np.ndarray]:
        self._open()  # afresh, since the formats that come here cannot be trusted to seek back either
        frames, wanted = {}, set(indices)
        for i, frame in enumerate(self._decode_all()):
            if i in wanted:
                frames[i] = self._to_upright_rgb(frame)
                if len(frames) == len(wanted):
                    return frames
        raise self._error(f"ends before frame {min(wanted - frames.keys())}. Fetch it again or leave it out.")

    def _decode_from_key_frames(self, indices: list[int], frame_pts: list[int]) -> dict[int, np.ndarray] | None:
        """Decode by seeking; `None` if the file does not match its index."""
        frames = {}
        for key, group in groupby(indices, key=lambda i: bisect_right(self._key_pts, frame_pts[i]) - 1):
            wanted = {frame_pts[i]: i for i in group}
            try:
                found = self._decode_group(self._key_pts[key], wanted)
            except self._av.FFmpegError:  # pictures after an open key frame may lean on ones before it
                return None
            if found is None or found.keys() != set(wanted.values()):
                return None
            frames.update(found)
        return frames

    def _decode_group(self, key_pts: int, wanted: dict[int, int]) -> dict[int, np.ndarray] | None:
        """Decode from one key frame on the frames of `wanted` (timestamp to index)."""
        last_pts = max(wanted, key=self._packet_order.__getitem__)
        self._container.seek(key_pts, stream=self._stream, backward=True)
        found, previous_pts, is_started = {}, key_pts - 1, False
        for packet in self._packets_up_to(last_pts):
            if packet is not None and not is_started:
                if self._packet_order.get(packet.pts, len(self._packet_order)) > self._packet_order[key_pts]:
                    return None  # the seek landed late
                is_started = packet.pts == key_pts
                if not is_started:
                    continue
            # Frames in between that no other frame refers to need not be decoded.
            if packet is not None and self._codec.name in SKIPPING_CODECS:
                self._codec.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            for frame in self._codec.decode(packet):
                if frame.pts is None or frame.pts < key_pts:
                    continue  # shown before the key frame: belongs to the group before it
                if frame.pts <= previous_pts:
                    return None  # timestamps do not follow the order of the pictures
                previous_pts = frame.pts
                if frame.pts in wanted:
                    found[wanted[frame.pts]] = self._to_upright_rgb(frame)
        return found

    def _decode_stretches(self, index: PacketIndex, indices: list[int]) -> dict[int, np.ndarray] | None:
        """Decode from the key frames before the frames asked for; `None` if frames do not come as numbered."""
        self._open()  # at the start, where packets are counted from
        wanted, frames = set(indices), {}
        packets = enumerate(self._demux())
        try:
            for first, last in index.plan(indices):
                previous = -1
                for frame in self._decode_numbered(packets, first, last, index):
                    if frame.pts is None or frame.pts <= previous:
                        return None
                    previous = frame.pts
                    # Shown before the key frame: leans on pictures in front of it.
                    if previous in wanted and previous >= (index.frames[first] or 0):
                        frames[previous] = self._to_upright_rgb(frame)
                self._codec.flush_buffers()
        except self._av.FFmpegError:
            return None
        return frames if frames.keys() == wanted else None

    def _decode_numbered(
        self, packets: Iterator[tuple[int, Any]], first: int, last: int, index: PacketIndex
    ) -> Iterator[Any]:
        """Frames of the packets `first` to `last`, whose timestamps are their numbers."""
        for number, packet in packets:
            if number < first or packet.size == 0:
                continue
            packet.pts, packet.dts = index.frames[number], None
            yield from (frame for frame in self._codec.decode(packet) if frame.pts is not None)
            if number == last:
                break
        yield from self._codec.decode(None)

    def _packets_up_to(self, last_pts: int) -> Iterator[Any]:
        """Yield packets from the current place to that of `last_pts`, then `None`, which empties the decoder."""
        for packet in self._demux():
            if packet.size == 0:
                continue
            yield packet
            if packet.pts == last_pts:
                break
        yield None


class VideoStream(PyAVFrames):
    """A video that is read once, from front to back, while it is written or sent: a pipe, a growing file, a socket.

    Args:
        source: Path of a file that grows, a binary file object, or with `protocol` a URL.
        protocol: That of the URL, one of `containers.STREAM_PROTOCOLS`; without it nothing is read from a network.
        wait_seconds: How long nothing may come from a file or a network before the stream is over.

    Raises:
        VideoDecodingError: If it holds no video, or cannot be read forwards.
        ValueError: If it names a network without `protocol`, or the protocol is unknown or not that of the URL.
    """

    def __init__(
        self, source: str | os.PathLike | BinaryIO, protocol: str | None = None, wait_seconds: float = WAIT_SECONDS
    ):
        self._load_library()
        self._file: OneWayFile | None = None
        self.name = os.fsdecode(source) if isinstance(source, str | os.PathLike) else str(getattr(source, "name", ""))
        self.name = self.name or "<stream>"
        self._container: Any = None
        try:
            with self._named_errors():
                if protocol is not None:
                    self._container = open_url(self._av, self.name, protocol, LIMITS.max_frame_pixels, wait_seconds)
                else:
                    is_path = isinstance(source, str | os.PathLike)
                    if is_path and ADDRESS.match(self.name):
                        raise ValueError(describe_address(self.name))
                    self._file = OneWayFile(GrowingFile(self.name, wait_seconds) if is_path else source)
                    self._container = open_one_way(self._av, self._file, LIMITS.max_frame_pixels)
                self._stream = self._choose_stream()
                self._set_up_codec(self._stream.codec_context)
        except VideoDecodingError as error:
            cause = self._report_no_frame() if self._container is None else None
            self.close()
            if self._file is not None:
                self._file.raise_error()
            raise (cause or error) from error
        except BaseException:
            self.close()
            raise

    def iterate(self) -> Iterator[tuple[float, Callable[[], np.ndarray]]]:
        """Decode frames as they come.

        Yields:
            Seconds since the first frame, rising, and a function that gives the frame, uint8 RGB `(height, width, 3)`.

        Raises:
            VideoDecodingError: If a frame cannot be decoded, or another size begins.
        """
        has_frames = False
        try:
            for frame in self._decode():
                has_frames = True
                yield frame
            if not has_frames:
                raise self._error("gives no video frame.")
        except VideoDecodingError as error:
            if not has_frames and (cause := self._report_no_frame()) is not None:
                raise cause from error
            raise

    def _decode(self) -> Iterator[tuple[float, Callable[[], np.ndarray]]]:
        rate = self._stream.average_rate or self._stream.guessed_rate
        time_base, step = float(self._stream.time_base), float(1 / rate) if rate else 0.0
        first_pts: int | None = None
        last: float | None = None
        size: tuple[int, int] | None = None
        is_started = False
        with self._named_errors():
            for packet in read_packets(self._av, self._container, self._stream, self._file):
                # Whoever comes in between key frames waits for the next one.
                is_started = is_started or packet.is_keyframe or not packet.size
                if not is_started:
                    continue
                for frame in packet.decode():
                    first_pts = frame.pts if last is None else first_pts
                    known = frame.pts is not None and first_pts is not None
                    seconds = (frame.pts - first_pts) * time_base if known else None
                    if seconds is None or (last is not None and seconds <= last):
                        seconds = 0.0 if last is None else last + step
                    last = seconds
                    if size not in (None, (frame.height, frame.width)):
                        raise self._error(f"changes its frame size after {last:.2f} s. Keep it at one size.")
                    size = frame.height, frame.width
                    yield last, functools.partial(self._to_upright_rgb, frame)

    def _report_no_frame(self) -> VideoDecodingError | None:
        """Why nothing, or an MP4, cannot be read forwards; `None` for anything else."""
        if self._file is not None and not self._file.head:
            return self._error("gives nothing: it is empty, or its sender has ended.")
        if self._file is None or self._file.head[4:8] not in MP4_TOP_LEVEL_BOXES:
            return None
        return self._error(
            "is an MP4 whose index is at its end, so that it can be read only when it is complete. Write it as "
            "MPEG-TS, Matroska or fragmented MP4 (`-movflags frag_keyframe+empty_moov`)."
        )

    def _choose_stream(self) -> Any:
        streams = [s for s in self._container.streams.video if s.codec_context is not None and not is_cover(s)]
        if not streams:
            raise self._report_no_stream(self._container.streams.video)
        return max(streams, key=lambda stream: stream.codec_context.width * stream.codec_context.height)

    def _describe_playlist(self) -> str | None:
        return None if self._file is None else describe_playlist(io.BytesIO(self._file.head))

    def close(self) -> None:
        """Close the container and a file that was opened here."""
        if self._container is not None:
            self._container.close()
            self._container = None
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> "VideoStream":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class CheckedReader(VideoReader):
    """A reader whose library gives wrong frames of some files in silence: `PyAVReader` looks at each file first.

    Read are MP4, MOV, Matroska and WebM with H.264, HEVC, VP9 or AV1, progressive and evenly or unevenly timed, that
    hold one video stream; a subclass says what else it cannot read. Everything else is refused by name.
    """

    library: str
    reads_open_key_frames = True
    reads_edit_lists = True

    def _check(self, media: MediaFile) -> int:
        """Refuse what the library reads wrong.

        Returns:
            Number of frames of the file.
        """
        kept_open = MediaFile(media.name, media.file)  # closing the check does not close the file
        exact = PyAVReader(kept_open)
        with exact, exact._named_errors():
            if kind := exact.find_unusual(self.reads_open_key_frames, self.reads_edit_lists):
                raise self._error(
                    f"is not read with decoder={self.library!r}, which gives wrong frames of such files in silence: "
                    f"{kind}. Use decoder='pyav', or re-encode it, for example to H.264 in MP4."
                )
            return exact.num_frames

    def _check_count(self, num_frames: int, expected: int) -> None:
        if num_frames != expected:
            raise self._error(
                f"is not read with decoder={self.library!r}, which finds {num_frames} frames where there are "
                f"{expected}. Use decoder='pyav'."
            )


class DecordReader(CheckedReader):
    """Reader over decord (package `decord2`, or decord 0.6), kept for parity with the published code.

    Measured on 629 files, decord gave wrong frames in silence for: MPEG-TS, MPEG-PS (progressive too), MXF, AVI with
    B-frames, MPEG-4 part 2 in MP4 and Matroska, open GOPs (the default of x265) and intra-refresh after a seek,
    Matroska that starts before time zero, and files cut by an edit list, whose hidden frames it counts; timestamps
    beyond any sense end the process. All of these are refused: of the 308 undamaged files of `make faults`, 0.6.0 and
    `decord2` 3.4.0 then gave no wrong frame. Damaged pictures come back patched up. decord 0.6 does not read AV1, each
    failed open leaks a little memory, and a reader made before a fork can hang.
    """

    library = "decord"
    reads_open_key_frames = False
    reads_edit_lists = False

    def __init__(self, media: MediaFile):
        try:
            import decord
        except ImportError as error:
            raise ImportError(
                "decoder='decord' needs decord: `pip install decord2`, which is imported as `decord`."
            ) from error
        self._backend_errors = (RuntimeError, decord.base.DECORDError)
        self.name = media.name
        self._reader: Any = None
        expected = self._check(media)
        self._folder = None
        try:
            with self._named_errors():
                self._reader = decord.VideoReader(self._name_plainly(media), ctx=decord.cpu(0), num_threads=1)
                self.num_frames = len(self._reader)
                self.fps = float(self._reader.get_avg_fps()) or None
            self._check_count(self.num_frames, expected)
        except BaseException:
            self.close()
            raise
        finally:
            media.close()

    def _name_plainly(self, media: MediaFile) -> str:
        """A path that decord takes for nothing but a file: not a pattern, and with a suffix; bytes are written to it.

        (It reads no MP4 given as a file object.)
        """
        if media.path is not None and "%" not in media.path and Path(media.path).suffix.lower() in PLAIN_SUFFIXES:
            return media.path
        self._folder = tempfile.TemporaryDirectory(prefix="umt_hf_")
        path = os.path.join(self._folder.name, "video.mp4")
        if media.path is not None:
            with contextlib.suppress(OSError):  # Windows allows links to few
                os.symlink(media.path, path)
                return path
        media.file.seek(0)
        with open(path, "wb") as file:
            shutil.copyfileobj(media.file, file)
        return path

    def _decode(self, indices: list[int]) -> np.ndarray:
        try:
            return _to_numpy(self._reader.get_batch(indices))
        except self._backend_errors as error:
            if "from_size == to_size" not in str(error):
                raise
        # Rows of narrow frames are padded to more than a multiple of their width, which batches cannot hold.
        frames = []
        for index in indices:
            padded = _to_numpy(self._reader[index])
            height, width = padded.shape[:2]
            frames.append(padded.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3))
        return np.stack(frames)

    def close(self) -> None:
        """Release the file."""
        self._reader = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def _to_numpy(frames: Any) -> np.ndarray:
    return frames.asnumpy() if hasattr(frames, "asnumpy") else np.asarray(frames)  # decord.bridge may be set


PLAIN_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm")


class TorchcodecReader(CheckedReader):
    """Reader over torchcodec, seeking exactly.

    Measured on 629 files with torchcodec 0.17, it gave wrong frames in silence for: MPEG-TS, MPEG-PS (progressive and
    interlaced), AVI with B-frames and, found later, intra-refresh. All but MP4, MOV, Matroska and WebM is refused, and
    intra-refresh there: of the 308 undamaged files of `make faults` none was then wrong. Damaged pictures come back
    patched up.
    """

    library = "torchcodec"
    _backend_errors = (RuntimeError, ValueError, IndexError)

    def __init__(self, media: MediaFile):
        video_decoder = import_torchcodec()
        self.name = media.name
        expected = self._check(media)
        self._media = media
        self._decoder: Any = None
        try:
            media.file.seek(0)
            with self._named_errors():
                self._decoder = video_decoder(
                    media.file, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact"
                )
                self.num_frames = self._decoder.metadata.num_frames or 0
                rate = self._decoder.metadata.average_fps
                self.fps = float(rate) if rate else None
            self._check_count(self.num_frames, expected)
        except BaseException:
            self.close()
            raise

    def _decode(self, indices: list[int]) -> np.ndarray:
        return self._decoder.get_frames_at(indices=indices).data.numpy()

    def close(self) -> None:
        """Release the file."""
        self._decoder = None
        self._media.close()


READERS: dict[str, Callable[[MediaFile], VideoReader]] = {
    "pyav": PyAVReader,
    "decord": DecordReader,
    "torchcodec": TorchcodecReader,
}
