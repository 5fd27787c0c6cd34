"""Models whose weights are divided over processes."""

from collections.abc import Iterator
from contextlib import contextmanager

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
        module.reshard()
        is_resharded = bool(accelerator.state.fsdp_plugin.reshard_after_forward)
        module.set_reshard_after_forward(is_resharded, recurse=False)
