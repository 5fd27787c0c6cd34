"""What happens in the steps of a run: graphs compiled, and operations for which an accelerator would be waited for."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch._dynamo.utils import counters

from umt_hf.training import trainer
from umt_hf.training.step.waits import WaitCounter

COMPILED = {"torch_compile_backend": "aot_eager"}


@contextmanager
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


def watch_graphs(monkeypatch: pytest.MonkeyPatch, stage: type) -> list[int]:
    """A list that gets, at the end of each forward of a stage, the number of graphs compiled so far."""
    seen: list[int] = []
    original = stage.forward_step

    def forward_step(self, batch):
        losses = original(self, batch)
        seen.append(counters["stats"]["unique_graphs"])
        return losses

    monkeypatch.setattr(stage, "forward_step", forward_step)
    return seen


def watch_waits(monkeypatch: pytest.MonkeyPatch) -> list[Counter]:
    """A list that gets, for each batch that ends at no log line, what its forward, backward and step waited for."""
    seen: list[Counter] = []
    original = trainer._take_batch

    def take_batch(batch, stage, accelerator, optimizer, schedule, keeper, *others):
        step = keeper.state.step + 1
        is_logged = step % keeper.args.logging_steps == 0 or step == keeper.total_steps
        with WaitCounter() as counter:
            ends_step = original(batch, stage, accelerator, optimizer, schedule, keeper, *others)
        if not is_logged:
            seen.append(counter.counts)
        return ends_step

    monkeypatch.setattr(trainer, "_take_batch", take_batch)
    return seen
