"""A run of a stage in a separate process: as its script runs it, or the step alone on batches that were read before.

Each is timed over the second half of its steps; the first half warms up, compiles and fills the loader.
"""

import importlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch._dynamo.utils import counters

from benchmarks.common import synchronize
from umt_hf.runs.folder import read_metrics
from umt_hf.training import trainer
from umt_hf.training.step.compilation import choose_compilation, compile_stage
from umt_hf.training.step.waits import WaitCounter

from .inputs import STAGE1, Inputs, build_flags

LOOP, STEP = "the script", "the step alone"
HELD_BATCHES = 8  # that the step alone takes in turn
COMPARED_STEPS = 4


@dataclass(frozen=True)
class Job:
    """What to run.

    Args:
        stage: "stage1" or "stage2".
        inputs: Its files.
        batch_size: Clips of a step.
        steps: That are timed; as many come before.
        workers: That read videos.
        backend: Of `torch.compile`; `None` = eager.
        what: `LOOP` or `STEP`.
        counts_waits: Whether operations that wait for a device are counted, which slows a run down.
    """

    stage: str
    inputs: Inputs
    batch_size: int
    steps: int
    workers: int
    backend: str | None = None
    what: str = LOOP
    counts_waits: bool = False


@dataclass(frozen=True)
class Found:
    """What a run showed.

    Args:
        clips_per_second: Over the timed steps.
        step_seconds: Mean over the timed steps.
        data_wait_share: Share of the time for which the loop waited for a batch.
        losses: Of the first steps.
        graphs: Compiled by the end of the first step, and of the last.
        graph_breaks: Places where a graph was cut.
        waits: Operations between two log lines that would read back from a device, by name.
        counted_steps: Steps over which these were counted.
    """

    clips_per_second: float
    step_seconds: float
    data_wait_share: float | None
    losses: list[float]
    graphs: tuple[int, int]
    graph_breaks: int
    waits: dict[str, int]
    counted_steps: int


def run_job(job: Job) -> Found:
    """Run a job in this process, which compiled nothing before."""
    script = importlib.import_module(f"umt_hf.training.{job.stage}")
    stage_class = script.Stage1 if job.stage == STAGE1 else script.Stage2
    timed: dict[str, float] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        watched_steps(stage_class) as (losses, graphs),
        counted_waits(job.counts_waits) as waits,
    ):
        arguments = _build_arguments(job, Path(folder))
        if job.what == STEP:
            with mock.patch.object(script, "train", lambda *given: timed.update(time_steps(job, *given))):
                script.main(arguments)
        else:
            script.main(arguments)
            timed = read_metrics(Path(folder) / "metrics.jsonl")[1]
    return Found(
        clips_per_second=timed["clips_per_second"],
        step_seconds=timed["step_seconds"],
        data_wait_share=timed.get("data_wait_share"),
        losses=[loss.item() for loss in losses[:COMPARED_STEPS]],
        graphs=(graphs[0], graphs[-1]),
        graph_breaks=sum(counters["graph_break"].values()),
        waits=dict(sum(waits, Counter())),
        counted_steps=len(waits),
    )


def _build_arguments(job: Job, folder: Path) -> list[str]:
    fields = build_flags(job.stage, job.inputs) | {
        "output_dir": folder,
        "per_device_train_batch_size": job.batch_size,
        "max_steps": 2 * job.steps,
        "logging_steps": job.steps,
        "dataloader_num_workers": job.workers,
        "mixed_precision": "bf16" if torch.cuda.is_available() else "no",
    }
    if job.backend is not None:
        fields["torch_compile_backend"] = job.backend
    return [text for name, value in fields.items() for text in (f"--{name}", str(value))]


@contextmanager
def watched_steps(stage_class: type) -> Iterator[tuple[list[torch.Tensor], list[int]]]:
    """Lists that get the loss of each step, on the device, and the graphs compiled by the end of its forward."""
    losses: list[torch.Tensor] = []
    graphs: list[int] = []
    original: Callable[..., dict[str, torch.Tensor]] = stage_class.forward_step

    def forward_step(stage: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        found = original(stage, batch)
        losses.append(torch.stack([loss.detach() for loss in found.values()]).sum())
        graphs.append(counters["stats"]["unique_graphs"])
        return found

    with mock.patch.object(stage_class, "forward_step", forward_step):
        yield losses, graphs


@contextmanager
def counted_waits(is_wanted: bool) -> Iterator[list[Counter]]:
    """A list that gets, for each step that ends at no log line, what it would wait for."""
    waits: list[Counter] = []
    original = trainer._take_batch

    def take_batch(batch: Any, stage: Any, accelerator: Any, optimizer: Any, schedule: Any, keeper: Any, *rest: Any):
        step = keeper.state.step + 1
        with WaitCounter() as counter:
            ends_step = original(batch, stage, accelerator, optimizer, schedule, keeper, *rest)
        if step % keeper.args.logging_steps and step < keeper.total_steps:
            waits.append(counter.counts)
        return ends_step

    if not is_wanted:
        yield waits
        return
    with mock.patch.object(trainer, "_take_batch", take_batch):
        yield waits


def time_steps(job: Job, stage: Any, args: Any, accelerator: Accelerator, schedule: Any, *_: Any) -> dict[str, float]:
    """What `train` gets, used for forward, backward and optimizer alone, on batches that are there already.

    No loader, no log, no guard against gradients that are not finite, no averages.
    """
    set_seed(args.seed, device_specific=True)
    optimizer = trainer.build_optimizer(stage.model, args, schedule.peak, accelerator.device)
    compile_stage(stage, choose_compilation(args, accelerator))
    stage.model, optimizer = accelerator.prepare(stage.model, optimizer)
    stage.model.train()
    held = list(islice(stage.build_batches(accelerator, None), min(HELD_BATCHES, 2 * job.steps)))
    started = 0.0
    for step, batch in enumerate(islice(cycle(held), 2 * job.steps)):
        if step == job.steps:
            synchronize(accelerator.device)
            started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = schedule(step) * group["lr_scale"]
        accelerator.backward(torch.stack(list(stage.forward_step(batch).values())).sum())
        optimizer.step()
        optimizer.zero_grad()
    synchronize(accelerator.device)
    seconds = (time.perf_counter() - started) / job.steps
    return {"clips_per_second": job.batch_size / seconds, "step_seconds": seconds}
