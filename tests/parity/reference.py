"""Reads the stored outputs of the published implementation."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

FIXTURES = Path(__file__).parent.parent / "fixtures" / "single_modality"


def load_table(name: str) -> dict:
    return json.loads((FIXTURES / f"{name}.json").read_text())


def load_case(name: str) -> tuple[dict, dict[str, dict[str, torch.Tensor]]]:
    """Description of a case, and its tensors by group: weights, inputs, outputs, grads."""
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(FIXTURES / f"{name}.safetensors").items():
        group, rest = key.split("/", 1)
        groups.setdefault(group, {})[rest] = tensor
    return load_table(name), groups
