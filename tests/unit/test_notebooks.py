"""The notebooks as they are in the repository: current, small, readable, without traces of the machine they ran on."""

import base64
import copy
import re

import pytest

from tests.e2e.notebooks import NOTEBOOKS, ROOT, clean, find_settings, hash_code, list_code, read
from tests.unit.test_english import find_phrases

MAX_BYTES = 300_000
MAX_COLUMNS = 80
# A folder from the root or of a home, a drive, or an address that is not of this project's pages.
TRACE = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|usr|opt|mnt|Users)\b|[A-Z]:\\|https?://")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def list_texts(notebook) -> list[str]:
    """What readers read in outputs: lines, tables and errors, without pictures."""
    texts = []
    for output in (output for cell in notebook.cells for output in cell.get("outputs", ())):
        data = output.get("data", {})
        texts += [output.get("text", ""), *(text for kind, text in data.items() if not kind.startswith("image/"))]
    return texts


def list_faults(notebook) -> list[str]:
    """What is wrong with a notebook, in words."""
    faults = []
    if notebook.metadata.get("umt_hf", {}).get("code") != hash_code(notebook):
        faults.append("the outputs are of other code: run `make notebooks`")
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            faults += find_phrases(cell.source)
            continue
        faults += find_phrases(cell.source)
        faults += [
            f"over {MAX_COLUMNS} columns: {line}" for line in cell.source.splitlines() if len(line) > MAX_COLUMNS
        ]
        faults += ["an error" for output in cell.outputs if output.output_type == "error"]
        faults += ["the error stream" for output in cell.outputs if output.get("name") == "stderr"]
    faults += [
        f"a trace of the machine: {found[0]}" for text in list_texts(notebook) for found in TRACE.finditer(text)
    ]
    return faults


def test_there_are_two():
    assert [path.stem for path in NOTEBOOKS] == ["finetune_your_folder", "tour"]


@each_notebook
def test_notebooks_are_current_and_clean(path):
    notebook = read(path)
    assert list_faults(notebook) == []
    assert path.stat().st_size < MAX_BYTES
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))  # all of it, from top to bottom, in a new kernel


@each_notebook
def test_notebooks_show_pictures_and_have_one_cell_to_change(path):
    notebook = read(path)
    pictures = [
        base64.b64decode(output.data["image/png"])
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) >= 4 and all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert find_settings(notebook) is notebook.cells[1]
    assert "None" in find_settings(notebook).source


@each_notebook
def test_planted_faults_are_found(path):
    notebook = read(path)
    changed = copy.deepcopy(notebook)
    changed.cells[1].source += "\nprint('more')"
    assert list_faults(changed) == ["the outputs are of other code: run `make notebooks`"]
    cell = next(cell for cell in notebook.cells if cell.get("outputs"))
    for text, fault in (
        ("saved to /home/me/x", "a trace of the machine: /home"),
        ("from https://example.com", "a trace of the machine: https://"),
        ("C:\\data", "a trace of the machine: C:\\"),
    ):
        changed = copy.deepcopy(notebook)
        changed.cells[notebook.cells.index(cell)].outputs[0].text = text
        assert list_faults(changed) == [fault]
    changed.cells[0].source = "There is no picture, which is no picture."
    assert "1: is no p" in " ".join(list_faults(changed))


def test_only_what_readers_want_is_kept():
    notebook = read(NOTEBOOKS[0])
    cell = next(cell for cell in notebook.cells if cell.get("outputs"))
    noise = copy.deepcopy(cell.outputs[0])
    noise.update(output_type="stream", name="stderr", text="FutureWarning")
    cell.outputs.append(noise)
    cell.metadata["execution"] = {"iopub.execute_input": "now"}
    assert list_faults(notebook) == ["the error stream"]
    assert list_faults(clean(notebook)) == [] and "execution" not in cell.metadata


def test_pages_name_the_notebooks():
    for page in ("README.md", "index.md"):
        folder = ROOT / ("examples" if page == "README.md" else "docs")
        text = (folder / page).read_text()
        assert all(f"notebooks/{path.name}" in text for path in NOTEBOOKS), page
    assert all("umt_hf" in "".join(list_code(read(path))) for path in NOTEBOOKS)
