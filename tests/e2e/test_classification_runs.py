"""Whole runs of classification: overfitted, resumed, averaged, probed, tested in two processes."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForVideoClassification

from tests.hub.server import TOKEN
from umt_hf import UMTVideoConfig, UMTVideoForVideoClassification, UMTVideoProcessor
from umt_hf.evaluation import classification as evaluate_classification
from umt_hf.finetuning import classification as finetune_classification
from umt_hf.modeling.modeling_umt_video import UMTVideoForPreTraining
from umt_hf.moving_shapes.render import sample_clip, write_moving_shapes
from umt_hf.runs.config import parse_config

from .conftest import build_pipeline, launch

PUBLISHED = [
    *("--rand_augment", "rand-m7-n4-mstd0.5-inc1", "--erasing_probability", "0.25", "--mixup_alpha", "0.8"),
    *("--cutmix_alpha", "1.0", "--repeated_augmentation", "2", "--label_smoothing_factor", "0.1"),
    *("--scale_learning_rate", "true", "--crop_scale", "0.08", "1.0"),
]


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """16 red and blue shapes, with a CSV of each split."""
    folder = tmp_path_factory.mktemp("videos")
    write_moving_shapes(folder, num_train_clips=110, num_validation_clips=70, num_test_clips=1)
    for split, count in (("train", 8), ("validation", 4)):
        lines = (folder / f"{split}.csv").read_text().splitlines()
        by_color = {
            color: [line for i, line in enumerate(lines) if sample_clip(0, split, i).color == color][:count]
            for color in ("blue", "red")
        }
        rows = [f"{line.rsplit(',', 1)[0]},{label}" for label, found in enumerate(by_color.values()) for line in found]
        assert len(rows) == 2 * count
        (folder / f"few_{split}.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = UMTVideoConfig(
        image_size=64,
        num_frames=4,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=96,
        num_aligned_layers=1,
        position_embedding_frames=4,
        position_embedding_image_size=64,
    )
    folder = tmp_path_factory.mktemp("student")
    UMTVideoForPreTraining(config).save_pretrained(folder)
    return folder


@pytest.fixture
def fine_tune(videos, student, tmp_path):
    def run(name: str, *flags: str) -> dict[str, float]:
        return finetune_classification.main(
            [
                *("--model_name_or_path", str(student), "--output_dir", str(tmp_path / name)),
                *("--train_data", str(videos / "few_train.csv")),
                *("--validation_data", str(videos / "few_validation.csv")),
                *("--per_device_train_batch_size", "8", "--learning_rate", "3e-3", "--report_to", "none"),
                *("--use_cpu", "true", "--disable_tqdm", "true", "--seed", "1", *flags),
            ]
        )

    return run


def test_overfits_16_clips(fine_tune, videos, tmp_path):
    flags = ("--validation_data", str(videos / "few_train.csv"), "--max_steps", "80", "--drop_path_rate", "0")
    metrics = fine_tune("run", *flags, "--save_strategy", "no")
    assert metrics["eval_top1_accuracy"] == 1.0
    recipe = ["--config", str(tmp_path / "run" / "run.yaml")]
    task, _, _, _, training = parse_config(finetune_classification.SECTIONS, recipe)
    assert task.drop_path_rate == 0 and training.max_steps == 80 and training.learning_rate == 3e-3


def test_a_resumed_run_equals_an_uninterrupted_one(fine_tune, tmp_path):
    """In the middle of the second epoch, with all of the published augmentation and averaged weights."""
    flags = (
        *PUBLISHED,
        "--num_train_epochs",
        "3",
        "--save_steps",
        "3",
        "--ema_decay",
        "0.5",
        "--warmup_epochs",
        "0.5",
    )
    fine_tune("whole", *flags)
    with pytest.raises(FileExistsError, match=r"holds checkpoints of an earlier run \(checkpoint-6\)"):
        fine_tune("whole", *flags)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    fine_tune("resumed", *flags, "--resume_from_checkpoint", "auto")
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=0, msg=name)
    # What is saved is the average, not the last weights.
    last = load_file(tmp_path / "whole" / "checkpoint-6" / "model.safetensors")
    average = torch.load(tmp_path / "whole" / "checkpoint-6" / "averaged_weights.pt", weights_only=True)
    assert not torch.equal(whole["classifier.weight"], last["classifier.weight"])
    assert torch.equal(whole["classifier.weight"], average["module.classifier.weight"])


@pytest.mark.parametrize("mode", ["lora", "dora"])
def test_saved_adapters_give_the_merged_model(fine_tune, student, tmp_path, mode):
    flags = ("--lora_rank", "4", "--max_steps", "4", "--learning_rate", "0.03", "--warmup_epochs", "0")
    fine_tune("run", "--mode", mode, *flags, "--save_strategy", "no")
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
    fine_tune, videos, student, tmp_path, monkeypatch
):
    trainers, run = [], finetune_classification.fine_tune
    monkeypatch.setattr(
        finetune_classification, "fine_tune", lambda trainer, *rest: trainers.append(trainer) or run(trainer, *rest)
    )
    flags = ("--max_steps", "6", "--save_strategy", "no", "--learning_rate", "0.03", "--warmup_epochs", "0")
    metrics = fine_tune("run", "--mode", "attentive_probe", *flags)
    model, info = AutoModelForVideoClassification.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.config.pooling_type == "attentive"
    before = UMTVideoForPreTraining.from_pretrained(student).vision_model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in model.vision_model.state_dict().items())
    video = next((videos / "videos" / "validation").iterdir())
    views = UMTVideoProcessor.from_pretrained(tmp_path / "run")(video, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = trainers[0].model.eval()(views).logits
        torch.testing.assert_close(model(views).logits, expected)
        # The mean of the tokens would give another answer.
        outputs = model.vision_model(views)
        assert (model.classifier(model.fc_norm(outputs.pooler_output)) - expected).abs().max() > 1e-2
    answers = build_pipeline(tmp_path / "run")(str(video))
    scores = {entry["label"]: entry["score"] for entry in answers}
    torch.testing.assert_close(
        torch.tensor([scores["LABEL_0"], scores["LABEL_1"]]), expected.softmax(-1)[0], atol=1e-5, rtol=0
    )
    found = evaluate_classification.main(
        [
            *("--model_name_or_path", str(tmp_path / "run"), "--data", str(videos / "few_validation.csv")),
            *("--num_clips", "1", "--num_crops", "1", "--output_dir", str(tmp_path / "test")),
            *("--dataloader_num_workers", "0"),
        ]
    )
    assert found["top1_accuracy"] == pytest.approx(metrics["eval_top1_accuracy"])


def test_two_processes_test_as_one(fine_tune, videos, tmp_path):
    """9 videos, one of them unreadable, in batches of one video: the last is nobody's twice."""
    fine_tune("run", "--max_steps", "4", "--save_strategy", "no")
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    lines = (videos / "few_validation.csv").read_text().splitlines()
    lines.insert(3, f"{tmp_path / 'bad.mp4'},1")
    (tmp_path / "test.csv").write_text("\n".join(lines) + "\n")
    flags = [
        *("--model_name_or_path", str(tmp_path / "run"), "--data", str(tmp_path / "test.csv")),
        *("--data_root", str(videos), "--num_clips", "2", "--num_crops", "3", "--per_device_eval_batch_size", "6"),
        *("--dataloader_num_workers", "0", "--max_skipped_ratio", "0.2"),
    ]
    metrics = evaluate_classification.main([*flags, "--output_dir", str(tmp_path / "one")])
    module = "umt_hf.evaluation.classification"
    done = launch([*flags, "--output_dir", str(tmp_path / "two")], 2, module, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
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


def test_test_views_after_training(fine_tune, videos, tmp_path):
    flags = ("--test_data", str(videos / "few_validation.csv"), "--num_clips", "2", "--num_crops", "1")
    metrics = fine_tune("run", "--max_steps", "2", "--save_strategy", "no", *flags)
    assert json.loads((tmp_path / "run" / "test_results.json").read_text())["test_top1_accuracy"] == pytest.approx(
        metrics["test_top1_accuracy"]
    )


def test_merged_adapters_reach_a_hub_that_failed(hub, fine_tune, tmp_path, caplog):
    """Neither the start, nor a save, nor the end of a run waits for the Hub or fails with it."""
    flags = ("--mode", "lora", "--num_train_epochs", "2", "--save_steps", "1", "--push_to_hub", "true")
    flags = (*flags, "--hub_model_id", "me/classifier", "--hub_token", TOKEN)
    hub.down()
    fine_tune("run", *flags)
    assert f"umt-hf push {tmp_path / 'run'} me/classifier" in caplog.text
    hub.heal()
    fine_tune("run", *flags, "--resume_from_checkpoint", "auto")
    files = set(hub.list_files("me/classifier"))
    assert {"run.yaml", "versions.json", "video_preprocessor_config.json", "eval_results.json"} <= files
    assert not any("checkpoint" in file or file.endswith(".bin") for file in files)
    assert "push_to_hub: true" in hub.read_file("me/classifier", "run.yaml").decode()
    pulled = AutoModelForVideoClassification.from_pretrained("me/classifier").state_dict()
    for name, tensor in load_file(tmp_path / "run" / "model.safetensors").items():
        assert torch.equal(pulled[name], tensor), name
    assert not any(TOKEN.encode() in path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())


def test_whole_checkpoints_go_up_with_what_callbacks_add(hub, fine_tune):
    flags = ("--push_to_hub", "true", "--hub_model_id", "me/run", "--hub_strategy", "checkpoint")
    fine_tune("run", *flags, "--max_steps", "2", "--save_steps", "1", "--ema_decay", "0.5")
    found = {path.split("/")[1] for path in hub.list_files("me/run") if path.startswith("last-checkpoint/")}
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json", "averaged_weights.pt"} <= found
    assert "training_args.bin" not in found
