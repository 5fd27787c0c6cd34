"""Loaders over planned batches."""

import pytest
import torch

from umt_hf.data.loaders import build_loader


class Squares(torch.utils.data.Dataset):
    def __getitem__(self, number: int) -> int:
        return number**2


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_come_as_planned_and_the_global_random_state_stays(num_workers):
    state = torch.get_rng_state()
    batches = list(build_loader(Squares(), [[3, 1], [2]], num_workers, collate_fn=list))
    assert batches == [[9, 1], [4]] and torch.equal(torch.get_rng_state(), state)
