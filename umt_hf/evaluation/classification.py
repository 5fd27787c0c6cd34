r"""Test a UMT classifier with several views of each video, and write a report.

    umt-hf evaluate classification --model_name_or_path outputs/classifier \
        --data videos/test --num_clips 4 --num_crops 3 \
        --output_dir outputs/classifier/test

A released checkpoint, converted where it is not here yet, beside its published figure, on videos drawn at random:

    umt-hf evaluate classification --published umt-vit-b16-k400 \
        --data k400/val --max_eval_samples 500

Source: Li et al., "Unmasked Teacher", ICCV 2023, section 4 (test views).
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset

from ..data.annotations import name_video
from ..data.lists.sharing import shared_folders
from ..data.sources import load_videos
from ..data.streams import check_stored_frames
from ..data.targets import fit_labels, list_labels
from ..data.unreadable import UnreadableVideos
from ..inference.classification import VideoClassifier, score_videos
from ..inference.held_out import require_finite
from ..inference.labels.scored import has_many_labels, rank_labels
from ..modeling.modeling_umt_video import UMTVideoForVideoClassification
from ..plots import plot_confusion_matrix
from ..processing.video_processing_umt_video import UMTVideoProcessor
from ..runs.arguments import (
    CSVArguments,
    EvaluatedModelArguments,
    HeldOutNumberArguments,
    NamedDataArguments,
    ReportArguments,
    SkippingArguments,
    SourceArguments,
    TestedSplitArguments,
    TimedWorkerArguments,
    ViewArguments,
)
from ..runs.config import describe, script
from ..runs.folder import CONFUSION_PICTURE
from ..runs.model_names import find_released
from .metrics.accuracy import TopKAccuracy, compute_confusion_matrix
from .metrics.labels import THRESHOLD, compute_f1, compute_ranking_precisions
from .published import compare_with_published, find_published_accuracy, require_conversion
from .report import describe_run, write_report
from .setup import measured_run, override_settings, require_names, say_tested

logger = logging.getLogger(__name__)


@dataclass
class ScoredVideos:
    """Scores of a held-out set, the same in every process.

    Args:
        scores: Class probabilities `(videos, classes)`, the mean over a video's views; 0 where it was unreadable.
        labels: What the videos show: class indices `(videos,)`, or boolean `(videos, classes)`.
        unreadable: Row of each video that could not be read -> reason.
    """

    scores: np.ndarray
    labels: np.ndarray
    unreadable: dict[int, str]

    def mark_readable(self) -> np.ndarray:
        """Which videos could be read, boolean `(videos,)`.

        Raises:
            ValueError: If not one could.
        """
        is_read = np.ones(len(self.labels), dtype=bool)
        is_read[list(self.unreadable)] = False
        if not is_read.any():
            raise ValueError(
                f"Not one held-out video could be read. The first: {next(iter(self.unreadable.values()))}"
            )
        return is_read


@dataclass
class ClassifiedVideos(ScoredVideos):
    """Scores of a held-out set whose videos have one label each."""

    @property
    def predictions(self) -> np.ndarray:
        """Class of each video `(videos,)`; -1 where it was unreadable."""
        best = self.scores.argmax(axis=1)
        # argmax of zeros would name class 0.
        best[list(self.unreadable)] = -1
        return best

    def compute_metrics(self) -> dict[str, float]:
        """Top-1 and top-5 accuracy, its mean over classes and macro F1; the number of unreadable videos.

        An unreadable video counts as wrong; where there are any, top-1 without them comes too.

        Raises:
            ValueError: If no video at all could be read.
        """
        is_read = self.mark_readable()
        figures = TopKAccuracy().compute(
            predictions=self.scores[is_read].tolist(), references=self.labels[is_read].tolist()
        )
        found = cast("dict[str, float]", figures)  # None is for processes that compute nothing
        # Unreadable videos count as wrong: leaving them out would make a damaged set easier.
        share = float(is_read.mean())
        metrics = {name: value * share for name, value in found.items()}
        metrics["mean_class_accuracy"] = float(
            np.mean([own for own in self.compute_class_accuracies() if own is not None])
        )
        classes = np.arange(self.scores.shape[1])
        said, shown = (numbers[:, None] == classes for numbers in (self.predictions, self.labels))
        metrics["macro_f1"] = compute_f1(said, shown)[1]
        metrics["unreadable_videos"] = float(len(self.unreadable))
        if self.unreadable:
            metrics["top1_accuracy_of_readable"] = found["top1_accuracy"]
        return metrics

    def compute_class_accuracies(self) -> list[float | None]:
        """Top-1 accuracy of each class, unreadable videos being wrong; `None` for a class without videos."""
        num_classes = self.scores.shape[1]
        totals = np.bincount(self.labels, minlength=num_classes)
        hits = np.bincount(self.labels[self.predictions == self.labels], minlength=num_classes)
        return [float(hit / total) if total else None for hit, total in zip(hits, totals, strict=True)]

    def compute_confusion(self) -> np.ndarray:
        """Confusion matrix of the readable videos; see `compute_confusion_matrix`."""
        is_read = self.predictions >= 0
        return compute_confusion_matrix(self.predictions[is_read], self.labels[is_read], self.scores.shape[1])


@dataclass
class TaggedVideos(ScoredVideos):
    """Scores of a held-out set whose videos may have several labels each, or none."""

    @property
    def predictions(self) -> np.ndarray:
        """Classes that are said of each video, boolean `(videos, classes)`: those of a probability of 0.5 or more."""
        return self.scores >= THRESHOLD

    def compute_metrics(self) -> dict[str, float]:
        """Mean average precision over the classes that a video shows, and micro and macro F1 at a probability of 0.5.

        An unreadable video counts as wrong: of its classes not one is found.

        Raises:
            ValueError: If no video at all could be read, or no video shows a class.
        """
        self.mark_readable()
        found = [value for value in self.compute_class_precisions() if value is not None]
        if not found:
            raise ValueError("No held-out video has a label: there is nothing to find.")
        micro, macro = compute_f1(self.predictions, self.labels)
        return {
            "map": float(np.mean(found)),
            "micro_f1": micro,
            "macro_f1": macro,
            "unreadable_videos": float(len(self.unreadable)),
        }

    def compute_class_precisions(self) -> list[float | None]:
        """Average precision of each class; `None` for one that no video shows."""
        scores = self.scores.astype(np.float64)
        scores[list(self.unreadable)] = np.nan
        return compute_ranking_precisions(scores, self.labels)


def list_metric_names(num_classes: int, many_labels: bool) -> list[str]:
    """Names of the figures that a test always gives, for classes of that number."""
    if many_labels:
        return ["map", "micro_f1", "macro_f1"]
    return ["top1_accuracy", *["top5_accuracy"][: num_classes > 5], "mean_class_accuracy", "macro_f1"]


def classify_videos(
    model: UMTVideoForVideoClassification,
    processor: UMTVideoProcessor,
    videos: Sequence[Any],
    labels: Sequence[int] | Sequence[Sequence[int]],
    accelerator: Accelerator,
    *,
    batch_size: int,
    num_clips: int = 1,
    num_crops: int = 1,
    num_workers: int | None = 0,
    max_skipped_ratio: float = 0.05,
    show_progress: bool = False,
) -> ClassifiedVideos | TaggedVideos:
    """Score every video once, whatever the number of processes; a video is known by its row, not by its name.

    Args:
        model: Classifier, on the accelerator's device.
        processor: Of the model.
        videos: Path, or `{"path", "bytes"}`, of each.
        labels: Their classes; of a model for several labels per video a list for each.
        accelerator: Of the run; all processes must call this.
        batch_size: Views that a process classifies at a time.
        num_clips: Clips per video.
        num_crops: Crops per clip.
        num_workers: Worker processes that decode; 0: this one does.
        max_skipped_ratio: Share of unreadable videos above which there is no result.
        show_progress: Whether the main process draws a bar of its share.

    Raises:
        ValueError: If more videos than that could not be read, or scores are NaN or infinite; it names the first.
    """
    scores, unreadable = score_videos(
        model,
        processor,
        videos,
        accelerator,
        batch_size=batch_size,
        num_clips=num_clips,
        num_crops=num_crops,
        num_workers=num_workers,
        show_progress=show_progress,
    )
    reasons = list(unreadable.values())
    UnreadableVideos().count(len(videos), reasons, max_skipped_ratio, kind="held-out videos", error=ValueError)
    require_finite(model, torch.from_numpy(scores), "videos", lambda row: name_video(videos[row], row))
    if not has_many_labels(model.config):
        return ClassifiedVideos(scores, np.asarray(labels), unreadable)
    shown = np.zeros(scores.shape, dtype=bool)
    for row, own in enumerate(cast("Sequence[Sequence[int]]", labels)):
        shown[row, list(own)] = True
    return TaggedVideos(scores, shown, unreadable)


@dataclass(kw_only=True)
class LabelledDataArguments(
    NamedDataArguments,
    SourceArguments,
    TestedSplitArguments,
    CSVArguments,
    TimedWorkerArguments,
    SkippingArguments,
    HeldOutNumberArguments,
):
    """Held-out videos: a CSV (path,label), a folder with a sub-folder for each class, or a `datasets` dataset."""

    def draw_rows(self, table: Dataset) -> Dataset:
        """The rows that are tested, in their order; lists are sorted by class too often for the first ones."""
        if self.max_eval_samples is None or self.max_eval_samples >= len(table):
            return table
        rows = np.random.default_rng(0).choice(len(table), self.max_eval_samples, replace=False)
        return cast("Dataset", table.select(np.sort(rows)))


@dataclass(kw_only=True)
class ClassifierArguments(EvaluatedModelArguments):
    """The classifier under test, with its processor."""

    published: str | None = describe(
        None,
        "Released classifier (`umt-hf zoo`) to test in place of --model_name_or_path: converted where it is not here "
        "yet, and compared with its published accuracy.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.published is None:
            return
        if self.model_name_or_path not in (None, self.published):
            raise ValueError("published names the model that is tested: leave model_name_or_path out.")
        find_published_accuracy(self.published)
        self.model_name_or_path, self.convert = self.published, True


@dataclass(kw_only=True)
class ViewReportArguments(ReportArguments, ViewArguments):
    """Views of each video, and the report; a batch counts views."""


SECTIONS = {"model": ClassifierArguments, "data": LabelledDataArguments, "evaluation": ViewReportArguments}


def list_predictions(table: Dataset, found: ClassifiedVideos | TaggedVideos, names: list[str]) -> list[dict[str, Any]]:
    """The prediction for each video, in the order of the data; with several labels all of 0.5 or more, best first."""
    rows = []
    for row, (video, label) in enumerate(zip(table["video"], table["label"], strict=True)):
        entry: dict[str, Any] = {"row": row, "video": name_video(video, row)}
        if isinstance(found, TaggedVideos):
            entry["labels"] = [names[one] for one in label]
            ranked = rank_labels(found.scores[row], names)[: int(found.predictions[row].sum())]
            answer: dict[str, Any] = {"predictions": [dataclasses.asdict(scored) for scored in ranked]}
        else:
            entry["label"] = names[label]
            best = found.predictions[row]
            answer = {"prediction": names[best], "probability": round(float(found.scores[row, best]), 6)}
        rows.append(entry | ({"error": found.unreadable[row]} if row in found.unreadable else answer))
    return rows


def classify_table(
    classifier: VideoClassifier,
    table: Dataset,
    accelerator: Accelerator,
    data: LabelledDataArguments,
    args: ViewReportArguments,
) -> ClassifiedVideos | TaggedVideos:
    """Score the videos of a table as the arguments of a test say.

    Args:
        classifier: Of any kind.
        table: With labels that fit it.
        accelerator: Of the run; all processes must call this.
        data: How videos are read, and how many may be unreadable.
        args: Views and batches.

    Raises:
        ValueError: As `classify_videos` does.
    """
    return classify_videos(
        classifier.model,
        classifier.processor,
        cast("Sequence", table["video"]),
        cast("Sequence", table["label"]),
        accelerator,
        batch_size=args.per_device_eval_batch_size,
        num_clips=args.num_clips,
        num_crops=args.num_crops,
        num_workers=data.dataloader_num_workers,
        max_skipped_ratio=data.max_skipped_ratio,
        show_progress=not args.disable_tqdm,
    )


@script(SECTIONS)
def main(model_args: ClassifierArguments, data: LabelledDataArguments, args: ViewReportArguments) -> dict[str, float]:
    """Load, classify, report; also a picture of the confusion matrix where videos have one label.

    Returns:
        Metrics; see `ClassifiedVideos.compute_metrics` and `TaggedVideos.compute_metrics`.
    """
    accelerator = Accelerator(mixed_precision=model_args.mixed_precision)
    name, source = require_names(model_args, data)
    if model_args.published is not None:
        require_conversion(name, find_released(name))
    # It refuses a model without a trained head, which gives a number too.
    classifier = VideoClassifier(
        name, accelerator.device, model_args.attn_implementation, torch.float32, tokens=model_args
    )
    override_settings(classifier.processor, data, ("decoder",))
    with shared_folders():
        table = load_videos(
            source, data.data_root, data.csv_separator, **data.dataset_options(), class_names=classifier.labels
        )
    check_stored_frames(table, classifier.processor.num_frames, classifier.processor.sampling_strategy)
    table = fit_labels(source, data.draw_rows(table), classifier.labels, classifier.many_labels)
    numbers = Counter(label for own in list_labels(source, table) for label in own)
    shown = f"{len(table):,} videos of {len(numbers):,} of the model's {len(classifier.labels):,} classes"
    say_tested(model_args, data, shown)
    with measured_run(accelerator, data):
        found = classify_table(classifier, table, accelerator, data, args)
    metrics = found.compute_metrics()
    if accelerator.is_main_process:
        report = {
            "task": "classification",
            "metrics": metrics,
            **describe_classes(found, classifier.labels),
            "unreadable": list(found.unreadable.values()),
            "num_videos": len(table),
            "view_merging": "mean of sigmoids" if classifier.many_labels else "mean of softmax",
            **describe_run(classifier.model, classifier.processor, accelerator, model_args, data),
            **dataclasses.asdict(args),
        }
        if model_args.published is not None:
            views = (classifier.processor.num_frames, args.num_crops, args.num_clips)
            compared = compare_with_published(model_args.published, metrics["top1_accuracy"], len(table), *views)
            report["published"] = compared.to_dict()
            logger.info(compared.format())
        write_report(accelerator, args.report_folder, report, list_predictions(table, found, classifier.labels))
        if isinstance(found, ClassifiedVideos):
            draw_confusion(found, classifier.labels, args.report_folder)
    # The others would otherwise end, and a launcher take that for the end of the run.
    accelerator.wait_for_everyone()
    return metrics


def describe_classes(found: ClassifiedVideos | TaggedVideos, names: list[str]) -> dict[str, dict[str, float | None]]:
    """The figure of each class, for the report."""
    if isinstance(found, TaggedVideos):
        return {"average_precision": dict(zip(names, found.compute_class_precisions(), strict=True))}
    return {"class_accuracy": dict(zip(names, found.compute_class_accuracies(), strict=True))}


def draw_confusion(found: ClassifiedVideos, names: list[str], output_dir: str) -> None:
    """Write `confusion.png`."""
    plot_confusion_matrix(found.compute_confusion(), names, f"{output_dir}/{CONFUSION_PICTURE}")


if __name__ == "__main__":
    main()
