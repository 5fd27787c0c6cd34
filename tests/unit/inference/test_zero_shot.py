"""Classes as texts: their vectors, probabilities, templates, the command, files of results, and the test."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize
from transformers import AutoModel, AutoProcessor
from typer.testing import CliRunner

from tests.unit.inference.test_features import TINY
from tests.unit.inference.test_search import save_model
from umt_hf import UMTVideoConfig, UMTVideoForVideoClassification, UMTVideoTextModel, ZeroShotVideoClassifier, cli
from umt_hf.cli.word_lists import repeat_flags
from umt_hf.evaluation import zero_shot as evaluate_zero_shot
from umt_hf.inference.labels.zero_shot import TEMPLATE_SETS, read_templates
from umt_hf.moving_shapes.render import write_moving_shapes

LABELS = ["red circle", "green square", "a red circle moving up"]
TEMPLATES = ["a {} moving left", "a circle and a {}"]
runner = CliRunner()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), UMTVideoTextModel)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_moving_shapes(folder, num_train_clips=4, num_validation_clips=1, num_test_clips=1)
    return folder / "videos" / "train"


def compute_expected(folder: Path, videos: list[Path], labels: list[str], templates: list[str]) -> np.ndarray:
    """`(videos, classes)`, by the Auto classes alone, a text at a time."""
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    classes = []
    for label in labels:
        texts = [processor(text=[t.replace("{}", label)], return_tensors="pt") for t in templates]
        with torch.no_grad():
            vectors = [normalize(model.get_text_features(**text).pooler_output, dim=-1) for text in texts]
        classes.append(normalize(torch.cat(vectors).mean(dim=0), dim=0))
    rows = []
    for video in videos:
        inputs = processor(videos=[str(video)], return_tensors="pt")
        with torch.no_grad():
            similarity = torch.stack(classes) @ model.get_video_features(**inputs).pooler_output[0]
        rows.append((similarity / model.temperature).softmax(dim=0).detach().numpy())
    return np.stack(rows)


def run(*words, exit_code: int = 0):
    result = runner.invoke(cli.app, [*map(str, words)])
    assert result.exit_code == exit_code, result.output
    return result


def test_probabilities_are_those_of_the_ensemble(model, videos):
    paths = sorted(videos.iterdir())
    expected = compute_expected(model, paths, LABELS, TEMPLATES)
    assert expected.std() > 1e-3
    classifier = ZeroShotVideoClassifier(model, LABELS, TEMPLATES)
    assert classifier.labels == LABELS and classifier.templates == TEMPLATES
    for path, row in zip(paths, expected, strict=True):
        found = {one.label: one.probability for one in classifier.classify(str(path))}
        np.testing.assert_allclose([found[label] for label in LABELS], row, atol=1e-5)
    report = classifier.classify_files([str(videos)], top_k=1)
    assert [video.labels[0].label for video in report.videos] == [LABELS[row.argmax()] for row in expected]


@pytest.mark.parametrize(("name", "count", "first", "last"), [
    ("video", 1, "a video of {}", "a video of {}"),
    ("plain", 1, "{}", "{}"),
    ("clip_kinetics", 28, "a photo of {}.", "a demonstration of a person practicing {}."),
    ("clip_ucf101", 48, "a photo of a person {}.", "a demonstration of the person practicing {}."),
])  # fmt: skip
def test_sets_of_templates(name, count, first, last):
    found = read_templates([name])
    assert (len(found), len(set(found)), found[0], found[-1]) == (count, count, first, last)
    assert found == list(TEMPLATE_SETS[name])


def test_templates_come_from_sets_files_and_sentences(tmp_path):
    (tmp_path / "mine.txt").write_bytes("\ufeffa {} in the snow\r\n\r\n  {} at night \r\n".encode())
    assert read_templates(["plain", str(tmp_path / "mine.txt"), "look: {}!"]) == [
        "{}",
        "a {} in the snow",
        "{} at night",
        "look: {}!",
    ]


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ([], "There is no template"),
        (["a video"], "'a video' must have one {}"),
        (["clip_kinetic"], "clip_kinetics, clip_ucf101 are the names of sets"),
        (["{} and {}"], "must have one {}"),
        (["{} of {name}"], "must have one {}"),
        (["plain", "{}"], "'{}' comes twice"),
        ("clip_kinetics", "templates must be a list of texts, got 'clip_kinetics'"),
    ],
)
def test_templates_that_make_no_sense(templates, message):
    with pytest.raises((TypeError, ValueError)) as found:
        read_templates(templates)
    assert message in str(found.value)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (["dog"], ValueError, "give at least two classes"),
        ([], ValueError, "0 given"),
        (["dog", " "], ValueError, "one of them is empty"),
        (["dog", "cat", "dog "], ValueError, "'dog' comes twice"),
        ("dog", TypeError, "must be a list of texts"),
        (["dog", 3], TypeError, "must be a list of texts"),
    ],
)
def test_labels_that_make_no_sense(labels, error, message):
    """Before the model is loaded."""
    with pytest.raises(error, match=message):
        ZeroShotVideoClassifier("nowhere", labels)


def test_a_label_may_hold_braces(model, videos):
    labels = ["{circle}", "{}"]
    path = min(videos.iterdir())
    expected = compute_expected(model, [path], labels, ["a {}"])[0]
    found = {
        one.label: one.probability for one in ZeroShotVideoClassifier(model, labels, ["a {}"]).classify(str(path))
    }
    np.testing.assert_allclose([found[label] for label in labels], expected, atol=1e-5)


def test_a_classifier_is_no_dual_encoder(tmp_path):
    UMTVideoForVideoClassification(UMTVideoConfig(**TINY)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="UMTVideoForVideoClassification"):
        ZeroShotVideoClassifier(tmp_path, LABELS)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("v --labels a b --model m", "v --labels a --labels b --model m"),
        ("--labels a v --template {} x{} --json", "--labels a --labels v --template {} --template x{} --json"),
        ("v --model m --labels a -- b", "v --model m --labels a -- b"),
        ("- --labels a - b", "- --labels a --labels - --labels b"),
        ("v --top-k 3", "v --top-k 3"),
    ],
)
def test_flags_that_take_several_words(words, expected):
    assert repeat_flags(words.split()) == expected.split()


def test_the_command_prints_writes_and_refuses(model, videos, tmp_path):
    paths = sorted(videos.iterdir())
    expected = compute_expected(model, paths, LABELS, TEMPLATES)
    flags = ["--model", model, "--labels", *LABELS, "--template", *TEMPLATES]
    report = json.loads(run("classify", videos, *flags, "--json").stdout)
    for video, row in zip(report["videos"], expected, strict=True):
        found = {one["label"]: one["probability"] for one in video["labels"]}
        np.testing.assert_allclose([found[label] for label in LABELS], row, atol=1e-5)
    # Names from a file are the same classes.
    (tmp_path / "names.txt").write_text("\n".join(LABELS) + "\n")
    from_file = run("classify", videos, "--json", "--model", model, "--labels", tmp_path / "names.txt", *flags[-3:])
    assert json.loads(from_file.stdout) == report
    # A file of results holds those of one set of classes and templates.
    out = tmp_path / "found.jsonl"
    assert "4 classified, 0 unchanged" in run("classify", videos, *flags, "--out", out).stdout
    assert "0 classified, 4 unchanged" in run("classify", videos, *flags, "--out", out).stdout
    refused = run("classify", videos, "--model", model, "--labels", *LABELS, "--out", out, exit_code=2)
    assert "made with templates=" in refused.output
    refused = run(
        "classify", videos, "--model", model, "--labels", *LABELS[:2], *flags[-3:], "--out", out, exit_code=2
    )
    assert "made with classes=" in refused.output
    found = json.loads(run("classify", videos, *flags, "--window", 1, "--top-k", 1, "--json").stdout)["videos"]
    assert {moment["labels"][0]["label"] for video in found for moment in video["moments"]} <= set(LABELS)
    refused = run("classify", videos, "--model", model, "--labels", "nothere.txt", "walk", exit_code=2)
    assert "nothere.txt: no such file of class names" in refused.output
    (tmp_path / "empty.txt").touch()
    refused = run("classify", videos, "--model", model, "--labels", tmp_path / "empty.txt", "walk", exit_code=2)
    assert "names no class" in refused.output
    refused = run("classify", videos, "--model", model, "--template", "a {}", exit_code=2)
    assert "--template needs --labels" in refused.output


def test_a_class_may_be_called_like_a_file(model, videos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run").write_text("red circle\nblue square\n")
    report = json.loads(run("classify", videos, "--model", model, "--labels", "run", "walk", "--json").stdout)
    assert {one["label"] for video in report["videos"] for one in video["labels"]} == {"run", "walk"}


def write_classes(folder: Path, videos: Path) -> Path:
    """A folder per class, with spaces in the names."""
    for number, video in enumerate(sorted(videos.iterdir())):
        target = folder / LABELS[number % 2] / video.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(video.read_bytes())
    return folder


def test_the_report_is_of_the_classes_of_the_data(model, videos, tmp_path):
    data = write_classes(tmp_path / "data", videos)
    names = sorted(LABELS[:2])
    paths = sorted(data.rglob("*.mp4"))
    best = compute_expected(model, paths, names, TEMPLATES).argmax(axis=1)
    right = np.mean([names[i] == path.parent.name for i, path in zip(best, paths, strict=True)])
    words = ["--model_name_or_path", str(model), "--data", str(data), "--output_dir", str(tmp_path / "report")]
    words += ["--templates", *TEMPLATES, "--dataloader_num_workers", "0", "--disable_tqdm", "true"]
    metrics = evaluate_zero_shot.main(words)
    assert metrics["top1_accuracy"] == pytest.approx(right) and metrics["unreadable_videos"] == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["task"] == "zero_shot_classification" and report["templates"] == TEMPLATES
    assert report["class_accuracy"].keys() == set(names) and report["num_videos"] == 4
    predictions = json.loads((tmp_path / "report" / "predictions.json").read_text())
    assert [row["prediction"] for row in predictions] == [names[i] for i in best]
    assert (tmp_path / "report" / "confusion.png").stat().st_size > 1000


def test_names_of_the_classes_are_needed(model, videos, tmp_path):
    (tmp_path / "list.csv").write_text("".join(f"{path},{i % 2}\n" for i, path in enumerate(sorted(videos.iterdir()))))
    words = ["--model_name_or_path", str(model), "--data", str(tmp_path / "list.csv"), "--dataloader_num_workers", "0"]
    words += ["--output_dir", str(tmp_path / "report"), "--disable_tqdm", "true"]
    with pytest.raises((ValueError, SystemExit), match="set class_names|2"):
        evaluate_zero_shot.main(words)
    (tmp_path / "names.json").write_text(json.dumps(LABELS[:2]))
    metrics = evaluate_zero_shot.main([*words, "--class_names", str(tmp_path / "names.json")])
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["class_accuracy"].keys() == set(LABELS[:2]) and 0 <= metrics["top1_accuracy"] <= 1
