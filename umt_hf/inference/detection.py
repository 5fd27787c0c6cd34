"""Action detection on held-out key frames: every box scored once, spread over processes, and measured as AVA does.

Legend: K key frames, M boxes of one, C classes.
"""

import logging
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ..processing.decoding import VideoSource
from ..processing.detection_transforms import prepare_test_clip
from ..processing.key_clips import read_key_clip
from ..processing.sampling import compute_key_frame_offsets
from ..processing.video_processing_umt_video import UMTVideoProcessor

logger = logging.getLogger(__name__)


def read_frames(
    processor: UMTVideoProcessor, video: VideoSource, key_seconds: float | None, key_frame: int | None
) -> torch.Tensor:
    """Frames around a key frame as the processor says, uint8 `(T, 3, height, width)`.

    Raises:
        VideoDecodingError: If the video cannot be read or does not have the key frame.
    """
    offsets = compute_key_frame_offsets(
        processor.num_frames,
        processor.sampling_strategy,
        frame_stride=processor.frame_stride,
        frame_span=processor.frame_span,
    )
    frames = read_key_clip(video, offsets, key_seconds=key_seconds, key_frame=key_frame, decoder=processor.decoder)
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


def to_shares(boxes: Sequence[Sequence[float]], width: int, height: int) -> torch.Tensor:
    """Boxes stated for a frame of `width` x `height` as shares of it, cut at its border, float32 `(M, 4)`."""
    boxes = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    return (boxes / torch.tensor([width, height, width, height])).clamp(0, 1).float()


def pad_boxes(boxes: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Boxes of several clips as `boxes (B, M, 4)` and `boxes_mask (B, M)`, M at least 1."""
    counts = torch.tensor([len(own) for own in boxes])
    padded = pad_sequence([*boxes, torch.zeros(1, 4)], batch_first=True)[:-1]
    return {"boxes": padded, "boxes_mask": torch.arange(padded.shape[1]) < counts[:, None]}


@torch.no_grad()
def detect_in_video(
    model: nn.Module,
    processor: UMTVideoProcessor,
    video: VideoSource,
    boxes: Sequence[Sequence[float]],
    key_seconds: float | None = None,
    key_frame: int | None = None,
) -> list[dict[str, float]]:
    """Actions in the given boxes of one key frame.

    Args:
        model: `UMTVideoForActionDetection`.
        processor: Of the model.
        video: File, URL, bytes or folder of one-second files.
        boxes: x1, y1, x2, y2 in pixels of the video.
        key_seconds: When the key frame is shown.
        key_frame: Its number instead.

    Returns:
        For each box, the name of each class and its probability, the most likely first.

    Raises:
        VideoDecodingError: If the video cannot be read or does not have the key frame.
    """
    frames = read_frames(processor, video, key_seconds, key_frame)
    shares = to_shares(boxes, frames.shape[-1], frames.shape[-2])
    clip, prepared = prepare_test_clip(frames, shares, processor, model.config.patch_size)
    logits = model.eval()(clip[None].to(model.device, model.dtype), prepared[None].to(model.device)).logits[0]
    found = []
    for probabilities in logits.float().sigmoid():
        order = probabilities.argsort(descending=True).tolist()
        found.append({model.config.id2label[i]: float(probabilities[i]) for i in order})
    return found
