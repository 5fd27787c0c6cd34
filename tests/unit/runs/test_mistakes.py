"""The line that a script ends with."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.processes import build_environment, start_process
from umt_hf.runs.mistakes import DivergenceError, MachineError, end_in_one_line, end_with_launcher
from umt_hf.runs.scripts import LAUNCHER_VARIABLE


@pytest.fixture(autouse=True)
def handlers():
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGCHLD") if hasattr(signal, name)]
    kept = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


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


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="needs SIGCHLD")
def test_a_worker_that_dies_while_the_line_is_written_changes_nothing(capsys):
    """PyTorch then raises wherever Python is."""

    def raise_error(*_):
        raise RuntimeError("worker is killed")

    signal.signal(signal.SIGCHLD, raise_error)
    with pytest.raises(SystemExit) as caught, end_in_one_line(lambda: os.kill(os.getpid(), signal.SIGCHLD)):
        raise MachineError("No data came for 3 s.")
    assert caught.value.code == 4 and "Error: No data came for 3 s." in capsys.readouterr().err


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
