"""Run the notebooks of the examples as a reader would, and write down what they show.

    python -m tests.e2e.notebooks

runs each of them and puts its pictures and printed lines into the file (`make notebooks`). The code that was run is
written down by its hash, so that a notebook whose code has changed since is noticed.
"""

import copy
import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
SETTINGS_TAG = "parameters"  # as papermill calls the cell to change
KEPT_OUTPUTS = ("stream", "display_data", "execute_result")
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def list_code(notebook: NotebookNode) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def hash_code(notebook: NotebookNode) -> str:
    return hashlib.sha256("\n\n".join(list_code(notebook)).encode()).hexdigest()


def find_settings(notebook: NotebookNode) -> NotebookNode:
    """The one cell that a reader changes."""
    (cell,) = [cell for cell in notebook.cells if SETTINGS_TAG in cell.metadata.get("tags", ())]
    return cell


def execute(
    notebook: NotebookNode,
    folder: Path,
    environment: Mapping[str, str] = ENVIRONMENT,
    settings: str | None = None,
    last: str | None = None,
) -> NotebookNode:
    """Run all cells in a new kernel, in a folder.

    Args:
        notebook: It stays as it is.
        folder: Where the kernel works.
        environment: Variables of the kernel, beside those of this process.
        settings: What a reader would write at the end of the settings cell.
        last: Code for another cell at the end.

    Returns:
        A copy with the outputs.
    """
    notebook = copy.deepcopy(notebook)
    if settings is not None:
        find_settings(notebook).source += f"\n{settings}"
    if last is not None:
        notebook.cells.append(nbformat.v4.new_code_cell(last))
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env={**os.environ, **environment})
    return notebook


def list_printed(notebook: NotebookNode) -> list[str]:
    """What each code cell printed; not what it wrote to the error stream."""
    return [
        "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def clean(notebook: NotebookNode) -> NotebookNode:
    """Leave what a reader wants to see: no progress bars and warnings, no times of execution."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [
                output
                for output in cell.outputs
                if output.output_type in KEPT_OUTPUTS and output.get("name") != "stderr"
            ]
    notebook.metadata["umt_hf"] = {"code": hash_code(notebook)}
    return notebook


def main() -> None:
    for path in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            notebook = clean(execute(read(path), Path(folder)))
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
