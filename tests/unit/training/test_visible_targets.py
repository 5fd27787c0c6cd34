"""The teacher's last layer runs at the visible tokens alone, in the run's precision, and the targets stay the same."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from umt_hf import UMTVideoConfig, UMTVideoForPreTraining
from umt_hf.teachers.clip import UMTTeacher
from umt_hf.training.alignment import TokenGrid, choose_precision, compute_targets, draw_visible_indices


def build_teacher(attention: str = "sdpa", **options) -> UMTTeacher:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        image_size=32,
        patch_size=8,
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=96,
        projection_dim=12,
    )
    tower = CLIPVisionModelWithProjection(config)
    tower.set_attn_implementation(attention)
    return UMTTeacher(tower, **{"num_aligned_layers": 2, **options})


def compute_fully(teacher, pixel_values, noise, mask_type, mask_ratio):
    """All layers at all tokens, of which the visible ones are taken."""
    outputs = teacher(pixel_values)
    grid = TokenGrid(pixel_values.shape[1], noise.shape[1] // pixel_values.shape[1])
    visible = draw_visible_indices(mask_type, mask_ratio, outputs.saliency, noise, grid)
    return visible, torch.stack([layer.gather(1, visible[..., None].expand(-1, -1, 12)) for layer in outputs.features])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mask_type", ["attention", "tube", "random"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_aligned_layers": 1}, {"alignment_interval": 2}, {"alignment_norm": "none"}, {"image_size": 48}],
    ids=["two layers", "last layer", "every other layer", "unnormalised", "resized"],
)
def test_targets_are_those_of_all_layers_at_all_tokens(options, mask_type, attention):
    teacher = build_teacher(attention, **options)
    patches = (options.get("image_size", 32) // 8) ** 2
    video, noise = torch.randn(2, 4, 3, 32, 32), torch.empty(2, 4 * patches).exponential_()
    arguments = (teacher, video, noise, mask_type, 0.75)
    (visible, features), (expected_visible, expected) = compute_targets(*arguments), compute_fully(*arguments)
    assert torch.equal(visible, expected_visible) and not features.requires_grad
    torch.testing.assert_close(features, expected, atol=1e-6, rtol=1e-6)


def test_loss_and_gradients_stay_the_same():
    teacher, video = build_teacher(), torch.randn(2, 4, 3, 32, 32)
    noise = torch.empty(2, 64).exponential_()
    student = UMTVideoForPreTraining(
        UMTVideoConfig(
            image_size=32,
            patch_size=8,
            num_frames=4,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=48,
            num_aligned_layers=2,
            teacher_hidden_size=12,
        )
    )
    found = []
    for compute in (compute_targets, compute_fully):
        visible, features = compute(teacher, video, noise, "attention", 0.8)
        loss = student(
            video, visible_indices=visible, teacher_features=features, normalize_teacher_features=False
        ).loss
        found.append((loss, *torch.autograd.grad(loss, list(student.parameters()))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_the_last_layer_costs_less():
    teacher, video, noise = build_teacher(), torch.randn(2, 4, 3, 32, 32), torch.empty(2, 64).exponential_()
    counts = []
    for compute in (compute_targets, compute_fully):
        with FlopCounterMode(display=False) as counter:
            compute(teacher, video, noise, "attention", 0.75)
        counts.append(counter.get_total_flops())
    # At 13 of 17 tokens: queries, projection and the MLP, whose width is four times the model's.
    saved = 2 * 8 * 13 * (24 * 24 * 2 + 2 * 24 * 96)
    assert counts[1] - counts[0] >= saved


def test_the_teachers_precision_follows_the_run():
    def choose(precision, **state):
        return choose_precision(SimpleNamespace(mixed_precision=precision, state=SimpleNamespace(**state)))

    expected = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
    assert {name: choose(name) for name in expected} == expected
    policy = SimpleNamespace(param_dtype=torch.bfloat16)
    assert choose("no", fsdp_plugin=SimpleNamespace(mixed_precision_policy=policy)) == torch.bfloat16
    assert choose("fp16", fsdp_plugin=SimpleNamespace(mixed_precision_policy=None)) == torch.float16
