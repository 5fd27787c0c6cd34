"""Loaders over planned batches."""

import functools
import multiprocessing
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ..runs.cores import count_workers
from ..runs.mistakes import WORKER_TRACEBACK, unheard_children
from .in_flight import (
    ReadNotes,
    StuckReadingError,
    explain,
    explain_death,
    explain_silence,
    start_fork_server,
)

SECONDS_TO_DIE = 1.0  # between the end of a process's connections and the system's word that it has ended


class NamingDataLoader(DataLoader):
    """A loader that names the videos in flight where a worker gives nothing in time, or is gone.

    It draws nothing from the global random state.

    Args:
        dataset: What is read.
        num_workers: Processes that read; 0 = this one; `None` = as many as the machine has cores, up to 4.
        timeout_seconds: For which workers may give nothing; `None` = for ever. Without workers it has no effect.
        **options: As for `DataLoader`.
    """

    def __init__(
        self, dataset: Dataset, num_workers: int | None, timeout_seconds: float | None = None, **options: Any
    ):
        num_workers = count_workers() if num_workers is None else num_workers
        notes = ReadNotes(num_workers) if num_workers else None
        # Without a generator of the loader's, starting it would move the global random state: dropout would then
        # depend on how often data was loaded, and a resumed run would differ from one that never stopped.
        super().__init__(
            dataset,
            num_workers=num_workers,
            generator=torch.Generator(),
            timeout=timeout_seconds or 0 if num_workers else 0,
            worker_init_fn=notes.attach if notes else None,
            **options,
        )
        self.notes = notes

    # pyrefly: ignore[bad-override]  an iterator that has no more than `DataLoader` promises
    def __iter__(self) -> Iterator[Any]:
        """Batches.

        Raises:
            StuckReadingError: If workers gave nothing for the loader's time-out, or one has died.
        """
        if self.notes is not None:
            start_fork_server()
        with warnings.catch_warnings():
            # Of LanceDB where an index is open: a fork may leave a worker without an end if LanceDB is at work just
            # then. It is not here, workers do not use it, and one that gave nothing would be named in time.
            warnings.filterwarnings("ignore", "lancedb fork support is experimental", RuntimeWarning)
            batches = super().__iter__()
        return batches if self.notes is None else self._name_stuck(batches, self.notes)

    def _name_stuck(self, batches: Iterator[Any], notes: ReadNotes) -> Iterator[Any]:
        guard = _Guard(notes, self.timeout)
        try:
            while True:
                with guard:
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch
        except GeneratorExit:
            raise
        except BaseException as error:
            with unheard_children():
                explained = guard.explain(error) if isinstance(error, (RuntimeError, OSError, EOFError)) else None
                self._end_workers(batches, notes)
            if explained is None:
                raise
            raise explained from error

    def _end_workers(self, batches: Iterator[Any], notes: ReadNotes) -> None:
        """End the workers now.

        The error holds the iterator. When both are collected, the queue by which workers are asked to end may be gone
        already: PyTorch waits 5 seconds for each of them, and after its SIGTERM, which they outlive, as long again.
        """
        notes.kill()
        getattr(batches, "_shutdown_workers", lambda: None)()
        self._iterator = None  # else persistent workers would be asked for more


def _explain_broken_connection(error: Exception, notes: ReadNotes) -> StuckReadingError | None:
    """A worker that dies while it hands over a batch shows as a broken connection, before PyTorch says so."""
    if WORKER_TRACEBACK in str(error):  # raised by what a worker read
        return None
    began = time.monotonic()
    while time.monotonic() - began < SECONDS_TO_DIE:
        alive = {child.pid for child in multiprocessing.active_children()}
        if gone := {read.process for read in notes.list_reads()} - alive:
            pids = ", ".join(map(str, sorted(gone)))
            return explain_death(f"DataLoader worker (pid {pids}) is gone ({error})", gone, notes)
        time.sleep(0.05)
    return None


class _Guard:
    """Ends the workers where a batch does not come though the loader's own time-out is over.

    A loader that has begun to take a batch asks its worker for the memory that it is in, and waits for ever if the
    worker was stopped in between.

    Args:
        notes: Of the workers.
        seconds: The loader's time-out; 0 = none.
    """

    def __init__(self, notes: ReadNotes, seconds: float):
        self.notes, self.seconds = notes, seconds
        self.error: StuckReadingError | None = None
        self.timer: threading.Timer | None = None

    def __enter__(self) -> None:
        if self.seconds:
            self.timer = threading.Timer(1.5 * self.seconds + 1, self._end)
            self.timer.daemon = True
            self.timer.start()

    def __exit__(self, *exception: object) -> None:
        if self.timer is not None:
            self.timer.cancel()

    def explain(self, error: Exception) -> StuckReadingError | None:
        """What an error means that was raised while a batch was taken; `None` for those of other kinds."""
        if self.error is not None:
            return self.error
        if isinstance(error, RuntimeError):
            return explain(error, self.seconds, self.notes)
        return _explain_broken_connection(error, self.notes)

    def _end(self) -> None:
        self.error = explain_silence(self.seconds, self.notes)
        self.notes.kill()


class WatchedReads:
    """The same for a loader that another library builds and drives, such as that of the `Trainer`.

    Where batches are taken, the object is entered.

    Args:
        seconds: For which workers may give nothing; 0 = for ever.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.notes: ReadNotes | None = None
        self.guard: _Guard | None = None

    def watch(self, loader: Any) -> None:
        """Give a loader the time-out, before its workers start; without workers nothing happens."""
        loader = getattr(loader, "base_dataloader", loader)  # that of Accelerate passes settings on from there
        if loader.num_workers:
            self.notes = ReadNotes(loader.num_workers)
            start_fork_server()
            loader.timeout = self.seconds
            loader.worker_init_fn = functools.partial(_start_worker, self.notes, loader.worker_init_fn)

    def __enter__(self) -> "WatchedReads":
        if self.notes is not None:
            self.guard = _Guard(self.notes, self.seconds)
            self.guard.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.guard is None or self.notes is None:
            return
        self.guard.__exit__()
        if isinstance(error, (RuntimeError, OSError, EOFError)):
            with unheard_children():
                explained = self.guard.explain(error)
                if explained is not None:
                    self.notes.kill()
                    raise explained from error


def _start_worker(notes: ReadNotes, former: Callable[[int], Any] | None, worker: int) -> None:
    if former is not None:
        former(worker)
    notes.attach(worker)


def build_loader(
    dataset: Dataset,
    batches: Iterable[Sequence[Any]],
    num_workers: int | None,
    timeout_seconds: float | None = None,
    **options: Any,
) -> DataLoader:
    """A loader that reads planned batches and draws nothing from the global random state.

    Args:
        dataset: What the entries of a batch are read from.
        batches: Entries of each batch, in order.
        num_workers: Processes that read; 0 = this one; `None` = as many as the machine has cores, up to 4.
        timeout_seconds: For which workers may give nothing; `None` = for ever. Without workers it has no effect.
        **options: As for `DataLoader`.
    """
    # pyrefly: ignore[bad-argument-type]  annotated as lists, and any sequence does
    return NamingDataLoader(dataset, num_workers, timeout_seconds, batch_sampler=batches, **options)
