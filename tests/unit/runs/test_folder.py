"""One list of the file names of a finished folder."""

import ast
from collections.abc import Iterator
from pathlib import Path

import umt_hf
from umt_hf.runs import folder

PACKAGE = Path(umt_hf.__file__).parent
NAMES = {value for name, value in vars(folder).items() if name.isupper() and isinstance(value, str)}
# Transformers copies these files into repositories, where `umt_hf` is not installed.
TRAVELLING = ("modeling", "processing")


def list_literals(path: Path) -> Iterator[tuple[int, str]]:
    """Strings of a module, docstrings aside."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def test_the_list_has_what_a_finished_folder_has():
    assert len(NAMES) > 15 and {"config.json", "run.yaml", "report.json", "model.safetensors"} <= NAMES


def test_names_of_files_are_written_once():
    """No other module has one of the names as a literal, alone or at the end of a path or pattern."""
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {text}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != PACKAGE / "runs" / "folder.py" and path.relative_to(PACKAGE).parts[0] not in TRAVELLING
        for line, text in list_literals(path)
        if text.rsplit("/", 1)[-1] in NAMES
    ]
    assert found == []
