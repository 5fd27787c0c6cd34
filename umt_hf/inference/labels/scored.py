"""Classes by their names with their probabilities, best first: what classifiers and detectors answer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedConfig

from ..arguments import require_count

MULTI_LABEL = "multi_label_classification"


@dataclass(frozen=True)
class ScoredLabel:
    """A class by its name, and its probability."""

    label: str
    probability: float

    def format(self) -> str:
        """One line for people."""
        return f"{self.probability:6.4f}  {self.label}"


def has_many_labels(config: PreTrainedConfig) -> bool:
    """Whether a classifier gives each class a probability by itself (sigmoids), not all of them one (a softmax).

    Raises:
        ValueError: If its head is for regression, whose values are not probabilities of classes.
    """
    if config.problem_type == "regression":
        raise ValueError(
            f"{config._name_or_path or 'The model'}: problem_type is regression, whose values are not probabilities "
            "of classes; call the model itself, or give a classifier."
        )
    return config.problem_type == MULTI_LABEL


def rank_labels(probabilities: np.ndarray, names: Sequence[str], top_k: int | None = None) -> tuple[ScoredLabel, ...]:
    """The likeliest classes, best first; of equal ones the first.

    Args:
        probabilities: `(classes,)`.
        names: Of the classes.
        top_k: How many, or all if there are fewer; default: all.

    Raises:
        TypeError: If `top_k` is not an integer.
        ValueError: If it is below 1.
    """
    require_count("top_k", top_k)
    # Negated and stable, so that ties keep the order of the classes.
    best = (-probabilities).argsort(kind="stable")[:top_k]
    return tuple(ScoredLabel(names[int(label)], float(probabilities[label])) for label in best)
