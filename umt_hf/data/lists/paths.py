"""Paths as lists of videos and command lines give them: relative, absolute, or URLs."""

import difflib
import os
import posixpath
from pathlib import Path

from ...processing.media_files import STORES, find_protocol

NAMED_NEAR = 3
HOME = "~/"


def is_url(path: str) -> bool:
    """Whether a path says how to fetch it, such as `https://...` or `s3://...`."""
    return find_protocol(path) is not None


def is_remote(path: str) -> bool:
    """Whether a path is an address on another machine: of a web server or in an object store."""
    return find_protocol(path) not in (None, "file")


def is_in_store(path: str) -> bool:
    """Whether a path is an address in an object store, which can be listed."""
    return find_protocol(path) in STORES


def describe_near(path: str | os.PathLike) -> str:
    """Names in the folder of a missing path that look like it, as the end of a message; empty if there are none."""
    missing = Path(path).expanduser()
    if not missing.parent.is_dir():
        return ""
    near = difflib.get_close_matches(missing.name, [other.name for other in missing.parent.iterdir()], NAMED_NEAR)
    return f" Near it: {', '.join(near)}." if near else ""


def require_video(path: str) -> None:
    """Refuse a video that is neither a URL nor a path of something.

    Raises:
        FileNotFoundError: With the names that look like it.
    """
    if not is_url(path) and not os.path.exists(os.path.expanduser(path)):
        raise FileNotFoundError(f"{path}: no such file or folder.{describe_near(path)}")


def join_root(root: str | os.PathLike, path: str) -> str:
    """Put the folder that relative paths start from in front; absolute paths and URLs stay, `~/` is one's home."""
    if path.startswith(HOME):
        return os.path.expanduser(path)
    if is_url(path):
        return path
    return posixpath.join(root, path) if is_url(os.fspath(root)) else os.path.join(root, path)
