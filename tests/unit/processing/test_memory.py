"""Readers give back the memory that they took, counted in bytes over many videos, however the reading ends."""

import contextlib
import ctypes
import gc
import importlib.util
import io
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.unit.video_files import write_kind, write_video
from umt_hf.processing.decoding import PyAVReader, VideoDecodingError, VideoStream, open_video
from umt_hf.processing.media_files import MediaFile

VIDEOS, ROUNDS = 30, 16
MAX_BYTES = 60  # a video; what FFmpeg allocates for one packet alone is over 100


class _Allocator(ctypes.Structure):
    """What `mallinfo2` of the GNU C library gives; `used` are the bytes that are handed out."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "free_blocks", "small", "maps", "mapped", "unused", "small_free", "used", "free", "top")
    ]


@pytest.fixture(scope="module")
def count_used() -> Callable[[], int]:
    """Bytes that C code of this process holds."""
    function = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if function is None:
        pytest.skip("this C library does not say what it has handed out")
    function.restype = _Allocator

    def count() -> int:
        gc.collect()
        numbers = function()
        return numbers.used + numbers.mapped

    return count


def check_memory(read: Callable[[], object], count_used: Callable[[], int]) -> None:
    """What is never given back is more in every round; the first ones fill what libraries keep to be quick."""
    growth: list[float] = []
    while len(growth) < ROUNDS and (not growth or growth[-1] >= MAX_BYTES):
        before = count_used()
        for _ in range(VIDEOS):
            read()
        growth.append((count_used() - before) / VIDEOS)
    assert growth[-1] < MAX_BYTES, growth


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("videos")


# Each way in which frames are reached: by the index, by counted packets, from the start.
@pytest.mark.parametrize("kind", ["plain", "open_gop", "interlaced", "transport_stream", "mpeg4_avi", "mpeg2", "vp8"])
def test_chosen_frames(folder, count_used, kind):
    path = write_kind(kind, folder)

    def read() -> None:
        with open_video(path) as reader:
            reader.get_frames([3, 17, 30])

    check_memory(read, count_used)


def test_every_frame_is_a_key_frame(folder, count_used):
    """As in what an editor exports: reading begins anew at each of them."""
    path = write_video(folder / "keys.mp4", num_frames=24, gop=1, bframes=0)

    def read() -> None:
        with open_video(path) as reader:
            reader.get_frames([2, 5, 9, 20])

    check_memory(read, count_used)


@pytest.mark.parametrize("kind", ["plain", "interlaced"])
@pytest.mark.parametrize("indices", [[0, 1, 2], [3, 20, 33]], ids=["dense", "sparse"])
def test_a_pass_that_is_broken_off(folder, count_used, kind, indices):
    path = write_kind(kind, folder)

    def read() -> None:
        with open_video(path) as reader:
            next(iter(reader.iterate_frames(indices)))

    check_memory(read, count_used)


def test_a_stream_that_is_left(folder, count_used):
    content = write_kind("transport_stream", folder).read_bytes()

    def read() -> None:
        with VideoStream(io.BytesIO(content)) as stream:
            next(stream.iterate())

    check_memory(read, count_used)


def test_the_look_at_what_other_libraries_read_wrong(folder, count_used):
    path = write_kind("plain", folder)

    def read() -> None:
        with PyAVReader(MediaFile(str(path), path.open("rb"))) as reader:
            assert reader.find_unusual(True, True) is None

    check_memory(read, count_used)


def test_several_streams(folder, count_used):
    """Their packets are read until each has shown that it moves."""
    path = folder / "two.mkv"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("mpeg4", rate=24) for _ in range(2)]
        for stream in streams:
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in range(12):
            for stream in streams:
                frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), number, np.uint8), format="rgb24")
                frame.pts = number
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode())

    def read() -> None:
        with open_video(path) as reader:
            reader.get_frames([0, 5])

    check_memory(read, count_used)


@pytest.mark.parametrize("kind", ["plain", "hevc", "interlaced", "transport_stream", "mpeg4_avi", "vp9", "gif"])
def test_videos_that_are_cut_or_bent(folder, count_used, kind):
    content = bytearray(write_kind(kind, folder).read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(40)

    def read() -> None:
        for part in (content[:middle], content):
            with contextlib.suppress(VideoDecodingError), open_video(bytes(part)) as reader:
                reader.get_frames([0, reader.num_frames // 2, reader.num_frames - 1])

    check_memory(read, count_used)


def test_pictures_of_a_folder(tmp_path, count_used):
    for number in range(8):
        Image.fromarray(np.full((64, 96, 3), number, np.uint8)).save(tmp_path / f"{number:03d}.jpg")

    def read() -> None:
        with open_video(tmp_path) as reader:
            reader.get_frames([1, 6])

    check_memory(read, count_used)


@pytest.mark.parametrize("decoder", ["decord", "torchcodec"])
def test_other_libraries(folder, count_used, decoder):
    if importlib.util.find_spec(decoder) is None:
        pytest.skip(f"{decoder} is not installed")
    path = write_kind("plain", folder)

    def read() -> None:
        with open_video(path, decoder) as reader:
            reader.get_frames([3, 17, 30])

    check_memory(read, count_used)
