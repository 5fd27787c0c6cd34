"""Classification of held-out videos: several views of each, merged per video, spread over processes."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader

from ..processing.decoding import VideoDecodingError
from ..processing.video_processing_umt_video import UMTVideoProcessor
from .data.annotations import identify_video
from .data.held_out import evaluation_mode, plan_shard, share_rows
from .data.sources import get_source
from .metrics.accuracy import TopKAccuracy, compute_confusion_matrix

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
    num_views = num_clips * num_crops
    batches = plan_shard(len(videos), max(batch_size // num_views, 1), accelerator)
    views = VideoViews(videos, processor, num_clips, num_crops)
    scores = torch.zeros(len(videos), model.config.num_labels)
    failures: list[tuple[int, str]] = []
    with evaluation_mode(model, accelerator):
        for samples in _load_batches(views, batches, num_workers):
            failures += [(row, reason) for row, pixels, reason in samples if pixels is None]
            read = {row: pixels for row, pixels, _ in samples if pixels is not None}
            if read:
                # A video has more views than a batch may have, if it comes to that: they are classified in parts.
                parts = torch.cat(list(read.values())).split(batch_size)
                logits = [model(pixel_values=part.to(accelerator.device)).logits.float().cpu() for part in parts]
                scores[list(read)] = merge_views(torch.cat(logits), num_views)
    share_rows(scores, accelerator)
    unreadable = dict(sorted(gather_object(failures)))
    for reason in unreadable.values():
        logger.warning("Held-out video unreadable: %s", reason)
    if len(unreadable) > max_skipped_ratio * len(videos):
        raise ValueError(
            f"{len(unreadable)} of {len(videos)} held-out videos could not be read, more than max_skipped_ratio="
            f"{max_skipped_ratio}. Mend or remove them, or raise it. The first: {next(iter(unreadable.values()))}"
        )
    return ClassifiedVideos(scores.numpy(), np.asarray(labels), unreadable)


def _load_batches(views: VideoViews, batches: list[range], num_workers: int) -> Iterator[list]:
    yield from DataLoader(
        views,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=list,
        generator=torch.Generator(),  # else starting a loader would move the global random state
    )
