"""Videos to training clips, and what replaces one that cannot be read.

Every random choice for a clip depends only on a key made of the run's seed, the epoch and the row. So the clips of a
step do not depend on worker or process counts, and a resumed run sees what the uninterrupted one would have seen.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from ..data.in_flight import noted
from ..data.sources import get_source
from ..data.unreadable import choose_error, read_first_readable, sample_replacements
from ..processing.clips import read_clip
from ..processing.decoding import DecoderName
from ..processing.media_files import VideoSource
from ..processing.sampling import SamplingStrategy
from ..processing.train_transforms import PretrainingTransform
from .corpora import TrainingTable, build_generator

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClipRequest:
    """One video to be read: a row or its index, the key of its random choices, and the corpus that it is from."""

    row: int | dict[str, Any]
    key: tuple[int, ...]
    corpus: int = 0


@dataclass
class Clip:
    """What a worker makes of a video.

    Args:
        frames: Cropped frames `(T, C, H, W)`, uint8, before resizing.
        is_flipped: Whether the clip is to be mirrored.
        mask_noise: Exponential noise `(tokens,)` that orders the tokens when the mask is drawn.
    """

    frames: torch.Tensor
    is_flipped: bool
    mask_noise: torch.Tensor


class ClipDataset(torch.utils.data.Dataset):
    """Reads the clips of a request: decode once, then crop as often as asked.

    Args:
        table: Rows with a `video`; `None` where requests carry their row.
        transform: Crop and flip.
        num_frames: Frames per clip.
        num_tokens: Tokens per clip, for the mask noise.
        sampling_strategy: How frames are drawn (see `sample_frame_indices`).
        frame_stride: For dense sampling.
        decoder: Video reader.
        repeated_augmentation: Clips per video.
        is_training: Whether frames, crops and flips are drawn at random.
    """

    def __init__(
        self,
        table: TrainingTable | None,
        transform: PretrainingTransform,
        num_frames: int,
        num_tokens: int,
        sampling_strategy: SamplingStrategy = "segments",
        frame_stride: int = 1,
        decoder: DecoderName = "pyav",
        repeated_augmentation: int = 1,
        is_training: bool = True,
    ):
        self.table = table
        self.transform = transform
        self.num_frames = num_frames
        self.num_tokens = num_tokens
        self.sampling_strategy = sampling_strategy
        self.frame_stride = frame_stride
        self.decoder = decoder
        self.repeated_augmentation = repeated_augmentation
        self.is_training = is_training

    def __len__(self) -> int:
        return 0 if self.table is None else len(self.table)

    # pyrefly: ignore[bad-override-param-name]  what it is asked for is more than an index
    def __getitem__(self, request: ClipRequest) -> tuple[list[Clip], list[str]]:
        """Clips of a video, or of its replacement, and a line for each video that could not be read."""

        def read(row: int | dict[str, Any]) -> list[Clip]:
            # A shard may be damaged, too.
            return self._read_clips(row if isinstance(row, dict) else self._get_table()[row], request.key)

        clips, failures = read_first_readable(self._list_rows(request), read)
        return clips or [], failures

    def _get_table(self) -> TrainingTable:
        assert self.table is not None, "A request by number needs a table."
        return self.table

    def _list_rows(self, request: ClipRequest) -> Iterator[int | dict[str, Any]]:
        """The row itself, then, in training, the numbers of others in its place, drawn by its key."""
        yield request.row
        if not isinstance(request.row, dict) and self.is_training:
            # A source apart from that of the clip, whose draws are the same whether rows are replaced or not.
            yield from sample_replacements(len(self._get_table()), build_generator(*request.key, -1))

    def _read_clips(self, row: dict[str, Any], key: tuple[int, ...]) -> list[Clip]:
        # Decoding takes most of the time: copies of a video differ in crop, flip and mask alone.
        generator = build_generator(*key)
        video = row["video"]
        # A row with bytes as it is: its name is in errors.
        source = video if isinstance(video, dict) and video.get("bytes") else get_source(video)
        with noted(video, key[-1]):
            frames = self._read_frames(source, generator)
        return [self._cut_clip(frames, generator) for _ in range(self.repeated_augmentation)]

    def _read_frames(self, source: VideoSource, generator: torch.Generator) -> torch.Tensor:
        """Chosen frames of a video `(T, C, H, W)`, uint8."""
        return read_clip(
            source,
            self.num_frames,
            self.sampling_strategy,
            generator=generator if self.is_training else None,
            frame_stride=self.frame_stride,
            decoder=self.decoder,
        )

    def _cut_clip(self, frames: torch.Tensor, generator: torch.Generator) -> Clip:
        crop = self.transform.sample(frames.shape[-2], frames.shape[-1], generator if self.is_training else None)
        # Drawn here and not on the device, so that the mask depends neither on device nor on batch.
        noise = torch.empty(self.num_tokens).exponential_(generator=generator)
        # A view would carry the uncropped frames with it on the way to the main process.
        return Clip(self.transform.crop(frames, crop).contiguous(), crop.flip, noise)


AnyClip = TypeVar("AnyClip", bound=Clip)


class ClipCollator(Generic[AnyClip]):
    """Clips of several videos to a batch.

    Args:
        transform: Resizes and normalises; here, in the worker, or left to `finish_batch` on the device. Large crops
            are resized here in any case, before they travel.
        use_worker: Whether pixels are finished in the worker (there is no accelerator).
        keep_size: Whether another video of the batch takes the place of an unreadable one, so that shapes hold (in
            training); else it is left out, so that no video counts twice, and a batch may have no clips.
    """

    def __init__(self, transform: PretrainingTransform, use_worker: bool, keep_size: bool = True):
        self.transform = transform
        self.use_worker = use_worker
        self.keep_size = keep_size

    def __call__(self, samples: Sequence[tuple[list[AnyClip], list[str]]]) -> dict[str, Any]:
        """Batch with `frames` (or finished `pixel_values`), `flips`, `mask_noise`, `num_videos` and `failures`.

        Raises:
            UserError: If no video of a training batch could be read; a `MachineError` if a shard is gone.
        """
        counts = {"num_videos": len(samples), "failures": [failure for _, lines in samples for failure in lines]}
        good = [clips for clips, _ in samples if clips]
        if not good and not self.keep_size:
            return counts
        if not good:
            failures = counts["failures"][:5]
            raise choose_error(failures)("No video of a batch could be read:\n  " + "\n  ".join(failures))
        if self.keep_size:  # steps of one shape, in all processes alike
            good = [clips or good[i % len(good)] for i, (clips, _) in enumerate(samples)]
        batch = self.build_batch([clip for group in good for clip in group])
        if not self.use_worker:
            batch["frames"] = [self.transform.shrink(frames) for frames in batch["frames"]]
        if self.use_worker:
            batch = finish_batch(batch, self.transform, torch.device("cpu"))
        return {**batch, **counts}

    def build_batch(self, clips: list[AnyClip]) -> dict[str, Any]:
        """What a batch holds of its clips, before pixels are finished."""
        return {
            "frames": [clip.frames for clip in clips],
            "flips": [clip.is_flipped for clip in clips],
            "mask_noise": torch.stack([clip.mask_noise for clip in clips]),
        }


def finish_batch(batch: dict[str, Any], transform: PretrainingTransform, device: torch.device) -> dict[str, Any]:
    """Resize, flip and normalise the frames of a batch on `device`; a finished batch is only moved there."""
    if "mask_noise" not in batch:  # nothing in it could be read
        return batch
    if "pixel_values" not in batch:
        # Not stacked: crops have many sizes, and bytes are quicker to move than the resized floats.
        frames = [clip.to(device, non_blocking=True) for clip in batch.pop("frames")]
        batch["pixel_values"] = transform.resize_and_normalize(frames, batch.pop("flips"))
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
