"""The clips of all runs: rendered once, decoded once."""

import csv
from pathlib import Path

import numpy as np

from umt_hf.moving_shapes import variants
from umt_hf.moving_shapes.render import write_moving_shapes
from umt_hf.processing.decoding import open_video

from . import settings
from .settings import Budget


def prepare_data(folder: Path, budget: Budget) -> None:
    """Render the clips and their variants, and decode each once into a `.npy` file, which every run reads."""
    data = write_moving_shapes(folder / "data", *budget.num_clips)
    variants.write_low_data(data, settings.LOW_DATA_RATIO)
    splits = ["train", "train_low_data", "validation", "test"]
    for corruption in settings.CORRUPTIONS:
        variants.write_corrupted_test(data, corruption, settings.SEVERITY, budget.num_corrupted_clips)
        splits.append(f"test_{corruption}_{settings.SEVERITY}")
    for split in splits:
        decode_split(data, folder / "finetune" / "frames", split)
    curve = budget.num_curve_clips
    for task in settings.TASKS:
        for name, split, count in (
            ("curve", "validation", curve),
            ("test_intact", "test", budget.num_corrupted_clips),
        ):
            lines = (
                (folder / "finetune" / "frames" / f"{split}_{task}.csv")
                .read_text(encoding="utf-8")
                .splitlines(keepends=True)
            )
            (folder / "finetune" / "frames" / f"{name}_{task}.csv").write_text(
                "".join(lines[:count]), encoding="utf-8"
            )


def decode_split(data: Path, frames: Path, split: str) -> None:
    """Write the frames of every clip of a split, and `<split>_<task>.csv` that name them."""
    for task in settings.TASKS:
        with (data / f"{split}_{task}.csv").open(encoding="utf-8") as annotation:
            rows = list(csv.reader(annotation))
        for name, _ in rows:
            target = (frames / name).with_suffix(".npy")
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                with open_video(data / name) as reader:
                    clip = reader.get_frames(range(reader.num_frames))
                np.save(target.with_suffix(".part.npy"), clip)
                target.with_suffix(".part.npy").rename(target)
        lines = [f"{Path(name).with_suffix('.npy')},{label}\n" for name, label in rows]
        (frames / f"{split}_{task}.csv").write_text("".join(lines), encoding="utf-8")
