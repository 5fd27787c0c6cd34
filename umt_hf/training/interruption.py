"""Runs that are to end before their time: at a scheduler's signal, or because another process does not answer."""

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from torch import distributed as dist

from ..data.in_flight import StuckReadingError, explain
from ..runs.mistakes import MachineError, Terminated, UserError

# What gloo, NCCL and the store say of processes that do not answer, or are gone.
SILENCE = re.compile(r"timed? ?out|connection (closed|reset|refused)|broken pipe|remote process", re.IGNORECASE)

# Between a signal to all processes of a job and the same one handed on by a launcher.
SECONDS_OF_ONE_SIGNAL = 5.0


class Preemption:
    """SIGTERM, and another signal if one is named, ask a run to save at its next step and to end.

    A later one ends it at once. Those that come within seconds of the first are the same one, since schedulers send it
    to all processes and launchers hand it on. In other threads than the main one, signals stay as they are.

    Args:
        accelerator: Of the run; a signal to one process counts for all.
        other_signal: Name of a signal that counts too, such as `SIGUSR1`; `None` = SIGTERM alone.
        exit_code: What the process ends with.
        timeout_seconds: For which processes wait for each other.
    """

    def __init__(self, accelerator: Accelerator, other_signal: str | None, exit_code: int, timeout_seconds: int):
        self.accelerator, self.exit_code = accelerator, exit_code
        self.timeout = timedelta(seconds=timeout_seconds)
        names = ["SIGTERM", *([other_signal] if other_signal else [])]
        self.numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        self.former: dict[int, Any] = {}
        self.has_come = False
        self.came_at = 0.0
        self.process = os.getpid()
        # Hosts talk to each other about it, not their devices, which nothing is to wait for.
        self.group: Any = None
        self.vote = torch.zeros(1, dtype=torch.int32)
        self.counting: Any = None

    def __enter__(self) -> "Preemption":
        if self.accelerator.num_processes > 1:
            self.group = dist.new_group(backend="gloo", timeout=self.timeout)
        if threading.current_thread() is threading.main_thread():
            self.former = {number: signal.signal(number, self._note) for number in self.numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not isinstance(error, Terminated):  # else the process is about to end, and may get the signal once more
            for number, handler in self.former.items():
                signal.signal(number, handler)
        if self.counting is not None and kind is None:
            self.counting.wait()

    def _note(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self.process:  # a forked worker of a loader ends as without the handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if not self.has_come:
            self.has_come, self.came_at = True, time.monotonic()
        elif time.monotonic() - self.came_at > SECONDS_OF_ONE_SIGNAL:
            signal.signal(number, self.former[number])
            os.kill(self.process, number)

    def is_asked(self) -> bool:
        """Whether the signal has come to any process; all of them call it after each step.

        With several processes the answer is that of the step before, so that no step waits for their votes.
        """
        if self.accelerator.num_processes == 1:
            return self.has_come
        is_asked = False
        if self.counting is not None:
            self.counting.wait()
            is_asked = bool(self.vote.numpy()[0])
        if not is_asked:
            self.vote.numpy()[0] = self.has_come
            self.counting = dist.all_reduce(self.vote, group=self.group, async_op=True)
        return is_asked

    def end(self) -> None:
        """End the run.

        Raises:
            Terminated: Always; a script says in one line what was saved.
        """
        raise Terminated(self.exit_code)


@contextmanager
def named_silence(accelerator: Accelerator, place: Any, flag: str = "--ddp_timeout_seconds") -> Iterator[None]:
    """Say in one sentence that another process, or a loader's worker, does not answer.

    Args:
        accelerator: Of the run.
        place: Counters of the run; its `step` is named.
        flag: What sets how long processes wait for each other.

    Raises:
        MachineError: If a process waited for the others in vain.
        StuckReadingError: If workers gave nothing in time, or one has died.
    """
    try:
        yield
    except StuckReadingError as error:
        raise StuckReadingError(f"Step {place.step + 1}: {error}") from error
    except RuntimeError as error:
        if (explained := explain(error)) is not None:  # that a worker has died may be said at any place
            raise StuckReadingError(f"Step {place.step + 1}: {explained}") from error
        if accelerator.num_processes == 1 or isinstance(error, UserError) or not SILENCE.search(str(error)):
            raise
        raise MachineError(
            f"Process {accelerator.process_index} waited in vain for another one at step {place.step + 1}: it is gone "
            f"or slower than {flag}; resume with --resume_from_checkpoint auto ({error})."
        ) from error
