"""Parameter groups, layer-wise learning-rate decay and schedules, as pure functions."""

import math
import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from .arguments import PretrainingArguments

ScheduleType = Literal["cosine_to_minimum", "cosine_above_minimum"]

# Of several dimensions, and yet not matrices.
NO_DECAY_NAMES = ("position_embeddings", "cls_token")
# A scalar in the published code, which therefore decays it; ours has one element.
DECAY_NAMES = ("temperature",)


def build_parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float | None = None) -> list[dict]:
    """Group trainable parameters by weight decay and, with `layer_decay`, by depth.

    One-dimensional tensors, biases and a video encoder's position table are not decayed, a temperature is. With layer
    decay `d` and L layers, patch embedding and position table have depth 0, layer `i` has depth `i + 1` and all else
    depth `L + 1`; a group's `lr_scale` is `d ** (L + 1 - depth)`.

    Args:
        model: Network with its layers under `layers.<i>`.
        weight_decay: Decay of the other tensors.
        layer_decay: Factor between neighbouring layers in (0, 1], or `None`.

    Returns:
        Dicts with `params`, `names`, `weight_decay`, `lr_scale` and `name`, in order of first appearance.

    Source: Li et al., "Unmasked Teacher", ICCV 2023, fine-tuning settings; Bao et al., "BEiT", 2022 (layer decay).

    Examples:
        >>> from umt_hf import UMTVideoConfig, UMTVideoModel
        >>> from umt_hf.training.optimization import build_parameter_groups
        >>> config = UMTVideoConfig(hidden_size=48, num_hidden_layers=2)
        >>> model = UMTVideoModel(config)
        >>> groups = build_parameter_groups(model, 0.05, layer_decay=0.75)
        >>> sorted({group["lr_scale"] for group in groups})
        [0.421875, 0.5625, 0.75, 1.0]
    """
    depth = 1 + max((int(m[1]) for name, _ in model.named_parameters() if (m := _match_layer(name))), default=-1)
    groups: dict[str, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # By dimension and not by module: norms and biases have one, whatever they are called.
        own_name = name.rsplit(".", 1)[-1]
        is_exempt = parameter.ndim <= 1 or own_name == "bias" or own_name in NO_DECAY_NAMES
        is_exempt = is_exempt and own_name not in DECAY_NAMES
        key, lr_scale = "no_decay" if is_exempt else "decay", 1.0
        if layer_decay is not None and layer_decay < 1:
            layer = compute_layer_depth(name, depth)
            key, lr_scale = f"layer_{layer}_{key}", layer_decay ** (depth + 1 - layer)
        group = groups.setdefault(
            key,
            {
                "name": key,
                "params": [],
                "names": [],
                "weight_decay": 0.0 if is_exempt else weight_decay,
                "lr_scale": lr_scale,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def build_optimizer(
    model: nn.Module, args: PretrainingArguments, peak: float, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW over `build_parameter_groups`, whose `lr_scale` the loop applies."""
    groups = build_parameter_groups(model, args.weight_decay)
    return torch.optim.AdamW(
        [{key: value for key, value in group.items() if key != "names"} for group in groups],
        lr=peak,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=device.type in ("cpu", "cuda"),
    )


def compute_layer_depth(name: str, num_layers: int) -> int:
    """Depth of a parameter for layer-wise decay: 0 for embeddings, `i + 1` for layer i, `num_layers + 1` for heads."""
    if match := _match_layer(name):
        return int(match[1]) + 1
    return 0 if "embeddings." in name else num_layers + 1


def _match_layer(name: str) -> re.Match | None:
    return re.search(r"(?:^|\.)layers\.(\d+)\.", name)


@dataclass(frozen=True)
class Schedule:
    """Length of a run and its learning rate at every step.

    Args:
        total_steps: Optimizer steps of the run.
        warmup_steps: Steps of linear warm-up, possibly a fraction.
        peak: Highest rate; with 1, all rates are shares of it.
        minimum: Rate at the end, or below which none falls.
        warmup_start: Rate of the first step ("cosine_to_minimum" alone).
        kind: "cosine_to_minimum" (stage 1, fine-tuning of encoders; see `compute_learning_rate`) or
            "cosine_above_minimum" (stage 2, fine-tuning with text; see `compute_learning_rate_share`).
    """

    total_steps: int
    warmup_steps: float
    peak: float
    minimum: float
    warmup_start: float = 0.0
    kind: ScheduleType = "cosine_to_minimum"

    def __call__(self, step: int) -> float:
        """Learning rate of optimizer step `step`."""
        if self.kind == "cosine_above_minimum":
            share = self.minimum / self.peak if self.peak else 0.0
            return self.peak * compute_learning_rate_share(
                step, total_steps=self.total_steps, warmup_steps=self.warmup_steps, minimum_share=share
            )
        return compute_learning_rate(
            step,
            peak=self.peak,
            minimum=self.minimum,
            total_steps=self.total_steps,
            warmup_steps=self.warmup_steps,
            warmup_start=self.warmup_start,
        )


def compute_learning_rate(
    step: int, *, peak: float, minimum: float, total_steps: int, warmup_steps: float = 0, warmup_start: float = 0.0
) -> float:
    """Learning rate of an optimizer step: linear warm-up, then half a cosine.

    Args:
        step: Optimizer steps already taken.
        peak: Highest rate.
        minimum: Rate that the cosine runs to.
        total_steps: Steps of the run.
        warmup_steps: Steps of the warm-up.
        warmup_start: Rate of the first warm-up step.

    Examples:
        >>> from umt_hf.training.optimization import compute_learning_rate
        >>> settings = {"peak": 1e-3, "minimum": 0, "total_steps": 100}
        >>> rates = [compute_learning_rate(i, **settings) for i in (0, 50, 100)]
        >>> [f"{rate:.1e}" for rate in rates]
        ['1.0e-03', '5.0e-04', '0.0e+00']
    """
    # As published: the last step of the warm-up has the peak, and so has the first of the cosine.
    if step < warmup_steps:
        return warmup_start + (peak - warmup_start) * step / max(warmup_steps - 1, 1)
    # As published, too: the minimum would be reached one step after the last.
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return minimum + 0.5 * (peak - minimum) * (1 + math.cos(math.pi * progress))


def compute_learning_rate_share(step: int, *, total_steps: int, warmup_steps: float, minimum_share: float) -> float:
    """Share of the peak learning rate with which stage 2 and what follows it are trained.

    Linear warm-up from 0, then half a cosine to 0, and never less than `minimum_share`.

    Args:
        step: Optimizer steps already taken.
        total_steps: Steps of the run.
        warmup_steps: Steps of the warm-up, possibly a fraction.
        minimum_share: Lowest share of the peak, in [0, 1].

    Source: published stage-2 and fine-tuning code (`min_lr_multi`).
    """
    if step < warmup_steps:
        share = step / warmup_steps
    else:
        # Cut at 1: past the end of the run, the published cosine rises again.
        progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
        share = 0.5 * (1 + math.cos(math.pi * progress))
    return max(share, minimum_share)


def scale_learning_rate(learning_rate: float, total_batch_size: int, repeated_augmentation: int = 1) -> float:
    """Published rule: rates are stated for 256 clips per step and scaled linearly with the real number."""
    return learning_rate * total_batch_size * repeated_augmentation / 256


@contextmanager
def keep_group_settings(optimizer: torch.optim.Optimizer) -> Generator[None, None, None]:
    """Keep rates, decays and betas of an optimizer while a state is loaded into it: only its moments change."""
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    yield
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
