"""Names of classes: those of released heads, and those in the files that data sets come with."""

import csv
import json
from collections import Counter
from importlib import resources
from pathlib import Path

from ..data.lists.text_files import read_text


def read_label_names(path: str | Path, num_labels: int | None = None) -> list[str]:
    """Names of a model's classes, by index.

    Args:
        path: JSON (`["run", ...]`, `{"0": "run", ...}` or `{"run": 0, ...}`), CSV with a column of indices and one of
            names in either order, with or without header (Kinetics: `id,name`; Moments in Time: `name,id`), or text
            with one name per line. Indices count from 0.
        num_labels: Classes of the model; default: as many as the file names.

    Raises:
        ValueError: If the file has another form, other indices than 0 to `num_labels - 1`, or a name twice.
    """
    path = Path(path)
    text = read_text(path)
    try:
        names = _parse_json(json.loads(text)) if path.suffix.lower() == ".json" else _parse_lines(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not names:
        raise ValueError(f"{path}: names no class.")
    count = max(names) + 1 if num_labels is None else num_labels
    if sorted(names) != list(range(count)):
        missing = sorted(set(range(count)) - names.keys())[:5]
        detail = f"; no name for {missing} ..." if missing else ""
        wanted = "its numbers make" if num_labels is None else "the model has"
        raise ValueError(f"{path} names {len(names)} classes, {wanted} {count}, counted from 0{detail}.")
    if twice := [name for name, times in Counter(names.values()).items() if times > 1]:
        raise ValueError(f"{path}: two classes have the name {twice[0]!r}.")
    return [names[i] for i in range(count)]


def load_known_names(file: str, num_labels: int) -> list[str]:
    """Names of a released head's classes, by index; `LABEL_<number>` where the file of the package names fewer.

    Args:
        file: Of `hub_cards/labels`, a name a line.
        num_labels: Classes of the head.
    """
    text = resources.files("umt_hf.hub_cards").joinpath("labels").joinpath(file).read_text(encoding="utf-8")
    names = text.splitlines()[:num_labels]
    return names + [f"LABEL_{i}" for i in range(len(names), num_labels)]


def _parse_json(content: object) -> dict[int, str]:
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        return dict(enumerate(content))
    if isinstance(content, dict) and content:
        if all(key.isdecimal() and isinstance(value, str) for key, value in content.items()):
            return {int(key): value for key, value in content.items()}
        if all(str(value).isdecimal() for value in content.values()):
            return _index({name: int(value) for name, value in content.items()})
    raise ValueError('expected ["run", ...], {"0": "run", ...} or {"run": 0, ...}.')


def _parse_lines(text: str) -> dict[int, str]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines)]
    if rows and {"label", "youtube_id"} <= set(rows[0]):
        raise ValueError(
            "this lists videos and gives no order of the classes; give a file of indices and names (id,name)."
        )
    if rows and all(len(row) == 2 for row in rows):
        body = rows if any(cell.isdecimal() for cell in rows[0]) else rows[1:]
        for index in (0, 1):
            if body and all(row[index].isdecimal() for row in body):
                return _index({row[1 - index]: int(row[index]) for row in body})
    if any(row[0].isdecimal() for row in rows):
        raise ValueError("expected two columns, indices and names, or a name a line.")
    return dict(enumerate(lines))


def _index(indices: dict[str, int]) -> dict[int, str]:
    names = {index: name for name, index in indices.items()}
    if len(names) != len(indices):
        raise ValueError("two names have the same index.")
    return names
