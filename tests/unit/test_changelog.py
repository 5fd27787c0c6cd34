"""The table of moved modules in the changelog, and the pages and docstrings that must not name the old ones."""

import ast
import dataclasses
import importlib.util
import re

import pytest

from tests.unit.runs.scripts import ROOT, list_scripts, load_sections
from umt_hf.runs.config import ConfigParser

CHANGELOG = (ROOT / "CHANGELOG.md").read_text()


def read_tables(heading: str) -> list[list[str]]:
    """Rows of the first table behind a line of the changelog, without its header."""
    lines = CHANGELOG[CHANGELOG.index(heading) :].splitlines()[1:]
    rows: list[list[str]] = []
    for line in lines:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            break
    return rows[2:]


MODULES = [[cell.strip("`") for cell in row] for row in read_tables("Modules:")]


def list_texts() -> dict[str, str]:
    """What users read: pages, recipes and docstrings."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]
    files = [*pages, *ROOT.glob("umt_hf/recipes/*.yaml"), *ROOT.glob("umt_hf/**/*.md")]
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in files}
    for path in sorted((ROOT / "umt_hf").rglob("*.py")):
        named = (ast.Module, ast.ClassDef, ast.FunctionDef)
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, named)]
        texts[str(path.relative_to(ROOT))] = "\n".join(ast.get_docstring(node) or "" for node in nodes)
    return texts


def find_old_names(text: str) -> list[str]:
    """Old modules that a text names, with dots or as a file."""
    found = []
    for old, _ in MODULES:
        dotted, file = re.escape(old), re.escape(old.replace(".", "/") + ".py")
        if re.search(rf"(?<![\w.]){dotted}(?![\w])|(?<![\w/]){file}", text):
            found.append(old)
    return found


def test_the_table_names_modules_that_are_gone_and_modules_that_exist():
    assert len(MODULES) > 40
    for old, new in MODULES:
        assert importlib.util.find_spec(new) is not None, new
        assert not (ROOT / (old.replace(".", "/") + ".py")).exists(), old


def test_old_modules_are_found():
    assert find_old_names("run `umt_hf.training.evaluate_retrieval` or umt_hf/training/search.py") == [
        "umt_hf.training.evaluate_retrieval",
        "umt_hf.training.search",
    ]
    assert find_old_names("umt_hf.training.evaluation_of_others, umt_hf.evaluation.retrieval") == []


def test_no_text_names_an_old_module():
    found = {name: old for name, text in list_texts().items() if (old := find_old_names(text))}
    assert found == {}


@pytest.mark.parametrize("row", read_tables("Public functions and classes that did not go"))
def test_moved_functions_are_where_the_table_says(row):
    module = importlib.import_module(row[2].strip("`"))
    names = re.findall(r"`(\w+)`", row[0].split(";")[0])
    assert names and all(hasattr(module, name) for name in names), row


def list_public_names() -> set[str]:
    """What modules define at their top, with the methods of their classes and the modules themselves."""
    found: set[str] = set()
    for path in (ROOT / "umt_hf").rglob("*.py"):
        found.add(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            if isinstance(node, ast.ClassDef):
                found |= {f"{node.name}.{own.name}" for own in node.body if isinstance(own, ast.FunctionDef)}
            if isinstance(node, ast.Assign):
                found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def test_new_names_exist():
    new = {name for row in read_tables("Renamed functions") for name in re.findall(r"`([\w.]+)`", row[1])}
    assert len(new) > 40 and new <= list_public_names()


def test_keys_that_moved_are_in_the_section_that_the_table_names():
    places: dict[str, set[str]] = {}
    for script in list_scripts():
        for section, arguments in load_sections(script).items():
            for field in dataclasses.fields(arguments):
                places.setdefault(field.name, set()).add(section)
    moved = [
        (key, row[2].strip("`"))
        for row in read_tables("Recipe sections are")
        for key in re.findall(r"`(\w+)`", row[1].partition(" for ")[2])
    ]
    assert len(moved) == 5 and all(places[key] == {section} for key, section in moved)


def test_new_flags_exist():
    flags = {flag for script in list_scripts() for flag in ConfigParser(load_sections(script))._option_string_actions}
    new = {flag for row in read_tables("Flags:") for flag in re.findall(r"`(--\w+)`", row[2])}
    assert new and new <= flags
