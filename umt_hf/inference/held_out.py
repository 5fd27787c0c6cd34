"""Held-out videos spread over processes: each read once, in batches that are the same for any number of processes.

Batch b belongs to process b mod W. What is computed batch by batch is therefore what one process computes, bit by bit.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers.video_utils import VideoInput

from ..data.annotations import identify_video, name_video
from ..data.sources import get_source
from ..processing.decoding import VideoDecodingError, VideoSource
from ..processing.video_processing_umt_video import UMTVideoProcessor
from .engine import in_model, read_ahead, without_gradients

SHARED_ROWS = 4096


def plan_shard(total: int, batch_size: int, accelerator: Accelerator) -> list[range]:
    """Batches of this process: with those of the others they cover `range(total)` once."""
    batches = [range(start, min(start + batch_size, total)) for start in range(0, total, batch_size)]
    return batches[accelerator.process_index :: accelerator.num_processes]


def share_rows(rows: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """Fill in, in place, the rows that other processes computed.

    Args:
        rows: On the host, `(total, ...)`, the same shape in every process: the rows of this process, 0 elsewhere.
        accelerator: Of the run.

    Returns:
        `rows`.
    """
    if accelerator.num_processes > 1:
        for part in rows.split(SHARED_ROWS):
            # One term of each sum is not 0, so that it is exact; in float32, which every backend can add.
            values = part.float() if part.is_floating_point() else part
            part.copy_(accelerator.reduce(values.to(accelerator.device), reduction="sum"))
    return rows


def mark_nonfinite(logits: torch.Tensor) -> torch.Tensor:
    """Float32 logits with NaN for infinite ones too, which a sigmoid or softmax would turn into certain answers."""
    logits = logits.float()
    return logits.masked_fill(~torch.isfinite(logits), torch.nan)


def require_finite(model: nn.Module, rows: torch.Tensor, kind: str, name_row: Callable[[int], str]) -> None:
    """Refuse scores that are not numbers: sorted or compared, they give a figure that looks right.

    Args:
        model: What gave them; its folder is named.
        rows: `(rows, ...)`.
        kind: What a row is, in the plural.
        name_row: Gives the name of a row.

    Raises:
        ValueError: If a score is NaN or infinite; it names the model and the first row.
    """
    bad = (~torch.isfinite(rows.reshape(len(rows), -1)).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        name = getattr(model, "name_or_path", "") or type(model).__name__
        raise ValueError(
            f"{name}: what it computes for {len(bad)} of {len(rows)} {kind} is NaN or infinite ({name_row(bad[0])} is "
            "the first). Its weights hold such values, or they overflow: try another checkpoint, or "
            "mixed_precision=no."
        )


def build_bar(
    total: int, unit: str, accelerator: Accelerator, show_progress: bool, iterable: Iterable[Any] | None = None
) -> tqdm:
    """A progress bar that the main process draws of its share; below the bar of a training it goes when it is full."""
    is_hidden = not (show_progress and accelerator.is_main_process)
    return tqdm(iterable, total=total, unit=unit, leave=None, dynamic_ncols=True, disable=is_hidden)


@contextmanager
def evaluation_mode(model: nn.Module, accelerator: Accelerator, is_standalone: bool | None = None) -> Generator[None]:
    """Without dropout and gradients, in the run's precision; afterwards every module trains or not as before.

    Args:
        model: What will run.
        accelerator: Of the run.
        is_standalone: See `without_gradients`.
    """
    # Module by module: a frozen tower in a training model has its own mode.
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with without_gradients(accelerator.device, is_standalone), accelerator.autocast():
            yield
    finally:
        for module, training in was_training.items():
            module.training = training


def group_by_video(videos: Iterable[Any]) -> tuple[list, list[list[int]]]:
    """Distinct videos in order of first appearance, and the rows of each."""
    places: dict[str, int] = {}
    distinct, rows_of_video = [], []
    for row, video in enumerate(videos):
        place = places.setdefault(identify_video(video, row), len(distinct))
        if place == len(distinct):
            distinct.append(video)
            rows_of_video.append([])
        rows_of_video[place].append(row)
    return distinct, rows_of_video


class HeldOutVideos(Dataset):
    """Videos as a model of video and text is tested on them: the middle frames of equal parts, one view.

    Args:
        videos: Path, or `{"path", "bytes"}`, of each.
        processor: Gives number of frames, size and decoder.
    """

    def __init__(self, videos: Sequence[str | dict[str, Any]], processor: UMTVideoProcessor):
        self.videos, self.processor = videos, processor

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Normalised frames `(T, C, H, W)`.

        Raises:
            VideoDecodingError: If the video cannot be read: a number without it would be another test's.
        """
        video = self.videos[index]
        try:
            return read_middle_frames(self.processor, get_source(video))
        # The processor also raises ValueError for files that no decoder refuses, such as one without frames.
        except ValueError as error:
            name = name_video(video, index)
            message = str(error) if name in str(error) else f"{name}: {error}"
            raise VideoDecodingError(message) from error


def read_middle_frames(processor: UMTVideoProcessor, video: VideoInput | VideoSource) -> torch.Tensor:
    """One view of a video as models of video and text are tested on it: the middle frames of equal parts.

    Args:
        processor: Gives number of frames, size and decoder.
        video: What the processor takes.

    Returns:
        Normalised frames `(T, C, H, W)`.
    """
    views = processor(
        cast("VideoInput", video),
        num_frames=processor.num_frames,
        sampling_strategy="middle",
        num_clips=1,
        num_crops=1,
        return_tensors="pt",
    )
    return views["pixel_values"][0]


def load_video_batches(
    videos: Sequence[str | dict[str, Any]],
    batches: list[range],
    processor: UMTVideoProcessor,
    accelerator: Accelerator,
    num_workers: int | None,
    show_progress: bool = False,
) -> Iterator[tuple[range, torch.Tensor]]:
    """Read batches of videos.

    Args:
        videos: All of them.
        batches: Those of this process, as `plan_shard` gives them.
        processor: Of the model.
        accelerator: Says where pixels go.
        num_workers: Processes that decode; 0: this one does.
        show_progress: Whether the main process draws a bar of its share.

    Yields:
        Indices of a batch's videos, and their `pixel_values (B, T, C, H, W)` on the device.

    Raises:
        VideoDecodingError: If a video cannot be read; it names the file.
    """
    dataset = HeldOutVideos(videos, processor)
    loader = read_ahead(dataset, batches, num_workers, videos=videos, pin_memory=accelerator.device.type == "cuda")
    with build_bar(sum(map(len, batches)), "video", accelerator, show_progress) as progress:
        for batch, pixel_values in zip(batches, loader, strict=True):
            with in_model():
                yield batch, pixel_values.to(accelerator.device, non_blocking=True)
            progress.update(len(batch))
