"""Rows that end in time: a limit for each, and one for all."""

import faulthandler
import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

LEAST_SECONDS = 5.0  # in which a row could at least begin
GRACE_SECONDS = 20.0  # after the end of all time, the process is ended from outside Python


class OutOfTime(BaseException):
    """A row took too long. Not an `Exception`, which compilers catch to go on by themselves."""


class NotHere(Exception):
    """A row needs something that this machine does not have."""


@dataclass(frozen=True)
class Row:
    """Something to measure.

    Args:
        name: For the table.
        seconds: Limit of its time.
        measure: Gives figures by name.
    """

    name: str
    seconds: float
    measure: Callable[[], dict[str, Any]]


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the code within when its time is over; only in the main thread, on POSIX systems."""
    has_timer = hasattr(signal, "SIGALRM") and hasattr(signal, "setitimer")
    if not has_timer or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: Any) -> None:
        raise OutOfTime

    former = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def measure_rows(rows: list[Row], seconds: float, device: torch.device) -> Iterator[dict[str, Any]]:
    """Measure one row after another, as many as there is time for, and give what became of each.

    A row that fails costs none of the others: memory is set free and compiled graphs are forgotten after each.

    Args:
        rows: In order of value.
        seconds: For all of them.
        device: Where they run.

    Yields:
        `row`, `status` ("measured" or "not run"), `reason`, `wall_seconds`, and the row's figures.
    """
    began = time.perf_counter()
    faulthandler.dump_traceback_later(seconds + GRACE_SECONDS, exit=True)
    try:
        for row in rows:
            limit = min(row.seconds, seconds - (time.perf_counter() - began))
            yield {"row": row.name, **_measure(row, limit)}
            _clean_up(device)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _measure(row: Row, limit: float) -> dict[str, Any]:
    if limit < LEAST_SECONDS:
        return {"status": "not run", "reason": "no time was left", "wall_seconds": 0.0}
    began = time.perf_counter()
    try:
        with time_limit(limit):
            found: dict[str, Any] = {"status": "measured", "reason": None, **row.measure()}
    except OutOfTime:
        found = {"status": "not run", "reason": f"it took over {limit:.0f} s"}
    except NotHere as error:
        found = {"status": "not run", "reason": str(error)}
    except Exception as error:  # the other rows are worth their time
        found = {"status": "not run", "reason": f"{type(error).__name__}: {str(error)[:2000]}"}
    return found | {"wall_seconds": time.perf_counter() - began}


def _clean_up(device: torch.device) -> None:
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
