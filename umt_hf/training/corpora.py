"""What an epoch takes of its data: tables and shards, alone or several corpora with weights."""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch
from datasets import Dataset
from transformers import AutoConfig

from ..data.streams import Shards, TarShards, check_stored_frames
from ..evaluation.found import iterate_names
from ..inference.starts import locate_model
from ..modeling.configuration_umt_video import UMTVideoConfig
from .arguments import SHUFFLE_ROWS


class TrainingTable(Protocol):
    """Rows by number: a `datasets.Dataset`, `Shards`, or several of them as a `JoinedTable`."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: Any, /) -> Any: ...


def build_generator(*key: int) -> torch.Generator:
    """A random source fixed by a key of integers."""
    # Not `hash`, which differs between versions of Python. Torch takes seeds of 63 bits.
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class JoinedTable(torch.utils.data.Dataset):
    """Several corpora as one, each passed over as often in an epoch as its weight says.

    A corpus of weight 0.5 gives half of its rows in an epoch and the other half in the next; one of weight 2 gives
    each row twice.

    Args:
        parts: Corpora.
        weights: Passes over each in an epoch.
    """

    def __init__(self, parts: Sequence[TrainingTable], weights: Sequence[float]):
        self.parts = list(parts)
        self.ends = list(accumulate(len(part) for part in parts))
        self.counts = [max(1, round(len(part) * weight)) for part, weight in zip(parts, weights, strict=True)]

    def __len__(self) -> int:
        """Rows of all corpora."""
        return self.ends[-1]

    # pyrefly: ignore[bad-override-param-name]  a row has a number, not a place in a list
    def __getitem__(self, number: int) -> dict[str, Any]:
        """A row; numbers past the last row are those of its repetitions in an epoch."""
        number %= len(self)
        part = next(i for i, end in enumerate(self.ends) if number < end)
        return self.parts[part][number - self.ends[part] + len(self.parts[part])]

    def draw_order(self, seed: int, epoch: int) -> torch.Tensor:
        """Numbers of the rows of an epoch `(sum of counts,)`; the corpora are mixed evenly, each in its own order."""
        sources = torch.cat([torch.full((count,), i) for i, count in enumerate(self.counts)])
        sources = sources[torch.randperm(len(sources), generator=build_generator(seed, epoch, -1))]
        order = torch.empty(len(sources), dtype=torch.int64)
        for i, (part, count) in enumerate(zip(self.parts, self.counts, strict=True)):
            rows, first = [], epoch * count
            # Pass after pass over the corpus, cut where epochs end.
            for number in range(first // len(part), (first + count - 1) // len(part) + 1):
                start = number * len(part)
                taken = draw_order(part, build_generator(seed, i).initial_seed(), number)
                taken = taken[max(first - start, 0) : first + count - start]
                repeated = number - first // len(part)
                rows.append(taken + self.ends[i] - len(part) + repeated * len(self))
            order[sources == i] = torch.cat(rows)
        return order


def name_corpora(sources: Sequence[str], tables: Sequence[TrainingTable]) -> dict[str, TrainingTable]:
    """Corpora by the names that the user gave them, with a number where a name comes twice."""
    named: dict[str, TrainingTable] = {}
    for number, (source, table) in enumerate(zip(sources, tables, strict=True)):
        named[f"{source} ({number + 1})" if source in named else source] = table
    return named


def count_epoch_rows(table: TrainingTable) -> int:
    """Rows that an epoch takes."""
    return sum(table.counts) if isinstance(table, JoinedTable) else len(table)


def refuse_idle_shuffle(num_rows: int, chosen: Sequence[bool]) -> None:
    """Refuse a number of rows to mix where no corpus is read as shards.

    Raises:
        ValueError: If it is another one than the default.
    """
    if num_rows != SHUFFLE_ROWS and not any(chosen):
        raise ValueError(
            f"shuffle_buffer_size={num_rows} has no effect, since no corpus is read as shards: all rows of a list, "
            "folder or table are shuffled among each other. Leave it out."
        )


def check_sampling(table: TrainingTable | None, num_frames: int, strategy: str) -> None:
    """Refuse a sampling that the frames kept in shards cannot give.

    Args:
        table: Rows.
        num_frames: Frames of a clip.
        strategy: How they are chosen.

    Raises:
        ValueError: If frames are kept, and too few, or the strategy needs those between them.
    """
    for part in table.parts if isinstance(table, JoinedTable) else [table]:
        check_stored_frames(part, num_frames, strategy)


def iterate_video_names(table: TrainingTable | None) -> Iterator[str]:
    """What stands for each video of a table, as `list_shared` compares it; nothing for streamed Parquet files."""
    if isinstance(table, JoinedTable):
        for part in table.parts:
            yield from iterate_video_names(part)
    elif isinstance(table, torch.utils.data.Subset):
        chosen = set(table.indices)
        complete: Any = table.dataset
        yield from (name for row, name in enumerate(iterate_video_names(complete)) if row in chosen)
    elif isinstance(table, Dataset):
        yield from iterate_names(table)
    elif isinstance(table, TarShards):
        yield from table.iterate_names()


def find_num_frames(given: int | None, folder: str | None) -> int:
    """Frames of a clip, before the model is loaded.

    Args:
        given: As the run sets them, for a model that takes them from there.
        folder: Model that the run goes on from, which keeps its own unless they are set; `None` = from scratch.
    """
    if folder is not None and given is None:
        config: Any = AutoConfig.from_pretrained(locate_model(folder))
        return getattr(config, "vision_config", config).num_frames
    return UMTVideoConfig().num_frames if given is None else given


def draw_order(table: TrainingTable, seed: int, epoch: int) -> torch.Tensor:
    """Numbers of the rows of an epoch, in the order in which they are taken.

    Args:
        table: Rows.
        seed: Seed of the run, or of the table in it.
        epoch: Number of the epoch.
    """
    if isinstance(table, JoinedTable):
        return table.draw_order(seed, epoch)
    generator = build_generator(seed, epoch)
    if isinstance(table, Shards):
        return table.sample_order(generator)
    return torch.randperm(len(table), generator=generator)
