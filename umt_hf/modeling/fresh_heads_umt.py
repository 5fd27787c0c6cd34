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
"""Heads that nobody has trained yet say so: once, when they first answer."""

from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

logger = logging.get_logger(__name__)

# From the model whose part they are. Of a language-modelling head, the layer that is not shared with the embeddings.
HEADS = ("classifier", "attentive_pooling", "matching_head", "mlm_head.dense", "lm_head.dense")
FRESH = "is_fresh"
# Counts the changes in place that PyTorch has seen: an optimizer and `load_state_dict` make them.
VERSION = "fresh_version"


def watch_fresh_head(model: PreTrainedModel, module: nn.Module) -> None:
    """Let a head warn at its first forward in evaluation mode, if it was just drawn at random.

    To be called at the end of `_init_weights`, which Transformers calls for all modules of a new model, and for those
    of a loaded one with the loaded parameters marked.

    Args:
        model: The model that initialises.
        module: What was initialised; only heads are watched.
    """
    name = next((name for name in HEADS if _find_part(model, name) is module), None)
    if name is None or all(getattr(p, "_is_hf_initialized", False) for p in module.parameters(recurse=False)):
        return
    if not hasattr(module, FRESH):
        module.register_forward_pre_hook(_warn_if_fresh)
    setattr(module, FRESH, f"{name.split('.')[0]} of {type(model).__name__}")
    for parameter in module.parameters(recurse=False):
        if not parameter.is_inference():
            setattr(parameter, VERSION, parameter._version)


def _find_part(model: nn.Module, name: str) -> Any:
    part: Any = model
    for attribute in name.split("."):
        part = getattr(part, attribute, None)
    return part


def _warn_if_fresh(module: nn.Module, _inputs: Any) -> None:
    # A compiled graph holds nothing of this.
    if torch.compiler.is_compiling() or not getattr(module, FRESH):
        return
    parameters = list(module.parameters(recurse=False))
    if any(parameter.is_meta for parameter in parameters):
        return
    name = getattr(module, FRESH)
    setattr(module, FRESH, None)  # once, and never again after training
    # A copy or a file starts to count anew.
    is_changed = any(
        not parameter.is_inference() and parameter._version > getattr(parameter, VERSION, 0)
        for parameter in parameters
    )
    if not module.training and not is_changed:
        logger.warning(
            "%s is not trained: its weights were drawn at random just now, and its outputs mean nothing. Train it, or "
            "load a folder that holds it.",
            name,
        )
