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
"""Position tables of token grids: sinusoids, and a table carried to a clip of another shape.

Legend: T frames, H rows, W columns, D width; a dash marks the new shape.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

CUBIC = -0.75  # PyTorch's coefficient of bicubic interpolation
# Before PyTorch 2.7 nothing says whether a graph is exported or compiled: there, exported shapes are fixed.
is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)


def compute_sinusoid_table(num_positions: int, width: int, device: str | torch.device | None = "cpu") -> torch.Tensor:
    """Sinusoids over the flat token index: `sin` on even and `cos` on odd channels of `n / 10000^(2i / width)`.

    Args:
        num_positions: Rows of the table.
        width: Channels; pair `i` holds channels `2i` and `2i + 1`.
        device: Where to compute it; it must know float64.

    Returns:
        Float32 table `(1, num_positions, width)` on that device.

    Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.5, over flattened space-time positions.
    """
    # In float64, since angles grow with the token count.
    positions = torch.arange(num_positions, dtype=torch.float64, device=device)
    channels = torch.arange(width, dtype=torch.float64, device=device)
    angles = positions[:, None] / 10000 ** (2 * (channels // 2) / width)
    return torch.where(channels % 2 == 0, angles.sin(), angles.cos()).float()[None]


def interpolate_position_table(
    table: torch.Tensor, grid: tuple[int, int, int], new_grid: tuple[int, int, int]
) -> torch.Tensor:
    """Carry a position table to another clip shape: bicubic over space, linear over time.

    Args:
        table: `(1, T * H * W, D)` for the shape `grid`.
        grid: Time, rows and columns of `table`.
        new_grid: Time, rows and columns wanted.

    Returns:
        `(1, T' * H' * W', D)` in the precision of `table`.
    """
    if is_exporting():
        return _resize_within_graph(table, grid, new_grid)
    if grid == new_grid:
        return table
    (num_frames, *space), (new_frames, *new_space) = grid, new_grid
    width = table.shape[-1]
    if space != new_space:
        frames = table.reshape(num_frames, *space, width).permute(0, 3, 1, 2)
        frames = F.interpolate(frames, size=tuple(new_space), mode="bicubic", align_corners=False)
        table = frames.permute(0, 2, 3, 1).reshape(1, -1, width)
    if num_frames != new_frames:
        lines = table.reshape(num_frames, -1).T[None]
        lines = F.interpolate(lines, size=new_frames, mode="linear", align_corners=False)
        table = lines[0].T.reshape(1, -1, width)
    return table


def _resize_within_graph(
    table: torch.Tensor, grid: tuple[int, int, int], new_grid: tuple[int, int, int]
) -> torch.Tensor:
    """The same for a graph that serves every shape: no comparison depends on that of the example.

    As products with weights, since runtimes differ from PyTorch in resizing, in silence: to one frame, row or column
    ONNX's rule reads the first place instead of the middle.
    """
    time, rows, columns = (
        compute_resize_weights(size, new_size, is_cubic, table.device)
        for size, new_size, is_cubic in zip(grid, new_grid, (False, True, True), strict=True)
    )
    width, (num_frames, num_rows, num_columns) = table.shape[-1], grid
    resized = table.to(torch.promote_types(table.dtype, torch.float32))
    # The table stands on the left: quantizers take a constant on the right for weights of a layer.
    resized = resized.reshape(num_frames, num_rows, num_columns * width).transpose(1, 2) @ rows.to(resized).T
    resized = resized.transpose(1, 2)
    resized = columns.to(resized) @ resized.reshape(-1, num_columns, width)
    resized = time.to(resized) @ resized.reshape(num_frames, -1)
    return resized.reshape(1, -1, width).to(table.dtype)


def compute_resize_weights(
    size: int, new_size: int, is_cubic: bool, device: str | torch.device | None = None
) -> torch.Tensor:
    """Weights that resize an axis as `torch.nn.functional.interpolate` does without `align_corners`.

    Args:
        size: Length of the axis.
        new_size: Length wanted; a graph may leave it open.
        is_cubic: Whether cubic, else linear.
        device: Where to compute them.

    Returns:
        Float32 `(new_size, size)`, exactly the identity where the lengths are equal.
    """
    places = torch.arange(size, dtype=torch.float32, device=device)
    centers = (torch.arange(new_size, dtype=torch.float32, device=device) + 0.5) * size / new_size - 0.5
    if not is_cubic:
        return (1 - (centers.clamp(0, size - 1)[:, None] - places).abs()).clamp(min=0)
    below = centers.floor()
    fraction = centers - below
    weights = torch.zeros((), device=device)
    for tap in (-1, 0, 1, 2):
        distance = (fraction - tap).abs()
        if tap in (0, 1):
            value = ((CUBIC + 2) * distance - (CUBIC + 3)) * distance * distance + 1
        else:
            value = ((CUBIC * distance - 5 * CUBIC) * distance + 8 * CUBIC) * distance - 4 * CUBIC
        # 1 at the place that this tap reads, which is the nearest one beyond the border.
        is_read = (1 - ((below + tap).clamp(0, size - 1)[:, None] - places).abs()).clamp(min=0)
        weights = weights + value[:, None] * is_read
    return weights


__all__ = ["compute_resize_weights", "compute_sinusoid_table", "interpolate_position_table", "is_exporting"]
