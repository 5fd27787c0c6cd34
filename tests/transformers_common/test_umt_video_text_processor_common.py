"""Transformers' ProcessorTesterMixin on the processor of videos and texts."""

import sys
import unittest
from types import ModuleType

from transformers import PreTrainedTokenizerFast

from umt_hf import UMTVideoProcessor, UMTVideoTextProcessor
from umt_hf.processing.processing_umt_video_text import build_tokenizer

from .transformers_sdist import import_common_tests

# A module of Transformers' repository that the source distribution lacks; it finds downloads of the sample files.
downloads = ModuleType("fetch_hub_objects_for_ci")
downloads.url_to_local_path = lambda url: url
sys.modules.setdefault(downloads.__name__, downloads)
processing_tests = import_common_tests("test_processing_common")

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]


class UMTVideoTextProcessorTest(processing_tests.ProcessorTesterMixin, unittest.TestCase):
    processor_class = UMTVideoTextProcessor
    videos_input_name = "pixel_values"

    @classmethod
    def _setup_video_processor(cls) -> UMTVideoProcessor:
        return UMTVideoProcessor(num_frames=2)

    @classmethod
    def _setup_tokenizer(cls) -> PreTrainedTokenizerFast:
        return build_tokenizer(WORDS)
