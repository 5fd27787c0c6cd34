"""Rooms stay small: files, folders and functions of the package."""

import ast
from pathlib import Path

import umt_hf

PACKAGE = Path(umt_hf.__file__).parent


def measure_functions() -> dict[str, int]:
    """Lines of each function and method, docstring and decorators included."""
    lengths = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lengths[f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}"] = node.end_lineno - node.lineno + 1
    return lengths


def test_files_and_folders_are_small():
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        assert len(list(folder.glob("*.py"))) <= 15, folder
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 950, path


def test_functions_are_small():
    lengths = measure_functions()
    assert len(lengths) > 900
    longest = {name: length for name, length in lengths.items() if length > 60}
    assert len(longest) <= 0.01 * len(lengths), longest
    assert max(lengths.values()) <= 100, max(lengths, key=lengths.get)
