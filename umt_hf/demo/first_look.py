"""The clip that comes with the package, and a teacher's stored saliency of it: a first visit needs no model."""

import filecmp
from pathlib import Path

import numpy as np
import torch

from ..modeling.configuration_umt_video import UMTVideoConfig
from ..modeling.masking_umt_video import build_mask
from ..plots import draw_masked_frames
from ..processing.video_processing_umt_video import UMTVideoProcessor
from ..training.alignment import TokenGrid
from .looks import TeacherLook, draw_visible

CLIP = Path(__file__).parent / "first_clip.mp4"
SALIENCY = Path(__file__).parent / "first_clip_saliency.npy"
CLIP_SIDE = 256


class StoredViewer:
    """Shows what a small CLIP, trained on moving shapes, looked at in the clip of the package, and masks."""

    student = None

    def __init__(self) -> None:
        self.saliency = torch.from_numpy(np.load(SALIENCY).astype(np.float32))
        frames, patches = self.saliency.shape
        patch_size = CLIP_SIDE // round(patches**0.5)
        self.config = UMTVideoConfig(image_size=CLIP_SIDE, patch_size=patch_size, num_frames=frames)
        self.processor = UMTVideoProcessor.from_model_config(self.config)

    def knows(self, video: str) -> bool:
        """Whether it is the clip of the package, under whatever name."""
        return filecmp.cmp(video, CLIP, shallow=False)

    def look(self, video: str, mask_type: str, mask_ratio: float, seed: int = 0) -> TeacherLook:
        """Draw the stored saliency and a mask over the frames of the clip; see `TeacherViewer.look`.

        Raises:
            ValueError: If it is another clip.
        """
        if not self.knows(video):
            raise ValueError(f"{video}: only the clip of the package has a stored saliency; others need a teacher.")
        pixel_values = self.processor(video, return_tensors="pt")["pixel_values"][0]
        grid = TokenGrid(*self.saliency.shape)
        visible = draw_visible(mask_type, mask_ratio, self.saliency, seed)
        frames = draw_masked_frames(pixel_values, self.saliency, build_mask(visible, grid.num_tokens)[0])
        return TeacherLook(frames, visible.shape[1], grid.num_tokens, None)
