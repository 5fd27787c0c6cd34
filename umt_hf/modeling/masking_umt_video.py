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
"""Which tokens a student sees: attention-guided, tube and random selection, as pure functions.

Each selection comes as indices of the visible tokens, `(batch, visible)` and ascending, and as a boolean mask
`(batch, tokens)`, `True` = hidden; the same random state gives the same selection in both. The count is the same in
each row; tokens are ordered frame by frame, row by row.

Source: Li et al., "Unmasked Teacher", ICCV 2023, section 3.1 (semantic masking); Tong et al., "VideoMAE", NeurIPS 2022
(tube masking).
"""

import torch


def sample_attention_indices(
    saliency: torch.Tensor,
    mask_ratio: float,
    num_frames: int | None = None,
    generator: torch.Generator | None = None,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw the visible patches at random, favouring those the teacher attends to.

    In each frame `P - int(P * mask_ratio)` patches are drawn one after another without replacement, each with
    probability proportional to its saliency among those left. Frames are independent.

    Args:
        saliency: Teacher class-token attention, `(batch, frames, patches)` or `(batch * frames, patches)`, positive,
            any scale.
        mask_ratio: Share of patches hidden in each frame, in [0, 1).
        num_frames: Frames per clip; needed when `saliency` has two dimensions.
        generator: Random source on the device of `saliency`.
        noise: Exponential noise `(batch, frames, patches)` drawn beforehand, instead of a generator.

    Returns:
        Indices of the visible tokens `(batch, visible)`, ascending, with the same count in every frame.

    Raises:
        ValueError: If `mask_ratio` is outside [0, 1), or the shape leaves the number of frames open.
    """
    saliency = _split_frames(saliency, num_frames)
    num_patches = saliency.shape[-1]
    num_visible = num_patches - _count_masked(num_patches, mask_ratio)
    # The largest of w / Exponential(1) falls on item i with probability w_i / sum(w), and so on down the order: a draw
    # without replacement in one pass, with static shapes.
    weights = saliency.float().clamp_min(torch.finfo(torch.float32).tiny)
    if noise is None:
        noise = torch.empty_like(weights).exponential_(generator=generator)
    visible = (weights / noise).topk(num_visible, dim=-1).indices.sort(dim=-1).values
    return number_over_frames(visible, num_patches)


def sample_attention_mask(
    saliency: torch.Tensor,
    mask_ratio: float,
    num_frames: int | None = None,
    generator: torch.Generator | None = None,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """Hide patches at random, favouring for the visible set those the teacher attends to.

    Arguments and errors are those of [`sample_attention_indices`], which makes the draw.

    Returns:
        Boolean mask `(batch, frames * patches)`, `True` where hidden, with the same count in every frame.

    Examples:
        >>> import torch
        >>> from umt_hf.modeling.masking_umt_video import sample_attention_mask
        >>> saliency = torch.rand(1, 8, 196)  # of 8 frames, from the teacher
        >>> mask = sample_attention_mask(saliency, mask_ratio=0.8)
        >>> mask.shape, int((~mask).sum())  # 40 patches of each frame stay
        (torch.Size([1, 1568]), 320)
    """
    saliency = _split_frames(saliency, num_frames)
    visible = sample_attention_indices(saliency, mask_ratio, generator=generator, noise=noise)
    return build_mask(visible, saliency.shape[1] * saliency.shape[2])


def sample_tube_indices(
    batch_size: int,
    num_frames: int,
    num_patches: int,
    mask_ratio: float,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw the visible patches of a clip, the same in every frame, uniformly over space.

    Args:
        batch_size: Clips.
        num_frames: Frames per clip, in tokens.
        num_patches: Patches per frame, of which `int(num_patches * mask_ratio)` are hidden.
        mask_ratio: Share of patches hidden, in [0, 1).
        generator: Random source on `device`.
        device: Where the draw is made.
        noise: Continuous noise `(batch, num_patches)` drawn beforehand, instead of a generator.

    Returns:
        Indices of the visible tokens `(batch, visible)`, ascending.

    Raises:
        ValueError: If `mask_ratio` is outside [0, 1).
    """
    visible = sample_random_indices(batch_size, num_patches, mask_ratio, generator, device, noise)
    return number_over_frames(visible[:, None].expand(-1, num_frames, -1), num_patches)


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

    Arguments and errors are those of [`sample_tube_indices`], which makes the draw.

    Returns:
        Boolean mask `(batch, num_frames * num_patches)`, `True` where hidden.

    Examples:
        >>> from umt_hf.modeling.masking_umt_video import sample_tube_mask
        >>> mask = sample_tube_mask(2, 8, 196, mask_ratio=0.8)
        >>> frames = mask.unflatten(1, (8, 196))
        >>> bool((frames == frames[:, :1]).all())  # the same in every frame
        True
    """
    visible = sample_tube_indices(batch_size, num_frames, num_patches, mask_ratio, generator, device, noise)
    return build_mask(visible, num_frames * num_patches)


def sample_random_indices(
    batch_size: int,
    num_tokens: int,
    mask_ratio: float,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw the visible tokens of each clip uniformly over space and time.

    Args:
        batch_size: Clips.
        num_tokens: Tokens per clip, of which `int(num_tokens * mask_ratio)` are hidden.
        mask_ratio: Share of tokens hidden, in [0, 1).
        generator: Random source on `device`.
        device: Where the draw is made.
        noise: Continuous noise `(batch, num_tokens)` drawn beforehand, instead of a generator.

    Returns:
        Indices of the visible tokens `(batch, visible)`, ascending.

    Raises:
        ValueError: If `mask_ratio` is outside [0, 1).
    """
    num_masked = _count_masked(num_tokens, mask_ratio)
    if noise is None:
        noise = torch.rand(batch_size, num_tokens, generator=generator, device=device)
    hidden = noise.topk(num_masked, dim=-1).indices.sort(dim=-1).values
    # The tokens left over, counted rather than drawn as the smallest, so that no token is both where noise is equal:
    # before the j-th hidden token there are hidden[j] - j visible ones.
    num_before = hidden - torch.arange(num_masked, device=noise.device)
    order = torch.arange(num_tokens - num_masked, device=noise.device).expand(noise.shape[0], -1).contiguous()
    return order + torch.searchsorted(num_before, order, right=True)


def sample_random_mask(
    batch_size: int,
    num_tokens: int,
    mask_ratio: float,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """Hide `int(num_tokens * mask_ratio)` tokens of each clip, chosen uniformly over space and time.

    Arguments and errors are those of [`sample_random_indices`], which makes the draw.

    Returns:
        Boolean mask `(batch, num_tokens)`, `True` where hidden.

    Examples:
        >>> from umt_hf.modeling.masking_umt_video import sample_random_mask
        >>> mask = sample_random_mask(2, 1568, mask_ratio=0.8)
        >>> mask.sum(dim=1).tolist()
        [1254, 1254]
    """
    return build_mask(sample_random_indices(batch_size, num_tokens, mask_ratio, generator, device, noise), num_tokens)


def build_mask(visible_indices: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Turn the indices of visible tokens `(batch, visible)` into a boolean mask `(batch, num_tokens)`."""
    mask = torch.ones(visible_indices.shape[0], num_tokens, dtype=torch.bool, device=visible_indices.device)
    return mask.scatter_(-1, visible_indices, False)


def compute_visible_indices(bool_masked_pos: torch.Tensor, num_visible: int) -> torch.Tensor:
    """Turn a mask into the indices of its visible tokens without a host synchronisation.

    Args:
        bool_masked_pos: Boolean mask `(batch, tokens)`, `True` = hidden.
        num_visible: Visible tokens in each row, the same for all.

    Returns:
        Indices `(batch, num_visible)`, ascending.
    """
    return bool_masked_pos.to(torch.uint8).argsort(dim=1, stable=True)[:, :num_visible]


def _split_frames(saliency: torch.Tensor, num_frames: int | None) -> torch.Tensor:
    """Saliency as `(batch, frames, patches)`."""
    if saliency.ndim == 2:
        if num_frames is None or num_frames < 1 or saliency.shape[0] % num_frames:
            raise ValueError(
                f"saliency of shape {tuple(saliency.shape)} needs num_frames, a divisor of its first dimension, "
                f"got {num_frames}."
            )
        saliency = saliency.unflatten(0, (-1, num_frames))
    if saliency.ndim != 3:
        raise ValueError(f"saliency must be (batch, frames, patches), got shape {tuple(saliency.shape)}.")
    return saliency


def number_over_frames(patch_indices: torch.Tensor, num_patches: int) -> torch.Tensor:
    """Patches of frames `(batch, frames, visible)` as tokens of clips `(batch, frames * visible)`."""
    first_of_frame = torch.arange(patch_indices.shape[1], device=patch_indices.device) * num_patches
    return (patch_indices + first_of_frame[:, None]).flatten(1)


def _count_masked(num_tokens: int, mask_ratio: float) -> int:
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio must be in [0, 1), got {mask_ratio}.")
    return int(num_tokens * mask_ratio)


__all__ = [
    "build_mask",
    "compute_visible_indices",
    "sample_attention_indices",
    "sample_attention_mask",
    "sample_random_indices",
    "sample_random_mask",
    "sample_tube_indices",
    "sample_tube_mask",
]
