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
"""The UMT text tower, a BERT whose upper layers cross-attend to a video, with and without a head.

Legend: B texts, L text tokens, H text width, V video tokens.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_umt_video_text import UMTTextConfig
from .fresh_heads_umt import watch_fresh_head
from .losses_umt import IGNORED_LABEL, compute_answer_loss
from .modeling_umt_video import UMTVideoMLP, eager_attention_forward
from .quantization_umt import UMTFloatLinear, UMTQuantizationMixin, match_precision

# What Transformers calls the keys and values of earlier tokens, in arguments and outputs: `cache` from 5.24 on.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithCrossAttentions.__dataclass_fields__ else "past_key_values"


MODE_PLACE = 5  # of `mode` among the arguments of `UMTTextModel.forward`, without `self`


def takes_past_key_values(forward: Callable) -> Callable:
    """Let a `forward` that takes `cache` also take it as `past_key_values`, its name before Transformers 5.24."""
    if CACHE_NAME == "cache":
        return deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")(forward)

    @wraps(forward)
    def renamed(self: nn.Module, *args: Any, past_key_values: Cache | None = None, **kwargs: Any) -> Any:
        if past_key_values is not None:
            kwargs["cache"] = past_key_values
        return forward(self, *args, **kwargs)

    return renamed


def count_layers_that_run(forward: Callable) -> Callable:
    """Let negative entries of `output_hidden_states=[...]` count from the last layer that runs in the mode asked for.

    Transformers counts from the last layer of the configuration, and so would keep nothing for -1 in text mode.
    """

    @wraps(forward)
    def counted(self: "UMTTextModel", *args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.get("output_hidden_states", getattr(self.config, "output_hidden_states", None))
        if wanted is None or isinstance(wanted, bool):
            return forward(self, *args, **kwargs)
        mode = kwargs.get("mode", args[MODE_PLACE] if len(args) > MODE_PLACE else "text")
        num_states = len(self._select_layers(mode)) + 1  # the first layer's input, too
        indices = [wanted] if isinstance(wanted, int) else wanted
        nothing = self.config.num_hidden_layers + 1  # one past every state
        counted_up = [index if index >= 0 else index + num_states for index in indices]
        kwargs["output_hidden_states"] = [index if index >= 0 else nothing for index in counted_up]
        return forward(self, *args, **kwargs)

    return counted


class UMTTextEmbeddings(nn.Module):
    """Word, position and segment embeddings; every token is of the first segment."""

    def __init__(self, config: UMTTextConfig):
        super().__init__()
        self.word_embeddings: nn.Module = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, words: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        # Through the modules, whose hooks bring offloaded weights back; each part may be placed on another device.
        positions = self.position_embeddings(position_ids).to(words.device)
        segments = self.token_type_embeddings(torch.zeros_like(position_ids)).to(words.device)
        return self.dropout(self.norm(words + positions + segments))


class UMTTextAttention(nn.Module):
    """Projections of an attention block, and the call of whichever implementation the configuration names."""

    def __init__(self, config: UMTTextConfig, layer_index: int, key_width: int):
        super().__init__()
        self.config = config
        self.layer_index = layer_index
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(key_width, config.hidden_size)
        self.v_proj = nn.Linear(key_width, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """`(B, tokens, width)` -> `(B, heads, tokens, head_dim)`."""
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def attend(
        self,
        hidden_states: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        implementation: str,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from `hidden_states` to keys and values, and project."""
        query = self.split_heads(self.q_proj(hidden_states))
        key, value = key.to(query.dtype), value.to(query.dtype)  # kept ones may be in half precision
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.flatten(-2)), weights


class UMTTextSelfAttention(UMTTextAttention):
    """Attention among the tokens of a text, causal in a decoder."""

    def __init__(self, config: UMTTextConfig, layer_index: int):
        super().__init__(config, layer_index, config.hidden_size)
        self.is_causal = config.is_decoder

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        key = self.split_heads(self.k_proj(hidden_states))
        value = self.split_heads(self.v_proj(hidden_states))
        if cache is not None:
            if isinstance(cache, EncoderDecoderCache):
                cache = cache.self_attention_cache
            key, value = cache.update(key, value, self.layer_index)
        return self.attend(
            hidden_states, key, value, attention_mask, self.config._attn_implementation or "eager", **kwargs
        )


class UMTTextCrossAttention(UMTTextAttention):
    """Attention from the tokens of a text to another sequence: a video, or a question."""

    def __init__(self, config: UMTTextConfig, layer_index: int):
        super().__init__(config, layer_index, config.encoder_width)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        encoder_rows: torch.Tensor | None = None,
        encoder_key_values: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if encoder_key_values is None:
            key, value = self._project_once(encoder_hidden_states, cache, encoder_rows)
        else:
            key, value = self._share(encoder_key_values[:, 0], encoder_key_values[:, 1], encoder_rows)
        if key.shape[0] == 1:  # one sequence that all texts attend to, without a copy for each
            key, value = (states.expand(hidden_states.shape[0], -1, -1, -1) for states in (key, value))
        implementation = self.config._attn_implementation or "eager"
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            # A mask of two dimensions is what FlashAttention gets, and Transformers takes it for the queries' mask as
            # well, which only holds within one sequence.
            attention_mask, implementation = attention_mask[:, None, None].bool(), "sdpa"
        return self.attend(hidden_states, key, value, attention_mask, implementation, **kwargs)

    def _project_once(
        self, encoder_hidden_states: Any, cache: Cache | None, encoder_rows: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the other sequence, which stay the same from one generated token to the next."""
        is_cached = isinstance(cache, EncoderDecoderCache)
        if is_cached and cache.is_updated.get(self.layer_index):
            layer: Any = cache.cross_attention_cache.layers[self.layer_index]  # one that holds keys and values
            return layer.keys, layer.values
        key, value = self.project(encoder_hidden_states)
        # After the projection, so that a sequence for many texts is projected once.
        key, value = self._share(key, value, encoder_rows)
        if is_cached:
            key, value = cache.cross_attention_cache.update(key, value, self.layer_index)
            cache.is_updated[self.layer_index] = True
        return key, value

    def project(self, encoder_hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the other sequence, `(sequences, V, H)` each; it may be kept in half precision."""
        states = match_precision(encoder_hidden_states, self.k_proj)
        return self.k_proj(states), self.v_proj(states)

    def _share(
        self, key: torch.Tensor, value: torch.Tensor, encoder_rows: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each text the keys and values that it attends to, split into heads."""
        if encoder_rows is not None:
            key, value = key[encoder_rows], value[encoder_rows]
        return self.split_heads(key), self.split_heads(value)


class UMTTextLayer(GradientCheckpointingLayer):
    """Post-norm transformer layer; a fusion layer cross-attends between self-attention and MLP."""

    def __init__(self, config: UMTTextConfig, layer_index: int):
        super().__init__()
        self.attention = UMTTextSelfAttention(config, layer_index)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.cross_attention = None
        # CODEPATH: fusion starts at layer 9 in B/16 checkpoints, at 19 in L/16 ones, at 0 in answer decoders.
        if layer_index >= config.fusion_layer:
            self.cross_attention = UMTTextCrossAttention(config, layer_index)
            self.cross_attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = UMTVideoMLP(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        encoder_key_values: torch.Tensor | None = None,
        cache: Cache | None = None,
        encoder_rows: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        output, _ = self.attention(hidden_states, attention_mask, cache, **kwargs)
        hidden_states = self.attention_norm(hidden_states + self.dropout(output))
        if self.cross_attention is not None:
            output, _ = self.cross_attention(
                hidden_states,
                encoder_hidden_states,
                encoder_attention_mask,
                cache,
                encoder_rows,
                encoder_key_values,
                **kwargs,
            )
            hidden_states = self.cross_attention_norm(hidden_states + self.dropout(output))
        return self.mlp_norm(hidden_states + self.dropout(self.mlp(hidden_states)))


class UMTTextLMHead(nn.Module):
    """BERT's language-modelling head; its last matrix is the table of word embeddings."""

    def __init__(self, config: UMTTextConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder: nn.Module = UMTFloatLinear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.norm(self.activation_fn(self.dense(hidden_states))))


class UMTTextPreTrainedModel(UMTQuantizationMixin, PreTrainedModel):
    """What Transformers needs to know about the text tower."""

    config: UMTTextConfig  # pyrefly: ignore[bad-override-mutable-attribute]  how a model names its configuration's class
    base_model_prefix = "text_model"
    main_input_name = "input_ids"
    input_modalities = ["text"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["UMTTextLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": UMTTextLayer,
        "attentions": UMTTextSelfAttention,
        "cross_attentions": UMTTextCrossAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        watch_fresh_head(self, module)


class UMTTextModel(UMTTextPreTrainedModel):
    """UMT text tower without a head: text layers, then fusion layers that cross-attend to another sequence.

    Examples:
        >>> import torch
        >>> from umt_hf import UMTTextConfig, UMTTextModel
        >>> config = UMTTextConfig(hidden_size=48, encoder_width=48)
        >>> model = UMTTextModel(config).eval()
        >>> ids = torch.tensor([[101, 1037, 2417, 4418]])  # [CLS] and three words
        >>> model(ids).last_hidden_state.shape
        torch.Size([1, 4, 48])
        >>> video = torch.randn(1, 784, 48)
        >>> outputs = model(ids, encoder_hidden_states=video, mode="multi_modal")
    """

    def __init__(self, config: UMTTextConfig):
        super().__init__(config)
        self.embeddings = UMTTextEmbeddings(config)
        self.layers = nn.ModuleList(UMTTextLayer(config, i) for i in range(config.num_hidden_layers))
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The table of word embeddings."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the table of word embeddings."""
        self.embeddings.word_embeddings = value

    @takes_past_key_values
    @count_layers_that_run
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        mode: Literal["text", "fusion", "multi_modal"] = "text",
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        encoder_rows: torch.Tensor | None = None,
        encoder_key_values: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Encode texts alone, or together with videos.

        Args:
            input_ids: Tokens `(B, L)`, `[CLS]` first.
            attention_mask: 1 at tokens and 0 at padding, on either side, `(B, L)`; with a cache, `(B, past + L)`.
            inputs_embeds: Instead of `input_ids`: word embeddings `(B, L, H)`, or in fusion mode the states that text
                mode gave.
            encoder_hidden_states: What the fusion layers attend to, `(B, V, encoder_width)`; not in text mode.
            encoder_attention_mask: 1 at its tokens and 0 at its padding, `(B, V)`; by default it has no padding.
            mode: "text" runs the layers below `fusion_layer`, "fusion" the others on given states, "multi_modal" all.
            position_ids: Places of the tokens `(B, L)`; by default counted from each text's first token.
            cache: Keys and values of earlier tokens, in a decoder.
            use_cache: Whether a decoder returns keys and values; by default as configured.
            encoder_rows: Which sequence of `encoder_hidden_states` each text attends to, `(B,)`, where several texts
                share one; by default text i attends to sequence i, and all to a single one. Not with
                `encoder_attention_mask` or a cache.
            encoder_key_values: Instead of `encoder_hidden_states`: what `get_encoder_key_values` made of them, in any
                floating-point precision. Not with a cache.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`, and arguments of the attention.
                Indices of hidden states count the layers that run in the mode.

        Returns:
            `last_hidden_state (B, L, H)` and `pooler_output (B, H)`, the state of each text's first token as it is.

        Raises:
            ValueError: If the inputs do not fit the mode, or the text is longer than the position table.

        Source: Li et al., "Unmasked Teacher", ICCV 2023, section 3.2; Li et al., "Align before Fuse", 2021.
        """
        layers = self._select_layers(mode)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        if mode == "fusion" and inputs_embeds is None:
            raise ValueError("mode='fusion' continues from the states of mode='text': give them as inputs_embeds.")
        self._check_encoder(mode, encoder_hidden_states, encoder_key_values, cache)
        if mode == "text" and not (encoder_hidden_states is None and encoder_attention_mask is None):
            raise ValueError(
                "mode='text', the default, runs the layers below fusion_layer, which cannot attend to "
                "encoder_hidden_states: give mode='multi_modal' for input_ids, or mode='fusion' for the states of "
                "text mode."
            )
        if encoder_rows is not None and not (encoder_attention_mask is None and cache is None):
            raise ValueError("encoder_rows cannot be combined with encoder_attention_mask or a cache.")
        use_cache = self.config.is_decoder and (self.config.use_cache if use_cache is None else use_cache)
        if self.gradient_checkpointing and self.training:
            use_cache, cache = False, None  # a layer that runs twice would add its keys twice
        if use_cache and cache is None and encoder_key_values is None:
            cache = build_cache(self.config)

        hidden_states = self.embeddings.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if mode != "fusion":
            past_length = cache.get_seq_length() if cache is not None else 0
            if position_ids is None:
                position_ids = self._compute_position_ids(attention_mask, past_length, hidden_states)
            hidden_states = self.embeddings(hidden_states, position_ids)
        own_key_values: list[torch.Tensor | None] = [None] * self.config.num_hidden_layers
        attended = encoder_hidden_states  # for masks, which look at its shape: one of it for each text
        if encoder_key_values is not None:
            own_key_values[self.config.fusion_layer :] = encoder_key_values.unbind(1)
            attended = hidden_states[:, :1].expand(-1, encoder_key_values.shape[3], -1)
        elif attended is not None and attended.shape[0] == 1:
            attended = attended.expand(hidden_states.shape[0], -1, -1)
        masks = (attention_mask, attended, encoder_attention_mask, cache)
        self_mask, cross_mask = self._build_masks(hidden_states, *masks)
        for layer, key_values in zip(layers, self._select_layers(mode, own_key_values), strict=True):
            hidden_states = layer(
                hidden_states,
                self_mask,
                encoder_hidden_states,  # by position, for the reentrant kind of gradient checkpointing
                cross_mask,
                key_values,
                cache=cache,
                encoder_rows=encoder_rows,
                **kwargs,
            )
        kept: dict[str, Any] = {CACHE_NAME: cache if use_cache else None}
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden_states,
            pooler_output=select_first_token(hidden_states, attention_mask),
            **kept,
        )

    def get_encoder_key_values(self, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        """Project a sequence to the keys and values of all fusion layers, to attend to it often.

        Args:
            encoder_hidden_states: `(sequences, V, encoder_width)`.

        Returns:
            `(sequences, fusion layers, 2, V, H)`: of each layer the keys, then the values. They may be kept in half
            precision.

        Raises:
            ValueError: If the tower has no fusion layers.
        """
        if self.config.fusion_layer == self.config.num_hidden_layers:
            raise ValueError("This text tower has no fusion layers, which keys and values are for.")
        layers: Any = self._select_layers("fusion")
        own = [torch.stack(layer.cross_attention.project(encoder_hidden_states), dim=1) for layer in layers]
        return torch.stack(own, dim=1)

    def _check_encoder(
        self,
        mode: str,
        encoder_hidden_states: torch.Tensor | None,
        encoder_key_values: torch.Tensor | None,
        cache: Cache | None,
    ) -> None:
        """Refuse what the fusion layers cannot attend to."""
        num_fusion = self.config.num_hidden_layers - self.config.fusion_layer
        if encoder_key_values is None:
            if mode != "text" and encoder_hidden_states is None:
                raise ValueError(f"mode={mode!r} needs encoder_hidden_states, the tokens that its layers attend to.")
        elif mode == "text" or encoder_hidden_states is not None or cache is not None:
            raise ValueError(
                "encoder_key_values stand for encoder_hidden_states: give one of them, a mode other than 'text', and "
                "no cache with encoder_key_values."
            )
        elif encoder_key_values.ndim != 5 or tuple(encoder_key_values.shape[1:3]) != (num_fusion, 2):
            raise ValueError(
                f"encoder_key_values must be (sequences, {num_fusion} fusion layers, 2, tokens, width), as "
                f"get_encoder_key_values makes them, got {tuple(encoder_key_values.shape)}."
            )

    def _select_layers(self, mode: str, values: Any = None) -> Any:
        """Layers that run in a mode, or what of a list belongs to them."""
        values = self.layers if values is None else values
        if mode == "text":
            return values[: self.config.fusion_layer]
        if mode == "fusion":
            return values[self.config.fusion_layer :]
        if mode == "multi_modal":
            return values
        raise ValueError(f"mode must be 'text', 'fusion' or 'multi_modal', got {mode!r}.")

    def _compute_position_ids(
        self, attention_mask: torch.Tensor | None, past_length: int, words: torch.Tensor
    ) -> torch.Tensor:
        length = past_length + words.shape[1]
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"A text of {length} tokens exceeds max_position_embeddings={self.config.max_position_embeddings}; "
                "truncate it."
            )
        position_ids = torch.arange(past_length, length, device=words.device)[None]
        if attention_mask is not None and attention_mask.ndim == 2:
            position_ids = (position_ids - find_first_token(attention_mask)[:, None]).clamp(min=0)
        return position_ids

    def _build_masks(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        encoder_hidden_states: torch.Tensor | None,
        encoder_attention_mask: torch.Tensor | None,
        cache: Cache | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Padding masks in the form that the attention implementation takes, causal in a decoder."""
        if self.config.is_decoder:
            self_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=hidden_states,
                attention_mask=attention_mask,
                **{CACHE_NAME: cache},
            )
        else:
            self_mask = self._build_padding_mask(hidden_states, attention_mask)
        cross_mask = None
        if encoder_attention_mask is not None:
            cross_mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=hidden_states,
                attention_mask=encoder_attention_mask,
                encoder_hidden_states=encoder_hidden_states,
            )
        return self_mask, cross_mask

    def _build_padding_mask(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Mask of `create_bidirectional_mask`; in training without its look whether there is padding, which waits."""
        implementation = self.config._attn_implementation
        if (
            self.training
            and implementation in ("sdpa", "eager")
            and attention_mask is not None
            and attention_mask.ndim == 2
        ):
            batch, length = hidden_states.shape[:2]
            is_word = attention_mask.to(hidden_states.device).bool()[:, None, None].expand(batch, 1, length, -1)
            if implementation == "sdpa":
                return is_word
            return torch.where(is_word, hidden_states.new_zeros(()), torch.finfo(hidden_states.dtype).min)
        return create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )


def find_first_token(attention_mask: torch.Tensor) -> torch.Tensor:
    """Place of the first 1 in each row of a padding mask: `(B, L)` -> `(B,)`."""
    return attention_mask.long().argmax(dim=1)


def select_first_token(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """State of each text's first token, whichever side the padding is on: `(B, L, H)` -> `(B, H)`."""
    if attention_mask is None or attention_mask.shape != hidden_states.shape[:2]:
        return hidden_states[:, 0]
    return hidden_states[
        torch.arange(hidden_states.shape[0], device=hidden_states.device), find_first_token(attention_mask)
    ]


def build_cache(config: UMTTextConfig) -> EncoderDecoderCache:
    """Empty cache of a decoder that cross-attends."""
    return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))


class UMTTextLMHeadModel(UMTTextPreTrainedModel, GenerationMixin):
    """Causal text tower with a language-modelling head, which generates text from another sequence's states.

    Examples:
        >>> import torch
        >>> from umt_hf import UMTTextConfig, UMTTextLMHeadModel
        >>> config = UMTTextConfig(
        ...     hidden_size=48,
        ...     num_hidden_layers=3,
        ...     fusion_layer=0,
        ...     encoder_width=48,
        ...     is_decoder=True,
        ... )
        >>> model = UMTTextLMHeadModel(config).eval()
        >>> question = torch.randn(1, 7, 48)  # states of a text tower
        >>> ids = torch.tensor([[101, 2630]])
        >>> model(ids, encoder_hidden_states=question).logits.shape
        torch.Size([1, 2, 30522])
    """

    _tied_weights_keys = {"lm_head.decoder.weight": "text_model.embeddings.word_embeddings.weight"}

    def __init__(self, config: UMTTextConfig):
        if not config.is_decoder:
            raise ValueError("UMTTextLMHeadModel needs is_decoder=True in its configuration.")
        super().__init__(config)
        self.text_model = UMTTextModel(config)
        self.lm_head = UMTTextLMHead(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The table of word embeddings."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the table of word embeddings."""
        self.text_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The map from states to words."""
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the map from states to words."""
        self.lm_head.decoder = new_embeddings

    @takes_past_key_values
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithCrossAttentions:
        """Predict each next token.

        Args:
            input_ids: Tokens `(B, L)`, `[CLS]` first.
            attention_mask: As for [`UMTTextModel`].
            inputs_embeds: Word embeddings `(B, L, H)` instead of `input_ids`.
            encoder_hidden_states: What the layers attend to, `(B, S, encoder_width)`.
            encoder_attention_mask: 1 at its tokens and 0 at its padding, `(B, S)`.
            position_ids: As for [`UMTTextModel`].
            cache: Keys and values of earlier tokens.
            use_cache: Whether to return keys and values.
            labels: `(B, L)` the tokens themselves, -100 where none is to be predicted; shifted inside.
            logits_to_keep: Compute the logits of that many last tokens alone; 0 = all.
            **kwargs: As for [`UMTTextModel`].

        Returns:
            `logits (B, L, vocabulary)` and, with labels, the mean cross entropy over tokens.
        """
        outputs = self.text_model(
            input_ids,
            attention_mask,
            inputs_embeds,
            encoder_hidden_states,
            encoder_attention_mask,
            mode="multi_modal",
            position_ids=position_ids,
            cache=cache,
            use_cache=use_cache,
            **kwargs,
            return_dict=True,
        )
        logits = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL
            )
        return CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        )


def rank_closed_list(
    decoder: UMTTextLMHeadModel,
    states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    answer_input_ids: torch.Tensor,
    answer_attention_mask: torch.Tensor,
    top_k: int,
    count_first_token_twice: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score the `top_k` answers with the likeliest first token by the log-probability of all their tokens.

    A question's keys and values are projected once for all its answers.

    Args:
        decoder: Of the answers.
        states: Questions that have looked at their videos, `(B, S, H)`.
        attention_mask: 1 at the questions' tokens and 0 at padding, `(B, S)`, or `None`.
        answer_input_ids: The list, `[CLS] ... [SEP]` each, `(answers, tokens)`.
        answer_attention_mask: 1 at its tokens and 0 at padding, on the right.
        top_k: Answers that are scored.
        count_first_token_twice: Whether the first token's log-probability is added once more.

    Returns:
        Indices into the list and their probabilities among the `top_k`, best first, both `(B, top_k)`.
    """
    decode = partial(decoder, use_cache=False, return_dict=True)
    key_values = decoder.text_model.get_encoder_key_values(states)
    start = answer_input_ids[:1, :1].expand(states.shape[0], 1)
    start_logits = decode(start, encoder_key_values=key_values, encoder_attention_mask=attention_mask).logits[:, 0]
    first_token_probs = start_logits.float().softmax(dim=1)[:, answer_input_ids[:, 1]]
    first_token_probs, candidates = first_token_probs.topk(top_k, dim=1)
    labels = answer_input_ids.masked_fill(answer_attention_mask == 0, IGNORED_LABEL)

    scores = []
    for i, chosen in enumerate(candidates):  # one question at a time: top_k answers fill a batch
        logits = decode(
            answer_input_ids[chosen],
            answer_attention_mask[chosen],
            encoder_key_values=key_values[i : i + 1],
            encoder_attention_mask=None if attention_mask is None else attention_mask[i : i + 1].expand(top_k, -1),
        ).logits
        scores.append(-compute_answer_loss(logits, labels[chosen]))
    scores = torch.stack(scores)
    if count_first_token_twice:
        scores = scores + first_token_probs.log()
    probabilities, order = scores.softmax(dim=1).sort(dim=1, descending=True)
    return candidates.gather(1, order), probabilities


__all__ = ["UMTTextLMHeadModel", "UMTTextModel", "UMTTextPreTrainedModel"]
