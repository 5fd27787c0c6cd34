"""Text files that people's own programs wrote: UTF-8, with or without a byte-order mark."""

import json
from pathlib import Path
from typing import Any


def read_text(path: str | Path) -> str:
    """Read a text file in UTF-8.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it has another encoding.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(describe_encoding(path, error)) from error


def describe_encoding(path: str | Path, error: UnicodeDecodeError) -> str:
    """The sentence about a file in another encoding."""
    return f"{path}: is not UTF-8 text ({error.reason}). Save it with that encoding."


def read_json_file(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not UTF-8 or not JSON; it names the file.
    """
    return parse_json(path, read_text(path))


def parse_json(path: str | Path, text: str) -> Any:
    """Parse JSON text of a file.

    Raises:
        ValueError: If it is not JSON; it names the file.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
