"""Starts the `umt-hf` command without importing the package `umt_hf`, which brings PyTorch and Transformers along.

So `umt-hf --help` and the completion of a shell answer at once, and `umt-hf doctor` runs where one of the libraries is
broken and the package cannot be imported.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

INTERRUPTED_CODE = 130


def load_alone(name: str) -> ModuleType:
    """Load a module of the package without the package; its relative imports bring in the package when they run."""
    package = importlib.util.find_spec("umt_hf")
    if package is None or not package.submodule_search_locations:
        raise ImportError("The package umt_hf is not installed beside its command: run `pip install umt_hf`.")
    place = Path(package.submodule_search_locations[0], *name.split("."))
    # Of a folder the files beside its `__init__.py` are found by relative imports, which need not import the parent.
    folders = [str(place)] if place.is_dir() else None
    path = place / "__init__.py" if folders else place.with_suffix(".py")
    spec = importlib.util.spec_from_file_location(f"umt_hf.{name}", path, submodule_search_locations=folders)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be loaded.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Run the command.

    Raises:
        SystemExit: With code 130 after Ctrl-C, also before the command itself can answer it.
    """
    try:
        for name in ("runs.noise", "diagnostics", "runs.cores", "runs.scripts", "zoo"):
            load_alone(name)
        app = load_alone("cli").app
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted. Nothing was written.\n")
        raise SystemExit(INTERRUPTED_CODE) from None
    app()
