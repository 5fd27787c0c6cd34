"""Small videos of every awkward kind, whose frames carry their number as a row of eight black or white blocks."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

BLOCK = 8
TICKS_PER_FRAME = 10  # of the time base, so that frames can be spaced unevenly


def draw_frame(number: int, height: int = 64, width: int = 96) -> np.ndarray:
    frame = np.zeros((height, width, 3), np.uint8)
    frame[..., 0] = np.linspace(0, 200, width)
    frame[..., 1] = np.linspace(0, 200, height)[:, None]
    x = number * 3 % (width - 16)
    frame[16:32, x : x + 16, 2] = 255
    for bit in range(8):
        frame[-BLOCK:, bit * BLOCK : (bit + 1) * BLOCK] = 255 * (number >> bit & 1)
    return frame


def read_number(frame: np.ndarray) -> int:
    blocks = frame[-BLOCK:, : 8 * BLOCK].reshape(-1, 8, BLOCK, 3).mean((0, 2, 3))
    return sum(1 << bit for bit, level in enumerate(blocks) if level > 127)


def write_video(
    path: Path,
    num_frames: int = 48,
    height: int = 64,
    width: int = 96,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    gop: int = 12,
    bframes: int = 2,
    ticks: list[int] | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    rate: int = 24,
) -> Path:
    """Encode numbered frames; `ticks` are their times in tenths of a frame where they are not evenly spaced."""
    try:
        av.codec.Codec(codec, "w")
    except ValueError:
        pytest.skip(f"this PyAV has no encoder {codec}")
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.gop_size = gop
        stream.options = options or {}
        if bframes and codec in ("libx264", "mpeg4", "mpeg2video"):
            stream.max_b_frames = bframes
        if ticks is not None:
            stream.codec_context.time_base = Fraction(1, rate * TICKS_PER_FRAME)
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(draw_frame(number, height, width), format="rgb24")
            frame.pts = number if ticks is None else ticks[number]
            frame.time_base = Fraction(1, rate if ticks is None else rate * TICKS_PER_FRAME)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_audio(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        samples = np.zeros((1, 16000), np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def cut_start(source: Path, path: Path, num_frames: int) -> Path:
    """Copy a video so that an edit list hides its first frames, as a cut without re-encoding does."""
    with av.open(str(source)) as original, av.open(str(path), "w") as copy:
        stream = original.streams.video[0]
        target = copy.add_stream_from_template(stream)
        shift = round(num_frames / (stream.average_rate * stream.time_base))
        for packet in original.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, target
                copy.mux(packet)
    return path


def rotate(source: Path, path: Path, quarter_turns: int) -> Path:
    """Copy an MP4 whose header tells players to turn it clockwise."""
    sine, cosine = [(0, 1), (1, 0), (0, -1), (-1, 0)][quarter_turns % 4]
    content = bytearray(source.read_bytes())
    start = content.index(b"tkhd") + 4 + 40  # the matrix of a version 0 track header, 16.16 fixed point
    matrix = [cosine, sine, 0, -sine, cosine, 0, 0, 0, 0x4000]
    content[start : start + 36] = b"".join((value * 65536).to_bytes(4, "big", signed=True) for value in matrix)
    path.write_bytes(content)
    return path


def decode_in_order(source: Path | bytes) -> list[np.ndarray]:
    """The truth: every frame, in the order in which plain decoding yields them, turned upright."""
    with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as container:
        frames = list(container.decode(video=0))
        return [np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)) for frame in frames]


def write_kind(kind: str, folder: Path) -> Path:
    """Write the video that `KINDS` describes."""
    suffix, options = KINDS[kind]
    return write_video(folder / f"{kind}{suffix}", **options)


KINDS = {
    "plain": (".mp4", {}),
    "long_gop": (".mp4", {"gop": 250, "num_frames": 90, "bframes": 3}),
    "no_b_frames": (".mp4", {"bframes": 0}),
    "open_gop": (".mp4", {"options": {"x264-params": "open-gop=1:keyint=12:bframes=3"}}),
    "intra_refresh": (".mp4", {"options": {"x264-params": "intra-refresh=1:keyint=12"}}),
    "interlaced": (".mkv", {"options": {"x264-params": "tff=1:keyint=12"}}),
    "header_first": (".mp4", {"container_options": {"movflags": "faststart"}}),
    "fragmented": (".mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
    "variable_rate": (".mp4", {"ticks": [10 * i + 7 * (i // 5) ** 2 for i in range(48)]}),
    "late_start": (".mp4", {"ticks": [240 + 10 * i for i in range(48)]}),
    "one_frame": (".mp4", {"num_frames": 1}),
    "two_frames": (".mp4", {"num_frames": 2}),
    "grey": (".mp4", {"pix_fmt": "gray"}),
    "odd_size": (".mp4", {"height": 67, "width": 99, "pix_fmt": "yuv444p"}),
    "ten_bit": (".mp4", {"pix_fmt": "yuv420p10le"}),
    "matroska": (".mkv", {}),
    "transport_stream": (".ts", {}),
    "h264_avi": (".avi", {}),
    "mpeg4_avi": (".avi", {"codec": "mpeg4"}),
    "mpeg4_mp4": (".mp4", {"codec": "mpeg4"}),
    "mpeg2": (".mpg", {"codec": "mpeg2video"}),
    "hevc": (".mp4", {"codec": "libx265", "options": {"x265-params": "log-level=none"}}),
    "vp8": (".webm", {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "16"}}),
    "vp9": (".webm", {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}}),
    "av1": (".webm", {"codec": "libsvtav1", "options": {"preset": "8", "crf": "25"}}),
    "gif": (".gif", {"codec": "gif", "pix_fmt": "rgb8", "num_frames": 20, "rate": 20}),
}
