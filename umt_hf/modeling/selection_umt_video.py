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
"""Which tokens of a clip the encoder sees: those that a mask or indices leave, or those that `keep_ratio` keeps.

With `keep_ratio` below 1 as many tokens are kept in each frame, so that means over a frame and maps over space keep
their meaning. The choice depends on the clip alone: not on its batch, and not on a random state.

Legend: B clips, T frames (of tubelets, where these are longer than a frame), P patches of a frame, N = T * P tokens,
V tokens that are seen, D width.
"""

import torch
from torch.nn import functional as F

from .configuration_umt_video import require_keep_ratio
from .masking_umt_video import compute_visible_indices, number_over_frames

RATIO_STEPS = 10_000  # a share counts in steps of 1 / RATIO_STEPS, so that 0.2 of 195 patches are 39 and not 40
MODULUS = 2**31 - 1  # a prime; 5 does not divide MODULUS - 1, so that x -> x**5 gives every number once


def resolve_visible_indices(
    bool_masked_pos: torch.Tensor | None, visible_indices: torch.Tensor | None, batch_size: int, num_tokens: int
) -> torch.Tensor | None:
    """Bring a mask or indices to `(B, V)` indices; neither of them means that all tokens are visible.

    Raises:
        ValueError: If both are given, a shape or an index does not fit the clip, or rows hide different counts.
    """
    if bool_masked_pos is not None and visible_indices is not None:
        raise ValueError("Give bool_masked_pos or visible_indices, not both.")
    if visible_indices is not None:
        if visible_indices.ndim != 2 or visible_indices.shape[0] != batch_size:
            raise ValueError(
                f"visible_indices must be ({batch_size}, visible tokens), got {tuple(visible_indices.shape)}."
            )
        # On other devices reading a value would wait for them; there only what is too large is noticed.
        if visible_indices.device.type == "cpu" and not torch.compiler.is_compiling():
            outside = visible_indices[(visible_indices < 0) | (visible_indices >= num_tokens)]
            if outside.numel():
                raise ValueError(
                    f"visible_indices must be from 0 to {num_tokens - 1}, the tokens of this clip, got "
                    f"{outside.unique().tolist()}."
                )
        return visible_indices
    if bool_masked_pos is None:
        return None
    if tuple(bool_masked_pos.shape) != (batch_size, num_tokens):
        raise ValueError(
            f"bool_masked_pos must be ({batch_size}, {num_tokens}) for this clip, got {tuple(bool_masked_pos.shape)}."
        )
    bool_masked_pos = bool_masked_pos.bool()
    # Reading a count waits for the device; with indices, which `torch.compile` needs anyway, nothing waits.
    counts = (~bool_masked_pos).sum(dim=1)
    num_visible = int(counts[0])
    if num_visible == 0 or not bool((counts == num_visible).all()):
        raise ValueError(
            f"bool_masked_pos must leave the same number of tokens, at least one, in every row, got {counts.tolist()}."
        )
    return compute_visible_indices(bool_masked_pos, num_visible)


def count_kept(num_patches: int, keep_ratio: float) -> int:
    """Patches that are kept of each frame: the share, rounded up, so that at least one is."""
    steps = max(round(keep_ratio * RATIO_STEPS), 1)
    return -(-num_patches * steps // RATIO_STEPS)


def select_tokens(
    pixel_values: torch.Tensor,
    grid: tuple[int, int, int],
    keep_ratio: float,
    selector: str = "frame_difference",
    seed: int = 0,
    saliency: torch.Tensor | None = None,
) -> torch.Tensor:
    """Choose the tokens of each clip that the encoder sees, as many in every frame.

    Shapes depend on the clip's shape and the ratio alone, and nothing waits for a device.

    Args:
        pixel_values: Video `(B, frames, channels, height, width)`.
        grid: T, and the rows and columns of patches in a frame.
        keep_ratio: Share of the patches of each frame that is kept, in (0, 1]; see [`count_kept`].
        selector: "random" draws them, for every clip the same ones; "frame_difference" takes those that change most
            from frame to frame; "teacher_saliency" those that a teacher attends to most. Where patches are equal, as
            all are in a clip of one frame or a still picture, the draw decides among them.
        seed: Of the draw; the same on every device.
        saliency: For "teacher_saliency": `saliency` of [`UMTTeacher`] for these clips, `(B * frames, P)` or
            `(B, frames, P)`.

    Returns:
        Indices of the tokens `(B, T * kept)`, ascending.

    Raises:
        ValueError: If the share is outside (0, 1], the selector is unknown, or the saliency is missing, not asked for,
            or of another shape.

    Examples:
        >>> import torch
        >>> from umt_hf.modeling.selection_umt_video import select_tokens
        >>> clip = torch.randn(2, 8, 3, 224, 224)
        >>> indices = select_tokens(clip, (8, 14, 14), keep_ratio=0.5)
        >>> indices.shape  # 98 of the 196 patches of each frame
        torch.Size([2, 784])
    """
    require_keep_ratio(keep_ratio)  # a configuration checks it when it is made, not when a field is set
    time, rows, columns = grid
    batch, num_patches = pixel_values.shape[0], rows * columns
    num_kept = count_kept(num_patches, keep_ratio)
    numbers = draw_numbers(time * num_patches, seed, pixel_values.device).view(time, num_patches)
    order = numbers.argsort(dim=-1).expand(batch, -1, -1)  # of the patches of each frame
    if (saliency is not None) != (selector == "teacher_saliency"):
        raise ValueError(
            "token_selector='teacher_saliency' needs saliency, that of UMTTeacher for these clips."
            if saliency is None
            else f"saliency is for token_selector='teacher_saliency', which here is {selector!r}."
        )
    if selector == "random":
        kept = order[..., :num_kept]
    else:
        if saliency is not None:
            scores = arrange_saliency(saliency, grid, batch)
        elif selector == "frame_difference":
            scores = compute_frame_differences(pixel_values, grid)
        else:
            raise ValueError(
                f"token_selector must be 'random', 'frame_difference' or 'teacher_saliency', got {selector!r}."
            )
        # A stable sort of what is in random order: equal scores fall where the draw puts them, on every device.
        ranked = scores.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices
        kept = order.gather(-1, ranked[..., :num_kept])
    return number_over_frames(kept.sort(dim=-1).values, num_patches)


def draw_numbers(count: int, seed: int, device: torch.device | str | None = None) -> torch.Tensor:
    """Pseudo-random integers `(count,)`, all different, that depend on the seed alone.

    By arithmetic instead of a generator: those differ between devices and versions, hold a state, and cannot be
    compiled.
    """
    numbers = torch.arange(1, count + 1, device=device)
    for _ in range(3):
        numbers = (numbers * 48271 + 1013904223 + seed) % MODULUS
        squares = numbers * numbers % MODULUS
        numbers = squares * squares % MODULUS * numbers % MODULUS
    return numbers


def compute_frame_differences(pixel_values: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    """How much each patch differs from the same place in the frames before and after it.

    Args:
        pixel_values: Video `(B, frames, channels, height, width)`.
        grid: T, and the rows and columns of patches in a frame.

    Returns:
        Sum over both neighbours of the mean absolute difference, `(B, T, P)`, float32; a tubelet has the mean of its
        frames. The first and the last frame have one neighbour, a single frame none and 0 everywhere.
    """
    time, rows, columns = grid
    batch, num_frames, channels, height, width = pixel_values.shape
    pixels = pixel_values.detach().float()
    changes = (pixels[:, 1:] - pixels[:, :-1]).abs()
    changes = changes.reshape(batch, num_frames - 1, channels, rows, height // rows, columns, width // columns)
    changes = F.pad(changes.mean(dim=(2, 4, 6)), (0, 0, 0, 0, 1, 1))
    both = changes[:, 1:] + changes[:, :-1]
    return both.unflatten(1, (time, -1)).mean(dim=2).flatten(2)


def arrange_saliency(saliency: torch.Tensor, grid: tuple[int, int, int], batch_size: int) -> torch.Tensor:
    """A teacher's saliency `(B * frames, P)` or `(B, frames, P)` as `(B, T, P)`; a tubelet has the mean of its frames.

    Raises:
        ValueError: If it is of another shape.
    """
    time, num_patches = grid[0], grid[1] * grid[2]
    frames = saliency.detach().reshape(-1, saliency.shape[-1])
    if saliency.ndim not in (2, 3) or frames.shape[1] != num_patches or frames.shape[0] % (batch_size * time):
        raise ValueError(
            f"saliency must have a row of {num_patches} patches for each frame of the {batch_size} clips, got shape "
            f"{tuple(saliency.shape)}."
        )
    return frames.float().reshape(batch_size, time, -1, num_patches).mean(dim=2)


def spread_tokens(tokens: torch.Tensor, indices: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Put tokens back to their places among all: `(B, V, D)` -> `(B, N, D)`, 0 where there is none."""
    places = indices[..., None].expand_as(tokens)
    return tokens.new_zeros(tokens.shape[0], num_tokens, tokens.shape[2]).scatter(1, places, tokens)


def build_feature_map(
    tokens: torch.Tensor, grid: tuple[int, int, int], indices: torch.Tensor | None = None
) -> torch.Tensor:
    """Average tokens over time, place by place.

    Args:
        tokens: `(B, V, D)`.
        grid: T, rows and columns of all tokens.
        indices: Which ones they are, `(B, V)`, each once; default: all.

    Returns:
        `(B, D, rows, columns)`: the mean over the tokens that a place has, 0 where it has none.
    """
    if indices is None:
        return tokens.unflatten(1, grid).mean(dim=1).permute(0, 3, 1, 2)
    num_tokens = grid[0] * grid[1] * grid[2]
    counts = spread_tokens(tokens.new_ones(*indices.shape, 1), indices, num_tokens).unflatten(1, grid).sum(dim=1)
    sums = spread_tokens(tokens, indices, num_tokens).unflatten(1, grid).sum(dim=1)
    return (sums / counts.clamp(min=1)).permute(0, 3, 1, 2)


__all__ = [
    "build_feature_map",
    "compute_frame_differences",
    "count_kept",
    "draw_numbers",
    "resolve_visible_indices",
    "select_tokens",
    "spread_tokens",
]
