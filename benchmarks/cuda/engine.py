"""Features of files, as `umt-hf features` makes them: how much of the time the device is at work."""

import importlib.util
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import summarize
from benchmarks.stage1_step.workload import Size, build_student_config
from umt_hf.modeling.modeling_umt_video import UMTVideoModel
from umt_hf.processing.video_processing_umt_video import UMTVideoProcessor

from .input import FRAMES_OF_FILE, write_file
from .limits import NotHere

WRITTEN_FILES = 16
NAMES = 256  # of these files, so that starting the workers does not count
TIMES = re.compile(r"([\d.]+) s: (\d+)% waiting for data, (\d+)% in the model")


def measure_engine(size: Size, is_tiny: bool) -> dict[str, Any]:
    """Windows per second, and the shares of the time in the model and in waiting for data.

    Raises:
        NotHere: If a library that the command needs is missing.
    """
    if importlib.util.find_spec("datasets") is None:
        raise NotHere("datasets is not installed")
    from umt_hf.inference.features import save_features

    kind = "mp4" if importlib.util.find_spec("av") else "npy"
    said: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = UMTVideoModel._from_config(build_student_config(size))
        model.save_pretrained(folder / "model")
        UMTVideoProcessor.from_model_config(model.config).save_pretrained(folder / "model")
        (folder / "videos").mkdir()
        files = [write_file(folder / f"{i}.{kind}", is_tiny) for i in range(2 if is_tiny else WRITTEN_FILES)]
        for i in range(4 if is_tiny else NAMES):
            os.link(files[i % len(files)], folder / "videos" / f"{i}.{kind}")
        report = save_features(
            [str(folder / "videos")],
            folder / "model",
            folder / "features",
            batch_size=2 if is_tiny else 64,
            announce=said.append,
            num_workers=1 if is_tiny else min(14, os.cpu_count() or 1),
        )
        windows = sum(len(_read_features(path)) for path in (folder / "features").glob("*.safetensors"))
    if report.skipped:
        raise RuntimeError(f"{report.skipped[0].path}: {report.skipped[0].reason}")
    (times,) = [found for line in said if (found := TIMES.match(line))]
    seconds, waiting, in_model = map(float, times.groups())
    return {
        "clips_per_second": summarize([windows / max(seconds, 0.1)]),
        "source": f".{kind}, {FRAMES_OF_FILE[kind]} frames; {in_model:.0f} % of the time in the model, "
        f"{waiting:.0f} % waiting for data",
        "model_share": in_model / 100,
        "waiting_share": waiting / 100,
    }


def _read_features(path: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(path)["features"]
