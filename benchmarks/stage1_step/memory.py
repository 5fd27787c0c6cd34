"""Peak memory of one variant, measured in a process of its own, where nothing else adds to the peak."""

import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.common import PhaseClock

from .steps import build_step
from .workload import SIZES, sample_pixel_values

NUM_STEPS = 2  # the optimizer's state is first there in the second


@dataclass(frozen=True)
class MemoryJob:
    """What to run."""

    variant: str
    size: str
    batch_size: int
    device: str
    dtype: str
    attn: str
    threads: int


def measure_peak_memory(job: MemoryJob) -> int:
    """Run two steps in a new process and give their peak memory in bytes.

    On CUDA it is what PyTorch allocated on the device. On CPU it is the resident memory of the process beyond what the
    imports took.

    Raises:
        RuntimeError: If the process fails, for want of memory for example.
    """
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.stage1_step.memory", json.dumps(asdict(job))],
        cwd=root,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise RuntimeError(f"Measuring the memory of {job} failed:\n{process.stderr}")
    return json.loads(process.stdout.splitlines()[-1])


def run_job(job: MemoryJob) -> int:
    """Run the steps in this process and give the peak memory in bytes."""
    torch.set_num_threads(job.threads)
    device = torch.device(job.device)
    size = SIZES[job.size]
    imports = read_peak_resident_memory()
    step = build_step(job.variant, size, device, getattr(torch, job.dtype), job.attn)
    pixel_values = sample_pixel_values(size, job.batch_size, device)
    for _ in range(NUM_STEPS):
        step.run(pixel_values, PhaseClock(device))
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return read_peak_resident_memory() - imports


def read_peak_resident_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's getrusage counts the peak of the parent process in
        return int(re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE)[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    print(run_job(MemoryJob(**json.loads(sys.argv[1]))))
