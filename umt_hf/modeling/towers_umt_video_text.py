# Copyright 2026 The umt_hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The two towers that stage 2 starts from: a UMT video encoder and a BERT, under our names and strictly loaded."""

import os
import re
from typing import Any

import torch
from transformers.configuration_utils import PreTrainedConfig

from .configuration_umt_video import UMTVideoConfig
from .configuration_umt_video_text import UMTTextConfig, UMTVideoTextConfig
from .modeling_umt_video import UMTVideoForPreTraining

# Arguments of `from_pretrained` that say where weights go and how they are stored there.
PLACEMENT_ARGUMENTS = ("device_map", "max_memory", "offload_folder", "offload_buffers", "quantization_config")
PUBLISHED_FUSION_LAYERS = {12: 9, 24: 19}  # layers of the BERT -> first layer that fuses
BERT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "type_vocab_size",
    "initializer_range",
    "layer_norm_eps",
    "pad_token_id",
)


# BERT's names -> ours, applied one after the other.
BERT_RENAMES = (
    (r"^bert\.", "text_model."),
    (r"embeddings\.LayerNorm\.", "embeddings.norm."),
    (r"\.encoder\.layer\.", ".layers."),
    (r"crossattention\.", "cross_attention."),
    (r"attention\.self\.query\.", "attention.q_proj."),
    (r"attention\.self\.key\.", "attention.k_proj."),
    (r"attention\.self\.value\.", "attention.v_proj."),
    (r"attention\.output\.dense\.", "attention.o_proj."),
    (r"attention\.output\.LayerNorm\.", "attention_norm."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.output\.LayerNorm\.", ".mlp_norm."),
    (r"^cls\.predictions\.transform\.LayerNorm\.", "mlm_head.norm."),
    (r"^cls\.predictions\.transform\.", "mlm_head."),
    (r"^cls\.predictions\.decoder\.", "mlm_head.decoder."),
    (r"^cls\.predictions\.bias$", "mlm_head.decoder.bias"),
)


def load_video_tower(
    source: str | os.PathLike, fields: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], UMTVideoConfig]:
    """Weights of a UMT video encoder in float32, its alignment heads where it has them, and its configuration.

    Args:
        source: Folder or Hub id of any UMT model.
        fields: Fields of the configuration to change.

    Raises:
        ValueError: If it is not a UMT model, or a weight of the encoder is missing.
    """
    model_type = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
    if model_type not in (UMTVideoConfig.model_type, UMTVideoTextConfig.model_type):
        raise ValueError(f"{source} holds a model of type {model_type!r}, not a UMT video encoder.")
    config = UMTVideoConfig.from_pretrained(source, **fields)
    config.other_teachers = config.teacher_weights = None  # of several, the first goes on to teach with text
    # pyrefly: ignore[not-iterable]  a pair, with output_loading_info
    model, info = UMTVideoForPreTraining.from_pretrained(
        source, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
    )
    _check_tower(source, info, r"vision_model\.")
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in info["missing_keys"]}
    return state, config


def load_bert_tower(
    source: str | os.PathLike, fields: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], UMTTextConfig]:
    """Weights of a BERT under our names in float32, its language-modelling head where it has one, and configuration.

    Args:
        source: Folder or Hub id of a BERT.
        fields: Fields of our configuration to set; `fusion_layer` is needed for depths other than 12 and 24.

    Raises:
        ValueError: If it is not a BERT, a weight is missing, or `fusion_layer` is unknown.
    """
    from transformers.models.bert.modeling_bert import BertConfig, BertForPreTraining

    model_type = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
    if model_type != BertConfig.model_type:
        raise ValueError(f"{source} holds a model of type {model_type!r}, not a BERT.")
    bert_config = BertConfig.from_pretrained(source)
    shared = {name: getattr(bert_config, name) for name in BERT_FIELDS}
    if "fusion_layer" not in fields:
        depth = bert_config.num_hidden_layers
        if depth not in PUBLISHED_FUSION_LAYERS:
            raise ValueError(f"{source} has {depth} layers; say which is the first to fuse: fusion_layer.")
        shared["fusion_layer"] = PUBLISHED_FUSION_LAYERS[depth]
    config = UMTTextConfig(**shared | fields)

    # pyrefly: ignore[not-iterable]  a pair, with output_loading_info
    model, info = BertForPreTraining.from_pretrained(
        source, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
    )
    _check_tower(source, info, r"bert\.(?!pooler\.)")
    state = {
        rename_bert_weight(name): tensor
        for name, tensor in model.state_dict().items()
        if name not in info["missing_keys"]
    }
    return state, config


def _check_tower(source: str | os.PathLike, info: dict[str, Any], tower: str) -> None:
    """Refuse a tower that lacks weights whose names match `tower`, or any of another shape."""
    if missing := sorted(name for name in info["missing_keys"] if re.match(tower, name)):
        raise ValueError(f"{source} lacks {len(missing)} weights of its tower: {', '.join(missing[:5])} ...")
    if mismatched := sorted(info["mismatched_keys"]):
        name, stored, needed = mismatched[0]
        raise ValueError(f"{source} holds {name} in shape {tuple(stored)}, which should be {tuple(needed)}.")


def copy_for_question_answering(source: Any, name: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Weights of a question-answering model: both towers, and a decoder of the fusion layers and the language head.

    Args:
        source: A [`UMTVideoTextForPreTraining`].
        name: Where it comes from, for messages.

    Raises:
        ValueError: If video and text differ in width, so that the copied cross-attention cannot attend to questions.
    """
    config = source.config.text_config
    if config.encoder_width != config.hidden_size:
        raise ValueError(
            f"The fusion layers of {name} attend to width {config.encoder_width}, questions have "
            f"{config.hidden_size}: the decoder cannot be copied from them."
        )
    towers = ("vision_model.", "text_model.")
    state = {weight: tensor for weight, tensor in source.state_dict().items() if weight.startswith(towers)}
    parts: dict[str, Any] = {
        "text_model.embeddings": source.text_model.embeddings,
        "text_model.layers": source.text_model.layers[config.fusion_layer :],
        "lm_head": source.mlm_head,
    }
    for part, module in parts.items():
        # Copies: weights that are loaded keep their memory, and towers that share it would be trained as one.
        weights = {weight: tensor.clone() for weight, tensor in module.state_dict().items()}
        state |= {f"answer_decoder.{part}.{weight}": tensor for weight, tensor in weights.items()}
    return state


def start_question_answering(model_class: Any, source_class: Any, name: str | os.PathLike, **kwargs: Any) -> Any:
    """A model for question answering from a stage-2 folder, with no weight left fresh.

    Args:
        model_class: `UMTVideoTextForQuestionAnswering`, or a class made of it.
        source_class: `UMTVideoTextForPreTraining`.
        name: Folder or Hub id.
        **kwargs: As for `from_pretrained`.

    Raises:
        ValueError: If the folder lacks a part, or video and text differ in width.
    """
    # Where weights go and in what form concerns the model that is returned; the source is only read.
    placement = {option: kwargs.pop(option) for option in PLACEMENT_ARGUMENTS if option in kwargs}
    source, info = source_class.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    require_stage2_parts(name, info)
    model, info = model_class.from_pretrained(
        None,
        config=source.config,
        state_dict=copy_for_question_answering(source, name),
        dtype=source.dtype,
        output_loading_info=True,
        **placement,
    )
    require_complete(name, info)
    model.name_or_path = model.config.name_or_path = str(name)
    return model


def require_stage2_parts(name: str | os.PathLike, info: dict[str, Any]) -> None:
    """Check that a stage-2 folder had all that question answering copies.

    Args:
        name: Folder or Hub id.
        info: Loading info of the `UMTVideoTextForPreTraining` that was loaded from it.

    Raises:
        ValueError: If a weight is missing or has another shape; the message names it.
    """
    if info["mismatched_keys"]:
        weight, stored, needed = min(info["mismatched_keys"])
        raise ValueError(f"{name} holds {weight} in shape {tuple(stored)}, which should be {tuple(needed)}.")
    parts = ("vision_model.", "text_model.", "mlm_head.")
    if missing := sorted(weight for weight in info["missing_keys"] if weight.startswith(parts)):
        raise ValueError(
            f"{name} lacks {', '.join(missing[:5])}: give the complete folder of a UMTVideoTextForPreTraining."
        )


def require_both(
    input_ids: torch.Tensor | None, pixel_values: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts and videos, both of which a comparison needs.

    Raises:
        ValueError: If one of them is missing.
    """
    if input_ids is None or pixel_values is None:
        raise ValueError(
            "Give both input_ids and pixel_values; get_video_features and get_text_features encode one of them."
        )
    return input_ids, pixel_values


def require_complete(source: str | os.PathLike, info: dict[str, Any]) -> None:
    """Refuse a load that left a weight of the model fresh, or had no place for one of its source.

    Raises:
        ValueError: If a name differs.
    """
    if differing := sorted({*info["missing_keys"], *info["unexpected_keys"]}):
        raise ValueError(f"{source} does not give each weight: {', '.join(differing[:5])}.")


def rename_bert_weight(name: str) -> str:
    """Our name of a weight of `BertForPreTraining`, below `text_model` or `mlm_head`; unknown parts stay."""
    for pattern, replacement in BERT_RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


__all__ = [
    "load_bert_tower",
    "load_video_tower",
    "rename_bert_weight",
    "require_both",
    "start_question_answering",
]
