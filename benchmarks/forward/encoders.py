"""Video encoders of one width and depth at random weights: ours with all tokens and with fewer, and Transformers'."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    TimesformerConfig,
    TimesformerModel,
    VideoMAEConfig,
    VideoMAEModel,
    VJEPA2Config,
    VJEPA2Model,
)

from umt_hf import UMTVideoConfig, UMTVideoModel
from umt_hf.modeling.selection_umt_video import count_kept

# Names of ours -> of VideoMAE's, in this order.
RENAMES = (
    ("layers.", "encoder.layer."),
    (".attention.q_proj.bias", ".attention.attention.q_bias"),
    (".attention.v_proj.bias", ".attention.attention.v_bias"),
    (".attention.q_proj", ".attention.attention.query"),
    (".attention.k_proj", ".attention.attention.key"),
    (".attention.v_proj", ".attention.attention.value"),
    (".attention.o_proj", ".attention.output.dense"),
    (".mlp.fc1", ".intermediate.dense"),
    (".mlp.fc2", ".output.dense"),
)


@dataclass(frozen=True)
class Shape:
    """Sizes that all encoders share.

    Args:
        width: Of a token.
        layers: Transformer layers.
        heads: Of the attention.
        image_size: Side of a frame, in pixels.
        patch_size: Side of a patch.
    """

    width: int
    layers: int
    heads: int
    image_size: int
    patch_size: int

    def describe(self, num_frames: int, tubelet_size: int = 1) -> dict[str, Any]:
        """Fields that most configurations call alike."""
        return {
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": 4 * self.width,
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "num_frames": num_frames,
            "tubelet_size": tubelet_size,
            "layer_norm_eps": 1e-6,
        }


@dataclass
class Encoder:
    """An encoder that is timed.

    Args:
        model: It.
        encode: Gives the tokens `(B, V, D)` of videos `(B, T, 3, side, side)`.
        num_tokens: Of a clip, after what is left out.
    """

    model: nn.Module
    encode: Callable[[torch.Tensor], torch.Tensor]
    num_tokens: int


def build_umt(shape: Shape, num_frames: int, keep_ratio: float = 1.0, selector: str = "frame_difference") -> Encoder:
    """Ours, one token per patch and frame, of which a share is kept."""
    fields = shape.describe(num_frames) | {
        "position_embedding_frames": num_frames,
        "position_embedding_image_size": shape.image_size,
        "num_aligned_layers": 1,
    }
    model = UMTVideoModel(UMTVideoConfig(**fields, keep_ratio=keep_ratio, token_selector=selector))
    patches = (shape.image_size // shape.patch_size) ** 2
    kept = num_frames * count_kept(patches, keep_ratio)
    return Encoder(model, lambda pixels: model(pixels).last_hidden_state, kept)


def build_videomae(shape: Shape, num_frames: int, tubelet_size: int) -> Encoder:
    """Transformers' VideoMAE encoder."""
    config = VideoMAEConfig(**shape.describe(num_frames, tubelet_size), use_mean_pooling=False)
    return _wrap(VideoMAEModel(config), "pixel_values", shape, num_frames // tubelet_size)


def build_vjepa2(shape: Shape, num_frames: int, tubelet_size: int) -> Encoder:
    """Transformers' V-JEPA 2 encoder; its predictor does not run."""
    fields = shape.describe(num_frames, tubelet_size)
    config = VJEPA2Config(
        **{name: fields[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size")},
        tubelet_size=tubelet_size,
        crop_size=shape.image_size,
        frames_per_clip=num_frames,
        pred_hidden_size=shape.heads * 4,
        pred_num_attention_heads=shape.heads,
        pred_num_hidden_layers=1,
    )
    model = VJEPA2Model(config)
    return _wrap(model, "pixel_values_videos", shape, num_frames // tubelet_size, skip_predictor=True)


def build_timesformer(shape: Shape, num_frames: int) -> Encoder:
    """Transformers' TimeSformer, attention divided into space and time; one token per clip besides."""
    fields = shape.describe(num_frames)
    del fields["tubelet_size"]
    encoder = _wrap(TimesformerModel(TimesformerConfig(**fields)), "pixel_values", shape, num_frames)
    encoder.num_tokens += 1
    return encoder


def _wrap(model: nn.Module, name: str, shape: Shape, time: int, **options: Any) -> Encoder:
    patches = (shape.image_size // shape.patch_size) ** 2
    return Encoder(model, lambda pixels: model(**{name: pixels}, **options).last_hidden_state, time * patches)


def copy_to_videomae(source: nn.Module, target: nn.Module) -> None:
    """Give VideoMAE the weights of ours; its table of sinusoids is the same.

    Raises:
        RuntimeError: If a weight has no place in it.
    """
    names, state = target.state_dict(), {}
    for own, tensor in source.state_dict().items():
        name = own if not own.startswith("norm.") else f"layernorm.{own.removeprefix('norm.')}"
        for ours, theirs in RENAMES:
            # Before Transformers 5.9 or so the biases of VideoMAE are parameters beside the projections.
            if name.replace(ours, theirs) in names or not ours.endswith("bias"):
                name = name.replace(ours, theirs)
        state[name] = tensor.view_as(names[name]) if name in names else tensor
    found = target.load_state_dict(state, strict=False)
    if found.missing_keys or found.unexpected_keys:
        raise RuntimeError(f"VideoMAE has other weights: {found}.")
