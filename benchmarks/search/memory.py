"""The memory that one way of searching takes, in a process for itself."""

import json
import sys
from pathlib import Path

import numpy as np

from benchmarks.common import read_peak_resident_memory
from benchmarks.search import run


def main() -> None:
    """Load and search as the job in the first argument says, and print the peak beyond that of the imports."""
    job = json.loads(sys.argv[1])
    run.limit_threads(1)
    run.describe_libraries()
    before = read_peak_resident_memory()
    loaders = {
        run.UMT: lambda folder: run.load_index(folder, job["options"]),
        run.EXACT: lambda folder: run.load_index(folder, job["options"], exact=True),
        run.SCAN: run.load_scan,
        run.NUMPY: run.load_numpy,
        run.FAISS: run.load_faiss,
    }
    search = loaders[job["way"]](Path(job["folder"]))
    for _ in range(3):
        search(np.array(job["query"], np.float32))
    print(read_peak_resident_memory() - before)


if __name__ == "__main__":
    main()
