"""Classes of videos: several views per video, merged; one video at a time, or many spread over processes."""

import logging
import os
from collections.abc import Callable, Container, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast, overload

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils.data import Dataset
from transformers.video_utils import VideoInput

from ..data.annotations import name_video
from ..data.lists.folders import format_name
from ..data.sources import get_source
from ..data.video_files import SkippedVideo, VideoFile, list_videos
from ..modeling.modeling_umt_video import UMTVideoForVideoClassification
from ..processing.decoding import VideoDecodingError, VideoSource
from ..processing.video_processing_umt_video import UMTVideoProcessor, split_videos
from ..runs.arguments import KeptTokenArguments
from .arguments import require_count
from .engine import TIMEOUT_SECONDS, DType, choose_dtype, compile_model, in_model, inference_run, read_ahead
from .export import is_export, load_exported_classifier
from .held_out import build_bar, evaluation_mode, mark_nonfinite, plan_shard, require_finite, share_rows
from .labels.scored import ScoredLabel, has_many_labels, rank_labels
from .loading import (
    keep_tokens,
    list_class_names,
    load_complete_model,
    load_video_processor,
    place_model,
    resolve_device,
)

logger = logging.getLogger(__name__)

VIEWS_AT_A_TIME = 8


class VideoViews(Dataset):
    """All views of each video, or why it cannot be read.

    Args:
        videos: Path, or `{"path", "bytes"}`, of each.
        processor: Gives frames, size, sampling strategy and decoder.
        num_clips: Clips per video.
        num_crops: Crops per clip.
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
            name, reason = name_video(video, index), str(error)
            return index, None, reason if name in reason else f"{name}: {reason}"


def build_patient_accelerator() -> Accelerator:
    """Of a command for many files: where one process gets the long videos, the others wait."""
    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])


def load_classifier(
    model: str | os.PathLike,
    dtype: DType | None = None,
    torch_compile: bool = False,
    tokens: KeptTokenArguments | None = None,
) -> "VideoClassifier":
    """The classifier of many files, as `umt-hf classify` runs it.

    Args:
        model: Folder or Hub id of a classifier with its processor.
        dtype: What it is computed in; default: bfloat16 on a GPU that has it, float32 elsewhere.
        torch_compile: Whether its video tower is compiled by `torch.compile`.
        tokens: Which tokens of a clip it sees; default: as its configuration says.

    Raises:
        ValueError: As `VideoClassifier` does, or if the type is unknown.
        OSError: As `VideoClassifier` does.
    """
    accelerator = build_patient_accelerator()
    chosen = choose_dtype(dtype, accelerator.device, accelerator.mixed_precision)
    if is_export(model) and (torch_compile or dtype is not None):
        name = "torch_compile" if torch_compile else "dtype"
        raise ValueError(
            f"{name}: {model} is an export, whose graph is fixed. Take the model itself, or another export."
        )
    # The runtime of an export chooses its device: it may have been built for the CPU alone.
    device = None if is_export(model) else accelerator.device
    classifier = VideoClassifier(model, device, dtype=chosen, tokens=tokens)
    if torch_compile:
        compile_model(classifier.model)
    return classifier


def _build_skip(file: VideoFile, reason: str) -> SkippedVideo:
    return SkippedVideo(file.path, reason.removeprefix(f"{file.path}: "))


def merge_views(logits: torch.Tensor, num_views: int, many_labels: bool = False) -> torch.Tensor:
    """Mean of the views' probabilities, as published.

    Args:
        logits: `(videos * num_views, classes)`, the views of a video next to each other.
        num_views: Views of each video.
        many_labels: Whether a video may have several labels: then each class has a sigmoid, and the classes no
            common softmax.

    Returns:
        Probabilities `(videos, classes)`, float32; NaN where a logit is NaN or infinite.

    Source: published evaluation code (mean of softmax, not of logits).
    """
    logits = mark_nonfinite(logits)
    probabilities = logits.sigmoid() if many_labels else logits.softmax(dim=-1)
    return probabilities.unflatten(0, (-1, num_views)).mean(dim=1)


def score_videos(
    model: UMTVideoForVideoClassification,
    processor: UMTVideoProcessor,
    videos: Sequence[Any],
    accelerator: Accelerator,
    *,
    batch_size: int,
    num_clips: int = 1,
    num_crops: int = 1,
    num_workers: int | None = 0,
    show_progress: bool = False,
) -> tuple[np.ndarray, dict[int, str]]:
    """Class probabilities of videos with or without known labels, the same in all processes.

    Args:
        model: On the accelerator's device.
        processor: Of the model.
        videos: Path, or `{"path", "bytes"}`, of each.
        accelerator: Of the run; all processes must call this.
        batch_size: Views that a process classifies at a time.
        num_clips: Clips per video.
        num_crops: Crops per clip.
        num_workers: Worker processes that decode.
        show_progress: Whether the main process draws a bar of its share.

    Returns:
        Probabilities `(videos, classes)`, float32, 0 where a video was unreadable, NaN where a logit is not finite;
        and row of each unreadable video -> reason.

    Raises:
        ValueError: If the head is for regression.
    """
    batches = plan_shard(len(videos), count_videos_of_batch(batch_size, num_clips, num_crops), accelerator)
    views = VideoViews(videos, processor, num_clips, num_crops)
    scores = torch.zeros(len(videos), len(list_class_names(model.config)))
    failures: list[tuple[int, str]] = []
    with build_bar(sum(map(len, batches)), "video", accelerator, show_progress) as progress:
        for found, unreadable in iterate_scores(model, views, batches, accelerator, batch_size, num_workers):
            # An unreadable video keeps its row, so that rows stay those of the data.
            failures += unreadable.items()
            for row, own in found.items():
                scores[row] = own
            progress.update(len(found) + len(unreadable))
    share_rows(scores, accelerator)
    return scores.numpy(), dict(sorted(gather_object(failures)))


def count_videos_of_batch(batch_size: int, num_clips: int, num_crops: int) -> int:
    """Videos of a batch that counts views; those of a video stay in one batch, where they are merged."""
    return max(batch_size // (num_clips * num_crops), 1)


def iterate_scores(
    model: UMTVideoForVideoClassification,
    views: VideoViews,
    batches: list[range],
    accelerator: Accelerator,
    batch_size: int,
    num_workers: int | None,
    is_standalone: bool | None = None,
) -> Generator[tuple[dict[int, torch.Tensor], dict[int, str]]]:
    """Score batches of videos, one after the other.

    Args:
        model: On the accelerator's device.
        views: All videos.
        batches: Rows of this process.
        accelerator: Of the run; gives the precision.
        batch_size: Views that go through the model at a time.
        num_workers: Worker processes that decode.
        is_standalone: Whether the model is not being trained meanwhile; default: whether this is in an inference run.

    Yields:
        Of each batch: row of each video that could be read -> probabilities `(classes,)`, and of each other one ->
        reason.
    """
    num_views, many_labels = views.num_clips * views.num_crops, has_many_labels(model.config)
    for samples in read_ahead(views, batches, num_workers, videos=views.videos, collate_fn=list):
        found: dict[int, torch.Tensor] = {}
        read = {row: pixels for row, pixels, _ in samples if pixels is not None}
        if read:
            # Not around the loop: who takes the scores would work without gradients.
            with in_model(), evaluation_mode(model, accelerator, is_standalone):
                # One video may have more views than a batch may hold: they are classified in parts.
                parts = torch.cat(list(read.values())).split(batch_size)
                logits = [model(part.to(model.device, model.dtype)).logits.float().cpu() for part in parts]
            found = dict(zip(read, merge_views(torch.cat(logits), num_views, many_labels), strict=True))
        yield found, {row: reason for row, pixels, reason in samples if pixels is None}


@dataclass(frozen=True)
class LabelledVideo:
    """A video's likeliest classes, best first."""

    path: str
    labels: tuple[ScoredLabel, ...]

    def format(self) -> str:
        """Write it as lines for people."""
        return "\n".join([format_name(self.path), *(f"  {scored.format()}" for scored in self.labels)])


@dataclass(frozen=True)
class LabelReport:
    """What `VideoClassifier.classify_files` found.

    Attributes:
        videos: Those that could be read, in order of their paths.
        skipped: Those that could not.
    """

    videos: tuple[LabelledVideo, ...]
    skipped: tuple[SkippedVideo, ...]

    def format(self) -> str:
        """Write it as lines for people: each video with its classes, then those skipped with their reasons."""
        return "\n".join([*(video.format() for video in self.videos), self.format_end(len(self.videos))])

    def format_end(self, num_labelled: int) -> str:
        """Write the last lines: how many there were of each kind, and those skipped."""
        skipped = [video.format() for video in self.skipped]
        return "\n".join([f"{num_labelled} classified, {len(self.skipped)} skipped", *skipped])


@dataclass(frozen=True)
class LabelOptions:
    """How many files are classified.

    Attributes:
        top_k: How many classes per video.
        num_clips: Clips per video, whose probabilities are averaged; default: the processor's.
        num_crops: Crops per clip, likewise.
        batch_size: Views that a process classifies at a time.
        num_workers: Processes that read ahead, for each process.
        show_progress: Whether the main process draws a bar.
        dataloader_timeout_seconds: For which these processes may give nothing before the run ends and names the
            videos; 0: for ever.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If `top_k` or another number is below 1.
    """

    top_k: int = 5
    num_clips: int | None = None
    num_crops: int | None = None
    batch_size: int = 8
    num_workers: int | None = 0
    show_progress: bool = True
    dataloader_timeout_seconds: int = TIMEOUT_SECONDS

    def __post_init__(self) -> None:
        for name in ("top_k", "num_clips", "num_crops", "batch_size"):
            require_count(name, getattr(self, name))
        require_count("dataloader_timeout_seconds", self.dataloader_timeout_seconds, 0)


class VideoClassifier:
    """Names what videos show: loads a classifier once and answers often.

    Probabilities are those of a softmax, or, by `config.problem_type`, a sigmoid of each class where a video may have
    several labels.

    Args:
        model: Folder or Hub id of a classifier with its processor, or the folder of an exported one (`umt-hf export`),
            which has a precision and an attention already.
        device: Where the model runs; default: the process's accelerator, or CPU.
        attn_implementation: "sdpa", "eager", ...; default: Transformers' choice.
        dtype: Default: that of the stored weights.
        tokens: Which tokens of a clip the encoder sees; default: as the model's configuration says.

    Raises:
        ValueError: If the model lacks weights, such as those of the head: a random head gives answers too; or if its
            head is for regression.
        OSError: If there is no model, or no processor beside it.

    Examples:
        >>> from umt_hf import VideoClassifier
        >>> classifier = VideoClassifier("umt-vit-b16-k400")
        >>> best, *others = classifier.classify("video.mp4", top_k=3)
        >>> best.label
        'riding a bike'
        >>> report = classifier.classify_files(["videos"], top_k=1)
        >>> len(report.videos), len(report.skipped)
        (4, 0)
    """

    templates: list[str] | None = None  # of a zero-shot classifier, whose classes are texts
    fresh: tuple[str, ...] = ()  # weights that are random, and are not used

    def __init__(
        self,
        model: str | os.PathLike,
        device: str | torch.device | None = None,
        attn_implementation: str | None = None,
        dtype: torch.dtype | None = None,
        tokens: KeptTokenArguments | None = None,
    ):
        options: dict[str, Any] = {"attn_implementation": attn_implementation, "dtype": dtype}
        loaded: Any
        if is_export(model):
            if tokens is not None and tokens.keep_ratio is not None:
                raise ValueError(f"keep_ratio: {model} is an export, which sees all tokens. Take the model itself.")
            loaded = load_exported_classifier(model, device)
            self.device: torch.device = loaded.device
            self.kept_tokens: dict[str, Any] | None = None
        else:
            loaded = load_complete_model(UMTVideoForVideoClassification, model, **options)
            self.kept_tokens = keep_tokens(loaded, tokens)
            self.device = resolve_device(device)
            loaded = place_model(loaded, self.device)
        self.model = cast("UMTVideoForVideoClassification", loaded)  # or what answers as one
        self.many_labels = has_many_labels(loaded.config)
        self.processor = load_video_processor(model)
        self.labels = list_class_names(loaded.config)

    @overload
    def classify(
        self, videos: VideoSource, top_k: int = 5, num_clips: int | None = None, num_crops: int | None = None
    ) -> tuple[ScoredLabel, ...]: ...

    @overload
    def classify(
        self, videos: list[str], top_k: int = 5, num_clips: int | None = None, num_crops: int | None = None
    ) -> list[tuple[ScoredLabel, ...]]: ...

    @overload
    def classify(
        self, videos: VideoInput, top_k: int = 5, num_clips: int | None = None, num_crops: int | None = None
    ) -> tuple[ScoredLabel, ...] | list[tuple[ScoredLabel, ...]]: ...

    def classify(
        self, videos: Any, top_k: int = 5, num_clips: int | None = None, num_crops: int | None = None
    ) -> tuple[ScoredLabel, ...] | list[tuple[ScoredLabel, ...]]:
        """The likeliest classes of a video, best first; of a list of videos, those of each.

        Args:
            videos: One or a list of what the processor takes: path, URL, bytes, array, tensor or frames.
            top_k: How many classes per video; all, if there are fewer.
            num_clips: Clips per video, whose probabilities are averaged; default: the processor's.
            num_crops: Crops per clip, likewise.

        Raises:
            VideoDecodingError: If a video cannot be read.
            TypeError: If `top_k` or another number is not an integer.
            ValueError: If one is below 1, or the model gives NaN or infinite values.
        """
        # Before decoding, which takes longer than reading a mistake.
        for name, count in (("top_k", top_k), ("num_clips", num_clips), ("num_crops", num_crops)):
            require_count(name, count)
        views = {"num_clips": num_clips, "num_crops": num_crops}
        sources = split_videos(videos)
        found = [rank_labels(self._compute_probabilities(source, views), self.labels, top_k) for source in sources]
        # A list may also be the frames of one video; that comes back as a single list.
        is_frames = isinstance(sources[0], list) and not isinstance(videos[0], list | tuple)
        is_batch = isinstance(videos, list | tuple) and not is_frames
        return found if is_batch or len(found) > 1 else found[0]

    def classify_files(
        self,
        sources: Iterable[str],
        top_k: int = 5,
        num_clips: int | None = None,
        num_crops: int | None = None,
        batch_size: int = 8,
        num_workers: int | None = 0,
        show_progress: bool = True,
    ) -> LabelReport:
        """The likeliest classes of many files; those that cannot be read are listed with their reasons.

        Every process that `accelerate launch` starts takes a share; Accelerate's configuration sets the
        precision.

        Args:
            sources: Video files, and folders with videos at any depth. The main process's list counts.
            top_k: How many classes per video.
            num_clips: Clips per video, whose probabilities are averaged; default: the processor's.
            num_crops: Crops per clip, likewise.
            batch_size: Views that a process classifies at a time.
            num_workers: Processes that read ahead, for each process.
            show_progress: Whether the main process draws a bar of its share.

        Returns:
            What was found, the same in all processes.

        Raises:
            OSError: If none of the sources exists.
            TypeError: If a number is not an integer.
            ValueError: If there are no sources, a source folder has no videos, or a number is below 1.
        """
        options = LabelOptions(top_k, num_clips, num_crops, batch_size, num_workers, show_progress)
        with inference_run(logger.info):
            found = list(self.iterate_files(sources, options))
        labelled = [video for video in found if isinstance(video, LabelledVideo)]
        skipped = [video for video in found if isinstance(video, SkippedVideo)]
        return LabelReport(tuple(labelled), tuple(sorted(skipped, key=lambda video: video.path)))

    def iterate_files(
        self, sources: Iterable[str], options: LabelOptions, announce: Callable[[str], object] = logger.info
    ) -> Generator[LabelledVideo | SkippedVideo]:
        """The same, one result after the other, so that there may be any number of them.

        Args:
            sources: As for `classify_files`.
            options: Views, batches and answers.
            announce: Gets a line on what was found, in the main process.

        Yields:
            The sources that do not exist, then each video in order of its path; the same in all processes.

        Raises:
            ValueError: If a source folder has no videos, or `top_k` is below 1.
        """
        accelerator = build_patient_accelerator()
        # Only the main process lists: files may come and go between two listings.
        listed = [list_videos(sources) if accelerator.is_main_process else None]
        files, missing = broadcast_object_list(listed)[0]
        if accelerator.is_main_process:
            announce(f"{len(files):,} videos found.")
        yield from missing
        for _, video in self.label(files, options, accelerator):
            yield video

    def label(
        self,
        files: Sequence[VideoFile],
        options: LabelOptions,
        accelerator: Accelerator,
        wanted: Container[int] | None = None,
    ) -> Generator[tuple[int, LabelledVideo | SkippedVideo]]:
        """Label files in their order, batch by batch; a batch is the same whichever of its files are wanted.

        Args:
            files: All of them, the same in every process.
            options: Views, batches and answers.
            accelerator: Of the run; all processes must call this.
            wanted: Rows of those to label; default: all.

        Yields:
            Row and result, the same in all processes.
        """
        num_clips = options.num_clips or self.processor.num_clips
        num_crops = options.num_crops or self.processor.num_crops
        size = count_videos_of_batch(options.batch_size, num_clips, num_crops)
        rows_wanted = range(len(files)) if wanted is None else wanted
        batches = [range(start, min(start + size, len(files))) for start in range(0, len(files), size)]
        # Also what is not wanted of a batch goes through the model: the last bits of a result depend on the batch.
        batches = [batch for batch in batches if any(row in rows_wanted for row in batch)]
        rank, count = accelerator.process_index, accelerator.num_processes
        views = VideoViews([file.path for file in files], self.processor, num_clips, num_crops)
        share, size = batches[rank::count], options.batch_size
        scored = iterate_scores(self.model, views, share, accelerator, size, options.num_workers, is_standalone=True)
        total = sum(row in rows_wanted for batch in batches for row in batch)
        with closing(scored), build_bar(total, "video", accelerator, options.show_progress) as progress:
            for _ in range(0, len(batches), count):
                scores, unreadable = next(scored, ({}, {}))
                found = [(row, self._build_result(files[row], options.top_k, own)) for row, own in scores.items()]
                found += [(row, _build_skip(files[row], reason)) for row, reason in unreadable.items()]
                for row, video in sorted(gather_object(found), key=lambda pair: pair[0]):
                    if row in rows_wanted:
                        progress.update()
                        yield row, video

    def _build_result(self, file: VideoFile, top_k: int, scores: torch.Tensor) -> LabelledVideo | SkippedVideo:
        # NaN would sort anywhere and print as a probability.
        if not torch.isfinite(scores).all():
            return _build_skip(file, "Its scores are not finite; the model cannot classify it.")
        return LabelledVideo(file.path, rank_labels(scores.numpy(), self.labels, top_k))

    @torch.inference_mode()
    def _compute_probabilities(self, source: Any, views: dict[str, int | None]) -> np.ndarray:
        """Probabilities of one video, float32 `(classes,)`."""
        pixel_values = self.processor(source, return_tensors="pt", **views)["pixel_values"]
        # Published tests take 12 views per video, which may not fit at once.
        parts = pixel_values.to(self.device, self.model.dtype).split(VIEWS_AT_A_TIME)
        logits = torch.cat([self.model(pixel_values=part).logits.float() for part in parts])
        probabilities = merge_views(logits, len(logits), self.many_labels)
        require_finite(self.model, probabilities, "videos", lambda _: "this one")
        return probabilities[0].cpu().numpy()
