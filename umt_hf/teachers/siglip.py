# Copyright 2026 The umt_hf authors. Licensed under the Apache License, Version 2.0.
"""SigLIP, and SigLIP 2 of fixed size, as teachers: saliency is what the probe of the pooling head attends to.

They have no class token. A picture's embedding comes from a learned query, the probe, which attends to the last
layer's patches. The saliency needs all of those, so the last layer runs at all tokens.

Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023; InternVideo-Next draws its masks from the
same attention.
"""

from typing import Any, ClassVar

import torch
from torch.nn import functional as F
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD

from ..modeling.modeling_umt_video import gather_tokens
from .clip import resize_position_embedding
from .tower import LayerInput, TeacherTower, average_attention


class SiglipTower(TeacherTower):
    """A tower without a class token, pooled by an attention head.

    Features are tokens through the last LayerNorm, as the pooling head sees them.

    Raises:
        ValueError: If it has no pooling head.
    """

    title = "SigLIP vision tower"
    classes: ClassVar = dict.fromkeys(("siglip", "siglip_vision_model"), "SiglipVisionModel")
    statistics = (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD)
    unread = (r"^text_model\.", r"^logit_scale$", r"^logit_bias$")

    def __init__(self, model: Any):
        super().__init__(model)
        # Earlier versions of Transformers wrap the tower once more.
        self.inner = getattr(model, "vision_model", model)
        if not hasattr(self.inner, "head"):
            raise ValueError(
                "This SigLIP has no pooling head (vision_use_head=False), whose attention is the saliency: take one "
                "that has."
            )

    @property
    def num_prefix_tokens(self) -> int:
        """None: patches are all there is."""
        return 0

    @property
    def layers(self) -> Any:
        """First to last."""
        return self.inner.encoder.layers

    def resize_positions(self, image_size: int) -> None:
        """Carry the position table over."""
        resize_position_embedding(self.inner.embeddings, image_size, num_kept=0)

    def embed(self, frames: torch.Tensor) -> LayerInput:
        """Input of the first layer."""
        return LayerInput(self.inner.embeddings(frames), {"attention_mask": None})

    def weigh(self, last: LayerInput) -> torch.Tensor:
        """Attention of the probe to the patches of the last layer."""
        last.kept = self.layers[-1](last.states, **last.options)
        attention = self.inner.head.attention
        query_weight, key_weight, _ = attention.in_proj_weight.chunk(3)
        query_bias, key_bias, _ = attention.in_proj_bias.chunk(3)
        query = F.linear(self.inner.head.probe, query_weight, query_bias)
        key = F.linear(self.finish(last.kept), key_weight, key_bias)
        query = query.expand(key.shape[0], -1, -1)
        return average_attention(query, key, attention.num_heads, attention.head_dim**-0.5)

    def run_last(self, last: LayerInput, indices: torch.Tensor | None = None) -> torch.Tensor:
        """Output of the last layer, which has run for the saliency, if that was asked for."""
        if last.kept is None:
            last.kept = self.layers[-1](last.states, **last.options)
        return last.kept if indices is None else gather_tokens(last.kept, indices)

    def finish(self, tokens: torch.Tensor) -> torch.Tensor:
        """Through the last LayerNorm."""
        return self.inner.post_layernorm(tokens)


__all__ = ["SiglipTower"]
