"""The type checker finds nothing in the package, and something wherever a wrong type is planted."""

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PLANTED = """

def _planted_return() -> int:
    return "text"


def _planted_argument(number: int) -> None:
    del number


_planted_argument("text")
"""
WINGS = sorted(
    path for path in (ROOT / "umt_hf").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("pyrefly") is None, reason="needs pyrefly, of the dev extra")


def check(folder: Path) -> subprocess.CompletedProcess:
    """Run the checker with the settings of pyproject.toml."""
    command = [sys.executable, "-m", "pyrefly", "check", "--output-format", "min-text"]
    return subprocess.run(
        [*command, "--python-interpreter-path", sys.executable], cwd=folder, capture_output=True, text=True
    )


@pytest.mark.skipif(
    Version(importlib.metadata.version("datasets")) < Version("5"),
    reason="checked against the types of current libraries",
)
def test_package_has_no_type_errors():
    found = check(ROOT)
    assert found.returncode == 0, found.stdout + found.stderr


def test_planted_errors_are_found_in_every_wing(tmp_path):
    copy = shutil.copytree(ROOT / "umt_hf", tmp_path / "tree" / "umt_hf", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "umt_hf_launcher.py"):
        shutil.copy(ROOT / name, copy.parent / name)
    planted = []
    for wing in WINGS:
        files = [copy / wing.name] if wing.suffix else sorted((copy / wing.name).glob("[a-z]*.py"))[-1:]
        for path in files:
            path.write_text(path.read_text() + PLANTED)
            planted.append(path.relative_to(copy.parent).as_posix())
    assert len(planted) >= 15
    found = check(copy.parent).stdout
    for name in planted:
        lines = [line for line in found.splitlines() if name in line]
        assert any(re.search(r"bad-return", line) for line in lines), (name, found[-2000:])
        assert any(re.search(r"bad-argument-type", line) for line in lines), name


def test_every_ignored_error_has_a_code_and_a_reason():
    for path in (ROOT / "umt_hf").rglob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if re.search(r"(pyrefly|type): *ignore", line):
                assert re.search(r"pyrefly: ignore\[[a-z-]+(, [a-z-]+)*\]\s+\S+", line), f"{path}:{number}"
