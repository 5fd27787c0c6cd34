"""The wheel holds all that is in the tree, and what users run works from it, far from a checkout."""

import email
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.e2e import notebooks
from tests.e2e.conftest import ROOT
from tests.unit.example_files import write_example_files
from umt_hf.runs.config import list_recipes, load_recipe
from umt_hf.version import __version__
from umt_hf.zoo import load_zoo

pytestmark = pytest.mark.slow

# What a notebook says of its processor time at the end, and where its package comes from.
LAST_CELL = "import time\nprint(umt_hf.__file__, time.process_time())"
MAX_CPU_SECONDS = 90
NEEDED_TO_BUILD = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "umt_hf_launcher.py")


def list_tracked() -> list[str]:
    """Files of the package that git knows, and new ones that it does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "umt_hf"]
    try:
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs a clone and git: {error}")
    return [name for name in listed if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built in a copy of the tree, so that nothing is left behind in it and nothing that git ignores gets in."""
    folder = tmp_path_factory.mktemp("build")
    for name in [*list_tracked(), *NEEDED_TO_BUILD]:
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / "tree" / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(folder)]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", str(folder / "tree"), *options], check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def run(wheel, tmp_path_factory):
    """Runs a command of the installed wheel in an empty folder and returns what it prints."""
    installed, elsewhere = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("elsewhere")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", "--target", str(installed), str(wheel)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run_command(program: str, *arguments: str) -> str:
        program = str(installed / "bin" / program) if program == "umt-hf" else program
        done = subprocess.run(
            [program, *arguments], cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=1200
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run_command.folder, run_command.installed, run_command.environment = elsewhere, installed, environment
    return run_command


def test_wheel_holds_the_tree(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert sorted(names) == sorted([*list_tracked(), "umt_hf_launcher.py"])
    for kind in (
        "py.typed",
        "zoo.yaml",
        "recipes/",
        "templates/",
        "demo/README.md",
        "demo/requirements.txt",
        "demo/first_clip",
    ):
        assert any(kind in name for name in names), kind


def test_the_description_has_no_link_that_leads_nowhere(wheel):
    """What a package index shows: no relative link and no picture, but every section of the README."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Description-Content-Type"] == "text/markdown"
    text = metadata.get_payload(decode=True).decode() if metadata.get_payload() else metadata["Description"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [line for line in readme.splitlines() if line[:1] == "#"] == [
        line for line in text.splitlines() if line[:1] == "#"
    ]
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets and all(target.startswith("https://") for target in targets) and "<img" not in text
    assert "(`docs/tour.md`)" in text and "(the guide: `docs/hub.md`)" in text


def test_the_description_gets_the_address_once_there_is_one():
    described = runpy.run_path(str(ROOT / "setup.py"))["describe"](
        (ROOT / "README.md").read_text(encoding="utf-8"), "https://forge.example/a/b"
    )
    targets = re.findall(r"(?:\]\(|src=\")([^)\"]+)", described)
    assert len(targets) > 20 and all(target.startswith("https://") for target in targets)
    assert 'src="https://forge.example/a/b/raw/main/docs/pictures/saliency.png"' in described
    assert "[The guide](https://forge.example/a/b/blob/main/docs/pretraining.md)" in described


def test_command_answers(run):
    assert __version__ in run("umt-hf", "--version")
    assert len(json.loads(run("umt-hf", "zoo", "--json"))) == len(load_zoo())


def test_recipes_are_found(run):
    code = "import json, umt_hf; from umt_hf.runs.config import list_recipes, load_recipe; "
    code += "recipes = {name: load_recipe(name) for name in list_recipes()}; "
    code += "print(json.dumps([umt_hf.__file__, recipes]))"
    file, recipes = json.loads(run(sys.executable, "-c", code))
    assert Path(file).is_relative_to(run.installed)
    assert recipes == {name: load_recipe(name) for name in list_recipes()}


@pytest.mark.heavy
def test_tour_runs_from_the_wheel(run):
    printed = run(sys.executable, "-m", "umt_hf.moving_shapes.tour", "--output_dir", "look", "--quick")
    assert "| (a) student after stage 1, mean over all tokens |" in printed
    assert "| after stage 2, re-ranked by the matching head |" in printed
    assert "| pre-train with text |" in printed and "| everything |" in printed
    look = run.folder / "look"
    # What it prints to try next works on what it has made; the third command serves the page.
    embed, search, page = map(shlex.split, printed[printed.index("To try next:") :].splitlines()[1:4])
    assert str(look.relative_to(run.folder) / "teacher") in page
    run("umt-hf", *embed[1:])
    assert "videos/test/" in run("umt-hf", *search[1:])
    for picture in ("losses.png", "masks.png", "losses_stage2.png", "retrieval.png"):
        assert (look / picture).stat().st_size > 5000
    for folder in ("teacher", "student", "video_text"):
        assert (look / folder / "model.safetensors").is_file() and (look / folder / "config.json").is_file()
    for name, part in (("results.json", "accuracy"), ("results_stage2.json", "recall")):
        results = json.loads((look / name).read_text())
        assert results[part] and results["seconds"].keys() == results["cpu_seconds"].keys() != set()


def execute(run, name: str, folder: Path, settings: str | None = None) -> tuple[list[str], float]:
    """What the cells of a notebook print when it runs from the wheel in an empty folder, and its processor time."""
    folder.mkdir()
    (path,) = [path for path in notebooks.NOTEBOOKS if path.stem == name]
    done = notebooks.execute(notebooks.read(path), folder, run.environment, settings, LAST_CELL)
    *printed, last = notebooks.list_printed(done)
    file, seconds = last.split()
    assert Path(file).is_relative_to(run.installed)
    return printed, float(seconds)


@pytest.mark.heavy
def test_the_tour_runs_from_the_wheel_on_its_own_videos(run, tmp_path):
    pytest.importorskip("lancedb")
    printed, seconds = execute(run, "tour", tmp_path / "tour")
    text = "".join(printed)
    losses = [float(loss) for loss in re.findall(r"loss (\d\.\d\d)\n", text)]
    assert losses[4:6] and losses[5] < 0.7 * losses[0]  # five lines of training and the last one
    assert "16 of 64 tokens seen" in text and "32 encoded, 0 unchanged, 0 skipped" in text
    assert seconds < MAX_CPU_SECONDS


@pytest.mark.heavy
def test_fine_tuning_runs_from_the_wheel_on_its_own_videos(run, tmp_path):
    printed, seconds = execute(run, "finetune_your_folder", tmp_path / "finetune")
    text = "".join(printed)
    assert float(re.search(r"accuracy (\d\.\d+) of 18 videos", text)[1]) >= 0.7  # a third is chance
    assert re.search(r"0\.\d+  (red|green|blue)\n", text) and "true class: " in text
    folder = tmp_path / "finetune" / "finetune_your_folder" / "classifier"
    assert json.loads((folder / "config.json").read_text())["id2label"] == {"0": "blue", "1": "green", "2": "red"}
    assert seconds < MAX_CPU_SECONDS


@pytest.mark.heavy
def test_notebooks_take_a_folder_and_a_model_of_the_reader(run, tmp_path):
    """One cell is changed, and nothing is rendered or trained beforehand."""
    pytest.importorskip("lancedb")
    files = write_example_files(tmp_path, image_size=64)
    for path in sorted((files / "videos").glob("*/*.mp4")):
        for copy in range(3):
            shutil.copyfile(path, path.with_name(f"{path.stem}_{copy}.mp4"))
    tour = f"VIDEOS = {str(files / 'videos')!r}\nMODEL = {str(files / 'umt-vit-b16-25m')!r}\n"
    tour += f"TEACHER = {str(files / 'openai' / 'clip-vit-base-patch16')!r}\nTEXTS = ['a dog running', 'a red ring']"
    printed, _ = execute(run, "tour", tmp_path / "tour", tour)
    assert "16 encoded" in "".join(printed) and "step " not in "".join(printed)
    assert not (tmp_path / "tour" / "tour" / "moving_shapes").exists()

    settings = f"DATA = {str(files / 'videos')!r}\nMODEL = {str(files / 'umt-vit-b16')!r}\nEPOCHS = 1"
    printed, _ = execute(run, "finetune_your_folder", tmp_path / "finetune", settings)
    assert "classes: cooking egg, dancing ballet" in "".join(printed)
    assert sorted(path.name for path in (tmp_path / "finetune" / "finetune_your_folder").iterdir()) == [
        "classifier",
        "confusion.png",
    ]
