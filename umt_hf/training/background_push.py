"""Upload of a run while it goes on: in the background, never in its way.

One thread uploads. What it uploads is a snapshot of hard links, so a checkpoint may be deleted meanwhile; a newer save
takes the place of one that still waits. Whatever the Hub does, the run only logs it.
"""

import logging
import os
import shlex
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import transformers
from huggingface_hub.utils import disable_progress_bars

from ..hub_cards.publishing import EXCLUDED, check_destination, push_folder
from ..runs.folder import CONFIG_FILE, METRICS_FILE
from ..runs.noise import CHATTY
from .arguments import PretrainingArguments

logger = logging.getLogger(__name__)

LAST_CHECKPOINT = "last-checkpoint"
THREAD_NAME = "umt_hf push"
FINAL_WAIT_SECONDS = 1800.0
MAX_ATTEMPTS = 3


@dataclass
class _Push:
    """What is to go up; `snapshot` is deleted afterwards."""

    folder: Path
    checkpoints: dict[str, Path]
    commit_message: str
    snapshot: tempfile.TemporaryDirectory | None = None

    def discard(self) -> None:
        if self.snapshot is not None:
            self.snapshot.cleanup()


@dataclass
class _Outcome:
    """What became of the pushes so far."""

    url: str | None = None
    error: str | None = None
    pushed_checkpoints: set[str] = field(default_factory=set)


class HubPush:
    """Pushes a run's saves, as `hub_strategy` says, and its end.

    Args:
        args: Ours or Transformers' own, with `push_to_hub` and the `hub_...` fields. Used in the main process alone.
        list_checkpoints: Complete checkpoints of the run's folder, oldest first.
    """

    def __init__(
        self,
        args: PretrainingArguments | transformers.TrainingArguments,
        list_checkpoints: Callable[[Path], list[Path]],
    ):
        # pyrefly: ignore[bad-argument-type]  Transformers puts a default in place of None
        self.output_dir = Path(args.output_dir)
        self.repo_id = args.hub_model_id or self.output_dir.absolute().name
        self.strategy = str(getattr(args.hub_strategy, "value", args.hub_strategy))
        self.options = {"private": args.hub_private_repo, "revision": args.hub_revision, "token": args.hub_token}
        self.list_checkpoints = list_checkpoints
        self._outcome = _Outcome()
        self._waiting: _Push | None = None
        self._is_busy = self._is_over = False
        self._changed = threading.Condition()

    def start(self) -> None:
        """Begin to wait for something to push."""
        for left_behind in self.output_dir.glob(".hub-*"):  # by a run that was killed
            shutil.rmtree(left_behind, ignore_errors=True)
        disable_progress_bars()  # they would cut up the run's own
        for name in (*CHATTY, "umt_hf.hub_cards.publishing"):  # a push has one line in the log
            logging.getLogger(name).addFilter(_is_from_elsewhere)
        # Daemon thread: a hanging upload cannot keep the process alive.
        threading.Thread(target=self._work, name=THREAD_NAME, daemon=True).start()

    def push_checkpoint(self, checkpoint: Path) -> None:
        """Queue a complete checkpoint, if the strategy has checkpoints pushed; returns at once and never raises."""
        if self.strategy == "end":
            return
        if not (checkpoint / CONFIG_FILE).is_file():
            logger.info("%s holds adapters only; the merged model is pushed at the end.", checkpoint)
            return
        try:
            self._queue(self._take_snapshot(checkpoint))
        except Exception as error:  # whatever goes wrong here must not stop a training
            self._note_failure(f"{checkpoint} was not pushed: {error}.")

    def finish(self) -> None:
        """Push the finished run's folder and wait for it, but not for ever; never raises."""
        try:
            self._queue(_Push(self.output_dir, self._select_checkpoints(), "End of training"))
            with self._changed:
                is_done = self._changed.wait_for(
                    lambda: self._waiting is None and not self._is_busy, timeout=FINAL_WAIT_SECONDS
                )
                self._is_over = True
                self._changed.notify_all()
            if not is_done:
                self._outcome.error = f"{self.repo_id}: no answer in {FINAL_WAIT_SECONDS:.0f} s."
        except Exception as error:  # the run is over and saved: end it well
            self._outcome.error = str(error)
        if self._outcome.error is None:
            logger.info("The run is on the Hub: %s", self._outcome.url)
        else:
            logger.warning(
                "%s The run itself ended well and is saved in %s. To push it: `%s`, or the same command again with "
                "`--resume_from_checkpoint auto`.",
                self._outcome.error,
                self.output_dir,
                self._build_command(),
            )

    def _build_command(self) -> str:
        """What pushes the finished run by hand."""
        command = ["umt-hf", "push", str(self.output_dir), self.repo_id]
        if self.options["private"]:
            command.append("--private")
        if self.options["revision"] is not None:
            command += ["--revision", self.options["revision"]]
        return shlex.join(command)

    def _select_checkpoints(self) -> dict[str, Path]:
        """Checkpoints that go up with the finished run: name in the repository -> folder."""
        found = self.list_checkpoints(self.output_dir)
        if self.strategy == "checkpoint":
            return {LAST_CHECKPOINT: found[-1]} if found else {}
        if self.strategy == "all_checkpoints":
            return {path.name: path for path in found if path.name not in self._outcome.pushed_checkpoints}
        return {}

    def _take_snapshot(self, checkpoint: Path) -> _Push:
        """Link the files of a checkpoint, which may be deleted while they go up."""
        snapshot = tempfile.TemporaryDirectory(prefix=".hub-", dir=self.output_dir, ignore_cleanup_errors=True)
        root = Path(snapshot.name)
        model, state = root / self.output_dir.absolute().name, root / "checkpoint"
        shutil.copytree(checkpoint, model, copy_function=_link, ignore=shutil.ignore_patterns(*EXCLUDED))
        if (metrics := self.output_dir / METRICS_FILE).is_file():
            shutil.copy(metrics, model)  # this one grows
        checkpoints = {}
        if self.strategy in ("checkpoint", "all_checkpoints"):
            shutil.copytree(checkpoint, state, copy_function=_link)
            checkpoints[LAST_CHECKPOINT if self.strategy == "checkpoint" else checkpoint.name] = state
        return _Push(model, checkpoints, f"Training in progress, {checkpoint.name}", snapshot)

    def _queue(self, push: _Push) -> None:
        with self._changed:
            if self._waiting is not None:
                self._waiting.discard()
            self._waiting = push
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._is_over)
                if self._is_over:
                    return
                push, self._waiting, self._is_busy = self._waiting, None, True
            assert push is not None
            self._upload(push)
            with self._changed:
                self._is_busy = False
                self._changed.notify_all()

    def _upload(self, push: _Push) -> None:
        try:
            self._outcome.url = push_folder(
                push.folder,
                self.repo_id,
                commit_message=push.commit_message,
                checkpoints=push.checkpoints,
                max_attempts=MAX_ATTEMPTS,
                **self.options,
            )
            self._outcome.pushed_checkpoints |= push.checkpoints.keys()
            self._outcome.error = None
            logger.info("%s: %s", push.commit_message, self._outcome.url)
        except Exception as error:  # a training goes on, whatever a push raises
            if push.snapshot is not None:
                self._note_failure(str(error))
            self._outcome.error = str(error)
        finally:
            push.discard()

    def _note_failure(self, message: str) -> None:
        if message != self._outcome.error:  # once, not at every save
            logger.warning("%s The training goes on, and its next save is pushed.", message)
        self._outcome.error = message


def _link(source: str, target: str) -> str:
    """Hard link, or copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def _is_from_elsewhere(record: logging.LogRecord) -> bool:
    """Whether a log line is not of the pushing thread."""
    return record.threadName != THREAD_NAME


def build_hub_push(
    args: PretrainingArguments | transformers.TrainingArguments,
    list_checkpoints: Callable[[Path], list[Path]],
    is_main_process: bool,
) -> HubPush | None:
    """The pusher of a run, in its main process and if it asks for one. Called in all processes, before the first step.

    Raises:
        ValueError: If the repository's name is not one.
        PublishingError: If nobody is logged in.
    """
    if not args.push_to_hub:
        return None
    hub = HubPush(args, list_checkpoints)
    check_destination(hub.repo_id, args.hub_token)
    if not is_main_process:
        return None
    hub.start()
    return hub
