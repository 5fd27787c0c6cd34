"""Matching and masked words look at a video whose keys and values are computed once; no mask is looked at."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.masking_utils import create_bidirectional_mask

from umt_hf import UMTTextConfig, UMTTextModel, UMTVideoTextConfig, UMTVideoTextForPreTraining
from umt_hf.modeling.losses_umt import has_negatives, lacks_negatives, mlm_loss, sample_negatives, vtm_loss
from umt_hf.training.step.waits import WaitCounter

VISION = {
    "image_size": 32,
    "patch_size": 8,
    "num_frames": 2,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "num_aligned_layers": 1,
    "teacher_hidden_size": 12,
}
TEXT = {
    "vocab_size": 120,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
    "fusion_layer": 2,
    "encoder_width": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
IDS = torch.tensor([[101, 7, 8, 9], [101, 9, 0, 0], [101, 5, 6, 0]])


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "input_ids": IDS,
        "attention_mask": (IDS != 0).long(),
        "pixel_values": torch.randn(3, 2, 3, 32, 32),
        "video_negatives": torch.tensor([1, 2, 0]),
        "text_negatives": torch.tensor([2, 0, 0]),
        "mlm_input_ids": IDS.masked_fill(IDS == 9, 103),
        "mlm_labels": IDS.where(IDS == 9, -100),
        "return_loss": True,
    }


def build_model(**fields) -> UMTVideoTextForPreTraining:
    torch.manual_seed(0)
    return UMTVideoTextForPreTraining(
        UMTVideoTextConfig(vision_config=VISION, text_config=TEXT, projection_dim=16, **fields)
    )


def compute_apart(model, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Matching and masked words by a pass each, with a copy of its video for every text."""
    video = model.get_video_features(batch["pixel_values"]).last_hidden_state
    mask = batch["attention_mask"]
    text = model.get_text_features(batch["input_ids"], mask).last_hidden_state
    logits = model.match(
        torch.cat([video, video[batch["video_negatives"]], video]),
        torch.cat([text, text, text[batch["text_negatives"]]]),
        torch.cat([mask, mask, mask[batch["text_negatives"]]]),
    )
    states = model.text_model(batch["mlm_input_ids"], mask, encoder_hidden_states=video, mode="multi_modal")
    return vtm_loss(logits), mlm_loss(model.mlm_head(states.last_hidden_state), batch["mlm_labels"])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "not reentrant", "reentrant"])
def test_losses_and_gradients_are_those_of_separate_passes(batch, attention, checkpointing):
    model = build_model()
    model.set_attn_implementation(attention)
    expected = compute_apart(model, batch)
    gradients = torch.autograd.grad(sum(expected), list(model.parameters()), allow_unused=True)
    if checkpointing is not None:
        model.text_model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    outputs = model(**batch)
    torch.testing.assert_close(torch.stack([outputs.vtm_loss, outputs.mlm_loss]), torch.stack(expected))
    (outputs.vtm_loss + outputs.mlm_loss).backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("weights", "num_rows"),
    [({}, 3), ({"vtm_loss_weight": 0}, 3), ({"mlm_loss_weight": 0}, 3)],
    ids=["both", "words alone", "matching alone"],
)
def test_each_video_is_projected_once(batch, weights, num_rows):
    model, rows = build_model(**weights), []
    for layer in model.text_model.layers:
        if layer.cross_attention is not None:
            layer.cross_attention.k_proj.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
            layer.cross_attention.v_proj.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    outputs = model(**batch)
    assert rows == [num_rows] * 4  # keys and values of two layers
    assert (outputs.vtm_loss is None) == ("vtm_loss_weight" in weights)
    assert (outputs.mlm_loss is None) == ("mlm_loss_weight" in weights)
    with FlopCounterMode(display=False) as together:
        model(**batch)
    if not weights:
        with FlopCounterMode(display=False) as apart:
            compute_apart(model, batch)
        # Three of four projections of 32 tokens to keys and values in two layers.
        assert apart.get_total_flops() - together.get_total_flops() >= 3 * 3 * 32 * 2 * 2 * 2 * 32 * 24 * 0.9


def test_texts_choose_the_sequence_that_they_attend_to():
    torch.manual_seed(0)
    model = UMTTextModel(UMTTextConfig(**TEXT)).eval()
    videos, rows = torch.randn(2, 5, 32), torch.tensor([1, 0, 1])
    mask = (IDS != 0).long()
    chosen = model(IDS, mask, encoder_hidden_states=videos, encoder_rows=rows, mode="multi_modal")
    copied = model(IDS, mask, encoder_hidden_states=videos[rows], mode="multi_modal")
    torch.testing.assert_close(chosen.last_hidden_state, copied.last_hidden_state)
    with pytest.raises(ValueError, match="encoder_rows cannot be combined with encoder_attention_mask"):
        model(
            IDS,
            mask,
            encoder_hidden_states=videos,
            encoder_rows=rows,
            encoder_attention_mask=torch.ones(2, 5),
            mode="multi_modal",
        )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [True, False])
def test_masks_of_training_are_those_of_transformers_without_a_look(attention, padded):
    model = UMTTextModel(UMTTextConfig(**TEXT))
    model.set_attn_implementation(attention)
    ids = IDS if padded else IDS[:1].expand(3, -1)
    mask, states = (ids != 0).long(), torch.randn(3, 4, 24)
    expected = create_bidirectional_mask(config=model.config, inputs_embeds=states, attention_mask=mask)
    with WaitCounter() as counter:
        built = model.train()._build_padding_mask(states, mask)
    assert not counter.counts
    if padded:
        assert torch.equal(built, expected)
    else:  # there Transformers has no mask, which means the same
        assert expected is None and bool((built if attention == "sdpa" else built == 0).all())
    model.train()
    one = model(ids, mask).last_hidden_state
    torch.testing.assert_close(model.eval()(ids, mask).last_hidden_state, one)


def test_a_counter_of_waits_counts_them():
    values = torch.arange(4.0)
    with WaitCounter() as counter:
        values.sum().item()
        bool(values[0] < 1)
        values.nonzero()
        torch.equal(values, values)
        values * 2 + values.mean()
    assert counter.counts == {"aten._local_scalar_dense": 2, "aten.nonzero": 1, "aten.equal": 1}


def test_ids_of_one_kind_are_known_without_a_wait():
    ids = torch.tensor([3, 3])
    with WaitCounter() as counter:
        assert lacks_negatives(ids, 2) and not lacks_negatives(torch.tensor([3, 4]), 2)
        assert lacks_negatives(None, 1) and not lacks_negatives(None, 2)
        assert not lacks_negatives(ids.to("meta"), 2) and lacks_negatives(ids[:1].to("meta"), 1)
        flags = has_negatives(ids, 2, ids.device), has_negatives(torch.tensor([3, 4]), 2, ids.device)
    assert not counter.counts and [bool(flag) for flag in flags] == [False, True]


def test_negatives_are_drawn_as_multinomial_draws_them():
    for size in (2, 5, 64):
        weights = torch.rand(size, size, generator=torch.Generator().manual_seed(size))
        weights[0, 1:] = 0
        one, other = (torch.Generator().manual_seed(7) for _ in range(2))
        drawn = sample_negatives(weights, one)
        assert torch.equal(drawn, weights.multinomial(1, generator=other).squeeze(1)) and drawn[0] == 0
        assert torch.equal(one.get_state(), other.get_state())
