# Copyright 2026 The umt_hf authors. Licensed under the Apache License, Version 2.0.
"""The frozen teacher in 8 bits, by torchao: nothing flows back through it, so its matrix products may be coarser."""

import importlib
import importlib.util
from typing import Any

import torch
from torch import nn

from .teacher import UMTTeacher

# As torchao and Transformers' `TorchAoConfig` name them.
CONFIGS = {
    "int8_weight_only": "Int8WeightOnlyConfig",
    "int8_dynamic": "Int8DynamicActivationInt8WeightConfig",
    "fp8_dynamic": "Float8DynamicActivationFloat8WeightConfig",
}
FP8_CAPABILITY = (8, 9)


def require_quantization(name: str, device: torch.device) -> None:
    """Refuse what cannot run here, before anything is loaded.

    Args:
        name: One of `CONFIGS`.
        device: Where the teacher will run.

    Raises:
        ImportError: If torchao is missing.
        ValueError: If the name is unknown, or the device has no products in fp8.
    """
    if name not in CONFIGS:
        raise ValueError(f"teacher_quantization must be one of {', '.join(CONFIGS)}, got {name!r}.")
    if importlib.util.find_spec("torchao") is None:
        raise ImportError(
            f"teacher_quantization={name} needs torchao, which is not installed: pip install 'umt_hf[quantization]'."
        )
    if name == "fp8_dynamic" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < FP8_CAPABILITY):
        raise ValueError(
            "teacher_quantization=fp8_dynamic needs a GPU of compute capability 8.9 or more, and this run is on "
            f"{device}: choose int8_dynamic, or leave it out."
        )


def quantize_teacher(teacher: UMTTeacher, name: str) -> None:
    """Put the linear maps of a teacher's layers into 8 bits, in place.

    Its embeddings, norms and the projection that gives the features stay in floating point.

    Args:
        teacher: On its device.
        name: "int8_weight_only", "int8_dynamic" (weights and activations) or "fp8_dynamic" (likewise).

    Raises:
        ImportError: If torchao is missing.
        ValueError: If the name is unknown, or the device has no products in fp8.
    """
    require_quantization(name, next(teacher.parameters()).device)
    torchao: Any = importlib.import_module("torchao.quantization")
    layers = teacher.layers
    torchao.quantize_(layers, getattr(torchao, CONFIGS[name])(), filter_fn=_is_linear)
    teacher.requires_grad_(False)


def _is_linear(module: nn.Module, _: str) -> bool:
    return isinstance(module, nn.Linear)


__all__ = ["quantize_teacher"]
