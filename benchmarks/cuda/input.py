"""Clips from files to normalised batches on the device, with worker processes."""

import importlib.util
import os
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.common import synchronize
from umt_hf.processing.clips import read_clip
from umt_hf.processing.train_transforms import PretrainingTransform

NUM_FILES = 32
NUM_FRAMES = 8
HEIGHT, WIDTH = 256, 340
FRAMES_OF_FILE = {"mp4": 300, "npy": 32}


class TrainingClips(Dataset):
    """Random clips of files, as stage 1 cuts them.

    Args:
        files: Videos or arrays.
        transform: Crop and flip.
        length: Clips of an epoch.
    """

    def __init__(self, files: list[Path], transform: PretrainingTransform, length: int):
        self.files, self.transform, self.length = files, transform, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, bool]:
        generator = torch.Generator().manual_seed(index)
        frames = read_clip(str(self.files[index % len(self.files)]), NUM_FRAMES, "segments", generator=generator)
        crop = self.transform.sample(frames.shape[-2], frames.shape[-1], generator)
        return self.transform.crop(frames, crop).contiguous(), crop.flip


def measure_input(device: torch.device, is_tiny: bool, seconds: float) -> dict[str, Any]:
    """Clips per second of loader and resizing on the device: from videos where PyAV is there, else from arrays."""
    kind = "mp4" if importlib.util.find_spec("av") else "npy"
    size, batch_size = (64, 4) if is_tiny else (224, 64)
    workers = min(2 if is_tiny else 14, os.cpu_count() or 1)
    transform = PretrainingTransform(size)
    with tempfile.TemporaryDirectory() as folder:
        files = [write_file(Path(folder) / f"{i}.{kind}", is_tiny) for i in range(2 if is_tiny else NUM_FILES)]
        clips = TrainingClips(files, transform, 10**9)
        loader = DataLoader(
            clips,
            batch_sampler=_count_batches(batch_size),
            num_workers=workers,
            collate_fn=lambda samples: tuple(zip(*samples, strict=True)),
            prefetch_factor=2,
            multiprocessing_context="fork",  # nothing of CUDA is used in the workers
        )
        batches = iter(loader)
        found = _time_batches(batches, transform, device, batch_size, seconds)
        del batches
    return found | {"source": f".{kind}, {FRAMES_OF_FILE[kind]} frames of {WIDTH} x {HEIGHT}", "workers": workers}


def _time_batches(
    batches: Any, transform: PretrainingTransform, device: torch.device, batch_size: int, seconds: float
) -> dict[str, Any]:
    done, device_seconds = 0, 0.0
    for frames, flips in islice(batches, 2):  # workers start
        transform.resize_and_normalize([clip.to(device) for clip in frames], flips)
    synchronize(device)
    began = time.perf_counter()
    while not done or time.perf_counter() - began < seconds:
        frames, flips = next(batches)
        before = time.perf_counter()
        transform.resize_and_normalize([clip.to(device, non_blocking=True) for clip in frames], flips)
        synchronize(device)
        device_seconds += time.perf_counter() - before
        done += 1
    rate = done * batch_size / (time.perf_counter() - began)
    return {"clips_per_second": {"median": rate, "min": rate, "max": rate, "samples": [rate]}} | {
        "batch_size": batch_size,
        "resize_seconds_per_batch": device_seconds / done,
    }


def _count_batches(batch_size: int) -> Any:
    return ([batch * batch_size + i for i in range(batch_size)] for batch in cycle(range(10**6)))


def write_file(path: Path, is_tiny: bool) -> Path:
    """Write a video, or an array of frames, by the suffix of its name."""
    height, width = (64, 64) if is_tiny else (HEIGHT, WIDTH)
    if path.suffix == ".npy":
        frames = np.random.default_rng(0).integers(0, 255, (FRAMES_OF_FILE["npy"], height, width, 3), np.uint8)
        np.save(path, frames)
        return path
    from benchmarks.decoding.videos import write_kinetics_like  # needs PyAV

    write_kinetics_like(path, num_frames=16 if is_tiny else FRAMES_OF_FILE["mp4"], height=height, width=width)
    return path
