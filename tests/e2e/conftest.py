"""A few rendered videos and an untrained teacher: enough for whole runs that take seconds."""

import inspect
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoVideoProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection, Pipeline, pipeline

from umt_hf.moving_shapes.render import write_moving_shapes

ROOT = Path(__file__).parents[2]
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "patch_size": 16,
    "image_size": 64,
    "num_frames": 4,
    "num_aligned_layers": 2,
    "drop_path_rate": 0.0,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "scale_learning_rate": "false",
    "warmup_steps": 2,
    "dataloader_num_workers": 0,
    "logging_steps": 1,
    "save_steps": 1000,
    "report_to": "none",
    "mixed_precision": "no",
}


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("moving_shapes")
    write_moving_shapes(folder, num_train_clips=24, num_validation_clips=6, num_test_clips=6)
    return folder


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        image_size=64,
        patch_size=16,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        projection_dim=12,
    )
    folder = tmp_path_factory.mktemp("teacher")
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps its state between runs of one process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def flags(shapes, teacher, tmp_path):
    """Command line of a tiny run; keyword arguments change it."""

    def build(**changes) -> list[str]:
        fields = {
            **TINY,
            "train_data": shapes / "train.csv",
            "validation_data": shapes / "validation.csv",
            "teacher_name_or_path": teacher,
            "output_dir": tmp_path / "run",
            "max_steps": 4,
            **changes,
        }
        arguments = []
        for name, value in fields.items():
            if value is not None:
                arguments += [f"--{name}", str(value)]
        return arguments

    return build


def build_pipeline(folder: Path) -> Pipeline:
    """The classification pipeline of a folder.

    Before it took video processors, the pipeline read the frames itself and wanted to be told what prepares them.
    """
    takes_videos = "video_processor" in inspect.signature(pipeline).parameters
    options = {} if takes_videos else {"image_processor": AutoVideoProcessor.from_pretrained(folder)}
    return pipeline("video-classification", model=str(folder), **options)
