# Copyright 2026 The umt_hf authors. Licensed under the Apache License, Version 2.0.
"""CLIP and MetaCLIP 2 as teachers: features in the space that pictures and texts share, saliency of the class token.

Their last layer runs at the visible tokens alone.

Legend: F frames, P patches per frame, V visible patches per frame, D width.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import QuickGELUActivation
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..modeling.modeling_umt_video import eager_attention_forward, gather_tokens, interpolate_position_table
from .tower import LayerInput, TeacherTower, average_attention

QUICK_GELU_SLOPE = 1.702


class CLIPTower(TeacherTower):
    """A tower with a class token before the patches, and a projection after the last LayerNorm.

    Features are tokens through both, as CLIP's own feature of a picture is its class token through both. The
    published teacher sees the clips as the student does, in ImageNet's statistics.
    """

    title = "CLIP vision tower with projection"
    classes: ClassVar = dict.fromkeys(("clip", "clip_vision_model"), "CLIPVisionModelWithProjection")
    unread = (r"^text_model\.", r"^text_projection\.", r"^logit_scale$")

    def __init__(self, model: Any):
        super().__init__(model)
        for layer in self.layers:
            if isinstance(layer.mlp.activation_fn, QuickGELUActivation):
                layer.mlp = FrozenMLP(layer.mlp)

    @property
    def width(self) -> int:
        """Width of the projection."""
        return self.model.config.projection_dim

    @property
    def layers(self) -> Any:
        """First to last."""
        return self.model.vision_model.encoder.layers

    def resize_positions(self, image_size: int) -> None:
        """Carry the position table over; the class token's row stays."""
        resize_position_embedding(self.model.vision_model.embeddings, image_size, num_kept=1)

    def embed(self, frames: torch.Tensor) -> LayerInput:
        """Input of the first layer."""
        tower = self.model.vision_model
        return LayerInput(tower.pre_layrnorm(tower.embeddings(frames)), {"attention_mask": None})

    def weigh(self, last: LayerInput) -> torch.Tensor:
        """Attention of the class token, by itself, so that no layer has to write out its attention maps."""
        layer: Any = self.layers[-1]
        normed = layer.layer_norm1(last.states)
        key = layer.self_attn.k_proj(normed)
        query = layer.self_attn.q_proj(normed[:, :1])
        last.kept = normed, key
        return average_attention(query, key, layer.self_attn.num_heads, layer.self_attn.head_dim**-0.5)[:, 1:]

    def run_last(self, last: LayerInput, indices: torch.Tensor | None = None) -> torch.Tensor:
        """Output of the last layer, computed at the indices alone."""
        layer: Any = self.layers[-1]
        if indices is None:
            return layer(last.states, **last.options)
        normed, key = last.kept
        return _run_at(layer, last.states, normed, key, indices + 1)  # past the class token, which is the first

    def finish(self, tokens: torch.Tensor) -> torch.Tensor:
        """Through the last LayerNorm and the projection."""
        return self.model.visual_projection(self.model.vision_model.post_layernorm(tokens))


class MetaCLIP2Tower(CLIPTower):
    """The same layers; it sees pixels in CLIP's statistics, which it was trained with."""

    title = "MetaCLIP 2 vision tower with projection"
    classes: ClassVar = dict.fromkeys(("metaclip_2", "metaclip_2_vision_model"), "MetaClip2VisionModelWithProjection")
    statistics = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)


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


def resize_position_embedding(embeddings: Any, image_size: int, num_kept: int) -> None:
    """Carry a learned position table to another frame size, bicubic.

    Args:
        embeddings: Of a tower of Transformers, with `position_embedding` and `position_ids`.
        image_size: New side of the frames, in pixels.
        num_kept: Rows before those of the patches, which stay as they are.
    """
    table = embeddings.position_embedding.weight.data
    old, new = embeddings.image_size // embeddings.patch_size, image_size // embeddings.patch_size
    patches = interpolate_position_table(table[None, num_kept:].float(), (1, old, old), (1, new, new))[0]
    embeddings.position_embedding = nn.Embedding.from_pretrained(
        torch.cat([table[:num_kept], patches.to(table.dtype)])
    )
    embeddings.image_size = image_size
    embeddings.num_patches = new * new
    embeddings.num_positions = new * new + num_kept
    position_ids = torch.arange(embeddings.num_positions, device=table.device)[None]
    embeddings.register_buffer("position_ids", position_ids, persistent=False)


def _is_plain(layer: nn.Linear) -> bool:
    """Whether a layer holds its numbers itself: quantised ones hold others, and offloaded ones fetch theirs."""
    is_number = type(layer.weight) is nn.Parameter and layer.weight.is_floating_point()
    return is_number and layer.bias is not None and not hasattr(layer, "_hf_hook")


def _scaled_linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, scale: float) -> torch.Tensor:
    """`scale * states @ weight.T + bias`, in one product."""
    output = torch.addmm(bias, states.flatten(0, -2), weight.T, alpha=scale)
    return output.unflatten(0, states.shape[:-1])


def _run_at(
    layer: Any, hidden_states: torch.Tensor, normed: torch.Tensor, key: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    """Output of a CLIP layer at some tokens alone, which attend to all.

    Args:
        layer: Of CLIP's vision tower.
        hidden_states: Its input `(F, 1 + P, D)`.
        normed: That after the layer's first norm.
        key: Keys of all tokens, of the shape of `hidden_states`.
        indices: Tokens `(F, V)`.

    Returns:
        `(F, V, D)`.
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


__all__ = ["CLIPTower", "MetaCLIP2Tower"]
