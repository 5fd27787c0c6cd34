"""Labels of videos: numbers, or names that become numbers, one per video or several."""

import itertools
import logging
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Features, IterableDataset, List, Value

logger = logging.getLogger(__name__)

LABEL = "label"
UNLABELLED = -1  # what datasets of the Hub write where a label is kept secret
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing"}
SHOWN = 5
LARGEST_LABEL = 2**63 - 1
SHOWN_DIGITS = 40
# `1,0`, `1e3`, `[1, 2]`, but not `7`, which is read as a number.
LIKE_NUMBERS = re.compile(r"[\[({]?\s*[+-]?[.,]?\d[\d.,;|eE+\-\s]*[\])}]?")


def get_label_names(features: Features | None) -> list[str] | None:
    """Names of the classes in the order of their numbers, or `None` where the labels are plain numbers.

    Args:
        features: Of a table that `load_videos` gave; its `label` is a number or a list of numbers.
    """
    feature = _get_inner_feature((features or {}).get(LABEL))
    return list(feature.names) if isinstance(feature, ClassLabel) else None


@dataclass(frozen=True)
class LabelCoding:
    """How the labels of a list become numbers.

    Args:
        feature: Of the column of numbers.
        numbers: Of each label that is a text; `None` where labels are numbers.
    """

    feature: Any
    numbers: dict[str, int] | None

    def encode(self, labels: Any) -> Any:
        """Numbers of a column of labels, or of lists of them."""
        if self.numbers is None:
            return labels.cast(self.feature_type)
        if isinstance(labels, pa.ChunkedArray):
            return pa.chunked_array([self.encode(chunk) for chunk in labels.chunks], self.feature_type)
        is_list = pa.types.is_list(labels.type)
        texts = labels.flatten() if is_list else labels
        values = pa.array([self.numbers[text] for text in texts.to_pylist()], pa.int64())
        if not is_list:
            return values
        lengths = np.diff(np.asarray(labels.offsets))
        return pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), values)

    @property
    def feature_type(self) -> pa.DataType:
        """Type of the column of numbers."""
        return pa.list_(pa.int64()) if isinstance(self.feature, List) else pa.int64()


def check_labels(labels: list[Any], videos: Sequence[str], source: str) -> list[Any]:
    """Refuse labels that cannot stand in one column.

    Args:
        labels: Of some rows: numbers, names or lists of either; or `None` for all.
        videos: Of these rows, for errors.
        source: File that they are from, for errors.

    Returns:
        The labels.

    Raises:
        ValueError: If some are missing, or of another kind than the others, or have more than 64 bits.
    """
    if all(label is None for label in labels):
        return labels
    lists = [label if isinstance(label, list) else [label] for label in labels]
    kinds = {type(item) for items in lists for item in items}
    if kinds - {int, str}:
        row, item = next(
            (row, item) for row, items in enumerate(lists) for item in items if type(item) not in (int, str)
        )
        raise ValueError(describe_odd_label(source, videos[row], item))
    for row, items in enumerate(lists):
        for item in items:
            if isinstance(item, int) and abs(item) > LARGEST_LABEL:
                raise ValueError(describe_large_label(source, item, videos[row]))
    if len(kinds) > 1:
        found = [item for items in lists for item in items]
        number = next(item for item in found if isinstance(item, int))
        name = next(item for item in found if isinstance(item, str))
        raise ValueError(describe_mixed_labels(source, number, name))
    return labels


def describe_odd_label(source: str, video: str, label: Any) -> str:
    """The sentence about a label that is none."""
    return f"{source}: the label of {video} is {label!r}; expected a number, a name, or a list of them."


def describe_large_label(place: str, label: Any, video: str | None = None) -> str:
    """The sentence about a number that no column holds.

    Args:
        place: The file, and where in it.
        label: The number, or its text.
        video: What has it, where known.
    """
    text = str(label) if isinstance(label, str) or abs(label) < 10**SHOWN_DIGITS else f"of over {SHOWN_DIGITS} digits"
    of = "" if video is None else f" of {video}"
    return f"{place}: the label {text[:SHOWN_DIGITS]}{of} has more than 64 bits. Number the classes from 0 on."


def parse_integer(text: str) -> int:
    """The number of a text such as `7` or `7.0`; one beyond all labels where it has more digits than these.

    Args:
        text: Digits, with a sign and with zeros behind a point, or without.
    """
    digits = text.strip().partition(".")[0]
    if len(digits.lstrip("+-0")) > len(str(LARGEST_LABEL)):
        return -LARGEST_LABEL - 1 if digits.startswith("-") else LARGEST_LABEL + 1
    return int(digits)


def describe_mixed_labels(source: str, number: int, name: str) -> str:
    """The sentence about numbers beside names."""
    return f"{source}: some labels are numbers ({number}) and others names ({name!r}); use one kind."


def encode_labels(
    labels: pa.ChunkedArray, videos: pa.ChunkedArray | None, source: str, class_names: Sequence[str] | None = None
) -> LabelCoding | None:
    """Find the numbers of labels, and warn of doubtful ones.

    Args:
        labels: Numbers, names or lists of either.
        videos: What identifies the video of each label; `None` where no video is named.
        source: File that they are from, for errors.
        class_names: Names of the classes by number; `None` = the names found, sorted.

    Returns:
        How to turn them into numbers; `None` if all of them are null.

    Raises:
        ValueError: If rows lack labels, labels are of several kinds, or a name is not a class.
    """
    if labels.null_count == len(labels):
        return None
    is_list = pa.types.is_list(labels.type)
    inner = labels.type.value_type if is_list else labels.type
    is_known = pa.types.is_string(inner) or pa.types.is_large_string(inner) or pa.types.is_integer(inner)
    if labels.null_count or not (is_known or pa.types.is_null(inner)):
        row, label = next(
            (row, label) for row, label in enumerate(labels.to_pylist()) if label is None or not is_known
        )
        item = label[0] if isinstance(label, list) and label else label
        raise ValueError(describe_odd_label(source, f"row {row}" if videos is None else str(videos[row]), item))
    flat: Any = pc.call_function("list_flatten", [labels]) if is_list else labels
    found = flat.unique().to_pylist()
    names, numbers = _number_labels(found, source, class_names)
    feature = Value("int64") if names is None else ClassLabel(names=names)
    coding = LabelCoding(List(feature) if is_list else feature, numbers)
    used = set(found if numbers is None else numbers.values())
    _warn_of_odd_labels(labels, videos, used, coding, source, names, is_held_out=class_names is not None)
    return coding


def _number_labels(
    found: list[Any], source: str, class_names: Sequence[str] | None
) -> tuple[list[str] | None, dict[str, int] | None]:
    """Names of the classes, `None` for plain numbers, and the number of each label that is a text."""
    texts = {item: normalize_name(item) for item in found if isinstance(item, str)}
    if not texts:
        if large := next((item for item in found if item is not None and item > LARGEST_LABEL), None):
            raise ValueError(describe_large_label(source, large))
        return None, None
    if class_names is None:
        warn_of_case(source, texts.values())
        _warn_of_numbers(source, texts.values())
    known = sorted(set(texts.values())) if class_names is None else [normalize_name(name) for name in class_names]
    unknown = sorted(set(texts.values()) - set(known))
    # Tables that were written by a program may have numbers as texts; names that are digits are names all the same.
    if all(text.lstrip("-").isdecimal() for text in texts.values()) and (unknown or class_names is None):
        if large := next((text for text in texts.values() if abs(parse_integer(text)) > LARGEST_LABEL), None):
            raise ValueError(describe_large_label(source, large))
        return None, {item: parse_integer(text) for item, text in texts.items()}
    if unknown:
        raise ValueError(f"{source}: the labels {shorten(unknown)} are not classes; the classes are {shorten(known)}.")
    places = {name: number for number, name in enumerate(known)}
    return list(class_names or known), {item: places[name] for item, name in texts.items()}


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
    labels = table.with_format("arrow")[:][LABEL]
    labels = labels if isinstance(labels, pa.ChunkedArray) else pa.chunked_array([labels])
    coding = encode_labels(labels, None, source, class_names)
    others: Any = table.remove_columns(LABEL)
    if coding is None:
        return others
    # Added anew, not mapped: a map would write all rows, with the bytes of their videos, once more.
    return others.add_column(LABEL, coding.encode(labels).to_pylist(), feature=coding.feature)


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


def _warn_of_numbers(source: str, names: Iterable[str]) -> None:
    """Warn of classes whose names look like numbers or lists of them, which no form of list reads as such."""
    names = sorted(set(names))
    if found := [name for name in names if LIKE_NUMBERS.fullmatch(name) and not name.lstrip("+-").isdecimal()]:
        logger.warning(
            "%s: the labels %s look like numbers and are taken for names of classes. Write integers from 0 on if "
            "they are numbers; only JSON and tables hold several labels of a video, as a list.",
            source, shorten(found),
        )  # fmt: skip


def _warn_of_odd_labels(
    labels: pa.ChunkedArray,
    videos: pa.ChunkedArray | None,
    used: set[int],
    coding: LabelCoding,
    source: str,
    names: list[str] | None,
    is_held_out: bool,
) -> None:
    rows = _find_repeated(videos) if videos is not None else []
    labels_of_video: dict[str, set[int]] = {}
    if videos is not None and len(rows):
        # Several labels in one row are meant; several rows of one video with a label each seldom are.
        numbers = coding.encode(labels.take(pa.array(rows))).to_pylist()
        for video, items in zip(videos.take(pa.array(rows)).to_pylist(), numbers, strict=True):
            labels_of_video.setdefault(video, set()).update(items if isinstance(items, list) else [items])
    if twice := [video for video, own in labels_of_video.items() if len(own) > 1]:
        shown = sorted(labels_of_video[twice[0]])
        logger.warning(
            "%s: %d videos have several labels in different rows, such as %s (%s). Keep one row of each.",
            source, len(twice), twice[0], ", ".join(names[i] if names else str(i) for i in shown),
        )  # fmt: skip
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


def _find_repeated(texts: pa.ChunkedArray) -> np.ndarray:
    """Rows whose text is in other rows too, by 8 bytes a row instead of all texts; very seldom some more."""
    hashes = [np.fromiter(map(hash, chunk.to_pylist()), np.int64, len(chunk)) for chunk in texts.chunks]
    keys = np.concatenate([np.zeros(0, np.int64), *hashes])
    ordered = np.sort(keys)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    return np.flatnonzero(np.isin(keys, repeated)) if len(repeated) else repeated


def _get_inner_feature(feature: Any) -> Any:
    """The feature of one label, in a column of labels or of lists of them."""
    return getattr(feature, "feature", feature)
