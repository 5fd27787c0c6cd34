"""What of its data a run reads: splits by name, and options, each refused where the data have no use for it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from .lists.contents import look_through, refuse_packed
from .lists.csv_lists import TEXT_SUFFIXES
from .lists.folders import is_packed_tar
from .lists.json_lists import JSON_SUFFIXES
from .lists.paths import is_in_store, is_remote
from .lists.sqlite_lists import SQLITE_SUFFIXES
from .lists.stores import split_address

CSV, JSON, SQLITE = "a list of lines", "a JSON list", "an SQLite base"
SAVED, PARQUET, FOLDER, DATASET = "a saved table", "a Parquet file", "a folder of videos", "a `datasets` dataset"
TARS = "tars of videos"
# Sources that an option of `load_videos` means nothing to.
IDLE_FOR = {
    "csv_separator": {JSON, SQLITE, SAVED, PARQUET, FOLDER, DATASET, TARS},
    "streaming": {CSV, JSON, SQLITE, SAVED, FOLDER, TARS},
    "config_name": {CSV, JSON, SQLITE, SAVED, PARQUET, FOLDER, TARS},
    "video_column": {SQLITE, FOLDER, TARS},
    "data_root": {FOLDER, TARS},
}
# What options are if nobody sets them; published recipes state the comma.
UNSET: dict[str, tuple[Any, ...]] = {"csv_separator": (None, ","), "streaming": (False,), "video_column": ("video",)}
FLAGS = {"config_name": "dataset_config_name"}


def name_kind(source: str) -> str:
    """What kind of data a source of `load_videos` is, in words.

    Raises:
        ValueError: If it is a tar with compression, or a folder with such tars that would be read, or an address of
            something that is not read from there.
    """
    if is_remote(source):
        return _name_remote_kind(source)
    path, suffix = Path(source), Path(source).suffix.lower()
    if suffix in TEXT_SUFFIXES | JSON_SUFFIXES:
        return CSV if suffix in TEXT_SUFFIXES else JSON
    if path.is_file():
        if is_packed_tar(path.name):
            refuse_packed(source, [source])
        return TARS if suffix == ".tar" else SQLITE if suffix in SQLITE_SUFFIXES else PARQUET
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return SAVED
    if not path.is_dir():
        return DATASET
    contents = look_through(path)
    if not contents.num_videos and (contents.tars or not contents.num_parquet):
        refuse_packed(source, contents.packed)
    return TARS if contents.is_of_tars else DATASET if contents.is_of_parquet else FOLDER


def _name_remote_kind(source: str) -> str:
    """Kind of what is at an address, by its name alone."""
    suffix = Path(split_address(source)[1]).suffix.lower()
    kinds = dict.fromkeys(TEXT_SUFFIXES, CSV) | dict.fromkeys(JSON_SUFFIXES, JSON)
    kinds |= dict.fromkeys(SQLITE_SUFFIXES, SQLITE) | {".parquet": PARQUET}
    if suffix in kinds:
        return kinds[suffix]
    if suffix == ".tar" or is_packed_tar(source):
        raise ValueError(f"{source}: tars are not read from an address. Copy it to this machine, and name its path.")
    if not is_in_store(source):
        raise ValueError(f"{source}: is not a list by its suffix, and folders of web servers are not listed.")
    return FOLDER


def refuse_idle_options(source: str, kind: str, options: dict[str, Any]) -> None:
    """Refuse options that change nothing.

    Args:
        source: As for `load_videos`.
        kind: As `name_kind` names it.
        options: Arguments of `load_videos`.

    Raises:
        ValueError: If one is set and has no effect.
    """
    for name, value in options.items():
        if value not in UNSET.get(name, (None,)) and kind in IDLE_FOR.get(name, ()):
            raise ValueError(
                f"{FLAGS.get(name, name)}={value} has no effect on {source}, which is {kind}. Leave it out."
            )


def has_effect(name: str, source: str) -> bool:
    """Whether an option of `load_videos` means anything to a source."""
    return name_kind(source) not in IDLE_FOR[name]


def share_options(source: str, sources: Sequence[str | None], options: dict[str, Any]) -> dict[str, Any]:
    """Options of a run for one of its sources: what means something to another one alone is left out.

    Args:
        source: The one that is to be read.
        sources: All of the run.
        options: Arguments of `load_videos`, as the run's flags set them.
    """
    kept = dict(options)
    for name, value in options.items():
        is_set = name in IDLE_FOR and value not in UNSET.get(name, (None,))
        if is_set and not has_effect(name, source) and any(has_effect(name, other) for other in sources if other):
            kept[name] = UNSET.get(name, (None,))[0]
    return kept


def has_splits(source: str) -> bool:
    """Whether a source of `load_videos` has splits to choose from: saved with them, Parquet, tars, or the Hub's."""
    if is_remote(source):
        return False
    path = Path(source)
    if not path.is_dir():
        suffixes = {".tar"} | TEXT_SUFFIXES | JSON_SUFFIXES | SQLITE_SUFFIXES
        return not path.is_file() and path.suffix.lower() not in suffixes
    kind = name_kind(source)
    if kind == SAVED:  # with splits, or a single table, as `Dataset.save_to_disk` writes it
        return (path / "dataset_dict.json").is_file()
    return kind in (DATASET, TARS)


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
