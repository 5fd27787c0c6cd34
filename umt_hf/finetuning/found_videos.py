"""What a run has found, in one line, and what looks wrong about it; and held-out videos out of the training videos."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
from datasets import Dataset

from ..evaluation.found import list_names, list_shared

MAX_NAMED_CLASSES = 10
DOMINANT_SHARE = 0.9


def describe_found(train: Dataset, validation: Dataset, test: Dataset | None, names: Sequence[str]) -> str:
    """The numbers of videos, and the classes with their numbers of training videos.

    Args:
        train: With `label`: an index into `names`, or a list of them.
        validation: Held-out videos.
        test: Videos of the last test, if any.
        names: Of the classes.
    """
    counts = count_videos_of_classes(train["label"][:])
    tests = "" if test is None else f" and {len(test):,} test"
    return (
        f"{len(train):,} training, {len(validation):,} validation{tests} videos of {len(names):,} classes: "
        f"{list_counts(counts, names)}."
    )


def list_counts(counts: Counter[int], names: Sequence[str]) -> str:
    """The first classes with their counts, and how many more there are."""
    listed = [f"{name} ({counts[index]})" for index, name in enumerate(names[:MAX_NAMED_CLASSES])]
    return ", ".join(listed) + (f" and {len(names) - MAX_NAMED_CLASSES} more" if len(names) > len(listed) else "")


def list_doubts(train: Dataset, held_out: dict[str, Dataset], names: Sequence[str]) -> list[str]:
    """What a look at the data would make one doubt, a sentence for each.

    Args:
        train: Training videos.
        held_out: Held-out videos by role.
        names: Of the classes.
    """
    counts = count_videos_of_classes(train["label"][:])
    doubts = list_dominant(counts.elements(), len(train), names, "training videos")
    doubts += list_shared(list_names(train), {role: list_names(table) for role, table in held_out.items()})
    return doubts


def list_dominant(labels: Iterable[int], total: int, names: Sequence[str], kind: str) -> list[str]:
    """A sentence if nearly all rows show one class."""
    ((most, count),) = Counter(labels).most_common(1) or [(0, 0)]
    if len(names) < 2 or count <= DOMINANT_SHARE * total:
        return []
    return [f"{names[most]!r} has {count} of {total} {kind}: a model that always says it scores well."]


def hold_out(table: Dataset, ratio: float, seed: int) -> tuple[Dataset, Dataset]:
    """Training and held-out videos of a table, a share of each class, drawn by the seed.

    Args:
        table: With `label`; of a list of labels the first one decides.
        ratio: Share of each class held out, in (0, 1); one video at least where a class has two.
        seed: Of the run.

    Raises:
        ValueError: If nothing would be left on one side.
    """
    groups: dict[int, list[int]] = {}
    for row, labels in enumerate(table["label"]):
        groups.setdefault(labels if isinstance(labels, int) else next(iter(labels), -1), []).append(row)
    generator = np.random.default_rng(seed)
    chosen: list[int] = []
    for label in sorted(groups):
        rows = groups[label]
        count = min(max(round(ratio * len(rows)), 1), len(rows) - 1)
        chosen += generator.permutation(rows)[:count].tolist()
    held_out = set(chosen)
    if not held_out:
        raise ValueError(f"validation_ratio={ratio}: no class has two videos, of which one could be held out.")
    kept = [row for row in range(len(table)) if row not in held_out]
    return cast("Dataset", table.select(kept)), cast("Dataset", table.select(sorted(held_out)))


def count_videos_of_classes(labels: Iterable[Any]) -> Counter[int]:
    """Videos of each class."""
    return Counter(label for own in labels for label in ([own] if isinstance(own, int) else own))
