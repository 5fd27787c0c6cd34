"""What a finished folder says about itself: its settings, losses, evaluations and cost, as recorded."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml

from .folder import METRICS_FILE, RECIPE_FILE, REPORT_FILE, TRAINER_STATE_FILE, read_metrics
from .privacy import hide_folders, is_split

# Settings of the machine, which say nothing about the run.
PRIVATE_SETTINGS = re.compile(
    r"output_dir|data_roots?|resume_from_checkpoint|logging_dir|run_name|disable_tqdm|push_to_hub|hub_.+|.+_token"
)
NO_FIGURES = ("runtime", "samples_per_second", "steps_per_second", "epoch", "videos")
RANKS = {"r1": "R@1", "r5": "R@5", "r10": "R@10", "mean_recall": "mean recall", "median_rank": "median rank"}
SCORES = {"dual": "dual encoder", "reranked": "re-ranked", "dual_softmax": "dual softmax"}
OWN_DATA = "own data"
LABEL_FIGURES = {
    "map": ("mAP", "mean_average_precision"),
    "map50": ("frame mAP at IoU 0.5", "mean_average_precision"),
    "micro_f1": ("micro F1", "f1"),
    "macro_f1": ("macro F1", "f1"),
}
ROLES = {"eval": "validation", "test": "test"}


@dataclass(frozen=True)
class MeasuredFigure:
    """One measured number.

    Args:
        data_set: Name of the test data.
        split: Of the data.
        metric: For people.
        metric_type: The Hub's name of the metric.
        value: As it was measured.
        views: Frames x crops x clips, where it was recorded.
        source: File of the folder that holds the number.
    """

    data_set: str
    split: str | None
    metric: str
    metric_type: str
    value: float
    views: str | None
    source: str


def read_optional_json(path: Path) -> dict[str, Any]:
    """Contents of a JSON file, empty where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_run_settings(folder: Path) -> dict[str, dict[str, Any]]:
    """Sections of `run.yaml` as `publish_settings` leaves them."""
    path = folder / RECIPE_FILE
    sections = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    return publish_settings(sections or {}, folder)


def publish_settings(sections: dict[str, dict[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    """Sections of a run without what belongs to the machine; of paths the last part alone is kept."""
    return {
        name: {
            key: hide_folders(value, list_bases(folder), key)
            for key, value in values.items()
            if not PRIVATE_SETTINGS.fullmatch(key)
        }
        for name, values in sections.items()
    }


def list_bases(folder: Path) -> list[Path]:
    """Folders that the relative paths of a run may start from: those above it."""
    return list(folder.resolve().parents)


def find_setting(settings: dict[str, dict[str, Any]], key: str) -> Any:
    """A setting's value, whichever section it is in; `None` where it is not recorded."""
    return next((values[key] for values in settings.values() if values.get(key) not in (None, [])), None)


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Log of the run, one line per logged step: `metrics.jsonl`, or what `Trainer` leaves."""
    return read_metrics(folder / METRICS_FILE) or read_optional_json(folder / TRAINER_STATE_FILE).get(
        "log_history", []
    )


def read_evaluations(folder: Path, settings: dict[str, dict[str, Any]]) -> list[MeasuredFigure]:
    """Figures of `eval_results.json`, `test_results.json` and each `report.json` of the folder or one below it.

    Where there are none, the held-out losses at the end of the run's log.
    """
    found = []
    for prefix, role in ROLES.items():
        name = f"{prefix}_results.json"
        data_set, split = _find_data(settings, role, folder)
        for metric, value in read_optional_json(folder / name).items():
            found += _evaluate(metric.removeprefix(f"{prefix}_"), value, data_set, split, None, name)
    for path in sorted([*folder.glob(REPORT_FILE), *folder.glob(f"*/{REPORT_FILE}")]):
        report = read_optional_json(path)
        counts = [report.get(key) for key in ("num_frames", "num_crops", "num_clips")]
        views = "x".join(str(count) for count in counts) if None not in counts else None
        source = path.relative_to(folder).as_posix()
        for metric, value in report.get("metrics", {}).items():
            found += _evaluate(
                metric, value, _name_data(report.get("data"), folder), report.get("split"), views, source
            )
    # Pre-training writes no results file: its last held-out losses are its figures.
    if not found:
        lines = [line for line in read_metrics(folder / METRICS_FILE) if any(k.startswith("eval_") for k in line)]
        data_set, split = _find_data(settings, "validation", folder)
        for metric, value in (lines[-1] if lines else {}).items():
            if metric.startswith("eval_"):
                name = metric.removeprefix("eval_")
                found += _evaluate(name, value, data_set, split, None, METRICS_FILE)
    return found


def _find_data(settings: dict[str, dict[str, Any]], role: str, folder: Path) -> tuple[str, str]:
    """Name of the data that a run has measured itself on, and its split."""
    split = find_setting(settings, f"{role}_split")
    source = find_setting(settings, f"{role}_data")
    if source is None and split is not None:  # then it is a split of the training data
        source = find_setting(settings, "train_data")
    return _name_data(source, folder), split or role


def _name_data(source: str | None, folder: Path) -> str:
    """Name of data without the folders above it; a dataset of the Hub keeps its namespace.

    `validation.csv` names a split and not a data set, and the folder above it may be nobody's business.
    """
    name = PurePath(hide_folders(source or "", list_bases(folder), "data"))
    kept = str(name) if len(name.parts) > 1 else name.stem
    return OWN_DATA if is_split(kept) else kept


def _evaluate(
    name: str, value: Any, data_set: str, split: str | None, views: str | None, source: str
) -> list[MeasuredFigure]:
    # A bool is an int to Python, and a figure to nobody.
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or any(name == part or name.endswith(f"_{part}") for part in NO_FIGURES):
        return []
    metric, metric_type = name_metric(name)
    return [MeasuredFigure(data_set, split, metric, metric_type, value, views, source)]


def name_metric(name: str) -> tuple[str, str]:
    """What people and what the Hub call a figure of ours.

    Examples:
        >>> from umt_hf.runs.summary import name_metric
        >>> name_metric("reranked_text_to_video_r1")
        ('text to video R@1, re-ranked', 'recall')
    """
    for key, score in SCORES.items():
        for end, rank in RANKS.items():
            for direction in ("text_to_video", "video_to_text", ""):
                if name == "_".join(part for part in (key, direction, end) if part):
                    words = f"{direction.replace('_', ' ')} {rank}".strip()
                    return f"{words}, {score}", "median_rank" if end == "median_rank" else "recall"
    if name in LABEL_FIGURES:
        return LABEL_FIGURES[name]
    if name.startswith("top") and name.endswith("_accuracy"):
        return f"top-{name[3:-9]} accuracy", "accuracy"
    return name.replace("_", " "), "accuracy" if name.endswith("accuracy") else name


def read_compute(folder: Path) -> list[str]:
    """What the run cost, as far as it was recorded."""
    history = read_history(folder)
    lines = []
    steps = max((line["step"] for line in history if "step" in line), default=0)
    if steps:
        lines.append(f"{steps:,} optimizer steps")
    runtimes = [line["train_runtime"] for line in history if "train_runtime" in line]
    if runtimes:
        minutes = runtimes[-1] / 60
        time = f"{60 * minutes:.0f} seconds" if minutes < 2 else f"{minutes:.1f} minutes"
        lines.append(f"{time if minutes < 60 else f'{minutes / 60:.1f} hours'} of training")
    rates = [line["clips_per_second"] for line in history if line.get("clips_per_second")]
    if rates:
        lines.append(f"{sum(rates) / len(rates):.3g} clips a second on average")
    return lines
