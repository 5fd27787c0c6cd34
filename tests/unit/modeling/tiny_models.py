"""One small model of every class, and inputs for it: for what must hold in all of them."""

from typing import Any

import torch
from transformers import PreTrainedModel

from umt_hf import (
    UMTTextConfig,
    UMTTextLMHeadModel,
    UMTTextModel,
    UMTVideoConfig,
    UMTVideoForActionDetection,
    UMTVideoForPreTraining,
    UMTVideoForVideoClassification,
    UMTVideoModel,
    UMTVideoTextConfig,
    UMTVideoTextForPreTraining,
    UMTVideoTextForQuestionAnswering,
    UMTVideoTextForRetrieval,
    UMTVideoTextModel,
)

VIDEO_CLASSES = (
    UMTVideoModel,
    UMTVideoForPreTraining,
    UMTVideoForVideoClassification,
    UMTVideoForActionDetection,
)
VIDEO_TEXT_CLASSES = (
    UMTVideoTextModel,
    UMTVideoTextForRetrieval,
    UMTVideoTextForPreTraining,
    UMTVideoTextForQuestionAnswering,
)
TEXT_CLASSES = (UMTTextModel, UMTTextLMHeadModel)
PIXEL_CLASSES = (*VIDEO_CLASSES, *VIDEO_TEXT_CLASSES)
ALL_CLASSES = (*PIXEL_CLASSES, *TEXT_CLASSES)

VISION: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "num_frames": 2,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "num_aligned_layers": 2,
    "teacher_hidden_size": 16,
}
STORED_TABLE = {"position_embedding_frames": 2, "position_embedding_image_size": 32}
TEXT: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 20,
    "fusion_layer": 2,
    "encoder_width": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
FEATURES = ("last_hidden_state", "pooler_output", "aligned_features", "logits", "video_embeds", "text_embeds")


def build_config(model_class: type, **fields: Any) -> Any:
    """Configuration of the small model of a class; `fields` are those of the configuration's top level."""
    if model_class in VIDEO_CLASSES:
        return UMTVideoConfig(**VISION | STORED_TABLE | {"num_labels": 5} | fields)
    if model_class in VIDEO_TEXT_CLASSES:
        return UMTVideoTextConfig(vision_config=VISION, text_config=TEXT, projection_dim=32, **fields)
    decoder = {"is_decoder": True, "fusion_layer": 0} if model_class is UMTTextLMHeadModel else {}
    return UMTTextConfig(**TEXT | decoder | fields)


def build_model(model_class: type, **fields: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return model_class(build_config(model_class, **fields)).eval()


def build_inputs(model_class: type, batch_size: int = 2) -> dict[str, torch.Tensor]:
    """Arguments with which `forward` of a class uses all its parts that need no loss."""
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, torch.Tensor] = {}
    if model_class in PIXEL_CLASSES:
        inputs["pixel_values"] = torch.randn(batch_size, 2, 3, 32, 32, generator=generator)
    if model_class not in VIDEO_CLASSES:
        inputs["input_ids"] = torch.randint(104, 120, (batch_size, 7), generator=generator)
        inputs["attention_mask"] = torch.ones(batch_size, 7, dtype=torch.long)
        inputs["attention_mask"][0, 5:] = 0
    if model_class is UMTVideoForActionDetection:
        inputs["boxes"] = torch.tensor([[[2.0, 3.0, 20.0, 30.0]]]).expand(batch_size, -1, -1)
    if model_class is UMTVideoTextForQuestionAnswering:
        inputs["decoder_input_ids"] = torch.randint(104, 120, (batch_size, 4), generator=generator)
    if model_class is UMTTextLMHeadModel:
        inputs["encoder_hidden_states"] = torch.randn(batch_size, 5, 64, generator=generator)
    return inputs


def list_features(outputs: Any) -> dict[str, torch.Tensor]:
    """What users take from a model's outputs."""
    found = {name: outputs[name] for name in FEATURES if outputs.get(name) is not None}
    assert found
    return found


def compute_relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value.float() - expected.float()).norm() / expected.float().norm())
