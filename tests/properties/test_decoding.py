"""Frames by index of small real files, against decoding the file once from its start to its end."""

import functools
import io
import itertools
import random
from typing import NamedTuple

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.faults.files import encode, is_available
from umt_hf.processing.decoding import VideoDecodingError, open_video

# Codec: containers, pixel format.
CODECS = {
    "libx264": (("mp4", "mov", "matroska", "mpegts", "avi", "flv", "nut"), "yuv420p"),
    "libx265": (("mp4", "matroska", "mpegts"), "yuv420p"),
    "libvpx": (("webm", "ivf"), "yuv420p"),
    "libvpx-vp9": (("webm", "mp4"), "yuv420p"),
    "mpeg4": (("avi", "mp4", "matroska", "mpegts"), "yuv420p"),
    "mpeg2video": (("mpeg", "mpegts", "matroska", "mpeg2video"), "yuv420p"),
    "mjpeg": (("avi", "mov", "matroska"), "yuvj420p"),
    "gif": (("gif",), "rgb8"),
    "ffv1": (("matroska", "avi"), "yuv420p"),
}
ENCODER_OPTIONS = {
    "libx264": {"preset": "ultrafast"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "6"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "6"},
}
AVAILABLE = [codec for codec in CODECS if is_available(codec)]


def draw_blocks(number: int, height: int, width: int) -> np.ndarray:
    """Pictures that differ, and move."""
    frame = np.full((height, width, 3), (37 * number % 256, 255 - 11 * number % 256, 90), np.uint8)
    left = 5 * number % width
    frame[height // 4 : height // 2, left : left + 8] = (250, 20, 13 * number % 256)
    return frame


class File(NamedTuple):
    """How a file is made."""

    codec: str
    form: str
    num_frames: int
    height: int
    width: int
    gop: int
    bframes: int
    uneven: bool


@functools.cache
def write(file: File) -> bytes:
    """The file, or no bytes where the encoder refuses."""
    ticks = None
    if file.uneven:
        generator = random.Random(file.num_frames)
        ticks = list(itertools.accumulate(generator.choice((10, 10, 20, 37)) for _ in range(file.num_frames)))
    picture = (file.height, file.width, CODECS[file.codec][1], file.gop, file.bframes)
    options = ENCODER_OPTIONS.get(file.codec)
    draw = functools.partial(draw_blocks, height=file.height, width=file.width)
    try:
        return encode(file.form, file.codec, file.num_frames, *picture, ticks, options, draw=draw)
    except (av.FFmpegError, ValueError):
        return b""


@functools.cache
def decode_all(content: bytes) -> list[np.ndarray]:
    """Every frame in order; none of a file that FFmpeg does not open, such as a transport stream of a frame or two."""
    try:
        with av.open(io.BytesIO(content)) as container:
            container.streams.video[0].codec_context.thread_count = 1
            return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (av.FFmpegError, IndexError):
        return []


@st.composite
def draw_file(draw) -> File:
    codec = draw(st.sampled_from(AVAILABLE))
    form = draw(st.sampled_from(CODECS[codec][0]))
    size = draw(st.sampled_from([(48, 64), (34, 18), (66, 98)]))
    uneven = draw(st.booleans()) and form in ("mp4", "mov", "matroska", "webm", "mpegts") and codec != "mpeg2video"
    num_frames = draw(st.sampled_from([1, 2, 3, 5, 9, 16, 24]))
    return File(
        codec, form, num_frames, *size, draw(st.sampled_from([1, 4, 7, 250])), draw(st.sampled_from([0, 2])), uneven
    )


files = draw_file()
long_files = draw_file().filter(lambda file: len(decode_all(write(file))) >= 4)


@given(
    files, st.lists(st.integers(0, 10_000), min_size=1, max_size=9), st.sampled_from(["drawn", "rising", "falling"])
)
def test_frames_are_those_of_a_plain_decode(file, indices, order):
    content = write(file)
    expected = decode_all(content)
    indices = [index % max(len(expected), 1) for index in indices]
    if order != "drawn":
        indices = sorted(indices, reverse=order == "falling")
    try:
        with open_video(content) as reader:
            assert reader.num_frames == len(expected)
            frames = reader.get_frames(indices)
    except VideoDecodingError as error:
        # FFmpeg itself gives up on the shortest transport streams, or takes them for something else.
        assert not expected or (file.form == "mpegts" and file.num_frames < 4)
        assert "<video of" in str(error) or not content
        return
    assert frames.dtype == np.uint8 and frames.shape == (len(indices), *expected[0].shape)
    for frame, index in zip(frames, indices, strict=True):
        np.testing.assert_array_equal(frame, expected[index])


@given(long_files, st.data())
def test_one_reader_answers_many_requests(file, data):
    """What was asked before changes nothing; `iterate_frames`, times and size agree with the frames."""
    content = write(file)
    expected = decode_all(content)
    last = len(expected) - 1
    requests = data.draw(st.lists(st.lists(st.integers(0, last), min_size=1, max_size=4), min_size=1, max_size=4))
    with open_video(io.BytesIO(content)) as reader:
        for request in requests:
            for frame, index in zip(reader.get_frames(request), request, strict=True):
                np.testing.assert_array_equal(frame, expected[index])
        rising = sorted({index for request in requests for index in request})
        for frame, index in zip(reader.iterate_frames(rising), rising, strict=True):
            np.testing.assert_array_equal(frame, expected[index])
        assert (reader.height, reader.width) == expected[0].shape[:2]
        times = reader.compute_timestamps()
        assert len(times) == len(expected) and times[0] == 0 and (np.diff(times) > 0).all()


@given(long_files, st.lists(st.integers(-30, 60), max_size=6))
def test_indices_outside_the_video_are_named(file, indices):
    content = write(file)
    expected = decode_all(content)
    outside = [index for index in indices if not 0 <= index < len(expected)]
    with open_video(content) as reader:
        if not indices or outside:
            with pytest.raises(IndexError, match=f"asked of a video of {len(expected)} frames") as caught:
                reader.get_frames(indices)
            assert str(outside or indices) in str(caught.value)
        else:
            assert len(reader.get_frames(indices)) == len(indices)


@given(files, st.data())
def test_a_cut_or_changed_file_is_read_or_named(file, data):
    """No other error, whatever bytes are missing or changed; of a file that still reads, all frames have one size."""
    content = write(file)
    kept = data.draw(st.sampled_from([1.0, 1.0, 0.97, 0.8, 0.5, 0.1]))
    damaged = bytearray(content[: int(len(content) * kept)])
    for _ in range(data.draw(st.integers(0, 3))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        with open_video(bytes(damaged)) as reader:
            frames = reader.get_frames([0, reader.num_frames - 1])
    except VideoDecodingError as error:
        assert "<video of" in str(error) or "empty" in str(error)
        return
    assert frames.shape[0] == 2 and frames.shape[-1] == 3 and frames.dtype == np.uint8
