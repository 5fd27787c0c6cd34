"""Recipes, batches, optimizer, schedule and merging of views of classification."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from umt_hf import UMTVideoConfig, UMTVideoForVideoClassification, UMTVideoProcessor
from umt_hf.evaluation.classification import ClassifiedVideos, classify_videos
from umt_hf.evaluation.metrics.accuracy import TopKAccuracy
from umt_hf.finetuning import classification as script
from umt_hf.inference.classification import merge_views
from umt_hf.moving_shapes.render import write_video
from umt_hf.plots import plot_confusion_matrix
from umt_hf.processing.classification_transforms import ClassificationTransform, ClipMix
from umt_hf.processing.sampling import sample_frame_indices
from umt_hf.runs.config import list_recipes, parse_config
from umt_hf.training.clips import build_generator
from umt_hf.training.optimization import compute_learning_rate, scale_learning_rate
from umt_hf.training.trainer import MIN_SKIPS_TO_STOP

FIXTURES = Path(__file__).parents[2] / "fixtures" / "single_modality"
ROWS = json.loads((FIXTURES / "classification_recipes.json").read_text())["rows"]


def tiny_config(**changes) -> UMTVideoConfig:
    fields = {"image_size": 32, "num_frames": 2, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    fields |= {"intermediate_size": 32, "num_labels": 3, "num_aligned_layers": 1, **changes}
    return UMTVideoConfig(**fields)


def test_every_published_run_has_a_recipe():
    assert {name for name in list_recipes() if name.startswith("classification")} == ROWS.keys()


@pytest.mark.parametrize("recipe", ROWS)
def test_recipes_equal_the_published_settings(recipe):
    row = ROWS[recipe]
    task, data, augmentation, views, training = parse_config(script.SECTIONS, ["--config", recipe, "--bf16", "false"])
    size = row["model"]
    assert task.model_name_or_path.startswith(f"umt-vit-{size}") and f"umt-vit-{size}" in training.output_dir
    assert (data.num_classes, task.num_frames, task.image_size) == (
        row["num_classes"],
        row["frames"],
        row["input_size"],
    )
    assert (views.num_clips, views.num_crops) == (row["test_clips"], row["test_crops"])
    assert data.csv_separator == row["csv_separator"] and task.drop_path_rate == row["drop_path"]
    assert data.sampling_strategy == ("segments" if "ssv2" in recipe else "uniform")
    assert task.mode == "full" and training.layer_decay == row["layer_decay"]
    assert training.per_device_train_batch_size == row["batch_per_gpu"]
    assert augmentation.repeated_augmentation == row["num_sample"]
    assert (training.num_train_epochs, training.warmup_epochs) == (row["epochs"], row["warmup_epochs"])
    assert (training.learning_rate, training.weight_decay) == (row["lr"], row["weight_decay"])
    assert (training.min_learning_rate, training.warmup_start_learning_rate) == (row["min_lr"], row["warmup_lr"])
    assert [training.adam_beta1, training.adam_beta2] == row["betas"] and training.max_grad_norm == 0
    clips = row["batch_per_gpu"] * row["gpus"]
    assert scale_learning_rate(row["lr"], clips, row["num_sample"]) == pytest.approx(row["effective_lr"])
    assert training.scale_learning_rate and training.label_smoothing_factor == row["label_smoothing"]
    assert augmentation.rand_augment == row["rand_augment"]
    assert augmentation.erasing_probability == row["random_erasing"]["prob"]
    assert augmentation.crop_scale == row["random_resized_crop"]["scale"]
    assert augmentation.crop_ratio == row["random_resized_crop"]["ratio"]
    assert (augmentation.mixup_alpha, augmentation.cutmix_alpha) == (row["mixup"], row["cutmix"])
    assert augmentation.horizontal_flip_probability == row["horizontal_flip"]
    assert training.load_best_model_at_end and training.metric_for_best_model == "eval_top1_accuracy"


def test_views_are_merged_by_their_mean_probability():
    """Two videos of two views; by mean logits the first would be class 1."""
    probabilities = torch.tensor([[0.90, 0.10], [0.15, 0.85], [0.2, 0.8], [0.4, 0.6]])
    expected = torch.tensor([[0.525, 0.475], [0.3, 0.7]])
    torch.testing.assert_close(merge_views(probabilities.log() + 5, 2), expected)
    sharp = torch.tensor([[0.0, 12.0], [1.5, 0.0], [1.5, 0.0]])
    assert sharp.mean(0).argmax() == 1
    assert merge_views(sharp, 3)[0].argmax() == 0


def test_test_views_of_something_something():
    """Clip 0 starts with each part, clip 1 in its middle."""
    clips = [sample_frame_indices(48, 8, "segments", 2, clip) for clip in range(2)]
    assert clips == [[0, 6, 12, 18, 24, 30, 36, 42], [3, 9, 15, 21, 27, 33, 39, 45]]


def test_unreadable_videos_are_wrong_and_listed():
    scores = np.array([[0.9, 0.1], [0.2, 0.8], [0.0, 0.0], [0.6, 0.4]], dtype=np.float32)
    found = ClassifiedVideos(scores, np.array([0, 1, 0, 1]), {2: "bad.mp4: cut short"})
    assert found.predictions.tolist() == [0, 1, -1, 0]
    assert found.compute_metrics() == {
        "top1_accuracy": pytest.approx(0.5),
        "mean_class_accuracy": pytest.approx(0.5),
        "macro_f1": pytest.approx((1 / 2 + 2 / 3) / 2),  # class 1: said once, shown twice
        "unreadable_videos": 1.0,
        "top1_accuracy_of_readable": pytest.approx(2 / 3),
    }
    assert found.compute_confusion().tolist() == [[1, 0], [1, 1]]
    with pytest.raises(ValueError, match="Not one.*cut short"):
        ClassifiedVideos(scores[2:3], np.array([0]), {0: "bad.mp4: cut short"}).compute_metrics()


def test_accuracy_of_each_class():
    """Rows: what is seen, columns: what is said. No video shows class 2, said once; the last one is unreadable."""
    said, labels = [0, 0, 0, 2, 1, 0, 1], [0, 0, 0, 0, 1, 1, 3]
    found = ClassifiedVideos(np.eye(4, dtype=np.float32)[said], np.array(labels), {6: "bad.mp4: cut short"})
    assert found.compute_class_accuracies() == [0.75, 0.5, None, 0.0]
    assert found.compute_confusion().tolist() == [[3, 0, 1, 0], [1, 1, 0, 0], [0] * 4, [0] * 4]


def test_top_5_needs_more_than_5_classes():
    scores = [[6, 5, 4, 3, 2, 1], [6, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]]
    found = TopKAccuracy().compute(predictions=scores, references=[0, 5, 1, 4])
    assert found == {"top1_accuracy": 0.25, "top5_accuracy": 0.75}
    assert TopKAccuracy().compute(predictions=[row[:5] for row in scores], references=[0, 4, 1, 4]) == {
        "top1_accuracy": 0.5
    }


def test_confusion_picture(tmp_path, monkeypatch):
    """Shares of a row, of a class without videos too, with names on both axes, in the file that is written."""
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *rest, **options: drawn.append(figure) or save(figure, *rest, **options)
    )
    plot_confusion_matrix(
        np.array([[3, 1, 0], [0, 2, 0], [0, 0, 0]]), ["run", "jump", "sit"], tmp_path / "picture.png"
    )
    (axis, _) = drawn[0].axes
    np.testing.assert_allclose(axis.images[0].get_array(), [[0.75, 0.25, 0], [0, 1, 0], [0, 0, 0]])
    assert axis.images[0].get_clim() == (0, 1)
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted class", "true class")
    for labels in (axis.get_xticklabels(), axis.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["run", "jump", "sit"]
    with Image.open(tmp_path / "picture.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 20


def test_equal_names_in_two_folders_are_two_videos(tmp_path):
    """Views of a video are known by its row: the published code merges videos of one base name."""
    videos = []
    for number, level in enumerate((0, 255)):
        (tmp_path / str(number)).mkdir()
        videos.append(str(tmp_path / str(number) / "clip.mp4"))
        write_video(videos[-1], np.full((12, 32, 48, 3), level, dtype=np.uint8))
    torch.manual_seed(0)
    config = tiny_config()
    model = UMTVideoForVideoClassification(config).eval()
    nn.init.normal_(model.classifier.weight)
    processor = UMTVideoProcessor.from_model_config(config)
    accelerator = Accelerator(cpu=True)
    options = {"num_clips": 2, "num_crops": 3}
    found = classify_videos(model, processor, videos, [0, 1], accelerator, batch_size=12, **options)
    apart = classify_videos(model, processor, videos, [0, 1], accelerator, batch_size=4, **options)
    np.testing.assert_allclose(found.scores, apart.scores, atol=1e-5)
    views = processor(videos[1], num_clips=2, num_crops=3, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(views).logits.softmax(-1).mean(0)
    np.testing.assert_allclose(found.scores[1], expected, atol=1e-5)
    assert np.abs(found.scores[0] - found.scores[1]).max() > 1e-3

    (tmp_path / "bad.mp4").write_bytes(b"no video")
    videos.append(str(tmp_path / "bad.mp4"))
    with pytest.raises(ValueError, match="1 of 3.*bad.mp4"):
        classify_videos(model, processor, videos, [0, 1, 2], accelerator, batch_size=12)
    found = classify_videos(model, processor, videos, [0, 1, 2], accelerator, batch_size=12, max_skipped_ratio=0.5)
    assert list(found.unreadable) == [2] and "bad.mp4" in found.unreadable[2]


def build_clips(tmp_path, num_videos: int = 4, **changes) -> script.LabeledClips:
    rows = []
    for number in range(num_videos):
        video = str(tmp_path / f"{number}.mp4")
        write_video(video, np.random.default_rng(number).integers(0, 255, (12, 32, 48, 3), dtype=np.uint8))
        rows.append({"video": video, "label": number})
    transform = ClassificationTransform(32, rand_augment="rand-m7-n4-mstd0.5-inc1", erasing_probability=0.5)
    processor = UMTVideoProcessor(num_frames=2)
    return script.LabeledClips(Dataset.from_list(rows), processor, transform, seed=3, **changes)


def test_clips_depend_on_seed_epoch_and_row_alone(tmp_path):
    clips = build_clips(tmp_path, repeated_augmentation=2)

    def load(workers: int) -> list[dict]:
        collator = script.LabelledClipCollator(ClipMix(4, 0.8, 1.0))
        return list(torch.utils.data.DataLoader(clips, batch_size=2, num_workers=workers, collate_fn=collator))

    first = load(0)
    for alone, spread in zip(first, load(2), strict=True):
        torch.testing.assert_close(alone["pixel_values"], spread["pixel_values"], rtol=0, atol=0)
        torch.testing.assert_close(alone["labels"], spread["labels"], rtol=0, atol=0)
        assert alone["pixel_values"].shape == (4, 2, 3, 32, 32) and alone["num_videos"] == 2
    assert not torch.equal(clips[0]["pixel_values"][0], clips[0]["pixel_values"][1])
    clips.epoch = 1
    assert not torch.equal(load(0)[0]["pixel_values"], first[0]["pixel_values"])
    clips.epoch, clips.seed = 0, 4
    other = load(0)[0]
    assert not torch.equal(other["pixel_values"], first[0]["pixel_values"])
    assert not torch.equal(other["labels"], first[0]["labels"])
    clips.seed = 3
    torch.testing.assert_close(load(0)[0]["pixel_values"], first[0]["pixel_values"], rtol=0, atol=0)


def test_copies_of_a_video_do_not_lie_next_to_each_other(tmp_path):
    clips = build_clips(tmp_path, num_videos=3, repeated_augmentation=2)
    batch = script.LabelledClipCollator()([clips[index] for index in range(3)])
    assert batch["labels"].tolist() == [0, 1, 2, 0, 1, 2]
    assert torch.equal(batch["pixel_values"][4], clips[1]["pixel_values"][1])


def test_an_unreadable_video_is_replaced_with_its_label(tmp_path):
    clips = build_clips(tmp_path)
    Path(clips.table[2]["video"]).write_bytes(b"no video")
    sample = clips[2]
    assert sample["row"]["label"] != 2 and len(sample["failures"]) >= 1 and "2.mp4" in sample["failures"][0]
    for number in range(4):
        Path(clips.table[number]["video"]).write_bytes(b"no video")
    with pytest.raises(RuntimeError, match="could not be read"):
        clips[0]


def build_trainer(tmp_path, model=None, clips=None, layer_decay=0.75, repeats=2, **changes):
    fields = {"per_device_train_batch_size": 4, "num_train_epochs": 5, "learning_rate": 1e-3, **changes}
    training = script.ClassificationTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", **fields
    )
    return script.ClassificationTrainer(
        model=UMTVideoForVideoClassification(tiny_config()) if model is None else model,
        args=training,
        train_dataset=list(range(40)) if clips is None else clips,
        evaluations={},
        max_skipped_ratio=0.1,
        layer_decay=layer_decay,
        repeated_augmentation=repeats,
    )


def test_rates_of_layers_and_steps(tmp_path):
    """10 batches an epoch; each layer has its share of the scaled published schedule."""
    trainer = build_trainer(tmp_path, warmup_epochs=1.0, scale_learning_rate=True, weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    scheduler = trainer.create_scheduler(50)
    scale = 4 * 2 / 256
    names = [group["name"] for group in optimizer.param_groups]
    assert {f"layer_{i}_{kind}" for i in range(4) for kind in ("decay", "no_decay")} == set(names)
    shares = {"layer_0_decay": 0.75**3, "layer_1_no_decay": 0.75**2, "layer_2_decay": 0.75, "layer_3_decay": 1.0}
    for step in range(50):
        expected = compute_learning_rate(
            step, peak=1e-3 * scale, minimum=1e-6 * scale, total_steps=50, warmup_steps=10, warmup_start=1e-6 * scale
        )
        rates = dict(zip(names, scheduler.get_last_lr(), strict=True))
        for name, share in shares.items():
            assert rates[name] == pytest.approx(expected * share, rel=1e-9)
        optimizer.step()
        scheduler.step()
    decays = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decays["layer_1_decay"] == 0.1 and decays["layer_1_no_decay"] == 0


def test_loss_of_soft_targets_smoothing_and_class_weights(tmp_path):
    trainer = build_trainer(tmp_path, label_smoothing_factor=0.1)
    clips = torch.randn(4, 2, 3, 32, 32, generator=build_generator(0))
    model = trainer.model.eval()
    logs = model(clips).logits.log_softmax(-1)
    targets = torch.tensor([[0.3, 0.7, 0], [1, 0, 0], [0, 0.5, 0.5], [0, 0, 1.0]])
    batch = {"pixel_values": clips, "labels": targets, "num_videos": 2, "failures": []}
    expected = -((0.9 * targets + 0.1 / 3) * logs).sum(1).mean()
    torch.testing.assert_close(trainer.compute_loss(model, batch), expected)
    assert trainer.videos.videos == 2

    trainer = build_trainer(tmp_path)
    trainer.class_weights = script.compute_class_weights([0, 0, 0, 1, 2, 2], 3)
    torch.testing.assert_close(trainer.class_weights, torch.tensor([2 / 3, 2.0, 1.0]))
    labels = torch.tensor([0, 1, 1, 2])
    weights = trainer.class_weights[labels]
    expected = -(weights * logs[range(4), labels]).sum() / weights.sum()
    torch.testing.assert_close(trainer.compute_loss(model, {**batch, "labels": labels}), expected)
    with pytest.raises(ValueError, match=r"\[1\] have no training videos"):
        script.compute_class_weights([0, 2], 3)

    failing = {**batch, "labels": labels, "failures": ["bad.mp4: cut short"] * 3}
    trainer.compute_loss(model, failing)
    assert (trainer.videos.videos, trainer.videos.skipped_videos) == (4, 3)
    with pytest.raises(RuntimeError, match="could not be read.*bad.mp4: cut short"):
        for _ in range(MIN_SKIPS_TO_STOP):
            trainer.compute_loss(model, failing)


def test_averaged_weights(tmp_path):
    """1, then halfway to 2, then halfway to 3; tests see the average, and the training goes on with its own."""
    trainer = build_trainer(tmp_path, ema_decay=0.5)
    (average,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, script._AveragingCallback))
    trainer.resumed_from = None
    average.on_train_begin(trainer.args, trainer.state, trainer.control)
    for value in (1.0, 2.0, 3.0):
        nn.init.constant_(trainer.model.classifier.bias, value)
        average.on_step_end(trainer.args, trainer.state, trainer.control)
    trained = trainer.model
    trainer.evaluations = {"eval": lambda model, accelerator: {"bias": model.classifier.bias[0].item()}}
    assert trainer.evaluate()["eval_bias"] == 2.25
    assert trainer.model is trained and trained.classifier.bias[0] == 3


def test_flags_reach_the_trainer(tmp_path):
    """Class weights, layer decay, mixing, repeats and erasing of a command line."""
    rows = build_clips(tmp_path, num_videos=3).table
    for split, labels in (("train", (0, 0, 1)), ("validation", (0, 1, 1))):
        lines = [f"{row['video']},{label}" for row, label in zip(rows, labels, strict=True)]
        (tmp_path / f"{split}.csv").write_text("\n".join(lines) + "\n")
    UMTVideoForVideoClassification(tiny_config()).save_pretrained(tmp_path / "start")

    def build(*flags: str) -> script.ClassificationTrainer:
        command = ["--model_name_or_path", str(tmp_path / "start"), "--output_dir", str(tmp_path / "run")]
        for split in ("train", "validation"):
            command += [f"--{split}_data", str(tmp_path / f"{split}.csv")]
        command += ["--use_cpu", "true", "--report_to", "none", *flags]
        return script.build_classification_trainer(*parse_config(script.SECTIONS, command))

    flags = ("--class_weighting", "balanced", "--mixup_alpha", "0.8", "--repeated_augmentation", "2")
    trainer = build(*flags, "--erasing_probability", "0.25", "--horizontal_flip_probability", "0")
    torch.testing.assert_close(trainer.class_weights, torch.tensor([0.75, 1.5]))
    assert trainer.layer_decay == 0.75 and trainer.data_collator.mix is not None
    assert trainer.repeated_augmentation == trainer.train_dataset.repeated_augmentation == 2
    transform = trainer.train_dataset.transform
    assert (transform.erasing_probability, transform.flip_probability) == (0.25, 0)
    trainer = build("--mode", "linear_probe")
    assert trainer.layer_decay == 1 and trainer.class_weights is None and trainer.data_collator.mix is None


@pytest.mark.parametrize("mode", ["full", "linear_probe", "attentive_probe", "lora", "dora"])
def test_the_log_tells_what_is_trained_and_the_memory(mode, tmp_path, caplog):
    caplog.set_level("INFO", logger="umt_hf")
    start = UMTVideoForVideoClassification(tiny_config())
    start.save_pretrained(tmp_path)
    fields = {"model_name_or_path": str(tmp_path), "lora_rank": 4}
    script.build_classifier(script.ClassificationModelArguments(**fields, mode=mode), ["a", "b", "c"])
    head, width = 2 * 24 + 24 * 3 + 3, 24
    adapters = 2 * 2 * (4 * width + width * 4)  # query and value of 2 layers, two matrices of rank 4 each
    trained = {
        "full": start.num_parameters(),
        "linear_probe": head,
        "attentive_probe": head + width + 3 * width**2 + 2 * width + 2 * width,  # query, projections, biases, norm
        "lora": head + adapters,
        "dora": head + adapters + 2 * 2 * width,  # and a magnitude for each output
    }[mode]
    assert f"{mode}: {trained:,} of " in caplog.text
    script.log_peak_memory()
    gibibytes = float(re.search(r"Peak memory of the (?:process|GPU): ([\d.]+) GiB", caplog.text)[1])
    assert torch.cuda.is_available() or 0.1 < gibibytes < 64


def test_settings_that_do_not_go_together(tmp_path):
    with pytest.raises(ValueError, match="persistent"):
        build_trainer(tmp_path, dataloader_persistent_workers=True, dataloader_num_workers=1)
    with pytest.raises(ValueError, match="ema_decay"):
        build_trainer(
            tmp_path, ema_decay=0.9, load_best_model_at_end=True, save_strategy="epoch", eval_strategy="epoch"
        )


def test_modes_and_the_pooling_of_the_start(tmp_path):
    """Probes choose their pooling; what else starts from a classifier keeps its pooling and trains it."""

    def build(start: str, mode: str) -> nn.Module:
        fields = {"model_name_or_path": str(tmp_path / start)}
        return script.build_classifier(script.ClassificationModelArguments(**fields, mode=mode), ["a", "b", "c"])

    for pooling in ("mean", "attentive"):
        model = UMTVideoForVideoClassification(tiny_config(pooling_type=pooling))
        model.save_pretrained(tmp_path / pooling)
    for start, mode, pooling in (
        ("mean", "attentive_probe", "attentive"),
        ("mean", "full", "mean"),
        ("attentive", "attentive_probe", "attentive"),
        ("attentive", "linear_probe", "mean"),
        ("attentive", "full", "attentive"),
        ("attentive", "lora", "attentive"),
    ):
        found = build(start, mode)
        assert found.config.pooling_type == pooling, (start, mode)
        trained = {name for name, parameter in found.named_parameters() if parameter.requires_grad}
        assert any("attentive_pooling" in name for name in trained) is (pooling == "attentive"), (start, mode)
    adapted = [name for name in trained if "lora" in name]
    assert adapted and not any("attentive_pooling" in name for name in adapted)
    loaded = found.get_base_model().attentive_pooling.modules_to_save["default"]
    assert torch.equal(loaded.query, model.attentive_pooling.query)


def test_head_rows(tmp_path):
    torch.manual_seed(0)
    start = UMTVideoForVideoClassification(tiny_config(num_labels=5))
    nn.init.normal_(start.classifier.weight)
    start.save_pretrained(tmp_path / "start")
    (tmp_path / "rows.json").write_text("[4, 0, 2]")

    def build(rows: str | None) -> nn.Module:
        fields = {"model_name_or_path": str(tmp_path / "start")}
        return script.build_classifier(script.ClassificationModelArguments(**fields, head_rows=rows), ["a", "b", "c"])

    assert torch.equal(build("first").classifier.weight, start.classifier.weight[:3])
    assert torch.equal(build(str(tmp_path / "rows.json")).classifier.weight, start.classifier.weight[[4, 0, 2]])
    assert build(None).classifier.weight.abs().max() < 1e-3
    (tmp_path / "rows.json").write_text("[4, 0, 5]")
    with pytest.raises(ValueError, match="expected 3 indices below 5"):
        build(str(tmp_path / "rows.json"))
