"""Stage 1 in several processes: the script's own loop, on a batch that stays, so that nothing is decoded beside it."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

import umt_hf
from benchmarks.processes import call_in_processes
from benchmarks.training.inputs import STAGE1, Inputs, build_flags
from umt_hf.runs.folder import read_metrics
from umt_hf.training import stage1, trainer

from .traffic import GATHERED, REDUCED, SCATTERED, Traffic, TrafficCounter

DDP, FSDP2 = KINDS = ("ddp", "fsdp2")
LAUNCH = Path(umt_hf.__file__).parent / "recipes" / "launch"
UNCOUNTED_STEPS = 1  # in the first step DDP puts its tensors in order


@dataclass(frozen=True)
class Job:
    """What each process is to do.

    Args:
        inputs: Files of the run.
        batch_size: Clips of a step and process.
        steps: That are timed, or counted; as many come before.
        folder: Where the run writes; all processes share it.
        kind: How weights are held: complete in each process, or divided.
        precision: As for `--mixed_precision`; `None` = bf16 on GPUs, else float32.
        counts: Whether bytes are counted, which slows a run down.
    """

    inputs: Inputs
    batch_size: int
    steps: int
    folder: Path
    kind: str = DDP
    precision: str | None = None
    counts: bool = False


@dataclass(frozen=True)
class Found:
    """What a process saw.

    Args:
        clips_per_second: Of all processes.
        losses: Mean losses of the log's lines.
        parameters: Of the student that are trained.
        root_parameters: Those outside embeddings and layers, which FSDP2 keeps from the forward to the backward pass.
        traffic: Bytes per step; `None` where they were not counted.
        small_bytes: Bytes per step of the run's own counters and norms.
    """

    clips_per_second: float
    losses: list[float]
    parameters: int
    root_parameters: int
    traffic: Traffic | None = None
    small_bytes: float = 0


def run(inputs: Inputs, num_processes: int, threads: int, **fields: Any) -> Found:
    """Run a job in new processes, and return what the first of them saw."""
    with tempfile.TemporaryDirectory() as folder:
        job = Job(inputs, folder=Path(folder), **fields)
        environment = build_environment(job.kind)
        return call_in_processes(run_job, job, num_processes, threads, environment)[0]


def build_environment(kind: str) -> dict[str, str]:
    """Variables by which `accelerate launch --config_file ...` says how weights are divided."""
    if kind == DDP:
        return {}
    arguments = launch_command_parser().parse_args(["--config_file", str(LAUNCH / f"{kind}.yaml"), "script.py"])
    arguments, *_ = _validate_launch_command(arguments)
    variables = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in variables.items() if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))}


def run_job(job: Job) -> Found:
    """Run a job in this process, one of those that the environment names."""
    if job.kind != DDP and not torch.cuda.is_available():
        # Accelerate divides weights on accelerators alone: here each process says that it has one.
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    counters: list[TrafficCounter] = []
    students: list[tuple[int, int]] = []
    with kept_batch(), counted_parameters(students), counted_traffic(job, counters):
        stage1.main(_build_arguments(job))
    lines = read_metrics(job.folder / "metrics.jsonl")
    traffic = None
    if job.counts:
        total = sum((counter.bytes for counter in counters[UNCOUNTED_STEPS:]), start=type(counters[0].bytes)())
        steps = len(counters) - UNCOUNTED_STEPS
        traffic = Traffic(*(total[kind] / steps for kind in (REDUCED, GATHERED, SCATTERED)))
    return Found(
        clips_per_second=lines[-1]["clips_per_second"],
        losses=[line["loss"] for line in lines],
        parameters=students[0][0],
        root_parameters=students[0][1],
        traffic=traffic,
        small_bytes=sum(counter.small_bytes for counter in counters) / max(len(counters), 1),
    )


def _build_arguments(job: Job) -> list[str]:
    fields = build_flags(STAGE1, job.inputs) | {
        "output_dir": job.folder,
        "per_device_train_batch_size": job.batch_size,
        "max_steps": 2 * job.steps,
        "logging_steps": 1000 if job.counts else job.steps,
        "dataloader_num_workers": 0,
        "mixed_precision": job.precision or ("bf16" if torch.cuda.is_available() else "no"),
    }
    return [text for name, value in fields.items() for text in (f"--{name}", str(value))]


@contextmanager
def kept_batch() -> Iterator[None]:
    """Let a run take its first batch again and again."""
    original = stage1.Stage1.build_batches

    def build_batches(stage: Any, *arguments: Any) -> Iterator[dict[str, Any]]:
        batch = next(original(stage, *arguments))
        while True:
            yield dict(batch)

    with mock.patch.object(stage1.Stage1, "build_batches", build_batches):
        yield


@contextmanager
def counted_parameters(counts: list[tuple[int, int]]) -> Iterator[None]:
    """Note the weights of the student before they are divided: all of them, and those of the root."""
    original = stage1.build_student

    def build_student(*arguments: Any) -> Any:
        student = original(*arguments)
        counts.append(count_parameters(student))
        return student

    with mock.patch.object(stage1, "build_student", build_student):
        yield


def count_parameters(student: torch.nn.Module) -> tuple[int, int]:
    """Weights that are trained: all of them, and those outside embeddings and layers."""
    sizes = {name: weight.numel() for name, weight in student.named_parameters() if weight.requires_grad}
    own = [size for name, size in sizes.items() if ".layers." not in name and ".embeddings." not in name]
    return sum(sizes.values()), sum(own)


@contextmanager
def counted_traffic(job: Job, counters: list[TrafficCounter]) -> Iterator[None]:
    """Add a counter for each step of a job that counts, but the last one, which is logged and saved."""
    original = trainer._take_batch

    def take_batch(batch: Any, stage: Any, accelerator: Any, optimizer: Any, schedule: Any, keeper: Any, *rest: Any):
        if keeper.state.step + 1 >= keeper.total_steps:
            return original(batch, stage, accelerator, optimizer, schedule, keeper, *rest)
        with TrafficCounter() as counter:
            ends_step = original(batch, stage, accelerator, optimizer, schedule, keeper, *rest)
        counters.append(counter)
        return ends_step

    if not job.counts:
        yield
        return
    with mock.patch.object(trainer, "_take_batch", take_batch):
        yield
