"""What one process per machine finds in the folders of a run, for the others of the same start.

A folder may have new files at the next start, so that nothing found is kept beyond the run: it is in a folder for
temporary files that goes with the process that made it.
"""

import contextlib
import functools
import hashlib
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import distributed

from ...runs.disk import hold_lock
from ...runs.folder import UNFINISHED_SUFFIX
from ...runs.mistakes import call_at_end

logger = logging.getLogger(__name__)

LOCK_FILE = "finding.lock"


@dataclass
class _Findings:
    """Where processes of a machine leave what they find.

    Args:
        folder: Of this start.
        is_owner: Whether this process finds, and the others wait.
    """

    folder: Path
    is_owner: bool

    def wait(self) -> None:
        """Wait until the owner has read all of its data, or is gone."""
        with hold_lock(self.folder / LOCK_FILE, str(self.folder), wait=True):
            pass


_current: _Findings | None = None


@contextmanager
def shared_folders() -> Generator[None]:
    """Let one process per machine look through folders, and the others take what it has found.

    All processes of the run enter together, when they have found each other, and read the same data within. Nothing
    within may wait for all of them.
    """
    global _current
    with contextlib.ExitStack() as held:
        _current = _agree(held)
        try:
            yield
        finally:
            _current = None


def find_once(key: str, write: Callable[[Path], object]) -> Path | None:
    """The file of a finding: written by the first process of a machine, read by the others.

    Args:
        key: What is looked for, and where.
        write: Finds it, and writes it to a path.

    Returns:
        `None` where nothing is shared, or the first process has found nothing: each one has to look by itself.
    """
    if (current := _current) is None:
        return None
    path = current.folder / hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=16).hexdigest()
    if current.is_owner and not path.exists():
        unfinished = path.with_suffix(UNFINISHED_SUFFIX)
        try:
            write(unfinished)
            os.replace(unfinished, path)
        except OSError as error:  # no room there; what is wrong with the folder itself is raised when it is read anew
            logger.warning("Nothing is shared in %s (%s): every process looks by itself.", current.folder, error)
            unfinished.unlink(missing_ok=True)
    elif not current.is_owner and not path.exists():
        current.wait()
    return path if path.exists() else None


def _agree(held: contextlib.ExitStack) -> _Findings | None:
    """The folder of this machine; its owner holds the lock until `held` is closed."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() < 2:
        return None
    own, host, lock = "", socket.gethostname(), contextlib.ExitStack()
    try:
        own = tempfile.mkdtemp(prefix="umt_hf_folders_")
        lock.enter_context(hold_lock(Path(own) / LOCK_FILE, own))
    except OSError as error:
        logger.warning("Nothing is shared with other processes, as there is no place for temporary files (%s).", error)
    proposals: list[tuple[str, str]] = [("", "")] * distributed.get_world_size()
    # pyrefly: ignore[bad-argument-type]  annotated as a list of anything
    distributed.all_gather_object(proposals, (host, own))
    # Machines may have one name, and processes of one machine different folders for temporary files.
    chosen = next((folder for name, folder in proposals if name == host and os.path.isdir(folder)), own)
    if chosen == own and own:
        held.push(lock.pop_all())
        # Not earlier: a process that starts workers anew opens the table again.
        call_at_end(functools.partial(shutil.rmtree, own, ignore_errors=True))
        return _Findings(Path(own), is_owner=True)
    lock.close()
    if own:
        shutil.rmtree(own, ignore_errors=True)
    return _Findings(Path(chosen), is_owner=False) if chosen else None
