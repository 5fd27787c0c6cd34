"""Whether training steps wait for the device: each such wait leaves it without work.

For tests and benchmarks. On a CPU nothing waits, but the calls that would do so on an accelerator can be counted.
"""

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.is_nonzero", "aten.masked_select")


class WaitCounter(TorchDispatchMode):
    """Counts, by name, the operations called within that read values back from an accelerator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and call as usual."""
        name = str(func).rsplit(".", 1)[0]
        if name in WAITING:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def errors_at_waits(device: torch.device) -> Generator[None]:
    """Let an operation that waits for a CUDA device raise an error; on other devices nothing changes.

    Args:
        device: Of the run.

    Raises:
        RuntimeError: By PyTorch, where the code within waits.
    """
    if device.type != "cuda":
        yield
        return
    former = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(former)
