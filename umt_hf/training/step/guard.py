"""Counting steps whose gradients were not finite, without waiting for the device."""

import logging
from dataclasses import dataclass

import torch

from ...runs.mistakes import DivergenceError

logger = logging.getLogger(__name__)

MAX_UNREAD_STEPS = 1000  # of which the device alone knows whether their gradients were finite


@dataclass
class NonfiniteSteps:
    """Steps whose gradients were NaN or infinite: all of them, and the last ones without another between them."""

    nonfinite_steps: int = 0
    nonfinite_in_a_row: int = 0

    def count_step(self, is_finite: bool, step: int, limit: int) -> None:
        """Count a step.

        Args:
            is_finite: Whether its gradients were; all processes must agree.
            step: Its number.
            limit: Bad steps in a row after which the run stops.

        Raises:
            DivergenceError: If there were more.
        """
        if is_finite:
            self.nonfinite_in_a_row = 0
            return
        self.nonfinite_steps += 1
        self.nonfinite_in_a_row += 1
        logger.warning("Step %d skipped: its gradients are not finite.", step)
        if self.nonfinite_in_a_row > limit:
            raise DivergenceError(
                f"{self.nonfinite_in_a_row} steps in a row had NaN or Inf gradients: lower learning_rate, set "
                "max_grad_norm, or use bf16 instead of fp16."
            )


class StepGuard:
    """Counts bad steps where the run waits for the device anyway, in order and exactly.

    Args:
        state: Counters of the run.
        limit: Bad steps in a row after which the run stops.
    """

    def __init__(self, state: NonfiniteSteps, limit: int):
        self.state, self.limit = state, limit
        self.unread: list[tuple[int, torch.Tensor]] = []

    def add(self, step: int, is_bad: torch.Tensor) -> None:
        """Note a step; `is_bad` is a scalar on the device."""
        self.unread.append((step, is_bad))
        if len(self.unread) >= MAX_UNREAD_STEPS:
            self.read()

    def read(self) -> None:
        """Count the steps noted since the last call, for which the run waits.

        Raises:
            DivergenceError: If too many in a row were bad.
        """
        if not self.unread:
            return
        steps, flags = zip(*self.unread, strict=True)
        self.unread = []
        for step, is_bad in zip(steps, torch.stack(flags).tolist(), strict=True):
            self.state.count_step(not is_bad, step, self.limit)
