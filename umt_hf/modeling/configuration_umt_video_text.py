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
"""Configurations of the UMT text tower and of the models that join it with the video encoder."""

from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .configuration_umt_video import UMTVideoConfig, check_ranges

# What the encoder of a video-text model has that differs from a stage-1 encoder, as published.
STAGE2_VISION_FIELDS: dict[str, Any] = {
    "num_frames": 4,
    "position_embedding_frames": None,
    "position_embedding_image_size": None,
    "alignment_norm_eps": 1e-5,
}


@strict
class UMTTextConfig(PreTrainedConfig):
    """Configuration of [`UMTTextModel`], a BERT whose upper layers cross-attend to another sequence.

    The defaults are BERT base with three fusion layers, as in the B/16 models; the L/16 models are BERT large with
    `fusion_layer=19`.

    Attributes:
        vocab_size: Word pieces.
        hidden_size: Width of the tower.
        num_hidden_layers: Transformer layers, text and fusion layers together.
        num_attention_heads: Attention heads per layer.
        intermediate_size: Width of the MLP's hidden layer.
        hidden_act: Activation of the MLP and of the language-modelling head.
        hidden_dropout_prob: Dropout after embeddings, attention and MLP.
        attention_probs_dropout_prob: Dropout on the attention probabilities.
        max_position_embeddings: Longest text, in tokens.
        type_vocab_size: Rows of BERT's segment table; the first one is used.
        initializer_range: Standard deviation of the normal distribution that initialises all weights.
        layer_norm_eps: Epsilon of every LayerNorm.
        fusion_layer: First layer, counted from 0, that cross-attends.
        encoder_width: Width of the sequence that the fusion layers attend to.
        is_decoder: Whether a token sees earlier ones only.
        use_cache: Whether a decoder returns its keys and values.
        pad_token_id: Id of `[PAD]`.
        bos_token_id: Id of `[CLS]`, the first token of every text; also called `cls_token_id`.
        eos_token_id: Id of `[SEP]`, the last token of an answer; also called `sep_token_id`.
        mask_token_id: Id of `[MASK]`.
        tie_word_embeddings: Whether the language-modelling head shares the table of word embeddings.

    Raises:
        ValueError: If sizes do not divide one another, or `fusion_layer` is outside the tower.

    Source: Devlin et al., "BERT", 2019; Li et al., "Unmasked Teacher", ICCV 2023, section 3.2.

    Examples:
        >>> from umt_hf import UMTTextConfig
        >>> config = UMTTextConfig(num_hidden_layers=6, fusion_layer=4)
        >>> config.num_hidden_layers - config.fusion_layer  # layers that fuse
        2
    """

    model_type = "umt_text"
    base_config_key = "text_config"
    attribute_map = {"cls_token_id": "bos_token_id", "sep_token_id": "eos_token_id"}
    base_model_fsdp_plan = {"embeddings": "free_full_weight", "layers.*": "free_full_weight"}

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float | int = 0.02
    layer_norm_eps: float | int = 1e-12
    fusion_layer: int = 9
    encoder_width: int = 768
    is_decoder: bool = False
    use_cache: bool = True
    pad_token_id: int = 0
    bos_token_id: int = 101
    eos_token_id: int = 102
    mask_token_id: int = 103
    tie_word_embeddings: bool = True

    @property
    # pyrefly: ignore[bad-override]  one plan for all configurations in the base class
    def base_model_tp_plan(self) -> dict[str, str]:
        """How tensor parallelism splits the layers; without fusion layers there is no cross-attention to name."""
        attentions = ("attention", "cross_attention") if self.fusion_layer < self.num_hidden_layers else ("attention",)
        plan = {"layers.*.mlp.fc1": "colwise", "layers.*.mlp.fc2": "rowwise"}
        for attention in attentions:
            plan |= {f"layers.*.{attention}.{name}": "colwise" for name in ("q_proj", "k_proj", "v_proj")}
            plan[f"layers.*.{attention}.o_proj"] = "rowwise"
        return plan

    def validate_architecture(self) -> None:
        """Check the range of each field, and how they fit together."""
        check_ranges(
            self,
            sizes=(
                "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                "max_position_embeddings", "type_vocab_size", "encoder_width",
            ),
            shares=("hidden_dropout_prob", "attention_probs_dropout_prob"),
            positive=("layer_norm_eps",),
            not_negative=("initializer_range", "bos_token_id", "eos_token_id", "mask_token_id"),
        )  # fmt: skip
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id={self.pad_token_id} must be in [0, vocab_size={self.vocab_size}).")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}."
            )
        if not 0 <= self.fusion_layer <= self.num_hidden_layers:
            raise ValueError(
                f"fusion_layer={self.fusion_layer} must be in [0, num_hidden_layers={self.num_hidden_layers}]."
            )


def build_vision_property(name: str) -> property:
    """A field of `vision_config` that the configuration around it has as well, without saving it twice."""

    def read(config: "UMTVideoTextConfig") -> Any:
        return getattr(config.vision_config, name)

    def write(config: "UMTVideoTextConfig", value: Any) -> None:
        setattr(config.vision_config, name, value)

    return property(read, write, doc=f"`{name}` of `vision_config`.")


@strict
class UMTVideoTextConfig(PreTrainedConfig):
    """Configuration of [`UMTVideoTextModel`] and its heads: a video encoder, a text tower and how they are trained.

    Attributes:
        vision_config: [`UMTVideoConfig`], or its fields; fields left out are those of B/16 on 4 frames with a position
            table computed for each input, which is what every published video-text model has.
        text_config: [`UMTTextConfig`] or its fields.
        projection_dim: Width of the space in which videos and texts are compared.
        temperature_init_value: Initial value of the learnable temperature that divides similarities.
        temperature_bounds: Lower and upper limit of the temperature.
        uta_loss_weight: Weight of the alignment with the teacher in the total; a loss of weight 0 is not computed.
        vtc_loss_weight: Weight of the video-text contrast.
        vtm_loss_weight: Weight of the video-text matching.
        mlm_loss_weight: Weight of the masked language modelling.
        vtm_hard_negatives: Whether negatives are drawn by their similarity instead of uniformly.
        mlm_probability: Share of tokens that are to be predicted, in (0, 1).
        pool_per_frame: Whether a video without a mask gives one vector per frame, whose similarities are averaged,
            instead of one per clip. Masked videos always give one.
        contrastive_gather: How gradients cross processes: "exact" (as one process with all batches) or "published"
            (the projections get that gradient divided by the number of processes).
        initializer_range: Standard deviation of the normal distribution that initialises projections and heads.
        tie_word_embeddings: Whether the language-modelling head of pre-training shares the table of word embeddings.
        keep_ratio: `keep_ratio` of `vision_config`; likewise `token_selector` and `token_selector_seed`.

    Raises:
        ValueError: If the towers do not fit one another or a number is outside its range.

    Source: Li et al., "Unmasked Teacher", ICCV 2023, section 3.2; published recipes for the values.

    Examples:
        >>> from umt_hf import UMTVideoTextConfig, UMTVideoTextModel
        >>> config = UMTVideoTextConfig(
        ...     vision_config={"hidden_size": 48, "num_hidden_layers": 2},
        ...     text_config={"hidden_size": 48, "encoder_width": 48},
        ...     projection_dim=32,
        ... )
        >>> config.vision_config.num_frames, config.text_config.fusion_layer
        (4, 9)
        >>> model = UMTVideoTextModel(config)  # with random weights
    """

    model_type = "umt_video_text"
    sub_configs = {"vision_config": UMTVideoConfig, "text_config": UMTTextConfig}

    # Fields or nothing may be given; `__post_init__` makes configurations of them, which is what readers find.
    if TYPE_CHECKING:
        vision_config: UMTVideoConfig = UMTVideoConfig()
        text_config: UMTTextConfig = UMTTextConfig()
    else:
        vision_config: dict | UMTVideoConfig | None = None
        text_config: dict | UMTTextConfig | None = None
    projection_dim: int = 512
    temperature_init_value: float | int = 0.07
    temperature_bounds: tuple | list = (0.001, 0.5)
    uta_loss_weight: float | int = 1.0
    vtc_loss_weight: float | int = 1.0
    vtm_loss_weight: float | int = 1.0
    mlm_loss_weight: float | int = 1.0
    vtm_hard_negatives: bool = True
    mlm_probability: float | int = 0.5
    pool_per_frame: bool = True
    contrastive_gather: Literal["exact", "published"] = "exact"
    initializer_range: float | int = 0.02
    tie_word_embeddings: bool = True
    # Which tokens of a video are kept is the video encoder's; by these names `from_pretrained` takes it here, too.
    keep_ratio = build_vision_property("keep_ratio")
    token_selector = build_vision_property("token_selector")
    token_selector_seed = build_vision_property("token_selector_seed")

    def __post_init__(self, **kwargs: Any) -> None:
        vision: Any = self.vision_config
        text: Any = self.text_config
        if not isinstance(vision, UMTVideoConfig):
            self.vision_config = UMTVideoConfig(**STAGE2_VISION_FIELDS | (vision or {}))
        if not isinstance(text, UMTTextConfig):
            self.text_config = UMTTextConfig(**(text or {}))
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Check the range of each field, and how they fit together."""
        check_ranges(
            self,
            sizes=("projection_dim",),
            not_negative=(
                "uta_loss_weight", "vtc_loss_weight", "vtm_loss_weight", "mlm_loss_weight", "initializer_range",
            ),
        )  # fmt: skip
        vision_width, encoder_width = self.vision_config.hidden_size, self.text_config.encoder_width
        if vision_width != encoder_width:
            raise ValueError(
                f"text_config.encoder_width={encoder_width} must be vision_config.hidden_size={vision_width}: the "
                "fusion layers attend to the video's tokens."
            )
        if self.text_config.is_decoder:
            raise ValueError("text_config.is_decoder must be False: texts are encoded with attention both ways.")
        if len(self.temperature_bounds) != 2:
            raise ValueError(f"temperature_bounds are a lower and an upper limit, got {self.temperature_bounds}.")
        lowest, highest = self.temperature_bounds
        if not 0 < lowest <= self.temperature_init_value <= highest:
            raise ValueError(
                f"temperature_init_value={self.temperature_init_value} must be within temperature_bounds="
                f"{tuple(self.temperature_bounds)}, which are above 0."
            )
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"mlm_probability must be in (0, 1), got {self.mlm_probability}.")


def build_decoder_config(config: UMTTextConfig) -> UMTTextConfig:
    """Configuration of the answer decoder: the fusion layers of a text tower, causal, over its own states.

    Args:
        config: The encoder's configuration.

    Returns:
        A new configuration with `num_hidden_layers - fusion_layer` layers, each of which cross-attends.
    """
    fields: dict[str, Any] = config.to_dict() | {
        "num_hidden_layers": config.num_hidden_layers - config.fusion_layer,
        "fusion_layer": 0,
        "encoder_width": config.hidden_size,
        "is_decoder": True,
        "attn_implementation": config._attn_implementation,
    }
    return UMTTextConfig(**fields)


def require_text(config: PreTrainedConfig, model_class: type) -> None:
    """Refuse a configuration without text, which Auto classes hand over for a folder without it.

    Raises:
        ValueError: If it is not a [`UMTVideoTextConfig`]; the message names the folder's class.
    """
    if config.model_type != UMTVideoTextConfig.model_type:
        known = ", ".join(config.architectures or ()) or "the class of its kind"
        raise ValueError(
            f"{model_class.__name__} needs a configuration of type {UMTVideoTextConfig.model_type!r}, with video and "
            f"text; {config.name_or_path or 'this one'} is of type {config.model_type!r}, without text: load it with "
            f"{known}."
        )


__all__ = ["UMTTextConfig", "UMTVideoTextConfig"]
