"""Frames of one clip."""

import numpy as np
import pytest
import torch

from umt_hf.moving_shapes.render import write_video
from umt_hf.processing.clips import read_clip
from umt_hf.processing.decoding import VideoDecodingError
from umt_hf.processing.sampling import sample_frame_indices


@pytest.fixture
def video(tmp_path) -> str:
    """30 frames at 8 per second, frame i of grey 8 * i."""
    levels = np.arange(30, dtype=np.uint8) * 8
    write_video(tmp_path / "clip.mp4", np.broadcast_to(levels[:, None, None, None], (30, 32, 48, 3)))
    return str(tmp_path / "clip.mp4")


def list_frames(clip: torch.Tensor) -> list[int]:
    assert clip.dtype == torch.uint8 and clip.shape[1:] == (3, 32, 48)
    return (clip.float().mean(dim=(1, 2, 3)) / 8).round().int().tolist()


def test_frames_are_those_of_the_strategy(video):
    for strategy in ("uniform", "segments", "middle", "dense"):
        expected = sample_frame_indices(30, 4, strategy, frame_stride=3)
        assert list_frames(read_clip(video, 4, strategy, frame_stride=3)) == expected
        generator = torch.Generator().manual_seed(5)
        expected = sample_frame_indices(30, 4, strategy, generator=torch.Generator().manual_seed(5), frame_stride=3)
        assert list_frames(read_clip(video, 4, strategy, generator=generator, frame_stride=3)) == expected


def test_only_the_first_seconds_are_chosen_from(video):
    assert max(list_frames(read_clip(video, 6, "segments"))) > 20
    assert max(list_frames(read_clip(video, 6, "segments", first_seconds=1.0))) < 8


def test_what_has_no_frame_rate_has_no_first_seconds(tmp_path):
    np.save(tmp_path / "clip.npy", np.zeros((5, 32, 48, 3), dtype=np.uint8))
    assert read_clip(tmp_path / "clip.npy", 2).shape == (2, 3, 32, 48)
    with pytest.raises(VideoDecodingError, match="clip.npy.*first_seconds"):
        read_clip(tmp_path / "clip.npy", 2, first_seconds=1.0)
