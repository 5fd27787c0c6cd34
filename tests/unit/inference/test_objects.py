"""Objects that load once and answer often: what they say, what they refuse, and how often they load."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator, PartialState
from datasets import Dataset
from PIL import Image
from transformers import PreTrainedModel
from typer.testing import CliRunner

import umt_hf
from tests.processes import run_ranks
from tests.unit.finetuning.test_classification import tiny_config
from tests.unit.inference.test_search import save_model
from umt_hf import (
    ActionDetector,
    UMTVideoForActionDetection,
    UMTVideoForPreTraining,
    UMTVideoForVideoClassification,
    UMTVideoProcessor,
    UMTVideoTextForQuestionAnswering,
    VideoAnswerer,
    VideoClassifier,
)
from umt_hf.cli import app
from umt_hf.inference.detection import read_frames
from umt_hf.inference.labels.scored import rank_labels
from umt_hf.inference.loading import load_complete_model, load_with_report
from umt_hf.inference.question_answering import answer_questions
from umt_hf.inference.search import embed_videos
from umt_hf.moving_shapes.render import write_moving_shapes
from umt_hf.processing.decoding import VideoDecodingError
from umt_hf.processing.detection_transforms import prepare_test_clip

NAMES = ("running", "jumping", "standing")
QUESTION = "a red circle moving?"
ANSWERS = ["red", "a green circle", "left"]
BOXES = [[5, 8, 30, 40], [0, 0, 64, 64]]
runner = CliRunner()


def save_labelled(folder, model_class, task):
    torch.manual_seed(0)
    config = tiny_config(id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)})
    model = model_class(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    UMTVideoProcessor.from_model_config(config, task, size={"shortest_edge": 48}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "classifier": save_labelled(root / "classifier", UMTVideoForVideoClassification, "classification"),
        "detector": save_labelled(root / "detector", UMTVideoForActionDetection, "detection"),
        "answerer": save_model(root / "answerer", UMTVideoTextForQuestionAnswering),
    }


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Three rendered clips, and a file that is not one."""
    folder = tmp_path_factory.mktemp("shapes")
    write_moving_shapes(folder, num_train_clips=3, num_validation_clips=1, num_test_clips=1)
    (folder / "broken.mp4").write_bytes(b"no video at all")
    return [str(path) for path in sorted((folder / "videos" / "train").iterdir())] + [str(folder / "broken.mp4")]


@pytest.fixture
def count_loads(monkeypatch):
    """Counts how often weights are loaded."""
    calls = []
    load = PreTrainedModel.from_pretrained.__func__

    def counted(cls, *arguments, **options):
        calls.append(cls.__name__)
        return load(cls, *arguments, **options)

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", classmethod(counted))
    return calls


def test_three_answers_take_one_load(folders, clips, count_loads):
    classifier = VideoClassifier(folders["classifier"])
    assert all(classifier.classify(clip) for clip in clips[:3])
    detector = ActionDetector(folders["detector"])
    assert all(detector.detect(clip, BOXES, key_seconds=0.5).boxes for clip in clips[:3])
    answerer = VideoAnswerer(folders["answerer"])
    assert all(isinstance(answerer.answer(clip, QUESTION).answer, str) for clip in clips[:3])
    assert count_loads == [
        "UMTVideoForVideoClassification",
        "UMTVideoForActionDetection",
        "UMTVideoTextForQuestionAnswering",
    ]


def test_a_video_or_several(folders, clips):
    classifier = VideoClassifier(folders["classifier"], device="cpu", attn_implementation="eager")
    first, *others = classifier.classify(clips[:3], top_k=2)
    assert len(others) == 2 and [len(found) for found in (first, *others)] == [2, 2, 2]
    assert classifier.classify(clips[0], top_k=2) == first
    assert classifier.classify([clips[0]], top_k=2) == [first]
    with open(clips[0], "rb") as file:
        assert classifier.classify(file.read(), top_k=2) == first
    # Frames of one video are one video, also as a list.
    frames = [Image.fromarray(frame) for frame in np.zeros((12, 48, 64, 3), np.uint8)]
    (found,) = classifier.classify(frames, top_k=1)
    assert classifier.classify(np.stack(frames), top_k=1) == (found,)
    assert classifier.classify([frames], top_k=1) == [(found,)]
    assert [list(row) for row in classifier.classify([frames, frames], top_k=1)] == [[found], [found]]


def test_files_are_classified_as_one_by_one(folders, clips):
    classifier = VideoClassifier(folders["classifier"])
    report = classifier.classify_files(clips, top_k=3, num_clips=2, show_progress=False)
    assert [video.path for video in report.skipped] == [clips[3]]
    for video in report.videos:
        alone = classifier.classify(video.path, top_k=3, num_clips=2)
        assert [scored.label for scored in video.labels] == [scored.label for scored in alone]
        assert [scored.probability for scored in video.labels] == pytest.approx(
            [scored.probability for scored in alone], abs=1e-6
        )
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        classifier.classify(clips[0], top_k=0)


def classify_and_write(model, clips, path):
    report = VideoClassifier(model).classify_files(clips, top_k=2, show_progress=False)
    if PartialState().is_main_process:
        assert not Path(path).exists()
        Path(path).write_text(json.dumps(asdict(report)))


@pytest.mark.slow
def test_two_processes_classify_files_as_one(folders, clips, tmp_path):
    for count in (1, 2):
        run_ranks(
            classify_and_write, str(folders["classifier"]), clips, str(tmp_path / f"{count}.json"), num_processes=count
        )
    one, two = (json.loads((tmp_path / f"{count}.json").read_text()) for count in (1, 2))
    assert one == two and len(one["videos"]) == 3 and len(one["skipped"]) == 1


def test_answers_are_those_of_the_evaluation(folders, clips):
    answerer = VideoAnswerer(folders["answerer"])
    rows = [{"question_id": row, "video": clip, "question": QUESTION} for row, clip in enumerate(clips[:3])]
    questions, accelerator = Dataset.from_list(rows), Accelerator()
    for answers in (None, ANSWERS):
        expected = answer_questions(
            answerer.model, answerer.processor, questions, accelerator, answers, batch_size=1, num_workers=0
        )
        for clip, reply in zip(clips, expected, strict=False):
            found = answerer.answer(clip, QUESTION, answers)
            assert found.answer == reply["answer"]
            if answers is not None:
                assert found.ranked[0].probability == pytest.approx(reply["probability"], abs=1e-6)
                assert sum(entry.probability for entry in found.ranked) == pytest.approx(1, abs=1e-5)
                assert len(answerer.answer(clip, QUESTION, answers, num_ranked=2).ranked) == 2


def test_mistakes_in_answering(folders, clips):
    answerer = VideoAnswerer(folders["answerer"])
    for arguments, reason in (
        ((" ",), "question is empty"),
        ((os.fsdecode(b"r\xf6t?"),), "question .* is not UTF-8"),
        ((QUESTION, []), "list of answers is empty"),
        ((QUESTION, "red"), "single text 'red'"),
    ):
        with pytest.raises(ValueError, match=reason):
            answerer.answer(clips[0], *arguments)
    with pytest.raises(ValueError, match="num_ranked"):
        answerer.answer(clips[0], QUESTION, ANSWERS, num_ranked=0)
    with pytest.raises(VideoDecodingError, match="broken.mp4"):
        answerer.answer(clips[3], QUESTION)


def detect(video, *arguments):
    return runner.invoke(app, ["detect", str(video), *map(str, arguments)])


def test_detected_actions_are_those_of_the_model(folders, clips, tmp_path):
    model = UMTVideoForActionDetection.from_pretrained(folders["detector"])
    processor = UMTVideoProcessor.from_pretrained(folders["detector"])
    frames = read_frames(processor, clips[0], 0.5, None)
    height, width = frames.shape[-2:]
    shares = torch.tensor(BOXES) / torch.tensor([width, height, width, height])
    clip, prepared = prepare_test_clip(frames, shares.clamp(0, 1), processor, model.config.patch_size)
    with torch.no_grad():
        expected = model(clip[None], prepared[None]).logits[0].sigmoid()

    (tmp_path / "boxes.json").write_text(json.dumps(BOXES[1:]))
    boxes = ["--boxes", "5,8,30,40", "--boxes-file", tmp_path / "boxes.json"]
    result = detect(clips[0], "--model", folders["detector"], *boxes, "--seconds", 0.5, "--top-k", 2, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["boxes"]
    assert [entry["box"] for entry in found] == BOXES
    for entry, probabilities in zip(found, expected, strict=True):
        best = probabilities.argsort(descending=True)[:2].tolist()
        assert [scored["label"] for scored in entry["actions"]] == [NAMES[i] for i in best]
        assert [scored["probability"] for scored in entry["actions"]] == pytest.approx(
            probabilities[best].tolist(), abs=1e-6
        )

    lines = detect(clips[0], "--model", folders["detector"], *boxes, "--seconds", 0.5).stdout.splitlines()
    assert lines[0] == "box 5, 8, 30, 40" and lines[4] == "box 0, 0, 64, 64" and len(lines) == 8
    assert lines[1].split() == [f"{found[0]['actions'][0]['probability']:.4f}", found[0]["actions"][0]["label"]]


def test_mistakes_in_detecting(folders, clips, tmp_path):
    good = ["--model", folders["detector"], "--boxes", "5,8,30,40", "--seconds", "0.5"]
    for arguments, reason in (
        (["--model", folders["detector"], "--seconds", "0.5"], "at least one box"),
        ([*good, "--boxes", "5,8,30"], "four numbers"),
        ([*good, "--boxes", "30,8,5,40"], "x1 < x2"),
        ([*good, "--boxes", "nan,8,5,40"], "x1 < x2"),
        ([*good, "--frame", "3"], "one of them"),
        ([*good[:4]], "one of them"),
    ):
        result = detect(clips[0], *arguments)
        message = " ".join(result.stderr.replace("│", " ").split())
        assert result.exit_code == 2 and result.stdout == "" and reason in message, message
        assert "Traceback" not in message
    (tmp_path / "boxes.json").write_text('{"box": 1}')
    result = detect(clips[0], *good, "--boxes-file", tmp_path / "boxes.json")
    assert result.exit_code == 2 and "expected a JSON list" in " ".join(result.stderr.replace("│", " ").split())
    for video, reason in ((clips[3], "broken.mp4"), (clips[0], "outside the video")):
        changed = [*good[:-1], "99"] if video == clips[0] else good
        result = detect(video, *changed)
        assert result.exit_code == 1 and result.stdout == "" and reason in result.stderr


def test_models_that_are_not_complete_are_refused(folders, tmp_path):
    config = tiny_config()
    UMTVideoForPreTraining(config).save_pretrained(tmp_path)
    UMTVideoProcessor.from_model_config(config).save_pretrained(tmp_path)
    for kind, script in ((VideoClassifier, "classification"), (ActionDetector, "detection")):
        advice = f"is a stage-1 pre-training folder .*: fine-tune it with `umt-hf finetune {script} "
        with pytest.raises(ValueError, match=advice):
            kind(tmp_path)
    start = ("UMTVideoForPreTraining",)
    loaded = load_with_report(UMTVideoForVideoClassification, tmp_path, start)
    assert set(loaded.fresh) >= {"classifier.bias", "classifier.weight"} and loaded.mismatched == ()
    allowed = tuple({name.split(".")[0] for name in loaded.fresh})
    options = {"dtype": torch.bfloat16, "accepted": start}
    model = load_complete_model(UMTVideoForVideoClassification, tmp_path, allowed_fresh=allowed, **options)
    assert model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="is not a complete UMTVideoFor.*: it lacks classifier.bias, .*Use another"):
        load_complete_model(UMTVideoForVideoClassification, tmp_path, hint="Use another.", **options)


def test_half_precision_answers_alike(folders, clips):
    full, half = (VideoClassifier(folders["classifier"], dtype=dtype) for dtype in (None, torch.bfloat16))
    expected = {scored.label: scored.probability for scored in full.classify(clips[0])}
    for scored in half.classify(clips[0]):
        assert scored.probability == pytest.approx(expected[scored.label], abs=0.1)


def test_equal_scores_keep_the_order_of_the_classes():
    ranked = rank_labels(np.array([0.2, 0.4, 0.4]), NAMES)
    assert [scored.label for scored in ranked] == ["jumping", "standing", "running"]


@pytest.mark.parametrize("name", ["ActionDetector", "VideoAnswerer", "VideoClassifier", "VideoSearcher"])
def test_public_names(name):
    assert name in umt_hf.__all__ and name in dir(umt_hf)
    assert getattr(umt_hf, name).__name__ == name and "Examples:" in getattr(umt_hf, name).__doc__


def test_arguments_of_another_type_are_refused_in_one_sentence(folders, clips, tmp_path):
    classifier, detector = VideoClassifier(folders["classifier"]), ActionDetector(folders["detector"])
    answerer = VideoAnswerer(folders["answerer"])
    calls = [
        (lambda: classifier.classify(clips[0], top_k="3"), r"top_k must be an integer, got '3' of type str\."),
        (lambda: classifier.classify(clips[0], num_clips=1.5), r"num_clips must be an integer, got 1\.5 of type"),
        (lambda: classifier.classify_files(clips[:1], top_k="3"), "top_k must be an integer"),
        (lambda: classifier.classify_files(clips[:1], batch_size="8"), "batch_size must be an integer"),
        (
            lambda: detector.detect(clips[0], None, 0.5),
            "boxes must be a list with x1, y1, x2, y2 of each box, got N",
        ),
        (lambda: detector.detect(clips[0], [5, 8, 30, 40], 0.5), "boxes must be a list with x1, y1"),
        (lambda: detector.detect(clips[0], BOXES, 0.5, top_k="3"), "top_k must be an integer"),
        (lambda: answerer.answer(clips[0], None), r"question must be a text, got None of type NoneType\."),
        (lambda: answerer.answer(clips[0], QUESTION, num_ranked="1"), "num_ranked must be an integer"),
        (
            lambda: embed_videos(clips[:1], folders["answerer"], tmp_path, batch_size="8"),
            "batch_size must be an integer",
        ),
    ]
    for call, message in calls:
        with pytest.raises(TypeError, match=f"^{message}"):
            call()
    for call, name in (
        (lambda: classifier.classify(clips[0], top_k=0), "top_k"),
        (lambda: classifier.classify_files(clips[:1], num_crops=0), "num_crops"),
        (lambda: embed_videos(clips[:1], folders["answerer"], tmp_path, shard_size=0), "shard_size"),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be at least 1, got 0"):
            call()
    with pytest.raises(ValueError, match="Give at least one video: a file, a folder or a URL"):
        classifier.classify_files([])
    assert classifier.classify(clips[0], top_k=np.int64(1))


def test_weights_that_are_nan_are_named_when_a_folder_is_loaded(folders, tmp_path, caplog):
    model = UMTVideoForVideoClassification.from_pretrained(folders["classifier"])
    torch.nn.init.constant_(model.classifier.bias, float("nan"))
    model.save_pretrained(tmp_path)
    load_complete_model(UMTVideoForVideoClassification, tmp_path)
    assert f"{tmp_path}: weights are NaN or infinite: classifier.bias." in caplog.text
