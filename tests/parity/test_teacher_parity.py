"""The teacher's features and saliency, and the whole stage-1 step, against the published implementation."""

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.parity.reference import load_case
from tests.parity.test_student_parity import build_student, convert_gradients
from umt_hf.modeling.losses_umt import uta_loss
from umt_hf.modeling.modeling_umt_video import gather_tokens
from umt_hf.teachers.teacher import UMTTeacher


def build_teacher(arguments: dict, weights: dict, names: dict, image_size: int, attention: str = "sdpa") -> UMTTeacher:
    """The published weights in Transformers' CLIP tower, by the name map stored with the case."""
    num_patches = weights["positional_embedding"].shape[0] - 1
    config = CLIPVisionConfig(
        image_size=int(num_patches**0.5) * arguments["patch_size"],
        patch_size=arguments["patch_size"],
        hidden_size=arguments["width"],
        num_hidden_layers=arguments["layers"],
        num_attention_heads=arguments["heads"],
        intermediate_size=4 * arguments["width"],
        projection_dim=arguments["output_dim"],
    )
    tower = CLIPVisionModelWithProjection(config).eval()
    converted = {}
    for name, tensor in weights.items():
        targets, rule = names[name]
        if "split" in rule:
            converted.update(zip(targets, tensor.chunk(3), strict=True))
        elif "transpose" in rule:
            converted[targets] = tensor.T
        elif "drop the size-1" in rule:
            converted[targets] = tensor.squeeze(2)
        else:
            converted[targets] = tensor
    tower.load_state_dict(converted, strict=True)
    tower.set_attn_implementation(attention)
    return UMTTeacher(tower, arguments["clip_return_layer"], arguments["clip_return_interval"], image_size)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["teacher_p16_k3", "teacher_p16_k2_interval2", "teacher_p14_posresize"])
def test_features_and_saliency(name, attention):
    info, data = load_case(name)
    arguments = info["constructor"]
    names = info["hf_clip_vision_model_with_projection"]
    teacher = build_teacher(arguments, data["weights"], names, arguments["input_resolution"], attention)
    outputs = teacher(data["inputs"]["video"].transpose(1, 2))
    torch.testing.assert_close(outputs.features, data["outputs"]["features"], atol=5e-6, rtol=0)
    torch.testing.assert_close(outputs.saliency, data["outputs"]["attn"], atol=5e-6, rtol=0)
    sums = outputs.saliency.sum(dim=-1)
    assert [sums.min().item(), sums.max().item()] == pytest.approx(info["attn_row_sum_min_max"], abs=1e-5)

    teacher.alignment_norm = "none"
    plain = teacher(data["inputs"]["video"].transpose(1, 2)).features
    torch.testing.assert_close(plain, data["outputs"]["features_unnormalised"], atol=1e-5, rtol=1e-5)


def test_resized_position_table():
    info, data = load_case("teacher_posresize_16to14")
    from umt_hf.modeling.modeling_umt_video import interpolate_position_table

    tensors = {**data.get("weights", {}), **data.get("inputs", {}), **data.get("outputs", {})}
    before, after = sorted(tensors.values(), key=lambda table: -table.shape[0])
    old, new = int((before.shape[0] - 1) ** 0.5), int((after.shape[0] - 1) ** 0.5)
    assert (old, new) == (16, 14)
    patches = interpolate_position_table(before[None, 1:], (1, old, old), (1, new, new))[0]
    torch.testing.assert_close(torch.cat([before[:1], patches]), after, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["stage1_same_resolution", "stage1_lower_teacher_resolution"])
def test_whole_step(name):
    """Attention, targets, losses, gradients and the parameters after one AdamW step."""
    info, data = load_case(name)
    weights = {"student": {}, "teacher": {}}
    for key, tensor in data["weights"].items():
        model, rest = key.split("/", 1)
        weights[model][rest] = tensor
    names = load_case("teacher_p14_posresize")[0]["hf_clip_vision_model_with_projection"]
    student = build_student(info["student_constructor"], weights["student"])
    teacher = build_teacher(info["teacher_constructor"], weights["teacher"], names, info["clip_input_resolution"])

    video = data["inputs"]["video"].transpose(1, 2)
    mask = data["outputs"]["mask"].bool()
    states, saliency = teacher.encode(video)
    torch.testing.assert_close(saliency, data["outputs"]["attn"], atol=5e-6, rtol=0)
    indices = (~mask).nonzero()[:, 1].view(mask.shape[0], -1)
    features = teacher.project(states, video.shape[0])
    torch.testing.assert_close(features, data["outputs"]["teacher_features"], atol=5e-6, rtol=0)
    targets = teacher.project(states, video.shape[0], indices)
    torch.testing.assert_close(targets, gather_tokens(features, indices), atol=1e-6, rtol=0)
    torch.testing.assert_close(targets, data["outputs"]["targets"], atol=5e-6, rtol=0)

    outputs = student(video, mask, features)
    torch.testing.assert_close(outputs.aligned_features, data["outputs"]["student"], atol=5e-6, rtol=0)
    for loss in ("l2", "mse", "smooth_l1"):
        value = uta_loss(outputs.aligned_features, targets, loss=loss).item()
        assert value == pytest.approx(info[f"loss_{loss}"], abs=1e-6)
    outputs.loss.backward()
    parameters = dict(student.named_parameters())
    for key, expected in convert_gradients(data["grads"]).items():
        torch.testing.assert_close(parameters[key].grad, expected, atol=1e-5, rtol=1e-4, msg=key)

    options = info["optimizer"]
    decayed = [p for n, p in parameters.items() if p.ndim > 1]
    others = [p for n, p in parameters.items() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": options["weight_decay"]}, {"params": others, "weight_decay": 0.0}],
        lr=options["lr"],
        betas=options["opt_betas"],
        eps=options["opt_eps"],
    )
    optimizer.step()
    after = {
        key.removeprefix("after_one_adamw_step/"): tensor
        for key, tensor in data["outputs"].items()
        if key.startswith("after_one_adamw_step/")
    }
    assert after
    for key, expected in convert_gradients(after).items():
        # The first AdamW step is lr * sign(gradient): entries whose gradient is near eps may differ by a part of lr.
        difference = (parameters[key] - expected).abs()
        assert (difference > 2e-6).float().mean() < 0.01, key
        assert difference.max() < 2 * options["lr"], key


def test_frozen_and_absent_from_students():
    info, data = load_case("teacher_p16_k3")
    names = info["hf_clip_vision_model_with_projection"]
    teacher = build_teacher(info["constructor"], data["weights"], names, info["constructor"]["input_resolution"])
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.train().training
    assert not teacher(data["inputs"]["video"].transpose(1, 2)).features.requires_grad
