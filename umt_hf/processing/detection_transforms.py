"""Clips with boxes for action detection: augmentation, drawn once per clip, and the fixed view of a test.

Boxes come in as shares of the frame, x1, y1, x2, y2 in [0, 1], with x2 and y2 just behind the last pixel. They leave
in pixels of the clip with x2 and y2 at the last pixel, 1 less: released models were trained on boxes of this
"inclusive" kind. No other place uses that convention.

Legend: T frames of a clip, M boxes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from .resizing import is_extreme, resize_part
from .sampling import compute_resized_size
from .video_processing_umt_video import UMTVideoProcessor

MAX_CROP_TRIES = 10
MIN_SIDE = 1.0  # smallest side of a box, in pixels


class DetectionTransform:
    """Resize, random crop, colour jitter, flip and normalisation of a training clip with its boxes.

    Args:
        size: Side of the square crop, in pixels.
        short_side: What the shorter side of the frame is resized to before.
        image_mean: Mean of each channel, of values in [0, 1].
        image_std: Standard deviation of each channel.
        hue_degrees: Largest change of the hue.
        saturation: Largest change of the saturation, as a share of its range.
        value: Largest change of the brightness.
        flip_probability: How often a clip is mirrored.
        min_visible_ratio: Share of a box's area that must be inside the crop; otherwise the box and its labels
            are dropped.
        box_jitter: Largest shares of a box's side by which its edges move: left and right outwards and inwards, top
            and bottom outwards and inwards.
        max_boxes: Boxes kept per clip, drawn at random where there are more.

    Raises:
        ValueError: If the crop does not fit the frame.

    Source: the published training on AVA; there a box outside the crop stays, as a sliver at its border.
    """

    def __init__(
        self,
        size: int,
        short_side: int,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        hue_degrees: float = 20.0,
        saturation: float = 0.1,
        value: float = 0.1,
        flip_probability: float = 0.5,
        min_visible_ratio: float = 0.25,
        box_jitter: Sequence[float] = (0.2, 0.1, 0.1, 0.05),
        max_boxes: int = 100,
    ):
        if short_side < size:
            raise ValueError(f"A crop of {size} pixels does not fit frames whose short side is {short_side}.")
        self.size, self.short_side = size, short_side
        self.mean, self.std = list(image_mean), list(image_std)
        self.hue_degrees, self.saturation, self.value = hue_degrees, saturation, value
        self.flip_probability = flip_probability
        self.min_visible_ratio = min_visible_ratio
        self.box_jitter = tuple(box_jitter)
        self.max_boxes = max_boxes

    def __call__(
        self, frames: torch.Tensor, boxes: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draw and carry out the augmentation of a clip.

        Args:
            frames: uint8 RGB `(T, 3, height, width)`.
            boxes: Shares of the frame, `(M, 4)`.
            generator: CPU random source; it alone decides what is drawn.

        Returns:
            Normalised clip `(T, 3, size, size)`, boxes in its pixels `(K, 4)`, and the rows of `boxes` that they are,
            `(K,)`, rising. K is 0 where no box is seen enough.
        """
        height, width = frames.shape[-2:]
        height, width = compute_resized_size(height, width, self.short_side)
        boxes = boxes * torch.tensor([width, height, width, height])
        top, left, kept = self.sample_crop(height, width, boxes, generator)
        if len(kept) > self.max_boxes:
            chosen = torch.randperm(len(kept), generator=generator)[: self.max_boxes]
            kept = kept[chosen.sort().values]
        boxes = clamp_boxes(boxes[kept] - torch.tensor([left, top, left, top]), self.size, self.size)

        if is_extreme(height, width):
            frames = resize_part(frames, (height, width), (top, left, top + self.size, left + self.size))
        else:
            frames = F.resize(frames, [height, width], interpolation=InterpolationMode.BILINEAR, antialias=False)
            frames = frames[..., top : top + self.size, left : left + self.size]
        frames = self.shift_colors(frames, *(2 * torch.rand(3, generator=generator) - 1).tolist())
        if torch.rand((), generator=generator).item() < self.flip_probability:
            frames, boxes = frames.flip(-1), flip_boxes(boxes, self.size)
        clip = F.normalize(frames.float() / 255, self.mean, self.std)
        boxes = self.jitter(boxes, torch.rand(len(boxes), 4, generator=generator))
        return clip, to_last_pixels(boxes), kept

    def sample_crop(
        self, height: int, width: int, boxes: torch.Tensor, generator: torch.Generator
    ) -> tuple[int, int, torch.Tensor]:
        """Draw a crop that shows enough of a box, if one of a few draws does.

        Returns:
            Top, left, and the rows of the boxes that are seen.
        """
        top, left, kept = 0, 0, torch.empty(0, dtype=torch.long)
        for _ in range(MAX_CROP_TRIES):
            top = int(torch.randint(height - self.size + 1, (), generator=generator))
            left = int(torch.randint(width - self.size + 1, (), generator=generator))
            visible = compute_visible_ratios(boxes, top, left, self.size, self.size)
            kept = (visible >= self.min_visible_ratio).nonzero()[:, 0]
            if len(kept):
                break
        return top, left, kept

    def shift_colors(self, frames: torch.Tensor, hue: float, saturation: float, value: float) -> torch.Tensor:
        """Add a change to hue, saturation and brightness, each a share in [-1, 1] of its largest change.

        Args:
            frames: uint8 RGB `(T, 3, height, width)`; all change alike.
            hue: Share of `hue_degrees`.
            saturation: Share of `saturation`.
            value: Share of `value`.
        """
        largest = np.array([256 / 360 * self.hue_degrees, 255 * self.saturation, 255 * self.value])
        if not largest.any():
            return frames
        change = np.round(largest * [hue, saturation, value]).astype(np.int16)
        shifted = []
        for frame in frames.permute(0, 2, 3, 1).numpy():
            pixels = np.asarray(Image.fromarray(np.ascontiguousarray(frame)).convert("HSV")) + change
            pixels[..., 0] %= 256
            pixels = pixels.clip(0, 255).astype(np.uint8)
            shifted.append(F.pil_to_tensor(Image.fromarray(pixels, mode="HSV").convert("RGB")))
        return torch.stack(shifted)

    def jitter(self, boxes: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Move each edge of each box by a share of its side; `draws (M, 4)` are uniform in [0, 1)."""
        x_out, x_in, y_out, y_in = self.box_jitter
        low = torch.tensor([-x_out, -y_out, -x_in, -y_in])
        high = torch.tensor([x_in, y_in, x_out, y_out])
        sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        return clamp_boxes(boxes + sides * (low + draws * (high - low)), self.size, self.size)


def prepare_test_clip(
    frames: torch.Tensor,
    boxes: torch.Tensor,
    processor: UMTVideoProcessor,
    patch_size: int,
    extension: Sequence[float] = (0.1, 0.05),
) -> tuple[torch.Tensor, torch.Tensor]:
    """The complete frame, resized and normalised by the processor, and its boxes, widened a little.

    Args:
        frames: uint8 RGB `(T, 3, height, width)`.
        boxes: Shares of the frame, `(M, 4)`.
        processor: Of the model.
        patch_size: Height and width become multiples of it, with zeros at the bottom and to the right.
        extension: Shares of its width and of its height that a box gains in all, half on each side.

    Returns:
        Clip `(T, 3, H, W)` and boxes in its pixels, `(M, 4)`.

    Source: the published test on AVA; there clips are padded to the largest of their batch.
    """
    clip = processor(frames, do_sample_frames=False, do_center_crop=False, return_tensors="pt")["pixel_values"][0]
    height, width = clip.shape[-2:]
    boxes = boxes * torch.tensor([width, height, width, height])
    growth = (boxes[:, 2:] - boxes[:, :2]) * torch.tensor(extension) / 2
    boxes = clamp_boxes(torch.cat([boxes[:, :2] - growth, boxes[:, 2:] + growth], dim=1), height, width)
    clip = torch.nn.functional.pad(clip, (0, -width % patch_size, 0, -height % patch_size))
    return clip, to_last_pixels(boxes)


def compute_visible_ratios(boxes: torch.Tensor, top: int, left: int, height: int, width: int) -> torch.Tensor:
    """Share of each box's area that is inside a crop, `(M,)`."""
    low = torch.maximum(boxes[:, :2], torch.tensor([left, top]))
    high = torch.minimum(boxes[:, 2:], torch.tensor([left + width, top + height]))
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    return (high - low).clamp(min=0).prod(dim=1) / areas.clamp(min=1e-6)


def flip_boxes(boxes: torch.Tensor, width: int) -> torch.Tensor:
    """Boxes of a mirrored frame."""
    return torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)


def clamp_boxes(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Cut boxes at the border of a frame; each side keeps at least one pixel."""
    limit = torch.tensor([width, height])
    low = torch.minimum(boxes[:, :2].clamp(min=0), limit - MIN_SIDE)
    high = torch.minimum(torch.maximum(boxes[:, 2:], low + MIN_SIDE), limit)
    return torch.cat([low, high], dim=1)


def to_last_pixels(boxes: torch.Tensor) -> torch.Tensor:
    """Boxes whose x2 and y2 are the last pixels inside."""
    return boxes - torch.tensor([0.0, 0.0, 1.0, 1.0])
