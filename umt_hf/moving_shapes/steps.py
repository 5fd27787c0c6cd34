"""Steps that need each other, each in new processes, and the seconds that each takes.

The processes are forked where that is safe, so that PyTorch and the scripts are imported once and not by every step.
"""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch
import typer

from ..runs.mistakes import MISTAKE_CODE, MISTAKES, UserError, summarize

INTERRUPTED_CODE = 130


@dataclass(frozen=True, kw_only=True)
class Step:
    """A function that runs in a new process, or in several that share its work.

    Attributes:
        function: One that a new process finds by its module and name.
        arguments: What it is called with.
        needs: Names of the steps that it needs; those that are not among the steps of the run are done.
        command: What a user would type for it, if there is such a command.
        is_beside: Whether it can run beside another step, and is not the one to watch: it then speaks to a file.
        num_threads: Threads of PyTorch; default: as many as there are cores.
        num_processes: Processes that the function is called in; Accelerate finds in the environment of each which one
            it is, and joins them. The first one speaks, the others write to files.
    """

    function: Callable[..., Any]
    arguments: Sequence[Any]
    needs: frozenset[str] = field(default_factory=frozenset)
    command: str = ""
    is_beside: bool = False
    num_threads: int | None = None
    num_processes: int = 1


@dataclass(frozen=True)
class Cost:
    """Seconds of a step: on the clock, and of processor time, all its processes and loader workers included."""

    wall: float
    cpu: float


@dataclass
class _Process:
    process: Any
    receiver: Connection
    log: Path | None
    has_ended: bool = False


@dataclass
class _Running:
    name: str
    started: float
    processes: list[_Process]


def run_steps(steps: Mapping[str, Step], num_lanes: int, logs: Path, title: str = "") -> dict[str, Cost]:
    """Run each step as soon as those it needs are done and it has room.

    Args:
        steps: By name, in the order they start in where several could.
        num_lanes: How many processes of steps run at a time; a step of more runs alone.
        logs: Folder for what steps say that run beside another one.
        title: What every line that is shown starts with.

    Returns:
        Seconds of each step.

    Raises:
        UserError: If a step fails, or they need each other in a circle; the others are stopped.
    """
    context = _choose_context()
    waiting, running, costs = dict(steps), [], {}
    try:
        while waiting or running:
            for name in _list_ready(waiting, running):
                room = num_lanes - sum(len(item.processes) for item in running)
                if min(waiting[name].num_processes, num_lanes) > room:
                    continue
                typer.echo(f"[{title}{len(steps) - len(waiting) + 1}/{len(steps)}] {name}")
                running.append(_start(context, name, waiting.pop(name), num_lanes, logs))
            if not running:
                raise UserError(f"The steps {', '.join(waiting)} need each other in a circle.")
            _wait_for_one(running)
            for item in [item for item in running if all(part.has_ended for part in item.processes)]:
                cpu = sum(part.receiver.recv() for part in item.processes)
                costs[item.name] = Cost(round(time.perf_counter() - item.started, 1), round(cpu, 1))
                running.remove(item)
    finally:
        for item in running:
            for part in item.processes:
                part.process.terminate()
            for part in item.processes:
                part.process.join()
    return {name: costs[name] for name in steps}


def format_costs(costs: Mapping[str, Cost], total: Cost) -> str:
    """Table of the seconds of each step, and of everything."""
    rows = [*costs.items(), ("everything", total)]
    lines = [f"| {name} | {cost.wall:.0f} | {cost.cpu:.0f} |" for name, cost in rows]
    return "\n".join(["| step | seconds | seconds of a processor core |", "| --- | --- | --- |", *lines])


def read_cpu_seconds() -> float:
    """Processor time of this process and of those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def can_fork() -> bool:
    """Whether steps are forked from this process, and can so be several processes that cost no further import."""
    # An accelerator that this process has looked at cannot be used in a fork, and macOS' own libraries do not survive
    # one. There every step imports what it needs again.
    return sys.platform == "linux" and not torch.accelerator.is_available()


def _choose_context() -> BaseContext:
    return multiprocessing.get_context("fork" if can_fork() else "spawn")


def _list_ready(waiting: Mapping[str, Step], running: Sequence[_Running]) -> list[str]:
    open_steps = waiting.keys() | {item.name for item in running}
    return [name for name, step in waiting.items() if not step.needs & open_steps]


def _start(context: Any, name: str, step: Step, num_lanes: int, logs: Path) -> _Running:
    is_beside = step.is_beside and num_lanes > 1
    if step.command:
        typer.echo(f"  {step.command}")
    if is_beside or step.num_processes > 1:
        logs.mkdir(parents=True, exist_ok=True)
    stem = name.replace(" ", "_")
    found = _Running(name, time.perf_counter(), [])
    for rank, environment in enumerate(_build_environments(step.num_processes)):
        log = None
        if is_beside or rank > 0:
            log = logs / (f"{stem}.txt" if rank == 0 else f"{stem}_{rank}.txt")
            words = "beside the others; it writes" if rank == 0 else f"process {rank} writes"
            typer.echo(f"  {words} to {log}")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(step, log, sender, environment), name=name)
        process.start()
        sender.close()
        found.processes.append(_Process(process, receiver, log))
    return found


def _build_environments(num_processes: int) -> list[dict[str, str]]:
    """Variables that tell each of several processes which one it is, as a launcher's do."""
    if num_processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    sizes = {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
    return [{**place, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]


def _run(step: Step, log: Path | None, sender: Connection, environment: Mapping[str, str]) -> None:
    """What a new process does."""
    os.environ.update(environment)
    if log is not None:
        with log.open("w", buffering=1, encoding="utf-8") as file:
            os.dup2(file.fileno(), sys.stdout.fileno())
            os.dup2(file.fileno(), sys.stderr.fileno())
    if step.num_threads is not None:
        torch.set_num_threads(step.num_threads)
    try:
        step.function(*step.arguments)
    except KeyboardInterrupt:  # the process that started this one speaks
        raise SystemExit(INTERRUPTED_CODE) from None
    except (*MISTAKES, UserError) as error:
        sys.stderr.write(f"Error: {summarize(error)}\n")
        raise SystemExit(MISTAKE_CODE) from None
    sender.send(read_cpu_seconds())


def _wait_for_one(running: Sequence[_Running]) -> None:
    """Return once at least one more process has ended.

    Raises:
        UserError: If it has failed. Names the step, and the place that says why.
    """
    # Not those that are alive: one that has ended since could be waited for without end.
    parts = [(item.name, part) for item in running for part in item.processes if not part.has_ended]
    ended = wait([part.process.sentinel for _, part in parts])
    for name, part in parts:
        if part.process.sentinel not in ended:
            continue
        part.process.join()
        part.has_ended = True
        if part.process.exitcode != 0:
            place = "above" if part.log is None else f"in {part.log}"
            raise UserError(f"The step {name!r} failed with code {part.process.exitcode}; it says why {place}.")
