"""The scripts of the package, found by their `SECTIONS`."""

import importlib
import re
from pathlib import Path

import umt_hf

ROOT = Path(umt_hf.__file__).parents[1]


def list_scripts() -> list[str]:
    """Modules of `umt_hf` that have `SECTIONS`."""
    files = sorted(path for path in (ROOT / "umt_hf").rglob("*.py") if re.search("^SECTIONS", path.read_text(), re.M))
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]


def load_sections(script: str) -> dict[str, type]:
    """Section name -> dataclass of a script."""
    return importlib.import_module(script).SECTIONS
