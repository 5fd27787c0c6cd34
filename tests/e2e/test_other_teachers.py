"""Stage 1 under teachers that are no CLIP: resumed, exported, compiled, in 8 bits, and learning from moving shapes."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch._dynamo.utils import counters

from tests.e2e.runs import PRETRAINING, assert_complete, assert_same_weights, read_losses, save_student, to_flags
from tests.e2e.steps import COMPILED, fresh_compiler
from tests.e2e.test_compiled_training import cut_after
from tests.unit.teachers.shape_towers import measure_share_on_shape, train_tower
from tests.unit.teachers.towers import INSTALLED, build_tower
from umt_hf import UMTTeacher, UMTVideoTextForPreTraining
from umt_hf.modeling.modeling_umt_video import UMTVideoForPreTraining
from umt_hf.moving_shapes.render import write_moving_shapes
from umt_hf.moving_shapes.tiny_bert import TextTowerArguments, write_text_tower
from umt_hf.moving_shapes.tiny_clip import load_frames
from umt_hf.runs.folder import read_metrics
from umt_hf.training import stage1, stage2

OTHERS = [kind for kind in INSTALLED if kind != "clip"]
TRAINED = ["siglip", "dinov3_vit"]


def save_tower(kind: str, folder: Path) -> Path:
    build_tower(kind, image_size=64, patch_size=16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "kind",
    [kind if kind in ("siglip", "dinov3_vit") else pytest.param(kind, marks=pytest.mark.heavy) for kind in OTHERS],
)
def test_a_run_is_resumed_to_the_same_weights_and_exported(kind, flags, tmp_path):
    run, options = tmp_path / "run", {"teacher_name_or_path": save_tower(kind, tmp_path / kind), "save_steps": 2}
    stage1.main(flags(**options))
    losses = read_losses(run)
    shutil.copytree(run, tmp_path / "straight")
    cut_after(run, 2)
    stage1.main(flags(resume_from_checkpoint="auto", **options))
    assert read_losses(run) == losses and len(losses) == 4
    assert_same_weights(run, tmp_path / "straight", atol=0, rtol=0)
    assert_complete(run, UMTVideoForPreTraining)
    config = UMTVideoForPreTraining.from_pretrained(run).config
    assert config.teacher_hidden_size == (12 if kind == "metaclip_2" else 24) and config.teacher_image_size == 64


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["siglip", "dinov2", "dinov3_vit"])
def test_a_compiled_teacher_gives_the_same_losses(kind, flags, tmp_path):
    options = {"teacher_name_or_path": save_tower(kind, tmp_path / kind), "max_steps": 2, "validation_data": None}
    stage1.main(flags(output_dir=tmp_path / "plain", **options))
    with fresh_compiler():
        stage1.main(flags(**COMPILED, **options))
        assert counters["graph_break"] == {}
    assert read_losses(tmp_path / "run") == pytest.approx(read_losses(tmp_path / "plain"), abs=1e-5)


@pytest.mark.heavy
@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.parametrize("kind", ["siglip", "dinov3_vit"])
def test_a_teacher_in_8_bits_and_bfloat16_gives_close_losses(kind, flags, tmp_path):
    options = {"teacher_name_or_path": save_tower(kind, tmp_path / kind), "max_steps": 2, "validation_data": None}
    stage1.main(flags(output_dir=tmp_path / "plain", **options))
    exact = read_losses(tmp_path / "plain")
    for name, changes in (("int8", {"teacher_quantization": "int8_dynamic"}), ("bf16", {"mixed_precision": "bf16"})):
        AcceleratorState._reset_state(reset_partial_state=True)
        stage1.main(flags(output_dir=tmp_path / name, **changes, **options))
        found = read_losses(tmp_path / name)
        assert found == pytest.approx(exact, rel=0.05) and found != exact


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["siglip", "dinov3_vit"])
def test_stage_2_trains_under_it(kind, shapes, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    write_text_tower(TextTowerArguments(data=str(shapes), output_dir=str(tmp_path / "bert"), **sizes))
    options = {
        **PRETRAINING,
        "train_corpora": shapes / "train_captions.json",
        "media_types": "video",
        "teacher_name_or_path": save_tower(kind, tmp_path / kind),
        "vision_name_or_path": save_student(tmp_path / "student", num_aligned_layers=2, teacher_hidden_size=24),
        "text_name_or_path": tmp_path / "bert",
        "fusion_layer": 1,
        "projection_dim": 16,
        "max_text_tokens": 12,
        "mask_ratio": 0.5,
        "lr_scheduler_type": "cosine_above_minimum",
        "max_steps": 2,
        "output_dir": tmp_path / "run",
    }
    stage2.main(to_flags(**options))
    model = UMTVideoTextForPreTraining.from_pretrained(tmp_path / "run")
    assert model.config.vision_config.teacher_hidden_size == 24
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "video_uta_loss" in line]
    assert len(lines) == 2 and all(0 < line["video_uta_loss"] < 4 for line in lines)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    return write_moving_shapes(folder, num_train_clips=120, num_validation_clips=6, num_test_clips=1)


@pytest.fixture(scope="module", params=TRAINED)
def trained(request, clips, tmp_path_factory) -> Path:
    """A tower that has learned the shapes, and has its own pixels."""
    folder = tmp_path_factory.mktemp(request.param)
    train_tower(request.param, load_frames(clips, "train", 120), seed=0, max_steps=150).save_pretrained(folder)
    return folder


def test_saliency_is_on_the_shape(trained, clips):
    share, area = measure_share_on_shape(UMTTeacher.from_pretrained(str(trained), 1), clips, "validation")
    assert 0.05 < area < 0.15 and share > 1.5 * area, (share, area)


def read_fall(run: Path, last: int) -> float:
    """Loss of the last five steps, as a share of that of the first one."""
    losses = read_losses(run)
    return sum(losses[step] for step in range(last - 4, last + 1)) / 5 / losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.heavy) for seed in (1, 2))])
def test_the_loss_falls_to_half(seed, trained, clips, flags, tmp_path):
    options = {"train_data": clips / "train.csv", "validation_data": None, "learning_rate": 3e-3}
    options |= {"per_device_train_batch_size": 8, "max_steps": 60, "hidden_size": 64, "image_size": 64}
    stage1.main(flags(teacher_name_or_path=trained, seed=seed, **options))
    assert read_fall(tmp_path / "run", 60) <= 0.5


def test_pixels_of_the_run_reach_the_teacher_in_its_own_statistics(flags, tmp_path, monkeypatch):
    """What is in [0, 1] is in [-1, 1] for a SigLIP, and beyond 2 for the student."""
    seen = []
    own = UMTTeacher._encode_below

    def watch(self, pixel_values):
        handle = self.vision_tower.embeddings.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            return own(self, pixel_values)
        finally:
            handle.remove()

    monkeypatch.setattr(UMTTeacher, "_encode_below", watch)
    stage1.main(flags(teacher_name_or_path=save_tower("siglip", tmp_path / "siglip"), max_steps=1, warmup_steps=0))
    pixels = torch.cat(seen)
    assert -1.2 < pixels.min() < -0.5 and 0.5 < pixels.max() < 1.2  # resizing overshoots a little
