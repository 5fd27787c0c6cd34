"""One micro-batch of the loop: forward, backward and, where it is due, the optimizer's step."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from .gradients import take_step


class TrainedStage(Protocol):
    """What is trained."""

    model: nn.Module

    def forward_step(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Weighted losses by name."""


@dataclass
class MicroBatch:
    """What came out; all are scalars on the device.

    Args:
        losses: By name, with their sum as `loss`.
        norm: Norm of the gradients; `None` where gradients go on being accumulated.
        is_bad: Whether the step was left out, since its gradients are not finite; `None` likewise.
    """

    losses: dict[str, torch.Tensor]
    norm: torch.Tensor | None = None
    is_bad: torch.Tensor | None = None


def run_micro_batch(
    stage: TrainedStage,
    accelerator: Accelerator,
    optimizer: Any,
    batch: dict[str, Any],
    learning_rate: float,
    max_grad_norm: float | None,
) -> MicroBatch:
    """Train on a batch, as both stages and the benchmarks do; nothing in it waits for the device.

    Args:
        stage: Its model is prepared by the accelerator.
        accelerator: Of the run.
        optimizer: As the accelerator has prepared it; its groups have an `lr_scale`.
        batch: For `forward_step`.
        learning_rate: Of this step.
        max_grad_norm: Norm to which gradients are clipped; `None` = off.
    """
    with accelerator.accumulate(stage.model):
        # Set by hand, since a prepared scheduler would advance once per process.
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        done = MicroBatch(with_total(stage.forward_step(batch)))
        accelerator.backward(done.losses["loss"])
        if accelerator.sync_gradients:
            done.norm, done.is_bad = take_step(accelerator, stage.model, optimizer, max_grad_norm)
            optimizer.zero_grad()
    return done


def with_total(losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Losses by name, with their sum as `loss`."""
    return {"loss": torch.stack(list(losses.values())).sum(), **losses}
