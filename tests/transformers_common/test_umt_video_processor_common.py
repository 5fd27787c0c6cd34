"""Transformers' VideoProcessingTestMixin on the video processor."""

import unittest
from typing import Any

from umt_hf import UMTVideoProcessor

from .transformers_sdist import import_common_tests

processing_tests = import_common_tests("test_video_processing_common")


class UMTVideoProcessorTester:
    """Small videos and a processor's settings for them, in the terms of the common tests."""

    batch_size = 3
    num_frames = 8
    num_channels = 3
    settings = {
        "size": {"shortest_edge": 20},
        "crop_size": {"height": 18, "width": 18},
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_convert_rgb": True,
    }

    def prepare_video_inputs(self, equal_resolution: bool = False, return_tensors: str = "pil") -> list[Any]:
        return processing_tests.prepare_video_inputs(
            batch_size=self.batch_size,
            num_frames=self.num_frames,
            num_channels=self.num_channels,
            min_resolution=30,
            max_resolution=80,
            equal_resolution=equal_resolution,
            return_tensors=return_tensors,
        )

    def expected_output_video_shape(self, videos: list[Any]) -> tuple[int, int, int, int]:
        return self.num_frames, self.num_channels, 18, 18


class UMTVideoProcessorTest(processing_tests.VideoProcessingTestMixin, unittest.TestCase):
    fast_video_processing_class = UMTVideoProcessor
    input_name = "pixel_values"
    test_cast_dtype = True

    def setUp(self) -> None:
        super().setUp()
        self.video_processor_tester = UMTVideoProcessorTester()

    @property
    def video_processor_dict(self) -> dict[str, Any]:
        return dict(self.video_processor_tester.settings)
