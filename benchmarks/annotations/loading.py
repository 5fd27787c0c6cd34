"""One process that loads a list, as a rank of a run does.

python -m benchmarks.annotations.loading '{"source": "list.csv", "has_captions": false}'
"""

import json
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import datasets

from umt_hf.data.annotations import load_pairs
from umt_hf.data.sources import load_videos
from umt_hf.data.streams import load_shards

STATUS = Path("/proc/self/status")
SECONDS_BETWEEN_LOOKS = 0.02


def read_own_memory() -> int:
    """Bytes that belong to this process alone: resident, and no part of a mapped file (Linux)."""
    return int(re.search(r"^RssAnon:\s*(\d+) kB$", STATUS.read_text(encoding="utf-8"), re.MULTILINE)[1]) * 1024


class PeakWatch(threading.Thread):
    """Looks at the process's own memory all the time; `peak` is the largest, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.is_over = read_own_memory(), threading.Event()

    def run(self) -> None:
        """Look until it is over."""
        while not self.is_over.wait(SECONDS_BETWEEN_LOOKS):
            self.peak = max(self.peak, read_own_memory())


def load(source: str, has_captions: bool) -> dict[str, Any]:
    """Load a list as pre-training does and read its first and last row.

    Returns:
        Seconds, largest memory of the process's own meanwhile beyond that before, number of rows, and the two rows.
    """
    datasets.disable_progress_bars()
    before, watch = read_own_memory(), PeakWatch()
    watch.start()
    start = time.perf_counter()
    if Path(source).is_dir():
        table: Any = load_shards(source, needs_captions=has_captions)
    else:
        table = load_pairs(source) if has_captions else load_videos(source, needs_labels=False)
    videos = [table[0]["video"], table[len(table) - 1]["video"]]
    ends = [video["path"] if isinstance(video, dict) else video for video in videos]
    seconds = time.perf_counter() - start
    watch.is_over.set()
    watch.join()
    peak = max(watch.peak, read_own_memory()) - before
    return {"seconds": seconds, "own_bytes": peak, "num_rows": len(table), "ends": ends}


if __name__ == "__main__":
    print(json.dumps(load(**json.loads(sys.argv[1]))))
