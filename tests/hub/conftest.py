"""Tiny model folders."""

from pathlib import Path

import pytest
import torch

from tests.unit.modeling.test_modeling_video_text import TINY, TINY_TEXT, TINY_VISION
from tests.unit.processing.test_processing_video_text import WORDS, build_processor
from umt_hf import (
    UMTVideoConfig,
    UMTVideoForPreTraining,
    UMTVideoForVideoClassification,
    UMTVideoProcessor,
    UMTVideoTextConfig,
    UMTVideoTextForQuestionAnswering,
    UMTVideoTextForRetrieval,
)


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A folder of each architecture that a test needs, with its processor."""
    root = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    config = UMTVideoConfig(**TINY_VISION, num_labels=3)
    text = UMTVideoTextConfig(**{**TINY, "text_config": {**TINY_TEXT, "vocab_size": len(WORDS)}})
    models = {
        "stage1": UMTVideoForPreTraining(config),
        "classifier": UMTVideoForVideoClassification(config),
        "retrieval": UMTVideoTextForRetrieval(text),
        "answering": UMTVideoTextForQuestionAnswering(text),
    }
    for name, model in models.items():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(root / name)
        is_video = name in ("stage1", "classifier")
        processor = UMTVideoProcessor.from_model_config(config) if is_video else build_processor(max_length=16)
        processor.save_pretrained(root / name)
        (root / name / "run.yaml").write_text("model: {}\n")
    return {name: root / name for name in models}


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
