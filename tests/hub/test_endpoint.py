"""What an Inference Endpoint needs: the handler of a pushed repository, called as the toolkit calls it."""

import base64
import functools
import json
import re
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import parse_eval_result_entries, snapshot_download
from typer.testing import CliRunner

from tests.e2e.conftest import ROOT
from tests.hub.test_publishing import PULL, QUESTION
from tests.unit.video_files import write_video
from umt_hf import (
    UMTVideoForActionDetection,
    UMTVideoModel,
    UMTVideoProcessor,
    UMTVideoTextForRetrieval,
    VideoAnswerer,
    VideoClassifier,
    cli,
)
from umt_hf.hub_cards import eval_results
from umt_hf.hub_cards.endpoint import REQUIREMENTS, build_handler
from umt_hf.hub_cards.eval_results import EVAL_RESULTS_FILE, build_eval_results
from umt_hf.hub_cards.publishing import push_folder
from umt_hf.inference.search import VideoTextEncoder

ANSWERS = ["a man", "man", "video a"]
# What an endpoint does: each repository's file is loaded by itself, and its class gets the folder.
SERVE = """
import importlib.util, json, sys

requests = json.load(open(sys.argv[1]))
found = {}
for folder, own in requests.items():
    sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location("handler", f"{folder}/handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    handler = module.EndpointHandler(folder)
    found[folder] = [handler(request) for request in own]
    json.dumps(found[folder], allow_nan=False)
    sys.path.remove(folder)
print(json.dumps({"answers": found, "modules": sorted(m for m in sys.modules if m.split(".")[0] == "umt_hf")}))
"""
WITHOUT_PACKAGE = PULL.partition("import torch\n")[0]


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def site(tmp_path):
    """A web server with a video, and the video."""
    (tmp_path / "site").mkdir()
    video = write_video(tmp_path / "site" / "clip.mp4")
    handler = functools.partial(QuietHandler, directory=str(tmp_path / "site"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/clip.mp4", video
    server.shutdown()
    server.server_close()


def serve(requests: dict[str, list], tmp_path: Path, hub, is_installed: bool) -> dict:
    """Answers of a fresh process, in which this package is installed or not."""
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    (tmp_path / "serve.py").write_text(("" if is_installed else WITHOUT_PACKAGE) + SERVE)
    environment = hub.environment(token=None, home=tmp_path / f"home_{is_installed}")
    environment["HF_HUB_OFFLINE"] = "1"
    if is_installed:
        environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, *([] if is_installed else ["-I"]), "serve.py", "requests.json"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("is_installed", [True, pytest.param(False, marks=pytest.mark.heavy)])
def test_a_pushed_handler_answers_as_the_package_does(is_installed, hub, folders, site, tmp_path):
    url, video = site
    pulled = {}
    for name, folder in folders.items():
        push_folder(folder, f"me/{name}", with_handler=True)
        pulled[name] = snapshot_download(f"me/{name}", local_dir=tmp_path / "pulled" / name)
    encoded = base64.b64encode(video.read_bytes()).decode()
    asked = {"video": encoded, "question": QUESTION}
    wrong = [{}, {"inputs": str(video)}, {"inputs": f"file://{video}"}, {"inputs": base64.b64encode(b"x").decode()}]
    requests = {
        "classifier": [
            {"inputs": url},
            {"inputs": f"data:video/mp4;base64,{encoded}", "parameters": {"num_clips": 2, "num_crops": 3, "top_k": 2}},
            {"inputs": url, "parameters": {"top_k": 0}},
            {"inputs": url, "parameters": {"temperature": 2}},
        ],
        "retrieval": [{"inputs": {"video": url, "text": ["a man", "video"]}}, {"inputs": encoded}],
        "answering": [{"inputs": asked}, {"inputs": asked, "parameters": {"answers": ANSWERS, "top_k": 2}}],
        "stage1": [{"inputs": url}],
    }
    reply = serve({pulled[name]: own + wrong for name, own in requests.items()}, tmp_path, hub, is_installed)
    assert bool(reply["modules"]) == is_installed
    found = {name: reply["answers"][pulled[name]] for name in requests}
    for answers in found.values():
        for answer in answers[-len(wrong) :]:
            assert set(answer) == {"error"} and re.fullmatch(r"[A-Z<\"].*\.", answer["error"]), answer
            assert str(tmp_path) not in answer["error"]

    classifier = VideoClassifier(folders["classifier"])
    for answer, options in ((found["classifier"][0], {}), (found["classifier"][1], {"num_clips": 2, "num_crops": 3})):
        expected = classifier.classify(str(video), top_k=len(answer), **options)
        assert [entry["label"] for entry in answer] == [scored.label for scored in expected]
        assert [entry["score"] for entry in answer] == pytest.approx([s.probability for s in expected], abs=1e-5)
    assert len(found["classifier"][1]) == 2
    assert found["classifier"][2] == {"error": '"top_k" must be an integer from 1 on.'}
    assert "temperature" in found["classifier"][3]["error"]

    encoder = VideoTextEncoder(folders["retrieval"])
    views = {"sampling_strategy": "middle", "num_clips": 1, "num_crops": 1, "return_tensors": "pt"}
    vectors, _ = encoder.encode_videos(encoder.processor.video_processor(str(video), **views)["pixel_values"])
    for answer in found["retrieval"][:2]:
        assert answer["video"] == pytest.approx(vectors[0].tolist(), abs=1e-5)
    expected = [encoder.encode_text(text)[0][0].tolist() for text in ("a man", "video")]
    assert torch.allclose(torch.tensor(found["retrieval"][0]["text"]), torch.tensor(expected), atol=1e-5)
    assert UMTVideoTextForRetrieval is type(encoder.model)

    answerer = VideoAnswerer(folders["answering"])
    assert found["answering"][0] == {"answer": answerer.answer(str(video), QUESTION).answer}
    ranked = answerer.answer(str(video), QUESTION, ANSWERS, num_ranked=2).ranked
    assert [entry["answer"] for entry in found["answering"][1]["ranked"]] == [entry.answer for entry in ranked]
    shares = [entry["score"] for entry in found["answering"][1]["ranked"]]
    assert shares == pytest.approx([entry.probability for entry in ranked], abs=1e-5)
    assert found["answering"][1]["answer"] == ranked[0].answer

    model, processor = (kind.from_pretrained(folders["stage1"]) for kind in (UMTVideoModel, UMTVideoProcessor))
    with torch.no_grad():
        expected = model.eval()(**processor(str(video), return_tensors="pt")).pooler_output[0]
    assert found["stage1"][0]["vector"] == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_handler_goes_up_where_it_is_asked_for(hub, folders, tmp_path):
    push = ["push", str(folders["classifier"]), "me/model"]
    assert CliRunner().invoke(cli.app, push).exit_code == 0
    assert "handler.py" not in hub.list_files("me/model")
    assert CliRunner().invoke(cli.app, [*push, "--handler"]).exit_code == 0
    files = hub.list_files("me/model")
    assert {"handler.py", "requirements.txt"} <= set(files)
    project = (ROOT / "pyproject.toml").read_text()
    assert hub.read_file("me/model", "requirements.txt").decode().split() == list(REQUIREMENTS)
    assert all(f'"{line}"' in project for line in REQUIREMENTS)
    config = UMTVideoForActionDetection.config_class(num_labels=2)
    config.architectures = ["UMTVideoForActionDetection"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no handler of a UMTVideoForActionDetection.*Leave out --handler"):
        build_handler(tmp_path)


def test_handlers_are_formatted_and_linted(folders, tmp_path):
    for name, folder in folders.items():
        (tmp_path / f"{name}.py").write_bytes(build_handler(folder)["handler.py"])
    config = ["--config", str(ROOT / "pyproject.toml"), "--no-cache", str(tmp_path)]
    for words in (["check"], ["format", "--check"]):
        result = subprocess.run([sys.executable, "-m", "ruff", *words, *config], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr


def write_report(folder: Path, name: str, **changes) -> None:
    report = {"metrics": {"top1_accuracy": 0.75, "top5_accuracy": 0.9}, "data": "me/clips", "split": "test"}
    report |= {"data_sha256": None, "num_frames": 8, "num_crops": 3, "num_clips": 4} | changes
    (folder / name).mkdir(parents=True)
    (folder / name / "report.json").write_text(json.dumps(report))


def test_figures_of_data_sets_of_the_hub_are_eval_results(hub, folders, tmp_path, monkeypatch, caplog):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in folders["classifier"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "eval_results.json").write_text('{"eval_top1_accuracy": 0.5}')
    (folder / "run.yaml").write_text("data: {validation_data: me/other}\n")  # may have been a folder
    write_report(folder, "own", data="me/local", data_sha256="0" * 64)
    write_report(folder, "list", data="videos/test.csv", data_sha256="0" * 64)
    write_report(folder, "bucket", data="s3://bucket/test.csv")
    write_report(folder, "split", data="me/test")  # ends like a path of one's own
    assert build_eval_results(folder) == {}
    write_report(folder, "test")
    push_folder(folder, "me/model")
    content = yaml.safe_load(hub.read_file("me/model", EVAL_RESULTS_FILE))
    (entry,) = parse_eval_result_entries(content)
    assert (entry.dataset_id, entry.task_id, entry.value) == ("me/clips", "default", 0.75)
    assert entry.notes == "top-1 accuracy, split test, 8x3x4 views"
    assert "own data" in hub.read_file("me/model", "README.md").decode()  # the card says the others too

    caplog.set_level("INFO", "umt_hf")
    monkeypatch.setattr(eval_results, "EvalResultEntry", None)
    push_folder(folder, "me/older")
    assert EVAL_RESULTS_FILE not in hub.list_files("me/older")
    assert caplog.text.count("does not know its format") == 1
