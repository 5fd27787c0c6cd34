"""Models whose weights are divided over processes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule


@contextmanager
def gathered_weights(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Let each process hold all weights, so that they may make other numbers of forwards, and call any method.

    A forward of a model that FSDP2 has divided waits for all processes. Without FSDP2 nothing happens.

    Args:
        model: As the accelerator has prepared it.
        accelerator: Of the run.
    """
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in parts:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in parts:
        plugin: Any = accelerator.state.fsdp_plugin
        module.reshard()
        module.set_reshard_after_forward(bool(plugin.reshard_after_forward), recurse=False)


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
