"""Stage 1 under an image teacher and a video one: losses by name, weights, resuming, export, and what is refused."""

import importlib.util
import shutil
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from torch._dynamo.utils import counters

from tests.e2e.runs import assert_complete, assert_same_weights, read_losses, save_student
from tests.e2e.steps import COMPILED, fresh_compiler
from tests.e2e.test_compiled_training import cut_after
from tests.unit.teachers.towers import VIDEO_KINDS, build_tower
from umt_hf import UMTVideoForPreTraining
from umt_hf.modeling.towers_umt_video_text import load_video_tower
from umt_hf.runs.folder import read_metrics
from umt_hf.training import stage1, stage2

KINDS = list(VIDEO_KINDS)
NAMES = {kind: ("clip_uta_loss", f"{kind}_uta_loss") for kind in KINDS}


def save_tower(kind: str, folder: Path, **options) -> Path:
    size = "crop_size" if kind == "vjepa2" else "image_size"
    build_tower(kind, **{size: 64}, patch_size=16, **options).save_pretrained(folder)
    return folder


def read_lines(run: Path) -> list[dict]:
    return [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_resumed_to_the_same_weights_and_exported(kind, flags, teacher, tmp_path):
    run, video = tmp_path / "run", save_tower(kind, tmp_path / kind)
    options = {"teacher_name_or_path": [teacher, video], "teacher_weights": [1.0, 0.5], "save_steps": 2}
    stage1.main(flags(**options))
    lines = read_lines(run)
    assert len(lines) == 4
    for line in lines:
        of_image, of_video = (line[name] for name in NAMES[kind])
        assert 0 < of_video < 2.0 < 2 * of_image and "uta_loss" not in line  # l2 of unit vectors is at most 4
        assert line["loss"] == pytest.approx(of_image + of_video, abs=1e-5)
    (held_out,) = [line for line in read_metrics(run / "metrics.jsonl") if "eval_loss" in line]
    assert {f"eval_{name}" for name in NAMES[kind]} <= held_out.keys()
    shutil.copytree(run, tmp_path / "straight")
    cut_after(run, 2)
    stage1.main(flags(resume_from_checkpoint="auto", **options))
    assert read_lines(run)[-1]["loss"] == lines[-1]["loss"]
    assert read_losses(run) == read_losses(tmp_path / "straight")
    assert_same_weights(run, tmp_path / "straight", atol=0, rtol=0)

    assert_complete(run, UMTVideoForPreTraining)
    student = UMTVideoForPreTraining.from_pretrained(run)
    assert student.config.teacher_name_or_path == str(teacher) and student.config.teacher_weights == [1.0, 0.5]
    assert student.config.other_teachers == [{"name_or_path": str(video), "image_size": 64, "hidden_size": 24}]
    assert [len(heads) for heads in student.other_alignment_heads] == [2]


def test_weights_scale_the_loss_of_each_teacher(flags, teacher, tmp_path):
    video, first = save_tower("videomae", tmp_path / "videomae"), {}
    for name, weights in (("even", None), ("uneven", [2.0, 0.25])):
        run = tmp_path / name
        AcceleratorState._reset_state(reset_partial_state=True)
        options = {"teacher_name_or_path": [teacher, video], "teacher_weights": weights, "max_steps": 1}
        stage1.main(flags(output_dir=run, validation_data=None, warmup_steps=0, **options))
        first[name] = [read_lines(run)[0][loss] for loss in NAMES["videomae"]]
    assert first["uneven"] == pytest.approx([2 * first["even"][0], 0.25 * first["even"][1]], rel=1e-5)


def test_one_teacher_of_two_goes_on_alone(flags, teacher, tmp_path):
    """With one teacher nothing is other than before: names of losses, of weights, and fields of the configuration."""
    both, video = tmp_path / "both", save_tower("videomae", tmp_path / "videomae")
    options = {"validation_data": None, "max_steps": 1, "warmup_steps": 0}
    stage1.main(flags(output_dir=both, teacher_name_or_path=[teacher, video], **options))
    AcceleratorState._reset_state(reset_partial_state=True)
    stage1.main(flags(model_name_or_path=both, **options))
    student = UMTVideoForPreTraining.from_pretrained(tmp_path / "run")
    assert not any("other" in name for name in student.state_dict())
    assert student.config.other_teachers is student.config.teacher_weights is None
    assert "uta_loss" in read_lines(tmp_path / "run")[0]
    assert f"teacher_name_or_path: {teacher}\n" in (tmp_path / "run" / "run.yaml").read_text()
    # As in stage 2, which starts from the encoder and the heads of the image teacher.
    state, config = load_video_tower(both, {})
    assert state.keys() == student.state_dict().keys() and config.other_teachers is None


def refuse(flags, match: str, **options) -> None:
    with pytest.raises(ValueError, match=match):
        stage1.main(flags(**options))


def test_what_does_not_fit_is_refused_before_a_step(flags, teacher, tmp_path):
    video = save_tower("videomae", tmp_path / "videomae")
    both = {"teacher_name_or_path": [teacher, video]}
    refuse(flags, r"videomae is not a CLIP.* name it second", teacher_name_or_path=[video, teacher])
    refuse(flags, "teacher_weights has 3 values and there are 2 teachers", teacher_weights=[1, 1, 1], **both)
    refuse(flags, "teacher_weights must be positive", teacher_weights=[1, 0], **both)
    refuse(flags, "is for several teachers, and teacher_name_or_path names one", teacher_weights=[1])
    refuse(flags, "clip of 5 frames cannot be cut into the tubelets of 2 frames", num_frames=5, **both)
    refuse(flags, "student sees 8 x 8 patches .* the teacher 4 x 4", patch_size=8, **both)
    student = save_student(tmp_path / "student", num_aligned_layers=2, teacher_hidden_size=12)
    refuse(flags, "lacks .*other_alignment_heads", model_name_or_path=student, **both)
    stray = save_student(tmp_path / "stray")
    refuse(flags, "stray is not a CLIP.*which a further teacher must be", teacher_name_or_path=[teacher, stray])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_stage_2_takes_one(tmp_path):
    flags = ["--teacher_name_or_path", "a", "b", "--train_corpora", "x.json", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="Stage 2 aligns with one teacher, and teacher_name_or_path names 2"):
        stage2.main(flags)


@pytest.mark.heavy
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_teachers_give_the_same_losses(kind, flags, teacher, tmp_path):
    options = {"teacher_name_or_path": [teacher, save_tower(kind, tmp_path / kind)], "validation_data": None}
    stage1.main(flags(output_dir=tmp_path / "plain", max_steps=2, **options))
    AcceleratorState._reset_state(reset_partial_state=True)
    with fresh_compiler():
        stage1.main(flags(max_steps=2, **COMPILED, **options))
        assert counters["graph_break"] == {}
    assert read_losses(tmp_path / "run") == pytest.approx(read_losses(tmp_path / "plain"), abs=1e-5)


@pytest.mark.heavy
@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.parametrize("kind", KINDS)
def test_teachers_in_8_bits_and_bfloat16_give_close_losses(kind, flags, teacher, tmp_path):
    options = {"teacher_name_or_path": [teacher, save_tower(kind, tmp_path / kind)], "max_steps": 2}
    stage1.main(flags(output_dir=tmp_path / "plain", validation_data=None, **options))
    exact = read_losses(tmp_path / "plain")
    for name, changes in (("int8", {"teacher_quantization": "int8_dynamic"}), ("bf16", {"mixed_precision": "bf16"})):
        AcceleratorState._reset_state(reset_partial_state=True)
        stage1.main(flags(output_dir=tmp_path / name, validation_data=None, **changes, **options))
        found = read_losses(tmp_path / name)
        assert found == pytest.approx(exact, rel=0.05) and found != exact
