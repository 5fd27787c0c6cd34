# Copyright 2026 The umt_hf authors. Licensed under the Apache License, Version 2.0.
"""DINOv2, with or without registers, DINOv3 and TIPSv2 as teachers: saliency is what their class token attends to.

Source: Oquab et al., "DINOv2", 2023; Darcet et al., "Vision Transformers Need Registers", 2024; Siméoni et al.,
"DINOv3", 2025.

Legend: F frames, P patches per frame, D width.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..modeling.modeling_umt_video import gather_tokens
from .tower import LayerInput, TeacherTower, average_attention


class DinoTower(TeacherTower):
    """A tower with a class token, registers or none, then the patches.

    Features are the patches through the last LayerNorm, for layers below the last one too, as DINO's own
    evaluations take those of intermediate layers. The last layer runs at all tokens.
    """

    title = "DINO vision tower"
    classes: ClassVar = {
        "dinov2": "Dinov2Model",
        "dinov2_with_registers": "Dinov2WithRegistersModel",
        "dinov3_vit": "DINOv3ViTModel",
    }
    statistics = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    unread = (r"^classifier\.",)

    @property
    def layers(self) -> Any:
        """First to last."""
        # The place in DINOv2, in DINOv3, and in DINOv3 of earlier versions of Transformers.
        encoder = getattr(self.model, "encoder", None) or getattr(self.model, "model", None) or self.model
        return encoder.layer

    def resize_positions(self, image_size: int) -> None:
        """Resize the table as the model itself would in each pass; rotary positions fit any size."""
        embeddings = self.model.embeddings
        table = getattr(embeddings, "position_embeddings", None)
        if table is None:
            return
        side = image_size // self.model.config.patch_size
        with torch.no_grad():
            tokens = table.new_empty(1, 1 + side * side, table.shape[-1])
            table = embeddings.interpolate_pos_encoding(tokens, image_size, image_size)
        embeddings.position_embeddings = nn.Parameter(table)

    def embed(self, frames: torch.Tensor) -> LayerInput:
        """Input of the first layer, and rotary positions if any."""
        rotary = getattr(self.model, "rope_embeddings", None)
        if rotary is None:
            return LayerInput(self.model.embeddings(frames))
        frames = frames.to(self.model.embeddings.patch_embeddings.weight.dtype)  # which the angles take over
        return LayerInput(self.model.embeddings(frames), {"position_embeddings": rotary(frames)})

    def weigh(self, last: LayerInput) -> torch.Tensor:
        """Attention of the class token, by itself, so that no layer has to write out its attention maps."""
        layer: Any = self.layers[-1]
        attention = getattr(layer.attention, "attention", layer.attention)  # the inner one, in earlier versions
        project_query, project_key = (
            getattr(attention, new, None) or getattr(attention, old)
            for new, old in (("q_proj", "query"), ("k_proj", "key"))
        )
        normed = layer.norm1(last.states)
        query, key = project_query(normed[:, :1]), project_key(normed)
        num_heads, num_prefix = self.model.config.num_attention_heads, self.num_prefix_tokens
        if "position_embeddings" in last.options:  # they turn patches alone: the class token's query stays
            cos, sin = last.options["position_embeddings"]
            key = _rotate_patches(key, cos, sin, num_heads, num_prefix)
        return average_attention(query, key, num_heads, (query.shape[-1] // num_heads) ** -0.5)[:, num_prefix:]

    def run_last(self, last: LayerInput, indices: torch.Tensor | None = None) -> torch.Tensor:
        """Output of the last layer."""
        states = self.layers[-1](last.states, **last.options)
        return states if indices is None else gather_tokens(states, indices + self.num_prefix_tokens)

    def finish(self, tokens: torch.Tensor) -> torch.Tensor:
        """Through the last LayerNorm."""
        norm = getattr(self.model, "norm", None) or self.model.layernorm
        return norm(tokens)


class TipsTower(DinoTower):
    """A DINOv2 with registers inside, whose first class token is asked; pixels stay in [0, 1]."""

    title = "TIPSv2 vision tower"
    classes: ClassVar = dict.fromkeys(("tipsv2", "tipsv2_vision_model"), "Tipsv2VisionModel")
    statistics = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    known_version = "5.24.0"
    unread = (r"^text_model\.", r"^temperature$")


def _rotate_patches(
    states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int, num_prefix: int
) -> torch.Tensor:
    """Turn each head of the patches by its place.

    Args:
        states: Keys or queries `(F, prefix + P, D)`.
        cos: `(P, D / heads)`.
        sin: Likewise.
        num_heads: Heads.
        num_prefix: Tokens that have no place and stay.
    """
    patches = states[:, num_prefix:].unflatten(-1, (num_heads, -1))
    first, second = patches.chunk(2, dim=-1)
    turned = patches * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
    return torch.cat([states[:, :num_prefix], turned.flatten(-2)], dim=1)


__all__ = ["DinoTower", "TipsTower"]
