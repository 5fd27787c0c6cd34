"""Parts of resized frames against resizing all of them, and strips of any length through the processor."""

import resource
import time

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.unit.video_files import write_video
from umt_hf import UMTVideoProcessor
from umt_hf.processing import video_processing_umt_video as processing
from umt_hf.processing.decoding import VideoDecodingError
from umt_hf.processing.detection_transforms import DetectionTransform
from umt_hf.processing.media_files import LIMITS
from umt_hf.processing.resizing import is_extreme, resize_part


@pytest.mark.parametrize("size", [(2, 40), (41, 3), (30, 50), (1, 1), (7, 300)])
@pytest.mark.parametrize("resized", [(32, 640), (224, 300), (20, 20)])
def test_a_part_is_what_resizing_everything_gives(size, resized):
    video = torch.randint(0, 256, (2, 3, *size), generator=torch.Generator().manual_seed(0)).float()
    complete = F.interpolate(video, size=resized, mode="bilinear", antialias=False)
    for box in ((0, 0, *resized), (3, 5, 19, 20), (resized[0] - 4, resized[1] - 9, *resized)):
        top, left, bottom, right = box
        torch.testing.assert_close(
            resize_part(video, resized, box), complete[..., top:bottom, left:right], atol=2e-2, rtol=0
        )
    rounded = resize_part(video.to(torch.uint8), resized, (0, 0, *resized))
    assert rounded.dtype == torch.uint8 and (rounded.float() - complete).abs().max() <= 0.55


@pytest.mark.parametrize("options", [{}, {"num_crops": 3}])
@pytest.mark.parametrize("size", [(4, 80), (90, 5)])
def test_strips_come_out_as_if_resized_first(size, options, monkeypatch):
    processor = UMTVideoProcessor(num_frames=2, size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    video = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    found = processor(video, return_tensors="pt", **options)["pixel_values"]
    monkeypatch.setattr(processing, "is_extreme", lambda height, width: False)
    expected = processor(video, return_tensors="pt", **options)["pixel_values"]
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1.01 / 255 / min(processor.image_std)  # a grey level


def test_ordinary_frames_are_not_touched():
    assert not is_extreme(1080, 1920) and not is_extreme(100, 1600) and is_extreme(100, 1601)


@pytest.mark.parametrize("size", [(2, 4096), (4096, 2)])
def test_a_strip_of_4096_by_2_is_cheap(size, tmp_path):
    path = write_video(tmp_path / "strip.mkv", num_frames=8, height=size[0], width=size[1], codec="libx264", bframes=0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    clips = UMTVideoProcessor()(path, return_tensors="pt")["pixel_values"]
    assert clips.shape == (1, 8, 3, 224, 224)
    assert time.process_time() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_a_strip_that_is_not_cropped_meets_the_limit(monkeypatch):
    video = np.zeros((2, 2, 4096, 3), np.uint8)
    with pytest.raises(
        VideoDecodingError,
        match="<video of 4096 x 2 pixels, resized>: has frames of 524288 x 256 pixels, more than the limit",
    ):
        UMTVideoProcessor(num_frames=2, size={"shortest_edge": 256}, do_center_crop=False)(video)
    monkeypatch.setattr(LIMITS, "max_frame_pixels", 32 * 64)
    small = UMTVideoProcessor(num_frames=2, size={"shortest_edge": 32}, do_center_crop=False)
    assert small(np.zeros((2, 16, 32, 3), np.uint8), return_tensors="pt")["pixel_values"].shape[-2:] == (32, 64)


def test_strips_are_cheap_in_the_training_of_detectors():
    transform = DetectionTransform(32, 40, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    frames = torch.randint(0, 256, (2, 3, 2, 4096), dtype=torch.uint8)
    started = time.process_time()
    clip, boxes, kept = transform(frames, torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.Generator().manual_seed(0))
    assert clip.shape == (2, 3, 32, 32) and time.process_time() - started < 1
