"""Results of many videos on standard output, each as it comes, and what an interrupted command says."""

import json
import os
import sys
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer


def announce(line: str) -> None:
    """Say what was found, on standard error."""
    typer.echo(line, err=True)


def announce_once(line: str) -> None:
    """The same, said by the main process alone."""
    from accelerate import PartialState

    if PartialState().is_main_process:
        announce(line)


@contextmanager
def report_interruption(describe: Callable[[], str]) -> Generator[None]:
    """Say after Ctrl-C what is done and how to go on, from the main process, and end with code 130."""
    try:
        yield
    except KeyboardInterrupt:
        from accelerate import PartialState
        from tqdm import tqdm

        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()  # at the end of the process it would be drawn once more, below the message
        if PartialState().is_main_process:
            typer.echo(f"Interrupted. {describe()}", err=True)
        raise typer.Exit(130) from None


@contextmanager
def until_nobody_reads() -> Generator[None]:
    """End quietly where whoever read standard output has gone, such as `head`."""
    try:
        yield
    except BrokenPipeError:
        # What is buffered goes nowhere; Python would name the closed pipe once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit from None


def describe_folder(folder: Path | str) -> str:
    """What an interrupted command has left that goes on by itself."""
    return f"What is in {folder} is complete; the same command goes on from there."


class ResultPrinter:
    """Prints the results of `umt-hf classify`; of several processes the main one does.

    Args:
        as_json: Whether all of them are one JSON document.
        out: File that gets the results instead, if any.
    """

    def __init__(self, as_json: bool, out: str | None):
        self.as_json, self.out = as_json, out
        self.num_labelled, self.done, self.total = 0, 0, 0
        self.skipped: list[Any] = []

    def count(self, done: int, total: int) -> None:
        """Note how far the command is."""
        self.done, self.total = done, total

    def print_labels(self, found: Generator[Any]) -> None:
        """Print each result as it comes, and keep those skipped."""
        from accelerate import PartialState
        from tqdm import tqdm

        with closing(found):  # its bar, before a message after Ctrl-C
            for video in found:
                self.done += 1
                if hasattr(video, "reason"):
                    self.skipped.append(video)
                    continue
                if PartialState().is_main_process:
                    # The bar would stand in the middle of a line.
                    with tqdm.external_write_mode(file=sys.stdout), until_nobody_reads():
                        self._print(video)
                self.num_labelled += 1

    def print_end(self, report: Any) -> None:
        """Print how many there were, and those skipped, which a report has."""
        from accelerate import PartialState

        if not PartialState().is_main_process:
            return
        if self.as_json:
            start = "" if self.num_labelled else '{"videos": ['
            typer.echo(f'{start}], "skipped": {json.dumps([asdict(video) for video in report.skipped])}}}')
        else:
            typer.echo(report.format_end(self.num_labelled))

    def _print(self, video: Any) -> None:
        if self.as_json:
            start = ", " if self.num_labelled else '{"videos": ['
            typer.echo(start + json.dumps(asdict(video)), nl=False)
        else:
            typer.echo(video.format())

    def describe(self) -> str:
        """What is done, and how to go on."""
        if self.out is None:
            return f"{self.done} videos were done; with --out FILE the same command would go on from there next time."
        of = f"{self.done} of {self.total}" if self.total else "No"
        return f"{of} videos are done; the same command goes on with {self.out}."
