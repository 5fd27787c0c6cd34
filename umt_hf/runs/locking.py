"""A folder or file that one run at a time writes: the lock goes with the process, however that ends."""

import logging
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"

_held: set[int] = set()


@contextmanager
def hold_lock(path: Path, subject: str) -> Generator[None]:
    """Hold a lock until the block ends, or the process, also by SIGKILL.

    Args:
        path: File of the lock; it stays, with the process that held it last. Its folder is made if need be, and goes
            again if nothing else came into it.
        subject: What an error calls that which is locked.

    Raises:
        BlockingIOError: If another process holds it.
    """
    is_new = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _lock_by_descriptor(path, subject) if fcntl is not None else _lock_by_name(path, subject):
            try:
                yield
            finally:
                # A run that ends by a mistake in its data leaves nothing behind.
                if is_new and os.listdir(path.parent) == [path.name] and fcntl is not None:
                    path.unlink()
                    path.parent.rmdir()
    except _Unsupported as error:
        logger.warning("%s cannot be locked (%s): start one run at a time there.", path.parent, error)
        yield


class _Unsupported(Exception):
    """The file system has no locks."""


@contextmanager
def _lock_by_descriptor(path: Path, subject: str) -> Generator[None]:
    assert fcntl is not None, "Only called where it is."
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            raise BlockingIOError(_describe_refusal(subject, holder)) from error
        except OSError as error:  # network file systems without a lock service
            raise _Unsupported(error.strerror) from error
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        _held.add(descriptor)
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


@contextmanager
def _lock_by_name(path: Path, subject: str) -> Generator[None]:
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise BlockingIOError(_describe_refusal(subject)) from error
    try:
        yield
    finally:
        lock.release()


def _describe_refusal(subject: str, holder: str = "") -> str:
    by = f" ({holder})" if holder else ""
    return f"{subject} is being written by another run{by}. Wait until it ends, or choose another one."


def _close_in_child() -> None:
    """A forked worker of a loader may outlive a killed run by seconds, and would keep its lock as long."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
