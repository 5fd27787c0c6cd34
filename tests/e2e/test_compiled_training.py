"""Compiled stage 1: student and teacher, exports, resuming with and without it, one graph for each kind of batch.

Stage 2 is compiled in `test_stage2`.
"""

import json
import shutil
from pathlib import Path

import pytest
from torch._dynamo.utils import counters

from tests.e2e.runs import assert_complete, assert_same_weights, read_losses
from tests.e2e.steps import COMPILED, fresh_compiler, watch_graphs, watch_waits
from tests.processes import run_ranks
from umt_hf.modeling.modeling_umt_video import UMTVideoForPreTraining
from umt_hf.runs.folder import read_metrics
from umt_hf.training import stage1
from umt_hf.training.checkpointing import list_checkpoints, read_step


def cut_after(run: Path, step: int) -> None:
    for checkpoint in list_checkpoints(run):
        if read_step(checkpoint) > step:
            shutil.rmtree(checkpoint)


def test_student_and_teacher_are_compiled_once_and_the_run_goes_on_plain_and_compiled(flags, tmp_path, monkeypatch):
    """To the losses of a plain run; what is held out is computed as it is written."""
    common = {"max_steps": 6, "save_steps": 2, "eval_steps": 2, "per_device_eval_batch_size": 5}
    stage1.main(flags(output_dir=tmp_path / "plain", **common))
    graphs, run = watch_graphs(monkeypatch, stage1.Stage1), tmp_path / "run"
    with fresh_compiler():
        stage1.main(flags(**COMPILED, **common))
        assert counters["graph_break"] == {}
    assert set(graphs) == {2}
    for folder in (run, run / "checkpoint-2"):
        assert_complete(folder, UMTVideoForPreTraining)
    plain = read_losses(tmp_path / "plain")
    assert read_losses(run) == pytest.approx(plain, abs=1e-5)

    cut_after(run, 2)
    stage1.main(flags(resume_from_checkpoint="auto", torch_compile=False, **common))
    cut_after(run, 4)
    with fresh_compiler():
        stage1.main(flags(resume_from_checkpoint="auto", **COMPILED, **common))
    assert set(graphs[-2:]) == {2}
    assert read_losses(run) == pytest.approx(plain, abs=1e-5)
    assert_same_weights(run, tmp_path / "plain", atol=1e-4, rtol=1e-3)
    assert_complete(run, UMTVideoForPreTraining)


@pytest.mark.parametrize(
    "changes",
    [
        {"mixed_precision": "bf16", "gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True, "drop_path_rate": 0.2, "mask_type": "tube"},
        {"mask_type": "random", "max_grad_norm": 1.0},
    ],
    ids=["bf16 and accumulation", "checkpointing, depth, tubes", "random masks and clipping"],
)
def test_nothing_is_compiled_again_after_the_first_step(changes, flags, monkeypatch):
    graphs = watch_graphs(monkeypatch, stage1.Stage1)
    with fresh_compiler():
        stage1.main(flags(max_steps=4, validation_data=None, **COMPILED, **changes))
    assert graphs[0] >= 2 and len(set(graphs)) == 1


def build_from_launcher(monkeypatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", value)


def test_the_launchers_choice_compiles_the_teacher_as_well(flags, tmp_path, monkeypatch, caplog):
    graphs = watch_graphs(monkeypatch, stage1.Stage1)
    build_from_launcher(monkeypatch, BACKEND="AOT_EAGER")
    with fresh_compiler(), caplog.at_level("INFO"):
        stage1.main(flags(max_steps=2, validation_data=None))
    assert set(graphs) == {2} and "Student and teacher are compiled (backend aot_eager" in caplog.text
    assert_complete(tmp_path / "run", UMTVideoForPreTraining)


def test_an_unknown_backend_is_named_with_the_known_ones(flags):
    with pytest.raises(
        ValueError, match="torch_compile_backend='inducter' is not a backend .*: choose one of .*inductor"
    ):
        stage1.main(flags(torch_compile_backend="inducter", max_steps=1))


@pytest.mark.heavy
@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.heavy), 2])
def test_two_processes_train_compiled_as_plain(flags, tmp_path, accumulation):
    common = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2}
    common["gradient_accumulation_steps"] = accumulation
    run = tmp_path / "run"
    run_ranks(stage1.main, flags(output_dir=tmp_path / "plain", **common))
    run_ranks(stage1.main, flags(**COMPILED, **common))
    assert_complete(run, UMTVideoForPreTraining)
    assert read_losses(run) == pytest.approx(read_losses(tmp_path / "plain"), abs=1e-5)
    cut_after(run, 2)
    run_ranks(stage1.main, flags(resume_from_checkpoint="auto", **common))
    assert read_losses(run) == pytest.approx(read_losses(tmp_path / "plain"), abs=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_grad_norm": 1.0, "gradient_accumulation_steps": 2, "drop_path_rate": 0.1},
        {"mask_type": "random"},
        {"mixed_precision": "bf16"},
    ],
    ids=["plain", "clipped and accumulated", "random masks", "bf16"],
)
def test_no_step_waits_for_the_device_between_log_lines(changes, flags, monkeypatch):
    waits = watch_waits(monkeypatch)
    stage1.main(flags(max_steps=9, logging_steps=4, validation_data=None, **changes))
    assert len(waits) >= 6 and not any(waits)


def test_bad_steps_are_counted_exactly_at_log_lines_and_saves(flags, tmp_path, monkeypatch):
    """Each checkpoint has the count of its step, also where the log has not said so yet."""
    original = stage1.Stage1.forward_step
    calls = iter(range(1, 100))

    def forward_step(self, batch):
        losses = original(self, batch)
        return {name: loss * (float("nan") if next(calls) in (2, 3, 5) else 1.0) for name, loss in losses.items()}

    monkeypatch.setattr(stage1.Stage1, "forward_step", forward_step)
    stage1.main(flags(max_steps=6, logging_steps=6, save_steps=1, validation_data=None, max_nonfinite_steps=3))
    run = tmp_path / "run"
    saved = [
        json.loads((run / f"checkpoint-{step}" / "training_state" / "counters.json").read_text())
        for step in range(1, 7)
    ]
    assert [counters["nonfinite_steps"] for counters in saved] == [0, 1, 2, 2, 3, 3]
    assert [counters["nonfinite_in_a_row"] for counters in saved] == [0, 1, 2, 0, 1, 0]
    assert [line["nonfinite_steps"] for line in read_metrics(run / "metrics.jsonl")] == [3]
    for bad, before in ((2, 1), (3, 2), (5, 4)):
        assert_same_weights(run / f"checkpoint-{bad}", run / f"checkpoint-{before}")


@pytest.mark.parametrize("logging_steps", [1, 4])
def test_a_run_that_diverges_stops_at_the_next_log_line(logging_steps, flags, tmp_path, monkeypatch):
    original, steps = stage1.Stage1.forward_step, []

    def forward_step(self, batch):
        steps.append(len(steps) + 1)
        return {name: loss * (float("nan") if len(steps) > 1 else 1.0) for name, loss in original(self, batch).items()}

    monkeypatch.setattr(stage1.Stage1, "forward_step", forward_step)
    arguments = flags(max_steps=50, max_nonfinite_steps=3, logging_steps=logging_steps, validation_data=None)
    with pytest.raises(RuntimeError, match="^4 steps in a row had NaN or Inf gradients"):
        stage1.main(arguments)
    # The fourth bad step is the fifth.
    assert len(steps) == {1: 5, 4: 8}[logging_steps]
    assert not (tmp_path / "run" / "model.safetensors").exists()
