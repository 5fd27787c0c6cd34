"""Paths as lists of videos and command lines give them: relative, absolute, or URLs."""

import os
import re

URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)  # more than one letter: `C://` is a drive


def is_url(path: str) -> bool:
    """Whether a path says how to fetch it, such as `https://...`."""
    return "://" in path and URL.match(path) is not None


def join_root(root: str | os.PathLike, path: str) -> str:
    """Put the folder that relative paths start from in front; absolute paths and URLs stay."""
    return path if is_url(path) else os.path.join(root, path)
