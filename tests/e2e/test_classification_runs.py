"""Whole runs of classification: overfitted, resumed, averaged, probed, tested in two processes."""

import hashlib
import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForVideoClassification

from tests.e2e.runs import FINE_TUNING, assert_complete, to_flags
from tests.hub.server import TOKEN
from tests.processes import run_ranks
from umt_hf import UMTVideoForVideoClassification, UMTVideoProcessor
from umt_hf.evaluation import classification as evaluate_classification
from umt_hf.finetuning import classification as finetune_classification
from umt_hf.modeling.modeling_umt_video import UMTVideoForPreTraining
from umt_hf.runs.config import parse_config

from .conftest import PIPELINE_TAKES_VIDEOS, build_pipeline

PUBLISHED = {
    "rand_augment": "rand-m7-n4-mstd0.5-inc1",
    "erasing_probability": 0.25,
    "mixup_alpha": 0.8,
    "cutmix_alpha": 1.0,
    "repeated_augmentation": 2,
    "label_smoothing_factor": 0.1,
    "scale_learning_rate": True,
    "crop_scale": [0.08, 1.0],
}


@pytest.fixture
def fine_tune(colors, student, tmp_path):
    """A run on 16 clips by the name of its folder; keyword arguments change it."""

    def run(name: str, **changes) -> dict[str, float]:
        fields = {
            **FINE_TUNING,
            "model_name_or_path": student,
            "train_data": colors / "few_train.csv",
            "validation_data": colors / "few_validation.csv",
            "output_dir": tmp_path / name,
            "per_device_train_batch_size": 8,
            "learning_rate": 3e-3,
            "seed": 1,
        }
        return finetune_classification.main(to_flags(**fields | changes))

    return run


def test_overfits_16_clips(fine_tune, colors, tmp_path):
    metrics = fine_tune("run", validation_data=colors / "few_train.csv", max_steps=80, drop_path_rate=0)
    assert metrics["eval_top1_accuracy"] == 1.0
    recipe = ["--config", str(tmp_path / "run" / "run.yaml")]
    task, _, _, _, training = parse_config(finetune_classification.SECTIONS, recipe)
    assert task.drop_path_rate == 0 and training.max_steps == 80 and training.learning_rate == 3e-3


def test_a_resumed_run_equals_an_uninterrupted_one(fine_tune, tmp_path):
    """In the middle of the second epoch, with all of the published augmentation and averaged weights."""
    changes = PUBLISHED | {"ema_decay": 0.5, "warmup_epochs": 0.5, "num_train_epochs": 3}
    changes |= {"save_strategy": "steps", "save_steps": 3}
    fine_tune("whole", **changes)
    with pytest.raises(FileExistsError, match=r"holds checkpoints of an earlier run \(checkpoint-6\)"):
        fine_tune("whole", **changes)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    fine_tune("resumed", **changes, resume_from_checkpoint="auto")
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=0, msg=name)
    # What is saved is the average, not the last weights.
    last = load_file(tmp_path / "whole" / "checkpoint-6" / "model.safetensors")
    average = torch.load(tmp_path / "whole" / "checkpoint-6" / "averaged_weights.pt", weights_only=True)
    assert not torch.equal(whole["classifier.weight"], last["classifier.weight"])
    assert torch.equal(whole["classifier.weight"], average["module.classifier.weight"])


def test_the_seed_fixes_a_run_with_its_fresh_head(fine_tune, tmp_path):
    """Whatever was drawn in the process before."""
    for name, state in (("one", 1), ("two", 2), ("three", 3)):
        torch.manual_seed(state)
        fine_tune(name, max_steps=2, seed=7 if name != "three" else 8)
    one, two, three = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two", "three"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert not torch.equal(one["classifier.weight"], three["classifier.weight"])


@pytest.mark.parametrize("mode", ["lora", "dora"])
def test_saved_adapters_give_the_merged_model(fine_tune, student, tmp_path, mode):
    fine_tune("run", mode=mode, lora_rank=4, max_steps=4, learning_rate=0.03, warmup_epochs=0)
    merged = UMTVideoForVideoClassification.from_pretrained(tmp_path / "run").eval()
    base = UMTVideoForVideoClassification.from_pretrained(student, num_labels=2)
    adapted = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    clips = torch.randn(2, 4, 3, 64, 64)
    with torch.no_grad():
        logits = merged(clips).logits
        torch.testing.assert_close(adapted(pixel_values=clips).logits, logits, atol=1e-5, rtol=1e-4)
        start = UMTVideoForPreTraining.from_pretrained(student).vision_model
        merged.vision_model.load_state_dict(start.state_dict(), strict=False)
        assert (merged(clips).logits - logits).abs().max() > 1e-3  # the adapters have a say
    assert adapted.peft_config["default"].use_dora is (mode == "dora")
    assert merged.classifier.weight.abs().max() > 1e-4


def test_attentive_probe_trains_its_head_alone_and_is_tested_from_its_folder(
    fine_tune, colors, student, tmp_path, monkeypatch
):
    trainers, run = [], finetune_classification.fine_tune
    monkeypatch.setattr(
        finetune_classification, "fine_tune", lambda trainer, *rest: trainers.append(trainer) or run(trainer, *rest)
    )
    metrics = fine_tune("run", mode="attentive_probe", max_steps=6, learning_rate=0.03, warmup_epochs=0)
    model, info = AutoModelForVideoClassification.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.config.pooling_type == "attentive"
    before = UMTVideoForPreTraining.from_pretrained(student).vision_model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in model.vision_model.state_dict().items())
    video = next((colors / "validation" / "red").iterdir())
    views = UMTVideoProcessor.from_pretrained(tmp_path / "run")(video, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = trainers[0].model.eval()(views).logits
        torch.testing.assert_close(model(views).logits, expected)
        # The mean of the tokens would give another answer.
        outputs = model.vision_model(views)
        assert (model.classifier(model.fc_norm(outputs.pooler_output)) - expected).abs().max() > 1e-2
    answers = build_pipeline(tmp_path / "run")(str(video))
    scores = {entry["label"]: entry["score"] for entry in answers}
    assert scores.keys() == {"LABEL_0", "LABEL_1"}
    if PIPELINE_TAKES_VIDEOS:  # an old one reads other frames
        torch.testing.assert_close(
            torch.tensor([scores["LABEL_0"], scores["LABEL_1"]]), expected.softmax(-1)[0], atol=1e-5, rtol=0
        )
    found = evaluate_classification.main(
        to_flags(
            model_name_or_path=tmp_path / "run",
            data=colors / "few_validation.csv",
            num_clips=1,
            num_crops=1,
            output_dir=tmp_path / "test",
            dataloader_num_workers=0,
        )
    )
    assert found["top1_accuracy"] == pytest.approx(metrics["eval_top1_accuracy"])


def test_two_processes_test_as_one(fine_tune, colors, tmp_path):
    """9 videos, one of them unreadable, in batches of one video: the last is nobody's twice."""
    fine_tune("run", max_steps=4)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    lines = (colors / "few_validation.csv").read_text().splitlines()
    lines.insert(3, f"{tmp_path / 'bad.mp4'},1")
    (tmp_path / "test.csv").write_text("\n".join(lines) + "\n")
    fields = {
        "model_name_or_path": tmp_path / "run",
        "data": tmp_path / "test.csv",
        "data_root": colors,
        "num_clips": 2,
        "num_crops": 3,
        "per_device_eval_batch_size": 6,
        "dataloader_num_workers": 0,
        "max_skipped_ratio": 0.2,
    }
    metrics = evaluate_classification.main(to_flags(**fields, output_dir=tmp_path / "one"))
    run_ranks(evaluate_classification.main, to_flags(**fields, output_dir=tmp_path / "two"))
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two"))
    assert two["metrics"] == one["metrics"] == metrics and two["num_processes"] == 2
    assert two["class_accuracy"] == one["class_accuracy"]
    assert one["num_videos"] == 9 and metrics["unreadable_videos"] == 1 and "bad.mp4" in one["unreadable"][0]
    predictions = [json.loads((tmp_path / name / "predictions.json").read_text()) for name in ("one", "two")]
    assert predictions[0] == predictions[1] and [entry["row"] for entry in predictions[0]] == list(range(9))
    assert "error" in predictions[0][3]
    assert (tmp_path / "one" / "confusion.png").is_file()
    right = sum(entry.get("prediction") == entry["label"] for entry in predictions[0])
    assert metrics["top1_accuracy"] == pytest.approx(right / 9)
    assert (one["num_clips"], one["num_crops"], one["mixed_precision"], one["dtype"]) == (2, 3, "no", "float32")
    assert one["data_sha256"] == hashlib.sha256((tmp_path / "test.csv").read_bytes()).hexdigest()


def test_test_views_after_training(fine_tune, colors, tmp_path):
    held_out = {"test_data": colors / "few_validation.csv", "num_clips": 2, "num_crops": 1}
    metrics = fine_tune("run", max_steps=2, **held_out)
    assert json.loads((tmp_path / "run" / "test_results.json").read_text())["test_top1_accuracy"] == pytest.approx(
        metrics["test_top1_accuracy"]
    )


def test_merged_adapters_reach_a_hub_that_failed(hub, fine_tune, tmp_path, caplog):
    """Neither the start, nor a save, nor the end of a run waits for the Hub or fails with it."""
    changes = {"mode": "lora", "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1}
    changes |= {"push_to_hub": True, "hub_model_id": "me/classifier", "hub_token": TOKEN}
    hub.down()
    fine_tune("run", **changes)
    assert f"umt-hf push {tmp_path / 'run'} me/classifier" in caplog.text
    hub.heal()
    fine_tune("run", **changes, resume_from_checkpoint="auto")
    files = set(hub.list_files("me/classifier"))
    assert {"run.yaml", "versions.json", "video_preprocessor_config.json", "eval_results.json"} <= files
    assert not any("checkpoint" in file or file.endswith(".bin") for file in files)
    assert "mode: lora" in hub.read_file("me/classifier", "run.yaml").decode()
    pulled = AutoModelForVideoClassification.from_pretrained("me/classifier").state_dict()
    for name, tensor in load_file(tmp_path / "run" / "model.safetensors").items():
        assert torch.equal(pulled[name], tensor), name
    assert not any(TOKEN.encode() in path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())


def test_whole_checkpoints_go_up_with_what_callbacks_add(hub, fine_tune):
    changes = {"push_to_hub": True, "hub_model_id": "me/run", "hub_strategy": "checkpoint"}
    fine_tune("run", **changes, max_steps=2, save_strategy="steps", save_steps=1, ema_decay=0.5)
    found = {path.split("/")[1] for path in hub.list_files("me/run") if path.startswith("last-checkpoint/")}
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json", "averaged_weights.pt"} <= found
    assert "training_args.bin" not in found


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.heavy),
        pytest.param({"ema_decay": 0.5}, marks=pytest.mark.heavy),
        {"mode": "lora", "lora_rank": 2},
    ],
)
def test_compiled_runs_export_the_models_own_weights(fine_tune, tmp_path, changes):
    """Final folder, checkpoints, averaged weights, merged adapters."""
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    common = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "drop_path_rate": 0.0, **changes}
    fine_tune("compiled", **compiled, **common)
    fine_tune("plain", **common)
    folders = [tmp_path / "compiled"]
    if "mode" not in changes:  # those of adapters hold adapters alone
        folders += [tmp_path / "compiled" / f"checkpoint-{step}" for step in (1, 2)]
    for folder in folders:
        assert_complete(folder, UMTVideoForVideoClassification)
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("compiled", "plain"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=1e-3, msg=name)


def test_compiled_runs_of_two_processes_export_the_models_own_weights(colors, student, tmp_path):
    fields = FINE_TUNING | {
        "model_name_or_path": student,
        "train_data": colors / "few_train.csv",
        "validation_data": colors / "few_validation.csv",
        "output_dir": tmp_path / "run",
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "torch_compile": True,
        "torch_compile_backend": "aot_eager",
    }
    run_ranks(finetune_classification.main, to_flags(**fields))
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-1"):
        assert_complete(folder, UMTVideoForVideoClassification)
