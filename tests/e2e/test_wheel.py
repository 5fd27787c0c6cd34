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

from tests.e2e.conftest import ROOT
from umt_hf.runs.config import list_recipes, load_recipe
from umt_hf.version import __version__
from umt_hf.zoo import load_zoo

pytestmark = pytest.mark.slow

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

    run_command.folder, run_command.installed = elsewhere, installed
    return run_command


def test_wheel_holds_the_tree(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert sorted(names) == sorted([*list_tracked(), "umt_hf_launcher.py"])
    for kind in ("py.typed", "zoo.yaml", "recipes/", "templates/", "demo/README.md", "demo/requirements.txt"):
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
