"""Steps of stage 1 in a process of their own, which starts with its number of threads as `umt-hf` starts a run."""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass

import torch

from benchmarks.common import PhaseClock, run_in_new_process
from benchmarks.stage1_step.steps import build_step
from benchmarks.stage1_step.workload import SIZES, sample_pixel_values


@dataclass(frozen=True)
class ThreadJob:
    """What to run."""

    size: str
    batch_size: int
    steps: int
    threads: int


@dataclass(frozen=True)
class Steps:
    """What the steps took after a first one, in seconds; processor time is that of all threads, user and system."""

    clips: int
    wall_seconds: float
    cpu_seconds: float


def measure_steps(job: ThreadJob) -> Steps:
    """Run the steps in a new process.

    Raises:
        RuntimeError: If the process fails.
    """
    # As Accelerate's launcher sets it, before PyTorch starts its threads.
    environment = {"OMP_NUM_THREADS": str(job.threads)}
    return Steps(**run_in_new_process("benchmarks.threads.steps", asdict(job), environment))


def run_job(job: ThreadJob) -> Steps:
    """Run the steps in this process.

    Raises:
        RuntimeError: If it has another number of threads.
    """
    if torch.get_num_threads() != job.threads:
        raise RuntimeError(f"The process has {torch.get_num_threads()} threads, not {job.threads}.")
    size, device = SIZES[job.size], torch.device("cpu")
    step = build_step("umt_hf", size, device, torch.float32, "sdpa")
    pixel_values = sample_pixel_values(size, job.batch_size, device)
    step.run(pixel_values, PhaseClock(device))  # the optimizer makes its state, the threads start
    began, before = time.perf_counter(), os.times()
    for _ in range(job.steps):
        step.run(pixel_values, PhaseClock(device))
    wall, after = time.perf_counter() - began, os.times()
    cpu = after.user - before.user + after.system - before.system
    return Steps(job.batch_size * job.steps, wall, cpu)


if __name__ == "__main__":
    print(json.dumps(asdict(run_job(ThreadJob(**json.loads(sys.argv[1]))))))
