"""Processor cores: how many there are for loader workers and for the threads of a process.

Imports no PyTorch, so that `umt-hf doctor` can say what a run will use.
"""

import os

MAX_WORKERS = 4


def count_usable_cores() -> int:
    """Cores that this process may use, two threads of one core counted as two."""
    # Not everywhere is there a list of the cores that a process may use.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_physical_cores() -> int:
    """Physical cores, of those that this process may use."""
    import psutil

    usable = count_usable_cores()
    return min(psutil.cpu_count(logical=False) or usable, usable)


def count_threads(processes: int = 1) -> int:
    """Threads that each process of a run on a CPU computes with: its share of the physical cores.

    `OMP_NUM_THREADS` wins where it is set.

    Args:
        processes: Processes on this machine.
    """
    return read_given_threads() or max(count_physical_cores() // processes, 1)


def read_given_threads() -> int | None:
    """`OMP_NUM_THREADS`, where it is a number of threads."""
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]  # further ones are of nested regions
    return int(given) if given.isdigit() and int(given) > 0 else None


def count_workers() -> int:
    """Loader workers of a process by default: its share of the machine's cores, from 1 to 4."""
    share = count_usable_cores() // max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    return max(1, min(MAX_WORKERS, share))
