"""What the workers of a loader are reading, seen from outside, so that a read that never ends can be named.

A worker that is stopped, or waits for a network disk, can say nothing itself: it notes beforehand, in memory that it
shares with the process that waits for it.
"""

import contextlib
import multiprocessing.forkserver
import multiprocessing.util
import os
import re
import signal
import struct
import threading
import time
import weakref
from collections.abc import Collection, Generator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import psutil
import torch

from ..runs.mistakes import MachineError, unheard_children

NOTE_BYTES = 1024
SECONDS_TO_OUTLIVE = 300
SECONDS_TO_END = 2.0  # a worker that waits for a disk may be beyond signals
FIRST = 1000  # at the end of a process
HEADER = struct.Struct("qd?H")  # process, when it began, whether it still reads, bytes of the name
NAMED_READS = 5

# What `DataLoader` says of workers that give nothing, and of those that are gone.
TIMED_OUT = re.compile(r"DataLoader timed out after")
GONE = re.compile(r"DataLoader worker \(pid(?:\(s\))?:? ([\d, ]+)\)")

_own_note: torch.Tensor | None = None  # of this worker
_ending_in = 0  # the process that will end its workers
_watched: "weakref.WeakSet[ReadNotes]" = weakref.WeakSet()


class StuckReadingError(MachineError):
    """A loader's worker has given nothing for too long, or is gone."""

    leaves_at_once = True  # the end of a process waits for its workers, and one may be beyond signals


@dataclass(frozen=True)
class Read:
    """What a worker reads, or read last.

    Args:
        process: Id of the worker.
        name: Of the video.
        seconds: Since it began.
        is_open: Whether it still reads.
    """

    process: int
    name: str
    seconds: float
    is_open: bool

    def describe(self) -> str:
        """In words."""
        if self.is_open:
            return f"{self.name} (worker {self.process}, for {self.seconds:.0f} s)"
        return f"{self.name} (worker {self.process}, done)"


class ReadNotes:
    """Notes of the workers of a loader.

    Args:
        num_workers: Workers.
    """

    def __init__(self, num_workers: int):
        self.table = torch.zeros(num_workers, NOTE_BYTES, dtype=torch.uint8).share_memory_()
        _watched.add(self)
        global _ending_in
        if _ending_in != os.getpid():  # what was to be called at the end is forgotten in a fork
            _ending_in = os.getpid()
            multiprocessing.util.Finalize(None, _end_workers, exitpriority=FIRST)

    def attach(self, worker: int) -> None:
        """Called in a worker at its start."""
        global _own_note
        end_with_parent()
        outlive_signals()
        _own_note = self.table[worker]
        _write(_own_note, b"", is_open=False)

    def list_reads(self) -> list[Read]:
        """What each worker reads, or read last."""
        reads = []
        for note in self.table.numpy():
            process, began, is_open, length = HEADER.unpack_from(note)
            name = bytes(note[HEADER.size : HEADER.size + length]).decode(errors="replace")
            if process:
                reads.append(Read(process, name, time.time() - began, is_open))
        return reads

    def kill(self) -> None:
        """End the workers, and wait until they have ended; a stopped one does not answer to less.

        The system's word of it comes while they are waited for, when it can be left out, and not at any later place.
        """
        processes = [read.process for read in self.list_reads()]
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, getattr(signal, "SIGKILL", signal.SIGTERM))
        deadline = time.monotonic() + SECONDS_TO_END
        while not all(map(_has_ended, processes)) and time.monotonic() < deadline:
            time.sleep(0.01)


def _has_ended(process: int) -> bool:
    """Whether a process is gone, or waits for its parent to read its exit code."""
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _end_workers() -> None:
    """End the workers that are left; `multiprocessing` would ask them by SIGTERM, which they outlive, and wait."""
    own = {read.process for notes in list(_watched) for read in notes.list_reads()}
    with unheard_children():
        for child in multiprocessing.active_children():
            if child.pid in own:
                child.kill()


def end_with_parent() -> None:
    """End this worker with the process that started it, also where that is killed; called in a worker at its start.

    Workers of a pool notice nothing. Those of a loader ask for the number of their parent, which is that of the fork
    server where they start by one: they would stay for ever, and the server with them.
    """
    parent = multiprocessing.parent_process()
    if parent is None or multiprocessing.get_start_method(allow_none=True) == "fork":
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def start_fork_server() -> None:
    """Start the server that workers are forked from, where there is one, so that it outlives SIGTERM like they do.

    Workers end with the server. It ends with this process.
    """
    if multiprocessing.get_start_method() == "forkserver" and threading.current_thread() is threading.main_thread():
        former = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what a program that is started inherits
        try:
            multiprocessing.forkserver.ensure_running()
        finally:
            signal.signal(signal.SIGTERM, former)


def outlive_signals() -> None:
    """Let this worker work on when a signal asks the processes of a run to save and to end; called in a worker.

    Schedulers send it to workers as well, and the run still needs their batches. It ends them when it is done.
    """
    parent = multiprocessing.parent_process()

    def handle(number: int, _: FrameType | None) -> None:
        if parent is not None and parent.is_alive() and hasattr(signal, "alarm"):
            signal.alarm(SECONDS_TO_OUTLIVE)  # by which a worker ends that nobody needs or stops
            return
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, handle)
    for name in ("SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def explain(error: Exception, seconds: float = 0, notes: "ReadNotes | None" = None) -> StuckReadingError | None:
    """What an error of `DataLoader` about its workers means; `None` for others.

    Args:
        error: As it was raised; that a worker has died may be raised at any place of the process that waits for it.
        seconds: After which the loader gave up.
        notes: Of its workers; `None` = those of all loaders.
    """
    text = str(error).strip().rstrip(".")
    if gone := GONE.search(text):
        return explain_death(text, {int(number) for number in re.findall(r"\d+", gone[1])}, notes)
    return explain_silence(seconds, notes) if TIMED_OUT.search(text) else None


def explain_death(text: str, processes: Collection[int], notes: "ReadNotes | None" = None) -> StuckReadingError:
    """What to say of workers that have died.

    Args:
        text: Who noticed what.
        processes: Ids of the workers.
        notes: Of the workers of a loader; `None` = of all.
    """
    return StuckReadingError(
        f"{text}; {describe_reads(notes, processes)}. Give it more memory, or leave the video out of the data."
    )


def explain_silence(seconds: float, notes: "ReadNotes | None" = None) -> StuckReadingError:
    """What to say where workers gave nothing.

    Args:
        seconds: After which the loader gave up.
        notes: Of its workers; `None` = those of all loaders.
    """
    return StuckReadingError(
        f"No data came for {seconds:.0f} s (--dataloader_timeout_seconds); {describe_reads(notes)}. Look at the "
        "disk that it is on, or leave the video out of the data."
    )


def describe_reads(notes: "ReadNotes | None" = None, processes: Collection[int] | None = None) -> str:
    """The reads of workers in words: those that still go on, or else the last ones.

    Args:
        notes: Of the workers of a loader; `None` = of all.
        processes: Those that are asked for; `None` = all.
    """
    reads = [read for own in ([notes] if notes else list(_watched)) for read in own.list_reads()]
    named = [read for read in reads if read.name and (processes is None or read.process in processes)]
    if not named:
        return "no worker has begun to read"
    is_open = any(read.is_open for read in named)
    named = sorted((read for read in named if read.is_open == is_open), key=lambda read: -read.seconds)
    more = f" and {len(named) - NAMED_READS} more" if len(named) > NAMED_READS else ""
    return f"{'being' if is_open else 'last'} read: " + (
        ", ".join(read.describe() for read in named[:NAMED_READS]) + more
    )


@contextlib.contextmanager
def noted(video: Any, number: int) -> Generator[None]:
    """Note what this worker reads; nothing happens outside of a worker.

    Args:
        video: As a row has it: a path, or a dictionary with one.
        number: Of the row, which names it where it has no path.
    """
    if _own_note is None:
        yield
        return
    path = video.get("path") if isinstance(video, dict) else video
    name = path if isinstance(path, str) else f"row {number}"
    _write(_own_note, name.encode(errors="replace"), is_open=True)
    try:
        yield
    finally:
        _write(_own_note, None, is_open=False)


def _write(note: torch.Tensor, name: bytes | None, is_open: bool) -> None:
    content = note.numpy()
    _, began, _, length = HEADER.unpack_from(content)  # pyrefly: ignore[bad-argument-type]  an array is a buffer
    if name is not None:
        name = name[-(NOTE_BYTES - HEADER.size) :]  # the end of a path says more
        content[HEADER.size : HEADER.size + len(name)] = bytearray(name)
        began, length = time.time(), len(name)
    HEADER.pack_into(content, 0, os.getpid(), began, is_open, length)  # pyrefly: ignore[bad-argument-type]  likewise
