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
"""A part of a resized frame without the rest of it: what makes strips of any length cheap to crop."""

import torch

EXTREME_ASPECT = 16  # beyond, a frame is cut before it is resized; ordinary ones go through torchvision's kernels


def is_extreme(height: int, width: int) -> bool:
    """Whether a frame is such a strip that resizing its shorter side makes a frame out of all proportion."""
    return max(height, width) > EXTREME_ASPECT * min(height, width)


def resize_part(video: torch.Tensor, size: tuple[int, int], box: tuple[int, int, int, int]) -> torch.Tensor:
    """Cut a box out of the frames as they would be after resizing, bilinear without antialiasing.

    Args:
        video: Frames `(T, C, H, W)`, uint8 or floating-point.
        size: Height and width of the resized frames.
        box: `(top, left, bottom, right)` in them, bottom and right excluded.

    Returns:
        `(T, C, bottom - top, right - left)`, of the dtype of `video`, rounded where that is uint8; up to rounding what
        `torch.nn.functional.interpolate` gives.
    """
    top, left, bottom, right = box
    rows, next_rows, row_shares = _place(video.shape[-2], size[0], top, bottom, video.device)
    columns, next_columns, column_shares = _place(video.shape[-1], size[1], left, right, video.device)
    upper, lower = video.index_select(-2, rows), video.index_select(-2, next_rows)
    parts = []
    for part in (upper, lower):
        first = part.index_select(-1, columns).float()
        parts.append(first + (part.index_select(-1, next_columns).float() - first) * column_shares)
    resized = parts[0] + (parts[1] - parts[0]) * row_shares[:, None]
    return resized if video.is_floating_point() else resized.round().to(video.dtype)


def _place(
    length: int, resized_length: int, start: int, end: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The two source pixels of each resized one from `start` to `end`, and the share of the second."""
    centres = (torch.arange(start, end, dtype=torch.float64, device=device) + 0.5) * (length / resized_length) - 0.5
    centres = centres.clamp(0, length - 1)
    first = centres.floor().long()
    return first, (first + 1).clamp(max=length - 1), (centres - first).float()
