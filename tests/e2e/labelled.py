"""Videos of three colours in the forms that users have: a saved dataset of splits, JSON with several labels."""

import json
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Video

from tests.e2e.runs import to_flags
from umt_hf import UMTVideoForVideoClassification, UMTVideoProcessor
from umt_hf.modeling.configuration_umt_video import UMTVideoConfig
from umt_hf.moving_shapes.render import write_video

NAMES = ("blue", "green", "red")
# Different for each split, so that a figure's number of videos says where it comes from.
COUNTS = {"train": 12, "validation": 6, "test": 3}


def write_colors(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Tiny videos, by split: path and colour of each."""
    found: dict[str, list[tuple[str, str]]] = {}
    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for number in range(count):
            color = NAMES[number % 3]
            path = folder / "media" / f"{split}_{number}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            frames = rng.integers(0, 60, (8, 32, 40, 3), dtype=np.uint8)
            frames[..., {"red": 0, "green": 1, "blue": 2}[color]] += 180
            write_video(path, frames)
            found.setdefault(split, []).append((str(path), color))
    return found


def save_splits(folder: Path, videos: dict[str, list[tuple[str, str]]], names: tuple[str, ...] = NAMES) -> Path:
    """`datasets` dataset of the videos with `Video` and `ClassLabel` columns, numbered as `names` are."""
    features = Features({"video": Video(decode=False), "label": ClassLabel(names=list(names))})
    splits = {
        split: Dataset.from_dict(
            {"video": [path for path, _ in rows], "label": [names.index(color) for _, color in rows]},
            features=features,
        )
        for split, rows in videos.items()
    }
    DatasetDict(splits).save_to_disk(folder)
    return folder


def save_text_splits(folder: Path, rows: dict[str, list[dict]], root: Path) -> Path:
    """`datasets` dataset of rows with a `video` below `root` and texts, by split."""
    splits = {
        split: Dataset.from_list([{**row, "video": str(root / row["video"])} for row in own])
        for split, own in rows.items()
    }
    DatasetDict(splits).save_to_disk(folder)
    return folder


def write_tags(path: Path, rows: list[tuple[str, str]]) -> Path:
    """JSON list with the colour of each video and, of all but green ones, a second label."""
    tags = {"blue": ["blue", "cold"], "green": ["green"], "red": ["red", "warm"]}
    path.write_text(json.dumps([{"video": video, "label": tags[color]} for video, color in rows]))
    return path


def save_classifier(folder: Path, names: tuple[str, ...] = NAMES, **changes) -> Path:
    """An untrained classifier whose scores differ from video to video, with its processor."""
    torch.manual_seed(0)
    config = UMTVideoConfig(
        image_size=32,
        num_frames=2,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_aligned_layers=1,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        **changes,
    )
    model = UMTVideoForVideoClassification(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    UMTVideoProcessor.from_model_config(config).save_pretrained(folder)
    return folder


def build_test_flags(model: Path, data: Path, output: Path, **changes) -> list[str]:
    """Command line of a classification test with one view."""
    fields = {"num_clips": 1, "num_crops": 1, "dataloader_num_workers": 0, "mixed_precision": "no", **changes}
    return to_flags(model_name_or_path=model, data=data, output_dir=output, **fields)
