r"""Measure how well a model says when in a video a text is right: windows slide over each video and are ranked.

    umt-hf evaluate moments --model_name_or_path outputs/retrieval \
        --data shapes/test_moments.json --window_seconds 3 --stride_seconds 1

Rows of the data have `video`, `caption`, `start_seconds` and `end_seconds`.

Source: Lei et al., "Detecting Moments and Highlights in Videos via Natural Language Queries", NeurIPS 2021 (figures).
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..data.annotations import MomentQuery, load_moments, name_video
from ..data.sources import get_source
from ..data.video_files import SkippedVideo, VideoFile
from ..inference.engine import in_model
from ..inference.held_out import build_bar, evaluation_mode, require_finite
from ..inference.moments import MomentClips, MomentCollector, WindowSettings, choose_apart, read_moments
from ..modeling.losses_umt import normalize_features
from ..modeling.modeling_umt_video_text import UMTVideoTextModel
from ..processing.decoding import VideoDecodingError
from ..processing.processing_umt_video_text import UMTVideoTextProcessor
from ..runs.arguments import EvaluatedModelArguments, EvaluationDataArguments, ReportArguments
from ..runs.config import describe, script
from .metrics.moments import Span, compute_moment_figures
from .report import describe_run, write_report
from .setup import load_model_and_processor, measured_run, require_names, say_tested


@dataclass(frozen=True)
class VideoMoments:
    """A video's windows and their vectors.

    Attributes:
        spans: Start and end in seconds.
        vectors: Float32 `(windows, D)`, whose inner product with a text's unit vector is the dual encoder's score.
    """

    spans: list[Span]
    vectors: np.ndarray


def encode_moments(
    model: UMTVideoTextModel,
    processor: UMTVideoTextProcessor,
    videos: Sequence[Any],
    windows: WindowSettings,
    accelerator: Accelerator,
    *,
    batch_size: int = 32,
    num_workers: int | None = None,
    show_progress: bool = False,
) -> list[VideoMoments]:
    """Encode the windows of videos; called in all processes, each gets those of all.

    Args:
        model: It runs as in `eval()`.
        processor: Gives number of frames per window, how they are chosen, size and decoder.
        videos: Path, or `{"path", "bytes"}`, of each.
        windows: Length and distance.
        accelerator: Of the run; gives the precision.
        batch_size: Windows that a process takes at a time.
        num_workers: Processes that decode, for each process; default: its share of the cores, from 1 to 4.
        show_progress: Whether the main process draws a bar of its share.

    Raises:
        VideoDecodingError: If a video cannot be read; it names the file.
        ValueError: If a vector is not finite.
    """
    rank, count = accelerator.process_index, accelerator.num_processes
    names = [name_video(video, row) for row, video in enumerate(videos)]
    # Named by row, since rows of bytes may have equal names.
    files = [VideoFile(str(row), 0, 0) for row in range(len(videos))][rank::count]
    sources = {file.path: get_source(videos[int(file.path)]) for file in files}
    reads = read_moments(
        files, processor.video_processor, windows, batch_size, num_workers, is_joined=False, sources=sources
    )
    collector, own = MomentCollector(), []
    with evaluation_mode(model, accelerator), build_bar(len(files), "video", accelerator, show_progress) as progress:
        for read in (read for batch in reads for read in batch):
            video = read if isinstance(read, SkippedVideo) else collector.add(read, _encode(model, read))
            if isinstance(video, SkippedVideo):
                name = names[int(video.path)]
                raise VideoDecodingError(f"{name}: {video.reason.removeprefix(f'{name}: ')}")
            if video is not None:
                spans = [(moment.start_seconds, moment.end_seconds) for moment in video.moments]
                own.append((int(video.file.path), VideoMoments(spans, np.stack(video.values))))
                progress.update()
    found = dict(gather_object(own))
    for row in range(len(videos)):
        require_finite(
            model, torch.from_numpy(found[row].vectors), "moments", lambda _, row=row: f"one of {names[row]}"
        )
    return [found[row] for row in range(len(videos))]


def _encode(model: UMTVideoTextModel, read: MomentClips) -> np.ndarray:
    with in_model():
        return model.get_video_features(read.pixel_values.to(model.device)).pooler_output.float().cpu().numpy()


def encode_queries(
    model: UMTVideoTextModel,
    processor: UMTVideoTextProcessor,
    queries: Sequence[MomentQuery],
    accelerator: Accelerator,
    batch_size: int = 32,
) -> np.ndarray:
    """Unit vectors of texts, float32 `(queries, D)`; every process computes all of them, which takes little."""
    vectors = []
    with evaluation_mode(model, accelerator):
        for start in range(0, len(queries), batch_size):
            texts = [query.text for query in queries[start : start + batch_size]]
            inputs = processor(text=texts, padding=True, return_tensors="pt").to(accelerator.device)
            outputs = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
            vectors.append(normalize_features(outputs.pooler_output).float().cpu().numpy())
    return np.concatenate(vectors)


def rank_moments(moments: VideoMoments, text: np.ndarray, max_overlap: float) -> list[Span]:
    """A video's windows by their similarity with a text, best first, without those that a better one covers.

    Args:
        moments: Of the video.
        text: Unit vector `(D,)`.
        max_overlap: Largest intersection over union with a better one.
    """
    order = np.argsort(-(moments.vectors @ text), kind="stable")
    ranked = [moments.spans[place] for place in order]
    return [ranked[place] for place in choose_apart(ranked, max_overlap)]


def evaluate_moments(
    model: UMTVideoTextModel,
    processor: UMTVideoTextProcessor,
    videos: Sequence[Any],
    queries: Sequence[MomentQuery],
    windows: WindowSettings,
    accelerator: Accelerator,
    *,
    batch_size: int = 32,
    max_overlap: float = 0.5,
    num_workers: int | None = None,
    show_progress: bool = False,
) -> tuple[dict[str, float], list[list[Span]]]:
    """Rank the windows of each query's video; called in all processes, each gets the same.

    Args:
        model: It runs as in `eval()`.
        processor: As for `encode_moments`, as are the arguments that are not named here.
        videos: Path, or `{"path", "bytes"}`, of each.
        queries: As `load_moments` gives them.
        windows: Length and distance.
        accelerator: Of the run.
        batch_size: Windows or texts at a time.
        max_overlap: Largest intersection over union of a ranked window with a better one.
        num_workers: Processes that decode.
        show_progress: Whether the main process draws a bar.

    Returns:
        Figures, see `compute_moment_figures`; and the ranked windows of each query.

    Raises:
        VideoDecodingError: If a video cannot be read; it names the file.
        ValueError: If a vector is not finite.
    """
    moments = encode_moments(
        model,
        processor,
        videos,
        windows,
        accelerator,
        batch_size=batch_size,
        num_workers=num_workers,
        show_progress=show_progress,
    )
    texts = encode_queries(model, processor, queries, accelerator, batch_size)
    found = [rank_moments(moments[query.video], text, max_overlap) for query, text in zip(queries, texts, strict=True)]
    return compute_moment_figures(found, [query.spans for query in queries]), found


@dataclass(kw_only=True)
class MomentReportArguments(ReportArguments):
    """Windows, and the report."""

    window_seconds: float = describe(4.0, "Length of a window.")
    stride_seconds: float | None = describe(None, "From a window to the next; default: half a window.")
    max_overlap: float = describe(
        0.5, "Largest intersection over union in time of a ranked window with a better one, in [0, 1]."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.max_overlap <= 1:
            raise ValueError(f"max_overlap must be in [0, 1], got {self.max_overlap}.")
        self.build_windows()

    def build_windows(self) -> WindowSettings:
        """The settings that these are.

        Raises:
            ValueError: If they make no sense.
        """
        stride = self.window_seconds / 2 if self.stride_seconds is None else self.stride_seconds
        return WindowSettings(self.window_seconds, stride)


SECTIONS = {"model": EvaluatedModelArguments, "data": EvaluationDataArguments, "evaluation": MomentReportArguments}


@script(SECTIONS)
def main(
    model_args: EvaluatedModelArguments, data: EvaluationDataArguments, args: MomentReportArguments
) -> dict[str, float]:
    """Load, rank, measure, report.

    Returns:
        Metrics; see `compute_moment_figures`.
    """
    accelerator = Accelerator(mixed_precision=model_args.mixed_precision)
    _, source = require_names(model_args, data)
    videos, queries = load_moments(source, **data.source_options())
    model, processor = load_model_and_processor(UMTVideoTextModel, model_args, data)
    say_tested(model_args, data, f"{len(videos):,} videos, {len(queries):,} texts with their moments")
    with measured_run(accelerator, data):
        metrics, found = evaluate_moments(
            model.to(accelerator.device),
            processor,
            videos,
            queries,
            args.build_windows(),
            accelerator,
            batch_size=args.per_device_eval_batch_size,
            max_overlap=args.max_overlap,
            num_workers=data.dataloader_num_workers,
            show_progress=not args.disable_tqdm,
        )
    report = {
        "task": "moments",
        "metrics": metrics,
        "num_videos": len(videos),
        "num_texts": len(queries),
        **describe_run(model, processor, accelerator, model_args, data),
        **dataclasses.asdict(args),
    }
    predictions = [
        {"video": name_video(videos[query.video], query.video), "text": query.text, "moments": spans}
        for query, spans in zip(queries, found, strict=True)
    ]
    write_report(accelerator, args.report_folder, report, predictions)
    return metrics


if __name__ == "__main__":
    main()
