"""Actions of persons in the boxes of a key frame.

Legend: T frames, M boxes of a key frame.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch.nn.utils.rnn import pad_sequence

from ..modeling.modeling_umt_video import UMTVideoForActionDetection
from ..processing.decoding import VideoSource
from ..processing.detection_transforms import prepare_test_clip
from ..processing.key_clips import read_key_clip
from ..processing.sampling import compute_key_frame_offsets
from ..processing.video_processing_umt_video import UMTVideoProcessor
from ..runs.arguments import KeptTokenArguments
from .arguments import require_count
from .held_out import mark_nonfinite, require_finite
from .labels.scored import ScoredLabel, rank_labels
from .loading import (
    keep_tokens,
    list_class_names,
    load_complete_model,
    load_video_processor,
    place_model,
    resolve_device,
)


@dataclass(frozen=True)
class DetectedBox:
    """A box, and its actions.

    Attributes:
        box: x1, y1, x2, y2 in pixels of the video.
        actions: The likeliest, best first. Each has its own probability: a person may do several things at once.
    """

    box: tuple[float, ...]
    actions: tuple[ScoredLabel, ...]


@dataclass(frozen=True)
class ActionReport:
    """What `ActionDetector.detect` found in a key frame.

    Attributes:
        boxes: In the order in which they were given.
    """

    boxes: tuple[DetectedBox, ...]

    def format(self) -> str:
        """Write it as lines for people: each box with its actions."""
        lines = []
        for found in self.boxes:
            lines.append("box " + ", ".join(f"{edge:g}" for edge in found.box))
            lines += [f"  {scored.format()}" for scored in found.actions]
        return "\n".join(lines)


class ActionDetector:
    """Names what persons in given boxes do: loads an action detector once and answers often.

    Args:
        model: Folder or Hub id of an action detector with its processor.
        device: Where the model runs; default: the process's accelerator, or CPU.
        attn_implementation: "sdpa", "eager", ...; default: Transformers' choice.
        dtype: Default: that of the stored weights.
        tokens: Which tokens of a clip the encoder sees; default: as the model's configuration says.

    Raises:
        ValueError: If the model lacks weights, such as those of the head: a random head gives answers too.
        OSError: If there is no model, or no processor beside it.

    Examples:
        >>> from umt_hf import ActionDetector
        >>> detector = ActionDetector("umt-vit-b16-ava")
        >>> boxes = [[12, 30, 80, 200]]  # x1, y1, x2, y2
        >>> report = detector.detect("video.mp4", boxes, key_seconds=0.5)
        >>> report.boxes[0].actions[0].label
        'stand'
    """

    def __init__(
        self,
        model: str | os.PathLike,
        device: str | torch.device | None = None,
        attn_implementation: str | None = None,
        dtype: torch.dtype | None = None,
        tokens: KeptTokenArguments | None = None,
    ):
        loaded = load_complete_model(
            UMTVideoForActionDetection, model, attn_implementation=attn_implementation, dtype=dtype
        )
        self.kept_tokens = keep_tokens(loaded, tokens)
        self.processor = load_video_processor(model)
        self.device = resolve_device(device)
        self.model = place_model(loaded, self.device)
        self.labels = list_class_names(loaded.config)

    @torch.inference_mode()
    def detect(
        self,
        video: VideoSource,
        boxes: Sequence[Sequence[float]],
        key_seconds: float | None = None,
        key_frame: int | None = None,
        top_k: int | None = None,
    ) -> ActionReport:
        """Actions in the given boxes of one key frame.

        Args:
            video: File, URL, bytes or folder of one-second files.
            boxes: x1, y1, x2, y2 of each, in pixels of the video.
            key_seconds: When the key frame is shown.
            key_frame: Its number instead.
            top_k: How many actions per box; default: all.

        Raises:
            VideoDecodingError: If the video cannot be read or does not have the key frame.
            ValueError: If a box is not one, there are no boxes, not exactly one of `key_seconds` and `key_frame` is
                given, or the model gives NaN or infinite values.
        """
        # Before decoding, which takes longer than reading a mistake.
        require_count("top_k", top_k)
        check_boxes(boxes)
        frames = read_frames(self.processor, video, key_seconds, key_frame)
        shares = to_shares(boxes, frames.shape[-1], frames.shape[-2])
        clip, prepared = prepare_test_clip(frames, shares, self.processor, self.model.config.patch_size)
        logits = self.model(clip[None].to(self.device, self.model.dtype), prepared[None].to(self.device)).logits[0]
        # Sigmoid, since actions do not exclude each other.
        probabilities = mark_nonfinite(logits).sigmoid().cpu()
        require_finite(self.model, probabilities, "boxes", lambda number: f"box {list(boxes[number])}")
        return ActionReport(
            tuple(
                DetectedBox(tuple(float(edge) for edge in box), rank_labels(row, self.labels, top_k))
                for box, row in zip(boxes, probabilities.numpy(), strict=True)
            )
        )


def check_boxes(boxes: Sequence[Sequence[float]]) -> None:
    """Refuse what cannot be boxes.

    Raises:
        TypeError: If they are not lists of numbers.
        ValueError: If there are none, or one does not have four edges in their order.
    """
    try:
        num_boxes = len([[float(edge) for edge in box] for box in boxes])
    except (TypeError, ValueError) as error:
        raise TypeError(f"boxes must be a list with x1, y1, x2, y2 of each box, got {boxes!r}.") from error
    if not num_boxes:
        raise ValueError("Give at least one box: x1, y1, x2, y2 in pixels of the video.")
    for box in boxes:
        # NaN is not smaller than anything, so that it is refused too.
        if len(box) != 4 or not (box[0] < box[2] < float("inf") and box[1] < box[3] < float("inf")):
            raise ValueError(f"A box is x1, y1, x2, y2 in pixels, with x1 < x2 and y1 < y2, got {list(box)}.")


def read_frames(
    processor: UMTVideoProcessor, video: VideoSource, key_seconds: float | None, key_frame: int | None
) -> torch.Tensor:
    """Frames around a key frame, sampled as the processor's settings say, uint8 `(T, 3, height, width)`.

    Raises:
        VideoDecodingError: If the video cannot be read or does not have the key frame.
    """
    offsets = compute_key_frame_offsets(
        processor.num_frames,
        cast("Literal['dense', 'segments']", processor.sampling_strategy),
        frame_stride=processor.frame_stride,
        frame_span=cast("int", processor.frame_span),
    )
    frames = read_key_clip(video, offsets, key_seconds=key_seconds, key_frame=key_frame, decoder=processor.decoder)
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


def to_shares(boxes: Sequence[Sequence[float]], width: int, height: int) -> torch.Tensor:
    """Boxes stated for a frame of `width` x `height` as shares of it, cut at its border, float32 `(M, 4)`."""
    edges = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    return (edges / torch.tensor([width, height, width, height])).clamp(0, 1).float()


def pad_boxes(boxes: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Boxes of several clips as `boxes (B, M, 4)` and `boxes_mask (B, M)`, M at least 1."""
    counts = torch.tensor([len(own) for own in boxes])
    # The extra row makes room for one box where no clip has any, and is cut off again.
    padded = pad_sequence([*boxes, torch.zeros(1, 4)], batch_first=True)[:-1]
    return {"boxes": padded, "boxes_mask": torch.arange(padded.shape[1]) < counts[:, None]}
