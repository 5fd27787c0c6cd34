# Copyright 2026 The umt_hf authors. Licensed under the Apache License, Version 2.0.
"""A classifier that asks a frozen UMT encoder with one learned query, instead of the mean of its tokens."""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput

from .configuration_umt_video import UMTVideoConfig
from .modeling_umt_video import UMTVideoForVideoClassification


class UMTVideoAttentivePooling(nn.Module):
    """One vector of a clip: what a learned query finds among its normalised tokens `(B, N, D)`."""

    def __init__(self, config: UMTVideoConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.query = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.attention = nn.MultiheadAttention(config.hidden_size, config.num_attention_heads, batch_first=True)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(tokens)
        return self.attention(self.query.expand(len(tokens), -1, -1), tokens, tokens, need_weights=False)[0][:, 0]


class UMTVideoForAttentiveProbing(UMTVideoForVideoClassification):
    """UMT encoder with an attentive probe: a learned query attends to the tokens, then norm and classifier.

    The encoder is frozen by the training script, not here. `AutoModel` does not know this class: load it by its name.

    Source: Chen et al., "Context Autoencoder", 2023, attentive probing.
    """

    def __init__(self, config: UMTVideoConfig):
        super().__init__(config)
        self.attentive_pooling = UMTVideoAttentivePooling(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, UMTVideoAttentivePooling):
            init.trunc_normal_(module.query, std=self.config.initializer_range)
        if isinstance(module, nn.MultiheadAttention):
            init.xavier_uniform_(module.in_proj_weight)
            init.zeros_(module.in_proj_bias)

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        """Classify a clip; arguments and result as for [`UMTVideoForVideoClassification`]."""
        outputs = self.vision_model(pixel_values, **kwargs)
        logits = self.classifier(self.fc_norm(self.attentive_pooling(outputs.last_hidden_state)))
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = ["UMTVideoForAttentiveProbing"]
