# Copyright 2026 The umt_hf authors. Licensed under the Apache License, Version 2.0.
"""VideoMAE as a further teacher: features of clips, in which a token is a tubelet of frames.

Source: Tong et al., "VideoMAE", NeurIPS 2022.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..modeling.modeling_umt_video import interpolate_position_table
from .tower import LayerInput, VideoTower


class VideoMAETower(VideoTower):
    """An encoder without a class token, whose positions are fixed sinusoids.

    Features are tokens through the last LayerNorm, where it has one: encoders that are pooled by the mean do not.
    """

    title = "VideoMAE encoder"
    classes: ClassVar = {"videomae": "VideoMAEModel"}
    statistics = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    unread = (r"^decoder\.", r"^encoder_to_decoder\.", r"^mask_token$", r"^classifier\.", r"^fc_norm\.")

    def __init__(self, model: Any):
        super().__init__(model)
        table = model.embeddings.position_embeddings
        del model.embeddings.position_embeddings  # a plain attribute, which would stay behind on the CPU
        model.embeddings.position_embeddings = nn.Buffer(table, persistent=False)

    @property
    def layers(self) -> Any:
        """First to last."""
        return self.model.encoder.layer

    def resize_positions(self, image_size: int) -> None:
        """Nothing: the table is carried over with the number of frames, which only a clip has."""

    def embed(self, frames: torch.Tensor) -> LayerInput:
        """Input of the first layer."""
        embeddings, config = self.model.embeddings, self.model.config
        projection = embeddings.patch_embeddings.projection  # by itself: the model takes one size of frames alone
        tokens = projection(frames.transpose(1, 2).to(projection.weight.dtype))
        side = config.image_size // config.patch_size
        own = (config.num_frames // config.tubelet_size, side, side)
        table = interpolate_position_table(embeddings.position_embeddings, own, (*tokens.shape[2:],))
        return LayerInput(tokens.flatten(2).transpose(1, 2) + table.to(tokens))

    def finish(self, tokens: torch.Tensor) -> torch.Tensor:
        """Through the last LayerNorm, if any."""
        norm = self.model.layernorm
        return tokens if norm is None else norm(tokens)


__all__ = ["VideoMAETower"]
