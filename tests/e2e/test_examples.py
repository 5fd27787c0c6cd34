"""The examples' own code on a tiny run: what they measure, print and draw."""

import json
import os
import shutil
from pathlib import Path

import pytest

from umt_hf.moving_shapes import caption_search


@pytest.fixture
def stage2_example(monkeypatch):
    monkeypatch.setattr(caption_search, "NUM_QUARTETS", 2)
    return caption_search


@pytest.fixture
def demo_folder(flags, shapes, teacher, tmp_path) -> Path:
    """What `make demo` leaves, from runs of two steps."""
    from umt_hf.moving_shapes.tiny_bert import TextTowerArguments, write_text_tower
    from umt_hf.training import stage1, stage2

    folder = tmp_path / "demo"
    folder.mkdir()
    os.symlink(shapes, folder / "data")
    shutil.copytree(teacher, folder / "teacher")
    stage1.main(flags(output_dir=folder / "student", max_steps=2))
    tower = TextTowerArguments(
        data=str(shapes),
        output_dir=str(folder / "text_tower"),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
    )
    write_text_tower(tower)
    arguments = {
        "config": "stage2_moving_shapes",
        "train_data": shapes / "train_captions.json",
        "teacher_name_or_path": folder / "teacher",
        "vision_name_or_path": folder / "student",
        "text_name_or_path": folder / "text_tower",
        "output_dir": folder / "video_text",
        "num_aligned_layers": 2,
        "num_frames": 4,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "dataloader_num_workers": 0,
        "report_to": "none",
    }
    stage2.main([str(part) for name, value in arguments.items() for part in (f"--{name}", value)])
    return folder


def test_stage2_example_measures_and_draws(stage2_example, demo_folder):
    stage2_example.evaluate(demo_folder, seed=0)
    results = json.loads((demo_folder / "results_stage2.json").read_text())
    assert results["num_clips"] == 6 and results["chance"]["motion"] == 0.25
    for row in ("before", "dual", "reranked"):
        assert all(0 <= value <= 1 for value in results["recall"][row].values())
    assert results["recall"]["dual"].keys() == {"all", "motion", "appearance"}
    assert len(list((demo_folder / "quartets").glob("*.mp4"))) == 8
    for picture in ("losses_stage2.png", "retrieval.png"):
        assert (demo_folder / picture).stat().st_size > 5000
    table = stage2_example.format_table([results, results])
    assert "± 0.000" in table and table.count("\n") == 5


def test_quartets_differ_in_the_order_of_frames_alone(stage2_example, tmp_path):
    from umt_hf.processing.decoding import open_video

    quartets = stage2_example.write_quartets(tmp_path / "quartets", seed=0)
    frames = []
    for path in quartets.videos[:4]:
        with open_video(path) as reader:
            frames.append(reader.get_frames(range(reader.num_frames)))
    for other in frames[1:]:
        assert (other != frames[0]).any()
        assert sorted(map(bytes, other)) == sorted(map(bytes, frames[0]))
    assert len({text.split("moving ")[1] for text in quartets.texts[:4]}) == 4
    assert len({text.split(" moving")[0] for text in quartets.texts[:4]}) == 1
