"""How fast a run is, what it waits for, how much memory it takes, and how its processes differ."""

import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from accelerate import Accelerator

GIB = 2**30


def read_memory(device: torch.device) -> float:
    """GiB of a process: the most its accelerator held since the last call, or what it has in memory on a CPU."""
    if device.type == "cpu":
        return psutil.Process().memory_info().rss / GIB
    backend: Any = getattr(torch, device.type, None)
    if not hasattr(backend, "max_memory_allocated"):  # MPS says what it holds now
        return getattr(backend, "current_allocated_memory", lambda: float("nan"))() / GIB
    peak = backend.max_memory_allocated(device) / GIB
    backend.reset_peak_memory_stats(device)
    return peak


class StepClock:
    """Where the time between two log lines went, in all processes; saves and tests are left out.

    Args:
        accelerator: Of the run.
        peak_tflops: Of a device, for the share of it that is used; `None` = not known, and not given.
    """

    def __init__(self, accelerator: Accelerator, peak_tflops: float | None = None):
        self.accelerator, self.peak_tflops = accelerator, peak_tflops
        self.save_seconds: float | None = None
        self._restart()

    def _restart(self) -> None:
        self.started = time.perf_counter()
        self.waited, self.clips, self.steps = 0.0, 0, 0
        self.student_flops = self.teacher_flops = 0

    def watch(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Pass batches on and add up the time spent waiting for them."""
        iterator = iter(batches)
        while True:
            before = time.perf_counter()
            batch = next(iterator, None)
            self.waited += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    @contextmanager
    def paused(self) -> Generator[None]:
        """Leave out what is not training."""
        before = time.perf_counter()
        yield
        self.started += time.perf_counter() - before

    @contextmanager
    def saving(self) -> Generator[None]:
        """Leave out a save, and log its seconds by themselves."""
        before = time.perf_counter()
        with self.paused():
            yield
        self.save_seconds = time.perf_counter() - before

    def count(self, num_clips: int, flops: tuple[int, int] | None) -> None:
        """Add a micro-batch of this process; `flops` are those of student and teacher."""
        self.clips += num_clips
        if flops is not None:
            self.student_flops += flops[0]
            self.teacher_flops += flops[1]

    def flush(self, own_loss: float) -> dict[str, float]:
        """Rates since the last call; every process calls it, after it has waited for its device.

        Args:
            own_loss: Mean loss of this process.

        Returns:
            `clips_per_second` of all processes, `step_seconds`, `data_wait_share` (the mean of the processes) and
            `data_wait_share_max` (of the slowest), `loss_spread` (largest minus smallest mean loss of a process),
            `memory_gib` (the largest), after a save `save_seconds`, and where the peak of a device is known `mfu` and
            `mfu_with_teacher`, shares of it.
        """
        elapsed = time.perf_counter() - self.started
        flops = (self.student_flops / 1e12, self.teacher_flops / 1e12)  # such numbers fit into 32 bits
        own = [self.clips, elapsed, self.waited, own_loss, read_memory(self.accelerator.device), *flops]
        values = self.accelerator.gather(torch.tensor([own], device=self.accelerator.device)).cpu()
        clips, seconds, waited, losses, memory, student, teacher = values.unbind(1)
        shares = waited / seconds
        rates = {
            "clips_per_second": (clips / seconds).sum().item(),
            "step_seconds": elapsed / max(self.steps, 1),
            "data_wait_share": shares.mean().item(),
            "data_wait_share_max": shares.max().item(),
            "loss_spread": (losses.max() - losses.min()).item(),
            "memory_gib": memory.max().item(),
        }
        if self.peak_tflops is not None:
            used, with_teacher = student / seconds, (student + teacher) / seconds
            rates |= {
                "mfu": used.mean().item() / self.peak_tflops,
                "mfu_with_teacher": with_teacher.mean().item() / self.peak_tflops,
            }
        if self.save_seconds is not None:
            rates["save_seconds"], self.save_seconds = self.save_seconds, None
        self._restart()
        return rates
