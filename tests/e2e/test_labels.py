"""Class names and several labels per video, from the forms that users have to `pipeline`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from typer.testing import CliRunner

from tests.e2e.labelled import NAMES, build_test_flags, save_classifier, save_splits, write_colors, write_tags
from tests.e2e.runs import FINE_TUNING, to_flags
from umt_hf import UMTVideoForVideoClassification, UMTVideoProcessor, VideoClassifier
from umt_hf.cli import app
from umt_hf.evaluation import classification as evaluate_classification
from umt_hf.finetuning import classification as finetune_classification
from umt_hf.hub_cards.card import build_model_card
from umt_hf.moving_shapes.render import write_video
from umt_hf.runs.config import parse_config
from umt_hf.runs.folder import CONFUSION_PICTURE, PREDICTIONS_FILE, REPORT_FILE

from .conftest import PIPELINE_TAKES_VIDEOS, build_pipeline

CLASSES = ("blue", "cold", "green", "red", "warm")


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> dict[str, list[tuple[str, str]]]:
    return write_colors(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("start"), ("a", "b"))


def build_flags(start: Path, output: Path, **changes) -> list[str]:
    fields = {
        **FINE_TUNING,
        "model_name_or_path": start,
        "output_dir": output,
        "per_device_train_batch_size": 6,
        "learning_rate": 1e-2,
        "max_steps": 2,
        "drop_path_rate": 0,
    }
    return to_flags(**fields | changes)


def tag(videos, folder: Path) -> dict[str, Path]:
    return {f"{split}_data": write_tags(folder / f"{split}.json", rows) for split, rows in videos.items()}


def read(folder: Path, name: str = REPORT_FILE):
    return json.loads((folder / name).read_text())


def test_names_of_a_saved_dataset_become_id2label(videos, start, tmp_path):
    data = save_splits(tmp_path / "data", videos, ("red", "blue", "green"))
    metrics = finetune_classification.main(
        build_flags(start, tmp_path / "run", train_data=data, validation_split="validation", test_split="test")
    )
    assert AutoConfig.from_pretrained(tmp_path / "run").id2label == {0: "red", 1: "blue", 2: "green"}
    assert {"eval_top1_accuracy", "eval_mean_class_accuracy", "eval_macro_f1", "test_top1_accuracy"} <= metrics.keys()
    assert "eval_top5_accuracy" not in metrics  # three classes


def test_names_of_a_spreadsheet_become_id2label(videos, start, tmp_path):
    for split, rows in videos.items():
        lines = [f"{video},{color}" for video, color in rows]
        (tmp_path / f"{split}.csv").write_text("\n".join(["video,label", *lines]) + "\n", encoding="utf-8-sig")
    data = {f"{split}_data": tmp_path / f"{split}.csv" for split in ("train", "validation")}
    finetune_classification.main(build_flags(start, tmp_path / "run", **data))
    assert AutoConfig.from_pretrained(tmp_path / "run").id2label == dict(enumerate(NAMES))


def test_held_out_names_are_matched_by_name(videos, start, tmp_path):
    """A held-out dataset that numbers the classes otherwise, and one with a class that training does not have."""
    train = save_splits(tmp_path / "train", videos)
    other = save_splits(tmp_path / "other", videos, ("red", "green", "blue"))

    def load(validation: Path) -> finetune_classification.ClassificationData:
        flags = build_flags(start, tmp_path / "run", train_data=train, validation_data=validation)
        return finetune_classification.load_labelled_videos(parse_config(finetune_classification.SECTIONS, flags)[1])

    found = load(other)
    assert found.names == list(NAMES)
    assert [NAMES[label] for label in found.validation["label"]] == [color for _, color in videos["validation"]]
    odd = {"validation": [(path, "black") for path, _ in videos["validation"]]}
    with pytest.raises(ValueError, match="black.*not classes.*blue"):
        load(save_splits(tmp_path / "odd", odd, ("black",)))


def test_an_evaluation_matches_names_with_those_of_the_model(videos, tmp_path, caplog):
    """The same figures, whatever the data's numbers are; and it says so."""
    model = save_classifier(tmp_path / "model")
    figures = {}
    for name, order in (("same", NAMES), ("other", ("green", "red", "blue"))):
        data = save_splits(tmp_path / name, videos, order)
        caplog.clear()
        with caplog.at_level("INFO", logger="umt_hf"):
            figures[name] = evaluate_classification.main(build_test_flags(model, data, tmp_path / f"{name}_test"))
        assert ("by their names" in caplog.text) is (name == "other")
        assert [row["label"] for row in read(tmp_path / f"{name}_test", PREDICTIONS_FILE)] == list(NAMES)
    assert figures["same"] == figures["other"]
    assert {"top1_accuracy", "mean_class_accuracy", "macro_f1", "unreadable_videos"} == figures["same"].keys()


def test_labels_that_the_model_does_not_have_are_refused(videos, tmp_path):
    model = save_classifier(tmp_path / "model")
    (tmp_path / "test.csv").write_text("\n".join(f"{path},{3 * i}" for i, (path, _) in enumerate(videos["test"])))
    for data, message in (
        (tmp_path / "test.csv", "label 6 is too high for 3 classes"),
        (save_splits(tmp_path / "odd", {"test": [(videos["test"][0][0], "pink")]}, ("pink",)), "pink.*not classes"),
        (write_tags(tmp_path / "tags.json", videos["test"]), "warm|cold"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_classification.main(build_test_flags(model, data, tmp_path / "test"))
    lists = [{"video": path, "label": [0, 1]} for path, _ in videos["test"]]
    (tmp_path / "lists.json").write_text(json.dumps(lists))
    with pytest.raises(ValueError, match="row 0: a video has 2 labels"):
        evaluate_classification.main(build_test_flags(model, tmp_path / "lists.json", tmp_path / "test"))
    hidden = [{"video": path, "label": -1} for path, _ in videos["test"]]
    (tmp_path / "hidden.json").write_text(json.dumps(hidden))
    with pytest.raises(ValueError, match="row 0.*-1"):
        evaluate_classification.main(build_test_flags(model, tmp_path / "hidden.json", tmp_path / "test"))
    assert not (tmp_path / "test" / REPORT_FILE).exists()


def test_a_model_without_names_is_compared_by_number_and_it_is_said(videos, tmp_path, caplog):
    """Names of a `ClassLabel` alone: those of folders and spreadsheets have no numbers of their maker's."""
    model = save_classifier(tmp_path / "model", tuple(f"LABEL_{number}" for number in range(3)))
    evaluate_classification.main(build_test_flags(model, save_splits(tmp_path / "data", videos), tmp_path / "test"))
    assert "the model has none: labels are compared by number" in caplog.text
    (tmp_path / "test.csv").write_text("\n".join(f"{path},{name}" for path, name in videos["test"]))
    with pytest.raises(ValueError, match="blue.*not classes"):
        evaluate_classification.main(build_test_flags(model, tmp_path / "test.csv", tmp_path / "test"))


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_several_labels_per_video_from_training_to_pipeline(videos, start, tmp_path, mode):
    metrics = finetune_classification.main(
        build_flags(
            start,
            tmp_path / "run",
            **tag(videos, tmp_path),
            mode=mode,
            mixup_alpha=0.8,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="eval_map",
        )
    )
    assert {"eval_map", "eval_micro_f1", "eval_macro_f1", "test_map"} <= metrics.keys()
    config = AutoConfig.from_pretrained(tmp_path / "run")
    assert config.problem_type == "multi_label_classification" and config.id2label == dict(enumerate(CLASSES))

    found = evaluate_classification.main(
        build_test_flags(
            tmp_path / "run", tmp_path / "validation.json", tmp_path / "report", per_device_eval_batch_size=4
        )
    )
    assert found["map"] == pytest.approx(metrics["eval_map"]) and "top1_accuracy" not in found
    report, rows = read(tmp_path / "report"), read(tmp_path / "report", PREDICTIONS_FILE)
    assert report["average_precision"].keys() == set(CLASSES) and report["view_merging"] == "mean of sigmoids"
    assert not (tmp_path / "report" / CONFUSION_PICTURE).exists()
    assert rows[0]["labels"] == ["blue", "cold"] and rows[1]["labels"] == ["green"]

    card = build_model_card(tmp_path / "run").content
    assert "each of its 5 classes a probability for itself" in card and "| mAP |" in card and "| micro F1 |" in card

    model = UMTVideoForVideoClassification.from_pretrained(tmp_path / "run").eval()
    processor = UMTVideoProcessor.from_pretrained(tmp_path / "run")
    classifier = VideoClassifier(tmp_path / "run", device="cpu")
    options = {} if PIPELINE_TAKES_VIDEOS else {"function_to_apply": "sigmoid"}
    for (video, _), row in zip(videos["validation"], rows, strict=True):
        with torch.no_grad():
            expected = model(processor(video, return_tensors="pt")["pixel_values"]).logits.sigmoid()[0]
        mine = {scored.label: scored.probability for scored in classifier.classify(video)}
        assert [mine[name] for name in CLASSES] == pytest.approx(expected.tolist(), abs=1e-5)
        theirs = {entry["label"]: entry["score"] for entry in build_pipeline(tmp_path / "run")(video, **options)}
        if PIPELINE_TAKES_VIDEOS:  # an old one reads other frames
            assert mine == pytest.approx(theirs, abs=1e-5)
        said = {entry["label"]: entry["probability"] for entry in row["predictions"]}
        assert said == pytest.approx({name: value for name, value in mine.items() if value >= 0.5}, abs=1e-5)


def test_views_of_several_labels_are_averaged_as_probabilities_by_command_and_object(tmp_path):
    model = save_classifier(tmp_path / "model", problem_type="multi_label_classification")
    video = str(tmp_path / "noise.mp4")
    write_video(video, np.random.default_rng(0).integers(0, 255, (24, 32, 96, 3), dtype=np.uint8))
    views = UMTVideoProcessor.from_pretrained(model)(video, num_clips=2, num_crops=3, return_tensors="pt")
    with torch.no_grad():
        logits = UMTVideoForVideoClassification.from_pretrained(model).eval()(**views).logits
    expected = logits.sigmoid().mean(0)
    assert (expected - logits.mean(0).sigmoid()).abs().max() > 1e-5 and abs(expected.sum() - 1) > 0.05
    given = VideoClassifier(model, device="cpu").classify(video, num_clips=2, num_crops=3)
    result = CliRunner().invoke(
        app,
        [
            "classify",
            video,
            "--model",
            str(model),
            "--num-clips",
            "2",
            "--num-crops",
            "3",
            "--num-workers",
            "0",
            "--json",
        ],
    )
    printed = json.loads(result.stdout)["videos"][0]["labels"]
    for number, name in enumerate(NAMES):
        assert {scored.label: scored.probability for scored in given}[name] == pytest.approx(
            expected[number].item(), abs=1e-5
        )
        assert {one["label"]: one["probability"] for one in printed}[name] == pytest.approx(
            expected[number].item(), abs=1e-5
        )


def test_the_loss_of_several_labels_is_that_of_the_model(videos, start, tmp_path):
    """Binary cross entropy of each class, as Transformers computes it by `problem_type`; MixUp mixes the targets."""
    flags = build_flags(start, tmp_path / "run", **tag(videos, tmp_path))
    trainer = finetune_classification.build_classification_trainer(
        *parse_config(finetune_classification.SECTIONS, flags)
    )
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(3)])
    assert batch["labels"].tolist() == [[1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 1]]
    model = trainer.model.eval()
    with torch.no_grad():
        expected = model(pixel_values=batch["pixel_values"], labels=batch["labels"]).loss
        torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), expected)
    mixed = finetune_classification.build_classification_trainer(
        *parse_config(
            finetune_classification.SECTIONS, [*flags, "--mixup_alpha", "0.8", "--repeated_augmentation", "2"]
        )
    )
    soft = mixed.data_collator([mixed.train_dataset[number] for number in range(3)])["labels"]
    hard = batch["labels"].repeat(2, 1)
    share = soft[0, 0]  # the first clip is mixed with the last one, which shows neither blue nor cold
    torch.testing.assert_close(soft, share * hard + (1 - share) * hard.roll(1, 0))
    assert 0 < share < 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_weighting": "balanced"}, "class_weighting=balanced"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"metric_for_best_model": "eval_top1_accuracy"}, "map, micro_f1, macro_f1"),
    ],
)
def test_what_several_labels_give_no_meaning_to_is_refused(videos, start, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        finetune_classification.main(build_flags(start, tmp_path / "run", **tag(videos, tmp_path), **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[1, 0, 1], [0, 0, 1], [1, 1, 1]], r"row 0: its label \[1, 0, 1\] names a class twice.*not a 0 or 1"),
        ([[True, False], [False, False], [True, True]], r"row 0: its label is \[True, False\]"),
        ([0.5, 1.0, 2.0], "row 0: its label is 0.5"),
        ([0, None, 1], "row 1: its label is None"),
        ([0, -1, 1], "row 1: its label is -1"),
        ([0, 0, 0], "all videos are of one class, 'LABEL_0'"),
    ],
)
def test_labels_of_other_kinds_are_refused_by_row(videos, start, tmp_path, labels, message):
    """One-hot vectors, scores, gaps and secret labels: numbers that would pass for classes."""
    rows = {"video": [path for path, _ in videos["test"]], "label": labels}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "data")
    data = {"train_data": tmp_path / "data", "validation_data": tmp_path / "data"}
    with pytest.raises(ValueError, match=message):
        finetune_classification.main(build_flags(start, tmp_path / "run", **data))
    assert not (tmp_path / "run").exists()


def test_a_wrong_name_of_the_best_figure_ends_before_the_first_step(videos, start, tmp_path):
    data = save_splits(tmp_path / "data", videos)
    flags = build_flags(
        start, tmp_path / "run", train_data=data, validation_data=data, metric_for_best_model="eval_accuracy"
    )
    with pytest.raises(ValueError, match="top1_accuracy, mean_class_accuracy, macro_f1"):
        finetune_classification.main(flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["mean_class_accuracy", "eval_macro_f1"])
def test_other_figures_choose_the_best_checkpoint(videos, start, tmp_path, name):
    data = save_splits(tmp_path / "data", videos)
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    metrics = finetune_classification.main(
        build_flags(
            start,
            tmp_path / "run",
            train_data=data,
            validation_data=data,
            load_best_model_at_end=True,
            metric_for_best_model=name,
            **steps,
        )
    )
    state = read(tmp_path / "run", "trainer_state.json")
    assert state["best_metric"] == pytest.approx(metrics[f"eval_{name.removeprefix('eval_')}"])


def test_a_regression_head_is_refused_by_name(videos, tmp_path):
    model = save_classifier(tmp_path / "model", problem_type="regression")
    with pytest.raises(ValueError, match="regression"):
        VideoClassifier(model)
    result = CliRunner().invoke(app, ["classify", videos["test"][0][0], "--model", str(model)])
    assert result.exit_code == 2 and "regression" in result.stderr
    data = save_splits(tmp_path / "data", videos)
    with pytest.raises(ValueError, match="regression"):
        evaluate_classification.main(build_test_flags(model, data, tmp_path / "test"))


def test_a_model_of_several_labels_takes_data_of_one(videos, tmp_path):
    model = save_classifier(tmp_path / "model", problem_type="multi_label_classification")
    found = evaluate_classification.main(
        build_test_flags(model, save_splits(tmp_path / "data", videos), tmp_path / "test")
    )
    scores = [row["labels"] for row in read(tmp_path / "test", PREDICTIONS_FILE)]
    assert scores == [["blue"], ["green"], ["red"]] and 0 < found["map"] <= 1


def test_a_start_of_several_labels_is_trained_on_single_ones_with_a_softmax(videos, tmp_path):
    start = save_classifier(tmp_path / "start", problem_type="multi_label_classification")
    data = save_splits(tmp_path / "data", videos)
    finetune_classification.main(build_flags(start, tmp_path / "run", train_data=data, validation_split="validation"))
    assert AutoConfig.from_pretrained(tmp_path / "run").problem_type != "multi_label_classification"
    probabilities = [scored.probability for scored in VideoClassifier(tmp_path / "run").classify(videos["test"][0][0])]
    assert np.sum(probabilities) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("problem_type", [None, "multi_label_classification"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_classifier_that_gives_nan_classifies_nothing(videos, tmp_path, value, problem_type):
    """Neither a test, nor a training run's, nor the object, nor the command gives a figure that looks right."""
    model = save_classifier(tmp_path / "model", problem_type=problem_type)
    tensors = load_file(model / "model.safetensors")
    tensors["classifier.bias"][1] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    data, video = save_splits(tmp_path / "data", videos), videos["test"][0][0]
    with pytest.raises(
        ValueError, match=r"model: what it computes for 3 of 3 videos is NaN or infinite \(.*test_0.mp4"
    ):
        evaluate_classification.main(build_test_flags(model, data, tmp_path / "test"))
    assert not (tmp_path / "test").exists()
    with pytest.raises(ValueError, match="is NaN or infinite"):
        VideoClassifier(model).classify(video)
    result = CliRunner().invoke(app, ["classify", video, "--model", str(model), "--num-workers", "0"])
    assert result.exit_code == 1 and "not finite" in result.stdout
    if problem_type is None and np.isnan(value):
        flags = build_flags(model, tmp_path / "run", train_data=data, validation_split="test")
        with pytest.raises((ValueError, RuntimeError), match="(?i)nan|finite"):
            finetune_classification.main(flags)
        assert not (tmp_path / "run" / "model.safetensors").exists()
