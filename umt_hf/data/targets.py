"""Labels as a model learns them and is tested on them: one class per video, or a list of classes."""

import logging
from collections.abc import Sequence
from typing import Any

from datasets import Dataset, List, Value

from .labels import LABEL, are_placeholders, get_label_names, shorten

logger = logging.getLogger(__name__)


def has_label_lists(table: Dataset) -> bool:
    """Whether each video of a table has a list of labels."""
    feature: Any = table.features.get(LABEL)
    return hasattr(feature, "feature")  # whatever class of `datasets` it is, a list holds the feature of its items


def list_labels(source: str, table: Dataset) -> list[list[int]]:
    """Classes of each video; where every video has one, a list of one.

    Args:
        source: Where the table comes from, for messages.
        table: As `load_videos` gives it.

    Raises:
        ValueError: If a video has no label, or a class twice.
    """
    if LABEL not in table.column_names:
        raise ValueError(
            f"{source}: no labels; give a CSV (path,label), one sub-folder for each class, or a `label` column."
        )
    found = []
    for row, label in enumerate(table[LABEL]):
        labels = label if isinstance(label, list) else [label]
        # Datasets of the Hub write -1 where the labels of a test split are kept secret.
        if not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in labels):
            raise ValueError(
                f"{source}, row {row}: its label is {label!r}, which is not a class or a list of classes. Leave such "
                "rows out, or choose a split with labels."
            )
        if len(set(labels)) < len(labels):
            raise ValueError(
                f"{source}, row {row}: its label {label!r} names a class twice. A list holds the numbers or names of "
                "the video's classes, not a 0 or 1 for each class."
            )
        found.append(labels)
    return found


def fit_labels(source: str, table: Dataset, names: Sequence[str], many_labels: bool) -> Dataset:
    """Check the labels of a table against the classes of a model, and bring them into the model's form.

    Args:
        source: Where the table comes from, for messages.
        table: As `load_videos(..., class_names=names)` gives it.
        names: Of the model's classes, by index.
        many_labels: Whether the model has several labels per video.

    Returns:
        The table with an index into `names` as `label`; with `many_labels` a list of them, rising, without repeats.

    Raises:
        ValueError: If there are no labels, or the model does not have them, or videos have several and the model one.
    """
    labels = list_labels(source, table)
    if (highest := max((label for own in labels for label in own), default=0)) >= len(names):
        raise ValueError(f"{source}: label {highest} is too high for {len(names)} classes {shorten(names)}.")
    if get_label_names(table.features) is not None and are_placeholders(names):
        logger.warning("%s has names of classes and the model has none: labels are compared by number.", source)
    if not many_labels and (row := next((i for i, own in enumerate(labels) if len(own) != 1), None)) is not None:
        raise ValueError(
            f"{source}, row {row}: a video has {len(labels[row])} labels; the model, or its training data, has one "
            "per video. A model for several is trained on lists of labels."
        )
    fitted: list[Any] = [sorted(set(own)) if many_labels else own[0] for own in labels]
    feature = List(Value("int64")) if many_labels else Value("int64")
    # Added anew, not mapped: a map would write all rows, with the bytes of their videos, once more.
    others: Any = table.remove_columns(LABEL)
    return others.add_column(LABEL, fitted, feature=feature)
