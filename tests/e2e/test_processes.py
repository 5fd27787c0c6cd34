"""The processes that tests fork: what they are given, what is read of them, and how they end."""

import importlib
import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import distributed

from tests.processes import run_and_kill, run_ranks


def add_ranks() -> None:
    distributed.init_process_group("gloo")
    total = torch.tensor(float(distributed.get_rank() + 1))
    distributed.all_reduce(total)
    print(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}: {total.item():g}")


def fail_in_rank_1(code: int) -> None:
    print("here I am", file=sys.stderr)
    if os.environ["RANK"] == "1":
        sys.exit(code)
    time.sleep(60)


def describe() -> None:
    print(sys.stdin.read(), os.environ["MINE"], torch.get_num_threads(), "RANK" in os.environ)
    print(re.findall(r"^Threads:\t(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE))


def write_until_killed(folder: Path) -> None:
    for number in range(1000):
        (folder / str(number)).touch()
        time.sleep(0.01)


def test_ranks_find_each_other():
    assert run_ranks(add_ranks).stdout == "rank 0 of 2: 3\nrank 1 of 2: 3\n"


def test_a_process_has_its_input_variables_and_one_thread(monkeypatch):
    monkeypatch.setenv("RANK", "7")  # of whoever starts the tests
    output = run_ranks(describe, num_processes=1, stdin="words", environment={"MINE": "mine"})
    assert output.stdout == "words mine 1 False\n['1']\n"


def test_everything_is_imported_before():
    """Otherwise `multiprocessing` goes on without a word, and each process imports for itself.

    There is one server for all: what is imported beside it may not choose another.
    """
    importlib.import_module("benchmarks.processes")
    run_ranks(check_imports)


def check_imports() -> None:
    assert {"tests.preloaded", "umt_hf.training.stage2", "umt_hf.cli"} <= sys.modules.keys()


def test_failures_have_what_was_said(monkeypatch):
    monkeypatch.setattr("tests.processes.GRACE_SECONDS", 0.3)
    with pytest.raises(AssertionError, match=r"(?s)Rank 0 ended with -9.*here I am.*Rank 1 ended with 3.*here I am"):
        run_ranks(fail_in_rank_1, 3)
    with pytest.raises(AssertionError, match="Rank 0 ended with -9"):
        run_ranks(time.sleep, 60, timeout=0.3)
    with pytest.raises(AssertionError, match="Rank 0 ended with 0"):
        run_ranks(add_ranks, exit_code=1)


def test_killing(tmp_path):
    run_and_kill((tmp_path / "3").exists, write_until_killed, tmp_path)
    assert not (tmp_path / "999").exists()
    with pytest.raises(AssertionError, match="it was not time, and the process ended with 0"):
        run_and_kill(lambda: False, check_imports)
    with pytest.raises(AssertionError, match="it was not time, and the process ended with -9"):
        run_and_kill(lambda: False, time.sleep, 60, timeout=0.3)
