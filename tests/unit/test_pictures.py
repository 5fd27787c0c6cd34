"""Pictures: what is drawn where; how they look is for people to judge."""

import json

import numpy as np
import torch
from PIL import Image

from umt_hf.training.pictures import STAGE_2_CURVES, FoundVideo, denormalize, plot_found_videos, plot_losses


def test_found_videos_are_framed_by_right_and_wrong(tmp_path):
    clip = torch.zeros(4, 3, 16, 16)
    found = [FoundVideo("a cat", "a cat", True, clip), FoundVideo("a dog", "a cat", False, clip[:3])]
    plot_found_videos(found, tmp_path / "found.png")
    pixels = np.asarray(Image.open(tmp_path / "found.png").convert("RGB")).astype(int)
    upper, lower = pixels[: len(pixels) // 2], pixels[len(pixels) // 2 :]
    for half, color, other in ((upper, (44, 160, 44), (214, 39, 40)), (lower, (214, 39, 40), (44, 160, 44))):
        assert (abs(half - color).sum(-1) < 30).sum() > 200 > (abs(half - other).sum(-1) < 30).sum()


def test_losses_are_drawn_by_name(tmp_path):
    lines = [{"step": step, "video_vtc_loss": 3.0 / step, "other": 1.0} for step in range(1, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_losses(tmp_path / "metrics.jsonl", tmp_path / "losses.png", STAGE_2_CURVES, "loss")
    pixels = np.asarray(Image.open(tmp_path / "losses.png").convert("RGB")).astype(int)
    assert (abs(pixels - (31, 119, 180)).sum(-1) < 40).sum() > 100  # one curve, in the first colour


def test_denormalized_frames_are_in_range():
    frames = denormalize(torch.randn(2, 3, 8, 8) * 5)
    assert frames.shape == (2, 8, 8, 3) and frames.min() >= 0 and frames.max() <= 1
