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
"""What quantised loads leave in floating point, and how the layers around quantised ones choose their precision."""

from typing import Any

import torch
from torch import nn

# Linear layers that stay in floating point when a model is quantised, as patterns over the complete names of modules:
# the first layer, which sees pixels, and the last ones, whose outputs users read.
NEVER_QUANTIZED = tuple(
    rf"(?:.*\.)?{name}"
    for name in (
        r"patch_embeddings\.projection",
        r"classifier",
        r"(?:other_)?alignment_heads(?:\.\d+)+\.dense",
        r"video_projection",
        r"text_projection",
        r"matching_head",
        r"mlm_head\.decoder",
        r"lm_head\.decoder",
    )
)
# Numbers that a layer computes with; others (integers, 8-bit floats) only store what a quantised layer unpacks.
COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class UMTFloatLinear(nn.Linear):
    """Linear layer that quantisers leave in floating point: they go by type, or by the models' list of names."""


class UMTQuantizationMixin:
    """Base of all our models: says which layers quantised loads keep in floating point.

    Transformers hands `_keep_in_fp32_modules` to every quantiser as modules that are not converted, beside those that
    the caller names. In other loads that list would mean float32 in place of float16, so it is filled once a quantiser
    has set `is_quantized`, which is the first that it does.
    """

    _keep_in_fp32_modules: Any
    _has_quantizer = False

    @property
    def is_quantized(self) -> bool:
        """Whether a quantiser of Transformers has this model in hand."""
        return self._has_quantizer

    @is_quantized.setter
    def is_quantized(self, value: bool) -> None:
        self._has_quantizer = value
        if value:
            self._keep_in_fp32_modules = {*(self._keep_in_fp32_modules or ()), *NEVER_QUANTIZED}

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict:
        """Precision by name; the layers that are not quantised have that of the others."""
        plan = super()._get_dtype_plan(dtype)  # pyrefly: ignore[missing-attribute]  of PreTrainedModel
        return {name: kept for name, kept in plan.items() if name not in NEVER_QUANTIZED}


def match_precision(states: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """Bring states to the precision in which a linear layer holds its numbers.

    Args:
        states: Any shape.
        layer: Linear layer; a quantised one may hold packed bits, or functions instead of tensors.

    Returns:
        The states in the precision of the weight, or of the bias where the weight is quantised. As they are, where
        both are: such layers cast by themselves.
    """
    for parameter in (layer.weight, layer.bias):
        if isinstance(parameter, torch.Tensor) and parameter.dtype in COMPUTE_DTYPES:
            return states.to(parameter.dtype)
    return states


__all__ = ["UMTFloatLinear", "UMTQuantizationMixin", "match_precision"]
