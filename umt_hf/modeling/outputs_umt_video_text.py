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
"""What the models with video and text return.

Legend: B videos or texts, T frames (of tubelets, where these are longer than a frame), V video tokens, L text tokens,
H text width, D projection width, S tokens of a question, A answers of all questions, K aligned layers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.utils import ModelOutput

from .outputs_umt_video import UMTVideoModelOutput


@dataclass
class UMTVideoFeaturesOutput(UMTVideoModelOutput):
    """Output of `get_video_features`.

    `pooler_output` is one vector per video, `(B, D)`, float32: the mean of its frames' unit vectors, or a single unit
    vector. Its inner product with a text's unit vector is their score; normalising it again changes scores.

    Args:
        frame_embeds: The frames' unit vectors `(B, T, D)`, float32; `None` where the video is pooled as one, which is
            with a mask or without `pool_per_frame`.
    """

    frame_embeds: torch.Tensor | None = None


@dataclass
class UMTVideoTextOutput(ModelOutput):
    """Output of [`UMTVideoTextModel`].

    Args:
        loss: Weighted sum of the losses, with `return_loss=True`.
        vtc_loss: Video-text contrast, without its weight.
        logits_per_video: Similarities over temperature, `(videos, texts)`, float32.
        logits_per_text: The same, `(texts, videos)`.
        video_embeds: One vector per video, `(B, D)`, float32: the `pooler_output` of `vision_model_output`, which has
            the frames' unit vectors as well.
        text_embeds: Projected texts of unit length, `(B, D)`, float32.
        vision_model_output: What `get_video_features` returns.
        text_model_output: Tokens of the texts, `(B, L, H)`.
    """

    loss: torch.Tensor | None = None
    vtc_loss: torch.Tensor | None = None
    logits_per_video: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    video_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    vision_model_output: UMTVideoFeaturesOutput | None = None
    text_model_output: BaseModelOutputWithPoolingAndCrossAttentions | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """Fields that are set, the towers' outputs as tuples too."""
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


@dataclass
class UMTVideoTextForRetrievalOutput(UMTVideoTextOutput):
    """Output of [`UMTVideoTextForRetrieval`].

    Args:
        vtm_loss: Video-text matching, without its weight.
        matching_logits: Raw logits `(3 * B, 2)`, class 1 = match: B true pairs, B negative videos with the texts, B
            negative texts with the videos.
    """

    vtm_loss: torch.Tensor | None = None
    matching_logits: torch.Tensor | None = None


@dataclass
class UMTVideoTextMatchingOutput(ModelOutput):
    """Output of `match`, when it is asked for hidden states or attentions.

    Args:
        logits: Raw logits `(B, 2)`, class 1 = match.
        hidden_states: Input and output of every fusion layer, `(B, L, H)` each.
        attentions: Attention probabilities among the words, one `(B, heads, L, L)` per fusion layer.
        cross_attentions: Attention probabilities from the words to the video, one `(B, heads, L, V)` per fusion layer.
    """

    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class UMTVideoTextForPreTrainingOutput(UMTVideoTextForRetrievalOutput):
    """Output of [`UMTVideoTextForPreTraining`].

    Args:
        uta_loss: Alignment with the teacher, without its weight.
        mlm_loss: Masked language modelling, without its weight.
        mlm_logits: `(B, L, vocabulary)` for the corrupted texts.
        aligned_features: Projected and normalised student features `(K, B, V, C)`, shallowest layer first, float32.
    """

    uta_loss: torch.Tensor | None = None
    mlm_loss: torch.Tensor | None = None
    mlm_logits: torch.Tensor | None = None
    aligned_features: torch.Tensor | None = None


@dataclass
class UMTVideoTextForQuestionAnsweringOutput(ModelOutput):
    """Output of [`UMTVideoTextForQuestionAnswering`].

    Args:
        loss: Sum of the weighted answer losses over the number of questions, with `labels`.
        answer_loss: Cross entropy of each answer, summed over its tokens, `(A,)`.
        logits: Of the answers' next tokens, `(A, answer tokens, vocabulary)`.
        last_hidden_state: States of the questions after looking at the videos, `(B, S, H)`.
        hidden_states: Embeddings and every layer's output of the questions, when asked for.
        attentions: Attention probabilities among a question's words, one `(B, heads, S, S)` per layer, when asked for
            (`attn_implementation="eager"`), as all that follow.
        cross_attentions: From a question's words to the video, one `(B, heads, S, V)` per fusion layer.
        decoder_hidden_states: Embeddings and every layer's output of the answers, `(A, answer tokens, H)` each.
        decoder_attentions: Among an answer's words, one `(A, heads, answer tokens, answer tokens)` per decoder layer.
        decoder_cross_attentions: From an answer's words to the question, one `(A, heads, answer tokens, S)` per
            decoder layer.
        video_outputs: What the video encoder returns: tokens, hidden states and attentions; `None` if neither of the
            last two was asked for.
    """

    loss: torch.Tensor | None = None
    answer_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None
    decoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    decoder_attentions: tuple[torch.Tensor, ...] | None = None
    decoder_cross_attentions: tuple[torch.Tensor, ...] | None = None
    video_outputs: UMTVideoModelOutput | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """Fields that are set, the video encoder's output as a tuple too."""
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


__all__ = [
    "UMTVideoFeaturesOutput",
    "UMTVideoTextForPreTrainingOutput",
    "UMTVideoTextForQuestionAnsweringOutput",
    "UMTVideoTextForRetrievalOutput",
    "UMTVideoTextMatchingOutput",
    "UMTVideoTextOutput",
]
