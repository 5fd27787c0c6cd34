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
"""Read chosen frames of a video file: the only module that knows a video reader.

`open_video` gives a `VideoReader`, the same small interface whichever library decodes:

- `pyav` (default): frame-exact. Index `i` gives the `i`-th frame that decoding the complete file in
  order yields, whatever the container does to its timestamps.
- `decord`: what the published code reads with; see `DecordReader` for the files it silently reads wrong.
- `torchcodec`: needs the FFmpeg libraries of the system.

A `.npy` file of decoded frames is read directly, whatever the decoder: training that reads short clips repeatedly need
not decode them each time.

Readers are cheap to open. Open them in the worker that uses them: they cannot be shared between processes.
"""

import functools
import http.client
import io
import operator
import os
import struct
import urllib.request
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, BinaryIO, Literal
from urllib.parse import urlparse

import numpy as np

VideoSource = str | os.PathLike | bytes | BinaryIO
DecoderName = Literal["pyav", "decord", "torchcodec"]

DOWNLOAD_TIMEOUT_SECONDS = 60
ITERATED_FRAMES = 16  # decoded at a time by readers that do not give frames singly

# One packet is one frame, and its timestamp says which, only in these containers and codecs; a file of another kind is
# decoded from its start. (AVI and MPEG streams lack timestamps; VP8 and MPEG-4 part 2 have packets without a frame.)
INDEXED_CONTAINERS = ("mov", "matroska")
INDEXED_CODECS = ("h264", "hevc", "vp9", "av1", "libdav1d")
# Decoders whose output does not change when the frames that no other frame refers to are left out.
SKIPPING_CODECS = ("h264", "hevc")
PROGRESSIVE_FIELD_ORDERS = (0, 1)  # unknown, progressive; a field of an interlaced frame may have its own packet

MP4_TOP_LEVEL_BOXES = b"ftyp styp moov moof mdat free skip wide sidx mfra uuid".split()
MATROSKA_EBML, MATROSKA_SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"

# A one-pixel GIF: the smallest file that shows whether torchcodec finds FFmpeg.
PROBE_FILE = (
    b"GIF89a\x01\x00\x01\x00\x80\x00\x00\x00\x00\x00\xff\xff\xff"
    b",\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x02D\x01\x00;"
)


class VideoDecodingError(ValueError):
    """A video cannot be read. The message names the file, the reason and the fix."""


class VideoReader(ABC):
    """An open video file.

    Attributes:
        name: What errors call the file: its path, its URL, or a description of the bytes given.
        num_frames: Number of frames that can be asked for.
        fps: Average frames per second; `None` where the file does not state it.
    """

    name: str
    num_frames: int
    fps: float | None
    _backend_errors: tuple[type[Exception], ...] = ()

    @abstractmethod
    def _decode(self, indices: list[int]) -> np.ndarray:
        """Decode frames at distinct, rising indices into uint8 RGB `(len(indices), height, width, 3)`."""

    def get_frames(self, indices: Sequence[int]) -> np.ndarray:
        """Decode frames.

        Args:
            indices: Frame numbers from 0 to `num_frames - 1`, in any order; repeats are decoded once.

        Returns:
            RGB frames, uint8 `(len(indices), height, width, 3)`, upright (the file's rotation is applied), in the
            order asked for.

        Raises:
            IndexError: If an index is outside the video.
            VideoDecodingError: If a frame cannot be decoded.
        """
        indices = [operator.index(i) for i in indices]
        outside = [i for i in indices if not 0 <= i < self.num_frames]
        if outside or not indices:
            raise IndexError(f"{self.name}: frames {outside or indices} asked of a video of {self.num_frames} frames.")
        distinct, places = np.unique(indices, return_inverse=True)
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

    def _error(self, reason: str) -> VideoDecodingError:
        return VideoDecodingError(f"{self.name}: {reason}")

    @contextmanager
    def _named_errors(self) -> Generator[None, None, None]:
        """Turn the library's errors into ones that name the file."""
        try:
            yield
        except VideoDecodingError:
            raise
        except self._backend_errors as error:
            reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0] or type(error).__name__
            raise self._error(
                f"cannot be decoded ({reason}). It is damaged, not a video, or of a kind that this decoder does not "
                "read ('pyav' reads most kinds); replace it or leave it out."
            ) from error


def open_video(source: VideoSource, decoder: DecoderName = "pyav") -> VideoReader:
    """Open a video for reading frames by index; use it in a `with` block.

    Args:
        source: A path, an http(s) or file URL, the bytes of a file, or a binary file object (read from its start). An
            http(s) video is downloaded into memory completely. A path that ends in `.npy` is a file of decoded frames,
            uint8 RGB `(T, H, W, 3)`.
        decoder: Library that decodes.

    Raises:
        VideoDecodingError: If there is no such file, or it holds no video, is cut short or cannot be decoded.
        ImportError: If the library of `decoder` is missing or does not work.
        ValueError: If `decoder` is not one of the three.
    """
    if decoder not in READERS:
        raise ValueError(f"decoder must be one of {sorted(READERS)}, got {decoder!r}.")
    name, file = _resolve_source(source)
    _check_complete(name, file)
    if isinstance(file, str) and file.endswith(".npy"):
        return DecodedFramesReader(name, file)
    return READERS[decoder](name, file)


class DecodedFramesReader(VideoReader):
    """Frames decoded before: a NumPy file, mapped into memory, of uint8 RGB `(T, H, W, 3)`, with no frame rate."""

    fps = None

    def __init__(self, name: str, file: str):
        self.name = name
        try:
            self._frames = np.load(file, mmap_mode="r")
        except ValueError as error:
            raise self._error(f"is not a complete NumPy array ({error}). Write it again or leave it out.") from error
        shape, dtype = self._frames.shape, self._frames.dtype
        if len(shape) != 4 or shape[-1] != 3 or 0 in shape or dtype != np.uint8:
            raise self._error(
                f"holds {dtype} of shape {shape}; decoded frames are uint8 RGB (frames, height, width, 3)."
            )
        self.num_frames = shape[0]

    def _decode(self, indices: list[int]) -> np.ndarray:
        return np.asarray(self._frames[indices])

    def close(self) -> None:
        """Drop the map; the frames given out are copies."""
        del self._frames


class PyAVReader(VideoReader):
    """Frame-exact reader over PyAV.

    One pass over the packets, without decoding, gives the timestamp of every frame. A frame is then reached by seeking
    to the key frame before it and decoding from there. Where the timestamps cannot be trusted (see
    `INDEXED_CONTAINERS`), the file is decoded from its start instead.
    Damaged pictures raise an error instead of being patched up; one thread decodes.
    """

    def __init__(self, name: str, file: str | BinaryIO):
        try:
            import av
            from av.video.reformatter import VideoReformatter
        except ImportError as error:
            raise ImportError("decoder='pyav' needs PyAV: `pip install av`.") from error
        self._av = av
        self._backend_errors = (av.FFmpegError,)
        # One converter for all frames: by default PyAV sets up a new one, with several threads, for each.
        self._reformatter = VideoReformatter()
        self._reformat_options = {"threads": 1} if "threads" in (self._reformatter.reformat.__doc__ or "") else {}
        self.name = name
        self._file = file
        self._container: Any = None  # an InputContainer while the file is open
        self._frame_pts: list[int] | None = None  # of every frame, rising; unset: decode from the start
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

    def _open(self) -> None:
        """Open the file at its start, closing it first where it is open."""
        self.close()
        if not isinstance(self._file, str):
            self._file.seek(0)
        self._container = self._av.open(self._file, metadata_errors="ignore")
        if not self._container.streams.video:
            raise self._error("has no video stream (audio only?). Replace it or leave it out.")
        self._stream = self._container.streams.video[0]
        self._codec = self._stream.codec_context
        if self._codec is None:
            raise self._error("is coded in a way that this FFmpeg cannot decode. Re-encode it, for example to H.264.")
        self._codec.thread_count = 1
        self._codec.options = {"err_detect": "explode"}

    def _build_index(self) -> None:
        """Note the timestamp of every frame and key frame, where one packet is one frame."""
        field_order: Any = getattr(self._codec, "field_order", 0)
        is_indexable = (
            self._container.format.name.startswith(INDEXED_CONTAINERS)
            and self._codec.name in INDEXED_CODECS
            and int(field_order) in PROGRESSIVE_FIELD_ORDERS
        )
        if not is_indexable:
            return
        packet_pts, key_pts, frame_pts = [], [], []
        for packet in self._container.demux(self._stream):
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

    def _count_frames(self) -> int:
        if self._frame_pts is not None:
            return len(self._frame_pts)
        self._open()
        self._decoded_pts = [frame.pts for frame in self._container.decode(self._stream)]
        return len(self._decoded_pts)

    def compute_timestamps(self) -> np.ndarray:
        """Seconds from the first frame to each, from the container; evenly spaced where it cannot be trusted."""
        pts = self._decoded_pts if self._frame_pts is None else self._frame_pts
        if None in pts or any(later <= earlier for earlier, later in zip(pts, pts[1:], strict=False)):
            return super().compute_timestamps()
        time_base = self._stream.time_base
        assert time_base is not None  # a stream whose frames have timestamps has one
        return (np.array(pts) - pts[0]) * float(time_base)

    def iterate_frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Decode frames in one pass from the start of the file, holding one at a time; see `VideoReader`."""
        wanted, last, size = set(indices), indices[-1], None
        with self._named_errors():
            self._open()
            for i, frame in enumerate(self._container.decode(self._stream)):
                if i not in wanted:
                    continue
                pixels = self._to_upright_rgb(frame)
                if size is not None and pixels.shape != size:
                    raise self._error(f"changes its frame size at frame {i}. Re-encode it at one size.")
                size = pixels.shape
                yield pixels
                if i == last:
                    return
            raise self._error(f"ends before frame {last}. Fetch it again or leave it out.")

    def _decode(self, indices: list[int]) -> np.ndarray:
        frames = None if self._frame_pts is None else self._decode_from_key_frames(indices, self._frame_pts)
        if frames is None:
            frames = self._decode_from_start(indices)
        sizes = {frame.shape[:2] for frame in frames.values()}
        if len(sizes) > 1:
            raise self._error(f"changes its frame size ({sorted(sizes)}). Re-encode it at one size.")
        return np.stack([frames[i] for i in indices])

    def _decode_from_start(self, indices: list[int]) -> dict[int, np.ndarray]:
        self._open()  # afresh, since the formats that come here cannot be trusted to seek back either
        frames, wanted = {}, set(indices)
        for i, frame in enumerate(self._container.decode(self._stream)):
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

    def _to_upright_rgb(self, frame: Any) -> np.ndarray:
        """Convert a PyAV frame to uint8 RGB `(height, width, 3)`, turned by its display matrix."""
        pixels = self._reformatter.reformat(frame, format="rgb24", **self._reformat_options).to_ndarray()
        quarter_turns = round(frame.rotation / 90) % 4
        return np.rot90(pixels, quarter_turns) if quarter_turns else pixels

    def _packets_up_to(self, last_pts: int) -> Iterator[Any]:
        """Yield packets from the current place to that of `last_pts`, then `None`, which empties the decoder."""
        for packet in self._container.demux(self._stream):
            if packet.size == 0:
                continue
            yield packet
            if packet.pts == last_pts:
                break
        yield None


class DecordReader(VideoReader):
    """Reader over decord 0.6, kept for parity with the published code.

    Known faults, all silent: wrong frames for MPEG-TS, interlaced MPEG-2, AVI with B-frames and, after a seek, open
    GOPs (the default of x265); for a file cut by an edit list it counts the hidden frames and repeats earlier ones in
    their place; damaged pictures are patched up. Some damaged files end the process with a segmentation fault.
    AV1 is not read at all, each failed open leaks a little memory, and a reader made before a fork can hang.
    """

    def __init__(self, name: str, file: str | BinaryIO):
        try:
            import decord
        except ImportError as error:
            raise ImportError(
                "decoder='decord' needs decord: `pip install decord` (it has no wheels for some platforms; "
                "decoder='pyav' works on all)."
            ) from error
        self._backend_errors = (RuntimeError, decord.base.DECORDError)
        self.name = name
        with self._named_errors():
            self._reader: Any = decord.VideoReader(file, ctx=decord.cpu(0), num_threads=1)
            self.num_frames = len(self._reader)
            self.fps = float(self._reader.get_avg_fps()) or None
        if not self.num_frames:
            raise self._error("holds no video frame. Replace it or leave it out.")

    def _decode(self, indices: list[int]) -> np.ndarray:
        frames = self._reader.get_batch(indices)
        return frames.asnumpy() if hasattr(frames, "asnumpy") else np.asarray(frames)  # decord.bridge may be set

    def close(self) -> None:
        """Release the file."""
        self._reader = None


class TorchcodecReader(VideoReader):
    """Reader over torchcodec, seeking exactly.

    It refuses MPEG-TS and AVI with B-frames, and is known to return wrong frames for interlaced MPEG-2.
    """

    _backend_errors = (RuntimeError, ValueError, IndexError)

    def __init__(self, name: str, file: str | BinaryIO):
        video_decoder = _import_torchcodec()
        self.name = name
        with self._named_errors():
            self._decoder: Any = video_decoder(file, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
            self.num_frames = self._decoder.metadata.num_frames or 0
            rate = self._decoder.metadata.average_fps
            self.fps = float(rate) if rate else None
        if not self.num_frames:
            raise self._error("holds no video frame. Replace it or leave it out.")

    def _decode(self, indices: list[int]) -> np.ndarray:
        return self._decoder.get_frames_at(indices=indices).data.numpy()

    def close(self) -> None:
        """Release the file."""
        self._decoder = None


READERS = {"pyav": PyAVReader, "decord": DecordReader, "torchcodec": TorchcodecReader}


@functools.cache
def _import_torchcodec() -> type:
    """Import torchcodec's decoder and try it: importing succeeds even where its FFmpeg libraries are missing."""
    try:
        # pyrefly: ignore[missing-import]  an extra that few environments have
        from torchcodec.decoders import VideoDecoder

        VideoDecoder(PROBE_FILE).get_frames_at(indices=[0])
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ImportError(
            "decoder='torchcodec' needs torchcodec and the FFmpeg libraries of the system: "
            f"`pip install torchcodec`, and FFmpeg from the system's packages. It said: {reason}"
        ) from error
    return VideoDecoder


def _resolve_source(source: VideoSource) -> tuple[str, str | BinaryIO]:
    """Give the name that errors use, and a local path or a seekable file object."""
    if isinstance(source, bytes | bytearray | memoryview):
        return f"<video of {len(source)} bytes>", io.BytesIO(source)
    if hasattr(source, "read"):
        file: Any = source
        name = str(getattr(file, "name", "<file object>"))
        return name, file if file.seekable() else io.BytesIO(file.read())
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"A video is a path, a URL, bytes or a binary file object, got {type(source).__name__}.")
    name = os.fsdecode(source)
    url = urlparse(name)
    if url.scheme in ("http", "https"):
        return name, io.BytesIO(_download(name))
    path = urllib.request.url2pathname(url.path) if url.scheme == "file" else name
    if not os.path.isfile(path):
        raise VideoDecodingError(
            f"{name}: {'is not a file' if os.path.exists(path) else 'no such file'}. Check the path."
        )
    return name, path


def _download(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "umt_hf"})
    try:
        with urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT_SECONDS) as response:
            return response.read()
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise VideoDecodingError(
            f"{url}: cannot be downloaded ({error}). Check the URL and the connection."
        ) from error


def _check_complete(name: str, file: str | BinaryIO) -> None:
    """Refuse an empty file, and one that ends before the place that its own headers promise."""
    try:
        with open(file, "rb") if isinstance(file, str) else _kept_open(file) as content:
            size = content.seek(0, os.SEEK_END)
            content.seek(0)
            promised = _promised_size(content, size)
    except OSError as error:
        raise VideoDecodingError(f"{name}: cannot be read ({error.strerror}). Check the path.") from error
    if size == 0:
        raise VideoDecodingError(f"{name}: is empty (0 bytes). Fetch it again or leave it out.")
    if promised > size:
        raise VideoDecodingError(
            f"{name}: is cut short: it holds {size} of {promised} bytes. Fetch it again or leave it out."
        )


@contextmanager
def _kept_open(file: BinaryIO) -> Generator[BinaryIO, None, None]:
    yield file


def _promised_size(content: BinaryIO, size: int) -> int:
    """Give the size in bytes that an MP4, Matroska or AVI file claims for itself; 0 for any other."""
    head = content.read(12)
    if head[:4] == b"RIFF" and head[8:] == b"AVI ":
        return 8 + int.from_bytes(head[4:8], "little")
    if head[:4] == MATROSKA_EBML:
        content.seek(4)
        content.seek(_read_matroska_size(content) or 0, os.SEEK_CUR)
        if content.read(4) != MATROSKA_SEGMENT:
            return 0
        segment_size = _read_matroska_size(content)
        return content.tell() + segment_size if segment_size is not None else 0
    if head[4:8] in MP4_TOP_LEVEL_BOXES:
        return _end_of_mp4_boxes(content, size)
    return 0


def _read_matroska_size(content: BinaryIO) -> int | None:
    """Read a variable-length integer; `None` is Matroska's "unknown"."""
    first = content.read(1)
    if not first or not first[0]:
        return None
    num_bits = 7 * (9 - first[0].bit_length())
    value = int.from_bytes(first + content.read(num_bits // 7 - 1), "big") & ((1 << num_bits) - 1)
    return None if value == (1 << num_bits) - 1 else value


def _end_of_mp4_boxes(content: BinaryIO, size: int) -> int:
    """Follow the top-level boxes to the end of the last known one."""
    end = 0
    while end + 8 <= size:
        content.seek(end)
        length, kind = struct.unpack(">I4s", content.read(8))
        if length == 1:  # the real length follows in 64 bits
            length = int.from_bytes(content.read(8), "big")
        if kind not in MP4_TOP_LEVEL_BOXES or length < 8:  # junk after the video, or a last box of open length
            break
        end += length
    return end
