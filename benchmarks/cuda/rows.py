"""The rows, in order of value."""

import importlib.util
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from transformers import VideoMAEModel

from benchmarks.common import PhaseClock, summarize, synchronize
from benchmarks.stage1_step.run import check_agreement, measure_matmul_rate
from benchmarks.stage1_step.steps import PLAIN, UMT, VIDEOMAE, UMTStep, build_step
from benchmarks.stage1_step.workload import (
    SIZES,
    build_student_config,
    build_videomae_config,
    sample_pixel_values,
)
from benchmarks.stage2.workload import SIZES_OF_PAIRS, Stage2Step, sample_pairs
from umt_hf.modeling.modeling_umt_video import UMTVideoModel
from umt_hf.training.reporting.flops import find_peak_tflops
from umt_hf.training.step.waits import WaitCounter

from .engine import measure_engine
from .input import measure_input
from .limits import NotHere, Row

WARM_UP_STEPS = 3
MAX_STRETCHES = 8
TOP_OPERATIONS = 15
NO_CONTEXT = nullcontext


@dataclass(frozen=True)
class Setup:
    """Where rows run, and how much of it.

    Args:
        device: Device of all rows.
        is_tiny: Whether the smallest models stand in for all, to try the script.
        compiler: Backend of `torch.compile`.
        seconds: For which steps are timed in each row.
    """

    device: torch.device
    is_tiny: bool
    compiler: str
    seconds: float

    def choose(self, name: str, batch_size: int) -> tuple[str, int]:
        """Name of a size and clips in a step."""
        return ("tiny", 2) if self.is_tiny else (name, batch_size)


def list_rows(setup: Setup) -> list[Row]:
    """All rows; limits are for an H200, where compiling 24 layers and their backward pass may take two minutes."""
    eager = partial(measure_stage1, setup, variant=UMT)
    compiled = partial(measure_stage1, setup, variant=UMT, compiler=setup.compiler)
    cudnn = partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION)
    rows = [
        Row("b16: umt_hf and plain agree", 40, partial(measure_agreement, setup)),
        Row("l16, 64 clips: umt_hf", 40, partial(eager, "l16", 64)),
        Row("l16, 64 clips: plain", 40, partial(measure_stage1, setup, "l16", 64, variant=PLAIN)),
        Row("l16, 64 clips: umt_hf, compiled", 180, partial(compiled, "l16", 64)),
        Row(
            "l16, 64 clips: umt_hf, compiled, fp8 teacher",
            150,
            partial(compiled, "l16", 64, quantization="fp8_dynamic"),
        ),
        Row("b16, 64 clips: umt_hf", 30, partial(eager, "b16", 64)),
        Row("b16, 64 clips: plain", 30, partial(measure_stage1, setup, "b16", 64, variant=PLAIN)),
        Row("b16, 64 clips: umt_hf, compiled", 120, partial(compiled, "b16", 64)),
        Row(
            "b16, 64 clips: umt_hf, compiled, fp8 teacher",
            90,
            partial(compiled, "b16", 64, quantization="fp8_dynamic"),
        ),
        Row("b16, 32 clips: umt_hf", 20, partial(eager, "b16", 32)),
        Row("l16, 64 clips: umt_hf, attention of cuDNN", 30, partial(eager, "l16", 64, context=cudnn)),
        Row("b16, 4 frames, 64 pairs: stage 2", 40, partial(measure_stage2, setup, "b16", 64)),
        Row("l16, 4 frames, 64 pairs: stage 2", 40, partial(measure_stage2, setup, "l16", 64)),
        Row("b16, features of 64 clips of 8 frames: umt_hf", 20, partial(measure_features, setup, UMT, 64, 8)),
        Row("b16, features of 64 clips of 8 frames: videomae", 20, partial(measure_features, setup, VIDEOMAE, 64, 8)),
        Row("b16, features of 16 clips of 32 frames: umt_hf", 20, partial(measure_features, setup, UMT, 16, 32)),
        Row("b16, features of files through the engine", 60, partial(measure_files, setup)),
        Row("files to batches on the device", 60, partial(measure_input, setup.device, setup.is_tiny, setup.seconds)),
        Row("b16, 64 clips: videomae", 30, partial(measure_stage1, setup, "b16", 64, variant=VIDEOMAE)),
        Row(
            "b16, 4 frames, 64 pairs: stage 2, compiled",
            150,
            partial(measure_stage2, setup, "b16", 64, setup.compiler),
        ),
    ]
    # A machine on which the script is only tried has other work, too.
    return [replace(row, seconds=10 * row.seconds) for row in rows] if setup.is_tiny else rows


def measure_agreement(setup: Setup) -> dict[str, Any]:
    """Whether the compared steps compute the same; raises an error if they do not."""
    name, batch_size = setup.choose("b16", 4)
    size = SIZES[name]
    umt, plain = (build_step(variant, size, setup.device, torch.bfloat16, "sdpa") for variant in (UMT, PLAIN))
    plain.load_weights(umt)
    return {"agreement": check_agreement(umt, plain, sample_pixel_values(size, batch_size, setup.device))}


def measure_stage1(
    setup: Setup,
    name: str,
    batch_size: int,
    variant: str,
    compiler: str | None = None,
    quantization: str | None = None,
    context: Callable[[], AbstractContextManager] = NO_CONTEXT,
) -> dict[str, Any]:
    """Clips per second of a variant in bfloat16, and what stands in its way."""
    name, batch_size = setup.choose(name, batch_size)
    size, dtype = SIZES[name], torch.bfloat16
    if quantization is not None:
        quantization = _choose_quantization(setup, quantization)
    if variant == UMT:
        torch.manual_seed(0)
        step: Any = UMTStep(size, setup.device, dtype, "sdpa", compiler, quantization)
    else:
        step = build_step(variant, size, setup.device, dtype, "sdpa")
    pixel_values, clock = sample_pixel_values(size, batch_size, setup.device), PhaseClock(setup.device)
    with context():
        found = measure_step(setup, lambda: step.run(pixel_values, clock), batch_size, compiler)
    phases = clock.compute_phase_seconds()
    shares = {phase: seconds / sum(phases.values()) for phase, seconds in phases.items()}
    flops = step.flops_of_student + step.flops_of_teacher
    return (
        found
        | _relate(setup, flops, found["clips_per_second"]["median"])
        | {
            "quantization": quantization,
            "phase_shares": shares,
        }
    )


def measure_stage2(setup: Setup, name: str, batch_size: int, compiler: str | None = None) -> dict[str, Any]:
    """Pairs per second with all four losses."""
    name, batch_size = setup.choose(name, batch_size)
    step = Stage2Step(name, setup.device, torch.bfloat16, compiler)
    batch = sample_pairs(SIZES_OF_PAIRS[name], batch_size, setup.device)
    student, teacher = step.count_flops(batch)
    found = measure_step(setup, lambda: step.run(batch), batch_size, compiler)
    rate = found["clips_per_second"]["median"]
    return (
        found
        | _relate(setup, (student + teacher) // batch_size, rate)
        | {"teacher_share": teacher / (student + teacher)}
    )


def measure_features(setup: Setup, variant: str, batch_size: int, num_frames: int) -> dict[str, Any]:
    """Clips per second of a forward pass over all tokens in bfloat16."""
    name, batch_size = setup.choose("b16", batch_size)
    size = SIZES[name]
    if variant == UMT:
        config: Any = build_student_config(size)
        config.num_frames = config.position_embedding_frames = num_frames
        model: Any = UMTVideoModel._from_config(config, attn_implementation="sdpa")
    else:
        config = build_videomae_config(size)
        config.num_frames = num_frames
        model = VideoMAEModel._from_config(config, attn_implementation="sdpa")
    model = model.to(setup.device, torch.bfloat16).eval()
    clips = torch.randn(batch_size, num_frames, 3, size.student.image_size, size.student.image_size)
    clips = clips.to(setup.device, torch.bfloat16)

    def run() -> None:
        with torch.inference_mode():
            model(clips)

    found = measure_step(setup, run, batch_size, None)
    patches = num_frames * size.student.patches
    flops = size.student.count_patch_flops(patches) + size.student.count_layers_flops(patches)
    return found | _relate(setup, flops, found["clips_per_second"]["median"])


def measure_files(setup: Setup) -> dict[str, Any]:
    """Windows per second of `save_features`, and how busy the device is; on CUDA in bfloat16."""
    name, _ = setup.choose("b16", 1)
    return measure_engine(SIZES[name], setup.is_tiny)


def measure_step(setup: Setup, run: Callable[[], Any], batch_size: int, compiler: str | None) -> dict[str, Any]:
    """Time something that is repeated, with its first call, its waits, graphs, memory and costliest operations."""
    device = setup.device
    counters.clear()
    first_seconds = _time(device, run, 1)
    for _ in range(WARM_UP_STEPS - 1):
        run()
    graphs = counters["stats"]["unique_graphs"]
    waits = count_waits(device, run, is_compiled=compiler is not None)
    seconds = _time(device, run, 2) / 2
    steps = max(1, round(setup.seconds / MAX_STRETCHES / seconds))
    samples = [_time(device, run, steps) / steps for _ in range(MAX_STRETCHES)]
    return {
        "clips_per_second": summarize(batch_size / sample for sample in samples),
        "batch_size": batch_size,
        "first_step_seconds": first_seconds,
        "waits_per_step": waits,
        "compiler": compiler,
        "graphs": graphs,
        "graph_breaks": sum(counters["graph_break"].values()),
        "recompiles": counters["stats"]["unique_graphs"] - graphs,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "top_operations": list_top_operations(device, run),
    }


def count_waits(device: torch.device, run: Callable[[], Any], is_compiled: bool) -> int | None:
    """How often the host waits for the device in a call; `None` where nothing can say so."""
    if device.type == "cuda":
        former = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run()
        finally:
            torch.cuda.set_sync_debug_mode(former)
        return sum("synchroniz" in str(warning.message) for warning in caught)
    if is_compiled:
        return None
    with WaitCounter() as counter:
        run()
    return sum(counter.counts.values())


def list_top_operations(device: torch.device, run: Callable[[], Any]) -> list[dict[str, Any]]:
    """The operations, or kernels on CUDA, that take most time in a call, with their shares and counts."""
    activities = [ProfilerActivity.CUDA] if device.type == "cuda" else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        run()
        synchronize(device)
    kind = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, kind))
    total = sum(getattr(event, kind) for event in events) or 1
    return [
        {"name": event.key[:120], "share": getattr(event, kind) / total, "count": event.count}
        for event in events[:TOP_OPERATIONS]
    ]


def _time(device: torch.device, run: Callable[[], Any], count: int) -> float:
    synchronize(device)
    began = time.perf_counter()
    for _ in range(count):
        run()
    synchronize(device)
    return time.perf_counter() - began


def _relate(setup: Setup, flops_per_clip: int, rate: float) -> dict[str, Any]:
    """Shares of what a large matrix product reaches here, and of the maker's figure."""
    ceiling = measure_matmul_rate(setup.device, torch.bfloat16, min(0.3, setup.seconds))
    peak = find_peak_tflops(setup.device, "bf16", None)
    return {
        "flops_per_clip": flops_per_clip,
        "ceiling_flops_per_second": ceiling,
        "ceiling_fraction": flops_per_clip * rate / ceiling,
        "peak_fraction": None if peak is None else flops_per_clip * rate / (peak * 1e12),
    }


def _choose_quantization(setup: Setup, name: str) -> str:
    """As asked for; on a CPU, where the script is only tried, the like of it that runs there."""
    if importlib.util.find_spec("torchao") is None:
        raise NotHere("torchao is not installed")
    return name if setup.device.type == "cuda" else "int8_dynamic"
