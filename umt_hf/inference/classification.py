"""Classification of held-out videos: several views of each, merged per video, spread over processes."""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel

from ..data.annotations import identify_video
from ..data.sources import get_source
from ..evaluation.metrics.accuracy import TopKAccuracy, compute_confusion_matrix
from ..evaluation.report import EvaluatedModelArguments, load_whole_model
from ..modeling.modeling_umt_video import UMTVideoForVideoClassification
from ..processing.decoding import VideoDecodingError
from ..processing.video_processing_umt_video import UMTVideoProcessor
from .held_out import evaluation_mode, plan_shard, share_rows
from .video_index import SkippedVideo, list_videos

logger = logging.getLogger(__name__)


@dataclass
class ClassifiedVideos:
    """Scores of a held-out set, the same in every process.

    Args:
        scores: Class probabilities `(videos, classes)`, the mean over a video's views; 0 where it was unreadable.
        labels: Class indices `(videos,)`.
        unreadable: Row of each video that could not be read -> reason.
    """

    scores: np.ndarray
    labels: np.ndarray
    unreadable: dict[int, str]

    @property
    def predictions(self) -> np.ndarray:
        """Class of each video `(videos,)`; -1 where it was unreadable."""
        best = self.scores.argmax(axis=1)
        best[list(self.unreadable)] = -1
        return best

    def compute_metrics(self) -> dict[str, float]:
        """Top-1 and top-5 accuracy, where an unreadable video counts as wrong; their number; accuracy without them.

        Raises:
            ValueError: If no video at all could be read.
        """
        is_read = np.ones(len(self.labels), dtype=bool)
        is_read[list(self.unreadable)] = False
        if not is_read.any():
            raise ValueError(
                f"Not one held-out video could be read. The first: {next(iter(self.unreadable.values()))}"
            )
        found = TopKAccuracy().compute(
            predictions=self.scores[is_read].tolist(), references=self.labels[is_read].tolist()
        )
        share = float(is_read.mean())
        metrics = {name: value * share for name, value in found.items()}
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


class VideoViews(torch.utils.data.Dataset):
    """All views of each video, or why it cannot be read.

    Args:
        videos: Path, or `{"path", "bytes"}`, of each.
        processor: Gives frames, size, law of sampling and decoder.
        num_clips: Clips of a video.
        num_crops: Crops of a clip.
    """

    def __init__(self, videos: Sequence[Any], processor: UMTVideoProcessor, num_clips: int, num_crops: int):
        self.videos, self.processor = videos, processor
        self.num_clips, self.num_crops = num_clips, num_crops

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor | None, str]:
        """Row, views `(clips * crops, T, C, H, W)` or `None`, and the reason why there are none."""
        video = self.videos[index]
        options = {"num_clips": self.num_clips, "num_crops": self.num_crops, "return_tensors": "pt"}
        try:
            return index, self.processor(get_source(video), **options)["pixel_values"], ""
        except VideoDecodingError as error:
            name, reason = identify_video(video, index), str(error)
            return index, None, reason if name in reason else f"{name}: {reason}"


def merge_views(logits: torch.Tensor, num_views: int) -> torch.Tensor:
    """Mean of the views' probabilities, as published.

    Args:
        logits: `(videos * num_views, classes)`, the views of a video next to each other.
        num_views: Views of each video.

    Returns:
        Probabilities `(videos, classes)`, float32.

    Source: published evaluation code (mean of softmax, not of logits).
    """
    return logits.float().softmax(dim=-1).unflatten(0, (-1, num_views)).mean(dim=1)


def classify_videos(
    model: nn.Module,
    processor: UMTVideoProcessor,
    videos: Sequence[Any],
    labels: Sequence[int],
    accelerator: Accelerator,
    *,
    batch_size: int,
    num_clips: int = 1,
    num_crops: int = 1,
    num_workers: int = 0,
    max_skipped_ratio: float = 0.05,
) -> ClassifiedVideos:
    """Score every video once, whatever the number of processes; a video is known by its row, not by its name.

    Args:
        model: Classifier, on the accelerator's device.
        processor: Of the model.
        videos: Path, or `{"path", "bytes"}`, of each.
        labels: Their classes.
        accelerator: Of the run; all processes must call this.
        batch_size: Views a process classifies at a time.
        num_clips: Clips of a video, as `UMTVideoProcessor` takes them.
        num_crops: Crops of a clip.
        num_workers: Worker processes that decode; 0 = this one.
        max_skipped_ratio: Share of unreadable videos past which there is no result.

    Raises:
        ValueError: If more videos than that could not be read; it names the first of them.
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
    )
    for reason in unreadable.values():
        logger.warning("Held-out video unreadable: %s", reason)
    if len(unreadable) > max_skipped_ratio * len(videos):
        raise ValueError(
            f"{len(unreadable)} of {len(videos)} held-out videos could not be read, more than max_skipped_ratio="
            f"{max_skipped_ratio}. Mend or remove them, or raise it. The first: {next(iter(unreadable.values()))}"
        )
    return ClassifiedVideos(scores, np.asarray(labels), unreadable)


def score_videos(
    model: nn.Module,
    processor: UMTVideoProcessor,
    videos: Sequence[Any],
    accelerator: Accelerator,
    *,
    batch_size: int,
    num_clips: int = 1,
    num_crops: int = 1,
    num_workers: int = 0,
    show_progress: bool = False,
) -> tuple[np.ndarray, dict[int, str]]:
    """Class probabilities of videos with or without known labels, the same in all processes.

    Args:
        model: See `classify_videos`, as for the other arguments.
        processor: Of the model.
        videos: Path, or `{"path", "bytes"}`, of each.
        accelerator: Of the run; all processes must call this.
        batch_size: Views a process classifies at a time.
        num_clips: Clips of a video.
        num_crops: Crops of a clip.
        num_workers: Worker processes that decode.
        show_progress: Whether the main process draws a bar of its share.

    Returns:
        Probabilities `(videos, classes)`, float32, 0 where a video was unreadable; and row of each such video ->
        reason.
    """
    num_views = num_clips * num_crops
    batches = plan_shard(len(videos), max(batch_size // num_views, 1), accelerator)
    views = VideoViews(videos, processor, num_clips, num_crops)
    scores = torch.zeros(len(videos), model.config.num_labels)
    failures: list[tuple[int, str]] = []
    total, is_hidden = sum(map(len, batches)), not (show_progress and accelerator.is_main_process)
    with evaluation_mode(model, accelerator), tqdm(total=total, unit="video", disable=is_hidden) as progress:
        for samples in _load_batches(views, batches, num_workers):
            failures += [(row, reason) for row, pixels, reason in samples if pixels is None]
            read = {row: pixels for row, pixels, _ in samples if pixels is not None}
            if read:
                # A video has more views than a batch may have, if it comes to that: they are classified in parts.
                parts = torch.cat(list(read.values())).split(batch_size)
                logits = [model(pixel_values=part.to(accelerator.device)).logits.float().cpu() for part in parts]
                scores[list(read)] = merge_views(torch.cat(logits), num_views)
            progress.update(len(samples))
    share_rows(scores, accelerator)
    return scores.numpy(), dict(sorted(gather_object(failures)))


@dataclass(frozen=True)
class ScoredLabel:
    """A class by its name, and its probability."""

    label: str
    probability: float


@dataclass(frozen=True)
class LabelledVideo:
    """A video's likeliest classes, best first."""

    path: str
    labels: tuple[ScoredLabel, ...]


@dataclass(frozen=True)
class LabelReport:
    """What `classify_files` found.

    Attributes:
        videos: Those that could be read, in order of their paths.
        skipped: Those that could not.
    """

    videos: tuple[LabelledVideo, ...]
    skipped: tuple[SkippedVideo, ...]

    def format(self) -> str:
        """Write it as lines for people: each video with its classes, then those skipped with their reasons."""
        lines = []
        for video in self.videos:
            lines.append(video.path)
            lines += [f"  {scored.probability:6.4f}  {scored.label}" for scored in video.labels]
        lines.append(f"{len(self.videos)} classified, {len(self.skipped)} skipped")
        return "\n".join(lines + [f"skipped {video.path}: {video.reason}" for video in self.skipped])


def load_classifier(args: EvaluatedModelArguments) -> tuple[PreTrainedModel, UMTVideoProcessor]:
    """The classifier with all its weights, and its processor.

    Raises:
        ValueError: If the folder has no trained head: a random one gives a number too.
        OSError: If there is no model, or no processor beside it.
    """
    model = load_whole_model(UMTVideoForVideoClassification, args)
    return model, UMTVideoProcessor.from_pretrained(args.model_name_or_path)


def classify_files(
    sources: Iterable[str],
    model: str | os.PathLike,
    top_k: int = 5,
    num_clips: int | None = None,
    num_crops: int | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
) -> LabelReport:
    """Tell the likeliest classes of video files.

    Every process that `accelerate launch` starts takes a share.

    Args:
        sources: Video files, and folders with videos at any depth. The main process's list counts.
        model: Folder or Hub id of a classifier with its processor.
        top_k: Classes told of each video; all, if there are fewer.
        num_clips: Clips of a video, whose probabilities are averaged; `None` = what the processor says.
        num_crops: Crops of a clip, likewise.
        batch_size: Views a process classifies at a time.
        num_workers: Processes that read ahead, for each process.

    Returns:
        What was found, the same in all processes.

    Raises:
        ValueError: If the model is no trained classifier, a source folder has no videos, or `top_k` is below 1.
    """
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}.")
    accelerator = Accelerator()
    classifier, processor = load_classifier(EvaluatedModelArguments(model_name_or_path=str(model)))
    found = [list_videos(sources) if accelerator.is_main_process else None]
    files, skipped = broadcast_object_list(found)[0]
    scores, unreadable = score_videos(
        classifier.to(accelerator.device),
        processor,
        [file.path for file in files],
        accelerator,
        batch_size=batch_size,
        num_clips=processor.num_clips if num_clips is None else num_clips,
        num_crops=processor.num_crops if num_crops is None else num_crops,
        num_workers=num_workers,
        show_progress=True,
    )
    names, labelled = classifier.config.id2label, []
    for row, file in enumerate(files):
        reason = unreadable.get(row)
        if reason is None and not np.isfinite(scores[row]).all():
            reason = "Its scores are not finite; the model cannot classify it."
        if reason is not None:
            skipped.append(SkippedVideo(file.path, reason.removeprefix(f"{file.path}: ")))
            continue
        best = (-scores[row]).argsort(kind="stable")[:top_k]
        labels = tuple(ScoredLabel(names[int(label)], float(scores[row, label])) for label in best)
        labelled.append(LabelledVideo(file.path, labels))
    return LabelReport(tuple(labelled), tuple(sorted(skipped, key=lambda video: video.path)))


def _load_batches(views: VideoViews, batches: list[range], num_workers: int) -> Iterator[list]:
    yield from DataLoader(
        views,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=list,
        generator=torch.Generator(),  # else starting a loader would move the global random state
    )
