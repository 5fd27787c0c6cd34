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
from tqdm import tqdm
from transformers import PreTrainedModel

from ..data.annotations import identify_video
from ..data.loaders import build_loader
from ..data.sources import get_source
from ..data.video_files import SkippedVideo, list_videos
from ..modeling.modeling_umt_video import UMTVideoForVideoClassification
from ..processing.decoding import VideoDecodingError
from ..processing.video_processing_umt_video import UMTVideoProcessor
from ..runs.arguments import EvaluatedModelArguments
from .held_out import evaluation_mode, plan_shard, share_rows
from .loading import load_whole_model

logger = logging.getLogger(__name__)


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
    yield from build_loader(views, batches, num_workers, collate_fn=list)
