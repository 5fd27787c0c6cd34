"""Windows of a stream have the times and answers of the complete file, come before it ends, and hold little."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.processes import find_free_port
from tests.unit.inference.test_features import TINY, save_model
from tests.unit.video_files import draw_frame, read_number, write_audio, write_kind, write_video
from umt_hf import UMTVideoConfig, UMTVideoForVideoClassification, UMTVideoProcessor, VideoClassifier, cli
from umt_hf.inference.features import choose_frames, extract_features, load_encoder, plan_windows
from umt_hf.inference.streaming import StreamedFrame, choose_online, slide_windows, stream_features, stream_labels
from umt_hf.processing.decoding import VideoDecodingError, VideoStream, open_video

FRAGMENTED = {"movflags": "frag_keyframe+empty_moov"}


class OneWay(io.RawIOBase):
    """Bytes that come `step` at a time and cannot be gone back in."""

    def __init__(self, content: bytes, step: int = 700):
        self.content, self.place, self.step = content, 0, step

    def readable(self):
        return True

    def readinto(self, buffer):
        part = self.content[self.place : self.place + min(len(buffer), self.step)]
        buffer[: len(part)] = part
        self.place += len(part)
        return len(part)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def encoder(folder):
    return load_encoder(folder)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    config = UMTVideoConfig(**TINY, num_labels=3)
    model = UMTVideoForVideoClassification(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    UMTVideoProcessor.from_model_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "stream.ts", num_frames=50)


def check_equal(found, video, encoder, window, stride, fps):
    """Streamed windows are those of the complete file."""
    whole = extract_features(video, *encoder, "clip", window, stride, 1, fps)
    assert [start for start, _, _ in found] == whole.start_seconds.tolist()
    assert [end for _, end, _ in found] == whole.end_seconds.tolist()
    np.testing.assert_array_equal(np.stack([feature for _, _, feature in found]), whole.features)


@pytest.mark.parametrize("kind", ["transport_stream", "matroska", "fragmented"])
@pytest.mark.parametrize(
    ("window", "stride", "fps"), [(4, 2, None), (4, 3, None), (4, 7, None), (8, 8, 10.0), (6, 1, 7.0)]
)
def test_windows_of_a_pipe_equal_those_of_the_file(kind, window, stride, fps, encoder, tmp_path):
    if kind == "fragmented":
        video = write_video(tmp_path / "video.mp4", container_options=FRAGMENTED)
    else:
        video = write_kind(kind, tmp_path)
    found = list(stream_features(OneWay(video.read_bytes()), *encoder, window, stride, fps))
    check_equal(found, video, encoder, window, stride, fps)


@pytest.mark.parametrize("num_frames", [1, 3, 4, 5])
@pytest.mark.parametrize("tubelet", [1, 2])
def test_short_streams_and_open_tubelets_are_filled_as_those_of_a_file(num_frames, tubelet, tmp_path):
    encoder = load_encoder(save_model(tmp_path / "model", tubelet_size=tubelet))
    video = write_video(tmp_path / "short.mkv", num_frames=num_frames, bframes=0)
    found = list(stream_features(io.BytesIO(video.read_bytes()), *encoder, 4, 2))
    check_equal(found, video, encoder, 4, 2, None)


def test_windows_are_laid_as_over_a_complete_video():
    """Over many lengths, with frames spaced unevenly: which frames each window sees."""
    generator = np.random.default_rng(0)

    class Numbers:
        def __call__(self, frames, **options):
            return {"pixel_values": [torch.tensor(frames).float()]}

    for _ in range(200):
        count, tubelet = int(generator.integers(1, 40)), int(generator.integers(1, 3))
        window = tubelet * int(generator.integers(1, 6))
        stride = tubelet * int(generator.integers(1, window // tubelet + 1))
        fps = None if generator.random() < 0.3 else float(generator.uniform(0.5, 40))
        times = np.concatenate([[0], np.cumsum(generator.uniform(0.01, 0.2, count - 1))])
        plan = plan_windows(times, window, stride, tubelet, fps)
        frames = [StreamedFrame(float(t), lambda n=n: np.array([n])) for n, t in enumerate(times)]
        chosen = list(choose_online(frames, fps))
        assert [int(frame.read()[0]) for frame in chosen] == choose_frames(times, fps).tolist()
        found = list(slide_windows(chosen, Numbers(), window, stride, tubelet))
        padded = np.concatenate([plan.frames, np.repeat(plan.frames[-1:], plan.num_padded)])
        expected = [padded[start : start + window].tolist() for start in plan.starts]
        assert [pixels[0, :, 0].int().tolist() for _, pixels in found] == expected
        for start, (seconds, _) in zip(plan.starts, found, strict=True):
            assert seconds == plan.seconds[start : start + window].tolist()


def test_labels_are_those_of_the_window_in_the_file(classifier, video):
    model = VideoClassifier(classifier)
    found = list(stream_labels(io.BytesIO(video.read_bytes()), model, top_k=3, window=4, stride=4))
    assert len(found) == 13 and found[-1][1] == pytest.approx(49 / 24)
    with open_video(video) as reader:
        for start, end, labels in found:
            first = round(start * 24)
            frames = reader.get_frames(range(first, first + 4))
            inputs = model.processor(frames, do_sample_frames=False, return_tensors="pt")
            scores = model.model(**inputs).logits.softmax(-1)[0]
            assert end == pytest.approx((first + 3) / 24)
            assert [scored.label for scored in labels] == [model.labels[i] for i in scores.argsort(descending=True)]
            assert labels[0].probability == pytest.approx(float(scores.max()), abs=1e-6)


def test_the_first_answer_comes_before_a_pipe_ends(encoder, tmp_path):
    """A writer that waits for each answer before it writes on."""
    content = write_video(tmp_path / "long.ts", num_frames=400, height=128, width=192).read_bytes()
    reading, writing = os.pipe()
    answered, written = threading.Event(), []

    def write():
        with open(writing, "wb", buffering=0) as pipe:
            for start in range(0, len(content), len(content) // 4):
                written.append(pipe.write(content[start : start + len(content) // 4]))
                if start and not answered.wait(20):
                    return

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    with open(reading, "rb") as pipe:
        windows = stream_features(pipe, *encoder, 4, 4)
        next(windows)
        assert sum(written) < len(content)  # the rest is not even written
        answered.set()
        assert len(list(windows)) == 99
    thread.join(20)


def test_a_file_that_grows_is_read_to_its_end(encoder, tmp_path, video):
    content, path = video.read_bytes(), tmp_path / "growing.ts"
    path.write_bytes(content[: len(content) // 2])

    def write():
        with path.open("ab") as file:
            for start in range(len(content) // 2, len(content), 4000):
                time.sleep(0.02)
                file.write(content[start : start + 4000])
                file.flush()

    thread = threading.Thread(target=write)
    thread.start()
    found = list(stream_features(path, *encoder, 4, 4, wait_seconds=1))
    thread.join()
    check_equal(found, video, encoder, 4, 4, None)


def test_a_stream_that_is_joined_between_key_frames_begins_at_the_next_one(video, tmp_path):
    with VideoStream(video, wait_seconds=0) as stream:
        numbers = [read_number(read()) for _, read in stream.iterate()]
    assert numbers == list(range(50))
    packets = video.read_bytes()
    header, rest = packets[: 3 * 188], packets[len(packets) // 3 // 188 * 188 :]
    with VideoStream(io.BytesIO(header + rest)) as stream:
        joined = [(seconds, read_number(read())) for seconds, read in stream.iterate()]
    assert joined[0] == (0.0, joined[0][1]) and joined[0][1] % 12 == 0
    assert [number for _, number in joined] == list(range(joined[0][1], 50))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            lambda folder: write_video(folder / "plain.mp4", 200, 256, 384).read_bytes(),
            "an MP4 whose index is at its end",
        ),
        (lambda folder: write_audio(folder / "sound.mkv").read_bytes(), "no video stream"),
        (lambda folder: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n", "it is an HLS playlist"),
        (lambda folder: b"ffconcat version 1.0\nfile a.mp4\n", "a list of files to join"),
        (lambda folder: b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n", "network streams"),
        (lambda folder: b"", "gives nothing: it is empty"),
        (lambda folder: b"no video" * 100, "cannot be decoded"),
    ],
)
def test_what_cannot_be_streamed_is_refused_by_name(content, message, encoder, tmp_path):
    content = content(tmp_path)
    path = tmp_path / "source"
    path.write_bytes(content)
    for source in (OneWay(content), path):
        with pytest.raises(VideoDecodingError, match=message):
            list(stream_features(source, *encoder, wait_seconds=0))


def test_a_frame_of_another_size_ends_the_stream_by_name(encoder, tmp_path):
    small = write_video(tmp_path / "a.ts", num_frames=24, height=64).read_bytes()
    large = write_video(tmp_path / "b.ts", num_frames=24, height=96).read_bytes()
    with pytest.raises(VideoDecodingError, match="changes its frame size after"):
        list(stream_features(OneWay(small + large), *encoder))


@pytest.mark.parametrize(
    ("url", "protocol", "error", "message"),
    [
        ("udp://127.0.0.1:9", None, ValueError, "give protocol, such as 'udp'"),
        ("http://127.0.0.1:9/a.ts", None, ValueError, "give protocol"),
        ("concat:a.ts|b.ts", None, VideoDecodingError, "cannot be read"),
        ("http://127.0.0.1:9/a.ts", "tcp", ValueError, "must begin with tcp://"),
        ("file:///etc/hostname", "file", ValueError, "protocol must be one of http"),
        ("tcp://127.0.0.1:9?listen=1", "tcp", ValueError, "leave out `listen`"),
        ("tcp://127.0.0.1:9?listen", "tcp", ValueError, "leave out `listen`"),
    ],
)
def test_networks_are_read_by_a_named_protocol_alone(url, protocol, error, message, encoder, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("av.open", refuse)
    with pytest.raises(error, match=message):
        stream_features(url, *encoder, protocol=protocol)


def serve_once(content: bytes) -> str:
    """A socket that sends bytes to whoever comes first."""
    server = socket.create_server(("127.0.0.1", 0))

    def send():
        connection, _ = server.accept()
        with connection, server:
            connection.sendall(content)

    threading.Thread(target=send, daemon=True).start()
    return f"tcp://127.0.0.1:{server.getsockname()[1]}"


def serve_silently(content: bytes) -> tuple[str, threading.Event]:
    """A socket that sends bytes, and then nothing until it is allowed to end."""
    server, finished = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def send():
        connection, _ = server.accept()
        with connection, server:
            connection.sendall(content)
            finished.wait(60)

    threading.Thread(target=send, daemon=True).start()
    return f"tcp://127.0.0.1:{server.getsockname()[1]}", finished


def test_a_socket_is_read_where_its_protocol_is_named(encoder, video):
    url = serve_once(video.read_bytes())
    found = list(stream_features(url, *encoder, 4, 4, protocol="tcp", wait_seconds=10))
    check_equal(found, video, encoder, 4, 4, None)


@pytest.mark.parametrize("wait_seconds", [1])
def test_a_network_that_falls_silent_ends_the_stream(encoder, video, wait_seconds):
    """With all that came; one from which nothing came is an error that says so."""
    address, finished = serve_silently(video.read_bytes())
    found = list(stream_features(address, *encoder, 4, 4, protocol="tcp", wait_seconds=wait_seconds))
    finished.set()
    check_equal(found, video, encoder, 4, 4, None)
    address, finished = serve_silently(b"")
    with pytest.raises(VideoDecodingError, match=r"gave nothing in time. Is it sending\?"):
        list(stream_features(address, *encoder, 4, 4, protocol="tcp", wait_seconds=wait_seconds))
    finished.set()
    with pytest.raises(VideoDecodingError, match=r"was not sent \(Connection refused\). Check its address"):
        list(stream_features(f"tcp://127.0.0.1:{find_free_port()}", *encoder, protocol="tcp", wait_seconds=10))


def test_what_a_socket_sends_opens_nothing_else(encoder, video, tmp_path):
    """A playlist that names a file of this machine, by which the video would be read."""
    for content in (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{video}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile {video}\n",
    ):
        with pytest.raises(VideoDecodingError, match="cannot be decoded"):
            list(stream_features(serve_once(content.encode()), *encoder, protocol="tcp", wait_seconds=10))


def test_http_is_read_where_its_protocol_is_named(encoder, video):
    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(video.parent))

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{video.name}"
        found = list(stream_features(url, *encoder, 4, 4, protocol="http"))
        with pytest.raises(
            VideoDecodingError, match=r"was not sent \(Server returned 404 Not Found\). Check its address"
        ):
            list(stream_features(f"{url}.mkv", *encoder, 4, 4, protocol="http"))
        server.shutdown()
    check_equal(found, video, encoder, 4, 4, None)


def test_the_command_reads_standard_input_and_prints_at_once(classifier, folder, video):
    command = [sys.executable, "-m", "umt_hf.cli", "stream", "-", "--window", "4", "--stride", "4", "--json"]
    run = subprocess.run(
        [*command, "--model", str(classifier)], input=video.read_bytes(), capture_output=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.decode().splitlines()]
    model = VideoClassifier(classifier)
    expected = list(stream_labels(io.BytesIO(video.read_bytes()), model, 1, 4, 4))
    assert [(line["start_seconds"], line["end_seconds"]) for line in lines] == [found[:2] for found in expected]
    assert [line["labels"][0]["label"] for line in lines] == [labels[0].label for _, _, labels in expected]


@pytest.mark.parametrize("kind", [pytest.param("pipe", marks=pytest.mark.heavy), "file"])
def test_ctrl_c_ends_the_command_at_once(classifier, video, kind, tmp_path):
    """While nothing comes: it is in the middle of a read, whose errors PyAV passes over."""
    growing = tmp_path / "growing.ts"
    growing.write_bytes(video.read_bytes())
    source = "-" if kind == "pipe" else str(growing)
    command = [
        sys.executable,
        "-m",
        "umt_hf.cli",
        "stream",
        source,
        "--window",
        "4",
        "--json",
        "--wait-seconds",
        "300",
    ]
    pipe = subprocess.PIPE
    run = subprocess.Popen([*command, "--model", str(classifier)], stdin=pipe, stdout=pipe, stderr=pipe)
    assert run.stdin is not None and run.stdout is not None
    if kind == "pipe":
        run.stdin.write(video.read_bytes())
        run.stdin.flush()
    run.stdout.readline()
    time.sleep(1)
    run.send_signal(signal.SIGINT)
    _, stderr = run.communicate(timeout=30)
    assert run.returncode == 130 and b"Traceback" not in stderr and b"ignored" not in stderr, stderr
    assert b"windows were answered" in stderr


@pytest.mark.heavy
def test_the_command_ends_quietly_when_nobody_reads(classifier, video):
    """As before `head -1`."""
    command = [sys.executable, "-m", "umt_hf.cli", "stream", str(video), "--window", "4", "--stride", "1", "--json"]
    command += ["--model", str(classifier), "--wait-seconds", "0"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout is not None and json.loads(run.stdout.readline())["labels"]
    run.stdout.close()
    _, stderr = run.communicate(timeout=120)
    assert run.returncode == 0 and b"pipe" not in stderr.lower() and b"Error" not in stderr, stderr


def test_the_command_gives_features_of_other_models_and_names_mistakes(folder, classifier, video, encoder, tmp_path):
    def run(*arguments, exit_code=0):
        result = CliRunner().invoke(cli.app, ["stream", *map(str, arguments)])
        assert result.exit_code == exit_code, result.output
        return result.output

    flags = ("--wait-seconds", "0", "--window", "4", "--stride", "4")
    lines = [json.loads(line) for line in run(video, "--model", folder, *flags).splitlines()]
    whole = extract_features(video, *encoder, "clip", 4, 4, 1).features
    np.testing.assert_allclose([line["features"] for line in lines], whole, atol=1e-6)
    assert " to " in run(video, "--model", classifier, *flags).splitlines()[0]
    assert "such as 'udp'" in run("udp://127.0.0.1:9", "--model", classifier, *flags, exit_code=2)
    assert "give the path of a file" in run(f"file://{video}", "--model", classifier, *flags, exit_code=2)
    assert "no such file" in run(tmp_path / "missing.ts", "--model", classifier, *flags, exit_code=2)
    assert "window" in run(video, "--model", folder, "--window", "0", exit_code=2)


MEASURE = """
import io, sys, threading, os
import av, numpy as np
from pathlib import Path
from tests.unit.video_files import draw_frame
from umt_hf.inference.features import load_encoder
from umt_hf.inference.streaming import stream_features

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

content, copies = Path(sys.argv[2]).read_bytes(), int(sys.argv[3])

class Repeated(io.RawIOBase):
    place = 0
    def readable(self):
        return True
    def readinto(self, buffer):
        if self.place >= copies * len(content):
            return 0
        start = self.place % len(content)
        part = content[start : start + len(buffer)]
        buffer[: len(part)] = part
        self.place += len(part)
        return len(part)

model, processor = load_encoder(sys.argv[1])
count, early = 0, 0
for _ in stream_features(Repeated(), model, processor, 4, 4):
    count += 1
    if count == 100:
        early = resident()
print(count, resident() - early)
"""


@pytest.mark.heavy
@pytest.mark.parametrize("copies", [20, 200])
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's count of resident memory")
def test_memory_does_not_grow_with_the_stream(copies, folder, tmp_path):
    """100 frames, over and over, as a stream of 2,000; with `make test-heavy` of 20,000."""
    video = write_video(tmp_path / "part.ts", num_frames=100, height=256, width=384)
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), str(video), str(copies)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    count, grown = map(int, run.stdout.split())
    assert count == 25 * copies
    assert grown < 50e6, f"{grown / 1e6:.0f} MB"


def test_frames_have_the_pixels_of_the_file(tmp_path):
    video = write_kind("matroska", tmp_path)
    with VideoStream(video, wait_seconds=0) as stream, open_video(video) as reader:
        frames = np.stack([read() for _, read in stream.iterate()])
        np.testing.assert_array_equal(frames, reader.get_frames(range(reader.num_frames)))
    assert read_number(frames[5]) == 5 == read_number(draw_frame(5))
