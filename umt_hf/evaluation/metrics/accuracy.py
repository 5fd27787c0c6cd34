"""Classification accuracy as a local `evaluate.Metric`: `evaluate.load` by name would need the network."""

from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from .ranks import compute_ranks


class TopKAccuracy(evaluate.Metric):
    """Share of rows whose label is among the `k` highest scores, for k = 1 and, with more than 5 classes, 5.

    Examples:
        >>> from umt_hf.evaluation.metrics.accuracy import TopKAccuracy
        >>> scores = [[0.1, 0.7, 0.2], [0.5, 0.3, 0.2]]
        >>> TopKAccuracy().compute(predictions=scores, references=[1, 2])
        {'top1_accuracy': 0.5}
    """

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
        )
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="",
            inputs_description="predictions: one list of class scores per row; references: class indices.",
            features=features,
        )

    # pyrefly: ignore[bad-override]  `evaluate` calls it with these columns by name
    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        scores, labels = np.asarray(predictions), np.asarray(references)
        # Stable, so that a tie falls the same way on every machine.
        order = np.argsort(-scores, axis=1, kind="stable")
        hits = order == labels[:, None]
        # With five classes or fewer, top-5 is always right.
        counts = [1, 5] if scores.shape[1] > 5 else [1]
        return {f"top{k}_accuracy": float(hits[:, :k].any(axis=1).mean()) for k in counts}


def compute_confusion_matrix(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Count videos by class (row) and predicted class (column), `(num_classes, num_classes)`."""
    pairs = np.asarray(labels) * num_classes + np.asarray(predictions)
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


class ExactAnswerAccuracy(evaluate.Metric):
    """Share of questions whose answer is, letter by letter, one of the annotated ones; no answer is a wrong one.

    Examples:
        >>> from umt_hf.evaluation.metrics.accuracy import ExactAnswerAccuracy
        >>> answers, annotated = ["blue", None], [["blue", "sky blue"], ["two"]]
        >>> metric = ExactAnswerAccuracy()
        >>> metric.compute(predictions=answers, references=annotated)
        {'accuracy': 0.5}
    """

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
        )
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="",
            inputs_description="predictions: an answer or None per question; references: lists of annotated answers.",
            features=features,
        )

    # pyrefly: ignore[bad-override]  `evaluate` calls it with these columns by name
    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        right = [answer in annotated for answer, annotated in zip(predictions, references, strict=True)]
        return {"accuracy": sum(right) / len(right)}


class ChoiceAccuracy(evaluate.Metric):
    """Share of rows whose right option scores higher than every other; a tie is a wrong choice.

    Examples:
        >>> from umt_hf.evaluation.metrics.accuracy import ChoiceAccuracy
        >>> scores = [[0.2, 0.9], [0.4, 0.4]]  # the second one is a tie
        >>> ChoiceAccuracy().compute(predictions=scores, references=[1, 0])
        {'accuracy': 0.5}
    """

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
        )
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="",
            inputs_description="predictions: one list of option scores per row; references: the right option's index.",
            features=features,
        )

    # pyrefly: ignore[bad-override]  `evaluate` calls it with these columns by name
    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        right = []
        for scores, answer in zip(predictions, references, strict=True):
            is_right = torch.arange(len(scores))[None] == answer
            # By rank, so that a model that scores all options alike gets none right.
            right.append(compute_ranks(torch.tensor([scores]), is_right).item() == 1)
        return {"accuracy": sum(right) / len(right)}
