"""The wheel holds all that is in the tree, and what users run works from it, far from a checkout."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT
from umt_hf.runs.config import list_recipes, load_recipe
from umt_hf.version import __version__
from umt_hf.zoo import load_zoo

pytestmark = pytest.mark.slow

NEEDED_TO_BUILD = ("pyproject.toml", "README.md", "LICENSE", "umt_hf_launcher.py")


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

    run_command.folder, run_command.installed = elsewhere, installed
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
