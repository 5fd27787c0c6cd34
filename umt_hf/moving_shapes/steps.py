"""Steps that need each other, each in a new process, and the seconds that each takes.

The processes are forked where that is safe, so that PyTorch and the scripts are imported once and not by every step.
"""

import multiprocessing
import os
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
    """A function that runs in a new process.

    Attributes:
        function: One that a new process finds by its module and name.
        arguments: What it is called with.
        needs: Names of the steps that it needs; those that are not among the steps of the run are done.
        command: What a user would type for it, if there is such a command.
        is_beside: Whether it can run beside another step, and is not the one to watch: it then speaks to a file.
        num_threads: Threads of PyTorch; default: as many as there are cores.
    """

    function: Callable[..., Any]
    arguments: Sequence[Any]
    needs: frozenset[str] = field(default_factory=frozenset)
    command: str = ""
    is_beside: bool = False
    num_threads: int | None = None


@dataclass(frozen=True)
class Cost:
    """Seconds of a step: on the clock, and of processor time, its loader workers included."""

    wall: float
    cpu: float


@dataclass
class _Running:
    name: str
    process: Any
    receiver: Connection
    started: float
    log: Path | None


def run_steps(steps: Mapping[str, Step], num_lanes: int, logs: Path, title: str = "") -> dict[str, Cost]:
    """Run each step as soon as those it needs are done.

    Args:
        steps: By name, in the order they start in where several could.
        num_lanes: How many run at a time.
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
            for name in _list_ready(waiting, running)[: num_lanes - len(running)]:
                typer.echo(f"[{title}{len(steps) - len(waiting) + 1}/{len(steps)}] {name}")
                running.append(_start(context, name, waiting.pop(name), num_lanes, logs))
            if not running:
                raise UserError(f"The steps {', '.join(waiting)} need each other in a circle.")
            ended = wait([item.process.sentinel for item in running])
            for item in [item for item in running if item.process.sentinel in ended]:
                costs[item.name] = _finish(item)
                running.remove(item)
    finally:
        for item in running:
            item.process.terminate()
            item.process.join()
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


def _choose_context() -> BaseContext:
    # An accelerator that this process has looked at cannot be used in a fork, and macOS' own libraries do not survive
    # one. There every step imports what it needs again.
    can_fork = sys.platform == "linux" and not torch.accelerator.is_available()
    return multiprocessing.get_context("fork" if can_fork else "spawn")


def _list_ready(waiting: Mapping[str, Step], running: Sequence[_Running]) -> list[str]:
    open_steps = waiting.keys() | {item.name for item in running}
    return [name for name, step in waiting.items() if not step.needs & open_steps]


def _start(context: Any, name: str, step: Step, num_lanes: int, logs: Path) -> _Running:
    log = None
    if step.command:
        typer.echo(f"  {step.command}")
    if step.is_beside and num_lanes > 1:
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / f"{name.replace(' ', '_')}.txt"
        typer.echo(f"  beside the others; it writes to {log}")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(step, log, sender), name=name)
    started = time.perf_counter()
    process.start()
    sender.close()
    return _Running(name, process, receiver, started, log)


def _run(step: Step, log: Path | None, sender: Connection) -> None:
    """What the new process does."""
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


def _finish(item: _Running) -> Cost:
    item.process.join()
    if item.process.exitcode != 0:
        place = "above" if item.log is None else f"in {item.log}"
        raise UserError(f"The step {item.name!r} failed with code {item.process.exitcode}; it says why {place}.")
    return Cost(round(time.perf_counter() - item.started, 1), round(item.receiver.recv(), 1))
