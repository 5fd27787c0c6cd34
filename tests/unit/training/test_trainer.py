"""The loop's smaller parts: non-finite steps with and without a loss scaler, averages, lengths of runs."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from umt_hf.runs.folder import MetricLog, read_metrics
from umt_hf.training.arguments import PretrainingArguments
from umt_hf.training.checkpointing import find_checkpoint, list_checkpoints
from umt_hf.training.order import RunShape
from umt_hf.training.reporting.metric_meter import MetricMeter
from umt_hf.training.trainer import TrainState, _step_if_finite, build_schedule, limit_nonfinite_steps


class FakeOptimizer:
    def __init__(self):
        self.steps = 0

    def step(self):
        self.steps += 1


def take_step(norm: float, has_scaler: bool, was_skipped: bool = False, limit: float | None = None):
    """One guarded step of an accelerator whose gradients have the given norm."""
    limits = []

    def clip_grad_norm_(parameters, max_norm):
        limits.append(max_norm)
        return torch.tensor(norm)

    accelerator = SimpleNamespace(
        clip_grad_norm_=clip_grad_norm_,
        scaler=object() if has_scaler else None,
        optimizer_step_was_skipped=was_skipped,
    )
    optimizer, state = FakeOptimizer(), TrainState()
    model = torch.nn.Linear(1, 1)
    _step_if_finite(accelerator, model, optimizer, limit, state, 20)
    return optimizer.steps, state.nonfinite_steps, limits[0]


def test_bad_gradients_do_not_reach_the_optimizer():
    assert take_step(1.0, has_scaler=False) == (1, 0, float("inf"))
    assert take_step(float("nan"), has_scaler=False)[:2] == (0, 1)
    assert take_step(float("inf"), has_scaler=False)[:2] == (0, 1)


def test_a_loss_scaler_sees_every_step():
    """Else it never lowers its scale: it skips the step by itself."""
    assert take_step(float("inf"), has_scaler=True, was_skipped=True)[:2] == (1, 1)
    assert take_step(1.0, has_scaler=True)[:2] == (1, 0)


def test_counters_are_json(tmp_path):
    """A state of an older version, whose counters are a pickle, is refused without opening it."""
    state = TrainState(
        step=3, position={"epoch": 1, "row": 8}, shape=RunShape(2, 1, [4], 9), nonfinite_steps=1, skipped_videos=2
    )
    state.save(tmp_path)
    loaded = TrainState()
    loaded.load(tmp_path)
    assert loaded == state and json.loads((tmp_path / "counters.json").read_text())["position"]["row"] == 8
    (tmp_path / "counters.json").unlink()
    (tmp_path / "custom_checkpoint_0.pkl").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(FileNotFoundError, match="no counters.json: it is from an older version; start anew"):
        TrainState().load(tmp_path)


def test_bad_steps_in_a_row():
    counted = TrainState()
    for step, is_finite in enumerate([False, False, True, False, False]):
        counted.count_step(is_finite, step, limit=2)
    assert (counted.nonfinite_steps, counted.nonfinite_in_a_row) == (4, 2)
    with pytest.raises(RuntimeError, match="^3 steps in a row had NaN or Inf gradients: lower learning_rate, "):
        counted.count_step(False, 5, limit=2)
    # Half of a short run, but for the loss scaler, which skips a few first steps as it should.
    assert limit_nonfinite_steps(20, 6, has_scaler=False) == 3
    assert limit_nonfinite_steps(20, 6, has_scaler=True) == limit_nonfinite_steps(20, 99, has_scaler=False) == 20


def test_clipping_uses_the_limit():
    assert take_step(1.0, has_scaler=False, limit=0.5)[2] == 0.5


def test_meter_weighs_and_leaves_out_what_is_not_finite():
    meter = MetricMeter(Accelerator(cpu=True))
    meter.update({"loss": torch.tensor(1.0)}, 3)
    meter.update({"loss": torch.tensor(5.0)}, 1)
    meter.update({"loss": torch.tensor(float("nan"))}, 10)
    assert meter.flush() == {"loss": pytest.approx(2.0)}
    assert meter.flush() == {}
    meter.update({"loss": torch.tensor(float("inf"))})
    value = meter.flush()["loss"]
    assert value != value


def test_lengths_in_epochs_and_steps():
    args = PretrainingArguments(
        num_train_epochs=3, warmup_epochs=1, gradient_accumulation_steps=2, per_device_train_batch_size=8
    )
    schedule = build_schedule(args, steps_per_epoch=5, num_processes=4, repeated_augmentation=2)
    assert (schedule.total_steps, schedule.warmup_steps) == (15, 5)
    assert schedule.peak == pytest.approx(1.5e-4 * 8 * 4 * 2 * 2 / 256)
    args = PretrainingArguments(max_steps=7, warmup_steps=3, scale_learning_rate=False)
    schedule = build_schedule(args, None, 1)
    assert (schedule.total_steps, schedule.warmup_steps, schedule.peak) == (7, 3, 1.5e-4)
    with pytest.raises(ValueError, match="no steps"):
        build_schedule(PretrainingArguments(num_train_epochs=0.1), 5, 1)
    with pytest.raises(ValueError, match="warmup_steps"):
        build_schedule(PretrainingArguments(max_steps=7), None, 1)


def test_log_is_cut_back_to_the_checkpoint_and_forgives_a_cut_line(tmp_path):
    log = MetricLog(tmp_path / "metrics.jsonl")
    for step in range(1, 5):
        log.write(step, {"loss": 1.0 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    MetricLog(tmp_path / "metrics.jsonl", last_step=2)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    MetricLog(tmp_path / "metrics.jsonl")
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_only_complete_checkpoints_count(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-11.unfinished"):
        (tmp_path / name / "training_state").mkdir(parents=True)
        (tmp_path / name / "model.safetensors").touch()
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-13" / "training_state").mkdir(parents=True)  # its weights went first
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert find_checkpoint("auto", tmp_path).name == "checkpoint-10"
    assert find_checkpoint("auto", tmp_path / "new") is None
    assert find_checkpoint(str(tmp_path / "checkpoint-9"), tmp_path).name == "checkpoint-9"
    for name, reason in (("12", "has no training_state"), ("13", "has no weights"), ("11.unfinished", "killed run")):
        with pytest.raises(FileNotFoundError, match=f"checkpoint-{name} is not a complete checkpoint: .*{reason}"):
            find_checkpoint(str(tmp_path / f"checkpoint-{name}"), tmp_path)
    with pytest.raises(FileExistsError, match="checkpoint-10"):
        find_checkpoint(None, tmp_path)
