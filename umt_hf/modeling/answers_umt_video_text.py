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
"""How the answers of a closed list are ranked for questions that have looked at their videos.

Legend: B questions, S tokens of a question, H text width.
"""

from functools import partial

import torch

from .losses_umt import IGNORED_LABEL, compute_answer_loss
from .modeling_umt_text import UMTTextLMHeadModel


def rank_closed_list(
    decoder: UMTTextLMHeadModel,
    states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    answer_input_ids: torch.Tensor,
    answer_attention_mask: torch.Tensor,
    top_k: int,
    count_first_token_twice: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score the `top_k` answers with the likeliest first token by the log-probability of all their tokens.

    A question's keys and values are projected once for all its answers.

    Args:
        decoder: Of the answers.
        states: Questions that have looked at their videos, `(B, S, H)`.
        attention_mask: 1 at the questions' tokens and 0 at padding, `(B, S)`, or `None`.
        answer_input_ids: The list, `[CLS] ... [SEP]` each, `(answers, tokens)`.
        answer_attention_mask: 1 at its tokens and 0 at padding, on the right.
        top_k: Answers that are scored.
        count_first_token_twice: Whether the first token's log-probability is added once more.

    Returns:
        Indices into the list and their probabilities among the `top_k`, best first, both `(B, top_k)`.
    """
    decode = partial(decoder, use_cache=False, return_dict=True)
    key_values = decoder.text_model.get_encoder_key_values(states)
    start = answer_input_ids[:1, :1].expand(states.shape[0], 1)
    start_logits = decode(start, encoder_key_values=key_values, encoder_attention_mask=attention_mask).logits[:, 0]
    first_token_probs = start_logits.float().softmax(dim=1)[:, answer_input_ids[:, 1]]
    first_token_probs, candidates = first_token_probs.topk(top_k, dim=1)
    labels = answer_input_ids.masked_fill(answer_attention_mask == 0, IGNORED_LABEL)

    scores = []
    for i, chosen in enumerate(candidates):  # one question at a time: top_k answers fill a batch
        logits = decode(
            answer_input_ids[chosen],
            answer_attention_mask[chosen],
            encoder_key_values=key_values[i : i + 1],
            encoder_attention_mask=None if attention_mask is None else attention_mask[i : i + 1].expand(top_k, -1),
        ).logits
        scores.append(-compute_answer_loss(logits, labels[chosen]))
    scores = torch.stack(scores)
    if count_first_token_twice:
        scores = scores + first_token_probs.log()
    probabilities, order = scores.softmax(dim=1).sort(dim=1, descending=True)
    return candidates.gather(1, order), probabilities


__all__ = ["rank_closed_list"]
