"""Processes of a benchmark: a server imports the package once, and each process is forked from it in milliseconds.

A process is its own: what one run compiles, caches or allocates is not there in the next.
"""

import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

START_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
CONTEXT = multiprocessing.get_context(START_METHOD)
SYSTEM_METHOD = "UMT_HF_BENCHMARK_START_METHOD"
LINES_OF_A_FAILURE = 30


def import_once() -> None:
    """Let the server import the package; called where a benchmark is the program, since there is one server only."""
    if START_METHOD == "forkserver":
        CONTEXT.set_forkserver_preload(["benchmarks.preloaded"])


def call_in_processes(
    function: Callable[[Any], Any],
    job: Any,
    num_processes: int = 1,
    threads: int = 1,
    environment: Mapping[str, str] | None = None,
    timeout: float = 600,
) -> list[Any]:
    """Call a function of a module in new processes that find each other as `torchrun` lets them.

    Args:
        function: Gets the job; what it returns must be picklable.
        job: What it is to do.
        num_processes: Processes; 1 is a process outside any group.
        threads: Of each process.
        environment: Variables beside those of this process.
        timeout: Seconds, after which the processes are killed.

    Returns:
        What each process returned, by rank.

    Raises:
        RuntimeError: If one fails, or they take too long; the message has the last lines of what it wrote.
    """
    port = _find_free_port()
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(num_processes):
            variables = {"OMP_NUM_THREADS": str(threads), **_describe_rank(rank, num_processes, port)}
            receiver, sender = CONTEXT.Pipe(duplex=False)
            log = Path(folder) / str(rank)
            # Loaders start their workers as they would outside.
            variables[SYSTEM_METHOD] = multiprocessing.get_start_method()
            arguments = (sender, function, job, variables | dict(environment or {}), log)
            process = CONTEXT.Process(target=_work, args=arguments)
            process.start()
            sender.close()
            started.append((process, receiver, log))
        try:
            return _receive_all(started, timeout)
        finally:
            for process, _, _ in started:
                process.kill()
                process.join()


def _work(sender: Connection, function: Callable, job: Any, environment: Mapping[str, str], log: Path) -> None:
    os.environ.update(environment)
    written = os.open(log, os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(written, 1)
    os.dup2(written, 2)
    multiprocessing.set_start_method(environment[SYSTEM_METHOD], force=True)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    try:
        sender.send(function(job))
    except BaseException:  # an exit of the script, too
        traceback.print_exc()
        sys.exit(1)


def _receive_all(started: list[tuple[Any, Connection, Path]], timeout: float) -> list[Any]:
    found: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while waiting := {receiver: i for i, (_, receiver, _) in enumerate(started) if i not in found}:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise _describe_failure(next(iter(waiting.values())), started, f"gave nothing in {timeout:.0f} s")
        for receiver in ready:
            number = waiting[receiver]
            try:
                found[number] = receiver.recv()
            except EOFError as error:
                process = started[number][0]
                process.join()
                raise _describe_failure(number, started, f"ended with {process.exitcode}") from error
    return [found[number] for number in range(len(started))]


def _describe_failure(number: int, started: list[tuple[Any, Connection, Path]], reason: str) -> RuntimeError:
    written = started[number][2].read_text(encoding="utf-8", errors="replace")
    lines = "\n".join(written.splitlines()[-LINES_OF_A_FAILURE:])
    return RuntimeError(f"Process {number} of the benchmark {reason}:\n{lines}")


def _describe_rank(rank: int, num_processes: int, port: int) -> dict[str, str]:
    on_cpu = {} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"}
    if num_processes == 1:
        return on_cpu
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
    return (
        {name: str(value) for name, value in variables.items()}
        | on_cpu
        | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    )


def _find_free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
