"""Counts and sampling distribution of the masks."""

import pytest
import torch

from tests.parity.reference import load_table
from umt_hf.modeling.masking_umt_video import (
    build_mask,
    compute_visible_indices,
    sample_attention_indices,
    sample_attention_mask,
    sample_random_indices,
    sample_random_mask,
    sample_tube_indices,
    sample_tube_mask,
)


@pytest.mark.parametrize("index", range(len(load_table("mask_law")["tables"])))
def test_attention_mask_follows_the_published_distribution(index):
    table = load_table("mask_law")["tables"][index]
    draws = 20000
    row = torch.tensor(table["attention_row"])
    generator = torch.Generator().manual_seed(index)
    saliency = row.expand(draws, 1, -1)
    visible = ~sample_attention_mask(saliency, table["mask_ratio"], generator=generator)
    assert torch.equal(visible.sum(1), torch.full((draws,), table["kept"]))
    exact = torch.tensor(table["exact_inclusion_probability"])
    error = (exact * (1 - exact) / draws).sqrt().clamp_min(1e-4)
    assert ((visible.float().mean(0) - exact).abs() / error).max() < 4.5


def test_visible_counts_match_the_published_table():
    for tokens, ratio, visible in load_table("mask_law")["visible_per_frame_table"]:
        mask = sample_attention_mask(torch.rand(1, 2, tokens), ratio)
        assert (~mask).view(2, tokens).sum(1).tolist() == [visible, visible]


def test_tube_and_random_counts_match_the_published_table():
    rows = load_table("returned_layers_and_mask_counts")["other_mask_generators"]["rows"]
    for (frames, height, width), ratio, per_frame, tube_total, random_total in rows:
        patches = height * width
        tube = sample_tube_mask(2, frames, patches, ratio)
        assert tube.sum(1).tolist() == [tube_total] * 2
        framewise = tube.view(2, frames, patches)
        assert torch.equal(framewise, framewise[:, :1].expand_as(framewise))
        assert framewise[0, 0].sum() == per_frame
        assert sample_random_mask(2, frames * patches, ratio).sum(1).tolist() == [random_total] * 2


def test_generators_make_draws_repeatable():
    saliency = torch.rand(6, 16)

    def draw(seed: int) -> torch.Tensor:
        return sample_attention_mask(saliency, 0.75, num_frames=3, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert draw(1).shape == (2, 48)
    assert torch.equal(
        draw(1), sample_attention_mask(saliency.view(2, 3, 16), 0.75, generator=torch.Generator().manual_seed(1))
    )


def test_zero_saliency_still_leaves_the_right_count():
    saliency = torch.zeros(1, 1, 10)
    saliency[..., 3] = 1.0
    mask = sample_attention_mask(saliency, 0.7)
    assert (~mask).sum() == 3 and not mask[0, 3]


def test_visible_indices_are_raster_ordered():
    mask = sample_random_mask(4, 30, 0.6)
    indices = compute_visible_indices(mask, 12)
    assert torch.equal(indices, (~mask).nonzero()[:, 1].view(4, 12))


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.8, 0.97])
def test_mask_and_indices_are_the_same_draw(ratio):
    """For one random state both hide the same tokens; indices are ascending, and the mask is built back from them."""
    saliency = torch.rand(4, 3, 30)
    for sample_indices, sample_mask, shape in (
        (sample_attention_indices, sample_attention_mask, (saliency,)),
        (sample_tube_indices, sample_tube_mask, (4, 3, 30)),
        (sample_random_indices, sample_random_mask, (4, 90)),
    ):
        mask = sample_mask(*shape, ratio, generator=torch.Generator().manual_seed(3))
        indices = sample_indices(*shape, ratio, generator=torch.Generator().manual_seed(3))
        assert torch.equal(indices, (~mask).nonzero()[:, 1].view(4, -1))
        assert torch.equal(build_mask(indices, 90), mask)


@pytest.mark.parametrize("kind", ["attention", "tube", "random"])
def test_a_seed_keeps_its_numbers(kind):
    """The draws are those of the first formulas, a `topk` scattered to a mask, also where noise is equal."""
    coarse = torch.randint(1, 6, (5, 40), generator=torch.Generator().manual_seed(0)) / 8
    for noise in (torch.rand(5, 40, generator=torch.Generator().manual_seed(1)), coarse):
        if kind == "attention":
            saliency = torch.rand(5, 2, 20, generator=torch.Generator().manual_seed(2))
            weights = saliency / noise.unflatten(1, (2, 20))
            shown = weights.topk(5, dim=-1).indices
            expected = torch.ones_like(weights, dtype=torch.bool).scatter_(-1, shown, False).flatten(1)
            mask = sample_attention_mask(saliency, 0.75, noise=noise.unflatten(1, (2, 20)))
        else:
            hidden = noise.topk(30, dim=-1).indices
            expected = torch.zeros_like(noise, dtype=torch.bool).scatter_(-1, hidden, True)
            mask = sample_random_mask(5, 40, 0.75, noise=noise)
            if kind == "tube":
                expected, mask = expected.repeat(1, 3), sample_tube_mask(5, 3, 40, 0.75, noise=noise)
        assert torch.equal(mask, expected)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 2])
def test_ratio_out_of_range(ratio):
    with pytest.raises(ValueError, match="mask_ratio"):
        sample_random_mask(1, 8, ratio)
    with pytest.raises(ValueError, match="mask_ratio"):
        sample_attention_mask(torch.rand(1, 1, 8), ratio)


def test_shapes_that_do_not_tell_the_frames():
    with pytest.raises(ValueError, match="num_frames"):
        sample_attention_mask(torch.rand(7, 8), 0.5, num_frames=2)
    with pytest.raises(ValueError, match="batch, frames, patches"):
        sample_attention_mask(torch.rand(8), 0.5)


@pytest.mark.parametrize("num_frames", [None, 0, -1, 4])
def test_a_number_of_frames_that_does_not_divide_the_rows_is_named(num_frames):
    with pytest.raises(ValueError, match=rf"needs num_frames, a divisor of its first dimension, got {num_frames}"):
        sample_attention_mask(torch.rand(6, 16), 0.5, num_frames)
