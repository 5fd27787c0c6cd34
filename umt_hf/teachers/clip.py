# Copyright 2026 The umt_hf authors. Licensed under the Apache License, Version 2.0.
"""The frozen teacher: Transformers' CLIP vision tower, giving per-token features and a saliency map per frame.

Legend: B batch, T frames, N tokens, P patches per frame, D width, K aligned layers, C projected channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionModelWithProjection
from transformers.activations import QuickGELUActivation
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..modeling.configuration_umt_video import select_aligned_layers
from ..modeling.losses_umt import normalize_features
from ..modeling.modeling_umt_video import (
    eager_attention_forward,
    gather_tokens,
    interpolate_position_table,
    require_normalized,
)

CLIP_TYPES = ("clip", "clip_vision_model")
QUICK_GELU_SLOPE = 1.702


class CLIPVisionTower(CLIPVisionModelWithProjection):
    """CLIP's vision tower, read out of a complete CLIP without a word on the text tower."""

    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^text_projection\.", r"^logit_scale$"]


@dataclass
class UMTTeacherOutput:
    """Output of [`UMTTeacher`].

    Args:
        features: Features of the aligned layers `(K, B, N, C)`, shallowest first, unit length, float32; at the visible
            tokens alone, `(K, B, V, C)`, where their indices were given.
        saliency: Attention of the last layer's class token to the patches, averaged over heads, `(B * T, P)`, float32.
            A row sums to one minus the class token's attention to itself.
    """

    features: torch.Tensor
    saliency: torch.Tensor


class UMTTeacher(nn.Module):
    """Frozen CLIP image tower that looks at every frame of a clip by itself.

    Always in evaluation mode and without gradients. Keep it outside the student, so that it is not saved with it.

    Args:
        vision_tower: CLIP vision tower with its projection.
        num_aligned_layers: K, counted from the last layer.
        alignment_interval: Step between aligned layers.
        image_size: Side of the frames it sees, in pixels; frames of another size are resized (bicubic) and the
            position table is carried over once, here. Default: the tower's own.
        alignment_norm: "l2" or "none".

    Raises:
        ValueError: If the tower has too few layers or no square frames, or its patch does not divide `image_size`.

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

    def __init__(
        self,
        vision_tower: CLIPVisionModelWithProjection,
        num_aligned_layers: int = 6,
        alignment_interval: float = 1,
        image_size: int | None = None,
        alignment_norm: str = "l2",
    ):
        super().__init__()
        config = vision_tower.config
        self.aligned_layer_indices = select_aligned_layers(
            config.num_hidden_layers, num_aligned_layers, alignment_interval
        )
        own_size, patch_size = config.image_size, config.patch_size
        if not isinstance(own_size, int) or not isinstance(patch_size, int):
            raise ValueError(
                f"The teacher must see square frames and patches, got image_size={own_size}, patch_size={patch_size}."
            )
        self.alignment_norm = alignment_norm
        self.image_size: int = image_size or own_size
        self.patch_size: int = patch_size
        self.hidden_size = config.projection_dim
        if self.image_size % self.patch_size:
            raise ValueError(
                f"Teacher image_size={self.image_size} is not a multiple of its patch size {self.patch_size}."
            )
        self.vision_tower = vision_tower
        if self.image_size != own_size:
            _resize_position_embedding(vision_tower.vision_model.embeddings, self.image_size)
        layers: Any = vision_tower.vision_model.encoder.layers
        for layer in layers:
            if isinstance(layer.mlp.activation_fn, QuickGELUActivation):
                layer.mlp = FrozenMLP(layer.mlp)
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
        """Load a CLIP vision tower from the Hub or a folder.

        Args:
            name_or_path: For example "openai/clip-vit-base-patch16".
            num_aligned_layers: K.
            alignment_interval: Step between aligned layers.
            image_size: Side of the frames it sees, in pixels.
            alignment_norm: "l2" or "none".
            **kwargs: Passed to `CLIPVisionModelWithProjection.from_pretrained` (`dtype`, `attn_implementation`, ...).

        Raises:
            ValueError: If it is not a CLIP, or lacks weights.
        """
        model_type = PreTrainedConfig.get_config_dict(name_or_path)[0].get("model_type")
        if model_type not in CLIP_TYPES:
            raise ValueError(f"{name_or_path} holds a model of type {model_type!r}; the teacher must be a CLIP.")
        # pyrefly: ignore[not-iterable]  a pair, with output_loading_info
        tower, info = CLIPVisionTower.from_pretrained(
            name_or_path, **kwargs, output_loading_info=True, ignore_mismatched_sizes=True
        )
        # Transformers only warns and draws them at random, and a student would be aligned with that.
        if info["mismatched_keys"]:
            name, stored, needed = min(info["mismatched_keys"])
            raise ValueError(f"{name_or_path} holds {name} in shape {tuple(stored)}, which should be {tuple(needed)}.")
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"{name_or_path} is not a complete CLIP vision tower with projection: "
                f"it lacks {', '.join(missing[:5])}."
            )
        return cls(tower, num_aligned_layers, alignment_interval, image_size, alignment_norm)

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
    def encode(self, pixel_values: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """One pass through the tower, with the last layer's attention row of the class token as saliency.

        Args:
            pixel_values: `(B, T, channels, height, width)`.

        Returns:
            Hidden states of the aligned layers, each `(B * T, 1 + P, D)`, and the saliency `(B * T, P)`.

        Raises:
            ValueError: If the video holds raw integers.
        """
        aligned, last_input = self._encode_below(pixel_values)
        layer: Any = self.vision_tower.vision_model.encoder.layers[-1]
        # By itself, so that no layer has to write out its attention maps.
        normed = layer.layer_norm1(last_input)
        saliency = _weigh_patches(layer.self_attn, normed, layer.self_attn.k_proj(normed))
        return [*aligned, layer(last_input, None)], saliency

    @torch.no_grad()
    def compute_saliency(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Saliency alone, `(B * T, P)`, without the rest of the last layer.

        Args:
            pixel_values: `(B, T, channels, height, width)`.

        Raises:
            ValueError: If the video holds raw integers.
        """
        _, last_input = self._encode_below(pixel_values)
        layer: Any = self.vision_tower.vision_model.encoder.layers[-1]
        normed = layer.layer_norm1(last_input)
        return _weigh_patches(layer.self_attn, normed, layer.self_attn.k_proj(normed))

    @torch.no_grad()
    def align_visible(
        self, pixel_values: torch.Tensor, draw_visible: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features at tokens that are drawn by the saliency; the last layer runs at these alone.

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
        layer: Any = self.vision_tower.vision_model.encoder.layers[-1]
        batch_size, num_frames = pixel_values.shape[:2]
        normed = layer.layer_norm1(last_input)
        key = layer.self_attn.k_proj(normed)
        visible = draw_visible(_weigh_patches(layer.self_attn, normed, key))
        in_frame = visible.unflatten(1, (num_frames, -1)).flatten(0, 1) % (last_input.shape[1] - 1)
        last = _run_at(layer, last_input, normed, key, in_frame + 1)  # past the class token, which is the first
        patches = [gather_tokens(_join_frames(states[:, 1:], batch_size), visible) for states in aligned]
        return visible, self._align([*patches, _join_frames(last, batch_size)])

    def _encode_below(self, pixel_values: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Hidden states of the aligned layers but the last one, and the last layer's input, `(B * T, 1 + P, D)`."""
        require_normalized(pixel_values)
        frames = pixel_values.flatten(0, 1)
        if frames.shape[-2:] != (self.image_size, self.image_size):
            frames = F.interpolate(
                frames, size=(self.image_size, self.image_size), mode="bicubic", align_corners=False
            )
        tower = self.vision_tower.vision_model
        hidden_states = tower.pre_layrnorm(tower.embeddings(frames))
        aligned = []
        for i, layer in enumerate(tower.encoder.layers[:-1]):
            hidden_states = layer(hidden_states, None)
            if i in self.aligned_layer_indices:
                aligned.append(hidden_states)
        return aligned, hidden_states

    @torch.no_grad()
    def project(
        self, hidden_states: list[torch.Tensor], batch_size: int, visible_indices: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Patch tokens through the last LayerNorm and the projection, normalised; at the visible tokens if given.

        Args:
            hidden_states: From [`UMTTeacher.encode`].
            batch_size: B.
            visible_indices: `(B, V)`.

        Returns:
            `(K, B, N or V, C)`, float32.
        """
        patches = [_join_frames(states[:, 1:], batch_size) for states in hidden_states]
        if visible_indices is not None:
            patches = [gather_tokens(tokens, visible_indices) for tokens in patches]
        return self._align(patches)

    def _align(self, patches: list[torch.Tensor]) -> torch.Tensor:
        """Tokens of the aligned layers, each `(B, V, D)`, as features `(K, B, V, C)`."""
        tower = self.vision_tower
        features = [tower.visual_projection(tower.vision_model.post_layernorm(tokens)) for tokens in patches]
        return normalize_features(torch.stack(features), self.alignment_norm)


class FrozenMLP(nn.Module):
    """CLIP's MLP in fewer passes over its widest states, for a tower that is not trained.

    `x * sigmoid(1.702 x)` is `silu(1.702 x) / 1.702`; both matrix products scale as they write, and the activation
    overwrites its input. Weights and their names stay CLIP's.

    Args:
        mlp: Of a CLIP layer with `quick_gelu`.
    """

    def __init__(self, mlp: Any):
        super().__init__()
        self.fc1, self.fc2, self.activation_fn = mlp.fc1, mlp.fc2, mlp.activation_fn

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """States `(..., D)` -> `(..., D)`."""
        if torch.is_grad_enabled() or not (_is_plain(self.fc1) and _is_plain(self.fc2)):
            return self.fc2(self.activation_fn(self.fc1(hidden_states)))
        states = _scaled_linear(hidden_states, self.fc1.weight, QUICK_GELU_SLOPE * self.fc1.bias, QUICK_GELU_SLOPE)
        states = F.silu(states, inplace=True)
        return _scaled_linear(states, self.fc2.weight, self.fc2.bias, 1 / QUICK_GELU_SLOPE)


def _is_plain(layer: nn.Linear) -> bool:
    """Whether a layer holds its numbers itself: quantised ones hold others, and offloaded ones fetch theirs."""
    is_number = type(layer.weight) is nn.Parameter and layer.weight.is_floating_point()
    return is_number and layer.bias is not None and not hasattr(layer, "_hf_hook")


def _scaled_linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, scale: float) -> torch.Tensor:
    """`scale * states @ weight.T + bias`, in one product."""
    output = torch.addmm(bias, states.flatten(0, -2), weight.T, alpha=scale)
    return output.unflatten(0, states.shape[:-1])


def _join_frames(states: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Tokens of frames `(B * T, P, D)` as tokens of clips `(B, T * P, D)`."""
    return states.unflatten(0, (batch_size, -1)).flatten(1, 2)


def _weigh_patches(attention: Any, normed: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Head-averaged attention of the class token to the patches in one CLIP layer, `(frames, P)`, float32."""
    query = attention.q_proj(normed[:, :1]).unflatten(-1, (attention.num_heads, -1))
    key = key.unflatten(-1, (attention.num_heads, -1))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key).float() * attention.head_dim**-0.5
    return scores.softmax(dim=-1).mean(dim=1)[:, 0, 1:]


def _run_at(
    layer: Any, hidden_states: torch.Tensor, normed: torch.Tensor, key: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    """Output of a CLIP layer at some tokens alone, which attend to all.

    Args:
        layer: Of CLIP's vision tower.
        hidden_states: Its input `(frames, 1 + P, D)`.
        normed: That after the layer's first norm.
        key: Keys of all tokens, of the shape of `hidden_states`.
        indices: Tokens `(frames, V)`.

    Returns:
        `(frames, V, D)`.
    """
    attention = layer.self_attn

    def split_heads(states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
        attention.config._attn_implementation or "eager", eager_attention_forward
    )
    query = split_heads(attention.q_proj(gather_tokens(normed, indices)))
    value = split_heads(attention.v_proj(normed))
    output, _ = attend(attention, query, split_heads(key), value, None, scaling=attention.scale, dropout=0.0)
    states = gather_tokens(hidden_states, indices) + attention.out_proj(output.flatten(-2))
    return states + layer.mlp(layer.layer_norm2(states))


def _resize_position_embedding(embeddings: Any, image_size: int) -> None:
    """Carry CLIP's position table to another frame size: class row kept, patch rows bicubic."""
    table = embeddings.position_embedding.weight.data
    old, new = embeddings.image_size // embeddings.patch_size, image_size // embeddings.patch_size
    patches = interpolate_position_table(table[None, 1:].float(), (1, old, old), (1, new, new))[0].to(table.dtype)
    embeddings.position_embedding = nn.Embedding.from_pretrained(torch.cat([table[:1], patches]))
    embeddings.image_size = image_size
    embeddings.num_patches = new * new
    embeddings.num_positions = new * new + 1
    position_ids = torch.arange(embeddings.num_positions, device=table.device)[None]
    embeddings.register_buffer("position_ids", position_ids, persistent=False)


__all__ = ["UMTTeacher"]
