"""Paths as lists of videos and command lines give them: relative, absolute, or URLs."""

import difflib
import os
import re
from pathlib import Path

NAMED_NEAR = 3
HOME = "~/"
URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)  # more than one letter: `C://` is a drive


def is_url(path: str) -> bool:
    """Whether a path says how to fetch it, such as `https://...`."""
    return "://" in path and URL.match(path) is not None


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
    return path if is_url(path) else os.path.join(root, path)
