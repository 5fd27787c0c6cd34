"""Floating-point operations of a step, and how many a device can do."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

# Dense matrix products in 16 bits, in 10^12 operations per second, from the makers' data sheets; the first part of a
# device's name that fits counts. Without sparsity: twice these numbers are advertised.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "A100": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L4": 121.0,
    "MI300X": 1307.4,
}
# PyTorch counts attention on GPUs alone.
OTHER_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
    )
}
BACKWARD_SHARE = 2  # a backward pass has two products for each one of the forward pass


def find_peak_tflops(device: torch.device, precision: str, given: float | None) -> float | None:
    """What a device can do at most in a run's precision, in 10^12 operations per second.

    Args:
        device: Of this process.
        precision: Of Accelerate, such as "bf16".
        given: As set by `--peak_tflops`; wins.

    Returns:
        `None` where it is not known: on a CPU, for other devices, and in full precision.
    """
    if given is not None or device.type != "cuda" or precision not in ("bf16", "fp16"):
        return given
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    if "MIG" in words:  # a part of a device
        return None
    return next((peak for name, peak in PEAK_TFLOPS.items() if set(name.split()) <= set(words)), None)


class FlopMeter:
    """Operations of a micro-batch, counted once for each shape of clips by a forward pass beside the training.

    Args:
        model: Of the student, as the accelerator has prepared it.
        forward_step: Of the stage: teacher, student and losses.
        accelerator: Of the run.
    """

    def __init__(self, model: nn.Module, forward_step: Callable[[dict[str, Any]], Any], accelerator: Accelerator):
        self.model, self.forward_step, self.accelerator = model, forward_step, accelerator
        self.counts: dict[tuple[int, ...], tuple[int, int]] = {}

    def measure(self, batch: dict[str, Any]) -> tuple[int, int]:
        """Operations of the student (forward and backward) and of all else, the teacher above all.

        What is computed twice to save memory counts once. All processes call it alike.
        """
        shape = tuple(batch["pixel_values"].shape)
        if shape not in self.counts:
            self.counts[shape] = self._count(batch)
        return self.counts[shape]

    def _count(self, batch: dict[str, Any]) -> tuple[int, int]:
        of_student: list[int] = []
        counter = FlopCounterMode(display=False, custom_mapping=OTHER_ATTENTION)
        hooks = [
            self.model.register_forward_pre_hook(lambda *_: of_student.append(-counter.get_total_flops())),
            self.model.register_forward_hook(lambda *_: of_student.append(counter.get_total_flops())),
        ]
        device = self.accelerator.device
        devices = [device] if device.type != "cpu" else []
        try:
            # A resumed run counts anew: its dropout must not depend on that.
            with (
                torch.random.fork_rng(devices=devices, device_type=device.type),
                torch.no_grad(),
                torch.compiler.set_stance("force_eager"),
                self.accelerator.autocast(),
                counter,
            ):
                self.forward_step(batch)
        finally:
            for hook in hooks:
                hook.remove()
        student = sum(of_student)
        return (1 + BACKWARD_SHARE) * student, counter.get_total_flops() - student
