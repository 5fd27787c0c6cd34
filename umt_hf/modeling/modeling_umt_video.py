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
"""The UMT video encoder, a ViT with joint space-time attention that can run on a subset of its tokens, and its heads.

Legend: B batch, T frames, N tokens, V visible tokens, D width, K aligned layers, C teacher channels, M boxes per clip.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, is_torchvision_available, requires_backends
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_umt_video import UMTVideoConfig
from .fresh_heads_umt import watch_fresh_head
from .losses_umt import normalize_features, uta_loss
from .outputs_umt_video import UMTVideoForActionDetectionOutput, UMTVideoForPreTrainingOutput, UMTVideoModelOutput
from .positions_umt_video import compute_sinusoid_table, interpolate_position_table, is_exporting
from .quantization_umt import UMTFloatLinear, UMTQuantizationMixin, match_precision
from .selection_umt_video import build_feature_map, resolve_visible_indices, select_tokens

if is_torchvision_available():
    from torchvision.ops import roi_align

ROI_SIZE = 7  # rows and columns of the grid that a box is read on, as published


def require_tensor(value: torch.Tensor | None, name: str) -> torch.Tensor:
    """A field of an output that may be unset in general and is needed here.

    Raises:
        ValueError: If it is unset.
    """
    if value is None:
        raise ValueError(f"The output lacks {name}.")
    return value


def require_normalized(pixel_values: torch.Tensor) -> None:
    """Refuse raw pixels, which a model would read as if they were normalised.

    Raises:
        ValueError: If they are not floating-point numbers.
    """
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"pixel_values are {pixel_values.dtype}, raw pixels, where the model needs normalised floating-point "
            "numbers; pass the video through the processor first (AutoVideoProcessor or AutoProcessor)."
        )


def gather_tokens(tokens: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Select tokens by index: `(..., B, N, D)` and `(B, V)` -> `(..., B, V, D)`."""
    indices = indices[..., None].expand(*tokens.shape[:-2], indices.shape[-1], tokens.shape[-1])
    return tokens.gather(-2, indices)


class UMTVideoPatchEmbeddings(nn.Module):
    """Linear embedding of the patches of a video, or of the visible ones alone."""

    def __init__(self, config: UMTVideoConfig):
        super().__init__()
        self.num_channels = config.num_channels
        self.tubelet_size = config.tubelet_size
        self.patch_size = config.patch_size
        # A convolution whose stride is its kernel is a linear map of patches; weights are ordered channel, time, y, x.
        num_inputs = config.num_channels * config.tubelet_size * config.patch_size**2
        self.projection = UMTFloatLinear(num_inputs, config.hidden_size)

    def compute_grid(self, pixel_values: torch.Tensor) -> tuple[int, int, int]:
        """Time, rows and columns of the token grid of a video.

        Raises:
            ValueError: If the video has another layout than `(batch, frames, channels, height, width)`, holds raw
                integers, or the patch grid does not divide it.
        """
        if pixel_values.ndim != 5 or pixel_values.shape[2] != self.num_channels:
            raise ValueError(
                f"pixel_values must be (batch, frames, {self.num_channels} channels, height, width), got shape "
                f"{tuple(pixel_values.shape)}."
            )
        require_normalized(pixel_values)
        num_frames, _, height, width = pixel_values.shape[1:]
        if num_frames % self.tubelet_size or height % self.patch_size or width % self.patch_size or not num_frames:
            raise ValueError(
                f"A clip of {num_frames} frames of {height} x {width} pixels cannot be cut into tubelets of "
                f"{self.tubelet_size} frames and patches of {self.patch_size} x {self.patch_size} pixels; make "
                "frames, height and width multiples of these."
            )
        return num_frames // self.tubelet_size, height // self.patch_size, width // self.patch_size

    def forward(
        self,
        pixel_values: torch.Tensor,
        visible_indices: torch.Tensor | None = None,
        grid: tuple[int, int, int] | None = None,
    ) -> torch.Tensor:
        time, rows, columns = self.compute_grid(pixel_values) if grid is None else grid
        batch, _, channels = pixel_values.shape[:3]
        size = self.patch_size
        patches = pixel_values.reshape(batch, time, self.tubelet_size, channels, rows, size, columns, size)
        patches = patches.permute(0, 1, 4, 6, 3, 2, 5, 7)  # B, time, rows, columns, then the pixels of a patch
        if visible_indices is None:
            patches = patches.flatten(4).flatten(1, 3)
        else:
            batch_index = torch.arange(batch, device=visible_indices.device)[:, None]
            patch_index = visible_indices % (rows * columns)
            frame_index = visible_indices // (rows * columns)
            patches = patches[batch_index, frame_index, patch_index // columns, patch_index % columns].flatten(2)
        return self.projection(match_precision(patches, self.projection))


class UMTVideoEmbeddings(nn.Module):
    """Patch embeddings plus position table."""

    def __init__(self, config: UMTVideoConfig):
        super().__init__()
        self.patch_embeddings = UMTVideoPatchEmbeddings(config)
        self.grid = config.position_embedding_grid
        self.is_interpolated = config.position_embedding_frames is not None or config.learnable_position_embedding
        num_positions = self.grid[0] * self.grid[1] * self.grid[2]
        sinusoid_table = compute_sinusoid_table(num_positions, config.hidden_size)
        self.sinusoid_table = nn.Buffer(sinusoid_table.to(torch.get_default_device()), persistent=False)
        self.position_embeddings = None
        # CODEPATH: every released checkpoint has fixed sinusoids; a learnable table is for models trained anew.
        if config.learnable_position_embedding:
            self.position_embeddings = nn.Parameter(torch.empty(1, num_positions, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def compute_position_embeddings(
        self, grid: tuple[int, int, int], visible_indices: torch.Tensor | None = None, fixed: bool = False
    ) -> torch.Tensor:
        """Position table of a token grid, at the visible tokens alone if their indices are given.

        Args:
            grid: Time, rows and columns of the clip's tokens.
            visible_indices: `(B, V)`.
            fixed: Whether to use the sinusoids although the table is learnable.

        Returns:
            `(1, N, D)`, or `(B, V, D)` with indices.
        """
        table = self.sinusoid_table if fixed or self.position_embeddings is None else self.position_embeddings
        if self.is_interpolated:
            table = interpolate_position_table(table, self.grid, grid)
        else:
            table = self._get_fresh_table(grid[0] * grid[1] * grid[2])
        return table if visible_indices is None else table[0][visible_indices]

    def _get_fresh_table(self, num_positions: int) -> torch.Tensor:
        """Sinusoids of a token count, `(1, N, D)`, in the precision and on the device of the stored table.

        The stored table grows to the largest count seen and serves all smaller ones. It is not saved.
        """
        table = self.sinusoid_table
        if is_exporting() or (num_positions > table.shape[1] and torch.compiler.is_compiling()):
            # Within the graph: an exported one serves any count, and what a compiled one makes is not its to keep.
            device = "cpu" if table.device.type == "mps" else table.device  # MPS lacks float64
            return compute_sinusoid_table(num_positions, table.shape[-1], device).to(table)
        if num_positions > table.shape[1]:
            with torch.inference_mode(False):  # a table that was made for inference serves training as well
                table = compute_sinusoid_table(num_positions, table.shape[-1]).to(table)
                if type(table) is torch.Tensor:  # not a stand-in without values, from a mode that only counts
                    self.sinusoid_table = nn.Buffer(table, persistent=False)
        return table[:, :num_positions]

    def forward(
        self,
        pixel_values: torch.Tensor,
        visible_indices: torch.Tensor | None = None,
        grid: tuple[int, int, int] | None = None,
    ) -> torch.Tensor:
        if grid is None:
            grid = self.patch_embeddings.compute_grid(pixel_values)
        embeddings = self.patch_embeddings(pixel_values, visible_indices, grid)
        positions = self.compute_position_embeddings(grid, visible_indices)
        # In the parameters' precision, so that under autocast the residual stream stays float32, as published. To the
        # device of the patches, since a device map may place the table elsewhere.
        positions = match_precision(positions, self.patch_embeddings.projection).to(embeddings.device)
        return self.dropout(embeddings + positions)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with its probabilities written out, `(B, heads, V, head_dim)` in and `(B, V, heads, head_dim)` out."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class UMTVideoAttention(nn.Module):
    """Multi-head self-attention over all tokens of a clip, with a bias on query and value only."""

    def __init__(self, config: UMTVideoConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qv_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qv_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(head_shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(head_shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(self, query, key, value, None, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(output.reshape(*input_shape, -1).contiguous()), weights


class UMTVideoMLP(nn.Module):
    """Two-layer perceptron, of the text tower as well."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class UMTVideoResidual(nn.Module):
    """Adds a branch to the residual stream: dropout, layer scale, and stochastic depth per clip.

    Source: Huang et al., "Deep Networks with Stochastic Depth", 2016; Touvron et al., "Going deeper with Image
    Transformers", 2021 (layer scale).
    """

    def __init__(self, config: UMTVideoConfig, drop_path: float):
        super().__init__()
        self.drop_path = drop_path
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layer_scale = None
        # CODEPATH: no released checkpoint has layer scale; it is an option of the published code for new models.
        if config.layer_scale_init_value > 0:
            self.layer_scale = nn.Parameter(torch.full((config.hidden_size,), float(config.layer_scale_init_value)))

    def forward(self, residual: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        branch = self.dropout(branch)
        if self.layer_scale is not None:
            branch = branch * self.layer_scale
        # Scaled up where it stays, so that the mean over draws is the branch itself.
        if self.training and self.drop_path > 0:
            keep = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= self.drop_path
            branch = branch * keep.to(branch.dtype) / (1 - self.drop_path)
        return residual + branch


class UMTVideoLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer."""

    def __init__(self, config: UMTVideoConfig, drop_path: float = 0.0):
        super().__init__()
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = UMTVideoAttention(config)
        self.attention_residual = UMTVideoResidual(config, drop_path)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = UMTVideoMLP(config)
        self.mlp_residual = UMTVideoResidual(config, drop_path)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attention_output, _ = self.attention(self.layernorm_before(hidden_states), **kwargs)
        hidden_states = self.attention_residual(hidden_states, attention_output)
        return self.mlp_residual(hidden_states, self.mlp(self.layernorm_after(hidden_states)))


class UMTVideoAlignmentHead(nn.Module):
    """Projects the tokens of one student layer to a teacher's feature space, of width `teacher_hidden_size`."""

    def __init__(self, config: UMTVideoConfig, teacher_hidden_size: int | None = None):
        super().__init__()
        width = teacher_hidden_size or config.teacher_hidden_size
        self.dense = UMTFloatLinear(config.hidden_size, width)
        self.norm = nn.LayerNorm(width, eps=config.alignment_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.norm(self.dense(hidden_states))


class UMTVideoAttentivePooling(nn.Module):
    """One vector of a clip `(B, D)`: what a learned query finds among its normalised tokens `(B, N, D)`.

    Source: Chen et al., "Context Autoencoder for Self-Supervised Representation Learning", 2023 (attentive probing).
    """

    def __init__(self, config: UMTVideoConfig):
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        # Learned as it is: a projection of it would be one more learned vector.
        self.query = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.key = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(tokens)
        query, key, value = (
            states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for states in (self.query.expand(tokens.shape[0], -1, -1), self.key(tokens), self.value(tokens))
        )
        pooled = F.scaled_dot_product_attention(query, key, value)
        return self.dense(pooled.flatten(1))


class UMTVideoClassifier(UMTFloatLinear):
    """Linear head whose initial weights are near zero, so that all classes start equal (as published)."""


def select_vision_config(config: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The video encoder's part of a configuration with text, and the options that are not fields of it.

    Auto classes hand over the configuration of the folder. Labels, precision and quantisation, which they set on it,
    go on to its part; any other configuration, path or `None` stays as it is.
    """
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return config, options
    vision = copy.deepcopy(vision)
    for name in ("dtype", "problem_type", "quantization_config"):
        if getattr(config, name, None) is not None:
            setattr(vision, name, getattr(config, name))
    # CODEPATH: stage-2 folders have no labels but what a caller gives, and an encoder from a classifier keeps its own.
    if config.id2label != UMTVideoConfig().id2label:
        vision.id2label, vision.label2id = config.id2label, config.label2id
    vision.name_or_path = config.name_or_path
    known = type(vision).__dataclass_fields__.keys() - {"dtype"}  # which may be "auto", as loading understands it
    fields = {name: value for name, value in options.items() if name in known}
    for name, value in fields.items():
        setattr(vision, name, value)
    return vision, {name: value for name, value in options.items() if name not in fields}


class UMTVideoPreTrainedModel(UMTQuantizationMixin, PreTrainedModel):
    """Weight initialisation and what Transformers needs to know about the family."""

    config: UMTVideoConfig  # pyrefly: ignore[bad-override-mutable-attribute]  how a model names its configuration's class
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ["video"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["UMTVideoLayer"]
    _input_embed_layer = "patch_embeddings"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": UMTVideoLayer, "attentions": UMTVideoAttention}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """Load a model as Transformers does; the configuration may be that of a model with text."""
        config, kwargs = select_vision_config(config, kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        config, kwargs = select_vision_config(config, kwargs)
        return super()._from_config(config, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, UMTVideoClassifier):
            init.trunc_normal_(module.weight, std=self.config.initializer_range * 1e-3)
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
        elif isinstance(module, UMTVideoEmbeddings):
            _, num_positions, width = module.sinusoid_table.shape
            init.copy_(module.sinusoid_table, compute_sinusoid_table(num_positions, width))
            if module.position_embeddings is not None:
                init.trunc_normal_(module.position_embeddings, std=self.config.initializer_range)
        elif isinstance(module, UMTVideoAttentivePooling):
            init.trunc_normal_(module.query, std=self.config.initializer_range)
        elif isinstance(module, UMTVideoResidual) and module.layer_scale is not None:
            init.constant_(module.layer_scale, self.config.layer_scale_init_value)
        watch_fresh_head(self, module)


class UMTVideoModel(UMTVideoPreTrainedModel):
    """UMT video encoder without a head.

    Loads the encoder of any UMT folder: stage 1, fine-tuned, stage 2, retrieval or question answering.

    Examples:
        >>> import torch
        >>> from umt_hf import UMTVideoConfig, UMTVideoModel
        >>> config = UMTVideoConfig(hidden_size=48, num_hidden_layers=2)
        >>> model = UMTVideoModel(config).eval()
        >>> clip = torch.randn(1, 8, 3, 224, 224)  # 8 x 14 x 14 tokens
        >>> outputs = model(clip)
        >>> outputs.last_hidden_state.shape, outputs.pooler_output.shape
        (torch.Size([1, 1568, 48]), torch.Size([1, 48]))
        >>> model = UMTVideoModel.from_pretrained("umt-vit-b16")
    """

    _keys_to_ignore_on_load_unexpected = [r"alignment_heads\."]

    def __init__(self, config: UMTVideoConfig):
        super().__init__(config)
        self.embeddings = UMTVideoEmbeddings(config)
        last = max(config.num_hidden_layers - 1, 1)
        self.layers = nn.ModuleList(
            UMTVideoLayer(config, config.drop_path_rate * i / last) for i in range(config.num_hidden_layers)
        )
        # CODEPATH: released classifiers have no norm on tokens; stage-1, stage-2 and detection checkpoints have it.
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.use_final_norm else None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The module that turns pixels into tokens."""
        return self.embeddings.patch_embeddings

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        visible_indices: torch.Tensor | None = None,
        output_aligned_states: bool = False,
        token_grid: tuple[int, int, int] | None = None,
        saliency: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UMTVideoModelOutput:
        """Encode a clip, or the visible part of it.

        Args:
            pixel_values: Normalised video `(B, T, channels, height, width)`; any frame count that `tubelet_size`
                divides and any size that `patch_size` divides.
            bool_masked_pos: Boolean mask `(B, N)`, `True` = hidden, with the same count in every row. Tokens are
                ordered frame by frame, row by row.
            visible_indices: Indices of the visible tokens `(B, V)` instead of the mask: static shapes, for
                `torch.compile`.
            output_aligned_states: Whether to return the aligned layers' outputs as well.
            token_grid: Time, rows and columns of the clip's tokens, where the caller has checked clip and
                `visible_indices` already, as the heads do.
            saliency: With `config.token_selector="teacher_saliency"` and `config.keep_ratio` below 1, that of
                [`UMTTeacher`] for these clips, `(B * T, patches)`; it chooses the tokens that are kept.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`, and arguments of the attention.

        Returns:
            [`UMTVideoModelOutput`] with `last_hidden_state (B, V, D)` and its mean over tokens,
            `pooler_output (B, D)`. Without mask and indices V is all tokens, or the share `config.keep_ratio` of them.

        Raises:
            ValueError: If the clip does not fit the patch grid or the mask does not fit the clip.
        """
        if token_grid is None:
            token_grid, visible_indices = self.resolve_tokens(pixel_values, bool_masked_pos, visible_indices)
        elif bool_masked_pos is not None:
            raise ValueError("With token_grid, give visible_indices instead of bool_masked_pos.")
        kept = self._keep_tokens(pixel_values, token_grid, saliency) if visible_indices is None else None
        visible_indices = visible_indices if kept is None else kept
        hidden_states = self.embeddings(pixel_values, visible_indices, token_grid)
        aligned_indices = self.config.aligned_layer_indices if output_aligned_states else []
        aligned = []
        for i, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, **kwargs)
            if i in aligned_indices:
                aligned.append(self._normalize(hidden_states))
        hidden_states = self._normalize(hidden_states)
        return UMTVideoModelOutput(
            last_hidden_state=hidden_states,
            pooler_output=hidden_states.mean(dim=1),
            aligned_hidden_states=torch.stack(aligned) if aligned else None,
            kept_indices=kept,
        )

    def resolve_tokens(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        visible_indices: torch.Tensor | None = None,
    ) -> tuple[tuple[int, int, int], torch.Tensor | None]:
        """Check a clip and its mask or indices: its token grid, and the indices of its visible tokens, if not all.

        Raises:
            ValueError: If the clip does not fit the patch grid or the mask does not fit the clip.
        """
        time, rows, columns = self.embeddings.patch_embeddings.compute_grid(pixel_values)
        num_tokens = time * rows * columns
        visible_indices = resolve_visible_indices(bool_masked_pos, visible_indices, pixel_values.shape[0], num_tokens)
        return (time, rows, columns), visible_indices

    def _keep_tokens(
        self, pixel_values: torch.Tensor, grid: tuple[int, int, int], saliency: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Indices of the tokens that the configuration keeps, `(B, V)`; `None` where it keeps all."""
        config = self.config
        # CODEPATH: all released checkpoints keep every token; a smaller share is asked for when a model is loaded.
        if config.keep_ratio == 1:
            return None
        return select_tokens(
            pixel_values, grid, config.keep_ratio, config.token_selector, config.token_selector_seed, saliency
        )

    def _normalize(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states if self.norm is None else self.norm(hidden_states)


def project_aligned_states(
    heads: nn.ModuleList, states: torch.Tensor, positions: torch.Tensor, norm: str
) -> torch.Tensor:
    """Bring the aligned layers' outputs to the teacher's space, each by a head, with positions added.

    Args:
        heads: K alignment heads.
        states: `(K, B, V, D)`.
        positions: Sinusoids of the visible tokens `(B, V, D)`, or of all `(1, N, D)`.
        norm: "l2" or "none".

    Returns:
        Normalised features `(K, B, V, C)`, float32.
    """
    positions = positions.to(states.dtype)
    features = torch.stack([head(state + positions) for head, state in zip(heads, states, strict=True)])
    return normalize_features(features, norm)


def select_targets(
    teacher_features: torch.Tensor, visible_indices: torch.Tensor | None, grid: tuple[int, int, int]
) -> torch.Tensor:
    """Teacher's features at the visible tokens, `(K, B, V, C)`, from those or from features at all tokens."""
    if visible_indices is None:
        return teacher_features
    num_tokens = grid[0] * grid[1] * grid[2]
    covers_all = teacher_features.shape[2] == num_tokens != visible_indices.shape[1]
    return gather_tokens(teacher_features, visible_indices) if covers_all else teacher_features


class UMTVideoForPreTraining(UMTVideoPreTrainedModel):
    """UMT stage 1: the encoder sees the visible tokens and aligns its last layers with a frozen teacher's on them.

    The teacher is not part of the model: see [`UMTTeacher`]. With `config.other_teachers` it aligns them with several,
    with a set of heads for each.

    Examples:
        >>> import torch
        >>> from umt_hf import UMTTeacher, UMTVideoForPreTraining
        >>> model = UMTVideoForPreTraining.from_pretrained("umt-vit-b16")
        >>> name, layers = model.config.teacher_name_or_path, len(model.alignment_heads)
        >>> teacher = UMTTeacher.from_pretrained(name, num_aligned_layers=layers)
        >>> clip = torch.randn(1, 8, 3, 224, 224)
        >>> hidden = torch.arange(1568)[None] % 4 > 0  # 3 of 4 tokens
        >>> outputs = model(clip, hidden, teacher(clip).features)
        >>> outputs.aligned_features.shape[1:]  # at the 392 others
        torch.Size([1, 392, 512])
        >>> outputs.loss.backward()
    """

    # Of a folder that several teachers trained, where it is trained further with the first one.
    _keys_to_ignore_on_load_unexpected = [r"^other_alignment_heads\."]

    def __init__(self, config: UMTVideoConfig):
        super().__init__(config)
        self.vision_model = UMTVideoModel(config)
        layers = config.aligned_layer_indices
        self.alignment_heads = nn.ModuleList(UMTVideoAlignmentHead(config) for _ in layers)
        # CODEPATH: every released checkpoint has one teacher; several are for students trained anew.
        self.other_alignment_heads = nn.ModuleList(
            nn.ModuleList(UMTVideoAlignmentHead(config, teacher["hidden_size"]) for _ in layers)
            for teacher in config.other_teachers or []
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        teacher_features: torch.Tensor | Sequence[torch.Tensor] | None = None,
        visible_indices: torch.Tensor | None = None,
        normalize_teacher_features: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UMTVideoForPreTrainingOutput:
        """Compute the student's aligned features and, with a teacher's, the alignment loss.

        Args:
            pixel_values: Normalised video `(B, T, channels, height, width)`.
            bool_masked_pos: Boolean mask `(B, N)`, `True` = hidden, with the same count in every row.
            teacher_features: Teacher's features `(K, B, V, C)` at the visible tokens in raster order, or
                `(K, B, N, C)` at all tokens, of which the visible ones are gathered; with `config.other_teachers` a
                list of those of each teacher.
            visible_indices: Indices of the visible tokens `(B, V)` instead of the mask.
            normalize_teacher_features: Whether to normalise `teacher_features` as the student's are. `False` for those
                of [`UMTTeacher`], which come normalised.
            **kwargs: As for [`UMTVideoModel`].

        Returns:
            [`UMTVideoForPreTrainingOutput`]; no loss without `teacher_features`.

        Raises:
            ValueError: If the features' shape fits neither, they are of another number of teachers, or
                `tubelet_size > 1` meets a frame-wise teacher.

        Source: Li et al., "Unmasked Teacher", ICCV 2023, section 3.1.
        """
        if teacher_features is not None and self.config.tubelet_size > 1:
            raise ValueError(
                f"tubelet_size={self.config.tubelet_size} leaves no token for each frame of the teacher; use 1."
            )
        grid, visible_indices = self.vision_model.resolve_tokens(pixel_values, bool_masked_pos, visible_indices)
        outputs = self.vision_model(
            pixel_values,
            visible_indices=visible_indices,
            output_aligned_states=True,
            token_grid=grid,
            **kwargs,
            return_dict=True,
        )
        if visible_indices is None:
            visible_indices = outputs.kept_indices
        positions = self.vision_model.embeddings.compute_position_embeddings(grid, visible_indices, fixed=True)
        others: Any = self.other_alignment_heads
        features = [
            project_aligned_states(heads, outputs.aligned_hidden_states, positions, self.config.alignment_norm)
            for heads in (self.alignment_heads, *others)
        ]
        losses = None
        if teacher_features is not None:
            given = [teacher_features] if isinstance(teacher_features, torch.Tensor) else teacher_features
            targets = [select_targets(one, visible_indices, grid) for one in given]
            if normalize_teacher_features:
                targets = [normalize_features(one, self.config.alignment_norm) for one in targets]
            losses = self._compare(features, targets)
        return UMTVideoForPreTrainingOutput(
            loss=None if losses is None else sum(losses[1:], losses[0]),
            aligned_features=features[0],
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            other_aligned_features=tuple(features[1:]) or None,
            teacher_losses=tuple(losses) if losses is not None and len(losses) > 1 else None,
        )

    def _compare(self, features: list[torch.Tensor], targets: list[torch.Tensor]) -> list[torch.Tensor]:
        """Weighted loss of each teacher, of normalised features and targets `(K, B, V, C)`."""
        if len(targets) != len(features):
            raise ValueError(
                f"teacher_features are those of {len(targets)} teachers, and the configuration names {len(features)}."
            )
        weights = self.config.teacher_weights or [1] * len(features)
        return [
            weight * uta_loss(*pair, norm="none", loss=self.config.alignment_loss)
            for weight, *pair in zip(weights, features, targets, strict=True)
        ]


def count_labels(config: UMTVideoConfig) -> int:
    """Number of classes of a head.

    Raises:
        ValueError: If the configuration leaves it open.
    """
    if config.num_labels is None:
        raise ValueError("The configuration has no labels: set num_labels or id2label.")
    return config.num_labels


class UMTVideoForVideoClassification(UMTVideoPreTrainedModel):
    """UMT encoder with a classifier on its tokens, pooled by `config.pooling_type` and then normalised.

    Examples:
        >>> from transformers import AutoVideoProcessor
        >>> from umt_hf import UMTVideoForVideoClassification
        >>> name = "umt-vit-b16-k400"
        >>> model = UMTVideoForVideoClassification.from_pretrained(name)
        >>> processor = AutoVideoProcessor.from_pretrained(name)
        >>> logits = model(**processor("video.mp4", return_tensors="pt")).logits
        >>> model.config.id2label[int(logits.argmax())]
        'riding a bike'
    """

    # A stage-1 folder has a norm on tokens and alignment heads; a classifier uses neither, as published.
    _keys_to_ignore_on_load_unexpected = [r"vision_model\.norm\.", r"alignment_heads\."]

    def __init__(self, config: UMTVideoConfig):
        # CODEPATH: stage-1 checkpoints have the norm on tokens and lose it here; released classifiers have none.
        if config.use_final_norm:
            config = copy.deepcopy(config)
            config.use_final_norm = False
        super().__init__(config)
        self.num_labels = count_labels(config)
        self.vision_model = UMTVideoModel(config)
        # CODEPATH: released classifiers pool by the mean; attentive probes are trained by users.
        self.attentive_pooling = UMTVideoAttentivePooling(config) if config.pooling_type == "attentive" else None
        self.fc_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.classifier = UMTVideoClassifier(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> ImageClassifierOutput:
        """Classify a clip.

        Args:
            pixel_values: Normalised video `(B, T, channels, height, width)`.
            labels: Class indices `(B,)`, or by `config.problem_type` regression or multi-label targets
                `(B, num_labels)`.
            **kwargs: As for [`UMTVideoModel`].

        Returns:
            `ImageClassifierOutput` with `logits (B, num_labels)` and, with labels, the loss.

        Source: Li et al., "Unmasked Teacher", ICCV 2023, section 4 (fine-tuning).
        """
        outputs = self.vision_model(pixel_values, **kwargs, return_dict=True)
        pooled = outputs.pooler_output
        if self.attentive_pooling is not None:
            pooled = self.attentive_pooling(outputs.last_hidden_state)
        logits = self.classifier(self.fc_norm(pooled))
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class UMTVideoForActionDetection(UMTVideoPreTrainedModel):
    """UMT encoder that predicts the actions in each given box of the key frame.

    The boxes are an input: they come from a person detector, or from the annotations. Tokens are averaged over time to
    a map, RoIAlign reads each box of it on a grid, and a linear head sees the maximum over the grid.

    Loaded from a stage-1 folder, `classifier` is fresh; from a classifier's folder, `norm` and `classifier` are.

    Examples:
        >>> import torch
        >>> from umt_hf import UMTVideoForActionDetection
        >>> name = "umt-vit-b16-ava"
        >>> model = UMTVideoForActionDetection.from_pretrained(name)
        >>> clip = torch.randn(1, 8, 3, 224, 224)
        >>> boxes = torch.tensor([[[20.0, 30, 120, 210], [90, 40, 200, 220]]])
        >>> model(clip, boxes).logits.shape  # two boxes, 80 actions
        torch.Size([1, 2, 80])
    """

    # A classifier's fc_norm comes after pooling, so it is not mapped to the norm on tokens, as published.
    _keys_to_ignore_on_load_unexpected = [r"alignment_heads\.", r"fc_norm\."]

    def __init__(self, config: UMTVideoConfig):
        requires_backends(self, ["torchvision"])
        # CODEPATH: released classifiers lack the norm on tokens and get a fresh one; all other checkpoints have it.
        if not config.use_final_norm:
            config = copy.deepcopy(config)
            config.use_final_norm = True
        super().__init__(config)
        self.num_labels = count_labels(config)
        self.vision_model = UMTVideoModel(config)
        self.classifier = UMTVideoClassifier(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        boxes: torch.Tensor,
        boxes_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UMTVideoForActionDetectionOutput:
        """Score the actions of each box.

        Args:
            pixel_values: Normalised video `(B, T, channels, height, width)`, the key frame in the middle.
            boxes: `(B, M, 4)` as x1, y1, x2, y2 in pixels of `pixel_values`; parts outside the frame are not seen.
            boxes_mask: Boolean `(B, M)`, `True` = a box, `False` = padding; default: all are boxes.
            labels: Targets in [0, 1], `(B, M, num_labels)`; several may be 1.
            **kwargs: As for [`UMTVideoModel`].

        Returns:
            [`UMTVideoForActionDetectionOutput`]. The loss is the binary cross entropy, averaged over the classes and
            summed over the boxes of the batch, as published.

        Raises:
            ValueError: If the shape of boxes, mask or labels does not fit.

        Source: Li et al., "Unmasked Teacher", ICCV 2023, section 4 (action detection on AVA).
        """
        self._check_boxes(pixel_values, boxes, boxes_mask, labels)
        grid, _ = self.vision_model.resolve_tokens(pixel_values)
        outputs = self.vision_model(pixel_values, token_grid=grid, **kwargs, return_dict=True)
        feature_map = build_feature_map(outputs.last_hidden_state, grid, outputs.kept_indices)
        if boxes_mask is not None:
            boxes = boxes.masked_fill(~boxes_mask.bool()[..., None], 0)
        pooled = pool_boxes(feature_map, boxes, 1 / self.config.patch_size)
        logits = self.classifier(match_precision(pooled, self.classifier))
        if boxes_mask is not None:
            logits = logits.masked_fill(~boxes_mask.bool()[..., None], 0)
        loss = None
        if labels is not None:
            losses = F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none").mean(dim=-1)
            loss = (losses if boxes_mask is None else losses.masked_fill(~boxes_mask.bool(), 0)).sum()
        return UMTVideoForActionDetectionOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _check_boxes(
        self,
        pixel_values: torch.Tensor,
        boxes: torch.Tensor,
        boxes_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
    ) -> None:
        batch = pixel_values.shape[0]
        if boxes.ndim != 3 or boxes.shape[0] != batch or boxes.shape[2] != 4:
            raise ValueError(
                f"boxes must be ({batch}, boxes of a clip, 4) as x1, y1, x2, y2, got {tuple(boxes.shape)}."
            )
        for name, tensor, wanted in (
            ("boxes_mask", boxes_mask, tuple(boxes.shape[:2])),
            ("labels", labels, (*boxes.shape[:2], self.num_labels)),
        ):
            if tensor is not None and tuple(tensor.shape) != wanted:
                raise ValueError(f"{name} must be {wanted}, got {tuple(tensor.shape)}.")


def pool_boxes(feature_map: torch.Tensor, boxes: torch.Tensor, scale: float) -> torch.Tensor:
    """Largest value of each channel among the points that RoIAlign reads in a box.

    Args:
        feature_map: `(B, D, rows, columns)`.
        boxes: `(B, M, 4)` as x1, y1, x2, y2.
        scale: Feature-map cells per pixel of the boxes (`spatial_scale` of RoIAlign).

    Returns:
        `(B, M, D)`, float32.

    Source: He et al., "Mask R-CNN", ICCV 2017; 7 x 7 points, adaptive sampling and no half-pixel shift, as published.
    """
    # In float32: RoIAlign has no bfloat16 kernel, and coordinates need the precision.
    pooled = roi_align(
        feature_map.float(), list(boxes.float()), ROI_SIZE, spatial_scale=scale, sampling_ratio=0, aligned=False
    )
    return pooled.amax(dim=(2, 3)).unflatten(0, boxes.shape[:2])


__all__ = [
    "UMTVideoForActionDetection",
    "UMTVideoForPreTraining",
    "UMTVideoForVideoClassification",
    "UMTVideoModel",
    "UMTVideoPreTrainedModel",
]
