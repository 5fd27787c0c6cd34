"""Processes that start in milliseconds: one server imports everything once and forks each of them.

A rank that starts the usual way spends seconds on importing PyTorch and Transformers, often more than its test takes.
The server (of `multiprocessing`, one per process of pytest) only imports, so that a fork finds no thread, no generator
that was drawn from and nothing of Accelerate's state. What `accelerate launch` itself does is tested apart, in
`tests/e2e/test_launching.py`.
"""

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = dict(os.environ)  # before any test changes it
GRACE_SECONDS = 20
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preloaded"])


@dataclass(frozen=True)
class Finished:
    """What processes left behind, in the order of their ranks."""

    exit_codes: list[int]
    stdout: str
    stderr: str


def run_ranks(
    function: Callable,
    *arguments,
    num_processes: int = 2,
    exit_code: int = 0,
    timeout: float = 120,
    stdin: str = "",
    environment: dict[str, str] | None = None,
) -> Finished:
    """Call a function in several CPU processes that find each other as `torchrun` lets them.

    Args:
        function: Function of a module, such as the `main` of a script.
        arguments: What each process calls it with.
        num_processes: Number of processes; 1 is a process outside any group.
        exit_code: What every process has to end with.
        timeout: Seconds after which processes are killed. Once one has failed, the others have `GRACE_SECONDS` left.
        stdin: What the processes read.
        environment: Variables beside those of pytest's start.

    Raises:
        AssertionError: If a process ends otherwise, or not at all; the message has the end of what each wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "stdin").write_text(stdin)
        port = find_free_port()
        processes = [
            start_process(
                function,
                *arguments,
                environment=build_environment(rank, num_processes, port) | (environment or {}),
                output=Path(folder) / str(rank),
                stdin=Path(folder) / "stdin",
            )
            for rank in range(num_processes)
        ]
        wait_for(processes, exit_code, timeout)
        killed = [process.is_alive() for process in processes]
        for process in processes:
            process.kill()
            process.join()
        outputs, errors = ([read_output(Path(folder) / f"{rank}.{kind}") for rank in range(num_processes)] for kind in ("stdout", "stderr"))
    exit_codes = [process.exitcode for process in processes]
    if any(killed) or set(exit_codes) != {exit_code}:
        ends = ["was killed after the time-out" if late else f"ended with {code}" for late, code in zip(killed, exit_codes, strict=True)]
        raise AssertionError(
            "\n".join(
                f"--- Rank {rank} {end}.\n{out[-1000:]}{error[-3000:]}"
                for rank, (end, out, error) in enumerate(zip(ends, outputs, errors, strict=True))
            )
        )
    return Finished(exit_codes, "".join(outputs), "".join(errors))


def run_and_kill(is_time: Callable[[], bool], function: Callable, *arguments, timeout: float = 120) -> None:
    """Call a function in one CPU process, and end it by SIGKILL as soon as a condition holds.

    Raises:
        AssertionError: If the process ends before, or the condition does not hold in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        process = start_process(function, *arguments, environment=build_environment(0, 1, 0), output=output)
        deadline = time.monotonic() + timeout
        while not (is_reached := is_time()) and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        process.kill()
        process.join()
        assert is_reached and process.exitcode == -signal.SIGKILL, (
            f"not killed in time (exit code {process.exitcode}):\n{read_output(Path(f'{output}.stderr'))[-3000:]}"
        )


def wait_for(processes: list[BaseProcess], exit_code: int, timeout: float) -> None:
    """Wait until all have ended, or the time is up."""
    deadline = time.monotonic() + timeout
    while alive := [process for process in processes if process.is_alive()]:
        if any(process.exitcode not in (None, exit_code) for process in processes):
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if not connection.wait([process.sentinel for process in alive], deadline - time.monotonic()):
            return


def start_process(
    function: Callable,
    *arguments,
    environment: dict[str, str] | None = None,
    output: Path | None = None,
    stdin: Path | None = None,
) -> BaseProcess:
    """Call a function in a process on one thread, in the repository's root.

    Args:
        function: Function of a module.
        arguments: What it is called with.
        environment: Variables beside those of pytest's start.
        output: Where to write `<output>.stdout` and `<output>.stderr`; by default nothing is kept.
        stdin: File to read as standard input.
    """
    start_server()
    process = CONTEXT.Process(target=work, args=(function, arguments, environment or {}, output, stdin))
    process.start()
    return process


def start_server() -> None:
    """Start the server, unless it runs, in the environment of pytest's start: its imports may depend on it."""
    if forkserver._forkserver._forkserver_alive_fd is not None:
        return
    changed, folder = dict(os.environ), os.getcwd()
    try:
        os.environ.clear()
        os.environ.update(ENVIRONMENT | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
        os.chdir(ROOT)
        forkserver.ensure_running()
    finally:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(changed)


def work(
    function: Callable, arguments: tuple, environment: dict[str, str], output: Path | None, stdin: Path | None
) -> None:
    """What a forked process does."""
    os.chdir(ROOT)
    os.environ.update(environment)
    for descriptor, kind in ((1, "stdout"), (2, "stderr")):
        redirect(descriptor, f"{output}.{kind}" if output else os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    redirect(0, stdin or os.devnull, os.O_RDONLY)
    sys.stdin = open(0, closefd=False)
    function(*arguments)


def redirect(descriptor: int, path: Path | str, flags: int) -> None:
    opened = os.open(path, flags, 0o600)
    os.dup2(opened, descriptor)
    os.close(opened)


def build_environment(rank: int, num_processes: int, port: int) -> dict[str, str]:
    """Variables that `torchrun` gives to a rank."""
    common = {"ACCELERATE_USE_CPU": "true"}
    if num_processes == 1:
        return common
    return common | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def read_output(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def find_free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
