"""Classification accuracy as a local `evaluate.Metric`: `evaluate.load` by name would need the network."""

from typing import Any

import datasets
import evaluate
import numpy as np


class TopKAccuracy(evaluate.Metric):
    """Share of rows whose label is among the `k` highest scores, for k = 1 and, with more than 5 classes, 5."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
        )
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions: one list of class scores a row; references: class indices.",
            features=features,
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        scores, labels = np.asarray(predictions), np.asarray(references)
        order = np.argsort(-scores, axis=1, kind="stable")
        hits = order == labels[:, None]
        counts = [1, 5] if scores.shape[1] > 5 else [1]
        return {f"top{k}_accuracy": float(hits[:, :k].any(axis=1).mean()) for k in counts}


def compute_confusion_matrix(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Count videos by class (row) and predicted class (column), `(num_classes, num_classes)`."""
    pairs = np.asarray(labels) * num_classes + np.asarray(predictions)
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
