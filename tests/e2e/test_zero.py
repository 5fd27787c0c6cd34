"""Optimizer state and weights divided over processes by DeepSpeed: as with DDP, to the last printed digits."""

import shutil
from importlib.util import find_spec

import pytest

from tests.e2e.runs import assert_complete, assert_same_weights, read_losses
from tests.e2e.zero import run_zero, write_zero3_file
from tests.processes import run_ranks
from umt_hf.modeling.modeling_umt_video import UMTVideoForPreTraining
from umt_hf.runs.folder import read_metrics
from umt_hf.training import stage1

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="deepspeed is not installed; `make test-extras` installs it"
)


@pytest.mark.parametrize("zero", [2, 3])
def test_stage_1_equals_ddp_with_resuming_export_and_held_out_losses(flags, shapes, tmp_path, zero):
    file = [write_zero3_file(tmp_path)] if zero == 3 else []
    (tmp_path / "held_out.csv").write_text(
        "".join(f"{shapes}/{line}\n" for line in (shapes / "validation.csv").read_text().splitlines()[:5])
    )
    common = {
        "max_steps": 4,
        "save_steps": 2,
        "gradient_accumulation_steps": 2,
        "eval_steps": 2,
        "validation_data": tmp_path / "held_out.csv",
    }
    common |= {"per_device_eval_batch_size": 2, "max_grad_norm": 0.5}
    run_ranks(stage1.main, flags(output_dir=tmp_path / "ddp", **common))
    run_zero(zero, *file, stage1.main, flags(output_dir=tmp_path / "zero", **common))
    lines = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("ddp", "zero")]
    for one, other in zip(*lines, strict=True):
        names = [name for name in one if "loss" in name]
        assert names and [one[name] for name in names] == pytest.approx([other[name] for name in names], abs=1e-6)
    assert_complete(tmp_path / "zero", UMTVideoForPreTraining)
    assert_same_weights(tmp_path / "ddp", tmp_path / "zero", atol=1e-6, rtol=1e-5)
    shutil.copytree(tmp_path / "zero", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-4")
    run_zero(zero, *file, stage1.main, flags(output_dir=tmp_path / "resumed", resume_from_checkpoint="auto", **common))
    assert read_losses(tmp_path / "resumed") == read_losses(tmp_path / "zero")
    assert_same_weights(tmp_path / "zero", tmp_path / "resumed")


@pytest.mark.parametrize("zero", [2, 3])
def test_a_run_that_diverges_ends_without_an_export(flags, tmp_path, zero):
    arguments = flags(
        output_dir=tmp_path / "run", max_steps=6, learning_rate=1e30, max_nonfinite_steps=2, logging_steps=1
    )
    with pytest.raises(AssertionError, match="NaN or Inf gradients|weights are NaN or infinite"):
        run_zero(zero, stage1.main, arguments)
    assert not (tmp_path / "run" / "model.safetensors").exists()
