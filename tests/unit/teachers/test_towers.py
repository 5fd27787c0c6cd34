"""Every kind of tower teaches what Transformers' own model computes: features, saliency, positions, pixels."""

import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from umt_hf import UMTTeacher
from umt_hf.teachers.teacher import TEACHER_TYPES
from umt_hf.training.alignment import TokenGrid, compute_targets, draw_visible_indices

from .towers import INSTALLED, KINDS, build_tower

STATISTICS = {
    "clip": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),  # the published code gives CLIP the student's pixels
    "metaclip_2": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "siglip": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
    "dinov2": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "dinov2_with_registers": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "dinov3_vit": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "tipsv2": ([0.0] * 3, [1.0] * 3),
}
PREFIX = {
    "clip": 1,
    "metaclip_2": 1,
    "siglip": 0,
    "dinov2": 1,
    "dinov2_with_registers": 4,
    "dinov3_vit": 4,
    "tipsv2": 2,
}


def normalize(video: torch.Tensor, mean, std) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return (video - mean) / std


def draw_video(frames: int = 3, side: int = 32) -> torch.Tensor:
    """In [0, 1]."""
    return torch.rand(2, frames, 3, side, side, generator=torch.Generator().manual_seed(1))


def run_alone(kind: str, video: torch.Tensor, **options) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Hidden states after each layer and the saliency, by Transformers' own model with its maps written out."""
    tower = build_tower(kind, "eager")
    frames = normalize(video, *STATISTICS[kind]).flatten(0, 1)
    with torch.no_grad():
        outputs = tower(frames, output_hidden_states=True, output_attentions=True, **options)
        states = outputs.hidden_states[1:]
        if kind != "siglip":
            return list(states), outputs.attentions[-1][:, :, 0, PREFIX[kind] :].mean(dim=1)
        inner = getattr(tower, "vision_model", tower)
        probe = inner.head.probe.expand(len(frames), -1, -1)
        _, weights = inner.head.attention(probe, outputs.last_hidden_state, outputs.last_hidden_state)
        return list(states), weights[:, 0]


def finish(kind: str, states: torch.Tensor) -> torch.Tensor:
    """Patches through what the model puts behind its last layer."""
    tower, patches = build_tower(kind), states[:, PREFIX[kind] :]
    with torch.no_grad():
        if kind in ("clip", "metaclip_2"):
            return tower.visual_projection(tower.vision_model.post_layernorm(patches))
        if kind == "siglip":
            return getattr(tower, "vision_model", tower).post_layernorm(patches)
        return (tower.norm if kind == "dinov3_vit" else tower.layernorm)(patches)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", INSTALLED)
def test_features_and_saliency_are_those_of_the_model_by_itself(kind, attention):
    video = draw_video()
    teacher = UMTTeacher(build_tower(kind, attention), num_aligned_layers=2, alignment_interval=2)
    outputs = teacher(normalize(video, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    states, saliency = run_alone(kind, video)
    torch.testing.assert_close(outputs.saliency, saliency, atol=2e-6, rtol=1e-4)
    assert saliency.std() > 1e-3  # a flat one would hide a mistake
    for found, own in zip(outputs.features, (states[1], states[3]), strict=True):
        expected = F.normalize(finish(kind, own), dim=-1).unflatten(0, (2, 3)).flatten(1, 2)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert teacher.hidden_size == outputs.features.shape[-1] == (12 if kind in ("clip", "metaclip_2") else 24)
    assert outputs.features.dtype == outputs.saliency.dtype == torch.float32


@pytest.mark.parametrize("kind", INSTALLED)
def test_saliency_alone_is_the_same_and_a_row_sums_to_what_patches_are_given(kind):
    teacher, video = UMTTeacher(build_tower(kind), 1), torch.randn(2, 3, 3, 32, 32)
    saliency = teacher.compute_saliency(video)
    torch.testing.assert_close(saliency, teacher(video).saliency)
    sums = saliency.sum(dim=1)
    assert saliency.shape == (6, 16) and (saliency > 0).all()
    if kind == "siglip":  # its probe attends to patches alone
        torch.testing.assert_close(sums, torch.ones(6))
    else:
        assert (sums < 0.999).all()


@pytest.mark.parametrize("mask_type", ["attention", "tube", "random"])
@pytest.mark.parametrize("kind", INSTALLED)
def test_features_at_visible_tokens_are_those_of_all_tokens_there(kind, mask_type):
    teacher, video = UMTTeacher(build_tower(kind), 2), torch.randn(2, 4, 3, 32, 32)
    noise = torch.empty(2, 64).exponential_()
    visible, features = compute_targets(teacher, video, noise, mask_type, 0.75)
    outputs = teacher(video)
    expected = draw_visible_indices(mask_type, 0.75, outputs.saliency, noise, TokenGrid(4, 16))
    assert torch.equal(visible, expected) and visible.shape == (2, 16)
    gathered = torch.stack(
        [layer.gather(1, visible[..., None].expand(-1, -1, layer.shape[-1])) for layer in outputs.features]
    )
    torch.testing.assert_close(features, gathered, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(teacher(video, visible).features, gathered, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", INSTALLED)
def test_tokens_that_the_saliency_favours_are_drawn_more_often(kind):
    teacher, video = UMTTeacher(build_tower(kind), 1), 4 * draw_video(frames=1)[:1] - 2
    saliency = teacher.compute_saliency(video)[0]
    assert saliency.max() > 1.5 * saliency.min()
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(16)
    for _ in range(400):
        noise = torch.empty(1, 16).exponential_(generator=generator)
        counts[compute_targets(teacher, video, noise, "attention", 0.75)[0][0]] += 1
    order = saliency.argsort()
    assert counts.sum() == 400 * 4
    assert counts[order[-4:]].sum() > counts[order[:4]].sum()
    assert torch.corrcoef(torch.stack([counts, saliency]))[0, 1] > 0.7


@pytest.mark.parametrize("kind", INSTALLED)
def test_positions_are_resized_as_the_model_itself_would(kind):
    video = draw_video(side=48)
    teacher = UMTTeacher(build_tower(kind), num_aligned_layers=1, image_size=48)
    assert (teacher.image_size, teacher.grid_size) == (48, 6)
    outputs = teacher(normalize(video, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    options = {"interpolate_pos_encoding": True} if kind in ("clip", "metaclip_2", "siglip") else {}
    states, saliency = run_alone(kind, video, **options)
    torch.testing.assert_close(outputs.saliency, saliency, atol=2e-6, rtol=1e-4)
    expected = F.normalize(finish(kind, states[-1]), dim=-1).unflatten(0, (2, 3)).flatten(1, 2)
    torch.testing.assert_close(outputs.features[0], expected, atol=2e-5, rtol=1e-4)
    # Frames of another size are resized to it first.
    assert teacher(torch.randn(1, 2, 3, 32, 32)).saliency.shape == (2, 36)


@pytest.mark.parametrize("kind", INSTALLED)
def test_gradients_and_training_mode_stay_off(kind):
    teacher = UMTTeacher(build_tower(kind), 2).train()
    assert not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher(torch.randn(1, 2, 3, 32, 32, requires_grad=True)).features.requires_grad
    assert not any("pixel" in name for name in teacher.state_dict())


def test_every_type_that_teaches_has_a_tower_in_these_tests():
    towers = {getattr(transformers, KINDS[kind][0]).model_type for kind in INSTALLED}
    assert towers <= set(TEACHER_TYPES)
    complete = {"clip", "metaclip_2", "siglip", "tipsv2"}
    assert set(TEACHER_TYPES) - complete - {"tipsv2_vision_model"} == towers - {"tipsv2_vision_model"}
