"""Augmentation of clips for fine-tuning a classifier: drawn once per clip, the same for all of its frames."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from .train_transforms import ResizedCropTransform

GREY = (128, 128, 128)
MAX_MAGNITUDE = 10.0
MAX_ERASING_TRIES = 100
RAND_AUGMENT_PATTERN = re.compile(r"rand-m(?P<m>[\d.]+)-n(?P<n>\d+)-mstd(?P<mstd>[\d.]+)-inc1")

# The published operations, on PIL frames: torchvision's RandAugment has other ones and a fixed magnitude.
# What an operation does to a frame at `level`, the magnitude as a share of the largest, with the sign that was drawn.
# PIL frames come in and go out, which torchvision takes but annotates as tensors.
OPERATIONS: dict[str, Callable[[Any, float, int], Any]] = {
    "AutoContrast": lambda frame, _level, _sign: ImageOps.autocontrast(frame),
    "Equalize": lambda frame, _level, _sign: ImageOps.equalize(frame),
    "Invert": lambda frame, _level, _sign: ImageOps.invert(frame),
    "Rotate": lambda frame, level, sign: frame.rotate(
        sign * 30 * level, resample=Image.Resampling.BICUBIC, fillcolor=GREY
    ),
    "Posterize": lambda frame, level, _sign: F.posterize(frame, 4 - int(4 * level)),
    "Solarize": lambda frame, level, _sign: ImageOps.solarize(frame, 256 - int(256 * level)),
    "SolarizeAdd": lambda frame, level, _sign: _solarize_add(frame, int(110 * level)),
    "Color": lambda frame, level, sign: F.adjust_saturation(frame, 1 + sign * 0.9 * level),
    "Contrast": lambda frame, level, sign: F.adjust_contrast(frame, 1 + sign * 0.9 * level),
    "Brightness": lambda frame, level, sign: F.adjust_brightness(frame, 1 + sign * 0.9 * level),
    "Sharpness": lambda frame, level, sign: F.adjust_sharpness(frame, 1 + sign * 0.9 * level),
    "ShearX": lambda frame, level, sign: _warp(frame, (1, sign * 0.3 * level, 0, 0, 1, 0)),
    "ShearY": lambda frame, level, sign: _warp(frame, (1, 0, 0, sign * 0.3 * level, 1, 0)),
    "TranslateX": lambda frame, level, sign: _warp(frame, (1, 0, sign * 0.45 * level * frame.width, 0, 1, 0)),
    "TranslateY": lambda frame, level, sign: _warp(frame, (1, 0, 0, 0, 1, sign * 0.45 * level * frame.height)),
}


def _warp(frame: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return frame.transform(
        frame.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC, fillcolor=GREY
    )


def _solarize_add(frame: Image.Image, added: int) -> Image.Image:
    return frame.point([min(value + added, 255) if value < 128 else value for value in range(256)] * 3)


@dataclass(frozen=True)
class DrawnOperation:
    """One operation of RandAugment as it was drawn: its name, magnitude in [0, 10] and direction, -1 or 1."""

    name: str
    magnitude: float
    sign: int


class ClipRandAugment:
    """RandAugment whose operations are drawn per clip, not per frame, in their "increasing" variants.

    Args:
        policy: `rand-m<magnitude>-n<operations>-mstd<deviation of the magnitude>-inc1`. Each operation is left out
            with probability 0.5.

    Raises:
        ValueError: If `policy` is written otherwise.

    Source: Cubuk et al., "RandAugment", 2020; the published fine-tuning (`rand-m7-n4-mstd0.5-inc1`).

    Examples:
        >>> import torch
        >>> from umt_hf.processing.classification_transforms import ClipRandAugment
        >>> augment = ClipRandAugment("rand-m7-n4-mstd0.5-inc1")
        >>> frames = torch.zeros(8, 3, 240, 320, dtype=torch.uint8)
        >>> augment.apply(frames, augment.sample(torch.Generator())).shape
        torch.Size([8, 3, 240, 320])
    """

    def __init__(self, policy: str):
        match = RAND_AUGMENT_PATTERN.fullmatch(policy)
        if match is None:
            raise ValueError(f"rand_augment: expected a policy such as rand-m7-n4-mstd0.5-inc1, got {policy!r}.")
        self.magnitude, self.magnitude_std = float(match["m"]), float(match["mstd"])
        self.num_operations = int(match["n"])

    def sample(self, generator: torch.Generator) -> list[DrawnOperation]:
        """Draw the operations of a clip, in order."""
        names = list(OPERATIONS)
        drawn = []
        for index in torch.randint(len(names), (self.num_operations,), generator=generator).tolist():
            is_applied, is_positive = (torch.rand(2, generator=generator) < 0.5).tolist()
            deviation = self.magnitude_std * torch.randn((), generator=generator).item()
            if is_applied:
                magnitude = min(max(self.magnitude + deviation, 0.0), MAX_MAGNITUDE)
                drawn.append(DrawnOperation(names[index], magnitude, 1 if is_positive else -1))
        return drawn

    @staticmethod
    def apply(frames: torch.Tensor, operations: list[DrawnOperation]) -> torch.Tensor:
        """Change uint8 RGB frames `(T, 3, H, W)`, each of them in the same way."""
        if not operations:
            return frames
        changed = []
        for pixels in frames.permute(0, 2, 3, 1).numpy():
            frame = Image.fromarray(np.ascontiguousarray(pixels))
            for operation in operations:
                frame = OPERATIONS[operation.name](frame, operation.magnitude / MAX_MAGNITUDE, operation.sign)
            changed.append(F.pil_to_tensor(frame))
        return torch.stack(changed)


class ClassificationTransform(ResizedCropTransform):
    """RandAugment, random resized crop, flip, normalisation and random erasing of a training clip.

    Args:
        size: Side of the square input of the model, in pixels.
        scale: Smallest and largest share of the frame's area that a crop has.
        ratio: Smallest and largest ratio of a crop's width to its height.
        flip_probability: How often a clip is mirrored.
        rand_augment: Policy of [`ClipRandAugment`]; default: off.
        erasing_probability: How often a box of a clip is filled with noise.

    Source: the published fine-tuning for classification; bilinear without antialiasing, not rounded.

    Examples:
        >>> import torch
        >>> from umt_hf.processing import classification_transforms
        >>> transform = classification_transforms.ClassificationTransform(
        ...     224, rand_augment="rand-m7-n4-mstd0.5-inc1"
        ... )
        >>> frames = torch.zeros(8, 3, 240, 320, dtype=torch.uint8)
        >>> transform(frames, torch.Generator()).shape
        torch.Size([8, 3, 224, 224])
    """

    def __init__(
        self,
        size: int,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (0.75, 1.3333),
        flip_probability: float = 0.5,
        rand_augment: str | None = None,
        erasing_probability: float = 0.0,
    ):
        super().__init__(size, scale, ratio, flip_probability)
        self.rand_augment = None if rand_augment is None else ClipRandAugment(rand_augment)
        self.erasing_probability = erasing_probability

    def __call__(self, frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw and carry out the augmentation of a clip.

        Args:
            frames: uint8 RGB `(T, 3, height, width)`.
            generator: CPU random source; it alone decides what is drawn.

        Returns:
            `(T, 3, size, size)`, float32, normalised.
        """
        if self.rand_augment is not None:
            frames = self.rand_augment.apply(frames, self.rand_augment.sample(generator))
        crop = self.sample(frames.shape[-2], frames.shape[-1], generator)
        clip = self.resize_and_normalize([self.crop(frames, crop)], [crop.flip])[0]
        if torch.rand((), generator=generator).item() < self.erasing_probability:
            erase_box(clip, sample_erased_box(self.size, self.size, generator), generator)
        return clip

    def _resize(self, clip: torch.Tensor, flip: bool) -> torch.Tensor:
        size = [self.size, self.size]
        clip = F.resize(clip.float(), size, interpolation=InterpolationMode.BILINEAR, antialias=False)
        return clip.flip(-1) if flip else clip


def sample_erased_box(
    height: int,
    width: int,
    generator: torch.Generator,
    scale: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
) -> tuple[int, int, int, int] | None:
    """Draw the box of random erasing.

    Args:
        height: Height of the clip in pixels.
        width: Width of the clip.
        generator: CPU random source.
        scale: Smallest and largest share of the area.
        ratio: Smallest and largest ratio of height to width, drawn log-uniformly.

    Returns:
        `(top, left, height, width)`, or `None` if no box fitted.

    Source: Zhong et al., "Random Erasing", 2020.
    """
    for _ in range(MAX_ERASING_TRIES):
        share, place = torch.rand(2, generator=generator).tolist()
        area = height * width * (scale[0] + share * (scale[1] - scale[0]))
        aspect = math.exp(math.log(ratio[0]) + place * (math.log(ratio[1]) - math.log(ratio[0])))
        tall, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if tall < height and wide < width:
            top = int(torch.randint(height - tall + 1, (), generator=generator))
            left = int(torch.randint(width - wide + 1, (), generator=generator))
            return top, left, tall, wide
    return None


def erase_box(clip: torch.Tensor, box: tuple[int, int, int, int] | None, generator: torch.Generator) -> None:
    """Fill a box of a clip `(T, C, H, W)`, in place, with normal noise that is fresh in every frame."""
    if box is not None:
        top, left, height, width = box
        noise = torch.randn((*clip.shape[:2], height, width), generator=generator)
        clip[..., top : top + height, left : left + width] = noise


class ClipMix:
    """MixUp or CutMix of torchvision for a batch of clips: one of them, with one draw, for all of the batch.

    Args:
        num_classes: Number of classes.
        mixup_alpha: Both parameters of MixUp's Beta distribution; 0 = never MixUp.
        cutmix_alpha: Both parameters of CutMix's Beta distribution; 0 = never CutMix. If neither is 0, each has half
            of the batches.

    Raises:
        ValueError: If both are 0.

    Source: Zhang et al., "mixup", 2018; Yun et al., "CutMix", 2019.

    Examples:
        >>> import torch
        >>> from umt_hf.processing.classification_transforms import ClipMix
        >>> mix = ClipMix(num_classes=3, mixup_alpha=0.8, cutmix_alpha=1.0)
        >>> clips, labels = torch.randn(2, 8, 3, 32, 32), torch.tensor([0, 2])
        >>> clips, targets = mix(clips, labels, torch.Generator())
        >>> targets.shape, targets.sum(dim=1)
        (torch.Size([2, 3]), tensor([1., 1.]))
    """

    def __init__(self, num_classes: int, mixup_alpha: float, cutmix_alpha: float):
        self.choices: list[v2.Transform] = []
        if mixup_alpha > 0:
            self.choices.append(v2.MixUp(alpha=mixup_alpha, num_classes=num_classes))
        if cutmix_alpha > 0:
            self.choices.append(v2.CutMix(alpha=cutmix_alpha, num_classes=num_classes))
        if not self.choices:
            raise ValueError("mixup_alpha and cutmix_alpha are both 0: nothing to mix.")

    def __call__(
        self, pixel_values: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix each clip with the one before it.

        Args:
            pixel_values: `(B, T, C, H, W)`.
            labels: Class indices `(B,)`.
            generator: CPU random source; it alone decides what is drawn.

        Returns:
            Mixed clips and soft targets `(B, num_classes)`.
        """
        choice = self.choices[torch.randint(len(self.choices), (), generator=generator)]
        seed = int(torch.randint(2**62, (), generator=generator))
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global state
            torch.manual_seed(seed)
            clips, targets = choice(tv_tensors.Video(pixel_values), labels)
        return clips.as_subclass(torch.Tensor), targets
