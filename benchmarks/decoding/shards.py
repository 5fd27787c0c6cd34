"""Frames that `umt-hf prepare` keeps in tars: how fast they become batches, by the library that reads JPEG."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.io import ImageReadMode, decode_jpeg

from umt_hf.data.prepare import ShardSettings, prepare_shards
from umt_hf.data.streams import Shards, load_shards
from umt_hf.processing.decoding import JPEG_END, JPEG_START, open_video
from umt_hf.processing.sampling import sample_frame_indices
from umt_hf.processing.train_transforms import PretrainingTransform

from .readers import NUM_FRAMES, UMTReader

OURS_FROM_SHARDS = "umt_hf, shards (PIL)"
# Largest mean difference of a kept frame from the video's, in grey levels: what resizing and JPEG lose.
LOST_LEVELS = 6.0


def write_shards(paths: Sequence[Path], folder: Path) -> Shards:
    """Shards of some videos with the command's own settings."""
    prepare_shards([str(path) for path in paths], folder, ShardSettings(), num_workers=0)
    return load_shards(str(folder))


def check_frames(paths: Sequence[Path], shards: Shards) -> float:
    """Compare kept frames with those of the videos.

    Returns:
        Largest mean difference of a video's, in grey levels.

    Raises:
        RuntimeError: If they are other frames.
    """
    differences = []
    for number, path in enumerate(paths):
        with open_video(shards[number]["video"]) as kept, open_video(path) as video:
            indices = list(range(video.num_frames))
            if video.num_frames > kept.num_frames:
                indices = sample_frame_indices(video.num_frames, kept.num_frames, "middle")
            found, size = torch.from_numpy(kept.get_frames(range(kept.num_frames))), (kept.height, kept.width)
            frames = torch.from_numpy(video.get_frames(indices))
        pixels = frames.permute(0, 3, 1, 2).float()
        resized = torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True)
        differences.append((found.permute(0, 3, 1, 2).float() - resized).abs().mean().item())
    if not max(differences) <= LOST_LEVELS:
        raise RuntimeError(f"The frames kept differ from those of the videos by {max(differences):.1f} levels.")
    return max(differences)


class ShardReader(UMTReader):
    """Clips from shards as the workers of training read them.

    Args:
        transform: Draws the crops.
        paths: Videos.
        shards: Shards with a row for each of them.
    """

    def __init__(self, transform: PretrainingTransform, paths: Sequence[Path], shards: Shards):
        super().__init__(transform, "pyav")
        self.shards, self.numbers = shards, {path: number for number, path in enumerate(paths)}
        self.name = OURS_FROM_SHARDS

    def decode(self, path: Path, generator: torch.Generator) -> np.ndarray:
        """Read the row of a video and decode the chosen pictures."""
        return self.read(self.shards[self.numbers[path]]["video"], generator)


class OtherJPEGReader(ShardReader):
    """The same with another library for JPEG.

    Args:
        name: Of the library.
        decode_picture: Bytes of a picture to RGB, `(height, width, 3)`.
        *arguments: As for `ShardReader`.
    """

    def __init__(self, name: str, decode_picture: Callable[[bytes], np.ndarray], *arguments: Any):
        super().__init__(*arguments)
        self.decode_picture, self.name = decode_picture, f"shards, {name}"

    def read(self, source: Any, generator: torch.Generator) -> np.ndarray:
        """Decode the chosen pictures of a row."""
        parts = source["bytes"].split(JPEG_END + JPEG_START)
        indices = sample_frame_indices(len(parts), NUM_FRAMES, "segments", generator=generator)
        ends = [(JPEG_START if i else b"", JPEG_END if i < len(parts) - 1 else b"") for i in indices]
        pictures = [start + parts[i] + end for i, (start, end) in zip(indices, ends, strict=True)]
        return np.stack([self.decode_picture(picture) for picture in pictures])


def decode_by_torchvision(picture: bytes) -> np.ndarray:
    """A picture by torchvision."""
    content = torch.frombuffer(bytearray(picture), dtype=torch.uint8)
    return decode_jpeg(content, ImageReadMode.RGB).permute(1, 2, 0).numpy()


def find_jpeg_readers() -> tuple[dict[str, Callable[[bytes], np.ndarray]], dict[str, str]]:
    """Libraries for JPEG beside the package's own choice, and those that are missing, with the reason."""
    readers: dict[str, Callable[[bytes], np.ndarray]] = {"torchvision": decode_by_torchvision}
    try:
        import simplejpeg  # libjpeg-turbo, a peer
    except ImportError as error:
        return readers, {"shards, turbo": str(error)}
    readers["turbo"] = lambda picture: simplejpeg.decode_jpeg(picture, "RGB")
    return readers, {}
