"""Re-ranking from what an index stores: tokens of its videos, or the keys and values that texts look at.

    umt-hf embed videos/ --model outputs/retrieval --out index --store tokens

Encoding a video takes much longer than the matching head's look at it, and every video of an index was encoded once.

Legend: B videos or moments, V tokens of one, D width of the encoder, L fusion layers, H width of the text tower.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch

from ..data.video_files import VideoFile
from .video_index import VideoIndex

StoredKind = Literal["none", "tokens", "keys"]
StoredDType = Literal["float16", "float32"]
TOO_LARGE = "What would be stored of it does not fit into {dtype}; give --store-dtype float32."


@dataclass(frozen=True)
class StoreSettings:
    """What an index stores of each row beside its vector.

    Attributes:
        what: "tokens", the encoder's, `(V, D)`; or "keys", the fusion layers' keys and values, `(L, 2, V, H)`.
        dtype: Precision in which they are stored.

    Raises:
        ValueError: If one is unknown.
    """

    what: str
    dtype: str = "float16"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("store", self.what, [kind for kind in get_args(StoredKind) if kind != "none"]),
            ("store_dtype", self.dtype, get_args(StoredDType)),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {list(known)}, got {value!r}.")

    def compute_states(self, model: Any, tokens: torch.Tensor) -> np.ndarray:
        """What is stored of encoded videos.

        Args:
            model: The dual encoder with its matching head.
            tokens: `last_hidden_state` of its `get_video_features`, `(B, V, D)`.

        Returns:
            `(B, V, D)` or `(B, L, 2, V, H)` in `dtype`.
        """
        states = tokens if self.what == "tokens" else model.get_video_key_values(tokens)
        return states.to(getattr(torch, self.dtype)).cpu().numpy()

    def match(self, model: Any, states: Sequence[np.ndarray], text_tokens: torch.Tensor) -> list[float]:
        """Judge stored videos by a text.

        Args:
            model: As for `compute_states`.
            states: What was stored of each, all of one shape.
            text_tokens: `last_hidden_state` of its `get_text_features`, `(1, text tokens, H)`.

        Returns:
            Raw logit of the matching head for each.
        """
        known = torch.from_numpy(np.stack(states)).to(model.device)  # as they are: layers convert what they use
        given = {"video_tokens": known} if self.what == "tokens" else {"video_key_values": known}
        return model.match(text_tokens=text_tokens, **given)[:, 1].tolist()


def resolve_store(store: str | None, dtype: str | None) -> StoreSettings | None:
    """Settings of what is stored; `None` where nothing is.

    Args:
        store: "tokens", "keys", or "none", the default.
        dtype: Precision; default: float16.

    Raises:
        ValueError: If there is a precision of nothing, or one of them is unknown.
    """
    if store is None or store == "none":
        if dtype is not None:
            raise ValueError("A store_dtype needs something to store: give store as well, tokens or keys.")
        return None
    return StoreSettings(store, dtype or "float16")


def read_store(built: dict[str, Any]) -> StoreSettings | None:
    """What an index stores, from its description; `None` where it says nothing."""
    stored = built.get("stored")
    return None if stored is None else StoreSettings(**stored)


def build_stored_row(file: VideoFile, start_seconds: float | None, states: np.ndarray) -> dict[str, Any]:
    """A row of the table of what is stored, for a video or a moment of one."""
    return {**asdict(file), "start_seconds": start_seconds, "states": states}


def match_stored(
    index: VideoIndex, store: StoreSettings, model: Any, rows: Sequence[dict[str, Any]], text_tokens: torch.Tensor
) -> dict[str, float]:
    """Judge rows of an index by a text, from what it stores of them.

    Args:
        index: It.
        store: What it stores.
        model: The dual encoder with its matching head.
        rows: As a search gives them, each of another video; these alone are read.
        text_tokens: `(1, text tokens, H)`.

    Returns:
        By path, the raw logit of the matching head; without rows of which nothing is stored.
    """
    found = index.read_stored(rows, store.dtype)
    shapes: dict[tuple[int, ...], list[str]] = {}
    for path, states in found.items():
        shapes.setdefault(states.shape, []).append(path)
    matching: dict[str, float] = {}
    for paths in shapes.values():
        logits = store.match(model, [found[path] for path in paths], text_tokens)
        matching.update(zip(paths, logits, strict=True))
    return matching


def explain_encoding(num_videos: int, store: StoreSettings | None) -> str:
    """Say in one line why re-ranking encodes videos."""
    videos = "1 video" if num_videos == 1 else f"{num_videos} videos"
    if store is None:
        return (
            f"Re-ranking reads and encodes {videos} again, since the index stores only vectors; in one made with "
            "`umt-hf embed --store tokens`, or keys, it takes what is stored."
        )
    return f"Re-ranking reads and encodes {videos} again, of which the index has no {store.what}."


def format_bytes(count: float) -> str:
    """Write bytes in the largest decimal unit that leaves at least one."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"
