"""Every test runs offline and on one thread, so that results do not depend on the machine's load."""

import os
import signal
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests.processes import set_start_method

HEAVY = "UMT_HF_HEAVY_TESTS"
# Tests of files that are in a clone alone, neither in the wheel nor in the source distribution: all of a file, or one.
OF_A_CLONE = (
    "bench/test_benchmarks.py",
    "bench/test_cuda_script.py",
    "bench/test_scaling.py",
    "bench/test_two_teachers.py",
    "e2e/test_detection.py::test_commands_of_the_guide_run",
    "e2e/test_docs.py",
    "e2e/test_examples.py",
    "e2e/test_mteb.py",
    "e2e/test_pretraining_value.py",
    "e2e/test_processes.py::test_everything_is_imported_before",
    "e2e/test_restarting.py",
    "e2e/test_vbench.py",
    "e2e/test_wheel.py",
    "hub/test_lint_model_files.py",
    "hub/test_readme.py",
    "unit/inference/test_batches.py::test_the_page_on_datasets_runs_as_written",
    "unit/test_changelog.py",
    "unit/test_code_width.py",
    "unit/test_docstring_examples.py",
    "unit/test_english.py",
    "unit/test_notebooks.py",
    "unit/test_portability.py",
    "unit/test_reliability.py",
    "unit/test_repository.py",
    "unit/test_types.py",
)
IS_CLONE = (Path(__file__).parents[1] / "docs").is_dir()
collect_ignore = [] if IS_CLONE else [name for name in OF_A_CLONE if "::" not in name]

torch.set_num_threads(1)
set_start_method()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in the background so, and commands inherit it: not one would take Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Start the slow tests first, so that no worker has one left when the others are done; leave out heavy ones."""
    if not IS_CLONE:
        for item in items:
            if item.nodeid.removeprefix("tests/").split("[")[0] in OF_A_CLONE:
                item.add_marker(pytest.mark.skip(reason="needs a clone"))
    if os.environ.get(HEAVY) != "1":
        for item in items:
            if item.get_closest_marker("heavy") is not None:
                item.add_marker(pytest.mark.skip(reason="one of the longest: `make test-heavy` runs it"))
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A loopback Hub that this process talks to, and that is not waited for."""
    from tests.hub.server import LoopbackHub

    with LoopbackHub(tmp_path / "hub") as hub:
        hub.connect(monkeypatch)
        monkeypatch.setattr("umt_hf.hub_cards.publishing.RETRY_SECONDS", 0.01)
        yield hub
