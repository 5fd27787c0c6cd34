"""The video encoder on any clip that fits its grid: shapes, masks, order of the batch, and what does not fit.

Legend: B batch, T frames, N tokens, V visible tokens, D width.
"""

import functools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from umt_hf import UMTVideoConfig, UMTVideoForPreTraining, UMTVideoModel
from umt_hf.modeling.masking_umt_video import build_mask
from umt_hf.modeling.modeling_umt_video import gather_tokens

PATCH, WIDTH = 4, 8
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@functools.cache
def build_model(
    tubelet_size: int, table: str, use_final_norm: bool, num_layers: int, layer_scale: float, num_channels: int
) -> UMTVideoModel:
    """A tiny encoder whose position table is "interpolated", "fresh" (sinusoids of any length) or "learnable"."""
    torch.manual_seed(0)
    interpolated = {"position_embedding_frames": 4, "position_embedding_image_size": 8}
    config = UMTVideoConfig(
        image_size=8,
        patch_size=PATCH,
        num_channels=num_channels,
        num_frames=4,
        tubelet_size=tubelet_size,
        hidden_size=WIDTH,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        intermediate_size=12,
        layer_scale_init_value=layer_scale,
        use_final_norm=use_final_norm,
        num_aligned_layers=1,
        teacher_hidden_size=6,
        learnable_position_embedding=table == "learnable",
        **(dict.fromkeys(interpolated) if table == "fresh" else interpolated),
    )
    return UMTVideoModel(config).eval()


models = st.builds(
    build_model,
    st.sampled_from([1, 2]),
    st.sampled_from(["interpolated", "fresh", "learnable"]),
    st.booleans(),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([1, 3]),
)


@st.composite
def clips(draw, model: UMTVideoModel) -> torch.Tensor:
    """`(B, T, channels, height, width)` of a shape that fits."""
    config = model.config
    frames = config.tubelet_size * draw(st.integers(1, 4))
    height, width = PATCH * draw(st.integers(1, 4)), PATCH * draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return torch.randn(draw(st.integers(1, 3)), frames, config.num_channels, height, width, generator=generator)


def count_tokens(model: UMTVideoModel, clip: torch.Tensor) -> int:
    return clip.shape[1] // model.config.tubelet_size * (clip.shape[3] // PATCH) * (clip.shape[4] // PATCH)


@st.composite
def visible(draw, model: UMTVideoModel, clip: torch.Tensor) -> torch.Tensor:
    """Ascending indices `(B, V)` of visible tokens."""
    num_tokens = count_tokens(model, clip)
    num_visible = draw(st.integers(1, num_tokens))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    rows = [torch.randperm(num_tokens, generator=generator)[:num_visible].sort().values for _ in clip]
    return torch.stack(rows)


@torch.no_grad()
def encode(model: UMTVideoModel, clip: torch.Tensor, **options) -> torch.Tensor:
    return model(clip, **options).last_hidden_state


def reconstruct_embeddings(model: UMTVideoModel, clip: torch.Tensor) -> torch.Tensor:
    """Patches cut out one by one in a loop, frame by frame and row by row, and projected."""
    projection, tubelet = model.embeddings.patch_embeddings.projection, model.config.tubelet_size
    rows = []
    for start in range(0, clip.shape[1], tubelet):
        for top in range(0, clip.shape[3], PATCH):
            for left in range(0, clip.shape[4], PATCH):
                patch = clip[:, start : start + tubelet, :, top : top + PATCH, left : left + PATCH]
                rows.append(projection(patch.transpose(1, 2).flatten(1)))
    return torch.stack(rows, dim=1)


@given(models, st.data())
def test_shapes_pooling_and_patches(model, data):
    clip = data.draw(clips(model))
    with torch.no_grad():
        output = model(clip, output_hidden_states=True)
        patches = reconstruct_embeddings(model, clip)
    num_tokens = count_tokens(model, clip)
    assert output.last_hidden_state.shape == (clip.shape[0], num_tokens, WIDTH)
    torch.testing.assert_close(output.pooler_output, output.last_hidden_state.sum(1) / num_tokens, **TOLERANCE)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    # What is added to the patches is one table for all clips, and depends on the place alone.
    positions = output.hidden_states[0] - patches
    torch.testing.assert_close(positions, positions[:1].expand_as(positions), rtol=0, atol=1e-4)
    if model.config.position_embedding_frames is None and not model.config.learnable_position_embedding:
        channels = torch.arange(WIDTH)
        angles = torch.arange(num_tokens)[:, None] / 10000 ** (2 * (channels // 2) / WIDTH)
        expected = torch.where(channels % 2 == 0, angles.sin(), angles.cos())
        torch.testing.assert_close(positions[0], expected, rtol=0, atol=1e-4)


@given(models, st.data())
def test_mask_and_indices_agree_and_hidden_tokens_do_not_matter(model, data):
    clip = data.draw(clips(model))
    indices = data.draw(visible(model, clip))
    mask = build_mask(indices, count_tokens(model, clip))
    seen = encode(model, clip, visible_indices=indices)
    assert seen.shape == (clip.shape[0], indices.shape[1], WIDTH)
    torch.testing.assert_close(seen, encode(model, clip, bool_masked_pos=mask), rtol=0, atol=0)
    # Pixels of hidden tokens are not looked at.
    tubelet = model.config.tubelet_size
    grid = mask.view(clip.shape[0], clip.shape[1] // tubelet, clip.shape[3] // PATCH, clip.shape[4] // PATCH)
    hidden = grid.repeat_interleave(tubelet, 1).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    changed = torch.where(hidden[:, :, None], torch.full_like(clip, 1e4), clip)
    torch.testing.assert_close(seen, encode(model, changed, bool_masked_pos=mask), rtol=0, atol=0)
    if not mask.any():
        torch.testing.assert_close(seen, encode(model, clip), **TOLERANCE)


@given(models, st.data())
def test_order_of_indices_is_order_of_tokens(model, data):
    """Attention is over a set: what is permuted at the entrance is permuted at the exit."""
    clip = data.draw(clips(model))
    indices = data.draw(visible(model, clip))
    order = torch.tensor(data.draw(st.permutations(range(indices.shape[1]))))
    torch.testing.assert_close(
        encode(model, clip, visible_indices=indices[:, order]),
        encode(model, clip, visible_indices=indices)[:, order],
        **TOLERANCE,
    )


@given(models, st.data())
def test_clips_of_a_batch_do_not_see_each_other(model, data):
    clip = data.draw(clips(model))
    indices = data.draw(visible(model, clip))
    together = encode(model, clip, visible_indices=indices)
    order = torch.tensor(data.draw(st.permutations(range(clip.shape[0]))))
    permuted = encode(model, clip[order], visible_indices=indices[order])
    torch.testing.assert_close(permuted, together[order], **TOLERANCE)
    alone = torch.cat([encode(model, clip[i : i + 1], visible_indices=indices[i : i + 1]) for i in range(len(clip))])
    torch.testing.assert_close(alone, together, **TOLERANCE)


@given(models, st.data())
def test_clips_that_do_not_fit_are_refused_with_their_shape(model, data):
    shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 8]), min_size=3, max_size=6))
    config = model.config
    fits = len(shape) == 5 and shape[2] == config.num_channels
    fits = fits and min(shape[1:]) > 0 and not (shape[1] % config.tubelet_size or shape[3] % PATCH or shape[4] % PATCH)
    if fits:
        assert encode(model, torch.zeros(shape)).shape[0] == shape[0]
        return
    with pytest.raises(ValueError) as caught:
        encode(model, torch.zeros(shape))
    text = str(caught.value)
    assert str(tuple(shape)) in text or (f"{shape[1]} frames" in text and f"{shape[3]} x {shape[4]}" in text)


@given(models, st.data())
def test_masks_that_do_not_fit_are_refused_with_their_shape(model, data):
    clip = data.draw(clips(model))
    num_tokens = count_tokens(model, clip)
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(0, num_tokens + 2))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    mask = torch.rand(rows, columns, generator=generator) < data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    counts = (~mask).sum(1).tolist()
    if (rows, columns) == (clip.shape[0], num_tokens) and len(set(counts)) == 1 and counts[0] > 0:
        assert encode(model, clip, bool_masked_pos=mask).shape[1] == counts[0]
        return
    with pytest.raises(ValueError, match="bool_masked_pos must") as caught:
        encode(model, clip, bool_masked_pos=mask)
    assert str((rows, columns)) in str(caught.value) or str(counts) in str(caught.value)


@given(models, st.data())
def test_indices_that_do_not_fit_are_refused(model, data):
    """A number beyond the tokens is an error, never another frame's patch."""
    clip = data.draw(clips(model))
    num_tokens = count_tokens(model, clip)
    indices = data.draw(visible(model, clip))
    place = data.draw(st.integers(0, indices.numel() - 1))
    wrong = data.draw(st.sampled_from([num_tokens, num_tokens + 1, -1, 10 * num_tokens]))
    flat = indices.flatten().clone()
    flat[place] = wrong
    with pytest.raises(ValueError, match=rf"visible_indices must be from 0 to {num_tokens - 1}.*\[{wrong}\]"):
        encode(model, clip, visible_indices=flat.view_as(indices))
    with pytest.raises(ValueError, match=r"visible_indices must be"):
        encode(model, clip, visible_indices=indices[:, 0])
    with pytest.raises(ValueError, match="not both"):
        encode(model, clip, visible_indices=indices, bool_masked_pos=build_mask(indices, num_tokens))


@functools.cache
def build_student(norm: str, loss: str) -> UMTVideoForPreTraining:
    torch.manual_seed(0)
    config = UMTVideoConfig(
        image_size=8,
        patch_size=PATCH,
        num_frames=4,
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=12,
        num_aligned_layers=2,
        teacher_hidden_size=6,
        alignment_norm=norm,
        alignment_loss=loss,
    )
    return UMTVideoForPreTraining(config).eval()


@given(st.sampled_from(["l2", "none"]), st.sampled_from(["l2", "mse", "smooth_l1"]), st.data())
def test_the_students_loss_is_over_the_visible_tokens(norm, loss, data):
    """Teacher features at all tokens, or at the visible ones alone, give one loss."""
    student = build_student(norm, loss)
    clip = data.draw(clips(student.vision_model))
    indices = data.draw(visible(student.vision_model, clip))
    num_tokens = count_tokens(student.vision_model, clip)
    teacher = torch.randn(2, clip.shape[0], num_tokens, 6, generator=torch.Generator().manual_seed(0))
    assume(indices.shape[1] < num_tokens)
    with torch.no_grad():
        everywhere = student(clip, visible_indices=indices, teacher_features=teacher)
        gathered = gather_tokens(teacher, indices)
        seen = student(clip, bool_masked_pos=build_mask(indices, num_tokens), teacher_features=gathered)
    torch.testing.assert_close(everywhere.loss, seen.loss)
    ours, theirs = everywhere.aligned_features.double(), gathered.double()
    if norm == "l2":
        theirs = theirs / theirs.square().sum(-1, keepdim=True).sqrt()
    terms = []
    for a, b in zip(ours.flatten(0, 2), theirs.flatten(0, 2), strict=True):
        if loss == "l2":
            terms.append(2 - 2 * (a * b).sum())
        elif loss == "mse":
            terms.append((a - b).square().mean())
        else:
            gap = (a - b).abs()
            terms.append(torch.where(gap < 1, gap.square() / 2, gap - 0.5).mean())
    torch.testing.assert_close(everywhere.loss.double(), torch.stack(terms).mean(), rtol=1e-4, atol=1e-5)
