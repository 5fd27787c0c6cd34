"""Masks of hidden tokens: counts, structure and order, against a draw written out one by one."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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

ratios = st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 0.5, 0.75, 0.8, 0.9])
sizes = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 40))
seeds = st.integers(0, 2**31)
KINDS = ("attention", "tube", "random")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw_mask(kind: str, size: tuple[int, int, int], ratio: float, generator: torch.Generator) -> torch.Tensor:
    batch, frames, patches = size
    if kind == "attention":
        return sample_attention_mask(torch.rand(*size, generator=seeded(1)), ratio, generator=generator)
    if kind == "tube":
        return sample_tube_mask(batch, frames, patches, ratio, generator)
    return sample_random_mask(batch, frames * patches, ratio, generator)


@given(st.sampled_from(KINDS), sizes, ratios, seeds)
def test_counts_structure_and_repeatability(kind, size, ratio, seed):
    batch, frames, patches = size
    mask = draw_mask(kind, size, ratio, seeded(seed))
    assert mask.shape == (batch, frames * patches) and mask.dtype == torch.bool
    assert torch.equal(mask, draw_mask(kind, size, ratio, seeded(seed)))
    if kind == "random":
        assert mask.sum(1).tolist() == [math.floor(frames * patches * ratio)] * batch
        return
    by_frame = mask.view(batch, frames, patches)
    assert (by_frame.sum(2) == math.floor(patches * ratio)).all()
    if kind == "tube":
        assert torch.equal(by_frame, by_frame[:, :1].expand_as(by_frame))


@given(st.sampled_from(KINDS), sizes, ratios, seeds)
def test_indices_and_masks_are_one_draw(kind, size, ratio, seed):
    batch, frames, patches = size
    mask = draw_mask(kind, size, ratio, seeded(seed))
    if kind == "attention":
        visible = sample_attention_indices(torch.rand(*size, generator=seeded(1)), ratio, generator=seeded(seed))
    elif kind == "tube":
        visible = sample_tube_indices(batch, frames, patches, ratio, seeded(seed))
    else:
        visible = sample_random_indices(batch, frames * patches, ratio, seeded(seed))
    for row, hidden in zip(visible.tolist(), mask.tolist(), strict=True):
        assert row == [place for place, is_hidden in enumerate(hidden) if not is_hidden]
    assert torch.equal(build_mask(visible, frames * patches), mask)
    assert torch.equal(compute_visible_indices(mask, visible.shape[1]), visible)


@given(
    st.integers(1, 12).flatmap(
        lambda patches: st.lists(
            st.lists(
                st.floats(0, 3e38) | st.sampled_from([0.0, 1.0, math.inf, 1e-45, math.nan]),
                min_size=patches,
                max_size=patches,
            ),
            min_size=1,
            max_size=3,
        )
    ),
    ratios,
    seeds,
)
def test_any_saliency_leaves_the_right_count(rows, ratio, seed):
    """Zeros, equal values, infinities and NaN of a teacher in low precision: never a token twice, or too few."""
    saliency = torch.tensor(rows)
    mask = sample_attention_mask(saliency, ratio, num_frames=1, generator=seeded(seed))
    patches = saliency.shape[1]
    assert (mask.sum(1) == math.floor(patches * ratio)).all() and mask.shape == saliency.shape
    visible = sample_attention_indices(saliency, ratio, num_frames=1, generator=seeded(seed))
    assert all(len(set(row)) == patches - math.floor(patches * ratio) for row in visible.tolist())


@given(sizes, ratios, seeds, st.integers(-20, 20), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_the_draw_is_that_of_sequential_sampling(size, ratio, seed, exponent, dtype):
    """Patches come in the order of `saliency / noise`, whatever the scale and the precision of the saliency."""
    saliency = (torch.rand(*size, generator=seeded(seed)) + 0.01).to(dtype)
    noise = torch.empty(*size).exponential_(generator=seeded(seed + 1))
    visible = sample_attention_indices(saliency, ratio, noise=noise)
    scaled = sample_attention_indices(saliency.float() * 2.0**exponent, ratio, noise=noise)
    assert torch.equal(visible, scaled)
    batch, frames, patches = size
    kept = patches - math.floor(patches * ratio)
    order = np.argsort(-(saliency.double().numpy() / noise.double().numpy()), axis=-1, kind="stable")[..., :kept]
    for clip, row in enumerate(visible.tolist()):
        expected = [frame * patches + patch for frame in range(frames) for patch in sorted(order[clip, frame])]
        assert row == expected


@given(st.integers(1, 3), st.integers(1, 20), ratios, st.booleans(), seeds)
def test_equal_noise_hides_no_token_twice(batch, tokens, ratio, all_equal, seed):
    noise = torch.zeros(batch, tokens) if all_equal else torch.randint(3, (batch, tokens), generator=seeded(seed)) / 3
    visible = sample_random_indices(batch, tokens, ratio, noise=noise)
    assert all(sorted(set(row)) == row for row in visible.tolist())
    assert visible.shape == (batch, tokens - math.floor(tokens * ratio))


@given(st.sampled_from(KINDS), st.floats())
def test_ratios_outside_the_bounds_are_named(kind, ratio):
    if 0 <= ratio < 1:
        assert draw_mask(kind, (1, 2, 4), ratio, seeded(0)).any() == (int((8 if kind == "random" else 4) * ratio) > 0)
        return
    with pytest.raises(ValueError, match=r"mask_ratio must be in \[0, 1\)"):
        draw_mask(kind, (1, 2, 4), ratio, seeded(0))


@given(st.lists(st.integers(0, 4), max_size=4), st.none() | st.integers(-2, 4))
def test_shapes_of_saliency_are_taken_or_named(shape, num_frames):
    saliency = torch.rand(shape)
    is_right = len(shape) == 3 or (len(shape) == 2 and num_frames and num_frames > 0 and shape[0] % num_frames == 0)
    if not is_right:
        with pytest.raises(ValueError, match="saliency"):
            sample_attention_mask(saliency, 0.5, num_frames)
        return
    batch, frames, patches = shape if len(shape) == 3 else (shape[0] // num_frames, num_frames, shape[1])
    mask = sample_attention_mask(saliency, 0.5, num_frames)
    assert mask.shape == (batch, frames * patches) and int(mask.sum()) == batch * frames * (patches // 2)
