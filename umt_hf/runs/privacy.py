"""What leaves the machine loses its folders: cards, settings, reports and everything else that is pushed."""

import re
from collections.abc import Iterable
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

from ..processing.media_files import STORES

# Settings whose value is a place on this machine, and those for which it may be a name on the Hub instead.
PLACE = re.compile(r"(.*_)?(path|roots?|dir|folder|answers|class_names|boxes|report|config)")
PLACE_OR_HUB_ID = re.compile(r"(.*_)?(name_or_path|data|corpora|model)")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SPLIT_WORDS = ("", "train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing")
# A bucket is a place of one's own too; web addresses and names on the Hub are not.
STORE = re.compile(r"(?!hf:)(" + "|".join(STORES) + "):/", re.IGNORECASE)
# Texts with a slash are not paths unless they end like one.
FILE_NAME = re.compile(r".+\.[A-Za-z0-9]{2,5}")


def hide_folders(value: Any, bases: Iterable[Path] = (), key: str = "") -> Any:
    """Settings or a report with every path cut down to its last part; names on the Hub and web addresses stay.

    Args:
        value: A text, or lists and tables of texts.
        bases: Folders that relative paths may start from, beside the current one. `owner/name` is taken for a name on
            the Hub unless it is a file or folder in one of them.
        key: Name of the setting, which separates `my/folder` from a text such as `and/or`.

    Examples:
        >>> from umt_hf.runs.privacy import hide_folders
        >>> teacher = "openai/clip-vit-large-patch14"
        >>> hide_folders({"train_data": "/home/me/a.csv", "teacher": teacher})
        {'train_data': 'a.csv', 'teacher': 'openai/clip-vit-large-patch14'}
    """
    bases = tuple(bases)
    if isinstance(value, dict):
        return {name: hide_folders(item, bases, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [hide_folders(item, bases, key) for item in value]
    return _get_name(value) if isinstance(value, str) and _is_path(value, bases, key) else value


def _is_path(text: str, bases: tuple[Path, ...], key: str) -> bool:
    if text.startswith(("file:", "/", "~", "./", "../")) or STORE.match(text) or PureWindowsPath(text).is_absolute():
        return True
    if "://" in text or not re.search(r"[/\\]", text):
        return False
    if any((base / text).exists() for base in (Path(), *bases)):
        return True
    if FILE_NAME.fullmatch(text):
        return True
    if PLACE_OR_HUB_ID.fullmatch(key):
        return not HUB_ID.fullmatch(text) or is_split(text)
    return PLACE.fullmatch(key) is not None


def is_split(text: str) -> bool:
    """Whether a path or name ends in the name of a split, which no data set is called by."""
    return PurePath(text).stem.lower() in SPLIT_WORDS


def _get_name(text: str) -> str:
    kind: type[PurePath] = PureWindowsPath if "\\" in text else PurePosixPath
    return kind(text).name
