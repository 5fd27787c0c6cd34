"""Models whose weights are divided over processes."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


@contextmanager
def gathered_model(model: nn.Module, accelerator: Accelerator) -> Generator[nn.Module]:
    """A model that each process holds all of, so that they may make other numbers of forwards and call any method.

    A forward of a model that FSDP2 or ZeRO-3 has divided waits for all processes. Others are given as they are.

    Args:
        model: As the accelerator has prepared it.
        accelerator: Of the run.

    Yields:
        The model itself; with ZeRO-3 a copy for reading.
    """
    if any(hasattr(weight, "ds_id") for weight in model.parameters()):
        yield _copy_undivided(accelerator.unwrap_model(model, keep_torch_compile=False), accelerator.device)
        return
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in parts:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield model
    for module in parts:
        plugin: Any = accelerator.state.fsdp_plugin
        module.reshard()
        module.set_reshard_after_forward(bool(plugin.reshard_after_forward), recurse=False)


def _copy_undivided(model: Any, device: torch.device) -> nn.Module:
    """A model with the weights that ZeRO-3 has divided; its own hooks would divide them again after each layer."""
    import deepspeed  # pyrefly: ignore[missing-import]  an extra

    copied = type(model)(model.config)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        weights = {name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items()}
    copied.load_state_dict(weights)
    return copied.to(device=device, dtype=model.dtype).train(model.training)


def get_local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a weight, which may be divided."""
    local: Any = getattr(tensor, "ds_tensor", tensor)
    return local.to_local() if hasattr(local, "to_local") else local


def settle_deepspeed(accelerator: Accelerator, batch_size: int, max_grad_norm: float | None) -> None:
    """Tell DeepSpeed what it would take from a loader or from its own file; without DeepSpeed nothing happens.

    Args:
        accelerator: Before it prepares a model.
        batch_size: Videos that a process takes at a time.
        max_grad_norm: Limit of the gradients' norm; `None` = no limit.
    """
    if (plugin := accelerator.state.deepspeed_plugin) is None:
        return
    plugin.deepspeed_config.update(
        train_micro_batch_size_per_gpu=batch_size,
        gradient_accumulation_steps=accelerator.gradient_accumulation_steps,
        gradient_clipping=max_grad_norm or 0.0,
    )
    # Transformers would divide whatever is loaded from now on, the teacher too, which nobody prepares.
    unset_hf_deepspeed_config()


def refuse_silent_ddp(accelerator: Accelerator) -> None:
    """Stop where weights were to be divided, and Accelerate would hold all of them in each process without a word.

    Raises:
        ValueError: If the run was started for FSDP or DeepSpeed, and runs otherwise.
    """
    for kind in ("FSDP", "DEEPSPEED"):
        is_asked = os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() in ("1", "true", "yes")
        taken = accelerator.distributed_type.value
        if is_asked and taken != kind:
            raise ValueError(
                f"The run was started for {kind}, but Accelerate takes {taken}: weights are divided over several "
                "processes with an accelerator each. Start it without, or where there are some."
            )
