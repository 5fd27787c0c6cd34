"""Optimizer steps that leave bad gradients out without waiting for the device.

A step whose gradients are NaN or infinite changes neither weights nor moments. The device decides that by itself; the
run reads what it decided where it waits anyway: at log lines and saves.
"""

import math
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

# They measure or clip gradients by themselves, or Accelerate adds up the norms of their parts.
ENGINES = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.XLA, DistributedType.MEGATRON_LM)


def measure_gradients(accelerator: Accelerator, model: nn.Module, max_grad_norm: float | None) -> torch.Tensor:
    """Norm of all gradients, a scalar on the device; they are scaled only where a limit is set.

    Args:
        accelerator: Of the run.
        model: As the accelerator has prepared it.
        max_grad_norm: Norm to which gradients are clipped; `None` = off.
    """
    if max_grad_norm or accelerator.distributed_type in ENGINES:
        norm: Any = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
    else:
        accelerator.unscale_gradients()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if not isinstance(norm, torch.Tensor):  # DeepSpeed may give a number, or nothing
        norm = torch.tensor(float(norm or 0.0))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def take_step(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, max_grad_norm: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clip and step, unless the gradients are not finite (on all processes alike).

    Args:
        accelerator: Of the run.
        model: As the accelerator has prepared it.
        optimizer: As the accelerator has prepared it.
        max_grad_norm: Norm to which gradients are clipped; `None` = off.

    Returns:
        Norm of the gradients, and whether the step was left out, both scalars on the device.
    """
    norm = measure_gradients(accelerator, model, max_grad_norm)
    is_bad = ~torch.isfinite(norm)
    own = getattr(optimizer, "optimizer", optimizer)  # inside Accelerate's
    if accelerator.scaler is not None or accelerator.distributed_type == DistributedType.DEEPSPEED:
        # They must see every step: they leave out bad ones by themselves, and lower their scale.
        optimizer.step()
        is_bad = is_bad | accelerator.optimizer_step_was_skipped
    elif all(group.get("fused") for group in own.param_groups):
        # The place where a loss scaler says the same: the fused kernels read it on the device.
        own.found_inf = is_bad.float()
        optimizer.step()
        del own.found_inf
    elif not bool(is_bad):  # other kernels can only be left uncalled
        optimizer.step()
    return norm, is_bad
