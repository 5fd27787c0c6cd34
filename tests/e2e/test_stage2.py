"""Whole stage-2 runs on rendered videos and images: export, mixing, resume, distribution, and what goes wrong."""

import json
import logging
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from transformers import AutoModel, AutoModelForPreTraining, AutoProcessor

from tests.e2e.runs import PRETRAINING, assert_complete, assert_same_weights, read_losses, to_flags
from tests.e2e.sharded import run_sharded
from tests.e2e.steps import COMPILED, fresh_compiler, watch_graphs, watch_waits
from tests.e2e.zero import run_zero, write_zero3_file
from tests.processes import run_and_kill, run_ranks
from tests.unit.shard_files import write_parquets, write_tars
from umt_hf import (
    UMTVideoConfig,
    UMTVideoForPreTraining,
    UMTVideoModel,
    UMTVideoTextForPreTraining,
    UMTVideoTextForRetrieval,
    UMTVideoTextProcessor,
)
from umt_hf.data.prepare import ShardSettings, prepare_shards
from umt_hf.moving_shapes.tiny_bert import TextTowerArguments, write_text_tower
from umt_hf.runs.config import parse_config
from umt_hf.runs.folder import read_metrics
from umt_hf.training import stage2
from umt_hf.training.checkpointing import list_checkpoints

TINY = {
    **PRETRAINING,
    "fusion_layer": 1,
    "projection_dim": 16,
    "max_text_tokens": 12,
    "mask_ratio": 0.5,
    "pair_by": "caption",
    "multiple_videos_per_text": True,
    "rerank_top_k": 2,
    "horizontal_flip_probability": 0.0,
    "lr_scheduler_type": "cosine_above_minimum",
}
LOSSES = {"uta_loss", "vtc_loss", "vtm_loss", "mlm_loss"}


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = UMTVideoConfig(
        image_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        num_aligned_layers=2,
        teacher_hidden_size=12,
    )
    folder = tmp_path_factory.mktemp("student")
    UMTVideoForPreTraining(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_tower(shapes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text_tower")
    write_text_tower(
        TextTowerArguments(
            data=str(shapes), output_dir=str(folder), hidden_size=32, num_hidden_layers=2, num_attention_heads=2
        )
    )
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Plain images with captions, as a second corpus."""
    folder = tmp_path_factory.mktemp("images")
    rows = []
    for number, color in enumerate(("red", "green", "blue", "yellow") * 3):
        Image.new("RGB", (40 + number, 48), color).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "caption": f"a {color} square"})
    (folder / "captions.json").write_text(json.dumps(rows))
    return folder / "captions.json"


@pytest.fixture
def flags(shapes, teacher, student, text_tower, tmp_path):
    """Command line of a tiny run; keyword arguments change it."""

    def build(**changes) -> list[str]:
        fields = {
            **TINY,
            "train_corpora": shapes / "train_captions.json",
            "teacher_name_or_path": teacher,
            "vision_name_or_path": student,
            "text_name_or_path": text_tower,
            "output_dir": tmp_path / "run",
        }
        return to_flags(**fields | changes)

    return build


def save_without_dropout(text_tower: Path, folder: Path) -> Path:
    shutil.copytree(text_tower, folder)
    config = json.loads((text_tower / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def with_images(shapes: Path, images: Path) -> dict:
    return {
        "train_corpora": [shapes / "train_captions.json", images],
        "media_types": ["video", "image"],
        "batch_sizes": [4, 3],
    }


def test_run_on_videos_and_images_exports_what_auto_classes_load(flags, shapes, images, tmp_path):
    state = stage2.main(
        flags(**with_images(shapes, images), validation_data=shapes / "test_captions.json", max_steps=10, save_steps=5)
    )
    run = tmp_path / "run"
    assert state.step == 10 and state.skipped_videos == 0
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    kinds = [{name.split("_")[0] for name in line if name.endswith("_loss")} for line in lines]
    assert {"video"} in kinds and {"image"} in kinds  # one kind a step
    for line in lines:
        parts = {name.split("_", 1)[1]: value for name, value in line.items() if name.endswith("_loss")}
        assert parts.keys() == LOSSES and sum(parts.values()) == pytest.approx(line["loss"], abs=1e-4)
        assert 0.001 <= line["temperature"] <= 0.5
    final = read_metrics(run / "metrics.jsonl")[-1]
    assert 0 <= final["eval_dual_text_to_video_r1"] <= 1
    assert "eval_reranked_text_to_video_r1" in final

    for folder in (run, run / "checkpoint-5"):
        model, info = AutoModelForPreTraining.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert model.config.vision_config.image_mask_ratio == 0.5
    model = AutoModel.from_pretrained(run)
    processor = AutoProcessor.from_pretrained(run)
    video = str(next((shapes / "videos" / "test").iterdir()))
    inputs = processor(text=["a red circle moving clockwise"], videos=[video], return_tensors="pt")
    assert inputs["input_ids"].shape == (1, 12) and inputs["pixel_values"].shape == (1, 4, 3, 64, 64)
    with torch.no_grad():
        assert model(**inputs).logits_per_video.isfinite().all()
    for kind in (UMTVideoModel, UMTVideoTextForRetrieval):
        _, info = kind.from_pretrained(run, output_loading_info=True)
        assert not info["missing_keys"], kind
    # The teacher is in no file of the run, and the resolved configuration is itself a recipe.
    assert not [name for name, _ in model.named_parameters() if "teacher" in name or "tower" in name]
    assert parse_config(stage2.SECTIONS, ["--config", str(run / "run.yaml")])[0].projection_dim == 16


def test_stage_1_weights_arrive(flags, student, tmp_path):
    stage2.main(flags(max_steps=1, learning_rate=0, min_learning_rate=0))
    before = UMTVideoForPreTraining.from_pretrained(student)
    after = AutoModelForPreTraining.from_pretrained(tmp_path / "run")
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name]), name


def test_loss_falls(flags, tmp_path):
    stage2.main(flags(max_steps=40, learning_rate=3e-3, per_device_train_batch_size=8))
    losses = read_losses(tmp_path / "run")
    assert sum(losses[s] for s in range(36, 41)) < 0.85 * sum(losses[s] for s in range(1, 6))


def test_without_alignment_there_is_no_teacher_and_no_mask(flags, tmp_path):
    stage2.main(flags(max_steps=2, uta_loss_weight=0, teacher_name_or_path="nowhere"))
    line = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert {"video_vtc_loss", "video_vtm_loss", "video_mlm_loss"} <= line.keys() and "video_uta_loss" not in line


def test_resumed_run_equals_the_uninterrupted_one(flags, shapes, images, tmp_path, caplog):
    """Mid-epoch, with dropout, evaluation between, and two workers against none."""
    common = {
        **with_images(shapes, images),
        "max_steps": 8,
        "save_steps": 5,
        "eval_steps": 5,
        "drop_path_rate": 0.2,
        "validation_data": shapes / "test_captions.json",
    }
    stage2.main(flags(output_dir=tmp_path / "whole", **common))
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-8")
    arguments = flags(output_dir=tmp_path / "resumed", resume_from_checkpoint="auto", **common)
    stage2.main([*arguments, "--dataloader_num_workers", "2"])
    assert "other settings" not in caplog.text
    assert read_losses(tmp_path / "resumed") == read_losses(tmp_path / "whole")
    assert_same_weights(tmp_path / "whole", tmp_path / "resumed")
    stage2.main([*arguments, "--mask_ratio", "0.25"])
    assert "Resuming with other settings than before: mask_ratio 0.5 -> 0.25." in caplog.text


def test_killed_run_resumes_to_the_same_losses(flags, tmp_path):
    """SIGKILL at an arbitrary moment after the first checkpoint."""
    common = {"max_steps": 20, "save_steps": 1, "save_total_limit": 2}
    stage2.main(flags(output_dir=tmp_path / "whole", **common))
    arguments = flags(output_dir=tmp_path / "killed", **common)
    run_and_kill(lambda: list_checkpoints(tmp_path / "killed"), stage2.main, arguments)
    stage2.main([*arguments, "--resume_from_checkpoint", "auto"])
    assert read_losses(tmp_path / "killed") == read_losses(tmp_path / "whole")
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")


def test_two_processes_equal_one(flags, shapes, images, text_tower, tmp_path):
    """Contrast and alignment, where nothing is drawn within a process; then all four, resumed with two processes."""
    exact = {
        "text_name_or_path": save_without_dropout(text_tower, tmp_path / "no_dropout"),
        **with_images(shapes, images),
        "batch_sizes": [4, 2],
        "max_steps": 4,
        "vtm_loss_weight": 0,
        "mlm_loss_weight": 0,
        "validation_data": shapes / "test_captions.json",
    }
    stage2.main(flags(output_dir=tmp_path / "one", **{**exact, "batch_sizes": [8, 4]}))
    run_ranks(stage2.main, flags(output_dir=tmp_path / "two", **exact))
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert read_losses(tmp_path / "one") == pytest.approx(read_losses(tmp_path / "two"), abs=1e-4)
    assert_same_weights(tmp_path / "one", tmp_path / "two", atol=3e-4, rtol=1e-3)
    name = "eval_dual_text_to_video_r1"
    assert one[-1][name] == pytest.approx(two[-1][name])

    common = {**with_images(shapes, images), "batch_sizes": [2, 2], "max_steps": 5, "save_steps": 3}
    run_ranks(stage2.main, flags(output_dir=tmp_path / "whole", **common))
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-5")
    run_ranks(stage2.main, flags(output_dir=tmp_path / "resumed", resume_from_checkpoint="auto", **common))
    assert read_losses(tmp_path / "resumed") == read_losses(tmp_path / "whole")
    assert_same_weights(tmp_path / "whole", tmp_path / "resumed")


def test_captions_and_images_from_shards(flags, shapes, images, text_tower, tmp_path):
    """Videos in tars with weights, mixed with a list; images in Parquet; resumed alike, in two processes too."""
    rows = json.loads((shapes / "train_captions.json").read_text())
    files = [{"mp4": (shapes / row["video"]).read_bytes(), "json": {"caption": row["caption"]}} for row in rows]
    pictures = [
        {"image": {"bytes": (images.parent / row["image"]).read_bytes(), "path": None}, "caption": row["caption"]}
        for row in json.loads(images.read_text())
    ]
    common = {
        "text_name_or_path": save_without_dropout(text_tower, tmp_path / "no_dropout"),
        "train_corpora": [
            write_tars(tmp_path / "tars", files, 7),
            shapes / "train_captions.json",
            write_parquets(tmp_path / "pictures", pictures, 7),
        ],
        "media_types": ["video", "video", "image"],
        "corpus_weights": [2, 0.5, 1],
        "streaming": True,
        "num_train_epochs": 1,
        "max_steps": None,
        "save_steps": 4,
        "vtm_loss_weight": 0,
        "mlm_loss_weight": 0,
    }
    stage2.main(flags(output_dir=tmp_path / "whole", **common | {"batch_sizes": [8, 8, 4]}))
    whole = read_losses(tmp_path / "whole")
    assert len(whole) == (2 * len(rows) + len(rows) // 2) // 8 + len(pictures) // 4
    assert {name for line in read_metrics(tmp_path / "whole" / "metrics.jsonl") for name in line} >= {
        "video_uta_loss",
        "image_vtc_loss",
    }
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for checkpoint in list_checkpoints(tmp_path / "run")[1:]:
        shutil.rmtree(checkpoint)
    resumed = {"output_dir": tmp_path / "run", "resume_from_checkpoint": "auto", **common}
    stage2.main(flags(**resumed | {"batch_sizes": [8, 8, 4], "dataloader_num_workers": 2}))
    assert read_losses(tmp_path / "run") == whole
    assert_same_weights(tmp_path / "whole", tmp_path / "run")
    for checkpoint in list_checkpoints(tmp_path / "run")[1:]:
        shutil.rmtree(checkpoint)
    run_ranks(stage2.main, flags(**resumed | {"batch_sizes": [4, 4, 2]}))
    assert read_losses(tmp_path / "run") == pytest.approx(whole, abs=1e-5)


def test_captions_come_with_the_frames_that_prepare_keeps(flags, shapes, tmp_path):
    prepare_shards([str(shapes / "train_captions.json")], tmp_path / "shards", ShardSettings(8), num_workers=0)
    stage2.main(flags(train_corpora=tmp_path / "shards", output_dir=tmp_path / "kept"))
    stage2.main(flags(output_dir=tmp_path / "videos"))
    kept, videos = (read_losses(tmp_path / name) for name in ("kept", "videos"))
    assert kept.keys() == videos.keys() and kept[1] == pytest.approx(videos[1], rel=0.2)
    with pytest.raises(ValueError, match="num_frames=9 is more than the 8 frames kept of each video"):
        stage2.main(flags(train_corpora=tmp_path / "shards", num_frames=9))


def test_a_run_goes_on_with_the_same_clips_in_another_shape(flags, shapes, images, text_tower, tmp_path, caplog):
    """The same alignment; and the same contrast, where all processes together take as many pairs at a time."""
    caplog.set_level(logging.INFO)
    common = {
        "text_name_or_path": save_without_dropout(text_tower, tmp_path / "no_dropout"),
        **with_images(shapes, images),
        "max_steps": 8,
        "save_steps": 3,
        "vtm_loss_weight": 0,
        "mlm_loss_weight": 0,
    }
    stage2.main(flags(output_dir=tmp_path / "whole", **common | {"batch_sizes": [8, 4]}))
    whole = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for step in (6, 8):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    arguments = flags(output_dir=tmp_path / "run", resume_from_checkpoint="auto", **common | {"batch_sizes": [4, 2]})
    said = run_ranks(stage2.main, arguments).stderr
    assert "are drawn afresh, as the processes are others" in said and "contrasted with those of another" not in said
    assert read_losses(tmp_path / "run") == pytest.approx(read_losses(tmp_path / "whole"), abs=1e-5)
    # With accumulated batches the contrast has other pairs, which is said; the first step's alignment is the same.
    shutil.rmtree(tmp_path / "run" / "checkpoint-8")
    stage2.main([*arguments, "--gradient_accumulation_steps", "2"])
    assert "contrasted with those of another number of pairs" in caplog.text
    part = read_metrics(tmp_path / "run" / "metrics.jsonl")
    first, other = (
        next({k: v for k, v in line.items() if k.endswith("uta_loss")} for line in lines if line["step"] == 7)
        for lines in (whole, part)
    )
    assert first == pytest.approx(other, abs=1e-5)
    assert [line["step"] for line in part if "loss" in line] == list(range(1, 9))


@pytest.mark.parametrize("division", ["fsdp2", "zero2", "zero3"])
def test_weights_divided_over_processes_equal_ddp(flags, shapes, images, text_tower, tmp_path, division):
    """Losses, retrieval among an odd number of held-out videos, export, and resuming from the divided checkpoint."""
    run = run_sharded
    if division != "fsdp2":
        pytest.importorskip("deepspeed")
        run = partial(run_zero, *{"zero2": (2,), "zero3": (3, write_zero3_file(tmp_path))}[division])
    captions = json.loads((shapes / "test_captions.json").read_text())
    rows = [row | {"video": str(shapes / row["video"])} for row in captions[:5]]
    (tmp_path / "held_out.json").write_text(json.dumps(rows))
    common = {**with_images(shapes, images), "batch_sizes": [2, 2], "max_steps": 4, "save_steps": 2, "eval_steps": 2}
    common |= {"validation_data": tmp_path / "held_out.json"}
    common |= {"text_name_or_path": save_without_dropout(text_tower, tmp_path / "no_dropout")}
    run_ranks(stage2.main, flags(output_dir=tmp_path / "ddp", **common))
    run(stage2.main, flags(output_dir=tmp_path / "divided", **common))
    lines = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("ddp", "divided")]
    for one, other in zip(*lines, strict=True):
        names = [name for name in one if "loss" in name or name.startswith("eval_")]
        assert names and [one[name] for name in names] == pytest.approx([other[name] for name in names], abs=1e-5)
    assert_complete(tmp_path / "divided", UMTVideoTextForPreTraining)
    assert_same_weights(tmp_path / "ddp", tmp_path / "divided", atol=1e-5, rtol=1e-4)
    shutil.copytree(tmp_path / "divided", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-4")
    run(stage2.main, flags(output_dir=tmp_path / "resumed", resume_from_checkpoint="auto", **common))
    assert read_losses(tmp_path / "resumed") == read_losses(tmp_path / "divided")
    assert_same_weights(tmp_path / "divided", tmp_path / "resumed")


def test_continues_from_a_stage_2_folder(flags, tmp_path):
    stage2.main(flags(output_dir=tmp_path / "first", max_steps=2))
    stage2.main(
        flags(
            output_dir=tmp_path / "second",
            model_name_or_path=tmp_path / "first",
            vision_name_or_path=None,
            text_name_or_path=None,
            max_steps=1,
            learning_rate=0,
            min_learning_rate=0,
            mask_ratio=0.25,
            num_frames=8,
        )
    )
    assert_same_weights(tmp_path / "first", tmp_path / "second")
    config = AutoModel.from_pretrained(tmp_path / "second").config
    assert config.vision_config.mask_ratio == 0.25 and config.vision_config.num_frames == 8


def test_gradient_checkpointing_changes_nothing(flags, tmp_path):
    stage2.main(flags(output_dir=tmp_path / "plain", max_steps=2))
    stage2.main(
        flags(
            output_dir=tmp_path / "checkpointed",
            max_steps=2,
            vision_gradient_checkpointing="true",
            text_gradient_checkpointing="true",
        )
    )
    assert_same_weights(tmp_path / "plain", tmp_path / "checkpointed", atol=1e-5, rtol=1e-4)


def test_unreadable_videos_are_counted_and_named(flags, shapes, tmp_path, caplog):
    rows = json.loads((shapes / "train_captions.json").read_text())
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    rows[0]["video"] = str(tmp_path / "broken.mp4")
    (tmp_path / "train.json").write_text(json.dumps(rows))
    state = stage2.main(
        flags(train_corpora=[tmp_path / "train.json"], data_roots=[shapes], max_steps=12, max_skipped_ratio=0.5)
    )
    assert state.skipped_videos >= 1 and "broken.mp4" in caplog.text


def test_an_unreadable_held_out_video_leaves_the_final_model(flags, shapes, images, tmp_path, caplog):
    """It is written before it is tested; what was found is said for each corpus."""
    rows = json.loads((shapes / "train_captions.json").read_text())[:6]
    for row in rows:
        row["video"] = str(shapes / row["video"])
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    rows[0]["video"] = str(tmp_path / "broken.mp4")
    (tmp_path / "held_out.json").write_text(json.dumps(rows))
    changes = with_images(shapes, images) | {"validation_data": tmp_path / "held_out.json", "max_steps": 2}
    with (
        caplog.at_level("INFO"),
        pytest.raises(
            ValueError, match=rf"^{tmp_path}/run holds the trained model, but testing it failed: .*broken.mp4"
        ),
    ):
        stage2.main(flags(**changes))
    assert_complete(tmp_path / "run", UMTVideoTextForPreTraining)
    assert re.search(
        rf"{shapes}/train_captions.json: 24 videos with captions; .*: \d+ images with captions; "
        r"validation: 6 videos with 6 captions\.",
        caplog.text,
    )
    assert "5 of 6 validation videos are training videos" in caplog.text


def test_mistakes_are_named(flags, shapes):
    with pytest.raises(ValueError, match="vision_name_or_path"):
        stage2.main(flags(vision_name_or_path=None))
    with pytest.raises(ValueError, match="media_types has 2 values for 1 corpora"):
        stage2.main(flags(media_types=["video", "image"]))
    with pytest.raises(ValueError, match=r"do not fill one batch .* set --batch_sizes to \d+ or less"):
        stage2.main(flags(per_device_train_batch_size=100))
    with pytest.raises(ValueError, match="no caption"):
        stage2.main(flags(train_corpora=[shapes / "train.csv"]))


def test_its_last_state_reaches_a_hub_that_failed(hub, flags, tmp_path):
    hub.fail(times=float("inf"))
    arguments = flags(push_to_hub="true", hub_model_id="me/stage2", max_steps=2, save_steps=1)
    stage2.main(arguments)
    assert not hub.repos
    hub.heal()
    stage2.main([*arguments, "--resume_from_checkpoint", "auto"])
    pulled = UMTVideoTextForPreTraining.from_pretrained("me/stage2").state_dict()
    assert type(AutoProcessor.from_pretrained("me/stage2")) is UMTVideoTextProcessor
    for name, tensor in load_file(tmp_path / "run" / "model.safetensors").items():
        assert torch.equal(pulled[name], tensor), name


@pytest.mark.heavy
@pytest.mark.parametrize("num_processes", [1, 2])
def test_compiled_runs_export_the_models_own_weights_and_resume(flags, shapes, tmp_path, num_processes):
    """With held-out data, which is searched by the model inside the compiled one."""
    common = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 4 // num_processes}
    common["validation_data"] = shapes / "test_captions.json"
    options = {"num_processes": num_processes, "environment": {"ACCELERATE_DYNAMO_BACKEND": "aot_eager"}}
    run, resumed = tmp_path / "compiled", tmp_path / "resumed"
    run_ranks(stage2.main, flags(output_dir=run, **common), **options)
    for folder in (run, run / "checkpoint-1", run / "checkpoint-2"):
        assert_complete(folder, UMTVideoTextForPreTraining)
    shutil.copytree(run, resumed)
    shutil.rmtree(resumed / "checkpoint-2")
    run_ranks(stage2.main, flags(output_dir=resumed, resume_from_checkpoint="auto", **common), **options)
    assert read_losses(resumed) == read_losses(run)
    assert_same_weights(run, resumed)


@pytest.mark.heavy
def test_each_kind_of_batch_is_compiled_once_in_student_and_teacher(flags, shapes, images, tmp_path, monkeypatch):
    """Videos and images; the run goes on plain and compiled again, and held-out data is searched uncompiled."""
    graphs, run = watch_graphs(monkeypatch, stage2.Stage2), tmp_path / "run"
    fields = {**with_images(shapes, images), "max_steps": 8, "save_steps": 4}
    fields["validation_data"] = shapes / "test_captions.json"
    with fresh_compiler():
        stage2.main(flags(**COMPILED, **fields))
        assert counters["graph_break"] == {}
    kinds = [{name.split("_")[0] for name in line} for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    first = {kind: next(i for i, names in enumerate(kinds) if kind in names) for kind in ("video", "image")}
    assert graphs[min(first.values())] == 2
    assert set(graphs[max(first.values()) :]) == {4}
    assert_complete(run, UMTVideoTextForPreTraining)
    shutil.rmtree(run / "checkpoint-8")
    losses = read_losses(run)
    stage2.main(flags(resume_from_checkpoint="auto", **fields))
    assert read_losses(run) == pytest.approx(losses, abs=1e-4)
    shutil.rmtree(run / "checkpoint-8")
    with fresh_compiler():
        stage2.main(flags(resume_from_checkpoint="auto", **COMPILED, **fields))
    assert read_losses(run) == losses
    assert_complete(run, UMTVideoTextForPreTraining)


@pytest.mark.parametrize(
    "changes", [{}, {"attn_implementation": "eager", "max_grad_norm": 1.0}], ids=["sdpa", "eager"]
)
def test_no_step_waits_for_the_device_between_log_lines(flags, shapes, images, monkeypatch, changes):
    waits = watch_waits(monkeypatch)
    stage2.main(flags(**with_images(shapes, images), max_steps=9, logging_steps=4, **changes))
    assert len(waits) >= 6 and not any(waits)


def test_workers_that_are_not_forked(flags, shapes, images, forkserver, tmp_path):
    """They get the processor, not the stage with its models; held-out videos are read by workers, too."""
    fields = {**with_images(shapes, images), "validation_data": shapes / "test_captions.json", "max_steps": 3}
    stage2.main(flags(output_dir=tmp_path / "workers", dataloader_num_workers=1, **fields))
    stage2.main(flags(output_dir=tmp_path / "none", dataloader_num_workers=0, **fields))
    assert read_losses(tmp_path / "workers") == read_losses(tmp_path / "none")
