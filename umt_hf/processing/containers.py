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
"""What FFmpeg may open, which stream of a file is its video, how its frames are turned, and which packet shows which.

Everything here works on PyAV's objects, and on one file that tries torchcodec; `decoding` opens and reads videos.
"""

import functools
import io
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal
from urllib.parse import parse_qs, urlsplit

import numpy as np

from .media_files import LIMITS, GrowingFile, VideoDecodingError

# The demuxers that may read a file, by FFmpeg's names. Left out is all that opens further files or ports on its own
# (hls, dash, concat, sdp, rtp, rtsp, image2, imf, vobsub), runs scripts or devices (avisynth, lavfi, v4l2), or draws
# text. Sound is in the list, so that its error says that it is sound.
VIDEO_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,flv,asf,ogg,mxf,gif,apng,nut,ivf,dv,rm,nsv,"
    "wtv,swf,gxf,lxf,dhav,h261,h263,h264,hevc,evc,vvc,av1,obu,vc1,vc1test,dirac,dnxhd,cavsvideo,avs2,avs3,mjpeg,"
    "mjpeg_2000,smjpeg,yuv4mpegpipe,amv,kux,ipu,pva,ty,nuv,film_cpk,smk,bink,bik,roq,flic"
)
PICTURE_FORMATS = (
    "png_pipe,jpeg_pipe,jpegls_pipe,jpegxl_pipe,jpegxl_anim,j2k_pipe,bmp_pipe,tiff_pipe,webp_pipe,webp,gif_pipe,"
    "ppm_pipe,pgm_pipe,pgmyuv_pipe,pbm_pipe,pam_pipe,pfm_pipe,psd_pipe,qoi_pipe,dpx_pipe,exr_pipe,hdr_pipe,dds_pipe,"
    "sgi_pipe,sunrast_pipe,pcx_pipe,xwd_pipe,xbm_pipe,xpm_pipe"
)
SOUND_FORMATS = "mp3,flac,wav,w64,aac,ac3,eac3,aiff,au,amr,ape,tta,tak,wv,dts,truehd,mlp"
ALLOWED_FORMATS = f"{VIDEO_FORMATS},{PICTURE_FORMATS},{SOUND_FORMATS}"

# How files begin that only name others: what they are called in errors.
PLAYLIST_STARTS = {
    b"#EXTM3U": "an HLS playlist",
    b"ffconcat": "a list of files to join (ffconcat)",
    b"v=0": "a description of network streams (SDP)",
    b"[playlist]": "a playlist",
    b"[Reference]": "a playlist (ASF reference)",
    b"RTSPtext": "a link to a network stream",
    b"<ASX": "a playlist (ASX)",
    b"<smil": "a playlist (SMIL)",
    b"# VobSub": "an index of subtitles",
}
PLAYLIST_TAGS = {b"<MPD": "a DASH manifest", b"<AssetMap": "an IMF package", b"<CompositionPlaylist": "an IMF package"}
SNIFFED_BYTES = 4096

# Network protocols that a caller may name -> all that FFmpeg may then speak, and the formats it may read.
STREAM_PROTOCOLS = {
    "http": ("http,tcp", ALLOWED_FORMATS),
    "https": ("https,tls,tcp", ALLOWED_FORMATS),
    "rtmp": ("rtmp,tcp", ALLOWED_FORMATS),
    "rtsp": ("rtsp,rtp,udp,tcp", "rtsp,mpegts"),
    "srt": ("srt", ALLOWED_FORMATS),
    "tcp": ("tcp", ALLOWED_FORMATS),
    "udp": ("udp", ALLOWED_FORMATS),
}
MIN_PYAV = (17, 1)

# One packet is one frame, and its timestamp says which, only in these containers and codecs; seeking works there.
INDEXED_CONTAINERS = ("mov", "matroska")
INDEXED_CODECS = ("h264", "hevc", "vp9", "av1", "libdav1d")
PROGRESSIVE_FIELD_ORDERS = (0, 1)  # unknown, progressive; a field of an interlaced frame may have its own packet

PICTURE_CODECS = ("mjpeg", "png", "bmp", "gif", "webp", "tiff", "jpegls", "jpeg2000")  # of covers

DISPLAY_MATRIX = "DISPLAYMATRIX"
DEFAULT_STREAM_BONUS = 5_000_000  # pixels, as in the ffmpeg command's choice
FIXED_POINT = 1 << 16

H264_IDR, H264_NOTES, RECOVERY_POINT = 5, 6, 6  # types of units, and of a note in one

VOP_START = b"\x00\x00\x01\xb6"  # MPEG-4 part 2: a picture; the next two bits are its type
INTRA_VOP, PREDICTED_VOP, BIDIRECTIONAL_VOP = 0, 1, 2
MPEG_PICTURE_START, MPEG_SEQUENCE_START = b"\x00\x00\x01\x00", b"\x00\x00\x01\xb3"  # MPEG-1 and MPEG-2
MPEG_INTRA, MPEG_PREDICTED, MPEG_BIDIRECTIONAL = 1, 2, 3
VOL_STARTS = tuple(b"\x00\x00\x01" + bytes([kind]) for kind in range(0x20, 0x30))  # the header of the stream
# A one-pixel GIF: the smallest file that shows whether torchcodec finds FFmpeg.
PROBE_FILE = (
    b"GIF89a\x01\x00\x01\x00\x80\x00\x00\x00\x00\x00\xff\xff\xff"
    b",\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x02D\x01\x00;"
)


def describe_playlist(content: BinaryIO) -> str | None:
    """Say what a file is that names other files instead of holding a video; `None` for any other."""
    content.seek(0)
    head = content.read(SNIFFED_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
    for start, kind in PLAYLIST_STARTS.items():
        if head.startswith(start):
            return kind
    return next((kind for tag, kind in PLAYLIST_TAGS.items() if tag in head), None)


def pad_limit(max_frame_pixels: int) -> int:
    """FFmpeg's own limit: it counts padded rows, so that it only stops what is far beyond ours, before decoding."""
    return 2 * max_frame_pixels + (1 << 16)


class NamelessFile:
    """A file without a name: FFmpeg would take that of a Python file as a pattern or a hint at a format."""

    def __init__(self, file: BinaryIO):
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


def open_container(av: Any, file: BinaryIO, max_frame_pixels: int | None) -> Any:
    """Open a file with PyAV so that nothing but this file is read.

    Args:
        av: The module.
        file: Its bytes, read from the start. No name is given, so that none is taken as a pattern, protocol or suffix.
        max_frame_pixels: Pixels of a frame that are decoded.

    Raises:
        av.FFmpegError: If it is of a kind that is not allowed, or damaged.
    """
    file.seek(0)
    return av.open(NamelessFile(file), **_build_options(max_frame_pixels), io_open=_refuse)


class OneWayFile:
    """A file that is read from front to back, such as a pipe; its first bytes are kept.

    Args:
        file: Anything with `read`; where it has `read1`, what has come so far is not held up until a block is full.
    """

    def __init__(self, file: Any):
        self._file, self.head = file, b""
        self._read = getattr(file, "read1", file.read)
        self._error: BaseException | None = None

    def read(self, size: int) -> bytes:
        """The next bytes, at most `size`; none at the end, and where something failed."""
        try:
            content = b"" if self._error is not None else self._read(size) or b""
        except BaseException as error:  # Ctrl-C too, which PyAV would pass over
            self._error, content = error, b""
        if len(self.head) < SNIFFED_BYTES:
            self.head += content[: SNIFFED_BYTES - len(self.head)]
        return content

    def raise_error(self) -> None:
        """Raise what ended the reading before the file did."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Close the file, if it was opened here."""
        if isinstance(self._file, GrowingFile):
            self._file.close()


def open_one_way(av: Any, file: OneWayFile, max_frame_pixels: int | None) -> Any:
    """Open a file as `open_container` does, without ever going back in it."""
    return av.open(_Forwards(file.read), **_build_options(max_frame_pixels), io_open=_refuse)


class _Forwards:
    """All that PyAV may see of a file: with neither name nor `seek`."""

    def __init__(self, read: Callable[[int], bytes]):
        self.read = read


def open_url(av: Any, url: str, protocol: str, max_frame_pixels: int | None, wait_seconds: float) -> Any:
    """Open a network stream by the protocol that a caller names, and by no other.

    Args:
        av: The module.
        url: Of the stream.
        protocol: One of `STREAM_PROTOCOLS`.
        max_frame_pixels: Pixels of a frame that are decoded.
        wait_seconds: For the connection, and for each next byte.

    Raises:
        ValueError: If the protocol is unknown, the URL is of another one, or it asks to wait for a caller at a port.
        av.FFmpegError: If nothing comes, or something that is not allowed.
    """
    if protocol not in STREAM_PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(sorted(STREAM_PROTOCOLS))}, got {protocol!r}.")
    if urlsplit(url).scheme.lower() != protocol:
        raise ValueError(f"{url} is not a URL of protocol {protocol}: it must begin with {protocol}://.")
    if "listen" in parse_qs(urlsplit(url).query, keep_blank_values=True):
        raise ValueError(f"{url} asks to wait at a port for whoever calls: leave out `listen`.")
    allowed, formats = STREAM_PROTOCOLS[protocol]
    options = _build_options(max_frame_pixels)
    options["container_options"] = {"protocol_whitelist": allowed, "format_whitelist": formats}
    return av.open(url, **options, timeout=(wait_seconds, wait_seconds))


def describe_address(url: str) -> str:
    """Why an address is not read as a stream, and what to give."""
    scheme = urlsplit(url).scheme.lower()
    if scheme in STREAM_PROTOCOLS:
        return (
            f"{url} is an address in a network, which is read only where its protocol is named: give protocol, such "
            f"as {scheme!r}."
        )
    names = ", ".join(sorted(STREAM_PROTOCOLS))
    return f"{url} is not read: give the path of a file, or an address that begins with one of {names}."


def demux(container: Any, streams: Any) -> Iterator[Any]:
    """Packets of a stream, or of several, as PyAV's `demux`, and without its loss of memory.

    PyAV 18 is built for Python's stable interface, in which its generators do not end when they are dropped: each that
    is left before its end keeps its buffers for good (https://github.com/cython/cython/issues/6405). Those of Python
    do end, and this one then closes PyAV's. PyAV's `decode` has such a generator inside, which nothing can close.
    """
    with closing(container.demux(streams)) as packets:
        yield from packets


def read_packets(av: Any, container: Any, stream: Any, file: OneWayFile | None) -> Iterator[Any]:
    """Packets of a stream as they come, and an empty one at its end, which a network that falls silent has too.

    Args:
        av: The module.
        container: Open.
        stream: One of the container's.
        file: That is read, if any; what ended its reading is raised.

    Raises:
        av.FFmpegError: If something cannot be read, or a network gave nothing at all.
    """
    has_begun = False
    try:
        for packet in demux(container, stream):
            has_begun = True
            if file is not None:
                file.raise_error()
            yield packet
    except av.error.ExitError:
        if not has_begun:
            raise
        end = av.Packet()
        end.stream = stream
        yield end


def _refuse(url: str, *_: object) -> None:
    raise PermissionError(f"a video may not open other files: {url}")


def _build_options(max_frame_pixels: int | None) -> dict[str, Any]:
    """Arguments of `av.open`: which formats may be read, and that nothing further is opened."""
    allowed = {"format_whitelist": ALLOWED_FORMATS, "protocol_whitelist": "none"}
    # Apart: PyAV copies `options` for each stream, and keeps the copies for good where none can be opened.
    limits = {} if max_frame_pixels is None else {"max_pixels": str(pad_limit(max_frame_pixels))}
    return {"metadata_errors": "ignore", "container_options": allowed, "options": limits}


def is_cover(stream: Any) -> bool:
    """Whether a video stream is a cover picture."""
    return bool(stream.disposition & type(stream.disposition).attached_pic)


def choose_stream(container: Any) -> tuple[int | None, bool]:
    """Give the index of the stream that is the video, or `None`, and whether the container has been read from for it.

    As the ffmpeg command does: the largest picture, with a bonus for the default stream, never a cover picture. Unlike
    there, a stream of a single picture, such as a cover in a separate track, gives way to one that moves, and beside
    sound alone it is a cover.
    """
    streams = [s for s in container.streams.video if not is_cover(s) and s.codec_context is not None]
    if not streams:
        return None, False
    has_picture = any(s.codec_context.name in PICTURE_CODECS for s in streams)
    must_read = len(streams) > 1 or (has_picture and bool(container.streams.audio))
    if must_read:
        moving = find_moving_streams(container, streams)
        is_song = has_picture and bool(container.streams.audio)
        streams = [stream for stream in streams if stream.index in moving] or ([] if is_song else streams)

    def score(stream: Any) -> int:
        is_default = bool(stream.disposition & type(stream.disposition).default)
        return stream.codec_context.width * stream.codec_context.height + DEFAULT_STREAM_BONUS * is_default

    return max(streams, key=score).index if streams else None, must_read


def find_moving_streams(container: Any, streams: Sequence[Any]) -> set[int]:
    """Indices of the streams with more than one packet (read up to the place where all have shown theirs)."""
    counts = {stream.index: 0 for stream in streams}
    for packet in demux(container, list(streams)):
        if packet.size > 0:  # the empty ones at the end do not say which stream they are of
            counts[packet.stream_index] += 1
        if min(counts.values()) > 1:
            break
    return {index for index, count in counts.items() if count > 1}


@dataclass(frozen=True)
class Orientation:
    """How a stored frame is turned and mirrored to stand upright: first transposed, then flipped.

    Attributes:
        is_transposed: Whether rows become columns.
        flips_rows: Whether it is turned upside down.
        flips_columns: Whether left and right change places.
    """

    is_transposed: bool = False
    flips_rows: bool = False
    flips_columns: bool = False

    @property
    def is_mirrored(self) -> bool:
        """Whether no rotation gives it."""
        return self.is_transposed ^ self.flips_rows ^ self.flips_columns

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """Turn pixels `(height, width, 3)`."""
        if self.is_transposed:
            pixels = pixels.transpose(1, 0, 2)
        return pixels[:: -1 if self.flips_rows else 1, :: -1 if self.flips_columns else 1]


UPRIGHT = Orientation()


def read_orientation(frame: Any) -> Orientation:
    """What a frame's display matrix asks for; its scale, shift and turns by other than quarters are left out.

    A matrix that shows nothing (all zero) counts as none.
    """
    try:
        notes = list(frame.side_data)
    except ValueError:  # a note that this PyAV has no name for, such as EXIF, hides the others
        turns = round(frame.rotation / 90) % 4
        return Orientation(turns % 2 == 1, flips_rows=turns in (1, 2), flips_columns=turns in (2, 3))
    for note in notes:
        if note.type.name == DISPLAY_MATRIX:
            matrix = [int(value) for value in np.frombuffer(note, np.int32, count=9)]
            return orient(matrix[0], matrix[1], matrix[3], matrix[4])
    return UPRIGHT


def orient(a: int, b: int, c: int, d: int) -> Orientation:
    """Orientation of a matrix that takes the pixel `(x, y)` to `(a x + c y, b x + d y)`."""
    if abs(a * d) >= abs(b * c):
        # Something between two quarters, or nothing: the nearer of the two.
        return Orientation(False, flips_rows=d < 0, flips_columns=a < 0)
    return Orientation(True, flips_rows=b < 0, flips_columns=c < 0)


@dataclass
class PacketIndex:
    """Which frame each packet of a stream shows, in the order of the packets.

    For files whose timestamps do not lead back to a place: they are read from the start, and the packets in between
    are passed over without decoding them.

    Attributes:
        frames: Number of the frame that a packet shows; `None` for a packet that only others refer to.
        keys: Numbers of the packets at which decoding can begin, rising.
        pts: Timestamps of the frames in order; `None` where the file does not say.
    """

    frames: list[int | None]
    keys: list[int]
    pts: list[int | None]

    def __post_init__(self) -> None:
        self.num_frames = len(self.pts)
        self._packet_of_frame = [0] * self.num_frames
        for packet, frame in enumerate(self.frames):
            if frame is not None:
                self._packet_of_frame[frame] = packet

    def plan(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        """Stretches of packets, first and last, that have to be decoded for the frames at `indices`; rising, apart."""
        stretches: list[tuple[int, int]] = []
        for last in sorted(self._packet_of_frame[index] for index in indices):
            place = bisect_right(self.keys, last) - 1
            # A frame shown before the key frame that precedes it in the file may refer to what is in front of that.
            while place > 0 and (self.frames[self.keys[place]] or 0) > (self.frames[last] or 0):
                place -= 1
            first = self.keys[place]
            while stretches and first <= stretches[-1][1] + 1:
                first = min(first, stretches.pop()[0])
            stretches.append((first, last))
        return stretches


def build_packet_index(packets: Iterable[Any], format_name: str, codec: Any) -> PacketIndex | None:
    """Number the frames of a stream by its packets alone, in MPEG-TS, MPEG-PS, VP8 and AVI.

    Returns:
        `None` for files of other kinds, and where packets and frames do not go together one by one: damage, a cut
        start, fields, packets with several pictures.
    """
    if int(getattr(codec, "field_order", 0)) not in PROGRESSIVE_FIELD_ORDERS:
        return None
    is_avi, is_ts = format_name.startswith("avi"), format_name.startswith("mpegts")
    if codec.name == "vp8" and format_name.startswith("matroska"):
        return _index_vp8(packets)
    if is_ts and codec.name in ("h264", "hevc"):
        return _index_by_key_flags(packets, is_reordered=True)
    if format_name == "mpeg" and codec.name in ("mpeg1video", "mpeg2video"):
        return _index_mpeg_ps(packets)
    if is_avi and codec.name == "mpeg4":
        return _index_mpeg4(packets, bytes(codec.extradata or b""))
    if is_avi and codec.name in ("h264", "mjpeg") and not getattr(codec, "has_b_frames", 1):
        return _index_by_key_flags(packets, is_reordered=False)
    return None


def _sound_packets(packets: Iterable[Any]) -> Iterator[Any]:
    """Packets up to the end; a `_NotInOrder` for those that show that the file cannot be counted by them."""
    is_over = False
    for packet in packets:
        if packet.size == 0:  # at the end: the sign to empty the decoder
            is_over = True
            continue
        if is_over or packet.is_corrupt or packet.is_discard:
            raise _NotInOrder
        yield packet


class _NotInOrder(Exception):
    """Packets and frames do not go together one by one."""


def _index_by_key_flags(packets: Iterable[Any], is_reordered: bool) -> PacketIndex | None:
    """One packet per frame, shown in the order of the packets or, `is_reordered`, of their timestamps."""
    pts, keys = [], []
    try:
        for number, packet in enumerate(_sound_packets(packets)):
            pts.append(packet.pts)
            if packet.is_keyframe:
                keys.append(number)
    except _NotInOrder:
        return None
    if keys[:1] != [0]:
        return None
    if not is_reordered:
        return PacketIndex(list(range(len(pts))), keys, pts)
    if None in pts or len(set(pts)) < len(pts) or pts[0] != min(pts):
        return None
    ranks = {value: rank for rank, value in enumerate(sorted(pts))}
    return PacketIndex([ranks[value] for value in pts], keys, sorted(pts))


def _index_vp8(packets: Iterable[Any]) -> PacketIndex | None:
    """VP8: bit 4 of a packet says whether it is shown, bit 0 whether it refers to others."""
    frames: list[int | None] = []
    keys, pts = [], []
    try:
        for number, packet in enumerate(_sound_packets(packets)):
            head = memoryview(packet)[0]
            if packet.is_keyframe == bool(head & 1):
                return None  # container and codec disagree: damage
            if packet.is_keyframe:
                keys.append(number)
            frames.append(len(pts) if head & 0x10 else None)
            if head & 0x10:
                pts.append(packet.pts)
    except _NotInOrder:
        return None
    return PacketIndex(frames, keys, pts) if keys[:1] == [0] and pts else None


def _index_mpeg4(packets: Iterable[Any], header: bytes) -> PacketIndex | None:
    """MPEG-4 part 2 with one picture per packet: a picture that others refer to is shown just before the next one."""
    kinds, pts = [], []
    time_bits = None
    try:
        for packet in _sound_packets(packets):
            content = bytes(packet)
            if time_bits is None:
                time_bits = read_vop_time_bits(header + content)
            if time_bits is None or content.count(VOP_START) != 1:
                return None
            kind = read_vop_kind(content[content.index(VOP_START) + len(VOP_START) :], time_bits)
            if kind is None or (packet.is_keyframe and kind != INTRA_VOP):
                return None
            kinds.append(kind)
            pts.append(packet.pts)
    except _NotInOrder:
        return None
    if set(kinds) - {INTRA_VOP, PREDICTED_VOP, BIDIRECTIONAL_VOP}:
        return None
    keys = [number for number, kind in enumerate(kinds) if kind == INTRA_VOP]
    is_bidirectional = [kind == BIDIRECTIONAL_VOP for kind in kinds]
    frames = _order_references(is_bidirectional, keys)
    if frames is None:
        return None
    return PacketIndex(frames, keys, [None] * len(kinds) if any(is_bidirectional) else pts)


def _index_mpeg_ps(packets: Iterable[Any]) -> PacketIndex | None:
    """MPEG-1 and MPEG-2 with one picture per packet, in the order of MPEG-4; decoding begins at a sequence header."""
    is_bidirectional, keys, pts = [], [], []
    try:
        for number, packet in enumerate(_sound_packets(packets)):
            content = bytes(packet)
            if content.count(MPEG_PICTURE_START) != 1:
                return None
            kind = content[content.index(MPEG_PICTURE_START) + 5] >> 3 & 7
            if kind not in (MPEG_INTRA, MPEG_PREDICTED, MPEG_BIDIRECTIONAL):
                return None
            if kind == MPEG_INTRA and MPEG_SEQUENCE_START in content:
                keys.append(number)
            is_bidirectional.append(kind == MPEG_BIDIRECTIONAL)
            pts.append(packet.pts)
    except (_NotInOrder, IndexError):
        return None
    frames = _order_references(is_bidirectional, keys)
    if frames is None:
        return None
    packet_of_frame = sorted(range(len(frames)), key=lambda number: frames[number] or 0)
    return PacketIndex(frames, keys, [pts[number] for number in packet_of_frame])


def _order_references(is_bidirectional: list[bool], keys: list[int]) -> list[int | None] | None:
    """The frame that each packet shows, where a picture that others refer to is shown just before the next such one.

    Returns:
        `None` where the stream does not begin with a key and another such picture.
    """
    if keys[:1] != [0] or any(is_bidirectional[:2]):
        return None
    frames: list[int | None] = []
    next_reference = len(is_bidirectional)
    for number in range(len(is_bidirectional) - 1, -1, -1):
        frames.append(number - 1 if is_bidirectional[number] else next_reference - 1)
        if not is_bidirectional[number]:
            next_reference = number
    return frames[::-1]


class _Bits:
    """Reads single bits; past the end all are zero."""

    def __init__(self, content: bytes):
        self._value, self._left = int.from_bytes(content, "big"), 8 * len(content)

    def read(self, count: int) -> int:
        self._left -= count
        return (self._value >> self._left) & ((1 << count) - 1) if self._left >= 0 else 0


def read_vop_time_bits(content: bytes) -> int | None:
    """How many bits the time of a picture has in an MPEG-4 part 2 stream, from its header; `None` if it has none."""
    start = next((place for kind in VOL_STARTS if (place := content.find(kind)) >= 0), None)
    if start is None:
        return None
    bits = _Bits(content[start + 4 : start + 4 + 64])
    bits.read(1 + 8)
    if bits.read(1):  # its own version and priority
        bits.read(4 + 3)
    if bits.read(4) == 15:  # its aspect ratio
        bits.read(8 + 8)
    if bits.read(1):  # colour sampling and delay
        bits.read(2 + 1)
        if bits.read(1):  # parameters of a buffer
            bits.read(79)
    bits.read(2 + 1)
    resolution = bits.read(16)
    return max((resolution - 1).bit_length(), 1) if resolution else None


def read_vop_kind(content: bytes, time_bits: int) -> int | None:
    """Type of the picture whose start code comes just before; `None` for one that is not coded, and not shown."""
    bits = _Bits(content[:32])
    kind = bits.read(2)
    while bits.read(1):  # full seconds
        continue
    bits.read(1 + time_bits + 1)
    return kind if bits.read(1) else None


def describe_key_frames(codec_name: str, packets: Iterable[Any]) -> Literal["closed", "open", "gradual"]:
    """What decoding from each key frame of an H.264 or HEVC stream in MP4 or Matroska gives.

    Args:
        codec_name: FFmpeg's name of the codec.
        packets: Of the stream, in the order of the file.

    Returns:
        "closed": every later picture; "open": all but some that are shown before the key frame; "gradual": pictures
        that become complete over several frames (intra-refresh).
    """
    kind: Literal["closed", "open"] = "closed"
    key_pts = None
    for packet in packets:
        if packet.size == 0:
            continue
        if packet.is_keyframe:
            key_pts = packet.pts
            units = _list_h264_units(bytes(packet)) if codec_name == "h264" else []
            if any(_recovers_gradually(unit) for unit in units):
                return "gradual"
            if units and H264_IDR not in {unit[0] & 0x1F for unit in units}:
                kind = "open"
        elif key_pts is not None and packet.pts < key_pts:
            kind = "open"
    return kind


def _list_h264_units(content: bytes) -> list[bytes]:
    """The units of an H.264 packet, length-prefixed (four bytes) as in MP4 and Matroska."""
    stream, units = io.BytesIO(content), []
    while len(length := stream.read(4)) == 4:
        if unit := stream.read(int.from_bytes(length, "big")):
            units.append(unit)
    return units


def _recovers_gradually(unit: bytes) -> bool:
    """Whether a unit notes that pictures are complete only some frames later: a recovery point further on."""
    if unit[0] & 0x1F != H264_NOTES:
        return False
    stream = io.BytesIO(unit[1:])
    while True:
        kind, length = _read_note_number(stream), _read_note_number(stream)
        content = stream.read(length)
        if not content:
            return False
        if kind == RECOVERY_POINT:
            return not content[0] & 0x80  # the number of frames; a first bit of one stands for zero


def _read_note_number(stream: BinaryIO) -> int:
    number = 0
    while byte := stream.read(1):
        number += byte[0]
        if byte[0] != 0xFF:
            break
    return number


class NamedMedia:
    """What errors of a file or stream name it by."""

    name: str
    _backend_errors: tuple[type[Exception], ...] = ()

    def _describe_playlist(self) -> str | None:
        """What the file is if it only names others."""
        return None

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
            if kind := self._describe_playlist():
                raise self._error(
                    f"is refused: it is {kind}, which makes a reader open other files or ports. Give the video that "
                    "it names."
                ) from error
            if type(error).__name__ == "ExitError":  # PyAV's time-out, which streams alone have
                raise self._error("gave nothing in time. Is it sending? A longer wait is `wait_seconds`.") from error
            reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0] or type(error).__name__
            if isinstance(error, ConnectionError) or type(error).__name__.startswith("HTTP"):
                raise self._error(f"was not sent ({reason}). Check its address, and that its server runs.") from error
            if reason == "Invalid argument" and LIMITS.max_frame_pixels is not None:
                reason += f"; perhaps its frames have far more than {LIMITS.max_frame_pixels} pixels, the limit"
            raise self._error(
                f"cannot be decoded ({reason}). It is damaged, not a video, or of a kind that this decoder does not "
                "read ('pyav' reads most kinds); replace it or leave it out."
            ) from error


class PyAVFrames(NamedMedia):
    """What reading of files and of streams with PyAV shares."""

    _container: Any
    _stream: Any

    def _load_library(self) -> None:
        """Import PyAV and set up the conversion of its frames."""
        try:
            import av
            from av.video.reformatter import VideoReformatter
        except ImportError as error:
            raise ImportError("decoder='pyav' needs PyAV: `pip install av`.") from error
        if tuple(int(part) for part in av.__version__.split(".")[:2]) < MIN_PYAV:
            # Older ones crash where options are given for files that say late which streams they have (MPEG).
            raise ImportError(f"decoder='pyav' needs PyAV 17.1 or newer, got {av.__version__}: `pip install -U av`.")
        self._av = av
        self._backend_errors = (av.FFmpegError, OSError)
        # One converter for all frames: by default PyAV sets up a new one, with several threads, for each.
        self._reformatter = VideoReformatter()
        self._reformat_options = {"threads": 1} if "threads" in (self._reformatter.reformat.__doc__ or "") else {}

    def _demux(self) -> Iterator[Any]:
        """Packets of the video from where the file is."""
        return demux(self._container, self._stream)

    def _decode_all(self) -> Iterator[Any]:
        """Its frames from there on, in the order in which they are shown."""
        for packet in self._demux():
            yield from packet.decode()

    def _set_up_codec(self, codec: Any) -> None:
        """One thread, no damaged picture, no picture that is too large."""
        LIMITS.check_frame_size(self.name, codec.height, codec.width)
        codec.thread_count = 1
        codec.options = {"err_detect": "explode"}
        if LIMITS.max_frame_pixels is not None:
            codec.options = {**codec.options, "max_pixels": str(pad_limit(LIMITS.max_frame_pixels))}

    def _report_no_stream(self, streams: Sequence[Any]) -> VideoDecodingError:
        """Why none of the video streams can be read."""
        if any(stream.codec_context is None for stream in streams):
            return self._error("is coded in a way that this FFmpeg cannot decode. Re-encode it, for example to H.264.")
        cover = " but a cover picture" if streams else ""
        return self._error(f"has no video stream{cover} (audio only?). Replace it or leave it out.")

    def _to_upright_rgb(self, frame: Any) -> np.ndarray:
        """Convert a PyAV frame to uint8 RGB `(height, width, 3)`, turned and mirrored by its display matrix."""
        LIMITS.check_frame_size(self.name, frame.height, frame.width)
        pixels = self._reformatter.reformat(frame, format="rgb24", **self._reformat_options).to_ndarray()
        return read_orientation(frame).apply(pixels)


@functools.cache
def import_torchcodec() -> type:
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
