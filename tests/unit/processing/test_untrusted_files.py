"""Files from strangers: nothing else is opened, limits hold, the right stream is read and shown the right way."""

import http.server
import io
import socket
import struct
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tests.unit.video_files import KINDS, cut_start, decode_in_order, read_number, write_kind, write_video
from umt_hf.processing.containers import orient
from umt_hf.processing.decoding import VideoDecodingError, open_video
from umt_hf.processing.media_files import LIMITS, ReadingLimits

MEDIA = Path(__file__).parents[2] / "fixtures" / "media"
SECRET_COLOUR = (200, 30, 160)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def secret(folder):
    """A video elsewhere on the disk, all of one colour, in two containers."""
    inside = folder / "private"
    inside.mkdir()
    for name in ("secret.ts", "secret.mp4"):
        with av.open(str(inside / name), "w") as container:
            stream = container.add_stream("libx264", rate=24)
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
            for number in range(12):
                pixels = np.broadcast_to(np.array(SECRET_COLOUR, np.uint8), (64, 96, 3))
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 24)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return inside


def playlists(secret: Path) -> dict[str, bytes]:
    """Files that name others, by kind."""
    ts, mp4 = secret / "secret.ts", secret / "secret.mp4"
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n"
    mpd = (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"'
        ' mediaPresentationDuration="PT1S" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period>'
        '<AdaptationSet mimeType="video/mp4">'
        f'<Representation id="1" bandwidth="1"><BaseURL>{mp4}</BaseURL></Representation>'
        "</AdaptationSet></Period></MPD>"
    )
    return {
        "hls path": hls.format(ts).encode(),
        "hls url": hls.format(ts.as_uri()).encode(),
        "hls with a mark": b"\xef\xbb\xbf" + hls.format(ts).encode(),
        "hls mp4": hls.format(mp4).encode(),
        "dash": mpd.encode(),
        "concat": f"ffconcat version 1.0\nfile '{mp4}'\n".encode(),
        "concat sibling": b"ffconcat version 1.0\nfile secret.mp4\n",
        "sdp": (MEDIA / "i_sdp.mp4").read_bytes(),
        "asx": f'<ASX version="3.0"><Entry><Ref href="{mp4}"/></Entry></ASX>'.encode(),
        "pls": f"[playlist]\nFile1={mp4}\n".encode(),
    }


def is_secret(frames: np.ndarray) -> bool:
    return bool((np.abs(frames.astype(int) - SECRET_COLOUR).mean((1, 2, 3)) < 20).any())


WATCHERS: list[list[str]] = []


def _note(event: str, arguments: tuple) -> None:
    if WATCHERS and event in ("open", "socket.connect", "socket.bind", "subprocess.Popen", "os.exec"):
        WATCHERS[-1].append(f"{event} {arguments[0]}")


sys.addaudithook(_note)


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
@pytest.mark.parametrize("suffix", [".m3u8", ".mp4", ".mkv", ".mpd", ".txt", ".sdp", ".ffconcat", ".jpg"])
@pytest.mark.parametrize("form", ["path", "bytes", "file object", "url", "row"])
def test_files_that_name_others_are_refused_by_name(form, suffix, decoder, secret, tmp_path, monkeypatch):
    from umt_hf.data.sources import get_source

    if decoder == "decord":
        pytest.importorskip("decord", reason="decord is not installed")
    monkeypatch.chdir(secret)  # where a relative name would be found
    for kind, content in playlists(secret).items():
        path = (secret if kind == "concat sibling" else tmp_path) / f"list{suffix}"
        path.write_bytes(content)
        source = {"path": path, "bytes": content, "url": path.as_uri(), "file object": io.BytesIO(content)}.get(form)
        source = get_source({"bytes": content, "path": None}) if form == "row" else source
        watched: list[str] = []
        WATCHERS.append(watched)
        started = time.monotonic()
        try:
            with pytest.raises(VideoDecodingError, match="is refused: it is|cannot be decoded") as caught:
                open_video(source, decoder)
        finally:
            WATCHERS.remove(watched)
        assert time.monotonic() - started < 20, kind
        assert not [line for line in watched if "secret" in line or "socket" in line], kind
        if kind not in ("asx", "pls"):
            assert "makes a reader open other files or ports" in str(caught.value), (kind, str(caught.value))


def test_no_port_is_opened_for_a_session_description(monkeypatch):
    content = (MEDIA / "i_sdp.mp4").read_bytes()
    port = 5004
    started = time.monotonic()
    with pytest.raises(VideoDecodingError, match="description of network streams"):
        open_video(content)
    assert time.monotonic() - started < 20
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", port))  # free: nothing was left listening


def test_a_name_is_a_name_and_nothing_else(folder, monkeypatch, tmp_path):
    """Colons are not protocols, percent signs not patterns, whatever the folder."""
    source = write_video(tmp_path / "clip.mp4")
    truth = decode_in_order(source)[5]
    monkeypatch.chdir(tmp_path)
    for name in (
        "2024-01-01T10:30:00.mp4",
        "data:clip.mp4",
        "http:x.mp4",
        "file:y.mp4",
        "concat:a.mp4|b.mp4",
        "%03d.png",
    ):
        (tmp_path / name).write_bytes(source.read_bytes())
        with open_video(name) as reader:
            np.testing.assert_array_equal(reader.get_frames([5])[0], truth)


@pytest.mark.parametrize(("name", "flip"), [("c_hflip.mp4", np.s_[:, ::-1]), ("c_vflip.mp4", np.s_[::-1])])
def test_mirrors_are_applied(name, flip):
    with av.open(str(MEDIA / name)) as container:
        stored = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with open_video(MEDIA / name) as reader:
        for index in (0, len(stored) - 1):
            np.testing.assert_array_equal(reader.get_frames([index])[0], stored[index][flip])


def write_matrix(source: Path, path: Path, matrix: tuple[int, int, int, int]) -> Path:
    content = bytearray(source.read_bytes())
    start = content.index(b"tkhd") + 44
    a, b, c, d = (value * 65536 for value in matrix)
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 0x40000000 if any(matrix) else 0)
    path.write_bytes(content)
    return path


MATRICES = {
    "identity": ((1, 0, 0, 1), lambda p: p),
    "zero": ((0, 0, 0, 0), lambda p: p),
    "mirror": ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
    "upside down": ((1, 0, 0, -1), lambda p: p[::-1]),
    "half turn": ((-1, 0, 0, -1), lambda p: p[::-1, ::-1]),
    "clockwise": ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
    "anticlockwise": ((0, -1, 1, 0), lambda p: np.rot90(p, 1)),
    "transposed": ((0, 1, 1, 0), lambda p: p.transpose(1, 0, 2)),
    "other diagonal": ((0, -1, -1, 0), lambda p: p.transpose(1, 0, 2)[::-1, ::-1]),
}


@pytest.mark.parametrize("kind", MATRICES)
def test_the_complete_display_matrix_is_applied(kind, tmp_path):
    matrix, shown = MATRICES[kind]
    source = write_video(tmp_path / "clip.mp4", num_frames=4)
    stored = decode_in_order(source)[2]
    with open_video(write_matrix(source, tmp_path / "turned.mp4", matrix)) as reader:
        np.testing.assert_array_equal(reader.get_frames([2])[0], shown(stored))
    # A pixel where the matrix sends it, which is the independent rule: x' = a x + c y, y' = b x + d y.
    a, b, c, d = matrix
    if any(matrix):
        marked = np.zeros((3, 5, 3), np.uint8)
        marked[1, 4] = 255
        height, width = (3, 5) if a or d else (5, 3)
        found = np.argwhere(orient(a, b, c, d).apply(marked)[..., 0] == 255)[0]
        x, y = a * 4 + c * 1, b * 4 + d * 1
        x, y = x + (width - 1) * (a + c < 0), y + (height - 1) * (b + d < 0)
        assert found.tolist() == [y, x]


def test_the_best_stream_is_the_video():
    with (
        open_video(MEDIA / "f_twov_small_first.mp4") as reader,
        av.open(str(MEDIA / "f_twov_small_first.mp4")) as file,
    ):
        sizes = [(stream.codec_context.height, stream.codec_context.width) for stream in file.streams.video]
        assert (reader.height, reader.width) == max(sizes) != sizes[0]
    with open_video(MEDIA / "f_cover_first.mkv") as reader:
        assert reader.num_frames == 30


def test_music_with_a_cover_is_music(tmp_path):
    content = (MEDIA / "f_cover.m4a").read_bytes()
    (tmp_path / "song.mp4").write_bytes(content)
    for source in (MEDIA / "f_cover.m4a", tmp_path / "song.mp4", content):
        with pytest.raises(VideoDecodingError, match=r"has no video stream but a cover picture \(audio only"):
            open_video(source)


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_sizes_of_an_avi_are_read_as_players_do(codec, tmp_path):
    path = write_video(tmp_path / "clip.avi", codec=codec, bframes=0)
    content, truth = path.read_bytes(), decode_in_order(path)
    size = len(content)
    for length in (0, 0xFFFFFFFF, size, size + 8 - 8, size - 8):
        path.write_bytes(content[:4] + struct.pack("<I", length) + content[8:])
        with open_video(path) as reader:
            assert reader.num_frames == len(truth)
            np.testing.assert_array_equal(reader.get_frames([47])[0], truth[47])
    for length in (size + 1, size + 500):
        path.write_bytes(content[:4] + struct.pack("<I", length) + content[8:])
        with pytest.raises(VideoDecodingError, match="is cut short"):
            open_video(path)
    with open_video(MEDIA / "h_avi_piped.avi") as reader:
        assert reader.num_frames == 30


def write_numpy(path: Path, kind: str) -> Path:
    frames = np.zeros((2, 4, 4, 3), np.uint8)
    if kind == "archive":
        np.savez(path.with_suffix(".npz"), frames=frames)
        path.with_suffix(".npz").rename(path)
        return path
    np.save(path, np.array([{}, ()], object) if kind == "objects" else frames)
    content = path.read_bytes()
    changes = {
        "negative": (b"(2, 4, 4, 3)", b"(2,-4,-4, 3)"),
        "huge": (b"(2, 4, 4, 3), ", b"(2" + b"0" * 11 + b",)"),
        "unclosed": (b"'shape': (", b"'shape': {("),
        "brackets": (b"{'descr'", b"(((((((("),
        "unknown type": (b"|u1", b"|x9"),
        "text": (b"\x93NUMPY", b"NUMPY!"),
        "version": (b"NUMPY\x01", b"NUMPY\x09"),
    }
    if kind in changes:
        old, new = changes[kind]
        content = content.replace(old, new, 1)
    path.write_bytes(content[:40] if kind == "cut header" else content)
    return path


NUMPY_KINDS = [
    "archive", "objects", "negative", "huge", "unclosed", "brackets", "unknown type", "text", "version", "cut header",
]  # fmt: skip


@pytest.mark.parametrize("kind", NUMPY_KINDS)
def test_numpy_files_of_odd_kinds_are_named(kind, tmp_path):
    with pytest.raises(VideoDecodingError, match=r"clip\.npy: "):
        open_video(write_numpy(tmp_path / "clip.npy", kind))
    with pytest.raises(VideoDecodingError, match=r"k_npz\.npy: is an archive"):
        open_video(MEDIA / "k_npz.npy")


MALFORMED_ADDRESSES = [
    "http://[::1/x.mp4", "http://", "http:///x.mp4", "https://exa mple/x", "file://[oops/x.mp4", "//[oops/x.mp4",
    "ftp://127.0.0.1/x.mp4", "http://127.0.0.1:99999/x", "http://\x00/x",
]  # fmt: skip


@pytest.mark.parametrize("url", MALFORMED_ADDRESSES)
def test_malformed_addresses_are_named(url):
    with pytest.raises(VideoDecodingError) as caught:
        open_video(url)
    assert str(caught.value).startswith(url)


class HostileServer(http.server.BaseHTTPRequestHandler):
    """A server that promises, drips or leads astray."""

    def do_GET(self):
        kind = self.path.split("/")[1]
        if kind in ("header", "redirect_file", "redirect_ftp", "loop"):
            self.send_response(302 if kind != "header" else 200)
            target = {"redirect_file": "file:///etc/hostname", "redirect_ftp": "ftp://127.0.0.1/x", "loop": "/loop"}
            if kind == "header":
                self.flush_headers()
                for _ in range(40):
                    self.wfile.write(b"X-Filler: 1\r\n")
                    self.wfile.flush()
                    time.sleep(0.1)
            self.send_header("Location", target.get(kind, "/"))
            self.end_headers()
            return
        self.send_response(200)
        length = {"huge": 10**15, "short": 100, "large": 5000}.get(kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        try:
            for _ in range(50):
                self.wfile.write(b"x" * (200 if kind == "endless" or kind == "large" else 1))
                self.wfile.flush()
                if kind == "short":
                    return
                time.sleep(0.1 if kind == "drip" else 0)
        except OSError:
            pass

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def hostile_url():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HostileServer)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("huge", "1000000000000000 bytes are more than the limit of 4000"),
        ("large", "more than the limit of 4000"),
        ("endless", "more than the limit of 4000"),
        ("short", "ended after 1 of 100 bytes"),
        ("drip", "took longer than 0.5 seconds"),
        ("header", "took longer than 0.5 seconds"),
        ("redirect_file", "cannot be downloaded"),
        ("redirect_ftp", "cannot be downloaded"),
        ("loop", "cannot be downloaded"),
    ],
)
def test_downloads_are_bounded_and_stay_on_http(kind, reason, hostile_url, monkeypatch):
    monkeypatch.setattr(LIMITS, "max_download_bytes", 4000)
    monkeypatch.setattr(LIMITS, "max_download_seconds", 0.5)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    started = time.monotonic()
    with pytest.raises(VideoDecodingError, match=reason):
        open_video(f"{hostile_url}/{kind}/x.mp4")
    assert time.monotonic() - started < 20


def test_limits_are_named_and_adjustable(folder, monkeypatch):
    path = write_kind("plain", folder)
    monkeypatch.setattr(LIMITS, "max_frame_pixels", 64 * 96 - 1)
    with pytest.raises(VideoDecodingError, match=r"plain\.mp4: has frames of 96 x 64 pixels.*UMT_HF_MAX_FRAME_PIXELS"):
        open_video(path)
    monkeypatch.setattr(LIMITS, "max_frame_pixels", 64 * 96)
    monkeypatch.setattr(LIMITS, "max_frames", 20)
    with open_video(path) as reader:
        assert len(reader.get_frames(range(20))) == 20
        with pytest.raises(VideoDecodingError, match=r"plain\.mp4: 21 frames are asked.*UMT_HF_MAX_FRAMES"):
            reader.get_frames([0] * 21)
        monkeypatch.setattr(LIMITS, "max_frames", None)
        assert len(reader.get_frames([0] * 21)) == 21


def test_limits_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("UMT_HF_MAX_FRAMES", "7")
    monkeypatch.setenv("UMT_HF_MAX_DOWNLOAD_SECONDS", "1.5")
    monkeypatch.setenv("UMT_HF_MAX_FRAME_PIXELS", "none")
    assert ReadingLimits.from_environment() == ReadingLimits(None, 7, 2**31, 1.5)
    monkeypatch.setenv("UMT_HF_MAX_FRAMES", "many")
    with pytest.raises(ValueError, match="UMT_HF_MAX_FRAMES must be a number or `none`, got 'many'"):
        ReadingLimits.from_environment()


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path):
    from PIL import Image

    path = tmp_path / "bomb.mp4"
    Image.new("1", (16000, 16000)).save(path, "PNG")
    started = time.process_time()
    with pytest.raises(VideoDecodingError, match=r"bomb\.mp4: .*pixels"):
        open_video(path)
    assert time.process_time() - started < 1


def test_frames_asked_over_a_gap_of_hours_are_bounded():
    from umt_hf import UMTVideoProcessor

    with pytest.raises(VideoDecodingError, match="frames are asked of it"):
        UMTVideoProcessor()(MEDIA / "d_gap.mp4", fps=5, num_frames=None)


COUNTED = {"transport_stream", "mpeg4_avi", "mpeg2", "vp8"}


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if KINDS[kind][0] in (".ts", ".avi", ".mpg") or kind == "vp8"]
)
def test_frames_are_counted_from_packets(kind, folder):
    path = write_kind(kind, folder)
    truth = decode_in_order(path)
    with open_video(path) as reader:
        assert (reader._packet_index is not None) == (kind in COUNTED)
        assert reader.num_frames == len(truth)
        for request in ([0], [len(truth) - 1], [3, 30], [11, 12, 13, 25], list(range(len(truth)))):
            assert [read_number(frame) for frame in reader.get_frames(request)] == request
            if kind in COUNTED:
                assert (
                    reader._decode_stretches(reader._packet_index, request) is not None
                )  # no way round it was needed


@pytest.mark.parametrize("bframes", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("codec", "suffix"),
    [
        ("mpeg4", ".avi"),
        ("mpeg4", ".ts"),
        ("libx264", ".avi"),
        ("libx264", ".ts"),
        ("libx265", ".ts"),
        ("mpeg1video", ".mpg"),
        ("mpeg2video", ".mpg"),
        ("mpeg2video", ".vob"),
    ],
)
def test_packets_are_numbered_as_decoding_shows_them(codec, suffix, bframes, tmp_path):
    options = {"x265-params": f"log-level=none:bframes={bframes}:keyint=9"} if codec == "libx265" else {}
    path = write_video(tmp_path / f"clip{suffix}", codec=codec, bframes=bframes, gop=9, options=options, num_frames=40)
    truth = decode_in_order(path)
    with open_video(path) as reader:
        assert reader.num_frames == len(truth)
        for index in range(len(truth)):
            np.testing.assert_array_equal(reader.get_frames([index])[0], truth[index])


def test_real_avi_and_transport_stream_equal_decoding_in_order():
    for name in ("a_xvid_packed.avi", "a_h264.ts", "h_avi_piped.avi"):
        truth = decode_in_order(MEDIA / name)
        with open_video(MEDIA / name) as reader:
            np.testing.assert_array_equal(reader.get_frames(range(len(truth))), truth)
            indices = list(range(1, len(truth), 4))
            np.testing.assert_array_equal(reader.get_frames(indices), [truth[i] for i in indices])


# Kinds of file that decord (d) or torchcodec (t) read wrong in silence, and ones that they read right.
MISREAD = {
    "transport_stream": "dt", "mpeg2": "dt", "h264_avi": "dt", "mpeg4_avi": "dt", "mpeg4_mp4": "dt",
    "interlaced": "dt", "intra_refresh": "dt", "open_gop": "d", "hevc": "d", "plain": "", "no_b_frames": "",
    "variable_rate": "", "vp9": "",
}  # fmt: skip


@pytest.mark.parametrize("decoder", ["decord", "torchcodec"])
@pytest.mark.parametrize("kind", MISREAD)
def test_what_other_readers_read_wrong_is_refused(kind, decoder, folder):
    path = write_kind(kind, folder)
    if decoder == "decord":
        pytest.importorskip("decord", reason="decord is not installed")
    with av.open(str(path)) as container:
        if kind == "interlaced" and not hasattr(container.streams.video[0].codec_context, "field_order"):
            pytest.skip("this PyAV does not say which files are interlaced")
    try:
        with open_video(path, decoder) as reader:
            assert decoder[0] not in MISREAD[kind]
            truth = decode_in_order(path)
            for request in ([len(truth) - 1], [1, 5, 8, 12], list(range(len(truth)))):
                assert [read_number(frame) for frame in reader.get_frames(request)] == request
    except ImportError as error:
        pytest.skip(str(error))
    except VideoDecodingError as error:
        assert decoder[0] in MISREAD[kind], error
        assert str(error).startswith(f"{path}: is not read with decoder='{decoder}'") and "decoder='pyav'" in str(
            error
        )


@pytest.mark.parametrize("kind", ["cut", "early", "mirror", "two streams", "mxf"])
def test_odd_files_in_ordinary_containers_are_refused_by_decord(kind, folder, tmp_path):
    pytest.importorskip("decord", reason="decord is not installed")
    plain = write_kind("plain", folder)
    if kind == "mxf":
        path = write_video(tmp_path / "clip.mxf", codec="mpeg2video", bframes=0)
    elif kind == "early":
        path = write_video(tmp_path / "clip.mkv", ticks=[10 * i - 50 for i in range(48)])
    else:
        path = {"mirror": MEDIA / "c_hflip.mp4", "two streams": MEDIA / "f_twov_small_first.mp4"}.get(kind)
        path = path or cut_start(plain, tmp_path / "cut.mp4", 5)
    with open_video(path) as reader:
        reader.get_frames([0])
        may_be_read = kind == "early" and reader._frame_pts[0] >= 0  # the muxer moved the times
    if not may_be_read:
        with pytest.raises(VideoDecodingError, match="is not read with decoder='decord'"):
            open_video(path, "decord")


@pytest.mark.parametrize("form", ["bytes", "file object", "odd name", "pattern"])
def test_decord_reads_bytes_and_odd_names_through_a_file(form, folder, tmp_path):
    pytest.importorskip("decord", reason="decord is not installed")
    plain = write_kind("plain", folder)
    truth = decode_in_order(plain)
    names = {"odd name": "clip", "pattern": "%03d.mp4"}
    source = {"bytes": plain.read_bytes(), "file object": io.BytesIO(plain.read_bytes())}.get(form)
    if source is None:
        source = tmp_path / names[form]
        source.write_bytes(plain.read_bytes())
    with open_video(source, "decord") as reader:
        np.testing.assert_array_equal(reader.get_frames([7, 30]), [truth[7], truth[30]])
        place = reader._folder.name
        assert Path(place).is_dir()
    assert not Path(place).exists()
