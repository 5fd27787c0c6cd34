"""The figure that chooses the best checkpoint is known before training starts."""

import pytest
from transformers import TrainingArguments

from umt_hf.evaluation.classification import list_metric_names
from umt_hf.evaluation.retrieval import _summarize, list_figure_names
from umt_hf.finetuning.best_metric import check_best_metric


def build(tmp_path, **changes) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **changes)


def test_a_figure_that_is_not_measured_is_refused_with_those_that_are(tmp_path):
    names = list_metric_names(10, False)
    for metric in (None, "eval_top1_accuracy", "top5_accuracy", "mean_class_accuracy", "eval_macro_f1"):
        check_best_metric(build(tmp_path, metric_for_best_model=metric), names)
    with pytest.raises(ValueError, match=r"metric_for_best_model=eval_f1: .*top1_accuracy, top5_accuracy, mean_class"):
        check_best_metric(build(tmp_path, metric_for_best_model="eval_f1"), names)
    with pytest.raises(ValueError, match="top5_accuracy"):
        check_best_metric(build(tmp_path, metric_for_best_model="top5_accuracy"), list_metric_names(5, False))


def test_the_loss_of_transformers_default_is_refused(tmp_path):
    training = build(tmp_path, load_best_model_at_end=True, eval_strategy="epoch", save_strategy="epoch")
    with pytest.raises(ValueError, match="metric_for_best_model=loss: .*map50"):
        check_best_metric(training, ["map50"])


def test_a_rank_is_best_when_it_is_small(tmp_path):
    metric = "dual_text_to_video_median_rank"
    with pytest.raises(ValueError, match="greater_is_better false"):
        check_best_metric(build(tmp_path, metric_for_best_model=metric), list_figure_names(False))
    check_best_metric(build(tmp_path, metric_for_best_model=metric, greater_is_better=False), list_figure_names(False))


def test_names_of_retrieval_are_those_that_are_measured():
    import torch

    ranks = torch.ones(3, dtype=torch.long)
    found = _summarize("dual", ranks, ranks) | _summarize("reranked", ranks, ranks)
    assert set(list_figure_names(True)) == found.keys()
    assert set(list_figure_names(False)) == {name for name in found if name.startswith("dual")}
