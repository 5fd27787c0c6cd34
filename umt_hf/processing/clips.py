"""The frames of one clip of a video, as training reads them."""

import torch

from .decoding import DecoderName, VideoDecodingError, VideoSource, open_video
from .sampling import SamplingStrategy, sample_frame_indices, trim_num_frames


def read_clip(
    source: VideoSource,
    num_frames: int,
    strategy: SamplingStrategy = "uniform",
    *,
    generator: torch.Generator | None = None,
    frame_stride: int = 4,
    first_seconds: float | None = None,
    decoder: DecoderName = "pyav",
) -> torch.Tensor:
    """Read one clip of a video; only its frames are decoded.

    Args:
        source: Path, URL, bytes or open file.
        num_frames: Frames per clip.
        strategy: How they are chosen (see `sample_frame_indices`).
        generator: Random source of a training clip; default: the fixed clip in the middle.
        frame_stride: Distance between the frames of a `dense` clip, in frames.
        first_seconds: Length of the video to choose from, in seconds; default: all of it.
        decoder: Video reader.

    Returns:
        Frames `(num_frames, 3, H, W)`, uint8.

    Raises:
        VideoDecodingError: If the video cannot be read, or `first_seconds` is given and it has no frame rate.
        ValueError: If the strategy needs frames that were not kept (see `VideoReader.check_strategy`).
    """
    with open_video(source, decoder) as reader:
        reader.check_strategy(strategy)
        total = reader.num_frames
        if first_seconds is not None:
            if reader.fps is None:
                raise VideoDecodingError(f"{reader.name}: no frame rate, which first_seconds needs.")
            total = trim_num_frames(total, reader.fps, first_seconds)
        indices = sample_frame_indices(total, num_frames, strategy, generator=generator, frame_stride=frame_stride)
        return torch.from_numpy(reader.get_frames(indices)).permute(0, 3, 1, 2)
