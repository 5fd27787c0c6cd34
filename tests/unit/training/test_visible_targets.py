"""The teacher's last layer runs at the visible tokens alone, in the run's precision, and the targets stay the same."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from umt_hf import UMTVideoConfig, UMTVideoForPreTraining
from umt_hf.teachers.clip import FrozenMLP
from umt_hf.teachers.teacher import UMTTeacher
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


def build_quick_tower(dtype: torch.dtype = torch.float32) -> CLIPVisionModelWithProjection:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        image_size=32,
        patch_size=8,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=256,
        projection_dim=12,
        hidden_act="quick_gelu",
    )
    tower = CLIPVisionModelWithProjection(config)
    for layer in tower.vision_model.encoder.layers:  # drawn weights are small: the curve is to matter, and the bias
        nn.init.normal_(layer.mlp.fc1.weight, std=0.3)
        nn.init.normal_(layer.mlp.fc1.bias)
    return tower.to(dtype)


def test_the_teachers_mlp_keeps_names_weights_and_results():
    own = build_quick_tower()
    expected = {name: weight.clone() for name, weight in own.state_dict().items()}
    frames = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        states = own.vision_model(frames, output_hidden_states=True).hidden_states[-2:]
    teacher = UMTTeacher(own, num_aligned_layers=2)
    assert all(type(layer.mlp) is FrozenMLP for layer in own.vision_model.encoder.layers)
    found = teacher.encode(frames[None])[0]
    for one, other in zip(found, states, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)
    assert own.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in own.state_dict().items())


def test_the_teachers_mlp_is_as_exact_in_bfloat16():
    exact, own = build_quick_tower(), build_quick_tower(torch.bfloat16)
    mlp, wide = own.vision_model.encoder.layers[0].mlp, exact.vision_model.encoder.layers[0].mlp
    states = torch.randn(50, 17, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        target = wide.double()(states.double())
        errors = [(run(states).double() - target).norm() for run in (FrozenMLP(mlp), mlp)]
    assert errors[0] <= 1.05 * errors[1]


def test_the_teachers_mlp_leaves_other_activations_quantised_and_offloaded_layers_alone():
    assert not any(type(layer.mlp) is FrozenMLP for layer in build_gelu_layers())
    mlp = build_quick_tower().vision_model.encoder.layers[0].mlp
    frozen, states = FrozenMLP(mlp), torch.randn(2, 5, 64)
    with torch.no_grad():
        expected = mlp(states)
        add_hook_to_module(frozen.fc1, AlignDevicesHook(execution_device="cpu", offload=True))
        assert frozen.fc1.weight.device.type == "meta"  # until it is called
        assert torch.equal(frozen(states), expected)


def build_gelu_layers() -> nn.ModuleList:
    config = CLIPVisionConfig(
        image_size=32, patch_size=8, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, hidden_act="gelu"
    )
    return UMTTeacher(CLIPVisionModelWithProjection(config), 2).vision_tower.vision_model.encoder.layers
