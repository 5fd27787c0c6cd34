"""`umt-hf classify --labels`: classes as texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..hub_cards.label_names import read_label_names
from ..inference.classification import VideoClassifier, load_classifier
from ..inference.labels.zero_shot import DEFAULT_TEMPLATES, load_zero_shot_classifier

SUFFIXES = (".txt", ".csv", ".json")  # of files of names; a class may be called like any other file


def load_for_labels(
    model: str, labels: Sequence[str], templates: Sequence[str] | None, dtype: Any, torch_compile: bool, tokens: Any
) -> VideoClassifier:
    """The classifier of a command: with labels a zero-shot one, else one that was fine-tuned.

    Args:
        model: Folder or Hub id.
        labels: Names of classes, and files of such names by their suffix; none without `--labels`.
        templates: Prompts, or names of sets of prompts; `None` = the default.
        dtype: What it is computed in.
        torch_compile: Whether its video tower is compiled.
        tokens: Which tokens of a clip it sees.

    Raises:
        FileNotFoundError: If a word names a file by its suffix, and there is none.
        ValueError: If there are templates without labels, or as the classifiers do.
    """
    if not labels:
        if templates:
            raise ValueError("--template needs --labels: a fine-tuned classifier has its classes already.")
        return load_classifier(model, dtype, torch_compile, tokens)
    names = [name for label in labels for name in _read_names(label)]
    return load_zero_shot_classifier(model, names, templates or DEFAULT_TEMPLATES, dtype, torch_compile, tokens)


def _read_names(label: str) -> list[str]:
    """Names that a word of `--labels` stands for: itself, or those of the file that it names."""
    if Path(label).suffix.lower() not in SUFFIXES:
        return [label]
    if not Path(label).is_file():
        raise FileNotFoundError(
            f"{label}: no such file of class names; a class is named without {Path(label).suffix}."
        )
    return read_label_names(label)
