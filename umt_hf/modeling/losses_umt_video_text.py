# Copyright 2026 The umt_hf authors. Licensed under the Apache License, Version 2.0.
"""Losses of both pre-training stages as pure functions: tensors in, scalars out."""

import torch
from torch.nn import functional as F


def normalize_features(features: torch.Tensor, norm: str = "l2") -> torch.Tensor:
    """Scale features to unit length in float32, as student and teacher are compared.

    Args:
        features: `(..., channels)`.
        norm: "l2" or "none".

    Returns:
        Float32 tensor of the same shape.

    Raises:
        ValueError: If `norm` is unknown.
    """
    features = features.float()
    if norm == "l2":
        return features / features.norm(dim=-1, keepdim=True)
    if norm == "none":
        return features
    raise ValueError(f"norm must be 'l2' or 'none', got {norm!r}.")


def uta_loss(student: torch.Tensor, teacher: torch.Tensor, norm: str = "l2", loss: str = "l2") -> torch.Tensor:
    """Unmasked token alignment: how far the student's features are from the teacher's on the visible tokens.

    Args:
        student: Projected student features `(layers, batch, visible tokens, channels)`.
        teacher: Teacher features of the same shape.
        norm: Normalisation applied to both, "l2" or "none". Unit vectors stay as they are.
        loss: "l2" (mean of `2 - 2 cos`), "mse" or "smooth_l1" (these average over channels too).

    Returns:
        Scalar float32 loss, the mean over layers, clips and tokens.

    Raises:
        ValueError: If the shapes differ, or `norm` or `loss` is unknown.

    Source: Li et al., "Unmasked Teacher", ICCV 2023, section 3.1, target alignment.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} features differ in shape."
        )
    student, teacher = normalize_features(student, norm), normalize_features(teacher, norm)
    if loss == "l2":
        return (2 - 2 * (student * teacher).sum(dim=-1)).mean()
    if loss == "mse":
        return F.mse_loss(student, teacher)
    if loss == "smooth_l1":
        return F.smooth_l1_loss(student, teacher)
    raise ValueError(f"loss must be 'l2', 'mse' or 'smooth_l1', got {loss!r}.")


__all__ = ["normalize_features", "uta_loss"]
