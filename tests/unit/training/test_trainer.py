"""The loop's smaller parts: non-finite steps with and without a loss scaler, averages, lengths of runs."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from umt_hf.runs.folder import MetricLog, read_metrics
from umt_hf.training.arguments import PretrainingArguments
from umt_hf.training.checkpointing import find_checkpoint, list_checkpoints
from umt_hf.training.order import RunShape
from umt_hf.training.reporting.metric_meter import MetricMeter
from umt_hf.training.step.gradients import measure_gradients, take_step
from umt_hf.training.step.guard import MAX_UNREAD_STEPS, StepGuard
from umt_hf.training.trainer import (
    TrainState,
    build_schedule,
    limit_nonfinite_steps,
)


class FakeScaler:
    """What a loss scaler leaves of a step to see: that it was asked."""


def take_step_with(gradient: float, limit: float | None = None, fused: bool = True, has_scaler: bool = False):
    """One guarded step of AdamW after a good one; what it changed, its norm and whether it was bad."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5, fused=fused)
    accelerator = Accelerator(cpu=True)
    scaled = SimpleNamespace(
        scaler=FakeScaler() if has_scaler else None,
        distributed_type=accelerator.distributed_type,
        optimizer_step_was_skipped=False,
        unscale_gradients=lambda: None,
        clip_grad_norm_=accelerator.clip_grad_norm_,
    )
    for value in (1.0, gradient):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        before = copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]])
        norm, is_bad = take_step(scaled, model, optimizer, limit)
    after = [model.state_dict(), optimizer.state_dict()["state"]]
    changed = not all(torch.equal(a, b) for a, b in zip(_flatten(before), _flatten(after), strict=True))
    assert not hasattr(optimizer, "found_inf")
    return changed, float(norm), bool(is_bad), model


def _flatten(values) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    return [
        tensor for value in (values.values() if isinstance(values, dict) else values) for tensor in _flatten(value)
    ]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("gradient", [float("nan"), float("inf"), -float("inf")])
def test_bad_gradients_change_neither_weights_nor_moments(gradient, fused):
    changed, _, is_bad, _ = take_step_with(gradient, fused=fused)
    assert not changed and is_bad


def test_good_gradients_take_the_same_step_as_without_the_guard():
    changed, norm, is_bad, model = take_step_with(2.0)
    assert changed and not is_bad and norm == pytest.approx(2.0 * 8**0.5)
    torch.manual_seed(0)
    plain = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=0.5, fused=True)
    for value in (1.0, 2.0):
        for parameter in plain.parameters():
            parameter.grad = torch.full_like(parameter, value)
        optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), plain.parameters(), strict=True))


def test_a_loss_scaler_sees_every_step():
    """Else it never lowers its scale: it skips the step by itself."""
    changed, _, is_bad, _ = take_step_with(float("inf"), has_scaler=True)
    assert changed and is_bad  # there was no real one here to skip it
    assert take_step_with(1.0, has_scaler=True)[:3:2] == (True, False)


def test_gradients_are_scaled_where_a_limit_is_set_alone(monkeypatch):
    limits = []
    accelerator = SimpleNamespace(
        distributed_type=Accelerator(cpu=True).distributed_type,
        unscale_gradients=lambda: None,
        clip_grad_norm_=lambda parameters, limit: limits.append(limit) or torch.tensor(1.0),
    )
    model = torch.nn.Linear(1, 1)
    model.weight.grad, model.bias.grad = torch.tensor([[3.0]]), torch.tensor([4.0])
    assert float(measure_gradients(accelerator, model, None)) == 5.0 and limits == []
    measure_gradients(accelerator, model, 0.5)
    assert limits == [0.5]
    accelerator.distributed_type = DistributedType.FSDP  # each process has a part: Accelerate adds up
    measure_gradients(accelerator, model, None)
    assert limits == [0.5, float("inf")]


def test_a_guard_counts_in_order_when_it_is_read():
    state = TrainState()
    guard = StepGuard(state, limit=2)
    for step, is_bad in enumerate([True, False, True, True]):
        guard.add(step, torch.tensor(is_bad))
    assert state.nonfinite_steps == 0
    guard.read()
    assert (state.nonfinite_steps, state.nonfinite_in_a_row) == (3, 2)
    guard.add(4, torch.tensor(True))
    with pytest.raises(RuntimeError, match="^3 steps in a row had NaN or Inf gradients"):
        guard.read()
    # Without log lines and saves it does not grow for ever.
    guard = StepGuard(TrainState(), limit=2)
    for step in range(MAX_UNREAD_STEPS):
        guard.add(step, torch.tensor(step == 5))
    assert not guard.unread and guard.state.nonfinite_steps == 1


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
    *_, model = take_step_with(1.0, limit=0.5)
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    assert float(norm) == pytest.approx(0.5, abs=1e-5)


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
