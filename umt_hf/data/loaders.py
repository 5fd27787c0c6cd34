"""Loaders over planned batches."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ..runs.cores import count_workers


def build_loader(
    dataset: Dataset, batches: Iterable[Sequence[Any]], num_workers: int | None, **options: Any
) -> DataLoader:
    """A loader that reads planned batches and draws nothing from the global random state.

    Args:
        dataset: What the entries of a batch are read from.
        batches: Entries of each batch, in order.
        num_workers: Processes that read; 0 = this one; `None` = as many as the machine has cores, up to 4.
        **options: As for `DataLoader`.
    """
    # Without a generator of the loader's, starting it would move the global random state: dropout would then depend
    # on how often data was loaded, and a resumed run would differ from one that never stopped.
    return DataLoader(
        dataset,
        batch_sampler=batches,  # pyrefly: ignore[bad-argument-type]  annotated as lists, and any sequence does
        num_workers=count_workers() if num_workers is None else num_workers,
        generator=torch.Generator(),
        **options,
    )
