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
"""Configuration of the UMT video encoder: fields, checks and the grid sizes derived from them."""

import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

SIZES = (
    "image_size", "patch_size", "num_channels", "num_frames", "tubelet_size", "hidden_size", "num_hidden_layers",
    "num_attention_heads", "intermediate_size", "position_embedding_frames", "position_embedding_image_size",
    "num_aligned_layers", "teacher_hidden_size", "teacher_image_size",
)  # fmt: skip
OTHER_TEACHER = {"name_or_path", "image_size", "hidden_size"}


@strict
class UMTVideoConfig(PreTrainedConfig):
    """Configuration of [`UMTVideoModel`] and its heads.

    The defaults are UMT ViT-B/16 as pre-trained on 8 frames of 224 x 224 pixels with CLIP ViT-B/16 as teacher.

    Attributes:
        image_size: Side of the square input in training, in pixels; other sizes work too.
        patch_size: Side of a square patch, in pixels.
        num_channels: Colour channels of a frame.
        num_frames: Frames per clip in training; other counts work too.
        tubelet_size: Frames per token.
        hidden_size: Width of the encoder.
        num_hidden_layers: Transformer layers.
        num_attention_heads: Attention heads per layer.
        intermediate_size: Width of the MLP's hidden layer.
        hidden_act: Activation of the MLP.
        hidden_dropout_prob: Dropout after the attention and MLP outputs.
        attention_probs_dropout_prob: Dropout on the attention probabilities.
        drop_path_rate: Stochastic depth of the last layer; it grows linearly from 0 at the first.
        initializer_range: Standard deviation of the truncated normal that initialises heads and learnable tables.
        layer_norm_eps: Epsilon of every LayerNorm of the encoder.
        qv_bias: Whether query and value projections have a bias. The key projection never has one.
        layer_scale_init_value: Initial value of the learnable residual scales; 0 leaves them out.
        use_final_norm: Whether a LayerNorm follows the last layer. Classifiers normalise after pooling instead.
        position_embedding_frames: Frames of the grid whose position table is interpolated to other shapes. `None`,
            together with `position_embedding_image_size=None`, computes a fresh sinusoid table for each input's own
            tokens, which is what stage 2, retrieval and question answering do.
        position_embedding_image_size: Side of that grid, in pixels.
        learnable_position_embedding: Whether the table is a trained parameter instead of fixed sinusoids.
        pooling_type: How a video classifier makes one vector of the tokens: "mean" as published, or "attentive", a
            learned query that attends to them.
        num_aligned_layers: How many layers are aligned with the teacher's, counted from the last.
        alignment_interval: Step between aligned layers, 1 for neighbours.
        teacher_hidden_size: Width of the teacher's features, 512 for CLIP-B/16 and 768 for CLIP-L/14.
        alignment_norm: Normalisation of student and teacher features: "l2" or "none".
        alignment_norm_eps: Epsilon of the LayerNorm in the alignment heads (1e-6 in stage 1, 1e-5 in stage 2).
        alignment_loss: Distance between features: "l2", "mse" or "smooth_l1".
        mask_type: How the hidden tokens of a video are chosen: "attention", "tube" or "random".
        mask_ratio: Share of video tokens hidden in pre-training, in [0, 1).
        image_mask_ratio: Share of image tokens hidden in stage 2, in [0, 1).
        teacher_name_or_path: Hub id or folder of the teacher: a CLIP, SigLIP, DINO, ...
        teacher_image_size: Side of the frames the teacher sees, in pixels (196 for CLIP-L/14, so that grids agree).
        other_teachers: Further teachers, which draw no masks: of each its `name_or_path`, `image_size` and
            `hidden_size`, as the three fields above say them of the first.
        teacher_weights: Weight of the loss of each teacher; `None` is 1 for each.
        keep_ratio: Share of the tokens of each frame that the model sees where a call gives neither mask nor indices,
            in (0, 1]: fewer are faster and less accurate. It may be set when loading, as any field, and is saved.
        token_selector: Which ones are kept: "random" (the same places for every clip), "frame_difference" (those that
            change most from frame to frame) or "teacher_saliency" (those that a teacher attends to; the call gives
            its `saliency`).
        token_selector_seed: Of the random choice, which also decides among equal tokens.

    Raises:
        ValueError: If a size, rate or choice is outside its range, or sizes do not divide one another.

    Source: Li et al., "Unmasked Teacher", ICCV 2023, section 3; published recipes for the values.

    Examples:
        >>> from umt_hf import UMTVideoConfig, UMTVideoModel
        >>> config = UMTVideoConfig(num_frames=16, mask_ratio=0.9)
        >>> config.hidden_size, config.num_hidden_layers
        (768, 12)
        >>> small = UMTVideoConfig(hidden_size=48, num_hidden_layers=2)
        >>> model = UMTVideoModel(small)  # with random weights
    """

    model_type = "umt_video"
    base_config_key = "vision_config"
    base_model_tp_plan = {
        "layers.*.attention.q_proj": "colwise",
        "layers.*.attention.k_proj": "colwise",
        "layers.*.attention.v_proj": "colwise",
        "layers.*.attention.o_proj": "rowwise",
        "layers.*.mlp.fc1": "colwise",
        "layers.*.mlp.fc2": "rowwise",
    }
    base_model_fsdp_plan = {"layers.*": "free_full_weight", "norm": "keep_full_weight"}

    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    num_frames: int = 8
    tubelet_size: int = 1
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    initializer_range: float | int = 0.02
    layer_norm_eps: float | int = 1e-6
    qv_bias: bool = True
    layer_scale_init_value: float | int = 0.0
    use_final_norm: bool = True
    position_embedding_frames: int | None = 8
    position_embedding_image_size: int | None = 224
    learnable_position_embedding: bool = False
    pooling_type: Literal["mean", "attentive"] = "mean"
    num_aligned_layers: int = 6
    alignment_interval: float | int = 1
    teacher_hidden_size: int = 512
    alignment_norm: Literal["l2", "none"] = "l2"
    alignment_norm_eps: float | int = 1e-6
    alignment_loss: Literal["l2", "mse", "smooth_l1"] = "l2"
    mask_type: Literal["attention", "tube", "random"] = "attention"
    mask_ratio: float | int = 0.8
    image_mask_ratio: float | int = 0.5
    teacher_name_or_path: str = "openai/clip-vit-base-patch16"
    teacher_image_size: int = 224
    other_teachers: list[dict[str, Any]] | None = None
    teacher_weights: list[float | int] | None = None
    keep_ratio: float | int = 1.0
    token_selector: Literal["random", "frame_difference", "teacher_saliency"] = "frame_difference"
    token_selector_seed: int = 0

    def validate_architecture(self) -> None:
        """Check the range of each field, and how they fit together."""
        check_ranges(
            self,
            sizes=SIZES,
            shares=(
                "hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "mask_ratio",
                "image_mask_ratio",
            ),
            positive=("layer_norm_eps", "alignment_norm_eps", "alignment_interval"),
            not_negative=("initializer_range", "layer_scale_init_value", "token_selector_seed"),
        )  # fmt: skip
        require_keep_ratio(self.keep_ratio)
        for teacher in self.other_teachers or []:
            if teacher.keys() != OTHER_TEACHER:
                raise ValueError(f"other_teachers need {', '.join(sorted(OTHER_TEACHER))} each, got {teacher}.")
        require_teacher_weights(self.teacher_weights, 1 + len(self.other_teachers or []))
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}."
            )
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}.")
        if self.num_frames % self.tubelet_size:
            raise ValueError(f"num_frames={self.num_frames} is not a multiple of tubelet_size={self.tubelet_size}.")
        frames, size = self.position_embedding_frames, self.position_embedding_image_size
        if (frames is None) != (size is None):
            raise ValueError(
                "position_embedding_frames and position_embedding_image_size are both numbers (a table that is "
                f"interpolated) or both None (a table computed afresh), got {frames} and {size}."
            )
        if frames is not None and size is not None and (frames % self.tubelet_size or size % self.patch_size):
            raise ValueError(
                f"position_embedding_frames={frames} and position_embedding_image_size={size} are not multiples of "
                f"tubelet_size={self.tubelet_size} and patch_size={self.patch_size}."
            )

    @property
    def position_embedding_grid(self) -> tuple[int, int, int]:
        """Time, rows and columns of the stored position table, in tokens."""
        frames = self.position_embedding_frames or self.num_frames
        side = (self.position_embedding_image_size or self.image_size) // self.patch_size
        return frames // self.tubelet_size, side, side

    @property
    def aligned_layer_indices(self) -> list[int]:
        """Layers aligned with the teacher, shallowest first: `depth - 1 - int(i * interval)`, i-th from the end.

        Raises:
            ValueError: If the interval leads below the first layer.
        """
        return select_aligned_layers(self.num_hidden_layers, self.num_aligned_layers, self.alignment_interval)


def check_ranges(
    config: Any,
    sizes: tuple[str, ...] = (),
    shares: tuple[str, ...] = (),
    positive: tuple[str, ...] = (),
    not_negative: tuple[str, ...] = (),
) -> None:
    """Check fields of a configuration one by one.

    Args:
        config: Has the fields.
        sizes: Names of those that are 1 or more, or `None`.
        shares: Of those in [0, 1).
        positive: Of those above 0.
        not_negative: Of those that are 0 or more.

    Raises:
        ValueError: If one is outside its range, infinite or NaN.
    """
    for name in sizes:
        if (value := getattr(config, name)) is not None and value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}.")
    for name in shares:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} must be in [0, 1), got {getattr(config, name)}.")
    for name in positive:
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be above 0, got {getattr(config, name)}.")
    for name in not_negative:
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be 0 or more, got {getattr(config, name)}.")


def require_keep_ratio(keep_ratio: float) -> None:
    """Check a share of tokens.

    Raises:
        ValueError: If it is outside (0, 1].
    """
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio must be above 0 and at most 1, got {keep_ratio}.")


def require_teacher_weights(weights: list[float | int] | None, num_teachers: int) -> None:
    """Check the weights of the teachers' losses.

    Raises:
        ValueError: If there are others than one for each teacher, or one is not positive.
    """
    if weights is None:
        return
    if len(weights) != num_teachers:
        raise ValueError(
            f"teacher_weights has {len(weights)} values and there are {num_teachers} teachers: give one for each."
        )
    if any(not 0 < weight < math.inf for weight in weights):
        raise ValueError(f"teacher_weights must be positive, got {weights}.")


def select_aligned_layers(num_hidden_layers: int, num_aligned_layers: int, interval: float) -> list[int]:
    """Choose the layers that student and teacher compare, by the same rule for both.

    Args:
        num_hidden_layers: Depth of the network.
        num_aligned_layers: How many layers to take, counted from the last.
        interval: Step between them; fractions are cut.

    Returns:
        Layer indices from 0, shallowest first.

    Raises:
        ValueError: If fewer layers exist than are asked for.
    """
    indices = [num_hidden_layers - 1 - int(i * interval) for i in reversed(range(num_aligned_layers))]
    if not indices or indices[0] < 0:
        raise ValueError(
            f"{num_aligned_layers} aligned layers at interval {interval} do not fit a network of {num_hidden_layers} "
            "layers. Lower num_aligned_layers or alignment_interval."
        )
    return indices


__all__ = ["UMTVideoConfig"]
