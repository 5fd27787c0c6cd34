"""Processes of a run that end by SIGKILL at a chosen moment, and how the others take it.

The moment is found by Python's audit events, which come before a file is opened, renamed or deleted. So nothing of the
script is replaced: the run that is killed is the one that users have.
"""

import contextlib
import os
import re
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

import psutil
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from tests.e2e.mistakes import run_script
from tests.processes import FILE_EVENTS, START_METHOD, build_environment, find_free_port, read_output, start_process
from umt_hf.runs.folder import FINAL_FOLDER

# Inside a checkpoint's write, just after it got its name, while an old one is deleted, while the final model is
# written, and at any time.
MOMENTS = ("write", "rename", "deletion", "export", "random")
SAVED = r"(checkpoint-\d+|[\w-]+\.tar)"
WRITTEN = re.compile(rf"{SAVED}\.unfinished")
NAMED = re.compile(rf"(.*/)?{SAVED}")
EXPORTED = re.compile(rf"(.*/)?{FINAL_FOLDER}\.unfinished(/.*)?")
LAST_LINE = re.compile(r"(Process \d+: )?(Error: |Terminated|Interrupted)")
# For a process to notice that another one is gone, and to say so.
SECONDS_TO_NOTICE = 60.0
SECONDS_TO_SPEAK = 0.5
SECONDS_OF_ORPHANS = 20.0
# As on Linux up to Python 3.13, so that no worker imports everything again.
FORKED = {START_METHOD: "fork"}

_starting = threading.Lock()


@dataclass(frozen=True)
class Kill:
    """When processes of a run are killed.

    Args:
        moment: One of `MOMENTS`.
        count: Which save, deletion or export of this run it is; 1 = the first.
        event: Which event on files of that moment; 1 = the first.
        delay: Seconds after it; at a random moment those after the start.
        ranks: Processes that are killed.
    """

    moment: str
    count: int = 1
    event: int = 1
    delay: float = 0.0
    ranks: tuple[int, ...] = (0,)


class Killer:
    """An audit hook of the main process that kills ranks at the moment.

    Args:
        kill: When, and which.
        folder: Where each rank has written its number.
    """

    def __init__(self, kill: Kill, folder: Path):
        self.kill, self.folder, self.process = kill, folder, os.getpid()
        self.places: list[str] = []  # saves, deletions or exports that have begun
        self.events, self.is_named, self.has_fired = 0, False, False

    def install(self) -> None:
        """Begin; an audit hook cannot be taken away again."""
        if self.kill.moment == "random":
            self.fire()
        else:
            sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        is_other = event not in FILE_EVENTS or os.getpid() != self.process or self.has_fired
        if not is_other and getattr(self, f"_is_{self.kill.moment}")(event, *map(str, arguments[:2])):
            self.fire()

    def _is_nth(self, place: str) -> bool:
        """Count an event at a place; whether it is the one."""
        if place not in self.places:
            self.places.append(place)
            self.events = 0
        self.events += 1
        return len(self.places) == self.kill.count and self.events >= self.kill.event

    def _is_write(self, event: str, path: str, target: str = "") -> bool:
        found = WRITTEN.search(path)
        if found is None:
            return False
        # At the latest before it gets its name.
        is_last = event == "os.rename" and NAMED.fullmatch(target) is not None
        return self._is_nth(found[0]) or (is_last and len(self.places) == self.kill.count)

    def _is_rename(self, event: str, path: str, target: str = "") -> bool:
        if self.is_named:  # the first event after it
            return True
        if event == "os.rename" and WRITTEN.search(path) and NAMED.fullmatch(target):
            self.is_named = self._is_nth(target)
        return False

    def _is_deletion(self, event: str, path: str, target: str = "") -> bool:
        if event == "os.rename" and target.endswith(".deleted"):
            return self._is_nth(target)
        return bool(self.places) and event in ("os.remove", "os.rmdir") and self._is_nth(self.places[-1])

    def _is_export(self, event: str, path: str, target: str = "") -> bool:
        return EXPORTED.fullmatch(path) is not None and self._is_nth("final")

    def fire(self) -> None:
        """Kill, now or later."""
        self.has_fired = True
        if self.kill.delay:
            threading.Thread(target=self._end, daemon=True).start()
        else:
            self._end()

    def _end(self) -> None:
        time.sleep(self.kill.delay)
        for rank in sorted(self.kill.ranks, key=lambda rank: rank == 0):  # this process last
            os.kill(int((self.folder / f"process_{rank}").read_text()), signal.SIGKILL)


def work(target: str, words: list[str], folder: str, rank: int, kill: Kill | None, is_sharded: bool) -> None:
    """What a process of a run does: the script, as `python -m` or the command starts it."""
    os.setsid()  # what it starts is found by this group
    Path(folder, f"process_{rank}").write_text(str(os.getpid()))
    if is_sharded:
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    if kill is not None and rank == 0:
        Killer(kill, Path(folder)).install()
    if target == "prepare":
        from umt_hf.cli import app

        app([target, *words])
    else:
        run_script(target, words, patience=SECONDS_TO_SPEAK)


@dataclass
class Ended:
    """How the processes of a run have ended.

    Args:
        codes: Exit codes by rank.
        killed: Ranks that were killed as planned.
        hung: Ranks that had to be killed because they did not end.
        last_lines: Of what each rank wrote to standard error.
        tails: The end of it.
        seconds: It took.
        groups: Process groups of the ranks.
    """

    codes: list[int | None]
    killed: list[int]
    hung: list[int]
    last_lines: list[str]
    tails: list[str]
    seconds: float
    groups: list[int] = field(default_factory=list)

    def list_unclear(self) -> list[int]:
        """Ranks that have failed by themselves, without a line that says why, or with a traceback before it."""
        failed = [r for r, code in enumerate(self.codes) if code != 0 and r not in self.killed and r not in self.hung]
        return [r for r in failed if not LAST_LINE.match(self.last_lines[r]) or "Traceback" in self.tails[r]]


def start_and_wait(
    target: str,
    words: list[str],
    folder: Path,
    num_processes: int = 1,
    kill: Kill | None = None,
    environment: dict[str, str] | None = None,
    timeout: float = 300,
    is_group: bool = True,
) -> Ended:
    """Run a script in processes of a number, and wait until all of them have ended.

    Args:
        target: Script, as `tests.e2e.mistakes.run_script` takes it, or "prepare".
        words: Its command line.
        folder: For what the processes write.
        num_processes: Ranks on gloo; 1 = without a group.
        kill: Which of them are killed, and when.
        environment: Further variables; those of FSDP mean that weights are divided.
        timeout: Seconds after which a run is hung. Where one rank is gone, the others have `SECONDS_TO_NOTICE`.
        is_group: Whether ranks wait for each other.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port, began, environment = find_free_port(), time.monotonic(), environment or {}
    is_sharded = "ACCELERATE_USE_FSDP" in environment
    processes = []
    with _starting:  # the server's start changes variables of this process for a moment
        for rank in range(num_processes):
            output = folder / f"output_{rank}"
            for name in ("stdout", "stderr"):
                Path(f"{output}.{name}").unlink(missing_ok=True)
            variables = build_environment(rank, num_processes, port) | FORKED | environment
            arguments = (target, words, str(folder), rank, kill, is_sharded)
            processes.append(start_process(work, *arguments, environment=variables, output=output))
    deadline = began + timeout
    while alive := [process for process in processes if process.is_alive()]:
        if is_group and len(alive) < len(processes) and any(process.exitcode for process in processes):
            deadline = min(deadline, time.monotonic() + SECONDS_TO_NOTICE)
        if not connection.wait([process.sentinel for process in alive], max(deadline - time.monotonic(), 0)):
            break
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    planned = kill.ranks if kill is not None else ()
    codes = [process.exitcode for process in processes]
    killed = [rank for rank in planned if codes[rank] == -signal.SIGKILL and rank not in hung]
    written = [read_output(folder / f"output_{rank}").stderr for rank in range(num_processes)]
    lines = [[line for line in text.splitlines() if line.strip()] for text in written]
    return Ended(
        codes,
        killed,
        hung,
        [own[-1] if own else "" for own in lines],
        [text[-6000:] for text in written],
        time.monotonic() - began,
        [process.pid for process in processes],
    )


def list_orphans(groups: list[int], seconds: float = SECONDS_OF_ORPHANS) -> list[int]:
    """Processes of groups that are still there after some seconds, such as a loader's workers."""
    deadline = time.monotonic() + seconds
    while (found := _list_alive(set(groups))) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def _list_alive(groups: set[int]) -> list[int]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) in groups and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found
