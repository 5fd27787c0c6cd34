"""Every test runs offline and on one thread, so that results do not depend on the machine's load."""

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests.processes import set_start_method

HEAVY = "UMT_HF_HEAVY_TESTS"

torch.set_num_threads(1)
set_start_method()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in the background so, and commands inherit it: not one would take Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Start the slow tests first, so that no worker has one left when the others are done; leave out heavy ones."""
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
