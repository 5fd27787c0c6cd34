"""Tiny towers of each kind that can teach, untrained, as Transformers builds them."""

from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

SIZES: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 32}
SIZES |= {"patch_size": 8}
WIDE = {"intermediate_size": 48}
# Kind -> configuration, class, and what is set beside the sizes.
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "clip": ("CLIPVisionConfig", "CLIPVisionModelWithProjection", {**WIDE, "projection_dim": 12}),
    "metaclip_2": ("MetaClip2VisionConfig", "MetaClip2VisionModelWithProjection", {**WIDE, "projection_dim": 12}),
    "siglip": ("SiglipVisionConfig", "SiglipVisionModel", WIDE),
    "dinov2": ("Dinov2Config", "Dinov2Model", {"mlp_ratio": 2}),
    "dinov2_with_registers": (
        "Dinov2WithRegistersConfig",
        "Dinov2WithRegistersModel",
        {"mlp_ratio": 2, "num_register_tokens": 3},
    ),
    "dinov3_vit": ("DINOv3ViTConfig", "DINOv3ViTModel", {**WIDE, "num_register_tokens": 3}),
    "tipsv2": ("Tipsv2VisionConfig", "Tipsv2VisionModel", {"mlp_ratio": 2}),
}
# Those that see clips, which teach beside another one alone.
VIDEO_KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "videomae": ("VideoMAEConfig", "VideoMAEModel", {**WIDE, "num_frames": 4, "use_mean_pooling": False}),
    "vjepa2": (
        "VJEPA2Config",
        "VJEPA2Model",
        {"crop_size": 32, "frames_per_clip": 4, "mlp_ratio": 2, "pred_hidden_size": 12, "pred_num_hidden_layers": 1,
         "pred_num_attention_heads": 2},
    ),
}  # fmt: skip
# Those that the installed version of Transformers has.
INSTALLED = [kind for kind, (_, name, _) in KINDS.items() if hasattr(transformers, name)]


def build_tower(kind: str, attention: str = "sdpa", **options: Any) -> Any:
    """A tower whose weights differ enough for every part of it to matter."""
    config_name, class_name, own = {**KINDS, **VIDEO_KINDS}[kind]
    config = getattr(transformers, config_name)(**{**SIZES, **own, **options})
    torch.manual_seed(0)
    tower: PreTrainedModel = getattr(transformers, class_name)(config)
    for name, parameter in tower.named_parameters():
        if parameter.ndim == 1:
            is_scale = "norm" in name and name.endswith("weight") or "lambda1" in name
            nn.init.normal_(parameter, mean=float(is_scale), std=0.2)
        else:  # a probe that would look everywhere alike could hide a mistake
            nn.init.normal_(parameter, std=0.6 if "in_proj" in name or "probe" in name else 0.2)
    tower.set_attn_implementation(attention)
    return tower.eval()
