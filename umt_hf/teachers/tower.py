# Copyright 2026 The umt_hf authors. Licensed under the Apache License, Version 2.0.
"""What a tower of Transformers answers to be a teacher; one subclass per family, in the files beside this one.

Legend: F frames, P patches per frame, V visible patches per frame, B clips, T frames of a clip, D width, C width of
features.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn


@dataclass
class LayerInput:
    """What a layer is given.

    Args:
        states: `(F, tokens, D)`.
        options: The same for each layer, such as rotary positions.
        kept: Work on the last layer's saliency that its output needs too.
    """

    states: torch.Tensor
    options: dict[str, Any] = field(default_factory=dict)
    kept: Any = None


class TeacherTower(ABC):
    """How the towers of a family are read. It owns no weights; those are the model's.

    An image tower sees each frame by itself, as the shapes below say; see [`VideoTower`] for one that sees clips.

    Attributes:
        title: What errors call such a tower.
        classes: Names of its classes in Transformers, by model type; the type of a complete model leads to its tower.
        statistics: Mean and standard deviation of the pixels it was trained with, in [0, 1], where its folder does not
            say them; `None` = it sees the clips as the student does, in those of ImageNet.
        known_version: A version of Transformers that has these classes; `None` = all that this package runs with.
        unread: Patterns of the names of weights that a complete model has beside the tower.

    Args:
        model: The tower.
    """

    title: ClassVar[str]
    classes: ClassVar[dict[str, str]]
    statistics: ClassVar[tuple[Sequence[float], Sequence[float]] | None] = None
    known_version: ClassVar[str | None] = None
    unread: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: Any):
        self.model = model

    @property
    def width(self) -> int:
        """C, the width of the features."""
        return self.model.config.hidden_size

    @property
    def image_size(self) -> Any:
        """Side of the frames it was trained with."""
        return self.model.config.image_size

    @property
    def tubelet_size(self) -> int | None:
        """Frames of a token; `None` = each frame is seen by itself."""
        return None

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: the class token, and registers if any."""
        return 1 + (getattr(self.model.config, "num_register_tokens", 0) or 0)

    @property
    @abstractmethod
    def layers(self) -> nn.ModuleList:
        """First to last."""

    @abstractmethod
    def resize_positions(self, image_size: int) -> None:
        """Carry the position table over to frames of another size, once."""

    @abstractmethod
    def embed(self, frames: torch.Tensor) -> LayerInput:
        """Input of the first layer for frames `(F, 3, H, W)`."""

    @abstractmethod
    def weigh(self, last: LayerInput) -> torch.Tensor:
        """Saliency `(F, P)`, float32, from the last layer's input."""

    @abstractmethod
    def run_last(self, last: LayerInput, indices: torch.Tensor | None = None) -> torch.Tensor:
        """Output of the last layer.

        Args:
            last: Its input.
            indices: Patches `(F, V)`, counted from the first patch; only after `weigh`.

        Returns:
            All tokens `(F, tokens, D)`, or the patches `(F, V, D)` at `indices`.
        """

    @abstractmethod
    def finish(self, tokens: torch.Tensor) -> torch.Tensor:
        """Features `(..., C)` of tokens `(..., D)` of any layer, before they are normalised."""


class VideoTower(TeacherTower):
    """A tower that sees clips `(B, T, 3, H, W)`, whose tokens are tubelets of frames, without a class token.

    It says nothing of which patches carry meaning, so that it teaches beside an image tower alone.
    """

    @property
    def tubelet_size(self) -> int:
        """Frames of a token."""
        return self.model.config.tubelet_size

    @property
    def num_prefix_tokens(self) -> int:
        """None: tubelets are all there is."""
        return 0

    def weigh(self, last: LayerInput) -> torch.Tensor:  # noqa: ARG002 (what an image tower answers)
        """Nothing.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"A {self.title} has no saliency, from which masks are drawn: name an image teacher first.")

    def run_last(self, last: LayerInput, indices: torch.Tensor | None = None) -> torch.Tensor:  # noqa: ARG002
        """Output of the last layer, at all tokens."""
        return run_layer(self.layers[-1], last)


def run_layer(layer: nn.Module, given: LayerInput) -> torch.Tensor:
    """States after a layer, which may return its attention beside them."""
    states = layer(given.states, **given.options)
    return states[0] if isinstance(states, tuple) else states


def average_attention(query: torch.Tensor, key: torch.Tensor, num_heads: int, scale: float) -> torch.Tensor:
    """Attention of one query per frame to all tokens, averaged over heads.

    Args:
        query: `(F, 1, D)`.
        key: `(F, tokens, D)`.
        num_heads: Heads that D is divided into.
        scale: Of the scores.

    Returns:
        `(F, tokens)`, float32; a row sums to one.
    """
    query, key = (states.unflatten(-1, (num_heads, -1)) for states in (query, key))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key).float() * scale
    return scores.softmax(dim=-1).mean(dim=1)[:, 0]


__all__ = ["LayerInput", "TeacherTower", "VideoTower", "average_attention", "run_layer"]
