"""What a stranger can upload over the page's HTTP interface: a playlist shows nobody's videos."""

import json
import urllib.request
import uuid
from pathlib import Path

import pytest

pytest.importorskip("gradio")

from tests.unit.processing.test_untrusted_files import playlists
from tests.unit.video_files import write_video
from umt_hf.demo import app

VIDEO_TABS = {"look": ["attention", 0.5], "classify": [], "ask": ["what happens?"]}


@pytest.fixture(scope="module")
def url(settings):
    demo = app.launch_demo(settings, block=False)
    yield demo.local_url
    demo.close()


@pytest.fixture(scope="module")
def secret(tmp_path_factory) -> Path:
    """Videos outside of every folder that the page may show."""
    folder = tmp_path_factory.mktemp("private")
    for name in ("secret.ts", "secret.mp4"):
        write_video(folder / name)
    return folder


def post(url: str, content: bytes, kind: str) -> bytes:
    request = urllib.request.Request(url, content, {"Content-Type": kind})
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read()


def upload(url: str, name: str, content: bytes) -> str:
    """Send a file as a browser does; returns its path on the server."""
    border = uuid.uuid4().hex
    head = f'--{border}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    body = head + content + f"\r\n--{border}--\r\n".encode()
    return json.loads(post(f"{url}gradio_api/upload", body, f"multipart/form-data; boundary={border}"))[0]


def call(url: str, function: str, path: str) -> str:
    """Press a button of the page without the page; returns the last lines of the answer."""
    video = {"path": path, "meta": {"_type": "gradio.FileData"}}
    content = json.dumps({"data": [video, *VIDEO_TABS[function]]}).encode()
    event = json.loads(post(f"{url}gradio_api/call/{function}", content, "application/json"))["event_id"]
    with urllib.request.urlopen(f"{url}gradio_api/call/{function}/{event}", timeout=60) as response:
        return response.read().decode()


def test_a_video_is_answered(url, clips):
    path = upload(url, "clip.mp4", (clips / "00001.mp4").read_bytes())
    assert "event: complete" in call(url, "look", path) and "data:image/jpeg" in call(url, "look", path)


@pytest.mark.parametrize("function", VIDEO_TABS)
@pytest.mark.parametrize("suffix", [".m3u8", ".mp4", ".mpd"])
def test_playlists_are_refused(function, suffix, url, secret):
    for kind, content in playlists(secret).items():
        answer = call(url, function, upload(url, f"list{suffix}", content))
        assert "event: error" in answer and "event: complete" not in answer, kind
        assert "data:image" not in answer and str(secret) not in answer, kind


@pytest.mark.parametrize("function", VIDEO_TABS)
def test_a_path_of_the_server_is_refused(function, url, secret):
    for path in (secret / "secret.mp4", "/etc/hostname", (secret / "secret.ts").as_uri()):
        try:
            answer = call(url, function, str(path))
        except urllib.error.HTTPError as error:
            assert error.code in (400, 403, 422)
            continue
        assert "event: error" in answer and "data:image" not in answer
