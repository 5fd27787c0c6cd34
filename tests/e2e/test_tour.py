"""The tour on a tiny run: its steps, what it measures, prints and draws. `test_wheel.py` runs it from end to end."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from umt_hf.moving_shapes import caption_search, probes, tour
from umt_hf.moving_shapes.tiny_bert import TextTowerArguments, write_text_tower
from umt_hf.processing.decoding import open_video
from umt_hf.runs.config import parse_config
from umt_hf.training import stage1, stage2


@pytest.fixture
def demo_folder(flags, shapes, teacher, tmp_path) -> Path:
    """What `make demo` leaves, from runs of two steps."""
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
        "train_corpora": shapes / "train_captions.json",
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


def test_search_measures_and_draws(demo_folder):
    caption_search.main(["--output_dir", str(demo_folder), "--num_quartets", "2"])
    results = json.loads((demo_folder / "results_stage2.json").read_text())
    assert results["num_clips"] == 6 and results["chance"]["motion"] == 0.25
    for row in ("before", "dual", "reranked"):
        assert all(0 <= value <= 1 for value in results["recall"][row].values())
    assert results["recall"]["dual"].keys() == {"all", "motion", "appearance"}
    assert len(list((demo_folder / "quartets").glob("*.mp4"))) == 8
    for picture in ("losses_stage2.png", "retrieval.png"):
        assert (demo_folder / picture).stat().st_size > 5000
    table = caption_search.format_search_table([results, results])
    assert "± 0.000" in table and table.count("\n") == 5


def test_quartets_differ_in_the_order_of_frames_alone(tmp_path):
    quartets = caption_search.write_quartets(tmp_path / "quartets", seed=0, num_quartets=2)
    frames = []
    for path in quartets.videos[:4]:
        with open_video(path) as reader:
            frames.append(reader.get_frames(range(reader.num_frames)))
    for other in frames[1:]:
        assert (other != frames[0]).any()
        assert sorted(map(bytes, other)) == sorted(map(bytes, frames[0]))
    assert len({text.split("moving ")[1] for text in quartets.texts[:4]}) == 4
    assert len({text.split(" moving")[0] for text in quartets.texts[:4]}) == 1


def test_probes_measure_and_draw(demo_folder, capsys):
    probes.main(["--output_dir", str(demo_folder), "--probe_steps", "50"])
    results = json.loads((demo_folder / "results.json").read_text())
    assert len(results["accuracy"]) == 3 * len(probes.POOLINGS)
    for row in results["accuracy"].values():
        assert row.keys() == probes.COLUMNS.keys()
        assert all(0 <= value <= 1 for value in row.values())
    for picture in ("losses.png", "masks.png"):
        assert (demo_folder / picture).stat().st_size > 5000
    assert capsys.readouterr().out.count("motion, linear") == len(results["accuracy"])
    table = probes.format_probe_table([results, results])
    assert "± 0.000" in table and table.count("\n") == 8


def test_probes_find_what_is_in_the_features():
    """A class that one feature gives away, and one of a feature that is noise."""
    torch.manual_seed(0)
    labels = [torch.randint(4, (size,)) for size in (256, 64, 200)]
    features = [torch.cat([torch.eye(4)[y], torch.randn(len(y), 4)], dim=1) for y in labels]
    for probe in probes.PROBES.values():
        seen = probes.fit_probe([(x[:, :4], y) for x, y in zip(features, labels, strict=True)], probe, max_steps=400)
        unseen = probes.fit_probe([(x[:, 4:], y) for x, y in zip(features, labels, strict=True)], probe, max_steps=50)
        assert seen > 0.99 and unseen < 0.4


@pytest.fixture
def commands(monkeypatch) -> list[list[str]]:
    """Commands that the tour starts, in order; those that evaluate only write empty results."""
    started = []

    def start(command: list[str], check: bool, env: dict[str, str]) -> None:
        assert check and env["HF_HUB_OFFLINE"] == "1"
        started.append(command[max(i for i, word in enumerate(command) if word == "-m") + 1 :])
        folder = Path(command[command.index("--output_dir") + 1])
        if "probes" in command[2]:
            row = dict.fromkeys(probes.COLUMNS, 0.5)
            networks = ("student", "random weights", "teacher")
            accuracy = {f"{network}, {pooling}": row for network in networks for pooling in probes.POOLINGS}
            (folder / "results.json").write_text(json.dumps({"accuracy": accuracy}))
        elif "caption_search" in command[2]:
            row = dict.fromkeys(caption_search.COLUMNS, 0.25)
            recall = dict.fromkeys(caption_search.ROWS, row)
            (folder / "results_stage2.json").write_text(json.dumps({"recall": recall, "chance": row}))
        elif "tiny_clip" in command[2]:
            folder.mkdir()
            (folder / "config.json").write_text("{}")

    monkeypatch.setattr(tour.subprocess, "run", start)
    return started


def test_tour_runs_both_stages_of_every_seed(commands, tmp_path, capsys):
    tour.main(["--output_dir", str(tmp_path), "--seeds", "3", "4", "--quick"])
    modules = [command[0].removeprefix("umt_hf.") for command in commands]
    first = ["moving_shapes.tiny_clip", "training.stage1", "moving_shapes.probes"]
    assert modules == 2 * first + 2 * ["training.stage2", "moving_shapes.caption_search"]
    # Every flag is one of the program's, and names a file that is there when it starts.
    for command in commands:
        if command[0].startswith("umt_hf.training"):
            sections = stage1.SECTIONS if command[0].endswith("stage1") else stage2.SECTIONS
            parsed = dict(zip(sections, parse_config(sections, command[1:]), strict=True))
            assert parsed["training"].max_steps == tour.QUICK.max_steps
            assert parsed["training"].seed == int(Path(parsed["training"].output_dir).parent.name[-1])
            data = parsed["data"]
            assert all(map(os.path.isfile, data.train_corpora if "stage2" in command[0] else [data.train_data]))
    for seed in (3, 4):
        folder = tmp_path / f"seed_{seed}"
        assert len(list((folder / "data" / "videos" / "train").iterdir())) == tour.QUICK.num_clips[0]
        assert (folder / "text_tower" / "model.safetensors").is_file()
        for name in ("results.json", "results_stage2.json"):
            assert len(json.loads((folder / name).read_text())["seconds"]) >= 3
    printed = capsys.readouterr().out
    for name in ("table.md", "table_stage2.md"):
        assert (tmp_path / name).read_text(encoding="utf-8") in printed
    assert "[seed 4, 3/3] search in a new process" in printed


def test_tour_keeps_a_teacher_and_says_where_a_single_seed_is(commands, tmp_path, capsys):
    arguments = ["--output_dir", str(tmp_path), "--stages", "1", "--quick", "--max_steps", "7"]
    tour.main(arguments)
    assert str(tmp_path / "student") in capsys.readouterr().out and not (tmp_path / "table.md").exists()
    tour.main(arguments)
    modules = [command[0] for command in commands]
    assert modules.count("umt_hf.moving_shapes.tiny_clip") == 1 and modules.count("umt_hf.training.stage1") == 2
    assert commands[1][-2:] == ["--max_steps", "7"]
