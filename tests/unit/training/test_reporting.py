"""What a run says of itself: rates of all processes, operations, epochs, a profile, one line for each interval."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from tests.processes import run_ranks
from umt_hf import UMTVideoConfig, UMTVideoForPreTraining
from umt_hf.training.order import StepShape, measure_epoch, plan_batches, plan_mixed_batches
from umt_hf.training.reporting.flops import FlopMeter, find_peak_tflops
from umt_hf.training.reporting.metric_meter import MetricMeter
from umt_hf.training.reporting.profiling import StepProfiler
from umt_hf.training.reporting.rates import StepClock, read_memory


def test_rates_are_of_the_time_between_lines_without_saves():
    clock = StepClock(Accelerator(cpu=True), peak_tflops=2e-6)
    with clock.saving():
        time.sleep(0.2)
    for batch in clock.watch([{"clips": 4}, {"clips": 4}]):
        time.sleep(0.05)
        clock.count(batch["clips"], (50_000, 25_000))
        clock.steps += 1
    rates = clock.flush(own_loss=1.5)
    assert 0.05 <= rates["step_seconds"] < 0.09
    assert rates["clips_per_second"] == pytest.approx(4 / rates["step_seconds"], rel=1e-3)
    assert rates["mfu"] == pytest.approx(50_000 / rates["step_seconds"] / 2e6, rel=1e-3)
    assert rates["mfu_with_teacher"] == pytest.approx(1.5 * rates["mfu"])
    assert rates["save_seconds"] >= 0.2 and rates["loss_spread"] == 0
    assert 0 <= rates["data_wait_share"] == rates["data_wait_share_max"] < 0.1
    assert rates["memory_gib"] == pytest.approx(read_memory(torch.device("cpu")), rel=0.1)
    clock.steps = 1
    assert "save_seconds" not in clock.flush(1.0) and "mfu" not in StepClock(clock.accelerator).flush(1.0)


def report_rates(folder: str) -> None:
    """Rank 1 waits for its data, and has another loss."""
    accelerator = Accelerator(cpu=True)
    clock, meter = StepClock(accelerator), MetricMeter(accelerator)
    rank = accelerator.process_index

    def give():
        for _ in range(3):
            time.sleep(0.2 * rank)
            yield {}

    for _ in clock.watch(give()):
        meter.update({"loss": torch.tensor(1.0 + rank)})
        clock.count(8, None)
        accelerator.wait_for_everyone()
    clock.steps = 3
    rates = clock.flush(meter.read_own("loss")) | meter.flush()
    (Path(folder) / str(rank)).write_text(json.dumps(rates))


def test_the_slowest_process_is_seen_by_all(tmp_path):
    run_ranks(report_rates, str(tmp_path))
    one, other = (json.loads((tmp_path / str(rank)).read_text()) for rank in range(2))
    assert one["loss"] == 1.5 and one["loss_spread"] == 1.0
    assert one["data_wait_share_max"] > 0.8 and 0.4 < one["data_wait_share"] < 0.7
    for name in ("data_wait_share", "data_wait_share_max", "memory_gib", "clips_per_second"):
        assert one[name] == pytest.approx(other[name])
    assert one["clips_per_second"] == pytest.approx(48 / one["step_seconds"] / 3, rel=0.1)


def test_operations_are_those_of_the_formula():
    """Linear layers, attention and the heads of a student at the visible tokens, and of a teacher beside it."""
    frames, side, patch, width, layers, mlp, channels, aligned = 4, 64, 16, 32, 3, 48, 12, 2
    config = UMTVideoConfig(
        num_frames=frames, image_size=side, patch_size=patch, hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=2, intermediate_size=mlp, num_aligned_layers=aligned, teacher_hidden_size=channels,
        position_embedding_frames=frames, position_embedding_image_size=side,
    )  # fmt: skip
    student, teacher = UMTVideoForPreTraining(config).train(), nn.Linear(3 * side * side, 5)
    batch, tokens, visible = 2, frames * (side // patch) ** 2, 16
    calls = []

    def forward_step(given):
        calls.append(torch.is_grad_enabled())
        pixels = given["pixel_values"]
        teacher(pixels.flatten(2))
        torch.rand(1)
        indices = torch.arange(visible).expand(batch, visible)
        features = torch.randn(aligned, batch, visible, channels)
        return {"loss": student(pixels, visible_indices=indices, teacher_features=features).loss}

    meter = FlopMeter(student, forward_step, Accelerator(cpu=True))
    given = {"pixel_values": torch.randn(batch, frames, 3, side, side)}
    state = torch.get_rng_state()
    counted = meter.measure(given)
    assert torch.equal(torch.get_rng_state(), state) and meter.measure(given) == counted and calls == [False]
    assert student.training and not student._forward_hooks and not student._forward_pre_hooks
    layer = 2 * visible * width * (4 * width + 2 * mlp) + 4 * visible**2 * width
    heads = aligned * 2 * visible * width * channels
    embedded = [2 * n * width * 3 * patch**2 for n in (tokens, visible)]
    assert counted[0] in [3 * batch * (layers * layer + heads + part) for part in embedded]
    assert counted[1] == 2 * batch * frames * 3 * side * side * 5
    assert meter.measure({"pixel_values": given["pixel_values"][:, :2].repeat(1, 2, 1, 1, 1)}) == counted


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H100 80GB HBM3", "fp16", 989.4),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
        ("NVIDIA A10G", "bf16", None),
        ("NVIDIA H200", "no", None),
        ("Some other device", "bf16", None),
    ],
)
def test_peaks_are_known_or_absent(name, precision, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert find_peak_tflops(torch.device("cuda"), precision, None) == peak
    assert find_peak_tflops(torch.device("cuda"), precision, 7.0) == 7.0
    assert find_peak_tflops(torch.device("cpu"), precision, None) is None


def test_epochs_are_passes_over_the_data():
    def take(plan, count):
        *_, last = (next(plan) for _ in range(count))
        return last.position

    shape = StepShape(1, 0, 2)
    assert measure_epoch(take(plan_batches(range(40), 4, 0, shape), 4), [40]) == pytest.approx(0.4)
    assert measure_epoch(take(plan_batches(range(40), 4, 0, shape), 12), [40]) == pytest.approx(1.2)
    tables, sizes = [range(16), range(24)], [4, 4]
    for count in (2, 6, 13):
        position = take(plan_mixed_batches(tables, sizes, 0, StepShape(), None), count)
        position = json.loads(json.dumps(position))
        assert measure_epoch(position, [16, 24]) == pytest.approx(count / 10)
    assert measure_epoch(None, [4]) is None and measure_epoch({"streamed_rows": 8}, None) is None


def test_a_profile_is_a_trace_of_three_steps(tmp_path):
    with StepProfiler(tmp_path, True, first_step=2, total_steps=20) as profiler:
        for step in range(3, 13):
            with torch.profiler.record_function(f"step {step}"):
                torch.ones(2).sum()
            profiler.finish_step()
    (trace,) = (tmp_path / "profile").iterdir()
    events = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert trace.name == "steps-8-10.json"
    assert {name for name in events if str(name).startswith("step ")} == {"step 8", "step 9", "step 10"}
    with pytest.raises(ValueError, match="--profile needs 8 steps, and the run has 4 left"):
        StepProfiler(tmp_path, True, first_step=16, total_steps=20)
    with StepProfiler(tmp_path, False, first_step=16, total_steps=20) as profiler:
        profiler.finish_step()


def test_the_mean_of_a_process_leaves_out_what_is_not_finite():
    meter = MetricMeter(SimpleNamespace(reduce=lambda tensor, reduction: tensor))
    assert meter.read_own("loss") != meter.read_own("loss")
    for value in (1.0, 3.0, float("nan")):
        meter.update({"loss": torch.tensor(value)})
    assert meter.read_own("loss") == 2.0 == meter.flush()["loss"]
