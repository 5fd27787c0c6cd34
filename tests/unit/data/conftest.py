"""Lists in memory and as tables on disk."""

import datasets
import pytest

from umt_hf.data import arrow_cache
from umt_hf.data.lists import columns, csv_lists


@pytest.fixture
def table_cache(tmp_path_factory, monkeypatch):
    """A cache of tables for this test alone, in which every list is long and a chunk has two rows."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setattr(arrow_cache, "SHORTEST_CACHED_BYTES", 0)
    for module in (columns, csv_lists):
        monkeypatch.setattr(module, "CHUNK_ROWS", 2)
    return folder / arrow_cache.CACHE_FOLDER


@pytest.fixture(params=["in memory", "on disk"])
def list_store(request):
    """Both ways in which the rows of a list are kept."""
    if request.param == "on disk":
        request.getfixturevalue("table_cache")
