"""Processor cores: how many there are for loader workers and for the threads of a process."""

import os

MAX_WORKERS = 4


def count_usable_cores() -> int:
    """Cores that this process may use, two threads of one core counted as two."""
    # Not everywhere is there a list of the cores that a process may use.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_workers() -> int:
    """Loader workers of a process by default: its share of the machine's cores, from 1 to 4."""
    share = count_usable_cores() // max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    return max(1, min(MAX_WORKERS, share))
