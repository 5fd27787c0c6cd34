"""Tiny models for every tab of the demo, and a few clips."""

import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from tests.e2e.runs import save_teacher
from tests.unit.inference.test_search import save_model
from umt_hf import (
    UMTVideoConfig,
    UMTVideoForPreTraining,
    UMTVideoForVideoClassification,
    UMTVideoProcessor,
    UMTVideoTextForQuestionAnswering,
)
from umt_hf.demo.settings import DemoSettings
from umt_hf.moving_shapes.render import write_moving_shapes

pytest.importorskip("lancedb")

LABELS = ("riding a bike", "making tea", "<b>juggling</b>")
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 64,
    "num_frames": 4,
    "num_aligned_layers": 2,
    "teacher_image_size": 64,
    "teacher_hidden_size": 12,
    "mask_ratio": 0.5,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    """Five clips and a file that is none."""
    folder = tmp_path_factory.mktemp("shapes")
    write_moving_shapes(folder, num_train_clips=5, num_validation_clips=1, num_test_clips=1)
    clips = folder / "clips"
    shutil.copytree(folder / "videos" / "train", clips)
    (clips / "broken.mp4").write_bytes(b"no video at all" * 10)
    return clips


@pytest.fixture(scope="session")
def sound(tmp_path_factory) -> Path:
    """A file that holds sound alone."""
    path = tmp_path_factory.mktemp("sound") / "song.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="session")
def settings(clips, tmp_path_factory) -> DemoSettings:
    root = tmp_path_factory.mktemp("models")
    save_teacher(root / "teacher")
    config = UMTVideoConfig(**VISION, id2label=dict(enumerate(LABELS)), label2id={n: i for i, n in enumerate(LABELS)})
    for name, kind in (("student", UMTVideoForPreTraining), ("classifier", UMTVideoForVideoClassification)):
        model = kind(config)
        if name == "classifier":
            torch.nn.init.normal_(model.classifier.weight, std=2.0)
        model.save_pretrained(root / name)
        UMTVideoProcessor.from_model_config(config).save_pretrained(root / name)
    save_model(root / "video_text")
    save_model(root / "answers", UMTVideoTextForQuestionAnswering)
    return DemoSettings(
        classifier=str(root / "classifier"),
        teacher=str(root / "teacher"),
        student=str(root / "student"),
        video_text=str(root / "video_text"),
        question_answering=str(root / "answers"),
        videos=str(clips),
    )


@pytest.fixture(scope="session")
def models(settings):
    from umt_hf.demo.models import load_demo_models

    return load_demo_models(settings)
