"""Accuracy of answers in words and of choices among options, as local `evaluate.Metric` classes."""

from typing import Any

import datasets
import evaluate
import torch

from .ranks import compute_ranks


class ExactAnswerAccuracy(evaluate.Metric):
    """Share of questions whose answer is, letter by letter, one of the annotated ones; no answer is a wrong one."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
        )
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions: an answer or None a question; references: lists of annotated answers.",
            features=features,
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        right = [answer in annotated for answer, annotated in zip(predictions, references, strict=True)]
        return {"accuracy": sum(right) / len(right)}


class ChoiceAccuracy(evaluate.Metric):
    """Share of rows whose right option scores higher than every other; a tie is a wrong choice."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
        )
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions: one list of option scores a row; references: index of the right option.",
            features=features,
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        right = []
        for scores, answer in zip(predictions, references, strict=True):
            is_right = torch.arange(len(scores))[None] == answer
            right.append(compute_ranks(torch.tensor([scores]), is_right).item() == 1)
        return {"accuracy": sum(right) / len(right)}
