"""Weights divided over processes by FSDP2: as with DDP, to the last printed digits."""

import shutil

import pytest

from tests.e2e.runs import assert_complete, assert_same_weights, read_losses
from tests.e2e.sharded import LAUNCH, build_environment, run_sharded
from tests.e2e.steps import COMPILED
from tests.processes import run_ranks
from umt_hf.modeling.modeling_umt_video import UMTVideoForPreTraining
from umt_hf.runs.folder import read_metrics
from umt_hf.training import stage1


def test_stage_1_equals_ddp_with_resuming_export_and_held_out_losses(flags, shapes, tmp_path):
    (tmp_path / "held_out.csv").write_text(
        "".join(f"{shapes}/{line}\n" for line in (shapes / "validation.csv").read_text().splitlines()[:5])
    )
    common = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "validation_data": tmp_path / "held_out.csv"}
    common |= {"per_device_eval_batch_size": 2}
    run_ranks(stage1.main, flags(output_dir=tmp_path / "ddp", **common))
    run_sharded(stage1.main, flags(output_dir=tmp_path / "fsdp", **common))
    lines = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("ddp", "fsdp")]
    for one, other in zip(*lines, strict=True):
        names = [name for name in one if "loss" in name]
        assert names and [one[name] for name in names] == pytest.approx([other[name] for name in names], abs=1e-6)
    assert_complete(tmp_path / "fsdp", UMTVideoForPreTraining)
    assert_same_weights(tmp_path / "ddp", tmp_path / "fsdp", atol=1e-6, rtol=1e-5)
    assert list((tmp_path / "fsdp" / "checkpoint-2" / "training_state").rglob("*.distcp"))
    shutil.copytree(tmp_path / "fsdp", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-4")
    run_sharded(stage1.main, flags(output_dir=tmp_path / "resumed", resume_from_checkpoint="auto", **common))
    assert read_losses(tmp_path / "resumed") == read_losses(tmp_path / "fsdp")
    assert_same_weights(tmp_path / "fsdp", tmp_path / "resumed")


@pytest.mark.heavy
def test_divided_weights_train_compiled_as_plain(flags, tmp_path):
    """FSDP2 gathers weights between the parts of the student's graph."""
    common = {"max_steps": 3, "per_device_train_batch_size": 2, "validation_data": None}
    run_ranks(stage1.main, flags(output_dir=tmp_path / "plain", **common))
    run_sharded(stage1.main, flags(**COMPILED, **common))
    assert_complete(tmp_path / "run", UMTVideoForPreTraining)
    assert read_losses(tmp_path / "run") == pytest.approx(read_losses(tmp_path / "plain"), abs=1e-5)


def test_a_run_that_would_not_divide_its_weights_is_refused(flags, monkeypatch):
    """On a CPU Accelerate takes DDP, or nothing, without a word."""
    for name, value in build_environment(LAUNCH / "fsdp2.yaml").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="started for FSDP, but Accelerate takes NO: weights are divided"):
        stage1.main(flags(max_steps=1))
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    stage1.main(flags(max_steps=1))
