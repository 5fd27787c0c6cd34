"""A seeded generator of hostile files: what a stranger, a crash or an odd camera leaves behind.

Each file states what is right about it, by knowledge of how it was made rather than by reading it: which stream is its
video, how its frames are shown, or that it must be refused. Legend: N frames of the intact video.
"""

import io
import random
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from tests.unit.video_files import draw_frame

MEDIA = Path(__file__).parents[1] / "fixtures" / "media"
NUM_FRAMES, HEIGHT, WIDTH, RATE = 30, 48, 64, 24
SECRET_COLOUR = (200, 30, 160)
LISTENING_PORT = 5004


@dataclass
class HostileFile:
    """A file, and what is right about it.

    Args:
        kind: Group in the table.
        name: Of the file, with its suffix.
        content: Its bytes.
        expected: "right" = every frame reads as the reference does; "refused" = a named error; "either" = damaged: a
            frame that reads is right, and the rest is a named error.
        stream: Number of the stream that is the video.
        show: Turns a stored frame as the file asks.
        intact: The file before it was damaged.
        source: What to open where it is not a file of `content`: a function of the folder that it may write to.
    """

    kind: str
    name: str
    content: bytes
    expected: str = "right"
    stream: int = 0
    show: Callable[[np.ndarray], np.ndarray] = lambda pixels: pixels
    intact: bytes = b""
    source: Callable[[Path], str] | None = None


def encode(
    form: str = "mp4",
    codec: str = "libx264",
    num_frames: int = NUM_FRAMES,
    height: int = HEIGHT,
    width: int = WIDTH,
    pix_fmt: str = "yuv420p",
    gop: int = 10,
    bframes: int = 2,
    ticks: list[int] | None = None,
    options: dict[str, str] | None = None,
    mux: dict[str, str] | None = None,
    draw: Callable[[int], np.ndarray] | None = None,
) -> bytes:
    """Encode numbered frames into a container; `ticks` are times in tenths of a frame."""
    with tempfile.TemporaryDirectory() as folder:  # moving the header to the front reopens the file by its name
        path = Path(folder) / "video"
        _write(path, form, codec, num_frames, (height, width, pix_fmt, gop, bframes), ticks, options, mux, draw)
        return path.read_bytes()


def _write(
    path: Path,
    form: str,
    codec: str,
    num_frames: int,
    picture: tuple[int, int, str, int, int],
    ticks: list[int] | None,
    options: dict[str, str] | None,
    mux: dict[str, str] | None,
    draw: Callable[[int], np.ndarray] | None,
) -> None:
    height, width, pix_fmt, gop, bframes = picture
    # One thread and no random identifiers: the same bytes each time.
    with av.open(str(path), "w", format=form, options={"fflags": "+bitexact", **(mux or {})}) as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.gop_size, stream.options = gop, options or {}
        stream.codec_context.thread_count = 1
        if bframes and codec in ("libx264", "mpeg4", "mpeg2video"):
            stream.max_b_frames = bframes
        base = Fraction(1, RATE * 10)
        if ticks is not None:
            stream.codec_context.time_base = base
        for number in range(num_frames):
            pixels = draw_frame(number, height, width) if draw is None else draw(number)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = (number, Fraction(1, RATE)) if ticks is None else (ticks[number], base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


CODECS = {
    "h264.mp4": ("mp4", "libx264", {}),
    "h264.mov": ("mov", "libx264", {}),
    "h264.mkv": ("matroska", "libx264", {}),
    "h264.ts": ("mpegts", "libx264", {}),
    "h264.flv": ("flv", "libx264", {}),
    "h264.avi": ("avi", "libx264", {}),
    "h264.nut": ("nut", "libx264", {}),
    "h264.h264": ("h264", "libx264", {}),
    "h264.3gp": ("3gp", "libx264", {}),
    "h264.mxf": ("mxf", "mpeg2video", {}),
    "h264_plain.avi": ("avi", "libx264", {"bframes": 0}),
    "h264_444.mp4": ("mp4", "libx264", {"pix_fmt": "yuv444p"}),
    "h264_10.mp4": ("mp4", "libx264", {"pix_fmt": "yuv420p10le"}),
    "h264_grey.mp4": ("mp4", "libx264", {"pix_fmt": "gray"}),
    "open_gop.mp4": ("mp4", "libx264", {"options": {"x264-params": "open-gop=1:keyint=10:bframes=3"}}),
    "open_gop.ts": ("mpegts", "libx264", {"options": {"x264-params": "open-gop=1:keyint=10:bframes=3"}}),
    "intra_refresh.mp4": ("mp4", "libx264", {"options": {"x264-params": "intra-refresh=1:keyint=10"}}),
    "intra_refresh.ts": ("mpegts", "libx264", {"options": {"x264-params": "intra-refresh=1:keyint=10"}}),
    "interlaced.mkv": ("matroska", "libx264", {"options": {"x264-params": "tff=1:keyint=10"}}),
    "interlaced.ts": ("mpegts", "libx264", {"options": {"x264-params": "tff=1:keyint=10"}}),
    "one_gop.mp4": ("mp4", "libx264", {"gop": 250}),
    "one_gop.ts": ("mpegts", "libx264", {"gop": 250}),
    "intra.mp4": ("mp4", "libx264", {"gop": 1, "bframes": 0}),
    "faststart.mp4": ("mp4", "libx264", {"mux": {"movflags": "faststart"}}),
    "fragments.mp4": ("mp4", "libx264", {"mux": {"movflags": "frag_keyframe+empty_moov"}}),
    "fragments_each.mp4": ("mp4", "libx264", {"mux": {"movflags": "frag_every_frame+empty_moov+default_base_moof"}}),
    "hevc.mp4": ("mp4", "libx265", {"options": {"x265-params": "log-level=none"}}),
    "hevc.ts": ("mpegts", "libx265", {"options": {"x265-params": "log-level=none"}}),
    "vp8.webm": ("webm", "libvpx", {"options": {"auto-alt-ref": "1", "lag-in-frames": "12"}}),
    "vp8.mkv": ("matroska", "libvpx", {}),
    "vp8.ivf": ("ivf", "libvpx", {}),
    "vp9.webm": ("webm", "libvpx-vp9", {"options": {"deadline": "realtime", "cpu-used": "8"}}),
    "vp9_altref.webm": ("webm", "libvpx-vp9", {"options": {"lag-in-frames": "12", "auto-alt-ref": "1"}}),
    "av1.mp4": ("mp4", "libsvtav1", {"options": {"preset": "12"}}),
    "mpeg4.avi": ("avi", "mpeg4", {}),
    "mpeg4_plain.avi": ("avi", "mpeg4", {"bframes": 0}),
    "mpeg4.mp4": ("mp4", "mpeg4", {}),
    "mpeg4.mkv": ("matroska", "mpeg4", {}),
    "mpeg4.ts": ("mpegts", "mpeg4", {}),
    "mpeg4_qpel.avi": ("avi", "mpeg4", {"options": {"flags": "+qpel"}}),
    "mpeg1.mpg": ("mpeg", "mpeg1video", {"bframes": 0}),
    "mpeg2.mpg": ("mpeg", "mpeg2video", {}),
    "mpeg2.vob": ("vob", "mpeg2video", {}),
    "mpeg2.ts": ("mpegts", "mpeg2video", {}),
    "mpeg2.m2v": ("mpeg2video", "mpeg2video", {}),
    "mjpeg.avi": ("avi", "mjpeg", {"pix_fmt": "yuvj420p", "bframes": 0}),
    "mjpeg.mov": ("mov", "mjpeg", {"pix_fmt": "yuvj420p", "bframes": 0}),
    "mjpeg.mjpeg": ("mjpeg", "mjpeg", {"pix_fmt": "yuvj420p", "bframes": 0}),
    "wmv2.asf": ("asf", "wmv2", {"bframes": 0}),
    "flv1.flv": ("flv", "flv", {"bframes": 0}),
    "h263.3gp": ("3gp", "h263", {"bframes": 0, "height": 96, "width": 128}),
    "prores.mov": ("mov", "prores_ks", {"pix_fmt": "yuv422p10le", "bframes": 0}),
    "huffyuv.avi": ("avi", "huffyuv", {"pix_fmt": "yuv422p", "bframes": 0}),
    "ffv1.mkv": ("matroska", "ffv1", {"bframes": 0}),
    "raw.avi": ("avi", "rawvideo", {"pix_fmt": "bgr24", "bframes": 0}),
    "gif.gif": ("gif", "gif", {"pix_fmt": "rgb8", "bframes": 0}),
    "apng.png": ("apng", "apng", {"pix_fmt": "rgb24", "bframes": 0}),
    "theora.ogv": ("ogg", "libtheora", {"bframes": 0}),
    "dv.dv": ("dv", "dvvideo", {"height": 576, "width": 720, "bframes": 0, "num_frames": 4}),
}


def is_available(codec: str) -> bool:
    """Whether this PyAV can encode with it."""
    try:
        av.codec.Codec(codec, "w")
    except ValueError:
        return False
    return True


def make_codecs(_: random.Random) -> Iterator[HostileFile]:
    """Containers and codecs, undamaged."""
    for name, (form, codec, options) in CODECS.items():
        if not is_available(codec):
            continue
        try:
            content = encode(form, codec, **options)
        except (ValueError, av.FFmpegError):  # this build pairs them differently
            continue
        yield HostileFile("codecs and containers", name, content)


def make_times(generator: random.Random) -> Iterator[HostileFile]:
    """Uneven, late, early and absurd times."""
    steady = [10 * i for i in range(NUM_FRAMES)]
    ticks = {
        "quadratic": [10 * i + 7 * (i // 5) ** 2 for i in range(NUM_FRAMES)],
        "jitter": [10 * i + generator.randrange(8) for i in range(NUM_FRAMES)],
        "late": [value + 2400 for value in steady],
        "gap": [value + (240 * 3600 if i > 14 else 0) for i, value in enumerate(steady)],
        "bursts": [value // 50 * 50 + i % 5 for i, value in enumerate(steady)],
        "early": [value - 60 for value in steady],
    }
    for name, values in ticks.items():
        for form, suffix in (("mp4", "mp4"), ("matroska", "mkv"), ("mpegts", "ts")):
            try:
                # Gaps of hours make the rate control of x264 depend on chance.
                content = encode(form, ticks=values, options={"qp": "25"})
            except (ValueError, av.FFmpegError):
                continue
            yield HostileFile("times and gaps", f"{name}.{suffix}", content)


def make_edit_lists(_: random.Random) -> Iterator[HostileFile]:
    """Cuts without re-encoding, whose first frames are hidden."""
    for source in ("plain", "open"):
        options = {"options": {"x264-params": "open-gop=1:keyint=10:bframes=3"}} if source == "open" else {}
        original = encode("mp4", **options)
        for hidden in (1, 5, 10, 17):
            file = io.BytesIO()
            with av.open(io.BytesIO(original)) as video, av.open(file, "w", format="mp4") as copy:
                stream = video.streams.video[0]
                target = copy.add_stream_from_template(stream)
                shift = round(hidden / (stream.average_rate * stream.time_base))
                for packet in video.demux(stream):
                    if packet.dts is not None:
                        packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, target
                        copy.mux(packet)
            yield HostileFile("edit lists", f"{source}_{hidden}.mp4", file.getvalue())


def set_matrix(content: bytes, matrix: tuple[float, float, float, float]) -> bytes:
    """Write the display matrix of an MP4."""
    changed = bytearray(content)
    start = content.index(b"tkhd") + 44
    a, b, c, d = (round(value * 65536) for value in matrix)
    changed[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 0x40000000 if any(matrix) else 0)
    return bytes(changed)


def show_by_matrix(matrix: tuple[float, float, float, float]) -> Callable[[np.ndarray], np.ndarray]:
    """Move every pixel where the matrix sends it, one by one."""
    a, b, c, d = (round(value) for value in matrix)

    def show(pixels: np.ndarray) -> np.ndarray:
        height, width = pixels.shape[:2]
        y, x = np.mgrid[:height, :width]
        new_x, new_y = a * x + c * y, b * x + d * y
        new_x, new_y = new_x - new_x.min(), new_y - new_y.min()
        shown = np.empty((new_y.max() + 1, new_x.max() + 1, 3), np.uint8)
        shown[new_y, new_x] = pixels
        return shown

    return show


def make_matrices(_: random.Random) -> Iterator[HostileFile]:
    """All turns and mirrors, nothing, and scaled ones."""
    plain, cut = encode(), encode("mp4", mux={"movflags": "frag_keyframe+empty_moov"})
    turns = [
        (1, 0, 0, 1),
        (-1, 0, 0, 1),
        (1, 0, 0, -1),
        (-1, 0, 0, -1),
        (0, 1, -1, 0),
        (0, -1, 1, 0),
        (0, 1, 1, 0),
        (0, -1, -1, 0),
    ]
    for number, matrix in enumerate(turns):
        yield HostileFile(
            "display matrices", f"turn_{number}.mp4", set_matrix(plain, matrix), show=show_by_matrix(matrix)
        )
        scaled = tuple(2 * value for value in matrix)
        yield HostileFile(
            "display matrices", f"scaled_{number}.mp4", set_matrix(plain, scaled), show=show_by_matrix(matrix)
        )
    yield HostileFile(
        "display matrices", "fragments.mp4", set_matrix(cut, (0, 1, 1, 0)), show=show_by_matrix((0, 1, 1, 0))
    )
    yield HostileFile("display matrices", "zero.mp4", set_matrix(plain, (0, 0, 0, 0)))
    yield HostileFile("display matrices", "bare_zero.mov", set_matrix(encode("mov"), (0, 0, 0, 0)))


def encode_streams(form: str, streams: list[dict], audio: bool = False) -> bytes:
    """Several streams in one file; `single` ones have one picture, `cover` ones are attached."""
    file = io.BytesIO()
    with av.open(file, "w", format=form, options={"fflags": "+bitexact"}) as container:
        added = []
        sound = container.add_stream("aac", rate=16000, layout="mono") if audio else None
        for options in streams:
            stream = container.add_stream(options.get("codec", "libx264"), rate=RATE)
            stream.width, stream.height, stream.codec_context.thread_count = options["width"], options["height"], 1
            stream.pix_fmt = "yuvj420p" if options.get("codec") == "mjpeg" else "yuv420p"
            # The same for all: a muxer would make the first one the default, which players then take.
            cover, default = av.stream.Disposition.attached_pic, av.stream.Disposition.default
            stream.disposition = cover if options.get("cover") else default
            added.append(stream)
        if sound is not None:
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 16000
            container.mux(sound.encode(frame))
            container.mux(sound.encode())
        for number in range(NUM_FRAMES):
            for stream, options in zip(added, streams, strict=True):
                if number and (options.get("single") or options.get("cover")):
                    continue
                pixels = draw_frame(number, options["height"], options["width"])
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, RATE)
                container.mux(stream.encode(frame))
        for stream in added:
            container.mux(stream.encode())
    return file.getvalue()


def make_streams(_: random.Random) -> Iterator[HostileFile]:
    """Proxies, thumbnails and covers before, behind and instead of the video; sound alone."""
    small, large = {"height": 32, "width": 64}, {"height": 64, "width": 96}
    cover = {"codec": "mjpeg", "height": 128, "width": 128, "single": True}
    for form, suffix in (("mp4", "mp4"), ("matroska", "mkv"), ("mov", "mov"), ("mpegts", "ts")):
        yield HostileFile("streams", f"small_first.{suffix}", encode_streams(form, [small, large]), stream=1)
        yield HostileFile("streams", f"large_first.{suffix}", encode_streams(form, [large, small]), stream=0)
        yield HostileFile("streams", f"three.{suffix}", encode_streams(form, [small, large, small]), stream=1)
        yield HostileFile("streams", f"sound_first.{suffix}", encode_streams(form, [large], audio=True), stream=0)
        yield HostileFile("streams", f"sound.{suffix}", encode_streams(form, [], audio=True), "refused")
    for form, suffix in (("matroska", "mkv"), ("mov", "mov")):
        yield HostileFile("streams", f"cover_track_first.{suffix}", encode_streams(form, [cover, large]), stream=1)
        yield HostileFile("streams", f"cover_track_last.{suffix}", encode_streams(form, [large, cover]), stream=0)
    attached = {**cover, "cover": True}
    for form, suffix in (("mp4", "m4a"), ("mp4", "mp4"), ("matroska", "mka")):
        try:
            content = encode_streams(form, [attached], audio=True)
        except (ValueError, AttributeError, av.FFmpegError):
            continue
        yield HostileFile("streams", f"song_with_cover.{suffix}", content, "refused")
    yield HostileFile("streams", "song.m4a", (MEDIA / "f_cover.m4a").read_bytes(), "refused")
    yield HostileFile("streams", "song_called.mp4", (MEDIA / "f_cover.m4a").read_bytes(), "refused")
    yield HostileFile("streams", "cover_first.mkv", (MEDIA / "f_cover_first.mkv").read_bytes(), stream=1)
    yield HostileFile("streams", "small_first_real.mp4", (MEDIA / "f_twov_small_first.mp4").read_bytes(), stream=1)


def write_secret(folder: Path) -> Path:
    """A folder with a video of one colour that no hostile file may show."""
    secret = folder / "secret"
    secret.mkdir(exist_ok=True)
    pixels = np.ascontiguousarray(np.broadcast_to(np.array(SECRET_COLOUR, np.uint8), (HEIGHT, WIDTH, 3)))
    for form, name in (("mpegts", "secret.ts"), ("mp4", "secret.mp4"), ("matroska", "secret.mkv")):
        (secret / name).write_bytes(encode(form, draw=lambda number: pixels))
    for number in range(3):
        Image.fromarray(pixels).save(secret / f"secret{number}.png")
    return secret


def make_playlists(folder: Path) -> Iterator[HostileFile]:
    """Everything that makes FFmpeg open further files or ports, under suffixes that hide it."""
    secret = folder / "secret"
    ts, mp4 = secret / "secret.ts", secret / "secret.mp4"
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n"
    contents = {
        "hls": hls.format(ts),
        "hls_url": hls.format(ts.as_uri()),
        "hls_mp4": hls.format(mp4),
        "hls_map": f'#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXT-X-MAP:URI="{mp4}"\n#EXTINF:1,\n{mp4}\n#EXT-X-ENDLIST\n',
        "hls_master": f"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{secret}/inner.m3u8\n",
        "hls_http": hls.format("http://127.0.0.1:5005/secret.ts"),
        "hls_concat": hls.format(f"concat:{ts}|{ts}"),
        "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" profiles="urn:mpeg:'
        'dash:profile:isoff-on-demand:2011" mediaPresentationDuration="PT1S"><Period>'
        '<AdaptationSet mimeType="video/mp4">'
        f'<Representation id="1" bandwidth="1"><BaseURL>{mp4}</BaseURL></Representation>'
        "</AdaptationSet></Period></MPD>",
        "concat": f"ffconcat version 1.0\nfile '{mp4}'\n",
        "concat_sibling": "ffconcat version 1.0\nfile secret.mp4\n",
        "sdp": (MEDIA / "i_sdp.mp4").read_text(),
        "asx": f'<ASX version="3.0"><Entry><Ref href="{mp4}"/></Entry></ASX>',
        "pls": f"[playlist]\nFile1={mp4}\nNumberOfEntries=1\n",
        "rtsp": "RTSPtext\nrtsp://127.0.0.1:5005/x\n",
        "imf": '<?xml version="1.0"?><CompositionPlaylist xmlns="http://www.smpte-ra.org/schemas/2067-3/2013"/>',
        "vobsub": "# VobSub index file, v7 (do not modify this line!)\nid: en, index: 0\n",
        "avisynth": f'DirectShowSource("{mp4}")\n',
        "lavfi": f"movie={mp4}\n",
        "ffmetadata": ";FFMETADATA1\ntitle=x\n",
        "smil": f'<smil><body><video src="{mp4}"/></body></smil>',
        "svg": '<svg xmlns="http://www.w3.org/2000/svg"/>',
    }
    (secret / "inner.m3u8").write_text(hls.format(ts))
    for number, (name, content) in enumerate(contents.items()):
        suffixes = (".mp4", ".m3u8", ".ts", ".mkv", ".jpg", ".avs", ".mpd", ".sdp", ".ffconcat", ".txt")
        for suffix in (".mp4", suffixes[number % len(suffixes)], suffixes[(3 * number + 1) % len(suffixes)]):
            yield HostileFile("playlists and scripts", f"{name}{suffix}", content.encode(), "refused")
    pattern = f"{secret}/secret%d.png"
    yield HostileFile("playlists and scripts", "image2", b"", "refused", source=lambda _: pattern)
    yield HostileFile("playlists and scripts", "glob", b"", "refused", source=lambda _: f"{secret}/*.png")
    for scheme in ("concat", "subfile,,start,0,end,0,,", "crypto", "cache", "async", "data", "pipe", "fd"):
        yield HostileFile(
            "playlists and scripts", f"protocol_{scheme[:7]}", b"", "refused", source=lambda _, s=scheme: f"{s}:{mp4}"
        )
    for address in ("http://[::1/x", "http://", "file://[oops/x.mp4", "//[oops/x.mp4", "ftp://127.0.0.1/x"):
        yield HostileFile("playlists and scripts", "address", b"", "refused", source=lambda _, a=address: a)


DAMAGED = (
    "h264.mp4",
    "faststart.mp4",
    "fragments.mp4",
    "h264.mkv",
    "h264.ts",
    "mpeg4.avi",
    "vp8.webm",
    "vp9.webm",
    "mpeg2.mpg",
    "hevc.mp4",
    "h264.flv",
)


def make_truncations(generator: random.Random) -> Iterator[HostileFile]:
    """Files cut at any place."""
    for name in DAMAGED:
        form, codec, options = CODECS[name]
        if is_available(codec):
            content = encode(form, codec, **options)
            for share in (0.02, 0.3, 0.6, 0.9, generator.random()):
                cut = content[: max(int(len(content) * share), 1)]
                yield HostileFile("cut short", f"{share:.2f}_{name}", cut, "either")
            yield HostileFile("cut short", f"less_{name}", content[: -generator.randrange(1, 200)], "either")
            middle = len(content) // 2
            yield HostileFile("cut short", f"hole_{name}", content[:middle] + content[middle + 300 :], "either")
            yield HostileFile("cut short", f"start_{name}", content[generator.randrange(1, middle) :], "either")


def make_flips(generator: random.Random) -> Iterator[HostileFile]:
    """Single bits, zeroed and random stretches."""
    for name in DAMAGED:
        form, codec, options = CODECS[name]
        if not is_available(codec):
            continue
        content = encode(form, codec, **options)
        for trial in range(3):
            damaged = bytearray(content)
            for _ in range(1 + 3 * trial):
                damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
            yield HostileFile("flipped bits", f"{trial}_{name}", bytes(damaged), "either", intact=content)
        start = generator.randrange(len(content) // 4, len(content) // 2)
        yield HostileFile(
            "flipped bits", f"zeros_{name}", content[:start] + bytes(64) + content[start + 64 :], "either"
        )
        noise = generator.randbytes(64)
        yield HostileFile(
            "flipped bits", f"noise_{name}", content[:start] + noise + content[start + 64 :], "either", intact=content
        )


def make_headers(generator: random.Random) -> Iterator[HostileFile]:
    """Damaged headers and tables."""
    content = encode("mp4", mux={"movflags": "faststart"})
    for box in (
        b"ftyp",
        b"moov",
        b"mvhd",
        b"trak",
        b"tkhd",
        b"mdhd",
        b"hdlr",
        b"stbl",
        b"stsd",
        b"avcC",
        b"stts",
        b"ctts",
        b"stss",
        b"stsc",
        b"stsz",
        b"stco",
        b"mdat",
    ):
        place = content.find(box)
        if place < 4:
            continue
        for length in (0, 0xFFFFFFFF, 9):
            damaged = content[: place - 4] + struct.pack(">I", length) + content[place:]
            yield HostileFile("headers", f"{box.decode()}_{length}.mp4", damaged, "either")
        damaged = content[: place + 8] + generator.randbytes(12) + content[place + 20 :]
        yield HostileFile("headers", f"{box.decode()}_noise.mp4", damaged, "either")
    for name in ("h264.mkv", "mpeg4.avi", "h264.ts"):
        form, codec, options = CODECS[name]
        content = encode(form, codec, **options)
        for trial in range(4):
            place = generator.randrange(0, 300)
            damaged = content[:place] + generator.randbytes(8) + content[place + 8 :]
            yield HostileFile("headers", f"{trial}_{name}", damaged, "either")


def make_sizes(_: random.Random) -> Iterator[HostileFile]:
    """Few frames, odd, tiny and extreme sizes."""
    for height, width in ((1, 1), (1, 3), (3, 1), (2, 2), (5, 7), (17, 33), (2, 4096), (4096, 2), (47, 63)):
        if is_available("libvpx-vp9"):
            content = encode(
                "webm",
                "libvpx-vp9",
                4,
                height,
                width,
                options={"deadline": "realtime", "cpu-used": "8"},
                draw=lambda number, h=height, w=width: np.full((h, w, 3), 40 * number + 20, np.uint8),
            )
            yield HostileFile("sizes", f"vp9_{width}x{height}.webm", content)
        gradient = np.arange(height * width * 3, dtype=np.uint32).reshape(height, width, 3).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(gradient).save(file, "PNG")
        yield HostileFile("sizes", f"png_{width}x{height}.png", file.getvalue())
    for count in (1, 2, 3):
        yield HostileFile("sizes", f"frames_{count}.mp4", encode(num_frames=count))
        # FFmpeg itself gives up on a transport stream of two or three frames.
        yield HostileFile("sizes", f"frames_{count}.ts", encode("mpegts", num_frames=count), "either")
        yield HostileFile("sizes", f"frames_{count}.avi", encode("avi", "mpeg4", num_frames=count))


def make_avi_sizes(_: random.Random) -> Iterator[HostileFile]:
    """Sizes that players pass over, and those that say that a piece is missing."""
    for codec in ("mpeg4", "libx264"):
        content = encode("avi", codec, bframes=0)
        for name, length in (
            ("unknown", 0xFFFFFFFF),
            ("zero", 0),
            ("itself", len(content)),
            ("right", len(content) - 8),
        ):
            changed = content[:4] + struct.pack("<I", length) + content[8:]
            yield HostileFile("AVI sizes", f"{name}_{codec}.avi", changed)
        changed = content[:4] + struct.pack("<I", len(content) + 1000) + content[8:]
        yield HostileFile("AVI sizes", f"too_large_{codec}.avi", changed, "refused")
    yield HostileFile("AVI sizes", "piped.avi", (MEDIA / "h_avi_piped.avi").read_bytes())
    yield HostileFile("AVI sizes", "packed.avi", (MEDIA / "a_xvid_packed.avi").read_bytes())


def make_names(_: random.Random) -> Iterator[HostileFile]:
    """Names that mean something to FFmpeg, Python or a shell."""
    content = encode()
    for name in (
        "2024-01-01T10:30:00.mp4",
        "data:clip.mp4",
        "http:x.mp4",
        "file:y.mp4",
        "concat:a|b.mp4",
        "%03d.png",
        "*.mp4",
        "-i.mp4",
        "a b.mp4",
        "ünïcödé.mp4",
        "no_suffix",
        ".hidden",
        "x.m3u8",
        "x.sdp",
        "x.jpg",
        "quote'.mp4",
        'quote".mp4',
        "new\nline.mp4",
        "back\\slash.mp4",
        "dollar$HOME.mp4",
        "pipe:0",
        "fd:1",
    ):
        yield HostileFile("names", name, content)
    yield HostileFile("names", "clip.npy.mp4", content)


def make_numpy(_: random.Random) -> Iterator[HostileFile]:
    """Files of decoded frames, right and broken."""
    frames = np.stack([draw_frame(number, HEIGHT, WIDTH) for number in range(6)])

    def save(array: np.ndarray, pickled: bool = False) -> bytes:
        file = io.BytesIO()
        np.save(file, array, allow_pickle=pickled)
        return file.getvalue()

    sound = save(frames)
    archive = io.BytesIO()
    np.savez(archive, frames=frames)
    shape = str(frames.shape).encode()
    files = {
        "floats": save(frames.astype(np.float32)),
        "one": save(frames[0]),
        "four": save(np.zeros((2, 4, 4, 4), np.uint8)),
        "empty": save(frames[:0]),
        "objects": save(np.array([{}, ()], object), True),
        "archive": archive.getvalue(),
        "negative": sound.replace(shape, shape.replace(b"(6, 48", b"(-6,48")),
        "cut": sound[:-9],
        "header": sound[:30],
        "unclosed": sound.replace(b"'shape': (", b"'shape': {("),
        "version": sound.replace(b"NUMPY\x01", b"NUMPY\x09"),
        "type": sound.replace(b"|u1", b"|x9"),
        "brackets": sound.replace(b"{'descr'", b"(((((((("),
        "text": b"text" * 40,
        "huge": sound.replace(shape, b"(6" + b"0" * (len(shape) - 3) + b",)"),
        "code": sound.replace(b"(6, 48", b"__impo"),
    }
    for name, content in files.items():
        yield HostileFile("numpy files", f"{name}.npy", content, "refused")


def make_pictures(generator: random.Random) -> Iterator[HostileFile]:
    """Animated pictures and bombs."""
    frames = [Image.fromarray(draw_frame(number, HEIGHT, WIDTH)) for number in range(5)]
    for kind, suffix in (("GIF", "gif"), ("PNG", "png"), ("WEBP", "webp"), ("TIFF", "tiff")):
        file = io.BytesIO()
        frames[0].save(file, kind, save_all=True, append_images=frames[1:])
        yield HostileFile("pictures", f"animated.{suffix}", file.getvalue(), "either")
    for name, size in (("square", (16000, 16000)), ("wide", (200000, 1000))):
        for suffix in ("png", "mp4"):
            file = io.BytesIO()
            Image.new("1", size).save(file, "PNG")
            yield HostileFile("pictures", f"bomb_{name}.{suffix}", file.getvalue(), "refused")
    header = struct.pack(">II", 2**31 - 1, 2**31 - 1)
    file = io.BytesIO()
    frames[0].save(file, "PNG")
    content = file.getvalue()
    yield HostileFile("pictures", "huge_header.png", content[:16] + header + content[24:], "refused")
    yield HostileFile("pictures", "drawing.jpg", (MEDIA / "eps.jpg").read_bytes(), "refused")


def make_nothing(generator: random.Random) -> Iterator[HostileFile]:
    """What is not a video at all."""
    contents = {
        "empty.mp4": b"",
        "zeros.mp4": bytes(5000),
        "noise.mp4": generator.randbytes(5000),
        "text.mp4": b"text" * 500,
        "page.mp4": b"<html>404</html>" * 50,
        "zip.mp4": b"PK\x03\x04" + generator.randbytes(400),
        "elf.mp4": b"\x7fELF" + bytes(400),
        "one_byte.mp4": b"\x00",
        "json.mp4": b'{"error": 403}',
        "riff.avi": b"RIFF\x00\x00\x00\x00AVI ",
        "ebml.mkv": b"\x1a\x45\xdf\xa3",
        "box.mp4": struct.pack(">I4s", 8, b"ftyp"),
        "boxes.mp4": struct.pack(">I4sI4s", 8, b"ftyp", 0, b"moov"),
        "subtitles.mp4": b"1\n00:00:00,000 --> 00:00:01,000\nHello\n",
        "midi.mp4": b"MThd" + bytes(50),
    }
    for name, content in contents.items():
        yield HostileFile("not a video", name, content, "refused")


MAKERS = (
    make_codecs,
    make_times,
    make_edit_lists,
    make_matrices,
    make_streams,
    make_truncations,
    make_flips,
    make_headers,
    make_sizes,
    make_avi_sizes,
    make_names,
    make_numpy,
    make_pictures,
    make_nothing,
)


def make_files(folder: Path, seed: int = 0) -> list[HostileFile]:
    """All files, the same for the same seed; the secret is planted in `folder`."""
    write_secret(folder)
    files = [file for number, make in enumerate(MAKERS) for file in make(random.Random(f"{seed} {number}"))]
    return [*files, *make_playlists(folder)]
