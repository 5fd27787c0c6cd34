"""Other ways from files to a batch: decord's batches, torchcodec and Transformers' `load_video`, with torchvision."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torchvision.transforms.v2 import functional as F
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from umt_hf.processing.sampling import sample_frame_indices
from umt_hf.processing.train_transforms import ClipCrop, PretrainingTransform

from .readers import NUM_FRAMES, BatchReader


class TorchvisionReader(BatchReader):
    """Readers whose frames go through torchvision's second transforms, a clip at a time."""

    def measure(self, clip: torch.Tensor) -> tuple[int, int]:
        """Height and width of a clip's frames."""
        return clip.shape[2], clip.shape[3]

    @abstractmethod
    def decode(self, path: Path, generator: torch.Generator) -> torch.Tensor:
        """Open a file and decode random frames, one of each of eight parts: uint8 `(frames, 3, height, width)`."""

    def augment(self, clips: Sequence[torch.Tensor], crops: Sequence[ClipCrop]) -> torch.Tensor:
        """Crop, resize, mirror and normalise clip by clip."""
        return torch.stack([self._augment_clip(clip, crop) for clip, crop in zip(clips, crops, strict=True)])

    def _augment_clip(self, clip: torch.Tensor, crop: ClipCrop) -> torch.Tensor:
        size = [self.transform.size, self.transform.size]
        clip = F.resized_crop(clip, crop.top, crop.left, crop.height, crop.width, size, antialias=True)
        clip = F.horizontal_flip(clip) if crop.flip else clip
        clip = F.to_dtype(clip, torch.float32, scale=True)
        return F.normalize(clip, list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD))


class DecordBatchReader(TorchvisionReader):
    """decord's `get_batch`."""

    name = "decord get_batch + torchvision"

    def __init__(self, transform: PretrainingTransform):
        import decord  # a peer, not a part of the package

        super().__init__(transform)
        self.decord = decord

    def decode(self, path: Path, generator: torch.Generator) -> torch.Tensor:
        """Open a file with decord and decode the chosen frames."""
        reader = self.decord.VideoReader(str(path), num_threads=1)
        indices = sample_frame_indices(len(reader), NUM_FRAMES, "segments", generator=generator)
        return torch.from_numpy(reader.get_batch(indices).asnumpy()).permute(0, 3, 1, 2)


class TorchcodecReader(TorchvisionReader):
    """torchcodec on one thread.

    Args:
        transform: Draws the crops.
        seek_mode: Its way to find frames: by reading all packets first, or by the frame rate.
    """

    def __init__(self, transform: PretrainingTransform, seek_mode: Literal["exact", "approximate"]):
        from torchcodec.decoders import VideoDecoder

        super().__init__(transform)
        self.build_decoder = partial(VideoDecoder, seek_mode=seek_mode, num_ffmpeg_threads=1)
        self.name = f"torchcodec, {seek_mode} + torchvision"

    def decode(self, path: Path, generator: torch.Generator) -> torch.Tensor:
        """Open a file with torchcodec and decode the chosen frames."""
        decoder = self.build_decoder(str(path))
        indices = sample_frame_indices(len(decoder), NUM_FRAMES, "segments", generator=generator)
        return decoder.get_frames_at(indices=indices).data


class LoadVideoReader(TorchvisionReader):
    """Transformers' `load_video`, which its video processors call.

    Args:
        transform: Draws the crops.
        backend: Library that decodes.
    """

    def __init__(self, transform: PretrainingTransform, backend: str):
        from transformers.video_utils import load_video

        super().__init__(transform)
        self.load = partial(load_video, backend=backend)
        self.name = f"load_video, {backend} + torchvision"

    def decode(self, path: Path, generator: torch.Generator) -> torch.Tensor:
        """Let `load_video` open a file and decode the chosen frames."""

        def choose(metadata: Any, **_: Any) -> np.ndarray:
            total = metadata.total_num_frames
            return np.array(sample_frame_indices(total, NUM_FRAMES, "segments", generator=generator))

        video, _ = self.load(str(path), sample_indices_fn=choose)
        frames = torch.as_tensor(video)
        return frames if frames.shape[1] == 3 else frames.permute(0, 3, 1, 2)


PEERS: dict[str, Callable[[PretrainingTransform], BatchReader]] = {
    DecordBatchReader.name: DecordBatchReader,
    "torchcodec, exact + torchvision": partial(TorchcodecReader, seek_mode="exact"),
    "torchcodec, approximate + torchvision": partial(TorchcodecReader, seek_mode="approximate"),
    **{f"load_video, {name} + torchvision": partial(LoadVideoReader, backend=name) for name in ("decord", "pyav")},
    "load_video, torchcodec + torchvision": partial(LoadVideoReader, backend="torchcodec"),
}
