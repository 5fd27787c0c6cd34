"""Running averages that stay on the device until they are logged."""

import torch
from accelerate import Accelerator


class MetricMeter:
    """Averages named scalars over micro-batches and processes; reading it costs one synchronisation.

    Values that are not finite are left out: the trainer counts their steps by itself.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.sums: dict[str, torch.Tensor] = {}  # weighted total and weight

    def update(self, values: dict[str, torch.Tensor], weight: float = 1.0) -> None:
        """Add scalars, each counting `weight` times."""
        for name, value in values.items():
            # No `.item()` here: it would wait for the device at every micro-batch.
            value = value.detach().float()
            is_finite = torch.isfinite(value)
            pair = torch.stack([torch.where(is_finite, value, 0.0), is_finite.float()]) * weight
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def read_own(self, name: str) -> float:
        """Average of this process since the last `flush`; NaN without a finite value."""
        if name not in self.sums:
            return float("nan")
        total, weight = self.sums[name].tolist()
        return total / weight if weight else float("nan")

    def flush(self) -> dict[str, float]:
        """Averages over all processes since the last call; every process must call it with the same names."""
        names = sorted(self.sums)
        if not names:
            return {}
        pairs = self.accelerator.reduce(torch.stack([self.sums[name] for name in names]), reduction="sum")
        self.sums = {}
        pairs = zip(names, pairs.tolist(), strict=True)
        return {name: total / weight if weight else float("nan") for name, (total, weight) in pairs}
