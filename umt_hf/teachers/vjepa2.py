# Copyright 2026 The umt_hf authors. Licensed under the Apache License, Version 2.0.
"""V-JEPA 2 as a further teacher: features of clips, in which a token is a tubelet of frames.

Source: Assran et al., "V-JEPA 2", 2025.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .tower import LayerInput, VideoTower


class VJEPA2Tower(VideoTower):
    """An encoder without a class token, whose positions are rotary; its predictor is left out.

    Features are tokens through the last LayerNorm.
    """

    title = "V-JEPA 2 encoder with predictor"
    classes: ClassVar = {"vjepa2": "VJEPA2Model"}
    statistics = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    unread = (r"^pooler\.", r"^classifier\.")

    def __init__(self, model: Any):
        super().__init__(model)
        model.predictor = nn.Identity()

    @property
    def image_size(self) -> int:
        """Side of the frames it was trained with."""
        return self.model.config.crop_size

    @property
    def layers(self) -> Any:
        """First to last."""
        return self.model.encoder.layer

    def resize_positions(self, image_size: int) -> None:
        """Tell each layer how many tokens a row has, from which it counts places; the angles fit any number."""
        for layer in self.layers:
            layer.attention.grid_size = image_size // self.model.config.patch_size

    def embed(self, frames: torch.Tensor) -> LayerInput:
        """Input of the first layer."""
        return LayerInput(self.model.encoder.embeddings(frames))

    def finish(self, tokens: torch.Tensor) -> torch.Tensor:
        """Through the last LayerNorm."""
        return self.model.encoder.layernorm(tokens)


__all__ = ["VJEPA2Tower"]
