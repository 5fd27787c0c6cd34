"""The tour on a tiny run: its steps, what it measures, prints and draws. `test_wheel.py` runs it from end to end."""

import dataclasses
import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from umt_hf.cli import app
from umt_hf.demo.models import load_demo_models
from umt_hf.demo.settings import TOUR_FOLDER, DemoSettings
from umt_hf.moving_shapes import caption_search, probes, tour
from umt_hf.moving_shapes.render import write_moving_shapes
from umt_hf.moving_shapes.steps import Cost, can_fork
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


def read_rows(data: Path, name: str) -> list[dict]:
    return json.loads((data / f"{name}.json").read_text())


def test_search_measures_and_draws(demo_folder):
    caption_search.main(["--output_dir", str(demo_folder), "--num_quartets", "2"])
    results = json.loads((demo_folder / "results_stage2.json").read_text())
    assert results["num_clips"] == 6 and results["chance"]["motion"] == 0.25
    assert results["num_texts"] == len({row["caption"] for row in read_rows(demo_folder / "data", "test_captions")})
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
    assert len(results["accuracy"]) == 3 * len(probes.POOLINGS) and results["num_clips"] == 6
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


@dataclasses.dataclass
class Started:
    """A step that the tour has started: its function's place, its command line, and the run's settings."""

    module: str
    arguments: list[str]
    num_threads: int | None
    num_lanes: int
    num_processes: int


@pytest.fixture
def started(monkeypatch) -> list[Started]:
    """Steps that the tour runs, in order; data and text tower are made, those that evaluate write even results."""
    found = []

    def run_steps(steps, num_lanes, logs, title):
        done = set()
        for name, step in steps.items():
            assert step.needs & steps.keys() <= done, name
            done.add(name)
            module = step.function.__module__.removeprefix("umt_hf.")
            if step.function in (write_moving_shapes, write_text_tower):
                step.function(*step.arguments)
                continue
            (arguments,) = step.arguments if isinstance(step.arguments[0], list) else ([*map(str, step.arguments)],)
            found.append(Started(module, arguments, step.num_threads, num_lanes, step.num_processes))
            folder = Path(arguments[0])
            if module == "moving_shapes.probes":
                row = dict.fromkeys(probes.COLUMNS, 0.5)
                networks = ("student", "random weights", "teacher")
                accuracy = {f"{network}, {pooling}": row for network in networks for pooling in probes.POOLINGS}
                (folder / "results.json").write_text(json.dumps({"accuracy": accuracy, "num_clips": 400}))
            elif module == "moving_shapes.caption_search":
                row = dict.fromkeys(caption_search.COLUMNS, 0.25)
                results = {"recall": dict.fromkeys(caption_search.ROWS, row), "chance": row}
                (folder / "results_stage2.json").write_text(json.dumps(results | {"num_clips": 400, "num_texts": 9}))
            elif module == "moving_shapes.tiny_clip":
                teacher = Path(arguments[arguments.index("--output_dir") + 1])
                teacher.mkdir()
                (teacher / "config.json").write_text("{}")
        return dict.fromkeys(steps, Cost(2.0, 3.0))

    monkeypatch.setattr(tour, "run_steps", run_steps)
    return found


@pytest.mark.parametrize("budget", ["short", "full"])
def test_tour_runs_both_stages_of_every_seed(started, tmp_path, capsys, budget):
    tour.main(["--output_dir", str(tmp_path), "--seeds", "3", "4", "--budget", budget, "--quick"])
    short = ["training.stage1", "training.stage2", "moving_shapes.probes", "moving_shapes.caption_search"]
    assert [step.module for step in started] == 2 * ["moving_shapes.tiny_clip", *short]
    # Where two steps share the machine, each has one thread; Accelerate's launcher gives the stages one anyway.
    for step in started:
        assert step.num_lanes == (2 if budget == "short" else 1)
        assert step.num_threads == (1 if budget == "short" or step.module.startswith("training") else None)
        is_shared = budget == "short" and step.module.startswith("training") and can_fork()
        assert step.num_processes == (2 if is_shared else 1)
    # Every flag is one of the program's, and names a file that is there when it starts.
    training = [step for step in started if step.module.startswith("training")]
    for step in training:
        sections = stage1.SECTIONS if step.module.endswith("stage1") else stage2.SECTIONS
        parsed = dict(zip(sections, parse_config(sections, step.arguments), strict=True))
        assert parsed["training"].max_steps == tour.QUICK["max_steps"]
        assert parsed["training"].seed == int(Path(parsed["training"].output_dir).parent.name[-1])
        data = parsed["data"]
        assert all(map(os.path.isfile, data.train_corpora if "stage2" in step.module else [data.train_data]))
    assert len(training) == 4
    for seed in (3, 4):
        folder = tmp_path / f"seed_{seed}"
        assert len(list((folder / "data" / "videos" / "train").iterdir())) == tour.QUICK["num_clips"][0]
        assert (folder / "text_tower" / "model.safetensors").is_file()
        for name in ("results.json", "results_stage2.json"):
            results = json.loads((folder / name).read_text())
            assert len(results["seconds"]) >= 3 and set(results["cpu_seconds"].values()) == {3.0}
        assert not {"pre-train", "render the videos"} & results["seconds"].keys()
    printed = capsys.readouterr().out
    for name in ("table.md", "table_stage2.md"):
        assert (tmp_path / name).read_text(encoding="utf-8") in printed
    assert "| seed 4, search in a new process | 2 | 3 |" in printed and "What to look at" not in printed


@pytest.mark.parametrize("forks", [True, False])
@pytest.mark.parametrize(("budget", "steps"), [("short", (300, 300)), ("full", (1000, 700))])
def test_budgets_have_their_own_recipes(budget, steps, forks, tmp_path, monkeypatch):
    """The full one is that of the recorded tables."""
    monkeypatch.setattr(tour, "can_fork", lambda: forks)
    found = tour.plan_steps(tmp_path, 0, tour.BUDGETS[budget], (1, 2))
    for sections, name, max_steps in zip(
        (stage1.SECTIONS, stage2.SECTIONS), ("pre-train", "pre-train with text"), steps, strict=True
    ):
        step = found[name]
        parsed = dict(zip(sections, parse_config(sections, step.arguments[0]), strict=True))
        assert parsed["training"].max_steps == max_steps
        # However many processes share a batch, it is the recipe's.
        assert step.num_processes == (2 if budget == "short" and forks else 1)
        size = parsed["training"].per_device_train_batch_size
        assert parsed["training"].learning_rate == 1e-3 and size * step.num_processes == 32
        assert ("--per_device_train_batch_size" in step.arguments[0]) == (step.num_processes > 1)
        # What a user would type is what runs.
        verb = "stage1" if name == "pre-train" else "stage2"
        launch = [] if step.num_processes == 1 else ["--num_processes", "2"]
        assert shlex.split(step.command) == ["umt-hf", "pretrain", verb, *launch, *step.arguments[0]]
    full = tour.BUDGETS["full"]
    assert (full.num_clips, full.teacher_steps, full.probe_steps) == ((3000, 600, 900), 1600, 800)
    assert full.num_quartets == 100 and full.num_lanes == 1


def test_probes_run_beside_stage_2(tmp_path):
    steps = tour.plan_steps(tmp_path, 0, tour.BUDGETS["short"], (1, 2))
    assert {name for name, step in steps.items() if step.is_beside} == {
        "make the text tower",
        "evaluate in a new process",
    }
    assert steps["evaluate in a new process"].needs == {"pre-train"}
    assert steps["make the text tower"].needs == {"render the videos"}
    assert list(tour.plan_steps(tmp_path, 0, tour.BUDGETS["short"], (2,))) == list(tour.STEPS_OF_STAGE_2)


def test_tour_keeps_a_teacher_and_says_where_a_single_seed_is(started, tmp_path, capsys):
    arguments = ["--output_dir", str(tmp_path), "--stages", "1", "--quick", "--max_steps", "7"]
    assert tour.main(arguments) == 0
    assert str(tmp_path / "student") in capsys.readouterr().out and not (tmp_path / "table.md").exists()
    tour.main(arguments)
    modules = [step.module for step in started]
    assert modules.count("moving_shapes.tiny_clip") == 1 and modules.count("training.stage1") == 2
    assert started[1].arguments[-2:] == ["--max_steps", "7"]


def test_exit_code_says_whether_the_statements_hold(started, tmp_path, monkeypatch, capsys):
    small = dataclasses.replace(tour.BUDGETS["short"], num_clips=(2, 1, 1))
    monkeypatch.setitem(tour.BUDGETS, "short", small)
    assert tour.main(["--output_dir", str(tmp_path)]) == 1  # the even results hold one of four
    printed = capsys.readouterr().out
    assert printed.count("| NO |") == 3 and printed.count("| yes |") == 1
    assert printed.index("What to look at") < printed.index("| everything |") < printed.index("To try next")


def test_commands_to_try_next_work(demo_folder, tmp_path, monkeypatch, capsys):
    """Those that a tour in the folder where `make demo` puts it prints, run in its order."""
    pytest.importorskip("lancedb")
    pytest.importorskip("gradio")
    place = tmp_path / TOUR_FOLDER
    place.parent.mkdir(parents=True)
    demo_folder.rename(place)
    monkeypatch.chdir(tmp_path)
    embed, search, page = (shlex.split(command) for command in tour.list_next_commands(TOUR_FOLDER))
    assert page[1:] == ["demo"]
    runner = CliRunner()
    for command, expected in ((embed, "6"), (search, "videos/test/")):
        result = runner.invoke(app, command[1:], catch_exceptions=False)
        assert result.exit_code == 0 and expected in result.output

    shown = []
    monkeypatch.setattr("umt_hf.demo.app.launch_demo", lambda settings, *_: shown.append(settings))
    result = runner.invoke(app, page[1:], catch_exceptions=False)
    assert result.exit_code == 0 and str(TOUR_FOLDER) in result.output
    models = load_demo_models(shown[0])
    assert models.viewer is not None and models.searcher is not None
    # Elsewhere the page gets the same by its options.
    *_, other = tour.list_next_commands(Path("other") / "folder")
    place.rename(tmp_path / "elsewhere")
    (tmp_path / "other").mkdir()
    (tmp_path / "elsewhere").rename(tmp_path / "other" / "folder")
    assert runner.invoke(app, shlex.split(other)[1:], catch_exceptions=False).exit_code == 0
    assert shown[1] == DemoSettings.find(Path("other") / "folder") != DemoSettings()
    # Without the folder the page is empty, as before.
    assert runner.invoke(app, ["demo"], catch_exceptions=False).exit_code == 0 and shown[2] == DemoSettings()


def test_page_takes_what_a_stopped_tour_has_left(tmp_path):
    assert DemoSettings.find(tmp_path) == DemoSettings()
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "config.json").write_text("{}")
    (tmp_path / "data" / "videos" / "test").mkdir(parents=True)
    assert DemoSettings.find(tmp_path) == DemoSettings()  # a student without its teacher shows nothing
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text("{}")
    found = DemoSettings.find(tmp_path)
    assert found.student == str(tmp_path / "student") and found.video_text is None
    assert found.videos == str(tmp_path / "data" / "videos" / "test")
