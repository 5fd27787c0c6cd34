"""`umt-hf classify` and `umt-hf ask`: what they print is what the models say, and mistakes have their exit codes."""

import functools
import json
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from typer.testing import CliRunner

from tests.unit.finetuning.test_classification import tiny_config
from tests.unit.inference.test_search import save_model
from umt_hf import (
    UMTVideoForPreTraining,
    UMTVideoForVideoClassification,
    UMTVideoProcessor,
    UMTVideoTextForQuestionAnswering,
    UMTVideoTextForRetrieval,
)
from umt_hf.cli import app
from umt_hf.inference.classification import merge_views
from umt_hf.moving_shapes.render import write_video
from umt_hf.processing.decoding import open_video

runner = CliRunner()
NAMES = ("running", "jumping", "standing")
QUESTION = "a red circle moving?"
ANSWERS = ["red", "a green circle", "left"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    config = tiny_config(id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)})
    model = UMTVideoForVideoClassification(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    UMTVideoProcessor.from_model_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def answerer(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("answers"), UMTVideoTextForQuestionAnswering)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    (folder / "deep").mkdir()
    noise = np.random.default_rng(0)
    for name in ("a.mp4", "deep/b.mp4"):
        write_video(folder / name, noise.integers(0, 255, (12, 48, 80, 3), dtype=np.uint8))
    (folder / "damaged.mp4").write_bytes(b"no video")
    return folder


def classify(*arguments):
    return runner.invoke(app, ["classify", *map(str, arguments), "--num-workers", "0"])


def ask(video, *arguments, question=QUESTION):
    return runner.invoke(app, ["ask", str(video), question, *map(str, arguments)])


def test_classes_are_those_of_the_views_merged(classifier, videos):
    missing = videos / "missing.mp4"
    views = ["--num-clips", 2, "--num-crops", 3, "--batch-size", 5]
    result = classify(videos, missing, videos / "a.mp4", "--model", classifier, *views, "--top-k", 2, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [video["path"] for video in report["videos"]] == [str(videos / "a.mp4"), str(videos / "deep" / "b.mp4")]
    assert [video["path"] for video in report["skipped"]] == [str(videos / "damaged.mp4"), str(missing)]
    assert "cannot be decoded" in report["skipped"][0]["reason"]

    model = UMTVideoForVideoClassification.from_pretrained(classifier)
    processor = UMTVideoProcessor.from_pretrained(classifier)
    for video in report["videos"]:
        pixels = processor(video["path"], num_clips=2, num_crops=3, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            expected = merge_views(model(pixels).logits, 6)[0]
        best = expected.argsort(descending=True)[:2].tolist()
        assert [scored["label"] for scored in video["labels"]] == [NAMES[i] for i in best]
        assert [scored["probability"] for scored in video["labels"]] == pytest.approx(
            expected[best].tolist(), abs=1e-6
        )


def test_urls_frames_and_odd_suffixes_are_classified(classifier, videos, tmp_path):
    """A URL, a folder of frames and what a phone or a Mac leaves, as arguments and in a folder."""
    for name in ("B.MP4", "c.3gp", "d.mts", "e f.mp4"):
        (tmp_path / name).write_bytes((videos / "a.mp4").read_bytes())
    (tmp_path / "._a.mp4").write_bytes(b"twin")
    frames = tmp_path / "frames"
    frames.mkdir()
    with open_video(videos / "a.mp4") as reader:
        for number, frame in enumerate(reader.get_frames(range(reader.num_frames))):
            Image.fromarray(frame).save(frames / f"{number}.png")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(videos))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/a.mp4"
        result = classify(address, tmp_path, frames, "--model", classifier, "--json")
        gone = classify(f"{address}.gone", "--model", classifier, "--json")
        server.shutdown()
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    paths = [str(tmp_path / name) for name in ("B.MP4", "c.3gp", "d.mts", "e f.mp4", "frames")]
    assert [video["path"] for video in report["videos"]] == [*paths, address] and report["skipped"] == []
    assert len({json.dumps(video["labels"]) for video in report["videos"]}) == 1  # all show the same
    assert gone.exit_code == 1 and "404" in json.loads(gone.stdout)["skipped"][0]["reason"]


def test_classes_for_people(classifier, videos):
    result = classify(videos / "a.mp4", videos / "damaged.mp4", "--model", classifier)
    lines = result.stdout.splitlines()
    assert result.exit_code == 0 and lines[0] == str(videos / "a.mp4")
    assert {line.split()[1] for line in lines[1:4]} == set(NAMES)  # fewer classes than the default five
    assert sum(float(line.split()[0]) for line in lines[1:4]) == pytest.approx(1, abs=2e-4)
    assert lines[4] == "1 classified, 1 skipped" and lines[5].startswith(f"skipped {videos / 'damaged.mp4'}: ")
    assert "video" in result.stderr  # the bar


def test_nothing_classified_is_exit_code_1(classifier, videos):
    result = classify(videos / "damaged.mp4", "--model", classifier, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["videos"] == []


def test_a_folder_without_a_trained_head_is_refused(videos, tmp_path):
    config = tiny_config()
    UMTVideoForPreTraining(config).save_pretrained(tmp_path)
    UMTVideoProcessor.from_model_config(config).save_pretrained(tmp_path)
    result = classify(videos, "--model", tmp_path)
    assert result.exit_code == 2 and result.stdout == ""
    message = " ".join(result.stderr.replace("│", " ").split())
    assert "is a stage-1 pre-training folder" in message and "umt-hf finetune classification" in message
    assert "Traceback" not in message


def test_answers_of_a_list_are_ranked(answerer, videos, tmp_path):
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps(ANSWERS))
    result = ask(videos / "a.mp4", "--model", answerer, "--answers", answers, "--top-k", 2, "--json")
    assert result.exit_code == 0, result.output
    reply = json.loads(result.stdout)

    model, processor = (
        UMTVideoTextForQuestionAnswering.from_pretrained(answerer),
        AutoProcessor.from_pretrained(answerer),
    )
    options = {"sampling_strategy": "middle", "padding": True, "return_tensors": "pt"}
    inputs = processor(text=[QUESTION], videos=[str(videos / "a.mp4")], **options)
    encoded = processor.encode_answers(ANSWERS, return_tensors="pt")
    indices, probabilities = model.rank_answers(
        inputs["pixel_values"],
        inputs["input_ids"],
        inputs["attention_mask"],
        encoded["input_ids"],
        encoded["attention_mask"],
        top_k=3,
    )
    assert [entry["answer"] for entry in reply["ranked"]] == [ANSWERS[i] for i in indices[0, :2].tolist()]
    found = [entry["probability"] for entry in reply["ranked"]]
    assert found == pytest.approx(probabilities[0, :2].tolist(), abs=1e-5)
    assert {"answer": reply["answer"], "probability": reply["probability"]} == reply["ranked"][0]

    lines = ask(videos / "a.mp4", "--model", answerer, "--answers", answers).stdout.splitlines()
    assert [line.split(maxsplit=1)[1] for line in lines] == [ANSWERS[i] for i in indices[0].tolist()]


def test_the_model_answers_in_its_own_words(answerer, videos):
    result = ask(videos / "a.mp4", "--model", answerer)
    assert result.exit_code == 0, result.output
    model, processor = (
        UMTVideoTextForQuestionAnswering.from_pretrained(answerer),
        AutoProcessor.from_pretrained(answerer),
    )
    options = {"sampling_strategy": "middle", "padding": True, "return_tensors": "pt"}
    inputs = processor(text=[QUESTION], videos=[str(videos / "a.mp4")], **options)
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert result.stdout.strip() == processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()


def test_mistakes_in_asking(answerer, videos, tmp_path):
    damaged = ask(videos / "damaged.mp4", "--model", answerer)
    assert damaged.exit_code == 1 and damaged.stdout == "" and "damaged.mp4" in damaged.stderr
    assert ask(videos / "a.mp4", "--model", answerer, question=" ").exit_code == 2
    (tmp_path / "answers.json").write_text("red, green")
    assert ask(videos / "a.mp4", "--model", answerer, "--answers", tmp_path / "answers.json").exit_code == 2
    retrieval = save_model(tmp_path / "retrieval", UMTVideoTextForRetrieval)
    result = ask(videos / "a.mp4", "--model", retrieval)
    message = " ".join(result.stderr.replace("│", " ").split())
    assert result.exit_code == 2 and "is a video-text retrieval folder" in message and "umt-hf embed" in message
