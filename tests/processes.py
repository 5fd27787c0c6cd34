"""Processes that start in milliseconds: one server imports everything once and forks each of them.

A rank that starts the usual way spends seconds on importing PyTorch and Transformers, often more than its test takes.
The server (that of `multiprocessing`, one per pytest process) only imports `tests.preloaded`, so that a forked process
finds no thread that computes, no generator that was drawn from and no state of Accelerate. What `accelerate launch`
itself does is tested in `tests/e2e/test_launching.py`.
"""

import io
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}  # before any test changes it
GRACE_SECONDS = 20
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preloaded"])
# How loader workers start (fork, forkserver, spawn), here and in the ranks; default: the system's own way.
START_METHOD = "UMT_HF_TEST_START_METHOD"
# Audit events that come before a file or folder changes or is read.
FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate")


@dataclass(frozen=True)
class Output:
    """What processes wrote, in the order of their ranks."""

    stdout: str
    stderr: str


def run_ranks(
    function: Callable,
    *arguments,
    num_processes: int = 2,
    exit_code: int = 0,
    timeout: float = 300,
    stdin: str = "",
    environment: dict[str, str] | None = None,
) -> Output:
    """Call a function in several CPU processes that find each other as `torchrun` lets them.

    Args:
        function: Function of a module, such as the `main` of a script.
        arguments: What each process calls it with.
        num_processes: Number of processes; 1 is a process outside any group.
        exit_code: What every process has to end with, by itself.
        timeout: Seconds after which processes are killed. Once one has ended with another code, the others have
            `GRACE_SECONDS`.
        stdin: What the processes read.
        environment: Variables beside those of pytest's start.

    Raises:
        AssertionError: If a process ends with another code, or not in time; the message has what each wrote.
    """
    port = find_free_port()
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(rank) for rank in range(num_processes)]
        processes = [
            start_process(
                function,
                *arguments,
                environment=build_environment(rank, num_processes, port) | (environment or {}),
                output=output,
                stdin=stdin,
            )
            for rank, output in enumerate(outputs)
        ]
        wait_for(processes, exit_code, timeout)
        for process in processes:
            process.kill()
            process.join()
        written = [read_output(output) for output in outputs]
    if any(process.exitcode != exit_code for process in processes):
        raise AssertionError(
            "\n".join(
                f"--- Rank {rank} ended with {process.exitcode} ({-signal.SIGKILL} = killed after the time-out).\n"
                f"{output.stdout[-1000:]}{output.stderr[-3000:]}"
                for rank, (process, output) in enumerate(zip(processes, written, strict=True))
            )
        )
    return Output("".join(output.stdout for output in written), "".join(output.stderr for output in written))


def run_and_kill(is_time: Callable[[], bool], function: Callable, *arguments, timeout: float = 180) -> None:
    """Call a function in a process, and end it by SIGKILL as soon as a condition holds.

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
        stderr = read_output(output).stderr
    assert is_reached and process.exitcode == -signal.SIGKILL, (
        f"it was {'' if is_reached else 'not '}time, and the process ended with {process.exitcode}:\n{stderr[-3000:]}"
    )


def run_until(folder: Path, pattern: str, function: Callable, *arguments, timeout: float = 180) -> None:
    """Call a function in a process that ends itself by SIGKILL once a file or folder is there.

    The check comes before each file that Python opens, renames or deletes, so no moment is too short for it, however
    busy the machine is.

    Raises:
        AssertionError: If the process ends before, or not in time.
    """
    with tempfile.TemporaryDirectory() as outputs:
        output, environment = Path(outputs) / "output", build_environment(0, 1, 0)
        process = start_process(
            _call_until, folder, pattern, function, arguments, environment=environment, output=output
        )
        process.join(timeout)
        code = process.exitcode
        process.kill()
        process.join()
        stderr = read_output(output).stderr
    assert code == -signal.SIGKILL, f"{pattern} was not met, and the process ended with {code}:\n{stderr[-3000:]}"


def _call_until(folder: Path, pattern: str, function: Callable, arguments: tuple) -> None:
    own = os.getpid()

    def end_there(event: str, _: tuple) -> None:
        if event in FILE_EVENTS and os.getpid() == own and next(folder.glob(pattern), None) is not None:
            os.kill(own, signal.SIGKILL)

    sys.addaudithook(end_there)
    function(*arguments)


def start_process(
    function: Callable, *arguments, environment: dict[str, str], output: Path, stdin: str = ""
) -> BaseProcess:
    """Call a function in a process on one thread, in the repository's root.

    Args:
        function: Function of a module.
        arguments: What it is called with.
        environment: Variables beside those of pytest's start.
        output: Where to write `<output>.stdout` and `<output>.stderr`.
        stdin: What it reads.
    """
    start_server()
    process = CONTEXT.Process(target=work, args=(function, arguments, environment, output, stdin))
    process.start()
    return process


def start_server() -> None:
    """Start the server unless it runs, in the environment of pytest's start, since imports may depend on it."""
    changed, folder = dict(os.environ), os.getcwd()
    try:
        os.environ.clear()
        os.environ.update(ENVIRONMENT)
        os.chdir(ROOT)
        forkserver.ensure_running()
    finally:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(changed)


def work(function: Callable, arguments: tuple, environment: dict[str, str], output: Path, stdin: str) -> None:
    """What a forked process does."""
    os.chdir(ROOT)
    os.environ.update(environment)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        opened = os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdin = io.StringIO(stdin)
    set_start_method()
    function(*arguments)


def set_start_method() -> None:
    """Start the workers of loaders as the environment says."""
    if method := os.environ.get(START_METHOD):
        multiprocessing.set_start_method(method, force=True)


def wait_for(processes: list[BaseProcess], exit_code: int, timeout: float) -> None:
    """Wait until all have ended, or the time is up."""
    deadline = time.monotonic() + timeout
    while alive := [process for process in processes if process.is_alive()]:
        if any(process.exitcode not in (None, exit_code) for process in processes):
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if not connection.wait([process.sentinel for process in alive], deadline - time.monotonic()):
            return


def build_environment(rank: int, num_processes: int, port: int) -> dict[str, str]:
    """Variables that `torchrun` gives to a rank."""
    if num_processes == 1:
        return {"ACCELERATE_USE_CPU": "true"}
    return {
        "ACCELERATE_USE_CPU": "true",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def read_output(path: Path) -> Output:
    files = [Path(f"{path}.{name}") for name in ("stdout", "stderr")]
    return Output(*(file.read_text(errors="replace") if file.exists() else "" for file in files))


def find_free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
