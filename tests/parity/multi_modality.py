"""Reads the stored outputs of the published video-text implementation and builds our models from them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from umt_hf.hub_cards.convert_umt_checkpoint import TASK_CLASSES, _convert_video_text_tensor, convert_state_dict
from umt_hf.modeling.configuration_umt_video_text import UMTVideoTextConfig

FIXTURES = Path(__file__).parent.parent / "fixtures" / "multi_modality"
# Stored numbers are within 1e-5 of each tensor's largest magnitude of a float64 run, so ours may be as far again.
RELATIVE_TOLERANCE = 2e-5


def load_table(name: str) -> dict:
    return json.loads((FIXTURES / f"{name}.json").read_text())


def load_case(name: str) -> tuple[dict, dict[str, dict[str, torch.Tensor]]]:
    """Description of a case, and its tensors by group: weights, inputs, outputs."""
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(FIXTURES / f"{name}.safetensors").items():
        group, rest = key.split("/", 1)
        groups.setdefault(group, {})[rest] = tensor
    return load_table(name), groups


def assert_equal(ours: torch.Tensor, published: torch.Tensor, name: str = "", scale: float = 1.0) -> None:
    """Equal up to the stated share of the largest magnitude."""
    tolerance = scale * RELATIVE_TOLERANCE * published.abs().max().item()
    torch.testing.assert_close(
        ours.detach(), published, atol=tolerance, rtol=0, msg=lambda text: f"{name}: {text}" if name else text
    )


def read_video(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels.float() - 128) / 64


def build_config(info: dict, **fields) -> UMTVideoTextConfig:
    vision, text = info["config"]["vision"], info["config"]["text"]
    mask = info["config"].get("mask", {})
    return UMTVideoTextConfig(
        vision_config={
            "image_size": vision["img_size"],
            "patch_size": vision["patch_size"],
            "num_frames": vision["num_frames"],
            "tubelet_size": vision["tubelet_size"],
            "hidden_size": vision["encoder_embed_dim"],
            "num_hidden_layers": vision["encoder_depth"],
            "num_attention_heads": vision["encoder_num_heads"],
            "intermediate_size": int(vision["encoder_embed_dim"] * info["config"]["mlp_ratio"]),
            "num_aligned_layers": vision["clip_return_layer"] or 1,
            "alignment_interval": vision["clip_student_return_interval"],
            "teacher_hidden_size": vision["clip_output_dim"],
            "drop_path_rate": vision["drop_path_rate"],
            "mask_type": mask.get("video_mask_type", "attention"),
        },
        text_config={
            **{name: value for name, value in text.items() if name != "hidden_act"},
            **{
                f"{token}_token_id": index
                for token, index in info["config"].get("special_token_ids", {}).items()
                if token != "unk"
            },
        },
        projection_dim=info["config"].get("embed_dim", 32),
        **fields,
    )


def build_model(info: dict, weights: dict[str, torch.Tensor], task: str, **fields) -> nn.Module:
    config = build_config(info, **fields)
    model = TASK_CLASSES[task](config).eval()
    model.load_state_dict(convert_state_dict(weights, config, task))
    return model


def check_gradients(model: nn.Module, info: dict, data: dict[str, dict[str, torch.Tensor]], key: str) -> None:
    """Stored gradients of the total loss, and the norms of all others, after `backward`."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, published in data["outputs"].items():
        if name.startswith("grad/"):
            for ours, expected in _convert_video_text_tensor(name.removeprefix("grad/"), published).items():
                assert_equal(gradients[ours], expected, ours, scale=5)
    seen = set()
    largest = max(norm for norm in info["grad_norm_of_total"][key].values() if norm is not None)
    for name, norm in info["grad_norm_of_total"][key].items():
        if norm is None:
            assert name.startswith("clip_teacher."), name
            continue
        parts = _convert_video_text_tensor(name, data["weights"][name])
        ours = torch.sqrt(sum(gradients[part].square().sum() for part in parts)).item()
        # A key's bias has no effect on attention: its gradient is rounding noise.
        assert abs(ours - norm) <= 1e-4 * norm + 1e-6 * largest, (name, ours, norm)
        seen.update(parts)
    assert seen == gradients.keys()
