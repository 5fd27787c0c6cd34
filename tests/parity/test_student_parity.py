"""The student's forward, loss and gradients against the published implementation."""

import pytest
import torch

from tests.parity.reference import load_case
from umt_hf.hub_cards.convert_umt_checkpoint import convert_state_dict
from umt_hf.modeling.configuration_umt_video import UMTVideoConfig
from umt_hf.modeling.losses_umt import uta_loss
from umt_hf.modeling.modeling_umt_video import UMTVideoForPreTraining

CASES = ["student_k3_interval1", "student_k2_interval2", "student_k2_layerscale"]


def build_config(arguments: dict) -> UMTVideoConfig:
    return UMTVideoConfig(
        image_size=arguments["img_size"],
        patch_size=arguments["patch_size"],
        num_frames=arguments["num_frames"],
        tubelet_size=arguments["tubelet_size"],
        hidden_size=arguments["encoder_embed_dim"],
        num_hidden_layers=arguments["encoder_depth"],
        num_attention_heads=arguments["encoder_num_heads"],
        intermediate_size=int(arguments["encoder_embed_dim"] * arguments["mlp_ratio"]),
        layer_scale_init_value=arguments["init_values"],
        num_aligned_layers=arguments["clip_return_layer"],
        alignment_interval=arguments["clip_student_return_interval"],
        teacher_hidden_size=arguments["clip_output_dim"],
        # The published pre-training model computes its table for its own grid.
        position_embedding_frames=None,
        position_embedding_image_size=None,
    )


def build_student(arguments: dict, weights: dict[str, torch.Tensor]) -> UMTVideoForPreTraining:
    config = build_config(arguments)
    model = UMTVideoForPreTraining(config).eval()
    model.load_state_dict(convert_state_dict(weights, config, "pretraining"))
    return model


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_forward_loss_and_gradients(name, attention):
    info, data = load_case(name)
    model = build_student(info["constructor"], data["weights"])
    model.set_attn_implementation(attention)
    video = data["inputs"]["video"].transpose(1, 2)
    mask, targets = data["inputs"]["mask"].bool(), data["inputs"]["targets"]

    states = model.vision_model(video, mask, output_aligned_states=True)
    torch.testing.assert_close(states.last_hidden_state, data["outputs"]["x_vis"], atol=1e-5, rtol=0)
    torch.testing.assert_close(states.aligned_hidden_states, data["outputs"]["x_clip_vis"], atol=1e-5, rtol=0)

    outputs = model(video, mask, targets)
    torch.testing.assert_close(outputs.aligned_features, data["outputs"]["student"], atol=5e-6, rtol=0)
    assert outputs.loss.item() == pytest.approx(info["loss_l2"], abs=1e-6)
    for loss in ("mse", "smooth_l1"):
        value = uta_loss(outputs.aligned_features, targets, loss=loss).item()
        assert value == pytest.approx(info[f"loss_{loss}"], abs=1e-6)

    outputs.loss.backward()
    reference = convert_gradients(data["grads"])
    gradients = dict(model.named_parameters())
    for key, expected in reference.items():
        torch.testing.assert_close(gradients[key].grad, expected, atol=1e-5, rtol=1e-4, msg=key)
    norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters()))
    assert norm.item() == pytest.approx(info["grad_norm_all_parameters_l2_loss"], rel=1e-5)


def convert_gradients(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients travel as the weights they belong to."""
    from umt_hf.hub_cards.convert_umt_checkpoint import _convert_tensor

    converted = {}
    for name, tensor in gradients.items():
        converted.update(_convert_tensor(name.removeprefix("encoder."), tensor))
    return converted


@pytest.mark.parametrize("name", CASES)
def test_float64_run_shows_every_epsilon(name):
    """Fine enough to see a wrong LayerNorm epsilon."""
    info, data = load_case(name)
    model = build_student(info["constructor"], data["weights"]).double()
    model.vision_model.embeddings.sinusoid_table = model.vision_model.embeddings.sinusoid_table.float()
    video = data["inputs"]["video"].transpose(1, 2).double()
    mask = data["inputs"]["mask"].bool()
    states = model.vision_model(video, mask, output_aligned_states=True).aligned_hidden_states
    torch.testing.assert_close(states, data["outputs"]["x_clip_vis_float64run"].double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_position_tables(name):
    info, data = load_case(name)
    model = build_student(info["constructor"], data["weights"])
    grid = model.config.position_embedding_grid
    table = model.vision_model.embeddings.compute_position_embeddings(grid)
    torch.testing.assert_close(table, data["outputs"]["pos_embed"], atol=1e-6, rtol=0)
    torch.testing.assert_close(table, data["outputs"]["clip_pos_embed"], atol=1e-6, rtol=0)


def test_mask_and_indices_and_full_targets_agree():
    info, data = load_case(CASES[0])
    model = build_student(info["constructor"], data["weights"])
    video = data["inputs"]["video"].transpose(1, 2)
    mask, targets = data["inputs"]["mask"].bool(), data["inputs"]["targets"]
    indices = (~mask).nonzero()[:, 1].view(mask.shape[0], -1)
    by_mask, by_indices = model(video, mask, targets), model(video, visible_indices=indices, teacher_features=targets)
    assert torch.equal(by_mask.aligned_features, by_indices.aligned_features)
    full = torch.randn(*targets.shape[:2], mask.shape[1], targets.shape[-1])
    full.scatter_(2, indices[None, :, :, None].expand_as(targets), targets)
    torch.testing.assert_close(model(video, mask, full).loss, by_mask.loss)
