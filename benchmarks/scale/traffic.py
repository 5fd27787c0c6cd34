"""What processes send each other in a step, counted where PyTorch hands it to its communication library."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

REDUCED, GATHERED, SCATTERED = "all-reduce", "all-gather", "reduce-scatter"
# Operation of PyTorch -> what it is, and which of its arguments is the complete tensor.
COLLECTIVES = {
    "c10d.allreduce_": (REDUCED, 0),
    "c10d.allreduce_coalesced_": (REDUCED, 0),
    "c10d._allgather_base_": (GATHERED, 0),
    "c10d.allgather_": (GATHERED, 0),
    "c10d.allgather_into_tensor_coalesced_": (GATHERED, 0),
    "c10d._reduce_scatter_base_": (SCATTERED, 1),
    "c10d.reduce_scatter_": (SCATTERED, 1),
    "c10d.reduce_scatter_tensor_coalesced_": (SCATTERED, 1),
}
SMALL_BYTES = 256  # counters, norms and flags of the run itself


class TrafficCounter(TorchDispatchMode):
    """Adds up, by kind, the bytes of the complete tensors that collectives within reduce, gather or scatter.

    What falls short of `SMALL_BYTES` is counted apart, as it does not grow with the model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.small_bytes = 0
        self.others: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and call as usual."""
        name = str(func).rsplit(".", 1)[0]
        if name in COLLECTIVES:
            kind, place = COLLECTIVES[name]
            size = sum(tensor.numel() * tensor.element_size() for tensor in _flatten(args[place]))
            if size < SMALL_BYTES:
                self.small_bytes += size
            else:
                self.bytes[kind] += size
        elif name.startswith("c10d."):
            self.others[name] += 1
        return func(*args, **(kwargs or {}))


def _flatten(given: Any) -> Iterable[torch.Tensor]:
    if isinstance(given, torch.Tensor):
        return [given]
    return [tensor for part in given for tensor in _flatten(part)]


@dataclass(frozen=True)
class Traffic:
    """Bytes per step and process.

    Args:
        reduced: Of tensors that are summed and end up complete in each process.
        gathered: Of tensors whose parts are collected in each process.
        scattered: Of tensors that are summed and end up in parts.
    """

    reduced: float = 0
    gathered: float = 0
    scattered: float = 0

    def count_sent(self, num_processes: int) -> float:
        """Bytes that each process sends, if the library passes parts round a ring, as NCCL does for large tensors."""
        share = (num_processes - 1) / num_processes
        return share * (2 * self.reduced + self.gathered + self.scattered)
