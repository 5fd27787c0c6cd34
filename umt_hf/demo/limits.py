"""How long one request of a visitor may work."""

import contextvars
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")
# Requests that work side by side, those included that were given up and have not come to a next layer yet.
MAX_RUNNING = 8


class RequestTimeoutError(Exception):
    """A request took longer than it may; the message is for the visitor."""


class TimeLimit:
    """Runs the work of requests and gives up on what takes too long.

    The visitor has the answer or a sentence within the time. Work that was given up ends at the next layer of a model
    that `watch` has seen, so that it does not slow down the requests after it.

    Args:
        seconds: For one request's work; the time that it waits in the queue does not count.
        max_running: Requests that may work at a time, abandoned ones included.
    """

    def __init__(self, seconds: float, max_running: int = MAX_RUNNING):
        self.seconds = seconds
        self._slots = threading.BoundedSemaphore(max_running)
        self._work = threading.local()
        self._watched: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def watch(self, model: nn.Module) -> None:
        """Let each layer of a model end the work that is out of time; other users of the model notice nothing."""
        for module in set(model.modules()) - set(self._watched):
            self._watched.add(module)
            module.register_forward_pre_hook(self._check)

    def run(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises.

        Raises:
            RequestTimeoutError: If it takes longer, or if earlier requests leave it no place.
        """
        deadline = time.monotonic() + self.seconds
        if not self._slots.acquire(timeout=self.seconds):
            raise RequestTimeoutError("The server is still busy with earlier requests. Try again in a while.")
        done: Future[T] = Future()

        def work_until_deadline() -> None:
            self._work.deadline = deadline
            try:
                result = work()
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(result)
            finally:
                self._slots.release()

        # A daemon: what hangs cannot keep the server from ending.
        # It knows whose request it is, as what it calls may ask Gradio.
        target = partial(contextvars.copy_context().run, work_until_deadline)
        threading.Thread(target=target, name="umt_hf_request", daemon=True).start()
        wait([done], max(deadline - time.monotonic(), 0))
        if not done.done():
            raise RequestTimeoutError(self._describe())
        return done.result()

    def _check(self, _module: nn.Module, _inputs: Any) -> None:
        if time.monotonic() > getattr(self._work, "deadline", float("inf")):
            raise RequestTimeoutError(self._describe())

    def _describe(self) -> str:
        return f"This took longer than {self.seconds:g} seconds and was stopped. Try a shorter clip, or try again."
