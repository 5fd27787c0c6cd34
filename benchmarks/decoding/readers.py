"""The readers that are compared: `umt_hf`'s way from files to a batch, by decoder, and the published way."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from umt_hf.processing.decoding import DecoderName, open_video
from umt_hf.processing.sampling import sample_frame_indices
from umt_hf.processing.train_transforms import ClipCrop, PretrainingTransform

NUM_FRAMES = 8
BASELINE = "decord + PIL, frame by frame"
OURS = "umt_hf, pyav"


@dataclass(frozen=True)
class BatchTime:
    """Processor seconds of one batch, over all threads of the process: how long one core is busy."""

    decoding: float
    augmentation: float


class BatchReader(ABC):
    """Reads one random clip of each of some files and makes a batch of them.

    The draws (frames, crops, flips) depend on the generator alone, so that all readers can be given the same.

    Args:
        transform: Draws the crops of all readers.
    """

    name: str

    def __init__(self, transform: PretrainingTransform):
        self.transform = transform

    def read_batch(self, paths: Sequence[Path], generator: torch.Generator) -> tuple[torch.Tensor, BatchTime]:
        """Give the batch, `(len(paths), frames, 3, size, size)` float32 normalised, and its cost."""
        start = time.process_time()
        clips = [self.decode(path, generator) for path in paths]
        decoded = time.process_time()
        crops = [self.transform.sample(*self.measure(clip), generator) for clip in clips]
        batch = self.augment(clips, crops)
        return batch, BatchTime(decoded - start, time.process_time() - decoded)

    def measure(self, clip: Any) -> tuple[int, int]:
        """Height and width of a clip's frames."""
        return clip.shape[1], clip.shape[2]

    @abstractmethod
    def decode(self, path: Path, generator: torch.Generator) -> Any:
        """Open a file and decode random frames, one of each of eight parts: uint8 `(frames, height, width, 3)`."""

    @abstractmethod
    def augment(self, clips: Sequence[Any], crops: Sequence[ClipCrop]) -> torch.Tensor:
        """Crop, resize, mirror and normalise."""


class UMTReader(BatchReader):
    """`umt_hf` as its stage-1 workers run it."""

    def __init__(self, transform: PretrainingTransform, decoder: DecoderName):
        super().__init__(transform)
        self.decoder: DecoderName = decoder
        self.name = f"umt_hf, {decoder}"

    def decode(self, path: Path, generator: torch.Generator) -> np.ndarray:
        """Open a file and decode the chosen frames."""
        return self.read(path, generator)

    def read(self, source: Any, generator: torch.Generator) -> np.ndarray:
        """Open what `open_video` takes and decode the chosen frames."""
        with open_video(source, self.decoder) as reader:
            indices = sample_frame_indices(reader.num_frames, NUM_FRAMES, "segments", generator=generator)
            return reader.get_frames(indices)

    def augment(self, clips: Sequence[np.ndarray], crops: Sequence[ClipCrop]) -> torch.Tensor:
        """Crop all frames of a clip at once, then resize and normalise the clips."""
        frames = [torch.from_numpy(clip).permute(0, 3, 1, 2) for clip in clips]
        cropped = [self.transform.crop(clip, crop).contiguous() for clip, crop in zip(frames, crops, strict=True)]
        return self.transform.resize_and_normalize(cropped, [crop.flip for crop in crops])


class FrameByFrameReader(BatchReader):
    """The published way: decord decodes, and every frame goes through PIL by itself."""

    name = BASELINE

    def __init__(self, transform: PretrainingTransform):
        import decord  # a peer, not a part of the package

        super().__init__(transform)
        self.decord = decord

    def decode(self, path: Path, generator: torch.Generator) -> np.ndarray:
        """Open a file with decord and decode the chosen frames."""
        reader = self.decord.VideoReader(str(path), num_threads=1)
        indices = sample_frame_indices(len(reader), NUM_FRAMES, "segments", generator=generator)
        return reader.get_batch(indices).asnumpy()

    def augment(self, clips: Sequence[np.ndarray], crops: Sequence[ClipCrop]) -> torch.Tensor:
        """Crop, resize, mirror and normalise frame by frame."""
        return torch.stack(
            [
                torch.stack([self._augment_frame(frame, crop) for frame in clip])
                for clip, crop in zip(clips, crops, strict=True)
            ]
        )

    def _augment_frame(self, frame: np.ndarray, crop: ClipCrop) -> torch.Tensor:
        image = Image.fromarray(frame).crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))
        image = image.resize((self.transform.size, self.transform.size), Image.Resampling.BILINEAR)
        if crop.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        return (pixels - mean) / std
