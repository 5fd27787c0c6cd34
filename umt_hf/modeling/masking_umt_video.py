# Copyright 2026 The umt_hf authors. Licensed under the Apache License, Version 2.0.
"""Which tokens a student sees: attention-guided, tube and random selection, as pure functions.

Every mask is boolean, `True` = hidden, of shape `(batch, tokens)` with the same count in each row; tokens are ordered
frame by frame, row by row.

Source: Li et al., "Unmasked Teacher", ICCV 2023, section 3.1 (semantic masking); Tong et al., "VideoMAE", NeurIPS 2022
(tube masking).
"""

import torch


def sample_attention_mask(
    saliency: torch.Tensor,
    mask_ratio: float,
    num_frames: int | None = None,
    generator: torch.Generator | None = None,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """Hide patches at random, favouring for the visible set those the teacher attends to.

    The `P - int(P * mask_ratio)` visible patches of a frame are drawn one after another without replacement, each with
    probability proportional to its saliency among those left. Frames are independent.

    Args:
        saliency: Teacher class-token attention, `(batch, frames, patches)` or `(batch * frames, patches)`, positive,
            any scale.
        mask_ratio: Share of patches hidden in each frame, in [0, 1).
        num_frames: Frames of a clip; needed when `saliency` has two dimensions.
        generator: Random source on the device of `saliency`.
        noise: Exponential noise `(batch, frames, patches)` drawn beforehand, instead of a generator.

    Returns:
        Boolean mask `(batch, frames * patches)`, `True` where hidden, with the same count in every frame.

    Raises:
        ValueError: If `mask_ratio` is outside [0, 1), or the shape does not tell the frames.
    """
    if saliency.ndim == 2:
        if num_frames is None or saliency.shape[0] % num_frames:
            raise ValueError(
                f"saliency of shape {tuple(saliency.shape)} needs num_frames, a divisor of its first dimension, "
                f"got {num_frames}."
            )
        saliency = saliency.unflatten(0, (-1, num_frames))
    if saliency.ndim != 3:
        raise ValueError(f"saliency must be (batch, frames, patches), got shape {tuple(saliency.shape)}.")
    num_patches = saliency.shape[-1]
    num_visible = num_patches - _count_masked(num_patches, mask_ratio)
    # The largest of w / Exponential(1) falls on item i with probability w_i / sum(w), and so on down the order: a draw
    # without replacement in one pass, with static shapes.
    weights = saliency.float().clamp_min(torch.finfo(torch.float32).tiny)
    if noise is None:
        noise = torch.empty_like(weights).exponential_(generator=generator)
    visible = (weights / noise).topk(num_visible, dim=-1).indices
    return torch.ones_like(weights, dtype=torch.bool).scatter_(-1, visible, False).flatten(1)


def sample_tube_mask(
    batch_size: int,
    num_frames: int,
    num_patches: int,
    mask_ratio: float,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """Hide the same `int(num_patches * mask_ratio)` random patches in every frame of a clip.

    Args:
        batch_size: Clips.
        num_frames: Frames of a clip, in tokens.
        num_patches: Patches of a frame.
        mask_ratio: Share of patches hidden, in [0, 1).
        generator: Random source on `device`.
        device: Where the mask is drawn.
        noise: Continuous noise `(batch, num_patches)` drawn beforehand, instead of a generator.

    Returns:
        Boolean mask `(batch, num_frames * num_patches)`, `True` where hidden.

    Raises:
        ValueError: If `mask_ratio` is outside [0, 1).
    """
    return sample_random_mask(batch_size, num_patches, mask_ratio, generator, device, noise).repeat(1, num_frames)


def sample_random_mask(
    batch_size: int,
    num_tokens: int,
    mask_ratio: float,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """Hide `int(num_tokens * mask_ratio)` tokens of each clip, chosen uniformly over space and time.

    Args:
        batch_size: Clips.
        num_tokens: Tokens of a clip.
        mask_ratio: Share of tokens hidden, in [0, 1).
        generator: Random source on `device`.
        device: Where the mask is drawn.
        noise: Continuous noise `(batch, num_tokens)` drawn beforehand, instead of a generator.

    Returns:
        Boolean mask `(batch, num_tokens)`, `True` where hidden.

    Raises:
        ValueError: If `mask_ratio` is outside [0, 1).
    """
    num_masked = _count_masked(num_tokens, mask_ratio)
    if noise is None:
        noise = torch.rand(batch_size, num_tokens, generator=generator, device=device)
    hidden = noise.topk(num_masked, dim=-1).indices
    return torch.zeros_like(noise, dtype=torch.bool).scatter_(-1, hidden, True)


def compute_visible_indices(bool_masked_pos: torch.Tensor, num_visible: int) -> torch.Tensor:
    """Turn a mask into the indices of its visible tokens without a host synchronisation.

    Args:
        bool_masked_pos: Boolean mask `(batch, tokens)`, `True` = hidden.
        num_visible: Visible tokens in each row, the same for all.

    Returns:
        Indices `(batch, num_visible)`, ascending.
    """
    return bool_masked_pos.to(torch.uint8).argsort(dim=1, stable=True)[:, :num_visible]


def _count_masked(num_tokens: int, mask_ratio: float) -> int:
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio must be in [0, 1), got {mask_ratio}.")
    return int(num_tokens * mask_ratio)


__all__ = ["compute_visible_indices", "sample_attention_mask", "sample_random_mask", "sample_tube_mask"]
