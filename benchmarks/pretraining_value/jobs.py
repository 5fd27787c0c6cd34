"""Runs that need each other, in processes; what a finished run leaves, so that it is not repeated."""

import contextlib
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Job:
    """A function of this file with its arguments, and the names of the jobs that it needs."""

    function: Callable[..., None]
    arguments: tuple
    needs: frozenset[str] = field(default_factory=frozenset)


def run_jobs(jobs: dict[str, Job], pool: Executor, num_processes: int, logs: Path) -> None:
    """Run each job as soon as those it needs are done, no more at a time than there are processes.

    Raises:
        RuntimeError: If a job failed; it names the file with all that it said.
    """
    waiting, done, running, total = dict(jobs), set(), {}, len(jobs)
    while waiting or running:
        ready = [name for name, job in waiting.items() if job.needs <= done]
        for name in ready[: num_processes - len(running)]:
            running[pool.submit(run_job, name, waiting.pop(name), logs)] = name
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            name = running.pop(future)
            try:
                future.result()
            except BrokenProcessPool as error:
                raise RuntimeError(
                    f"A process was killed while {name} ran, perhaps for memory; its last words are in the newest "
                    f"{logs}/log_*.txt. The same command goes on where this one stopped."
                ) from error
            done.add(name)
            print(f"[{len(done)}/{total}] {name}", flush=True)


def run_job(name: str, job: Job, logs: Path) -> None:
    """Run a job in a process of the pool."""
    try:
        job.function(*job.arguments)
    except Exception as error:
        log = logs / f"log_{os.getpid()}.txt"
        raise RuntimeError(
            f"{name} failed: {error}\nWhat it said before is in {log}. The same command goes on where it stopped."
        ) from error


def build_pool(num_processes: int, folder: Path) -> Executor:
    """Processes whose output goes to `log_<process>.txt`."""
    return ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn"), start_worker, (folder,))


def start_worker(folder: Path) -> None:
    """One thread, and all that the scripts say in a file."""
    torch.set_num_threads(1)
    log = (folder / f"log_{os.getpid()}.txt").open("a", buffering=1, encoding="utf-8")
    os.dup2(log.fileno(), sys.stdout.fileno())
    os.dup2(log.fileno(), sys.stderr.fileno())


def start_run(output: Path, **settings: Any) -> dict[str, Any] | None:
    """An emptied folder and the result to fill in, or `None` if the run is already done with the same settings."""
    settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    file = output / "result.json"
    if file.exists() and json.loads(file.read_text(encoding="utf-8"))["settings"] == settings:
        return None
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    return {"settings": settings}


@contextlib.contextmanager
def measure(result: dict[str, Any]):
    """Note the seconds of processor time that the block took."""
    started = time.process_time()
    yield
    result["cpu_seconds"] = round(time.process_time() - started, 1)


def finish_run(output: Path, result: dict[str, Any]) -> None:
    """Write `result.json`, which says that the run is done."""
    (output / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
