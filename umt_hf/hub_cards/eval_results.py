"""Measured figures of data sets of the Hub as its `.eval_results/`, beside the `model-index` of the card."""

import logging
from pathlib import Path

import yaml

from ..runs.folder import REPORT_FILE
from ..runs.privacy import HUB_ID
from ..runs.summary import MeasuredFigure, read_evaluations, read_optional_json, read_run_settings

try:
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
except ImportError:  # before it knew the format
    EvalResultEntry = eval_result_entries_to_yaml = None

logger = logging.getLogger(__name__)

EVAL_RESULTS_FILE = ".eval_results/umt_hf.yaml"
TASK = "default"  # of a data set that has one task


def build_eval_results(folder: Path) -> dict[str, bytes]:
    """The first figure of each report on a data set of the Hub; of other data the Hub could not say what they are.

    Args:
        folder: Model folder.

    Returns:
        Path in the repository -> content; empty where there is no such figure, or `huggingface_hub` is too old.
    """
    found: dict[str, MeasuredFigure] = {}
    for figure in read_evaluations(folder, read_run_settings(folder)):
        if figure.source.rsplit("/", 1)[-1] == REPORT_FILE:
            found.setdefault(figure.source, figure)
    figures = {source: figure for source, figure in found.items() if _is_of_hub(folder / source, figure.data_set)}
    if not figures:
        return {}
    if EvalResultEntry is None or eval_result_entries_to_yaml is None:
        logger.info("%s is left out: the installed huggingface_hub does not know its format.", EVAL_RESULTS_FILE)
        return {}
    entries = [
        EvalResultEntry(dataset_id=figure.data_set, task_id=TASK, value=figure.value, notes=_describe(figure))
        for figure in figures.values()
    ]
    content = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
    return {EVAL_RESULTS_FILE: content.encode()}


def _is_of_hub(report: Path, data_set: str) -> bool:
    """Whether a report's data were read from the Hub: they have its form of name, and no hash of files."""
    content = read_optional_json(report)
    is_id = content.get("data") == data_set and HUB_ID.fullmatch(data_set) and not data_set.startswith(".")
    return bool(is_id) and content.get("data_sha256", "") is None


def _describe(figure: MeasuredFigure) -> str:
    parts = [figure.metric, figure.split and f"split {figure.split}", figure.views and f"{figure.views} views"]
    return ", ".join(part for part in parts if part)
