# Copyright 2026 The umt_hf authors. Licensed under the Apache License, Version 2.0.
"""The frozen teacher: a tower of Transformers, giving per-token features and, of images, a saliency map per frame.

Legend: B batch, T frames, N tokens, P patches per frame, V visible tokens, D width, K aligned layers, C feature width.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.video_processing_utils import BaseVideoProcessor

from ..modeling.configuration_umt_video import select_aligned_layers
from ..modeling.losses_umt import normalize_features
from ..modeling.modeling_umt_video import gather_tokens, require_normalized
from .clip import CLIPTower, MetaCLIP2Tower
from .dino import DinoTower, TipsTower
from .siglip import SiglipTower
from .tower import LayerInput, TeacherTower, VideoTower, run_layer
from .videomae import VideoMAETower
from .vjepa2 import VJEPA2Tower

logger = logging.getLogger(__name__)

TOWERS: dict[str, type[TeacherTower]] = {
    model_type: tower
    for tower in (CLIPTower, MetaCLIP2Tower, SiglipTower, DinoTower, TipsTower, VideoMAETower, VJEPA2Tower)
    for model_type in tower.classes
}
VIDEO_TEACHER_TYPES = tuple(model_type for model_type, tower in TOWERS.items() if issubclass(tower, VideoTower))
TEACHER_TYPES = tuple(model_type for model_type in TOWERS if model_type not in VIDEO_TEACHER_TYPES)
TEACHERS = "a CLIP, MetaCLIP 2, SigLIP, DINOv2, DINOv3 or TIPSv2"
OTHER_TEACHERS = f"{TEACHERS}, a VideoMAE or V-JEPA 2"
_NAFLEX = "a SigLIP 2 of any size (NaFlex), which sees no square frames: take one of fixed size, of type 'siglip'"
_PE = "a Perception Encoder, whose tower is in timm and not in Transformers"
# Towers that one might expect to teach, and why they do not.
NO_TEACHERS = {
    "siglip2": _NAFLEX,
    "siglip2_vision_model": _NAFLEX,
    "dinov3_convnext": "a convolutional DINOv3, which has no class token and no patches: take a ViT",
    "pe_video": _PE,
    "timm_wrapper": "a model of timm, which gives no saliency: take a tower that Transformers has itself",
}
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download")


@dataclass
class UMTTeacherOutput:
    """Output of [`UMTTeacher`].

    Args:
        features: Features of the aligned layers `(K, B, N, C)`, shallowest first, unit length, float32; at the visible
            tokens alone, `(K, B, V, C)`, where their indices were given.
        saliency: Attention to the patches, averaged over heads, `(B * T, P)`, float32: of the last layer's class
            token, where a row sums to one minus what the token gives to itself and to registers, or of the probe of
            SigLIP's pooling head, where it sums to one.
    """

    features: torch.Tensor
    saliency: torch.Tensor


class UMTTeacher(nn.Module):
    """Frozen image tower that looks at every frame of a clip by itself: a CLIP, SigLIP, DINO, ...

    Always in evaluation mode and without gradients. Keep it outside the student, so that it is not saved with it. A
    VideoMAE or V-JEPA 2, which looks at clips, gives features without a saliency: see `compute_features`.

    Args:
        vision_tower: Tower of Transformers, such as `CLIPVisionModelWithProjection`, `SiglipVisionModel` or
            `DINOv3ViTModel`.
        num_aligned_layers: K, counted from the last layer.
        alignment_interval: Step between aligned layers.
        image_size: Side of the frames it sees, in pixels; frames of another size are resized (bicubic) and the
            position table is carried over once, here. Default: the tower's own.
        alignment_norm: "l2" or "none".
        image_mean: Mean of the pixels that the tower expects, in [0, 1]; default: that of its kind. A CLIP sees the
            clips as they come, as in the published code.
        image_std: Likewise their standard deviation.

    Raises:
        ValueError: If the tower is of no kind that can teach, has too few layers or no square frames, or its patch
            does not divide `image_size`.

    Source: Li et al., "Unmasked Teacher", ICCV 2023, section 3.1; Radford et al., "CLIP", 2021.

    Examples:
        >>> import torch
        >>> from umt_hf import UMTTeacher
        >>> teacher = UMTTeacher.from_pretrained("openai/clip-vit-base-patch16")
        >>> outputs = teacher(torch.randn(1, 8, 3, 224, 224))
        >>> outputs.features.shape  # six layers, 8 x 196 patches
        torch.Size([6, 1, 1568, 512])
        >>> outputs.saliency.shape
        torch.Size([8, 196])
    """

    pixel_scale: torch.Tensor | None
    pixel_shift: torch.Tensor | None

    def __init__(
        self,
        vision_tower: PreTrainedModel,
        num_aligned_layers: int = 6,
        alignment_interval: float = 1,
        image_size: int | None = None,
        alignment_norm: str = "l2",
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ):
        super().__init__()
        config: Any = vision_tower.config
        kind = find_tower(config.model_type)
        self.aligned_layer_indices = select_aligned_layers(
            config.num_hidden_layers, num_aligned_layers, alignment_interval
        )
        self.tower = kind(vision_tower)
        own_size, patch_size = self.tower.image_size, config.patch_size
        if not isinstance(own_size, int) or not isinstance(patch_size, int):
            raise ValueError(
                f"The teacher must see square frames and patches, got image_size={own_size}, patch_size={patch_size}."
            )
        self.alignment_norm = alignment_norm
        self.image_size: int = image_size or own_size
        self.patch_size: int = patch_size
        self.hidden_size = self.tower.width
        if self.image_size % self.patch_size:
            raise ValueError(
                f"Teacher image_size={self.image_size} is not a multiple of its patch size {self.patch_size}."
            )
        self.vision_tower = vision_tower
        if self.image_size != own_size:
            self.tower.resize_positions(self.image_size)
        own = self.tower.statistics or (None, None)
        scale, shift = _compute_renormalization(image_mean or own[0], image_std or own[1])
        self.register_buffer("pixel_scale", scale, persistent=False)
        self.register_buffer("pixel_shift", shift, persistent=False)
        # Frozen here, once: an optimizer that is given all parameters by mistake cannot train it.
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        num_aligned_layers: int = 6,
        alignment_interval: float = 1,
        image_size: int | None = None,
        alignment_norm: str = "l2",
        **kwargs: Any,
    ) -> "UMTTeacher":
        """Load an image tower from the Hub or a folder, of which the kind is read.

        Args:
            name_or_path: For example "openai/clip-vit-base-patch16"; a complete model with text or a tower alone.
            num_aligned_layers: K.
            alignment_interval: Step between aligned layers.
            image_size: Side of the frames it sees, in pixels.
            alignment_norm: "l2" or "none".
            **kwargs: Passed to `from_pretrained` of the tower's class (`dtype`, `attn_implementation`, ...).

        Raises:
            ImportError: If the installed version of Transformers lacks its class.
            ValueError: If it is of no kind that can teach, or lacks weights.
        """
        hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        kind, model_class = find_class(name_or_path, **hub)
        # Read out of a complete model without a word on the rest of it. Transformers translates the names of older
        # weights for classes in its own modules alone.
        fields = {"__module__": model_class.__module__, "_keys_to_ignore_on_load_unexpected": [*kind.unread]}
        quiet: Any = type(model_class.__name__, (model_class,), fields)
        tower, info = quiet.from_pretrained(
            name_or_path, **kwargs, output_loading_info=True, ignore_mismatched_sizes=True
        )
        # Transformers only warns and draws them at random, and a student would be aligned with that.
        if info["mismatched_keys"]:
            name, stored, needed = min(info["mismatched_keys"])
            raise ValueError(f"{name_or_path} holds {name} in shape {tuple(stored)}, which should be {tuple(needed)}.")
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"{name_or_path} is not a complete {kind.title}: it lacks {', '.join(missing[:5])}.")
        mean, std = None, None
        if kind.statistics is not None:  # else it sees the student's pixels, whatever its folder says
            mean, std = read_statistics(name_or_path, **hub)
            origin = "its kind" if mean is None or std is None else "its image processor"
            logger.info("The teacher's pixels are in the mean and deviation of %s.", origin)
        return cls(tower, num_aligned_layers, alignment_interval, image_size, alignment_norm, mean, std)

    @property
    def layers(self) -> nn.ModuleList:
        """The tower's layers, first to last."""
        return self.tower.layers

    @property
    def grid_size(self) -> int:
        """Patches on a side of a frame."""
        return self.image_size // self.patch_size

    def train(self, mode: bool = True) -> "UMTTeacher":  # noqa: ARG002 (the base class's signature)
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor, visible_indices: torch.Tensor | None = None) -> UMTTeacherOutput:
        """Compute features and saliency of a clip.

        Args:
            pixel_values: The student's own normalised video `(B, T, channels, height, width)`.
            visible_indices: `(B, V)`, where the mask is known beforehand: features are computed at these tokens alone.
        """
        hidden_states, saliency = self.encode(pixel_values)
        features = self.project(hidden_states, pixel_values.shape[0], visible_indices)
        return UMTTeacherOutput(features=features, saliency=saliency)

    @torch.no_grad()
    def compute_features(
        self, pixel_values: torch.Tensor, visible_indices: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Features alone, of an image or a video tower.

        Args:
            pixel_values: `(B, T, channels, height, width)`.
            visible_indices: `(B, V)`; default: all tokens.

        Returns:
            `(K, B, V, C)`, float32. A tower whose tokens are tubelets gives each frame the features of its tubelet.

        Raises:
            ValueError: If the video holds raw integers, or frames that do not fill its tubelets.
        """
        aligned, last = self._encode_below(pixel_values)
        return self.project([*aligned, self.tower.run_last(last)], pixel_values.shape[0], visible_indices)

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """One pass through the tower, with the saliency.

        Args:
            pixel_values: `(B, T, channels, height, width)`.

        Returns:
            Hidden states of the aligned layers, each `(B * T, prefix + P, D)`, where the prefix is the class token and
            registers, if any; and the saliency `(B * T, P)`.

        Raises:
            ValueError: If the video holds raw integers.
        """
        aligned, last = self._encode_below(pixel_values)
        saliency = self.tower.weigh(last)
        return [*aligned, self.tower.run_last(last)], saliency

    @torch.no_grad()
    def compute_saliency(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Saliency alone, `(B * T, P)`, without what it does not need of the last layer.

        Args:
            pixel_values: `(B, T, channels, height, width)`.

        Raises:
            ValueError: If the video holds raw integers.
        """
        return self.tower.weigh(self._encode_below(pixel_values)[1])

    @torch.no_grad()
    def align_visible(
        self, pixel_values: torch.Tensor, draw_visible: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features at tokens that are drawn by the saliency; a CLIP's last layer runs at these alone.

        Args:
            pixel_values: `(B, T, channels, height, width)`.
            draw_visible: Gives indices of the visible tokens `(B, V)`, ascending and as many in each frame, for a
                saliency `(B * T, P)`.

        Returns:
            The indices, and the features `(K, B, V, C)` as [`UMTTeacher.project`] gives them.

        Raises:
            ValueError: If the video holds raw integers.
        """
        aligned, last_input = self._encode_below(pixel_values)
        batch_size, num_frames = pixel_values.shape[:2]
        saliency = self.tower.weigh(last_input)
        visible = draw_visible(saliency)
        in_frame = visible.unflatten(1, (num_frames, -1)).flatten(0, 1) % saliency.shape[1]
        last = self.tower.run_last(last_input, in_frame)
        patches = [self._take_patches(states, batch_size, visible) for states in aligned]
        return visible, self._align([*patches, _join_frames(last, batch_size)])

    def _encode_below(self, pixel_values: torch.Tensor) -> tuple[list[torch.Tensor], LayerInput]:
        """Hidden states of the aligned layers but the last one, and the last layer's input."""
        require_normalized(pixel_values)
        frames = pixel_values.flatten(0, 1)
        if frames.shape[-2:] != (self.image_size, self.image_size):
            frames = F.interpolate(
                frames, size=(self.image_size, self.image_size), mode="bicubic", align_corners=False
            )
        if self.pixel_scale is not None and self.pixel_shift is not None:
            frames = frames * self.pixel_scale.to(frames) + self.pixel_shift.to(frames)
        if self.tower.tubelet_size is not None:
            self.require_tubelets(pixel_values.shape[1])
            frames = frames.unflatten(0, pixel_values.shape[:2])
        given = self.tower.embed(frames)
        aligned = []
        for i, layer in enumerate(self.tower.layers[:-1]):
            given = LayerInput(run_layer(layer, given), given.options)
            if i in self.aligned_layer_indices:
                aligned.append(given.states)
        return aligned, given

    @torch.no_grad()
    def project(
        self, hidden_states: list[torch.Tensor], batch_size: int, visible_indices: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Patch tokens as features, normalised; at the visible tokens if given.

        Args:
            hidden_states: From [`UMTTeacher.encode`].
            batch_size: B.
            visible_indices: `(B, V)`.

        Returns:
            `(K, B, N or V, C)`, float32.
        """
        return self._align([self._take_patches(states, batch_size, visible_indices) for states in hidden_states])

    def require_tubelets(self, num_frames: int) -> None:
        """Check that clips of so many frames fill the tubelets of a video tower.

        Raises:
            ValueError: If a rest of them would be left out.
        """
        size = self.tower.tubelet_size or 1
        if num_frames % size:
            raise ValueError(
                f"A clip of {num_frames} frames cannot be cut into the tubelets of {size} frames of a "
                f"{self.tower.title}; set num_frames to a multiple of {size}."
            )

    def _take_patches(
        self, states: torch.Tensor, batch_size: int, visible_indices: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Tokens of frames `(B * T, prefix + P, D)` or of tubelets `(B, N, D)` as those of clips."""
        if (tubelet_size := self.tower.tubelet_size) is None:
            patches = _join_frames(states[:, self.tower.num_prefix_tokens :], batch_size)
            return patches if visible_indices is None else gather_tokens(patches, visible_indices)
        if visible_indices is None:
            num_tokens = tubelet_size * states.shape[1]
            visible_indices = torch.arange(num_tokens, device=states.device).expand(batch_size, -1)
        per_frame = self.grid_size**2
        tubelets = visible_indices // (tubelet_size * per_frame)
        return gather_tokens(states, tubelets * per_frame + visible_indices % per_frame)

    def _align(self, patches: list[torch.Tensor]) -> torch.Tensor:
        """Tokens of the aligned layers, each `(B, V, D)`, as features `(K, B, V, C)`."""
        features = [self.tower.finish(tokens) for tokens in patches]
        return normalize_features(torch.stack(features), self.alignment_norm)


def find_tower(model_type: str | None, name: str = "The vision tower") -> type[TeacherTower]:
    """How towers of a type are read.

    Args:
        model_type: As its configuration says.
        name: What errors call it.

    Raises:
        ValueError: If they cannot teach.
    """
    if model_type in TOWERS:
        return TOWERS[model_type]
    reason = f", {NO_TEACHERS[model_type]}" if model_type in NO_TEACHERS else ""
    raise ValueError(f"{name} holds a model of type {model_type!r}{reason}; the teacher must be {TEACHERS}.")


def find_class(name_or_path: str, **options: Any) -> tuple[type[TeacherTower], Any]:
    """How a tower is read, and its class in Transformers.

    Args:
        name_or_path: Folder or Hub id of a tower, or of a complete model.
        **options: `revision`, `token`, ...

    Raises:
        ImportError: If the installed version of Transformers has no such class.
        ValueError: If it cannot teach.
    """
    model_type: Any = PreTrainedConfig.get_config_dict(name_or_path, **options)[0].get("model_type")
    kind = find_tower(model_type, name_or_path)
    name = kind.classes[model_type]
    if (model_class := getattr(transformers, name, None)) is None:
        known = f": {kind.known_version} has it" if kind.known_version else ""
        raise ImportError(
            f"{name_or_path} is of type {model_type!r}, which needs a newer Transformers than the installed "
            f"{transformers.__version__}{known}."
        )
    return kind, model_class


def read_patch_size(name_or_path: str) -> int:
    """Side of a tower's patches, in pixels, from the configuration of the tower or of a complete model."""
    return find_class(name_or_path)[1].config_class.from_pretrained(name_or_path).patch_size


def read_statistics(name_or_path: str, **options: Any) -> tuple[Sequence[float] | None, Sequence[float] | None]:
    """Mean and standard deviation of the pixels that a tower expects, as the image or video processor beside it says.

    Args:
        name_or_path: Folder or Hub id.
        **options: `revision`, `token`, ...

    Returns:
        `None` for each that it does not say.
    """
    for read in (ImageProcessingMixin.get_image_processor_dict, BaseVideoProcessor.get_video_processor_dict):
        try:
            fields, _ = read(name_or_path, **options)
        except OSError:
            continue
        if fields.get("do_normalize") is False:
            return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        return fields.get("image_mean"), fields.get("image_std")
    return None, None


def _compute_renormalization(
    mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Scale and shift, each `(3, 1, 1)`, that lead from ImageNet's statistics to others; `None` where there are none.

    Raises:
        ValueError: If they are not three numbers each.
    """
    if mean is None or std is None:
        return None, None
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"The teacher's image_mean and image_std need three numbers each, got {mean} and {std}.")
    if list(mean) == IMAGENET_DEFAULT_MEAN and list(std) == IMAGENET_DEFAULT_STD:
        return None, None
    own_mean, own_std, clip_mean, clip_std = (
        torch.tensor(values, dtype=torch.float64).view(3, 1, 1)
        for values in (mean, std, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    return (clip_std / own_std).float(), ((clip_mean - own_mean) / own_std).float()


def _join_frames(states: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Tokens of frames `(B * T, P, D)` as tokens of clips `(B, T * P, D)`."""
    return states.unflatten(0, (batch_size, -1)).flatten(1, 2)


__all__ = ["UMTTeacher"]
