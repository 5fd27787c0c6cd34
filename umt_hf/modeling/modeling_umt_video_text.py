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
"""The models that join the UMT video encoder with its text tower: dual encoder, matching, stage 2, questions.

Legend: B videos or texts, T frames (of tubelets, where these are longer than a frame), V video tokens, P vectors per
video, L text tokens, H text width, D projection width, S tokens of a question, A answers of all questions.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple

from .configuration_umt_video_text import STAGE2_VISION_FIELDS, UMTVideoTextConfig, build_decoder_config, require_text
from .fresh_heads_umt import watch_fresh_head
from .losses_umt import (
    IGNORED_LABEL,
    TensorPair,
    compute_answer_loss,
    draw_negatives,
    has_negatives,
    lacks_negatives,
    mlm_loss,
    normalize_features,
    sample_mlm_corruption,
    sum_losses,
    uta_loss,
    vtc_loss,
    vtm_loss,
)
from .modeling_umt_text import (
    CACHE_NAME,
    UMTTextLMHead,
    UMTTextLMHeadModel,
    UMTTextModel,
    build_cache,
    rank_closed_list,
)
from .modeling_umt_video import (
    UMTVideoAlignmentHead,
    UMTVideoModel,
    project_aligned_states,
    require_tensor,
    select_targets,
)
from .outputs_umt_video import UMTVideoModelOutput
from .outputs_umt_video_text import (
    UMTVideoFeaturesOutput,
    UMTVideoTextForPreTrainingOutput,
    UMTVideoTextForQuestionAnsweringOutput,
    UMTVideoTextForRetrievalOutput,
    UMTVideoTextMatchingOutput,
    UMTVideoTextOutput,
)
from .quantization_umt import UMTFloatLinear, UMTQuantizationMixin
from .towers_umt_video_text import load_bert_tower, load_video_tower, require_both, start_question_answering

logger = logging.get_logger(__name__)

VIDEO_OPTIONS = ("video_key_values", "encoder_rows", "saliency")  # of answers: what the questions look at


class UMTVideoTextPreTrainedModel(UMTQuantizationMixin, PreTrainedModel):
    """What Transformers needs to know about the models with both towers.

    All have these at top level, where [`UMTVideoModel`] and [`UMTTextModel`] find their weights in any folder.
    """

    config: UMTVideoTextConfig  # pyrefly: ignore[bad-override-mutable-attribute]  how a model names its configuration's class
    vision_model: UMTVideoModel
    text_model: UMTTextModel
    base_model_prefix = "umt_video_text"
    main_input_name = "input_ids"
    input_modalities = ["video", "text"]
    supports_gradient_checkpointing = True
    # Losses are means over pairs, so the Trainer averages over accumulated batches itself.
    accepts_loss_kwargs = False
    _no_split_modules = ["UMTVideoLayer", "UMTTextLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the towers. The first parameter, the temperature, always stays in float32."""
        return self.vision_model.dtype

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, UMTVideoAlignmentHead):
            init.xavier_uniform_(module.dense.weight)
        elif isinstance(module, UMTVideoTextModel):
            init.constant_(module.temperature, self.config.temperature_init_value)
        watch_fresh_head(self, module)

    def get_input_embeddings(self) -> nn.Module:
        """The text tower's table of word embeddings."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the text tower's table of word embeddings."""
        self.text_model.set_input_embeddings(value)

    def get_video_key_values(self, video_tokens: torch.Tensor) -> torch.Tensor:
        """Project the tokens of videos to what texts look at, once for any number of texts.

        Args:
            video_tokens: `last_hidden_state` of `get_video_features` or of `vision_model`, `(videos, V, width)`.

        Returns:
            `(videos, fusion layers, 2, V, H)`: keys and values of each fusion layer, to keep or to hand on as
            `video_key_values`. Tokens and these may be kept in half precision.
        """
        return self.text_model.get_encoder_key_values(video_tokens)


class UMTVideoTextModel(UMTVideoTextPreTrainedModel):
    """UMT dual encoder: videos and texts as vectors of one space, whose cosine measures how well they fit.

    It keeps the fusion layers of the text tower, which only the heads use. So plain DDP needs
    `find_unused_parameters=True` where this class itself is trained; the `Trainer` sets it, and the heads need it not.

    Examples:
        >>> from transformers import AutoModel, AutoProcessor
        >>> model = AutoModel.from_pretrained("umt-vit-b16-25m")
        >>> processor = AutoProcessor.from_pretrained("umt-vit-b16-25m")
        >>> texts = ["a dog running", "a red circle"]
        >>> inputs = processor(texts, videos="video.mp4", return_tensors="pt")
        >>> model(**inputs).logits_per_video.shape
        torch.Size([1, 2])
    """

    _keep_in_fp32_modules_strict = ["temperature"]
    _keys_to_ignore_on_load_unexpected = [r"^alignment_heads\.", r"^mlm_head\.", r"^matching_head\."]

    def __init__(self, config: UMTVideoTextConfig):
        require_text(config, type(self))
        super().__init__(config)
        vision_config, text_config = config.vision_config, config.text_config
        self.vision_model = UMTVideoModel(vision_config)
        self.text_model = UMTTextModel(text_config)
        self.video_norm = nn.LayerNorm(vision_config.hidden_size, eps=vision_config.layer_norm_eps)
        self.video_projection = UMTFloatLinear(vision_config.hidden_size, config.projection_dim)
        self.text_projection = UMTFloatLinear(text_config.hidden_size, config.projection_dim)
        # One element instead of a scalar, which FSDP2 cannot shard.
        self.temperature = nn.Parameter(torch.full((1,), float(config.temperature_init_value), dtype=torch.float32))
        self.build_heads(config)
        self.post_init()

    def build_heads(self, config: UMTVideoTextConfig) -> None:
        """Add what a subclass has beyond the towers and their projections."""

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        visible_indices: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UMTVideoFeaturesOutput:
        """Encode and project videos; an image is a video of one frame.

        Args:
            pixel_values: Normalised videos `(B, T, channels, height, width)`.
            bool_masked_pos: Boolean mask `(B, tokens)`, `True` = hidden, with the same count in every row.
            visible_indices: Indices of the visible tokens `(B, V)` instead of the mask.
            **kwargs: As for [`UMTVideoModel`].

        Returns:
            `last_hidden_state (B, V, width)`, the tokens that texts attend to; `pooler_output (B, D)`, one vector per
            video, whose inner product with a text's unit vector is their score; and, without a mask and with
            `pool_per_frame`, `frame_embeds (B, T, D)`, the unit vectors whose mean that is.
        """
        outputs = self.vision_model(pixel_values, bool_masked_pos, visible_indices, **kwargs, return_dict=True)
        # CODEPATH: all released video-text checkpoints pool per frame; one vector per clip is for models trained anew.
        per_frame = self.config.pool_per_frame and bool_masked_pos is None and visible_indices is None
        num_vectors = pixel_values.shape[1] // self.config.vision_config.tubelet_size if per_frame else 1
        vectors = normalize_features(self.project_video(outputs.last_hidden_state, num_vectors))
        pooled = UMTVideoFeaturesOutput(**outputs, frame_embeds=vectors if per_frame else None)
        pooled.pooler_output = vectors.mean(dim=1)
        return pooled

    def project_video(self, video_tokens: torch.Tensor, num_vectors: int) -> torch.Tensor:
        """Pool tokens in P equal parts, in order, and project: `(B, V, width)` -> `(B, P, D)`, of any length."""
        pooled = video_tokens.unflatten(1, (num_vectors, -1)).mean(dim=2)
        return self.video_projection(self.video_norm(pooled))

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Encode and project texts with the text layers alone.

        Args:
            input_ids: Tokens `(B, L)`, `[CLS]` first and no `[SEP]`.
            attention_mask: 1 at tokens and 0 at padding, `(B, L)`.
            **kwargs: As for [`UMTTextModel`].

        Returns:
            `last_hidden_state (B, L, H)`, from which the fusion layers go on, and `pooler_output (B, D)`, any length.
        """
        outputs = self.text_model(input_ids, attention_mask, mode="text", **kwargs, return_dict=True)
        outputs.pooler_output = self.text_projection(outputs.pooler_output)
        return outputs

    def get_text_embedding(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> ModelOutput:
        """As `get_text_features`, with unit vectors, `pooler_output (B, D)`: times those of videos they are scores."""
        outputs = self.get_text_features(input_ids, attention_mask, return_dict=True)
        outputs.pooler_output = normalize_features(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pair_ids: torch.Tensor | None = None,
        return_loss: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UMTVideoTextOutput:
        """Compare every video with every text.

        Args:
            input_ids: Tokens `(texts, L)`, `[CLS]` first and no `[SEP]`.
            attention_mask: 1 at tokens and 0 at padding, `(texts, L)`.
            pixel_values: Normalised videos `(videos, T, channels, height, width)`.
            pair_ids: With `return_loss`, `(B,)`: equal ids are true pairs. default: all distinct.
            return_loss: Whether to compute the contrastive loss; video i then belongs to text i.
            **kwargs: As for both towers.

        Returns:
            [`UMTVideoTextOutput`] with `logits_per_video (videos, texts)`.
        """
        input_ids, pixel_values = require_both(input_ids, pixel_values)
        video, text = self._encode(input_ids, attention_mask, pixel_values, **kwargs)
        outputs = UMTVideoTextOutput(**self._contrast(video, text, pair_ids, return_loss))
        outputs.loss = sum_losses(outputs, self.config)
        return outputs

    def _encode(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        pixel_values: torch.Tensor,
        video_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[UMTVideoFeaturesOutput, BaseModelOutputWithPoolingAndCrossAttentions]:
        options = {"saliency": kwargs.pop("saliency", None)} | (video_options or {})
        video = self.get_video_features(pixel_values, **options, **kwargs, return_dict=True)
        return video, self.get_text_features(input_ids, attention_mask, **kwargs, return_dict=True)

    def _contrast(
        self,
        video: UMTVideoFeaturesOutput,
        text: BaseModelOutputWithPoolingAndCrossAttentions,
        pair_ids: torch.Tensor | None,
        return_loss: bool,
    ) -> dict[str, Any]:
        """Fields of the output that only take the projected vectors."""
        if return_loss:
            # Through `.data`, so that a second forward before backward does not look like a change of the graph.
            self.temperature.data.clamp_(*self.config.temperature_bounds)
        video_embeds = require_tensor(video.pooler_output, "pooler_output")
        with torch.autocast(video_embeds.device.type, enabled=False):
            temperature = self.temperature.float()
            text_embeds = normalize_features(require_tensor(text.pooler_output, "pooler_output"))
            logits = video_embeds @ text_embeds.T / temperature
        loss = None
        # CODEPATH: stage-2 and retrieval checkpoints have the contrast; weight 0 leaves it out in runs without it.
        if return_loss and self.config.vtc_loss_weight > 0:
            loss = vtc_loss(video_embeds, text_embeds, temperature, pair_ids, self.config.contrastive_gather)
        return {
            "vtc_loss": loss,
            "logits_per_video": logits,
            "logits_per_text": logits.T,
            "video_embeds": video_embeds,
            "text_embeds": text_embeds,
            "vision_model_output": video,
            "text_model_output": text,
        }

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str | Path,
        text: str | Path,
        vision_fields: dict[str, Any] | None = None,
        text_fields: dict[str, Any] | None = None,
        output_loading_info: bool = False,
        dtype: torch.dtype | str = torch.float32,
        device_map: Any = None,
        **fields: Any,
    ) -> "UMTVideoTextModel | tuple[UMTVideoTextModel, dict[str, Any]]":
        """Join a UMT video encoder and a BERT, as stage 2 starts.

        Args:
            vision: Folder or Hub id of a UMT video model: stage 1 with its alignment heads, or any other.
            text: Folder or Hub id of a BERT, with or without its language-modelling head.
            vision_fields: Fields of the vision configuration to change. The published stage 2 has 4 frames and a
                position table computed for each input; both are the default here.
            text_fields: Fields of the text configuration to change. `fusion_layer` is 9 for 12 layers and 19 for 24 by
                default; special ids are those of BERT's published vocabulary.
            output_loading_info: Whether to return also which weights are fresh and which are left over.
            dtype: Precision of the model; its temperature stays in float32.
            device_map: As for `from_pretrained`.
            **fields: Fields of [`UMTVideoTextConfig`].

        Returns:
            The model; with `output_loading_info`, also `from_pretrained`'s report, which is logged in any
            case: `missing_keys` are the weights that start fresh (cross attention, projections, matching head ...),
            `unexpected_keys` those that have no place here.

        Raises:
            ValueError: If a folder holds another kind of model, lacks a part of its tower, or `fusion_layer` is not
                known.
        """
        vision_state, vision_config = load_video_tower(vision, STAGE2_VISION_FIELDS | (vision_fields or {}))
        text_fields = {"encoder_width": vision_config.hidden_size} | (text_fields or {})
        text_state, text_config = load_bert_tower(text, text_fields)
        config = UMTVideoTextConfig(vision_config=vision_config, text_config=text_config, **fields)
        # pyrefly: ignore[not-iterable]  a pair, with output_loading_info
        model, info = cls.from_pretrained(
            None,
            config=config,
            state_dict=vision_state | text_state,
            output_loading_info=True,
            dtype=dtype,
            device_map=device_map,
        )
        return (model, info) if output_loading_info else model


class UMTVideoTextForRetrieval(UMTVideoTextModel):
    """UMT dual encoder with a matching head that looks at video and text together, for ranking and re-ranking.

    Examples:
        >>> from transformers import AutoProcessor
        >>> from umt_hf import UMTVideoTextForRetrieval
        >>> name = "umt-vit-b16-25m"
        >>> model = UMTVideoTextForRetrieval.from_pretrained(name).eval()
        >>> processor = AutoProcessor.from_pretrained(name)
        >>> inputs = processor("a dog", videos="video.mp4", return_tensors="pt")
        >>> outputs = model(**inputs)
        >>> video, text = outputs.vision_model_output, outputs.text_model_output
        >>> model.match(video.last_hidden_state, text.last_hidden_state).shape
        torch.Size([1, 2])
    """

    _keys_to_ignore_on_load_unexpected = [r"^alignment_heads\.", r"^mlm_head\."]

    def build_heads(self, config: UMTVideoTextConfig) -> None:
        """Add the matching head."""
        self.matching_head = UMTFloatLinear(config.text_config.hidden_size, 2)

    def match(
        self,
        video_tokens: torch.Tensor | None = None,
        text_tokens: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        video_key_values: torch.Tensor | None = None,
        encoder_rows: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Any:
        """Judge pairs of encoded videos and texts by the fusion layers; a single one of either kind is in all pairs.

        Args:
            video_tokens: `last_hidden_state` of `get_video_features`, `(B, V, width)`.
            text_tokens: `last_hidden_state` of `get_text_features`, `(B, L, H)`.
            attention_mask: 1 at the texts' tokens and 0 at padding, `(B, L)`.
            video_key_values: Instead of `video_tokens`: what `get_video_key_values` made of them.
            encoder_rows: Which of the videos each text is judged with, `(B,)`; default: text i with video i.
            **kwargs: As for [`UMTTextModel`]; with `output_attentions=True` (`attn_implementation="eager"`) or
                `output_hidden_states=True` more than the logits is returned.

        Returns:
            A tensor, the raw logits `(B, 2)`, class 1 = match; or [`UMTVideoTextMatchingOutput`], whose
            `cross_attentions` say where in the video each word looks.
        """
        videos = video_tokens if video_key_values is None else video_key_values
        if videos is None or text_tokens is None:
            raise ValueError("Give text_tokens, and video_tokens or video_key_values.")
        if text_tokens.shape[0] == 1 and encoder_rows is None:
            text_tokens = text_tokens.expand(videos.shape[0], -1, -1)
            attention_mask = None if attention_mask is None else attention_mask.expand(videos.shape[0], -1)
        outputs = self.text_model(
            attention_mask=attention_mask,
            inputs_embeds=text_tokens,
            encoder_hidden_states=video_tokens,
            encoder_key_values=video_key_values,
            encoder_rows=encoder_rows,
            mode="fusion",
            **kwargs,
            return_dict=True,
        )
        logits = self.matching_head(outputs.pooler_output)
        if not (kwargs.get("output_attentions") or kwargs.get("output_hidden_states")):
            return logits
        return UMTVideoTextMatchingOutput(
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pair_ids: torch.Tensor | None = None,
        video_negatives: torch.Tensor | None = None,
        text_negatives: torch.Tensor | None = None,
        return_loss: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UMTVideoTextForRetrievalOutput:
        """Compare every video with every text and, with `return_loss`, contrast and match the pairs.

        Args:
            input_ids: Tokens `(texts, L)`, `[CLS]` first and no `[SEP]`.
            attention_mask: 1 at tokens and 0 at padding, `(texts, L)`.
            pixel_values: Normalised videos `(videos, T, channels, height, width)`.
            pair_ids: `(B,)`: equal ids are true pairs, and never each other's negatives. default: all distinct. Where
                all are equal, there is no negative: the matching loss is 0.
            video_negatives: Index of the video that is each text's negative, `(B,)`; drawn by default.
            text_negatives: Index of the text that is each video's negative, `(B,)`; drawn by default.
            return_loss: Whether to compute the losses; video i then belongs to text i.
            **kwargs: As for both towers.

        Returns:
            [`UMTVideoTextForRetrievalOutput`]; without `return_loss` the logits, and nothing random runs.

        Source: Li et al., "Unmasked Teacher", ICCV 2023, section 3.2.
        """
        input_ids, pixel_values = require_both(input_ids, pixel_values)
        video, text = self._encode(input_ids, attention_mask, pixel_values, **kwargs)
        outputs = UMTVideoTextForRetrievalOutput(**self._contrast(video, text, pair_ids, return_loss))
        if return_loss:
            self._add_matching(outputs, video, text, attention_mask, pair_ids, (video_negatives, text_negatives))
        outputs.loss = sum_losses(outputs, self.config)
        return outputs

    def _add_matching(
        self,
        outputs: UMTVideoTextForRetrievalOutput,
        video: UMTVideoFeaturesOutput,
        text: BaseModelOutputWithPoolingAndCrossAttentions,
        attention_mask: torch.Tensor | None,
        pair_ids: torch.Tensor | None,
        negatives: TensorPair,
    ) -> None:
        """Match the true pairs, and each with one negative of the other kind."""
        # CODEPATH: stage-2 and retrieval checkpoints match pairs; weight 0 leaves it out in runs without it.
        if not self.config.vtm_loss_weight > 0:
            return
        videos = require_tensor(video.last_hidden_state, "last_hidden_state")
        texts, masks, rows = self._draw_pairs(outputs, text, attention_mask, pair_ids, negatives)
        outputs.matching_logits = self.match(videos, texts, masks, encoder_rows=rows)
        outputs.vtm_loss = vtm_loss(outputs.matching_logits) * has_negatives(pair_ids, videos.shape[0], videos.device)

    def _draw_pairs(
        self,
        outputs: UMTVideoTextForRetrievalOutput,
        text: BaseModelOutputWithPoolingAndCrossAttentions,
        attention_mask: torch.Tensor | None,
        pair_ids: torch.Tensor | None,
        negatives: TensorPair,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Texts `(3 * B, L, H)`, their masks, and the number of the video that each is judged with."""
        logits = require_tensor(outputs.logits_per_video, "logits_per_video")
        texts = require_tensor(text.last_hidden_state, "last_hidden_state")
        videos, others = draw_negatives(logits, pair_ids, self.config.vtm_hard_negatives, negatives)
        if not torch.compiler.is_compiling() and lacks_negatives(pair_ids, logits.shape[0]):
            logger.warning_once("A batch of a single pair id has no negatives: its matching loss is 0.")
        masks = texts.new_ones(texts.shape[:2]) if attention_mask is None else attention_mask
        own = torch.arange(logits.shape[0], device=logits.device)
        rows = torch.cat([own, videos, own])
        return torch.cat([texts, texts, texts[others]]), torch.cat([masks, masks, masks[others]]), rows


class UMTVideoTextForPreTraining(UMTVideoTextForRetrieval):
    """UMT stage 2: alignment with a frozen teacher, contrast, matching and masked language modelling, video masked.

    The teacher is not part of the model: see [`UMTTeacher`].

    Examples:
        >>> from transformers import AutoModelForPreTraining, AutoProcessor
        >>> name = "umt-vit-b16-25m"
        >>> model = AutoModelForPreTraining.from_pretrained(name)
        >>> processor = AutoProcessor.from_pretrained(name)
        >>> videos, texts = ["video.mp4"] * 2, ["a dog", "a red circle"]
        >>> inputs = processor(texts, videos=videos, return_tensors="pt")
        >>> outputs = model(**inputs, return_loss=True)
        >>> [name for name in outputs if name.endswith("_loss")]
        ['vtc_loss', 'vtm_loss', 'mlm_loss']
    """

    _keys_to_ignore_on_load_unexpected = None
    _tied_weights_keys = {"mlm_head.decoder.weight": "text_model.embeddings.word_embeddings.weight"}

    def build_heads(self, config: UMTVideoTextConfig) -> None:
        """Add the heads of alignment, matching and language modelling."""
        super().build_heads(config)
        self.mlm_head = UMTTextLMHead(config.text_config)
        self.alignment_heads = nn.ModuleList(
            UMTVideoAlignmentHead(config.vision_config) for _ in config.vision_config.aligned_layer_indices
        )

    def get_output_embeddings(self) -> nn.Module:
        """The map from states to words."""
        return self.mlm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the map from states to words."""
        self.mlm_head.decoder = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        teacher_features: torch.Tensor | None = None,
        pair_ids: torch.Tensor | None = None,
        visible_indices: torch.Tensor | None = None,
        normalize_teacher_features: bool = True,
        video_negatives: torch.Tensor | None = None,
        text_negatives: torch.Tensor | None = None,
        mlm_input_ids: torch.Tensor | None = None,
        mlm_labels: torch.Tensor | None = None,
        return_loss: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UMTVideoTextForPreTrainingOutput:
        """Compute the four losses of stage 2 from one pass over the visible tokens.

        Args:
            input_ids: Tokens `(texts, L)`, `[CLS]` first and no `[SEP]`.
            attention_mask: 1 at tokens and 0 at padding, `(texts, L)`.
            pixel_values: Normalised videos `(videos, T, channels, height, width)`, or images as one frame.
            bool_masked_pos: Boolean mask `(B, N)` over all N tokens, `True` = hidden, the same count in every row.
            teacher_features: Teacher's features `(K, B, V, C)` at the visible tokens in raster order, or
                `(K, B, N, C)` at all; without them there is no alignment loss.
            pair_ids: `(B,)`: equal ids are true pairs, and never each other's negatives. default: all distinct.
            visible_indices: Indices of the visible tokens `(B, V)` instead of the mask.
            normalize_teacher_features: Whether to normalise `teacher_features` as the student's are. `False` for those
                of [`UMTTeacher`], which come normalised.
            video_negatives: Index of the video that is each text's negative, `(B,)`; drawn by default.
            text_negatives: Index of the text that is each video's negative, `(B,)`; drawn by default.
            mlm_input_ids: Corrupted tokens `(B, L)`, with `mlm_labels`; drawn by default.
            mlm_labels: The tokens to predict `(B, L)`, -100 elsewhere.
            return_loss: Whether to compute the losses; video i then belongs to text i.
            **kwargs: As for both towers.

        Returns:
            [`UMTVideoTextForPreTrainingOutput`]; without `return_loss` the logits, and nothing random runs.

        Raises:
            ValueError: If the features' shape fits neither, `tubelet_size > 1` meets a frame-wise teacher, or only one
                of `mlm_input_ids` and `mlm_labels` is given.

        Source: Li et al., "Unmasked Teacher", ICCV 2023, section 3.2.
        """
        if (mlm_input_ids is None) != (mlm_labels is None):
            raise ValueError("Give both mlm_input_ids and mlm_labels, or neither.")
        aligns = return_loss and teacher_features is not None and self.config.uta_loss_weight > 0
        input_ids, pixel_values = require_both(input_ids, pixel_values)
        grid, visible_indices = self.vision_model.resolve_tokens(pixel_values, bool_masked_pos, visible_indices)
        video, text = self._encode(
            input_ids,
            attention_mask,
            pixel_values,
            video_options={
                "visible_indices": visible_indices,
                "output_aligned_states": aligns,
                "token_grid": grid,
            },
            **kwargs,
        )
        outputs = UMTVideoTextForPreTrainingOutput(**self._contrast(video, text, pair_ids, return_loss))
        if aligns:
            visible_indices = video.kept_indices if visible_indices is None else visible_indices
            targets = select_targets(teacher_features, visible_indices, grid)
            if normalize_teacher_features:
                targets = normalize_features(targets, self.config.vision_config.alignment_norm)
            self._add_alignment(outputs, video, targets, visible_indices, grid)
        if return_loss:
            pairs = (attention_mask, pair_ids, (video_negatives, text_negatives))
            self._add_fusion_losses(outputs, video, text, *pairs, input_ids, (mlm_input_ids, mlm_labels))
        outputs.loss = sum_losses(outputs, self.config)
        return outputs

    def _add_alignment(
        self,
        outputs: UMTVideoTextForPreTrainingOutput,
        video: UMTVideoFeaturesOutput,
        targets: torch.Tensor,
        visible_indices: torch.Tensor | None,
        grid: tuple[int, int, int],
    ) -> None:
        """Compare the aligned layers with the teacher's normalised features, the targets, as stage 1 does."""
        config = self.config.vision_config
        if config.tubelet_size > 1:
            raise ValueError(
                f"tubelet_size={config.tubelet_size} leaves no token for each frame of the teacher; use 1."
            )
        positions = self.vision_model.embeddings.compute_position_embeddings(grid, visible_indices, fixed=True)
        states = require_tensor(video.aligned_hidden_states, "aligned_hidden_states")
        outputs.aligned_features = project_aligned_states(
            self.alignment_heads, states, positions, config.alignment_norm
        )
        outputs.uta_loss = uta_loss(outputs.aligned_features, targets, norm="none", loss=config.alignment_loss)

    def _add_fusion_losses(
        self,
        outputs: UMTVideoTextForPreTrainingOutput,
        video: UMTVideoFeaturesOutput,
        text: BaseModelOutputWithPoolingAndCrossAttentions,
        attention_mask: torch.Tensor | None,
        pair_ids: torch.Tensor | None,
        negatives: TensorPair,
        input_ids: torch.Tensor,
        corrupted: TensorPair,
    ) -> None:
        """Match pairs and predict hidden words in one pass, so that a video's keys and values are computed once."""
        # CODEPATH: stage-2 checkpoints were trained with both; weight 0 leaves one out in runs without it.
        if not self.config.mlm_loss_weight > 0:
            self._add_matching(outputs, video, text, attention_mask, pair_ids, negatives)
            return
        matches = self.config.vtm_loss_weight > 0
        groups = [self._draw_pairs(outputs, text, attention_mask, pair_ids, negatives)] if matches else []
        config, (mlm_input_ids, labels) = self.config.text_config, corrupted
        if mlm_input_ids is None or labels is None:
            kept_ids = (config.pad_token_id, config.cls_token_id)
            mlm_input_ids, labels = sample_mlm_corruption(
                input_ids, config.vocab_size, config.mask_token_id, kept_ids, self.config.mlm_probability
            )
        words = self.text_model(mlm_input_ids, attention_mask, mode="text", return_dict=True).last_hidden_state
        masks = words.new_ones(words.shape[:2]) if attention_mask is None else attention_mask
        groups.append((words, masks, torch.arange(words.shape[0], device=words.device)))
        texts, masks, rows = (torch.cat(parts) for parts in zip(*groups, strict=True))
        states = self.text_model(
            attention_mask=masks,
            inputs_embeds=texts,
            encoder_hidden_states=video.last_hidden_state,
            encoder_rows=rows,
            mode="fusion",
            return_dict=True,
        )
        if matches:
            outputs.matching_logits = self.matching_head(states.pooler_output[: -words.shape[0]])
            outputs.vtm_loss = vtm_loss(outputs.matching_logits) * has_negatives(pair_ids, len(words), words.device)
        outputs.mlm_logits = self.mlm_head(states.last_hidden_state[-words.shape[0] :])
        outputs.mlm_loss = mlm_loss(outputs.mlm_logits, labels)


class UMTVideoTextForQuestionAnswering(UMTVideoTextPreTrainedModel, GenerationMixin):
    """UMT video question answering: a question looks at the video, and a decoder turns its states into an answer.

    Examples:
        >>> from transformers import AutoProcessor
        >>> from umt_hf import UMTVideoTextForQuestionAnswering
        >>> name = "umt-vit-b16-25m-msrvtt-qa"
        >>> model = UMTVideoTextForQuestionAnswering.from_pretrained(name).eval()
        >>> processor = AutoProcessor.from_pretrained(name)
        >>> text = "what color is the ring?"
        >>> inputs = processor(text, videos="video.mp4", return_tensors="pt")
        >>> ids = model.generate(**inputs, max_new_tokens=1)
        >>> processor.batch_decode(ids, skip_special_tokens=True)
        ['blue']
    """

    main_input_name = "pixel_values"
    # The decoder stays on one device: automatic device maps search names within names, take `text_model` for
    # `answer_decoder.text_model`, and fail once they have split the decoder, whose weights are tied.
    _no_split_modules = ["UMTVideoLayer", "UMTTextLayer", "UMTTextLMHeadModel"]

    def __init__(self, config: UMTVideoTextConfig):
        require_text(config, type(self))
        super().__init__(config)
        self.vision_model = UMTVideoModel(config.vision_config)
        self.text_model = UMTTextModel(config.text_config)
        self.answer_decoder = UMTTextLMHeadModel(build_decoder_config(config.text_config))
        self.post_init()

    @property
    def generation_config(self) -> GenerationConfig:  # pyrefly: ignore[bad-override-mutable-attribute]  the decoder's
        """How answers are generated: number of tokens, beams ...; saved and loaded with the model."""
        return self.answer_decoder.generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        # Transformers sets one before there is a decoder, which then comes with its own.
        if "answer_decoder" in self._modules:
            self.answer_decoder.generation_config = value

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Give questions and answers a vocabulary of another size, as Transformers' method of that name does."""
        resized = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.answer_decoder.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        return resized

    @classmethod
    def from_pretraining(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Start from a stage-2 folder: the decoder is a copy of the fusion layers and the language-modelling head.

        Args:
            pretrained_model_name_or_path: Folder or Hub id of a [`UMTVideoTextForPreTraining`].
            **kwargs: As for `from_pretrained`.

        Returns:
            The model, with no weight left fresh.

        Raises:
            ValueError: If the folder lacks a part, or video and text differ in width, so that the copied
                cross-attention cannot attend to questions.

        Source: published fine-tuning code's hand-over rule.
        """
        return start_question_answering(cls, UMTVideoTextForPreTraining, pretrained_model_name_or_path, **kwargs)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        answer_weights: torch.Tensor | None = None,
        answers_per_question: torch.Tensor | None = None,
        video_key_values: torch.Tensor | None = None,
        encoder_rows: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UMTVideoTextForQuestionAnsweringOutput:
        """Encode questions and, with answers, predict these token by token.

        Args:
            pixel_values: Normalised videos `(B, T, channels, height, width)`.
            input_ids: Questions `(B, S)`, `[CLS]` first and no `[SEP]`.
            attention_mask: 1 at the questions' tokens and 0 at padding, `(B, S)`.
            decoder_input_ids: Answers `(A, tokens)`; by default the labels, with padding for -100.
            decoder_attention_mask: 1 at the answers' tokens, `(A, tokens)`; by default where no padding is.
            labels: Answers `[CLS] ... [SEP]` `(A, tokens)`, -100 on padding; shifted inside.
            answer_weights: Weight of each answer's loss, `(A,)`; by default 1.
            answers_per_question: How many of the answers, in order, belong to each question, `(B,)`; by default one.
            video_key_values: Instead of `pixel_values`: what `get_video_key_values` made of the tokens of videos.
            encoder_rows: Which of the videos each question is about, `(B,)`; default: question i about video i, and
                all about a single one.
            **kwargs: As for both towers; `output_hidden_states` and `output_attentions` ask the decoder as well.

        Returns:
            [`UMTVideoTextForQuestionAnsweringOutput`]; without answers nothing of the decoder.

        Raises:
            ValueError: If the number of answers does not fit the questions.

        Source: Li et al., "Unmasked Teacher", ICCV 2023, section 4; Li et al., "Align before Fuse", 2021, section 5.
        """
        looked_at = {"video_key_values": video_key_values, "encoder_rows": encoder_rows}
        video, question = self._encode_questions(pixel_values, input_ids, attention_mask, **looked_at, **kwargs)
        states = require_tensor(question.last_hidden_state, "last_hidden_state")
        num_questions = states.shape[0]
        output_states = video is not None and not (video.hidden_states is None and video.attentions is None)
        outputs = UMTVideoTextForQuestionAnsweringOutput(
            last_hidden_state=states,
            hidden_states=question.hidden_states,
            attentions=question.attentions,
            cross_attentions=question.cross_attentions,
            video_outputs=video if output_states else None,
        )
        if decoder_input_ids is None and labels is not None:
            decoder_input_ids = labels.masked_fill(labels == IGNORED_LABEL, self.config.text_config.pad_token_id)
        if decoder_input_ids is None:
            return outputs
        if decoder_attention_mask is None:
            decoder_attention_mask = (decoder_input_ids != self.config.text_config.pad_token_id).long()
        if answers_per_question is not None:
            states = states.repeat_interleave(answers_per_question, dim=0)
            if attention_mask is not None:
                attention_mask = attention_mask.repeat_interleave(answers_per_question, dim=0)
        if states.shape[0] != decoder_input_ids.shape[0]:
            raise ValueError(
                f"Got {decoder_input_ids.shape[0]} answers, expected {states.shape[0]}: one per question, or as "
                "many as answers_per_question gives."
            )
        answer = self.answer_decoder(
            decoder_input_ids,
            decoder_attention_mask,
            encoder_hidden_states=states,
            encoder_attention_mask=attention_mask,
            use_cache=False,
            return_dict=True,
            **{name: kwargs[name] for name in ("output_attentions", "output_hidden_states") if name in kwargs},
        )
        outputs.logits = answer.logits
        outputs.decoder_hidden_states = answer.hidden_states
        outputs.decoder_attentions = answer.attentions
        outputs.decoder_cross_attentions = answer.cross_attentions
        if labels is not None:
            outputs.answer_loss = compute_answer_loss(outputs.logits, labels)
            weighted = outputs.answer_loss if answer_weights is None else outputs.answer_loss * answer_weights
            outputs.loss = weighted.sum() / num_questions
        return outputs

    def _encode_questions(
        self,
        pixel_values: torch.Tensor | None,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        video_key_values: torch.Tensor | None = None,
        encoder_rows: torch.Tensor | None = None,
        saliency: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[UMTVideoModelOutput | None, BaseModelOutputWithPoolingAndCrossAttentions]:
        if (pixel_values is None) == (video_key_values is None):
            raise ValueError("Give either pixel_values or video_key_values.")
        video = None
        if pixel_values is not None:
            video = self.vision_model(pixel_values, saliency=saliency, **kwargs, return_dict=True)
        question = self.text_model(
            input_ids,
            attention_mask,
            encoder_hidden_states=None if video is None else video.last_hidden_state,
            encoder_key_values=video_key_values,
            encoder_rows=encoder_rows,
            mode="multi_modal",
            **kwargs,
            return_dict=True,
        )
        return video, question

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor | None,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Answer in free words, from `[CLS]` to `[SEP]`.

        Args:
            pixel_values: Normalised videos `(B, T, channels, height, width)`.
            input_ids: Questions `(B, S)`, `[CLS]` first and no `[SEP]`.
            attention_mask: 1 at the questions' tokens and 0 at padding, `(B, S)`.
            **kwargs: As for Transformers' `generate`: `max_new_tokens`, `num_beams`, `do_sample` ...; default: those
                of the model's `generation_config`; and `video_key_values` (then `pixel_values` is `None`),
                `encoder_rows` and `saliency`, as for `forward`.

        Returns:
            Token ids `(B, tokens)` with `[CLS]` and `[SEP]`, padded, or what `return_dict_in_generate` asks for.
        """
        options = {name: kwargs.pop(name) for name in VIDEO_OPTIONS if name in kwargs}
        _, question = self._encode_questions(pixel_values, input_ids, attention_mask, **options)
        states = require_tensor(question.last_hidden_state, "last_hidden_state")
        config = self.answer_decoder.config
        asked = (kwargs.get("generation_config") or self.generation_config).to_dict() | kwargs
        uses_cache = config.use_cache if asked.get("use_cache") is None else asked["use_cache"]
        if uses_cache and CACHE_NAME not in kwargs and asked.get("cache_implementation") is None:
            kwargs[CACHE_NAME] = build_cache(config)
        start = torch.full((states.shape[0], 1), config.cls_token_id, device=states.device)
        return self.answer_decoder.generate(
            start,
            attention_mask=torch.ones_like(start),
            encoder_hidden_states=states,
            encoder_attention_mask=attention_mask,
            **kwargs,
        )

    @torch.no_grad()
    def rank_answers(
        self,
        pixel_values: torch.Tensor | None,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        answer_input_ids: torch.Tensor,
        answer_attention_mask: torch.Tensor,
        top_k: int = 128,
        count_first_token_twice: bool = True,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rank the answers of a closed list.

        The `top_k` answers with the likeliest first token are scored by the log-probability of all their tokens.

        Args:
            pixel_values: Normalised videos `(B, T, channels, height, width)`.
            input_ids: Questions `(B, S)`, `[CLS]` first and no `[SEP]`.
            attention_mask: 1 at the questions' tokens and 0 at padding, `(B, S)`, or `None`.
            answer_input_ids: The list, `[CLS] ... [SEP]` each, `(answers, tokens)`.
            answer_attention_mask: 1 at its tokens and 0 at padding, on the right.
            top_k: Answers that are scored.
            count_first_token_twice: Whether the first token's log-probability is added once more, as in the published
                numbers.
            **kwargs: `video_key_values` (then `pixel_values` is `None`), `encoder_rows` and `saliency`, as for
                `forward`.

        Returns:
            Indices into the list and their probabilities among the `top_k`, best first, both `(B, top_k)`.

        Raises:
            ValueError: If the list has fewer than `top_k` answers.

        Source: Li et al., "Align before Fuse", 2021, section 5, as the published UMT code does it.
        """
        if top_k > answer_input_ids.shape[0]:
            raise ValueError(f"top_k={top_k} exceeds the list of {answer_input_ids.shape[0]} answers.")
        _, question = self._encode_questions(pixel_values, input_ids, attention_mask, **kwargs)
        states = require_tensor(question.last_hidden_state, "last_hidden_state")
        answers = (answer_input_ids, answer_attention_mask)
        return rank_closed_list(self.answer_decoder, states, attention_mask, *answers, top_k, count_first_token_twice)


__all__ = [
    "UMTVideoTextForPreTraining",
    "UMTVideoTextForQuestionAnswering",
    "UMTVideoTextForRetrieval",
    "UMTVideoTextModel",
    "UMTVideoTextPreTrainedModel",
]
