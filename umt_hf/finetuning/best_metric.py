"""The figure that the best checkpoint is chosen by: one that the run measures, known before it starts."""

from collections.abc import Sequence

from transformers import TrainingArguments

SMALLER_IS_BETTER = ("loss", "median_rank")


def check_best_metric(training: TrainingArguments, names: Sequence[str]) -> None:
    """Refuse a `metric_for_best_model` that is not measured; `Trainer` does so after the first evaluation alone.

    Args:
        training: Arguments of the run.
        names: Figures that its evaluation gives, without prefix.

    Raises:
        ValueError: If it is another one, or one of which the smallest is best and `greater_is_better` says otherwise.
    """
    metric = training.metric_for_best_model  # Transformers sets "loss" where the best model is asked for by no name
    if metric is None:
        return
    name = metric.removeprefix("eval_")
    if name not in names:
        raise ValueError(
            f"metric_for_best_model={metric}: this run measures no such figure, but {', '.join(names)}. Name one of "
            "them."
        )
    if name.endswith(SMALLER_IS_BETTER) and training.greater_is_better:
        raise ValueError(f"metric_for_best_model={metric}: the smallest is best; add `--greater_is_better false`.")
