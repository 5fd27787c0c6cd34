"""Workers of loaders that are stopped, wait for a file for ever, or die: the videos in flight are named."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

from umt_hf.data.in_flight import StuckReadingError, noted
from umt_hf.data.loaders import build_loader
from umt_hf.runs.mistakes import unheard_children


class Readings(torch.utils.data.Dataset):
    """Reads files; one that is a pipe without a writer never ends."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __getitem__(self, number: int) -> int:
        path = self.paths[number]
        with noted({"path": str(path)}, number):
            content = path.read_bytes()
            if content == b"die":
                os.kill(os.getpid(), signal.SIGKILL)
        return len(content)


@pytest.fixture
def paths(tmp_path) -> list[Path]:
    paths = [tmp_path / f"video_{number}.mp4" for number in range(4)]
    for path in paths:
        path.write_bytes(b"content")
    return paths


def load(paths: list[Path], num_workers: int = 2, timeout_seconds: float | None = 2) -> list:
    plan = [[number] for number in range(len(paths))]
    return list(build_loader(Readings(paths), plan, num_workers, timeout_seconds, collate_fn=list))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_file_that_never_comes_is_named_and_the_workers_end(paths):
    paths[2].unlink()
    os.mkfifo(paths[2])
    began = time.monotonic()
    with pytest.raises(StuckReadingError, match=r"No data came for 2 s \(--dataloader_timeout_seconds\)") as caught:
        load(paths)
    assert time.monotonic() - began < 20
    assert f"being read: {paths[2]} (worker " in str(caught.value) and "video_1" not in str(caught.value)


def test_a_worker_that_is_stopped_is_named_with_what_it_read_last(paths):
    loader = build_loader(Readings(paths), [[number] for number in [0, 1, 2, 3] * 8], 1, 2, collate_fn=list)
    batches = iter(loader)
    next(batches)
    (read,) = loader.notes.list_reads()
    os.kill(read.process, signal.SIGSTOP)
    with pytest.raises(StuckReadingError, match=rf"read: .*video_\d\.mp4 \(worker {read.process}, "):
        list(batches)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{read.process}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert time.monotonic() < deadline


def test_a_worker_that_dies_is_named_with_what_it_read(paths):
    paths[1].write_bytes(b"die")
    with pytest.raises(StuckReadingError, match=rf"DataLoader worker .*; being read: {paths[1]} \(worker ") as caught:
        load(paths, num_workers=1, timeout_seconds=None)
    assert "Give it more memory" in str(caught.value)


class DyingHandover:
    """What a worker hands over, and dies meanwhile."""

    def __reduce__(self):
        return _break_connection, (os.getpid(),)


def _break_connection(worker: int):
    os.kill(worker, signal.SIGKILL)
    raise ConnectionResetError(104, "Connection reset by peer")


def test_a_worker_that_dies_while_it_hands_over_a_batch_is_named(paths):
    plan = [[number] for number in range(4)]
    loader = build_loader(Readings(paths), plan, 1, 2, collate_fn=lambda rows: DyingHandover())
    with pytest.raises(StuckReadingError, match=r"DataLoader worker \(pid.*read: .*\.mp4 \(worker "):
        list(loader)


def test_nothing_changes_without_workers_or_trouble(paths):
    assert load(paths) == load(paths, num_workers=0) == [[7]] * 4


@pytest.mark.parametrize("is_persistent", [False, True])
def test_other_errors_stay_and_workers_do_not(paths, is_persistent):
    """While the error is held, as in a notebook; a loader whose workers were to stay starts new ones."""
    paths[2].unlink()
    plan = [[number] for number in range(4)]
    loader = build_loader(Readings(paths), plan, 2, 2, collate_fn=list, persistent_workers=is_persistent)
    for _ in range(2):
        with pytest.raises(FileNotFoundError) as caught:
            list(loader)
        workers = {read.process for read in loader.notes.list_reads()}
        assert caught.value is not None and workers
        assert not workers & {child.pid for child in multiprocessing.active_children()}
    paths[2].write_bytes(b"content")
    assert list(loader) == [[7]] * 4
    if is_persistent:  # else they would outlive this test
        with unheard_children():
            loader._end_workers(loader._iterator, loader.notes)


def test_an_interruption_ends_the_workers(paths):
    loader = build_loader(Readings(paths), [[number] for number in [0, 1, 2, 3] * 8], 2, 20, collate_fn=list)
    batches = iter(loader)
    next(batches)
    with pytest.raises(KeyboardInterrupt) as caught:
        batches.throw(KeyboardInterrupt)
    workers = {read.process for read in loader.notes.list_reads()}
    assert caught.value is not None and workers
    assert not workers & {child.pid for child in multiprocessing.active_children()}


def test_workers_that_are_ended_are_gone_when_it_is_said(paths):
    """So that nothing of PyTorch's interrupts what comes next."""
    for _ in range(5):
        loader = build_loader(Readings(paths), [[number] for number in [0, 1, 2, 3] * 8], 2, 20, collate_fn=list)
        batches = iter(loader)
        next(batches)
        workers = [psutil.Process(read.process) for read in loader.notes.list_reads()]
        workers[0].send_signal(signal.SIGSTOP)
        with unheard_children():
            loader.notes.kill()
            assert {worker.status() for worker in workers} == {psutil.STATUS_ZOMBIE}
        with pytest.raises(StuckReadingError):
            list(batches)
