"""From a batch to the losses of a stage: the teacher's targets, then the student."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from ...teachers.teacher import UMTTeacher


class AlignedStage(Protocol):
    """What both stages have.

    Args:
        model: Student.
        config: Its configuration.
        compute_targets: `compute_targets` of `training/alignment.py`; may be compiled.
    """

    model: nn.Module
    config: Any
    compute_targets: Callable[..., tuple[torch.Tensor, ...]]

    @property
    def teacher(self) -> UMTTeacher | None:
        """Frozen; in stage 2 `None` where nothing is aligned or masked."""


class TaughtStage(AlignedStage, Protocol):
    """What stage 1 has.

    Args:
        other_teachers: Further ones, whose features are learned as well.
    """

    other_teachers: Sequence[UMTTeacher]

    @property
    def teacher(self) -> UMTTeacher:
        """Frozen; it draws the masks."""


def align_student(stage: TaughtStage, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Losses of stage 1: the student sees the visible tokens and is compared with each teacher on them.

    Args:
        stage: Student and teachers.
        batch: With `pixel_values (B, T, channels, H, W)` and `mask_noise (B, N)`.
    """
    pixel_values = batch["pixel_values"]
    visible, *features = stage.compute_targets(
        stage.teacher,
        pixel_values,
        batch["mask_noise"],
        stage.config.mask_type,
        stage.config.mask_ratio,
        stage.other_teachers,
    )
    outputs = stage.model(
        pixel_values, visible_indices=visible, teacher_features=features, normalize_teacher_features=False
    )
    if outputs.teacher_losses is None:
        return {"uta_loss": outputs.loss}
    return dict(zip(name_losses([stage.teacher, *stage.other_teachers]), outputs.teacher_losses, strict=True))


def name_losses(teachers: Sequence[UMTTeacher]) -> list[str]:
    """What the log calls the loss of each of several teachers: by its type, numbered if that repeats."""
    types = [teacher.vision_tower.config.model_type.removesuffix("_vision_model") for teacher in teachers]
    numbers = [f"_{types[: i + 1].count(name)}" if types.count(name) > 1 else "" for i, name in enumerate(types)]
    return [f"{name}{number}_uta_loss" for name, number in zip(types, numbers, strict=True)]


def join_video_and_text(stage: AlignedStage, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weighted losses of stage 2, each named by the kind of media.

    Args:
        stage: Video-text model and teacher.
        batch: With `pixel_values (B, T, channels, H, W)`, `mask_noise (B, N)`, `input_ids (B, L)`,
            `attention_mask (B, L)` and `pair_ids (B,)`.
    """
    pixel_values = batch["pixel_values"]
    is_image = pixel_values.shape[1] == 1
    targets = {}  # without a teacher nothing is masked either
    if stage.teacher is not None:
        config = stage.config.vision_config
        ratio = config.image_mask_ratio if is_image else config.mask_ratio
        visible, features = stage.compute_targets(
            stage.teacher, pixel_values, batch["mask_noise"], config.mask_type, ratio
        )
        targets = {
            "visible_indices": visible,
            "teacher_features": features,
            "normalize_teacher_features": False,
        }
    outputs = stage.model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        pixel_values=pixel_values,
        pair_ids=batch["pair_ids"],
        return_loss=True,
        **targets,
    )
    media = "image" if is_image else "video"
    weights = {name: getattr(stage.config, f"{name}_loss_weight") for name in ("uta", "vtc", "vtm", "mlm")}
    losses = {name: outputs[f"{name}_loss"] for name in weights if outputs.get(f"{name}_loss") is not None}
    return {f"{media}_{name}_loss": weights[name] * loss for name, loss in losses.items()}
