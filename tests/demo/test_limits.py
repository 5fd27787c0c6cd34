"""What one visitor may ask of the server: megabytes, seconds, places in the queue. Over HTTP, as a stranger would."""

import json
import os
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

pytest.importorskip("gradio")

from tests.demo.test_uploads import call, post, upload
from umt_hf import cli
from umt_hf.demo import app
from umt_hf.demo.limits import RequestTimeoutError, TimeLimit
from umt_hf.demo.settings import DemoSettings

PLANTED_SECONDS = 4


class SlowClassifier:
    """Takes its time for one clip, of which it has nothing to say then, and none for others."""

    def __init__(self, classifier, slow_size: int):
        self.classifier, self.model, self.slow_size = classifier, classifier.model, slow_size

    def classify(self, video):
        if os.path.getsize(video) == self.slow_size:
            time.sleep(PLANTED_SECONDS)
            raise ValueError("Nobody waits for this answer.")  # one that came would be remembered for the next request
        return self.classifier.classify(video)


@pytest.fixture(scope="module")
def slow_clip(clips) -> bytes:
    return (clips / "00000.mp4").read_bytes()


@pytest.fixture(scope="module")
def url(settings, models, slow_clip):
    slow = replace(models, classifier=SlowClassifier(models.classifier, len(slow_clip)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "load_demo_models", lambda _: slow)
        patch.setattr(type(slow), "list_modules", lambda _: [])
        demo = app.launch_demo(replace(settings, max_upload_mb=1, max_waiting=2, timeout_seconds=1), block=False)
    yield demo.local_url
    demo.close()


def read_error(error: urllib.error.HTTPError) -> str:
    return error.read().decode()


def test_a_large_upload_is_refused_by_a_sentence(url):
    assert upload(url, "fits.mp4", bytes(900_000)).endswith("fits.mp4")
    with pytest.raises(urllib.error.HTTPError) as refused:
        upload(url, "large.mp4", bytes(1_100_000))
    assert refused.value.code == 413
    assert "exceeded maximum allowed size" in read_error(refused.value)
    # The server does not read on; a client that sends on regardless may find the connection closed.
    with pytest.raises(urllib.error.URLError):
        upload(url, "huge.mp4", bytes(30_000_000))
    assert upload(url, "fits.mp4", bytes(900_000)).endswith("fits.mp4")


def test_a_slow_request_is_answered_by_a_sentence_and_the_page_goes_on(url, slow_clip, clips):
    slow, quick = upload(url, "slow.mp4", slow_clip), upload(url, "quick.mp4", (clips / "00001.mp4").read_bytes())
    start = time.monotonic()
    answer = call(url, "classify", slow)
    assert time.monotonic() - start < PLANTED_SECONDS
    assert "event: error" in answer and "took longer than 1 second" in answer and "Traceback" not in answer
    # The slow work still goes on, and others are answered meanwhile.
    assert "event: complete" in call(url, "classify", quick)
    assert time.monotonic() - start < PLANTED_SECONDS
    assert urllib.request.urlopen(url, timeout=10).status == 200


def test_a_full_queue_says_so(url, slow_clip):
    slow = upload(url, "slow.mp4", slow_clip)
    content = json.dumps({"data": [{"path": slow, "meta": {"_type": "gradio.FileData"}}]}).encode()

    def join(_) -> str:
        try:
            return json.loads(post(f"{url}gradio_api/call/classify", content, "application/json"))["event_id"]
        except urllib.error.HTTPError as error:
            assert error.code == 503
            return read_error(error)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(join, range(8)))
    refused = [answer for answer in answers if "Queue is full" in answer]
    assert refused and len(refused) < 8
    for event in set(answers) - set(refused):
        with urllib.request.urlopen(f"{url}gradio_api/call/classify/{event}", timeout=60) as response:
            assert "took longer" in response.read().decode()
    # Those who come later are served.
    assert "event: error" in call(url, "classify", slow)


def test_work_that_is_out_of_time_ends_at_the_next_layer():
    class Sleepy(nn.Identity):
        steps = 0

        def forward(self, inputs):
            type(self).steps += 1
            time.sleep(0.2)
            return inputs

    model = nn.Sequential(*(Sleepy() for _ in range(20)))
    limit = TimeLimit(0.5)
    limit.watch(model)
    ended = threading.Event()

    def work() -> torch.Tensor:
        try:
            return model(torch.zeros(1))
        finally:
            ended.set()

    with pytest.raises(RequestTimeoutError, match=r"took longer than 0\.5 seconds"):
        limit.run(work)
    assert ended.wait(2) and Sleepy.steps < 6
    # Other users of the model are left alone, this thread too, and a request that is quick.
    assert len(model(torch.zeros(1))) == 1
    assert TimeLimit(60).run(lambda: model[0](torch.zeros(1)).item()) == 0


def test_errors_of_the_work_come_through_and_places_are_given_back():
    limit = TimeLimit(60, max_running=1)
    for _ in range(3):
        with pytest.raises(KeyError):
            limit.run(lambda: {}["missing"])
    assert limit.run(lambda: 5) == 5


def test_abandoned_work_is_bounded():
    limit, release = TimeLimit(0.2, max_running=2), threading.Event()
    for message in ("took longer", "took longer", "still busy"):
        with pytest.raises(RequestTimeoutError, match=message):
            limit.run(release.wait)
    release.set()
    assert limit.run(lambda: 5) == 5


def test_limits_are_settings_and_flags(tmp_path, monkeypatch):
    settings = DemoSettings(max_upload_mb=5, timeout_seconds=7)
    settings.save(tmp_path / "demo.json")
    assert json.loads((tmp_path / "demo.json").read_text()) == {"max_upload_mb": 5, "timeout_seconds": 7}
    changed = DemoSettings.load(tmp_path / "demo.json", {"UMT_DEMO_MAX_WAITING": "3", "UMT_DEMO_TIMEOUT_SECONDS": "9"})
    assert changed == DemoSettings(max_upload_mb=5, timeout_seconds=9, max_waiting=3)
    with pytest.raises(ValueError, match="UMT_DEMO_MAX_WAITING=many is not a number"):
        DemoSettings.load(None, {"UMT_DEMO_MAX_WAITING": "many"})
    with pytest.raises(ValueError, match="timeout_seconds must be at least 1"):
        DemoSettings(timeout_seconds=0)
    launched = []
    monkeypatch.setattr(app, "launch_demo", lambda settings, *_: launched.append(settings))
    monkeypatch.chdir(tmp_path)
    flags = ["--max-upload-mb", "5", "--max-waiting", "3", "--timeout-seconds", "9"]
    assert CliRunner().invoke(cli.app, ["demo", *flags]).exit_code == 0 and launched == [changed]
    refused = CliRunner().invoke(cli.app, ["demo", "--max-waiting", "0"])
    assert refused.exit_code == 2 and "max_waiting must be at least 1" in refused.output
