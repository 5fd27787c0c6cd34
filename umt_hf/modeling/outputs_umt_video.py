# Copyright 2026 The umt_hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What the video models return.

Legend: B batch, V visible tokens, D width, K aligned layers, C teacher channels, M boxes per clip.
"""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput


@dataclass
class UMTVideoModelOutput(BaseModelOutputWithPooling):
    """Output of [`UMTVideoModel`].

    Attributes:
        last_hidden_state: Visible tokens after the last layer (and the final norm, if any), `(B, V, D)`.
        pooler_output: Mean over those tokens, `(B, D)`.
        hidden_states: Embeddings and every layer's output before the final norm, when asked for.
        attentions: Attention probabilities of every layer, when asked for (`attn_implementation="eager"`).
        aligned_hidden_states: With `output_aligned_states=True`, the outputs of the aligned layers after the final
            norm, `(K, B, V, D)`, shallowest first.
        kept_indices: Which tokens these are, `(B, V)`, ascending, where `config.keep_ratio` below 1 chose them.
    """

    aligned_hidden_states: torch.Tensor | None = None
    kept_indices: torch.Tensor | None = None


@dataclass
class UMTVideoForPreTrainingOutput(ModelOutput):
    """Output of [`UMTVideoForPreTraining`].

    Args:
        loss: Alignment loss, when `teacher_features` are given.
        aligned_features: Projected and normalised student features `(K, B, V, C)`, shallowest layer first, float32.
        hidden_states: Embeddings and every layer's output, when asked for.
        attentions: Attention probabilities of every layer, when asked for.
        other_aligned_features: Those for each further teacher, where there are any.
        teacher_losses: Weighted loss of each of several teachers, whose sum is `loss`.
    """

    loss: torch.Tensor | None = None
    aligned_features: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    other_aligned_features: tuple[torch.Tensor, ...] | None = None
    teacher_losses: tuple[torch.Tensor, ...] | None = None


@dataclass
class UMTVideoForActionDetectionOutput(ModelOutput):
    """Output of [`UMTVideoForActionDetection`].

    Args:
        loss: Multi-label loss, when `labels` are given.
        logits: One row per box, `(B, M, num_labels)`; 0 where there is no box. `sigmoid` gives probabilities.
        hidden_states: Embeddings and every layer's output before the final norm, when asked for.
        attentions: Attention probabilities of every layer, when asked for.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


__all__ = ["UMTVideoForActionDetectionOutput", "UMTVideoForPreTrainingOutput", "UMTVideoModelOutput"]
