"""A few rendered videos and an untrained teacher: enough for whole runs that take seconds."""

import inspect
import multiprocessing
import multiprocessing.reduction
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoVideoProcessor, Pipeline, pipeline

from tests.e2e.runs import PRETRAINING, save_student, save_teacher, to_flags
from tests.processes import start_server
from umt_hf.moving_shapes.render import render_clip, sample_clip, write_moving_shapes, write_video

ROOT = Path(__file__).parents[2]
# Sizes of a student from scratch.
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "patch_size": 16,
    "image_size": 64,
}


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("moving_shapes")
    write_moving_shapes(folder, num_train_clips=24, num_validation_clips=6, num_test_clips=6)
    return folder


@pytest.fixture(scope="session")
def colors(tmp_path_factory) -> Path:
    """Red and blue shapes in a folder for each colour: `train/red/...`, `validation/blue/...`.

    `few_train.csv` and `few_validation.csv` list 8 and 4 of each, blue as class 0.
    """
    folder = tmp_path_factory.mktemp("colors")
    for split, num_clips, num_listed in (("train", 150, 8), ("validation", 60, 4)):
        rows = []
        for label, color in enumerate(("blue", "red")):
            (folder / split / color).mkdir(parents=True)
            clips = {f"{split}/{color}/{index:05d}.mp4": sample_clip(0, split, index) for index in range(num_clips)}
            names = [name for name, clip in clips.items() if clip.color == color]
            for name in names:
                write_video(folder / name, render_clip(clips[name])[0])
            rows += [f"{name},{label}" for name in names[:num_listed]]
        assert len(rows) == 2 * num_listed
        (folder / f"few_{split}.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="session")
def student(tmp_path_factory) -> Path:
    return save_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps its state between runs of one process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def forkserver(monkeypatch):
    """Workers of loaders start as from Python 3.14 on: they get a copy of what they need, without weights."""
    started: list[int] = []

    def refuse(module: torch.nn.Module, protocol: int) -> Any:
        assert not list(module.parameters()), f"A worker gets a copy of {type(module).__name__}."
        return object.__reduce_ex__(module, protocol)

    def dump(process: Any, file: Any, protocol: int | None = None) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.Module, "__reduce_ex__", refuse)
            original(process, file, protocol)
        started.append(file.tell())

    start_server()
    method = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    original = multiprocessing.reduction.dump
    monkeypatch.setattr(multiprocessing.reduction, "dump", dump)
    yield started
    multiprocessing.set_start_method(method, force=True)
    assert started and max(started) < 500_000


@pytest.fixture
def flags(shapes, teacher, tmp_path):
    """Command line of a tiny run; keyword arguments change it."""

    def build(**changes) -> list[str]:
        fields = {
            **PRETRAINING,
            **TINY,
            "train_data": shapes / "train.csv",
            "validation_data": shapes / "validation.csv",
            "teacher_name_or_path": teacher,
            "output_dir": tmp_path / "run",
        }
        return to_flags(**fields | changes)

    return build


# Before it took video processors, the pipeline of Transformers read other frames by itself.
PIPELINE_TAKES_VIDEOS = "video_processor" in inspect.signature(pipeline).parameters


def build_pipeline(folder: Path) -> Pipeline:
    """The classification pipeline of a folder; an old one wants to be given what prepares the frames."""
    options = {} if PIPELINE_TAKES_VIDEOS else {"image_processor": AutoVideoProcessor.from_pretrained(folder)}
    return pipeline("video-classification", model=str(folder), **options)
