"""Stage 1 and stage 2 with the teacher in 8 bits: plain and compiled, resumed, and exported as without it."""

import importlib.util

import pytest

from tests.e2e.runs import assert_complete, read_losses
from tests.e2e.steps import COMPILED, fresh_compiler, watch_graphs, watch_waits
from umt_hf.modeling.modeling_umt_video import UMTVideoForPreTraining
from umt_hf.training import stage1

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
COMMON = {"max_steps": 4, "save_steps": 2, "validation_data": None}


@pytest.mark.parametrize("name", ["int8_weight_only", "int8_dynamic"])
def test_stage_1_trains_and_goes_on_with_a_quantised_teacher(name, flags, tmp_path):
    stage1.main(flags(output_dir=tmp_path / "plain", **COMMON))
    stage1.main(flags(teacher_quantization=name, **COMMON))
    run = tmp_path / "run"
    losses = read_losses(run)
    assert losses == pytest.approx(read_losses(tmp_path / "plain"), rel=0.02)
    assert losses != read_losses(tmp_path / "plain")
    assert_complete(run, UMTVideoForPreTraining)
    assert "quantization" not in (run / "config.json").read_text()
    assert f"teacher_quantization: {name}" in (run / "run.yaml").read_text()
    stage1.main(flags(teacher_quantization=name, resume_from_checkpoint=run / "checkpoint-2", **COMMON))
    assert read_losses(run) == pytest.approx(losses, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "precision"), [("int8_weight_only", "no"), ("int8_dynamic", "no"), ("int8_dynamic", "bf16")]
)
def test_a_quantised_teacher_is_compiled_to_the_same_losses(name, precision, flags, tmp_path, monkeypatch):
    options = {**COMMON, "teacher_quantization": name, "mixed_precision": precision, "logging_steps": 4}
    waits = watch_waits(monkeypatch)
    stage1.main(flags(output_dir=tmp_path / "plain", **options))
    assert waits and not any(waits)
    graphs = watch_graphs(monkeypatch, stage1.Stage1)
    with fresh_compiler():
        stage1.main(flags(**COMPILED, **options))
    assert len(set(graphs)) == 1
    assert read_losses(tmp_path / "run") == pytest.approx(read_losses(tmp_path / "plain"), abs=2e-3)


def test_without_torchao_the_run_ends_in_one_line(flags, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torchao" else find(name, *rest)
    )
    with pytest.raises(ImportError, match=r"needs torchao, .*pip install 'umt_hf\[quantization\]'"):
        stage1.main(flags(teacher_quantization="int8_dynamic", max_steps=1))
