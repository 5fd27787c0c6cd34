"""A look at a clip: frames, saliency, and the patches that a mask leaves."""

from dataclasses import dataclass

import torch

from ..plots import MaskedFrames
from ..training.alignment import TokenGrid, draw_visible_indices


@dataclass(frozen=True)
class TeacherLook:
    """What teacher and student look at in a clip.

    Args:
        frames: Pictures of it.
        num_visible: Patches that the student sees.
        num_patches: Patches of the clip.
        agreement: Mean cosine of student's and teacher's features at the visible patches; `None` without a student.
    """

    frames: MaskedFrames
    num_visible: int
    num_patches: int
    agreement: float | None


def draw_visible(mask_type: str, mask_ratio: float, saliency: torch.Tensor, seed: int) -> torch.Tensor:
    """Indices of the visible patches `(1, V)`, ascending, on the device of the saliency.

    With the same seed, the patches that are visible at one ratio stay visible at all lower ones.

    Args:
        mask_type: "attention", "tube" or "random".
        mask_ratio: Share of patches hidden, in [0, 1).
        saliency: Teacher's class-token attention `(T, P)`.
        seed: Of the mask.
    """
    grid = TokenGrid(*saliency.shape)
    # Drawn on the CPU, so that a seed gives the same mask on every machine.
    noise = torch.empty(1, grid.num_tokens).exponential_(generator=torch.Generator().manual_seed(seed))
    return draw_visible_indices(mask_type, mask_ratio, saliency, noise.to(saliency.device), grid)
