"""What a user's error, a fault of the machine, Ctrl-C and SIGTERM look like in a script: one line and an exit code."""

import contextlib
import errno
import multiprocessing.util
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from huggingface_hub.errors import StrictDataclassError
from tqdm import tqdm

from .scripts import LAUNCHER_VARIABLE, MACHINE_CODE, MISTAKE_CODE

TRACEBACK_FLAG = "--traceback"
SECONDS_BETWEEN_LOOKS = 1.0
# A process that fails like the main one is stopped by the launcher before it speaks; one that fails alone is heard.
SECONDS_TO_BE_STOPPED = 10.0
SECONDS_OF_ONE_INTERRUPTION = 1.0
WORKER_TRACEBACK = "Original Traceback (most recent call last):"
# Where launchers say it: torchrun and Accelerate, and MPI in its variants; the order is Accelerate's.
RANK_VARIABLES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
# Errors of other libraries that mean: this input does not fit.
MISTAKES = (ValueError, OSError, ImportError, StrictDataclassError)
# Of what the system says, what no change of a command would cure.
MACHINE_REASONS = {
    number: os.strerror(number).lower()
    for number in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG, errno.EIO, errno.ENOMEM)
    + ((errno.ESTALE,) if hasattr(errno, "ESTALE") else ())
}
# Writers of PyTorch and NumPy (through which ONNX writes) do not say why they failed.
FAILED_WRITER = re.compile(
    r"inline_container|PytorchStreamWriter|iostream error|problem writing element|requested and \d+ written"
)
PROBE_BYTES = 1 << 20
LAST = -1  # of what is called at the end of a process: after the end of its children

_at_end: list[multiprocessing.util.Finalize] = []


class Terminated(BaseException):
    """SIGTERM came.

    Args:
        exit_code: What the process is to end with.
    """

    def __init__(self, exit_code: int = 128 + signal.SIGTERM):
        super().__init__(exit_code)
        self.exit_code = exit_code


class UserError(RuntimeError):
    """An error whose sentence says all that a user needs: no traceback is shown."""

    exit_code = MISTAKE_CODE
    leaves_at_once = False  # without waiting for anything, such as a worker that is beyond signals


class MachineError(UserError):
    """A fault of the machine (disk, memory, another process): the command was right, and may be started again."""

    exit_code = MACHINE_CODE


class DivergenceError(UserError):
    """A run's gradients are not finite any more: its command was right, and sweeps can tell it by the exit code."""

    exit_code = 3


def find_machine_reason(error: BaseException) -> str | None:
    """What the system said in an error, if it is a fault of the machine, in lower case."""
    if isinstance(error, OSError) and error.errno in MACHINE_REASONS:
        return MACHINE_REASONS[error.errno]
    # Other languages put the system's words into their own errors.
    text = "" if isinstance(error, UserError) else str(error).lower()
    return next((reason for reason in MACHINE_REASONS.values() if reason in text), None)


@contextlib.contextmanager
def naming_full_disk(path: str | os.PathLike) -> Generator[None]:
    """Say in one sentence that a file or folder could not be written because of the disk.

    Args:
        path: What is being written, by the name that it is to have.

    Raises:
        MachineError: If the disk is full or broken; other errors stay as they are.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = find_machine_reason(error)
        if reason is None and isinstance(error, RuntimeError):
            reason = _probe_disk(Path(path))
        if reason is None and FAILED_WRITER.search(str(error)):
            reason = f"the writer failed ({' '.join(str(error).split())[:200]})"
        if reason is None:
            raise
        raise MachineError(
            f"{path} could not be written: {reason}. Make room on its disk, or choose another one."
        ) from error


def _find_folder(path: Path) -> Path:
    """The nearest folder above a path that is there."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def _probe_disk(path: Path) -> str | None:
    """Why nothing more can be written beside a path; `None` if it can."""
    try:
        with tempfile.TemporaryFile(dir=_find_folder(path)) as file:
            file.write(bytes(PROBE_BYTES))
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None


def end_with_launcher() -> None:
    """End this script at once where the `umt-hf` that started it is gone, as by SIGKILL, which it cannot hand on.

    Else the script would hold the run's folder, and the next start would find it taken. A kill loses nothing that a
    checkpoint has.
    """
    launcher = int(os.environ.get(LAUNCHER_VARIABLE, 0))
    if not launcher:
        return
    if not psutil.pid_exists(launcher):
        os._exit(1)
    if os.getppid() != launcher:  # a script that a script has started
        return

    def wait() -> None:
        while os.getppid() == launcher and psutil.pid_exists(launcher):  # on Windows the number of a parent stays
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def unheard_children() -> Generator[None]:
    """Leave out what PyTorch raises, at any place, when a worker is killed."""
    is_possible = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if is_possible else None
    try:
        yield
    finally:
        if is_possible:
            signal.signal(signal.SIGCHLD, handler)


@contextlib.contextmanager
def end_in_one_line(describe_interruption: Callable[[], str]) -> Generator[None]:
    """Turn what stops a script into one line on standard error, from the main process, and an exit code.

    Args:
        describe_interruption: Says after Ctrl-C or SIGTERM what was saved and how to resume.

    Raises:
        SystemExit: With code 2 after a user's error, 3 after a run that diverged, 4 after a fault of the machine, 130
            after Ctrl-C, 143 after SIGTERM.
    """
    end_with_launcher()
    signal.signal(signal.SIGTERM, _build_handler(os.getpid()))
    _hear_interruptions()
    try:
        yield
    except BaseException as error:
        with unheard_children():  # one that is being killed would interrupt the sentence
            if callable(handler := _hear_interruptions()):
                signal.signal(signal.SIGINT, _HeardOnce(handler))
            _end_for(error, describe_interruption)
        raise


class _HeardOnce:
    """Leaves out the same Ctrl-C that comes by another way: of the launcher, to the group, by an impatient finger.

    Args:
        former: What handles a later one.
    """

    def __init__(self, former: Callable[[int, FrameType | None], Any]):
        self.former = former
        self.began = time.monotonic()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if time.monotonic() - self.began >= SECONDS_OF_ONE_INTERRUPTION:
            signal.signal(number, self.former)
            self.former(number, frame)


def _hear_interruptions() -> Any:
    """Let the next Ctrl-C be heard again, in a process that goes on after a script; gives what handles it."""
    handler = signal.getsignal(signal.SIGINT)
    if isinstance(handler, _HeardOnce):
        handler = handler.former
        signal.signal(signal.SIGINT, handler)
    return handler


def _end_for(error: BaseException, describe_interruption: Callable[[], str]) -> None:
    """End the script if an error is of those that one line tells."""
    if isinstance(error, KeyboardInterrupt):
        _end(f"Interrupted. {describe_interruption()}", 128 + signal.SIGINT)
    if isinstance(error, Terminated):
        if read_rank() > 0:  # most often because the main process has failed, and has said so
            os._exit(error.exit_code)
        _end(f"Terminated. {describe_interruption()}", error.exit_code)
    if not isinstance(error, Exception):
        return
    if not isinstance(error, (*MISTAKES, UserError)):
        # PyTorch speaks of a dead worker at any place: also while an error that says more is on its way out.
        former = _find_user_error(error)
        if former is None and find_machine_reason(error) is None:
            return
        error = former or error
    message, code = f"Error: {summarize(error)}", choose_exit_code(error)
    if code == MACHINE_CODE:  # the command is to be started again: say from where
        message = f"{message.rstrip('.')}. {describe_interruption()}"
    _end(message, code, getattr(error, "leaves_at_once", False))


def choose_exit_code(error: BaseException) -> int:
    """Exit code that an error asks for."""
    machine = MACHINE_CODE if find_machine_reason(error) is not None else MISTAKE_CODE
    return getattr(error, "exit_code", machine)


def _find_user_error(error: BaseException) -> UserError | None:
    """The error that was being handled when others came."""
    former = error.__context__
    while former is not None and not isinstance(former, UserError):
        former = former.__context__
    return former


def summarize(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, StrictDataclassError):
        # The reason is in the last line, behind the class of the error that it was.
        return str(error).strip().split("\n")[-1].strip().removeprefix("ValueError: ").removeprefix("TypeError: ")
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}."
    text = str(error)
    if WORKER_TRACEBACK in text:  # of a loader's worker: the sentence is behind the traceback
        text = text.rsplit(f"{type(error).__name__}: ", 1)[-1]
    return " ".join(text.split()) or type(error).__name__


def describe_checkpoints(output_dir: str | None) -> str:
    """Which checkpoint of a run is the newest, and how to go on from it."""
    found = Path(output_dir).glob("checkpoint-*") if output_dir else ()
    steps = [int(path.name.removeprefix("checkpoint-")) for path in found if path.name[11:].isdigit()]
    if not steps:
        return "No checkpoint was saved."
    newest = Path(str(output_dir), f"checkpoint-{max(steps)}")
    return f"The newest checkpoint is {newest}; the same command with --resume_from_checkpoint auto goes on from it."


def _build_handler(main_process: int) -> Callable[[int, FrameType | None], Any]:
    def handle(number: int, _: FrameType | None) -> None:
        if os.getpid() == main_process:
            signal.signal(number, signal.SIG_IGN)  # a second one would end the first one's message
            raise Terminated
        # A forked loader worker inherits the handler, and is to end as without it.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    return handle


def read_rank() -> int:
    """Number of this process among all of the run, before anything of PyTorch is set up."""
    return next((int(os.environ[name]) for name in RANK_VARIABLES if name in os.environ), 0)


def call_at_end(function: Callable[[], object]) -> None:
    """Call a function once when this process ends: also as a child of `multiprocessing`, or by `_exit` with a line."""
    _at_end.append(multiprocessing.util.Finalize(None, function, exitpriority=LAST))


def _end(message: str, code: int, leaves_at_once: bool = False) -> None:
    rank = read_rank()
    if rank > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if not leaves_at_once:  # what this process alone can know
            time.sleep(SECONDS_TO_BE_STOPPED)
        message = f"Process {rank}: {message}"
    with contextlib.suppress(BrokenPipeError):
        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()  # at the end of the process it would be drawn once more, below the message
        tqdm.write(message, file=sys.stderr)
        sys.stderr.flush()
    if leaves_at_once or (torch.distributed.is_available() and torch.distributed.is_initialized()):
        # The other processes may wait in a collective; to leave the group in order would wait for them.
        for finalizer in _at_end:
            finalizer()
        sys.stdout.flush()
        os._exit(code)
    raise SystemExit(code)
