"""The line that a script ends with."""

import functools
import os
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
from torch.utils.data import DataLoader

from tests.processes import build_environment, read_output, start_process
from umt_hf.runs import mistakes
from umt_hf.runs.mistakes import DivergenceError, MachineError, call_at_end, end_in_one_line, end_with_launcher
from umt_hf.runs.scripts import LAUNCHER_VARIABLE


@pytest.fixture(autouse=True)
def handlers():
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


def test_an_interruption_that_comes_by_two_ways_is_said_once_and_a_later_one_is_heard(capsys, monkeypatch):
    def describe() -> str:
        os.kill(os.getpid(), signal.SIGINT)
        return "Nothing was saved."

    for _ in range(3):  # as in a notebook
        with pytest.raises(SystemExit) as caught, end_in_one_line(describe):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        os.kill(os.getpid(), signal.SIGINT)
        assert caught.value.code == 130
        assert capsys.readouterr().err.splitlines() == ["Interrupted. Nothing was saved."]
    monkeypatch.setattr(mistakes, "SECONDS_OF_ONE_INTERRUPTION", 0.0)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)


def end(*errors: Exception) -> None:
    """Raise the first error, and each further one while the one before is on its way out."""
    with end_in_one_line(lambda: ""):
        _raise(list(errors))


def _raise(errors: list[Exception]) -> None:
    if errors:
        try:
            _raise(errors[:-1])
        finally:
            raise errors[-1]


def test_an_error_that_comes_while_another_is_on_its_way_out_does_not_hide_it(capsys):
    with pytest.raises(SystemExit) as caught:
        end(KeyError("cause"), DivergenceError("Step 3: the rate is too high."), RuntimeError("worker is killed"))
    assert caught.value.code == 3
    assert capsys.readouterr().err.splitlines() == ["Error: Step 3: the rate is too high."]


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="a fault"):
        end(KeyError("cause"), RuntimeError("a fault"))


def test_a_worker_that_dies_while_the_error_is_told_does_not_hide_it(capsys):
    """PyTorch's handler raises wherever the main thread is just then."""
    loader = iter(DataLoader(range(8), num_workers=1, multiprocessing_context="fork"))
    next(loader)

    def describe() -> str:
        loader._workers[0].kill()
        time.sleep(0.5)
        return "Nothing was saved."

    with pytest.raises(SystemExit) as caught, end_in_one_line(describe):
        raise MachineError("Step 3: no data came.")
    assert caught.value.code == 4
    assert capsys.readouterr().err.splitlines() == ["Error: Step 3: no data came. Nothing was saved."]
    assert signal.getsignal(signal.SIGCHLD) not in (signal.SIG_DFL, signal.SIG_IGN)


def make_folders_and_fail(folder: Path, at_once: bool) -> None:
    """What a script leaves behind that ends in order, or at once with the line of an error."""
    (folder / "made").mkdir()
    call_at_end(functools.partial(shutil.rmtree, folder / "made"))
    with end_in_one_line(lambda: "Nothing was saved."):
        error = MachineError("A worker is gone.")
        error.leaves_at_once = at_once
        raise error


@pytest.mark.parametrize("at_once", [False, True])
def test_what_is_to_be_called_at_the_end_is(tmp_path, at_once):
    process = start_process(make_folders_and_fail, tmp_path, at_once, environment={}, output=tmp_path / "output")
    process.join(60)
    said = read_output(tmp_path / "output").stderr
    assert process.exitcode == 4 and said.splitlines()[-1] == "Error: A worker is gone. Nothing was saved."
    assert not (tmp_path / "made").exists()


def start_script_and_be_killed(folder: Path) -> None:
    """As `umt-hf` starts a script; then SIGKILL comes, which it cannot hand on."""
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    if os.fork() == 0:
        (folder / "script").write_text(str(os.getpid()))
        with end_in_one_line(lambda: ""):
            (folder / "began").touch()
            time.sleep(60)
        os._exit(0)
    while not (folder / "began").exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_script_ends_with_the_command_that_is_killed(tmp_path):
    output, environment = tmp_path / "output", build_environment(0, 1, 0)
    process = start_process(start_script_and_be_killed, tmp_path, environment=environment, output=output)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    script, deadline = int((tmp_path / "script").read_text()), time.monotonic() + 20
    while (is_there := psutil.pid_exists(script)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_there


def test_a_script_of_a_command_that_is_gone_does_not_begin(tmp_path):
    output, environment = tmp_path / "output", build_environment(0, 1, 0) | {LAUNCHER_VARIABLE: str(2**22 + 1)}
    process = start_process(end_with_launcher, environment=environment, output=output)
    process.join(60)
    assert process.exitcode == 1
