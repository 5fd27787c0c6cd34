"""What a variant keeps for its backward pass, and its peak memory in a separate process, where nothing adds to it."""

import json
import sys
from dataclasses import asdict, dataclass

import torch

from benchmarks.common import PhaseClock, read_peak_resident_memory, run_in_new_process

from .steps import TrainingStep, build_step
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
    return run_in_new_process("benchmarks.stage1_step.memory", asdict(job))


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


def measure_saved_bytes(step: TrainingStep, pixel_values: torch.Tensor) -> int:
    """Bytes that the forward pass of one clip keeps for the backward pass.

    What does not grow with the batch is left out: weights, and copies of them in another precision. So it is the
    difference between all clips and one clip less.

    Args:
        step: Not compiled.
        pixel_values: At least two clips.
    """
    more, fewer = (_count_saved_bytes(step, clips) for clips in (pixel_values, pixel_values[:-1]))
    return more - fewer


def _count_saved_bytes(step: TrainingStep, pixel_values: torch.Tensor) -> int:
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # kept, so that no other one gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step.compute_loss(pixel_values, PhaseClock(step.device))
    return sum(storage.nbytes() for storage in storages.values())


if __name__ == "__main__":
    print(run_job(MemoryJob(**json.loads(sys.argv[1]))))
