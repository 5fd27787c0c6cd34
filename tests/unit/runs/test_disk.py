"""One run at a time writes a folder; the lock ends with the process that holds it, and not with its children."""

import errno
import os
import signal
import time

import pytest

from tests.processes import build_environment, start_process
from umt_hf.runs import disk
from umt_hf.runs.disk import fill_folder, hold_lock, put_folder


def hold_with_child(folder):
    """Hold the lock in a process with a forked child, as loader workers are."""
    with hold_lock(folder / ".lock", "run"):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        (folder / "child").write_text(str(child))
        time.sleep(60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Workers are not forked.")
def test_a_killed_run_frees_its_folder_though_its_workers_live(tmp_path):
    process = start_process(
        hold_with_child, tmp_path, environment=build_environment(0, 1, 0), output=tmp_path / "output"
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "child").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    child = int((tmp_path / "child").read_text())
    try:
        with (
            pytest.raises(BlockingIOError, match=f"^run is being written by another run \\(process {process.pid} on "),
            hold_lock(tmp_path / ".lock", "run"),
        ):
            pass
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        os.kill(child, 0)  # alive
        with hold_lock(tmp_path / ".lock", "run"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_folder_made_for_the_lock_goes_with_it(tmp_path):
    with pytest.raises(ValueError, match="mistake"), hold_lock(tmp_path / "run" / ".lock", "run"):
        raise ValueError("mistake")
    assert not (tmp_path / "run").exists()
    with hold_lock(tmp_path / "run" / ".lock", "run"):
        (tmp_path / "run" / "model").touch()
    assert (tmp_path / "run" / "model").exists()


@pytest.mark.skipif(disk.fcntl is None, reason="Locks by name have another reason.")
def test_a_file_system_without_locks_is_said_and_stops_nothing(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(disk.fcntl, "flock", refuse)
    with hold_lock(tmp_path / ".lock", "run"):
        (tmp_path / "model").touch()
    assert "cannot be locked (No locks available): start one run at a time there" in caplog.text


def test_locks_by_name_refuse_too(tmp_path, monkeypatch):
    """As on Windows."""
    monkeypatch.setattr(disk, "fcntl", None)
    refused = pytest.raises(BlockingIOError, match="^run is being written by another run. Wait")
    with hold_lock(tmp_path / ".lock", "run"), refused, hold_lock(tmp_path / ".lock", "run"):
        pass


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_others_may_read_what_a_library_wrote_for_its_owner_alone(tmp_path):
    """As safetensors writes weights."""
    for name in ("checkpoint", "model"):
        (tmp_path / name).mkdir()
    written = tmp_path / "checkpoint.unfinished"
    written.mkdir()
    with fill_folder(tmp_path / "model") as unfinished:
        for folder in (written, unfinished):
            (folder / "model.safetensors").touch(0o600)
    put_folder(written, tmp_path / "checkpoint")
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "plain").stat().st_mode}
