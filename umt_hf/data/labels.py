"""Labels of videos: numbers, or names that become numbers, one per video or several."""

import itertools
import logging
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from datasets import ClassLabel, Dataset, Features, IterableDataset, List, Value

logger = logging.getLogger(__name__)

LABEL = "label"
UNLABELLED = -1  # what datasets of the Hub write where a label is kept secret
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing"}
SHOWN = 5


def get_label_names(features: Features | None) -> list[str] | None:
    """Names of the classes in the order of their numbers, or `None` where the labels are plain numbers.

    Args:
        features: Of a table that `load_videos` gave; its `label` is a number or a list of numbers.
    """
    feature = _get_inner_feature((features or {}).get(LABEL))
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def encode_labels(rows: list[dict[str, Any]], source: str, class_names: Sequence[str] | None = None) -> Any:
    """Turn the labels of rows into numbers, in place.

    Args:
        rows: Each with a `label`: a number, a name or a list of either; or all of them without.
        source: File that they are from, for errors.
        class_names: Names of the classes by number; `None` = the names found, sorted.

    Returns:
        The feature of the column `label`; `None` if there are no labels.

    Raises:
        ValueError: If rows lack labels, labels are of several kinds, or a name is not a class.
    """
    labels = [row.get(LABEL) for row in rows]
    if all(label is None for label in labels):
        for row in rows:
            row.pop(LABEL, None)
        return None
    is_list = any(isinstance(label, list) for label in labels)
    lists = [label if isinstance(label, list) else [label] for label in labels]
    if {type(item) for items in lists for item in items} - {int, str}:
        row, item = next(
            (row, item)
            for row, items in zip(rows, lists, strict=True)
            for item in items
            if type(item) not in (int, str)
        )
        raise ValueError(
            f"{source}: the label of {row['video']} is {item!r}; expected a number, a name, or a list of them."
        )
    names, numbers = _number_labels(lists, source, class_names)
    for row, items in zip(rows, numbers, strict=True):
        row[LABEL] = items if is_list else items[0]
    feature = Value("int64") if names is None else ClassLabel(names=names)
    _warn_of_odd_labels(rows, numbers, source, names, is_held_out=class_names is not None)
    return List(feature) if is_list else feature


def _number_labels(
    lists: list[list[int | str]], source: str, class_names: Sequence[str] | None
) -> tuple[list[str] | None, list[list[int]]]:
    """Names of the classes, `None` for plain numbers, and the number of each label."""
    found = {item for items in lists for item in items}
    texts = {item: normalize_name(item) for item in found if isinstance(item, str)}
    if texts and len(texts) < len(found):
        number, name = next(item for item in found if not isinstance(item, str)), next(iter(texts))
        raise ValueError(f"{source}: some labels are numbers ({number}) and others names ({name!r}); use one kind.")
    if not texts:
        return None, lists  # pyrefly: ignore[bad-return]  none of them is a text
    if class_names is None:
        warn_of_case(source, texts.values())
    known = sorted(set(texts.values())) if class_names is None else [normalize_name(name) for name in class_names]
    unknown = sorted(set(texts.values()) - set(known))
    # Tables that were written by a program may have numbers as texts; names that are digits are names all the same.
    if all(text.lstrip("-").isdecimal() for text in texts.values()) and (unknown or class_names is None):
        return None, [[int(item) for item in items] for items in lists]
    if unknown:
        raise ValueError(f"{source}: the labels {shorten(unknown)} are not classes; the classes are {shorten(known)}.")
    places = {name: number for number, name in enumerate(known)}
    return list(class_names or known), [[places[texts[str(item)]] for item in items] for items in lists]


def align_labels(
    table: Dataset | IterableDataset, source: str, class_names: Sequence[str] | None
) -> Dataset | IterableDataset:
    """Give a table the numbering of `class_names`: its names decide, not its numbers.

    Args:
        table: With a column `label`, of a `ClassLabel`, of numbers or of texts, or of lists of these; or without.
        source: Where it is from, for errors.
        class_names: Names of the classes by number; `None` = the table's own numbering.

    Raises:
        ValueError: If the table names a class that is not in `class_names`.
    """
    features = table.features
    if features is None or LABEL not in features:
        return table
    feature = features[LABEL]
    inner = _get_inner_feature(feature)
    if isinstance(inner, Value) and inner.dtype in ("string", "large_string"):
        return _encode_column(table, source, class_names)
    names = get_label_names(features)
    # Names that a model was never given say nothing about the order: then the numbers hold.
    if names is None or class_names is None or list(class_names) == names or are_placeholders(class_names):
        return table
    normal = [normalize_name(name) for name in class_names]
    if unknown := [name for name in names if normalize_name(name) not in normal]:
        raise ValueError(
            f"{source}: the labels {shorten(unknown)} are not classes; the classes are {shorten(class_names)}."
        )
    places = [normal.index(normalize_name(name)) for name in names]
    logger.info("%s: labels are numbered as the classes are, by their names.", source)

    def renumber(label: Any) -> Any:
        if isinstance(label, list):
            return [renumber(item) for item in label]
        return label if label is None or label < 0 else places[label]

    target: Any = ClassLabel(names=list(class_names))
    return _replace_labels(table, renumber, List(target) if feature is not inner else target)


def _encode_column(
    table: Dataset | IterableDataset, source: str, class_names: Sequence[str] | None
) -> Dataset | IterableDataset:
    if isinstance(table, IterableDataset):
        raise ValueError(f"{source}: has labels that are texts; a streamed dataset needs numbers or a `ClassLabel`.")
    rows = [{"video": f"row {number}", LABEL: label} for number, label in enumerate(table[LABEL])]
    feature = encode_labels(rows, source, class_names)
    others: Any = table.remove_columns(LABEL)
    if feature is None:
        return others
    # Added anew, not mapped: a map would write all rows, with the bytes of their videos, once more.
    return others.add_column(LABEL, [row[LABEL] for row in rows], feature=feature)


def _replace_labels(table: Dataset | IterableDataset, change: Any, feature: Any) -> Dataset | IterableDataset:
    assert table.features is not None, "Its labels were looked up there."
    if isinstance(table, Dataset):
        changed = [change(label) for label in table[LABEL]]
        others: Any = table.remove_columns(LABEL)
        return others.add_column(LABEL, changed, feature=feature)
    features = Features({**table.features, LABEL: feature})
    return table.map(lambda row: {LABEL: change(row[LABEL])}, features=features)


def are_placeholders(class_names: Sequence[str]) -> bool:
    """Whether names are those that Transformers gives to classes without names, `LABEL_<number>`."""
    return all(name == f"LABEL_{number}" for number, name in enumerate(class_names))


def normalize_name(name: str) -> str:
    """A class name without outer spaces, in the composed Unicode form: macOS writes names of folders decomposed."""
    return unicodedata.normalize("NFC", name).strip()


def shorten(names: Sequence[str], total: int | None = None) -> str:
    """The first of some names, for a message; `total` is how many there are, where not all are given."""
    more = (len(names) if total is None else total) - SHOWN
    return f"{list(names[:SHOWN])}" + (f" and {more} more" if more > 0 else "")


def warn_of_split_folders(source: str, names: Sequence[str]) -> None:
    """Warn where the sub-folders that are taken for classes are named like the splits of a data set."""
    if len(names) > 1 and {name.casefold() for name in names} <= SPLIT_NAMES:
        logger.warning(
            "%s: the sub-folders %s are taken for classes, but are named like splits. Give one of them: %s/%s.",
            source, list(names), source, names[0],
        )  # fmt: skip


def warn_of_case(source: str, names: Iterable[str]) -> None:
    """Warn of classes whose names differ in upper and lower case alone; most often one is meant."""
    alike: dict[str, list[str]] = {}
    for name in sorted(set(names)):
        alike.setdefault(name.casefold(), []).append(name)
    for group in alike.values():
        if len(group) > 1:
            logger.warning(
                "%s: the classes %s differ in upper and lower case alone; give them one name if they are one class.",
                source, " and ".join(group),
            )  # fmt: skip


def _warn_of_odd_labels(
    rows: list[dict[str, Any]], numbers: list[list[int]], source: str, names: list[str] | None, is_held_out: bool
) -> None:
    videos = [str(row.get("identity", row["video"])) for row in rows]
    labels_of_video: dict[str, set[int]] = {}
    if len(set(videos)) < len(videos):
        # Several labels in one row are meant; several rows of one video with a label each seldom are.
        listed = Counter(videos)
        for video, items in zip(videos, numbers, strict=True):
            if listed[video] > 1:
                labels_of_video.setdefault(video, set()).update(items)
    if twice := [video for video, labels in labels_of_video.items() if len(labels) > 1]:
        shown = sorted(labels_of_video[twice[0]])
        logger.warning(
            "%s: %d videos have several labels in different rows, such as %s (%s). Keep one row of each.",
            source, len(twice), twice[0], ", ".join(names[i] if names else str(i) for i in shown),
        )  # fmt: skip
    used = {item for items in numbers for item in items}
    # A held-out list need not show every class.
    last = max(used, default=-1)
    num_missing = last + 1 - sum(number >= 0 for number in used)
    if names is None and not is_held_out and num_missing:
        # Not a list of all, which a single wrong label would make longer than memory.
        first = itertools.islice((str(number) for number in range(last) if number not in used), SHOWN)
        logger.warning(
            "%s: the labels go up to %d, and %d numbers have no video: %s. Labels count from 0 without gaps.",
            source, last, num_missing, shorten([*first], num_missing),
        )  # fmt: skip


def _get_inner_feature(feature: Any) -> Any:
    """The feature of one label, in a column of labels or of lists of them."""
    return getattr(feature, "feature", feature)
