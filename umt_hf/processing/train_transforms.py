"""Augmentation of training clips: drawn once per clip, cropped in the worker, finished for a batch on any device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as F
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

LARGE_CROP = 1.5  # times the side of the input: from here on a crop is resized before it travels to a device
SNAP_PIXELS = 2  # a crop side this close to the input size becomes the input size, so that nothing is resampled


@dataclass(frozen=True)
class ClipCrop:
    """The part of every frame of a clip that is kept, in pixels, and whether it is mirrored afterwards.

    The box may leave the frame; parts outside are black.
    """

    top: int
    left: int
    height: int
    width: int
    flip: bool


class PretrainingTransform:
    """Multi-scale crop, horizontal flip, resize and ImageNet normalisation of stage-1 pre-training.

    The cheap part, `sample` and `crop`, is for data workers; `resize_and_normalize` does the pixel work for a batch of
    clips on any device. A clip's result depends on its own draw alone, not on the rest of the batch.

    Args:
        size: Side of the square input of the model, in pixels.
        scales: Sides of the candidate crops as shares of the shorter side of the frame, largest first. Height and
            width of a crop are at most one step of this list apart.
        flip_probability: How often a clip is mirrored.

    Source: the published stage-1 data code (multi-scale crop of TSN).

    Examples:
        >>> import torch
        >>> from umt_hf.processing.train_transforms import PretrainingTransform
        >>> transform = PretrainingTransform(size=224)
        >>> frames = torch.zeros(8, 3, 240, 320, dtype=torch.uint8)
        >>> drawn = transform.sample(240, 320, torch.Generator())
        >>> cropped = transform.crop(frames, drawn)
        >>> transform.resize_and_normalize([cropped], [drawn.flip]).shape
        torch.Size([1, 8, 3, 224, 224])
    """

    def __init__(self, size: int, scales: Sequence[float] = (1.0, 0.875, 0.75, 0.66), flip_probability: float = 0.5):
        self.size = size
        self.scales = tuple(scales)
        self.flip_probability = flip_probability

    def sample(self, height: int, width: int, generator: torch.Generator | None = None) -> ClipCrop:
        """Choose what a clip of `height` x `width` frames shows.

        Args:
            height: Height of the frames in pixels.
            width: Width of the frames.
            generator: CPU random source of a training clip; `None` for the fixed evaluation view, the middle square.
        """
        if generator is None:
            side = min(height, width)
            return ClipCrop((height - side) // 2, (width - side) // 2, side, side, flip=False)
        crop_height, crop_width = _choose(self.list_crop_sizes(height, width), generator)
        top, left = _choose(list_crop_places(height, width, crop_height, crop_width), generator)
        flip = torch.rand((), generator=generator).item() < self.flip_probability
        return ClipCrop(top, left, crop_height, crop_width, flip)

    def list_crop_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """List the `(height, width)` of the crops that a frame allows, all equally likely."""
        sides = [max(int(min(height, width) * scale), 1) for scale in self.scales]
        sides = [self.size if abs(side - self.size) <= SNAP_PIXELS else side for side in sides]
        return [(tall, wide) for i, tall in enumerate(sides) for j, wide in enumerate(sides) if abs(i - j) <= 1]

    @staticmethod
    def crop(frames: torch.Tensor, crop: ClipCrop) -> torch.Tensor:
        """Cut the box of `crop` out of frames `(T, C, H, W)`; a view where the box is inside them."""
        height, width = frames.shape[-2:]
        top, bottom = max(crop.top, 0), min(crop.top + crop.height, height)
        left, right = max(crop.left, 0), min(crop.left + crop.width, width)
        inside = frames[..., top:bottom, left:right]
        if inside.shape[-2:] == (crop.height, crop.width):
            return inside
        padded = frames.new_zeros((*frames.shape[:-2], crop.height, crop.width))
        padded[..., top - crop.top : bottom - crop.top, left - crop.left : right - crop.left] = inside
        return padded

    def shrink(self, frames: torch.Tensor) -> torch.Tensor:
        """Resize a crop that has much more pixels than the input, so that fewer bytes travel to the device.

        Args:
            frames: Cropped frames `(T, C, height, width)`, uint8.

        Returns:
            Frames of the input size, if those had over `LARGE_CROP` squared times its pixels; else `frames`.
            `resize_and_normalize` gives the same for both, where the device computes as the CPU does.
        """
        if frames.shape[-2] * frames.shape[-1] <= (LARGE_CROP * self.size) ** 2:
            return frames
        return self._resize(frames, flip=False).to(torch.uint8)

    def resize_and_normalize(self, clips: Sequence[torch.Tensor], flips: Sequence[bool]) -> torch.Tensor:
        """Turn cropped clips into model input.

        Args:
            clips: Cropped frames, uint8 RGB `(T, 3, height, width)` each, of any sizes, on one device.
            flips: Whether each clip is mirrored.

        Returns:
            `(len(clips), T, 3, size, size)`, float32, normalised.
        """
        batch = torch.empty(len(clips), *clips[0].shape[:2], self.size, self.size, device=clips[0].device)
        for view, clip, flip in zip(batch, clips, flips, strict=True):
            view.copy_(self._resize(clip, flip))
        mean, std = [[255 * value for value in values] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]
        return F.normalize(batch, mean, std, inplace=True)

    def _resize(self, clip: torch.Tensor, flip: bool) -> torch.Tensor:
        # Antialiased and rounded to uint8, as PIL does in the published code of stage 1.
        clip = F.resize(clip, [self.size, self.size], interpolation=InterpolationMode.BILINEAR, antialias=True)
        return clip.flip(-1) if flip else clip


class ResizedCropTransform(PretrainingTransform):
    """Random resized crop and flip of video-text training; a crop has any place and aspect in the frame.

    Args:
        size: Side of the square input of the model, in pixels; a crop is squeezed to it.
        scale: Smallest and largest share of the frame's area.
        ratio: Smallest and largest ratio of a crop's width to its height.
        flip_probability: How often a clip is mirrored.

    Source: the published stage-2 data code: bicubic without antialiasing, rounded to uint8.

    Examples:
        >>> import torch
        >>> from umt_hf.processing.train_transforms import ResizedCropTransform
        >>> transform = ResizedCropTransform(size=224, scale=(0.5, 1.0))
        >>> drawn = transform.sample(240, 320, torch.Generator())
        >>> 0.45 < drawn.height * drawn.width / (240 * 320) <= 1
        True
    """

    def __init__(
        self,
        size: int,
        scale: Sequence[float] = (0.5, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        flip_probability: float = 0.5,
    ):
        super().__init__(size, flip_probability=flip_probability)
        self.scale, self.ratio = tuple(scale), tuple(ratio)

    def sample(self, height: int, width: int, generator: torch.Generator | None = None) -> ClipCrop:
        """Choose what a clip of `height` x `width` frames shows.

        Args:
            height: Height of the frames in pixels.
            width: Width of the frames.
            generator: CPU random source of a training clip; `None` for the fixed evaluation view, the complete frame.
        """
        if generator is None:
            return ClipCrop(0, 0, height, width, flip=False)
        seed = int(torch.randint(2**62, (), generator=generator))
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global state
            torch.manual_seed(seed)
            frame = torch.empty(0, height, width)
            box = RandomResizedCrop.get_params(frame, list(self.scale), list(self.ratio))
            flip = torch.rand(()).item() < self.flip_probability
        top, left, crop_height, crop_width = box
        return ClipCrop(top, left, crop_height, crop_width, flip)

    def _resize(self, clip: torch.Tensor, flip: bool) -> torch.Tensor:
        # In float and rounded afterwards: torchvision's own kernel for uint8 is a grey level off here and there.
        size = [self.size, self.size]
        clip = F.resize(clip.float(), size, interpolation=InterpolationMode.BICUBIC, antialias=False)
        clip = clip.clamp(0, 255).round()
        return clip.flip(-1) if flip else clip


def list_crop_places(height: int, width: int, crop_height: int, crop_width: int) -> list[tuple[int, int]]:
    """List the 13 places `(top, left)` of a crop in a frame, all equally likely (some may coincide).

    They are the nine of a 3 x 3 grid that spans the frame and the four between its centre and its corners.
    """
    # In quarters of the room, rounded down before they are multiplied: a crop that is larger than the frame by less
    # than a quarter's rounding still starts a few pixels outside.
    quarter_y, quarter_x = (height - crop_height) // 4, (width - crop_width) // 4
    grid = [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2), (2, 0), (2, 4), (4, 2), (0, 2)]
    between = [(1, 1), (1, 3), (3, 1), (3, 3)]
    return [(quarter_y * y, quarter_x * x) for y, x in grid + between]


def _choose(options: Sequence[tuple[int, int]], generator: torch.Generator) -> tuple[int, int]:
    return options[int(torch.randint(len(options), (), generator=generator))]
