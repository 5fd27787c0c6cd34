"""Texts with padding on any side, alone and together with videos.

Legend: B batch, L tokens of a text, V tokens of a video.
"""

import functools

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.modeling.test_modeling_video_text import TINY, TINY_TEXT
from umt_hf import UMTTextConfig, UMTVideoTextConfig, UMTVideoTextForRetrieval
from umt_hf.modeling.modeling_umt_text import UMTTextModel

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
PAD = 0

texts = st.lists(st.lists(st.integers(104, 119), max_size=6).map(lambda words: [101, *words]), min_size=1, max_size=4)


@functools.cache
def build_text_model() -> UMTTextModel:
    torch.manual_seed(0)
    return UMTTextModel(UMTTextConfig(**TINY_TEXT)).eval()


@functools.cache
def build_model() -> UMTVideoTextForRetrieval:
    torch.manual_seed(0)
    return UMTVideoTextForRetrieval(UMTVideoTextConfig(**TINY)).eval()


def pad(rows: list[list[int]], length: int, left: bool, filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask; what stands at padding must not matter."""
    ids, masks = [], []
    for row in rows:
        gap = [filler] * (length - len(row))
        ids.append([*gap, *row] if left else [*row, *gap])
        masks.append([0] * len(gap) + [1] * len(row) if left else [1] * len(row) + [0] * len(gap))
    return torch.tensor(ids), torch.tensor(masks)


def strip(states: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    return [row[is_word.bool()] for row, is_word in zip(states, mask, strict=True)]


@given(
    texts, st.integers(0, 5), st.booleans(), st.sampled_from([PAD, 103, 119]), st.sampled_from(["text", "multi_modal"])
)
@torch.no_grad()
def test_padding_does_not_matter(rows, extra, left, filler, mode):
    """A text alone, without padding, has the states that it has in a batch padded on either side."""
    model = build_text_model()
    ids, mask = pad(rows, max(map(len, rows)) + extra, left, filler)
    video = torch.randn(len(rows), 5, 32, generator=torch.Generator().manual_seed(0))
    options = {} if mode == "text" else {"mode": mode, "encoder_hidden_states": video}
    output = model(ids, mask, **options)
    pooled = output.pooler_output
    for number, (row, states) in enumerate(zip(rows, strip(output.last_hidden_state, mask), strict=True)):
        own = {} if mode == "text" else {"mode": mode, "encoder_hidden_states": video[number : number + 1]}
        alone = model(torch.tensor([row]), **own)
        torch.testing.assert_close(states, alone.last_hidden_state[0], **TOLERANCE)
        torch.testing.assert_close(pooled[number], alone.pooler_output[0], **TOLERANCE)


@given(texts, st.integers(1, 5), st.integers(0, 4), st.booleans())
@torch.no_grad()
def test_all_layers_are_text_layers_then_fusion_layers(rows, num_tokens, extra, left):
    """ "multi_modal" is "text" and then "fusion"; hidden video tokens do not matter."""
    model = build_text_model()
    ids, mask = pad(rows, max(map(len, rows)), left, PAD)
    video = torch.randn(len(rows), num_tokens + extra, 32, generator=torch.Generator().manual_seed(0))
    video_mask = (torch.arange(num_tokens + extra) < num_tokens).long().expand(len(rows), -1)
    options = {"encoder_hidden_states": video, "encoder_attention_mask": video_mask}
    together = model(ids, mask, mode="multi_modal", **options).last_hidden_state
    states = model(ids, mask, mode="text").last_hidden_state
    fused = model(inputs_embeds=states, attention_mask=mask, mode="fusion", **options).last_hidden_state
    shorter = model(ids, mask, mode="multi_modal", encoder_hidden_states=video[:, :num_tokens]).last_hidden_state
    for a, b, c in zip(strip(together, mask), strip(fused, mask), strip(shorter, mask), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)
        torch.testing.assert_close(a, c, **TOLERANCE)


@given(texts, st.booleans(), st.integers(0, 3), st.integers(1, 3), st.integers(1, 3), st.data())
@torch.no_grad()
def test_similarities_are_those_of_each_pair_alone(rows, left, extra, num_videos, num_frames, data):
    model = build_model()
    ids, mask = pad(rows, max(map(len, rows)) + extra, left, PAD)
    videos = torch.randn(num_videos, num_frames, 3, 32, 32, generator=torch.Generator().manual_seed(len(rows)))
    output = model(ids, mask, videos)
    logits = output.logits_per_video
    assert logits.shape == (num_videos, len(rows))
    torch.testing.assert_close(output.logits_per_text, logits.T)
    i, j = data.draw(st.integers(0, num_videos - 1)), data.draw(st.integers(0, len(rows) - 1))
    alone = model(torch.tensor([rows[j]]), None, videos[i : i + 1]).logits_per_video
    torch.testing.assert_close(alone[0, 0], logits[i, j], rtol=1e-3, atol=1e-3)
    features = model.get_video_features(videos).pooler_output, model.get_text_features(ids, mask).pooler_output
    assert features[0].shape[0] == num_videos and features[1].shape == (len(rows), 16)
