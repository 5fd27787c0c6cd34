"""Files and folders that are complete or absent under their names, also after a kill or a power cut.

What is written goes to another name, is flushed to the disk and renamed; what is deleted is renamed first. On Windows
a rename fails with `PermissionError` while another program holds one of the files open.

A folder that one run at a time writes has a lock, which goes with the process, however that ends.
"""

import logging
import os
import shutil
import socket
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .folder import (
    CONFIG_FILE,
    DELETED_SUFFIX,
    FINAL_FOLDER,
    REPLACED_SUFFIX,
    UNFINISHED_SUFFIX,
    WEIGHTS_INDEX_FILE,
)
from .mistakes import naming_full_disk

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
_MASK = os.umask(0)  # can only be read by being set
os.umask(_MASK)


def name_unfinished(path: Path) -> Path:
    """Where something is written before it is renamed to `path`."""
    return path.with_name(path.name + UNFINISHED_SUFFIX)


def flush(path: Path) -> None:
    """Wait until a file, or a folder with everything in it, is on the disk, where the system can say so."""
    if path.is_dir():
        for child in path.iterdir():
            if not child.is_symlink():
                flush(child)
        _flush_entries(path)
        return
    # Windows flushes only what is open for writing.
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _flush_entries(folder: Path) -> None:
    """Wait until the names in a folder are on the disk; only POSIX systems open folders."""
    flag = getattr(os, "O_DIRECTORY", None)
    if flag is None:
        return
    descriptor = os.open(folder, os.O_RDONLY | flag)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot
        logger.debug("%s was not flushed: %s", folder, error)
    finally:
        os.close(descriptor)


def put_file(unfinished: Path, final: Path) -> None:
    """Rename a complete file into place, over an earlier one."""
    flush(unfinished)
    os.replace(unfinished, final)
    _flush_entries(final.parent)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file as UTF-8 with line feeds; a kill leaves the earlier file or the new one."""
    path = Path(path)
    unfinished = name_unfinished(path)
    with naming_full_disk(path):
        unfinished.write_text(text, encoding="utf-8", newline="\n")
        put_file(unfinished, path)


def append_new_lines(path: Path, lines: Sequence[str]) -> set[str]:
    """Append those lines to a text file that it does not have; several processes may do so at a time.

    Args:
        path: Created if need be.
        lines: Without line ends.

    Returns:
        The lines that it had before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming_full_disk(path), path.open("a+b") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
            except OSError as error:  # network file systems without a lock service: at worst a line comes twice
                logger.debug("%s cannot be locked: %s", path, error)
        file.seek(0)
        content = file.read().decode("utf-8", errors="replace")
        there = set(content.splitlines())
        if new := [line for line in lines if line not in there]:
            begin = "\n" if content and not content.endswith("\n") else ""  # a kill has cut the last line off
            file.write((begin + "".join(f"{line}\n" for line in new)).encode())
    return there


def put_folder(unfinished: Path, final: Path) -> None:
    """Rename a complete folder into place; `clear_leftovers` brings an earlier one back if a kill comes in between."""
    _share(unfinished)
    flush(unfinished)
    replaced = final.with_name(final.name + REPLACED_SUFFIX)
    if final.exists():
        remove_folder(replaced)
        os.replace(final, replaced)
    os.replace(unfinished, final)
    _flush_entries(final.parent)
    remove_folder(replaced)


def require_replaceable(folder: Path, overwrite: bool, marker: str, sources: Iterable[str | os.PathLike] = ()) -> None:
    """Refuse to write a folder over something that would be lost.

    Args:
        folder: To be written.
        overwrite: Whether one that was written before is replaced.
        marker: File that each such folder has.
        sources: What it is made from.

    Raises:
        FileExistsError: If it exists and is not to be replaced, holds something else, or what it is made from.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    for source in map(Path, sources):
        if source.exists() and folder.resolve() in (source.resolve(), *source.resolve().parents):
            raise FileExistsError(f"{folder} would be written over what it is made from: choose another folder.")
    if not overwrite or not folder.is_dir():
        raise FileExistsError(f"{folder} exists: choose another folder, or add --overwrite.")
    if not (folder / marker).is_file():
        raise FileExistsError(f"{folder} holds something else, since it has no {marker}: choose another folder.")


def remove_folder(folder: Path) -> None:
    """Delete a folder, if there is one: its name goes first, so that a kill leaves no part of it under that name."""
    deleted = folder.with_name(folder.name + DELETED_SUFFIX)
    if deleted.exists():
        shutil.rmtree(deleted)
    if folder.exists():
        os.replace(folder, deleted)
        shutil.rmtree(deleted)


def clear_leftovers(parent: Path, patterns: Sequence[str]) -> None:
    """Delete what a killed program has left of folders, and bring back one that was about to be replaced.

    Args:
        parent: Where the folders are.
        patterns: Their names, with `*` for any text.
    """
    for pattern in patterns:
        for path in parent.glob(pattern + REPLACED_SUFFIX):
            final = path.with_name(path.name.removesuffix(REPLACED_SUFFIX))
            if final.exists():
                remove_folder(path)
            else:
                logger.warning("Bringing back %s, which a killed run was about to replace.", final)
                os.replace(path, final)
        for suffix in (UNFINISHED_SUFFIX, DELETED_SUFFIX):
            for path in parent.glob(pattern + suffix):
                logger.warning("Removing %s, which a killed run has left.", path)
                shutil.rmtree(path)


@contextmanager
def fill_folder(folder: Path) -> Generator[Path, None, None]:
    """Write the files of a model that come to stand in a folder beside other things.

    They go to a folder in it first and are moved when all are there, `config.json` last: until then `from_pretrained`
    finds no new model in it. Files of weights that the new model does not have are deleted.

    Args:
        folder: Created if need be.
    """
    unfinished = name_unfinished(folder / FINAL_FOLDER)
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    yield unfinished
    _share(unfinished)
    flush(unfinished)
    new = {path.name for path in unfinished.iterdir()}
    stem = WEIGHTS_INDEX_FILE.split(".")[0]
    if any(name.startswith(stem) for name in new):
        # Without its configuration a half exchanged model cannot be loaded.
        (folder / CONFIG_FILE).unlink(missing_ok=True)
        for path in folder.glob(f"{stem}*.safetensors*"):
            if path.name not in new:
                path.unlink()
    for name in sorted(new, key=lambda name: (name == CONFIG_FILE, name)):
        target = folder / name
        if (unfinished / name).is_dir():
            put_folder(unfinished / name, target)
        else:
            os.replace(unfinished / name, target)
    _flush_entries(folder)
    unfinished.rmdir()


def _share(folder: Path) -> None:
    """Let others read what a library wrote for its owner alone, as far as the process's mask allows."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(path.stat().st_mode | (0o666 & ~_MASK))


_held: set[int] = set()


@contextmanager
def hold_lock(path: Path, subject: str, wait: bool = False) -> Generator[None]:
    """Hold a lock until the block ends, or the process, also by SIGKILL.

    Args:
        path: File of the lock; it stays, with the process that held it last. Its folder is made if need be, and goes
            again if nothing else came into it.
        subject: What an error calls that which is locked.
        wait: Whether to wait while another process holds it.

    Raises:
        BlockingIOError: If another process holds it and is not waited for.
    """
    is_new = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with (_lock_by_descriptor if fcntl is not None else _lock_by_name)(path, subject, wait):
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
def _lock_by_descriptor(path: Path, subject: str, wait: bool) -> Generator[None]:
    assert fcntl is not None, "Only called where it is."
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
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
def _lock_by_name(path: Path, subject: str, wait: bool) -> Generator[None]:
    lock = FileLock(path, timeout=-1 if wait else 0)
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
