"""What `test_batches` runs in other processes; imports nothing that loads LanceDB, beside which nothing is forked."""

import os
import sys

import numpy as np
from datasets import Dataset

from umt_hf import VideoEmbedder
from umt_hf.inference.batches import list_new_videos, write_rows


def map_and_write(model: str, videos: str, index: str, settings: dict) -> None:
    """As a script does it: two workers of `datasets`, then one index."""
    paths = list_new_videos([videos], index)
    assert len(paths) == 8
    embedder = VideoEmbedder(model, batch_size=4, **settings)
    table = Dataset.from_dict({"path": paths})
    assert "lancedb" not in sys.modules
    rows = table.map(embedder, batched=True, batch_size=4, num_proc=2, remove_columns="path")
    assert embedder._encoder is None  # it was loaded in the workers
    report = write_rows(rows, index)
    assert (report.num_encoded, len(report.skipped)) == (6, 2)


def map_part_by_part(model: str, videos: str, index: str, settings: dict) -> None:
    """What is killed: two videos at a time."""
    embedder = VideoEmbedder(model, batch_size=2, **settings)
    paths = list_new_videos([videos], index)
    for start in range(0, len(paths), 2):
        part = Dataset.from_dict({"path": paths[start : start + 2]})
        write_rows(part.map(embedder, batched=True, remove_columns="path"), index)


def write_one_by_one(rows: dict, index: str) -> None:
    for i in range(len(rows["path"])):
        write_rows({key: values[i : i + 1] for key, values in rows.items()}, index, rows_per_commit=1)


def write_in_worker(batch: dict, folder: str) -> dict:
    """A function for `map_batches`."""
    return {"num_encoded": np.array([write_rows(batch, folder).num_encoded])}


def run_text(text: str, folder: str) -> None:
    """As a script in a folder."""
    os.chdir(folder)
    exec(text, {"__name__": "__main__"})


def work_in_a_fork(model: str, video: str) -> None:
    """Encode, which LanceDB has no part in, and write, which LanceDB promises nothing for."""
    embedder = VideoEmbedder(model)
    import lancedb

    expected = embedder({"path": [video]})
    assert lancedb and not expected["reason"][0]
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        found = embedder({"path": [video]})
        assert np.array_equal(found["vector"], expected["vector"])
        try:
            write_rows(found, "index")
        except RuntimeError as error:
            os.write(write, str(error).encode())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert "by the method 'forkserver' or 'spawn'" in os.read(read, 1000).decode()
