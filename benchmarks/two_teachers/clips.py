"""The clips in memory: all frames for the video teacher, the middle ones for the probes."""

from pathlib import Path

import numpy as np
import torch
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from benchmarks.pretraining_value.settings import STUDENT, TASKS

NUM_FRAMES = STUDENT["num_frames"]


def load_clips(frames: Path, split: str) -> torch.Tensor:
    """All frames of a split `(clips, frames, 3, H, W)`, 8-bit.

    Args:
        frames: Folder with the frames of the clips, and `<split>_<task>.csv` that name them.
        split: What these names start with.
    """
    clips = [np.load(frames / name) for name, _ in read_rows(frames, split, "motion")]
    return torch.from_numpy(np.stack(clips)).movedim(-1, 2)


def read_rows(frames: Path, split: str, task: str) -> list[tuple[str, int]]:
    """Names of the clips of a split, and their labels."""
    lines = (frames / f"{split}_{task}.csv").read_text(encoding="utf-8").splitlines()
    return [(name, int(label)) for name, label in (line.rsplit(",", 1) for line in lines)]


def load_probed_split(frames: Path, split: str) -> dict[str, torch.Tensor]:
    """The middle frame of each segment of its clips, as `pixels`, and the labels of each task."""
    clips = load_clips(frames, split)
    length = clips.shape[1] // NUM_FRAMES
    labels = {task: torch.tensor([label for _, label in read_rows(frames, split, task)]) for task in TASKS}
    return {"pixels": clips[:, length // 2 :: length].clone(), **labels}


def sample_frames(clips: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A frame at random from each segment of some clips, as stage 1 reads them: `(rows, T, 3, H, W)`."""
    length = clips.shape[1] // NUM_FRAMES
    places = length * torch.arange(NUM_FRAMES) + torch.randint(length, (len(rows), NUM_FRAMES))
    return clips[rows[:, None], places]


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """8-bit pixels in ImageNet's statistics."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (pixels.float() / 255 - mean) / std
