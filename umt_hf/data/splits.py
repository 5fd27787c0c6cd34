"""Which part of a `datasets` dataset a run reads: splits by name, refused where there are none."""

from pathlib import Path
from typing import Any, Literal

from .sources import JSON_SUFFIXES, SQLITE_SUFFIXES, TEXT_SUFFIXES


def has_splits(source: str) -> bool:
    """Whether a source of `load_videos` has splits to choose from: saved with them, Parquet, tars, or the Hub's."""
    path = Path(source)
    if path.is_dir():
        if (path / "dataset_info.json").is_file() and not (path / "dataset_dict.json").is_file():
            return False  # a single table, as `Dataset.save_to_disk` writes it
        return (path / "dataset_dict.json").is_file() or any(
            file for suffix in ("parquet", "tar") for file in path.rglob(f"*.{suffix}")
        )
    if path.suffix.lower() == ".tar":
        return False
    return not path.is_file() and path.suffix.lower() not in TEXT_SUFFIXES | JSON_SUFFIXES | SQLITE_SUFFIXES


def require_split(source: str, split: str | None, default: str, flag: str = "split") -> str:
    """The split to read: the one that is named, else the default.

    Args:
        source: As for `load_videos`.
        split: What the run's flag says, if anything.
        default: Split that the run reads without it.
        flag: Name of the flag, for the message.

    Raises:
        ValueError: If another split than the default is asked of data without splits.
    """
    if split not in (None, default) and not has_splits(source):
        raise ValueError(
            f"{flag}={split}: {source} has no splits, all of it would be read. Leave the flag out, or name a "
            "`datasets` dataset."
        )
    return split or default


def select_data(arguments: Any, role: Literal["train", "validation", "test"]) -> tuple[str, str] | None:
    """Data and split of what a run does, from its `<role>_data` and `<role>_split`.

    A split that is named without data is one of the training data.

    Args:
        arguments: Section of a script.
        role: What the data is for.

    Returns:
        Source and split; `None` where no data is named.

    Raises:
        ValueError: If a split is asked of data without splits.
    """
    source, split = getattr(arguments, f"{role}_data"), getattr(arguments, f"{role}_split")
    flag = f"{role}_split"
    if source is None and split is not None and role != "train":
        source = getattr(arguments, "train_data", None)
        if source is None or not has_splits(source):
            raise ValueError(f"{flag}={split}: {source or 'the run'} has no such split. Set {role}_data as well.")
    return None if source is None else (source, require_split(source, split, role, flag))
