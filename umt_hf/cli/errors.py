"""What a mistake on the command line looks like: one line on standard error, and exit code 2."""

import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from ..runs.scripts import GROUP_TITLES

# Typer brings its own copy of Click from some version on; the classes are those that its errors extend.
UsageError: Any = typer.BadParameter.__base__
ClickException: Any = UsageError.__base__
HELP_ERROR = "NoArgsIsHelpError"


class Mistake(ClickException):
    """An error of the package whose sentence says all that a user needs."""

    exit_code = 2


class OneLineGroup(TyperGroup):
    """The command; its errors are one line, where Typer would draw a box."""

    def main(self, *args: Any, standalone_mode: bool = True, **options: Any) -> Any:
        """Run, and end with an exit code.

        Args:
            *args: Of the base class.
            standalone_mode: Whether errors end the process; else they are raised.
            **options: Of the base class.
        """
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **options)
        words = args[0] if args else options.get("args")
        if (empty := _find_empty(sys.argv[1:] if words is None else list(words))) is not None:
            typer.echo(f"Error: {empty} is empty. (Is a variable of the shell not set?)", err=True)
            sys.exit(Mistake.exit_code)
        try:
            result = super().main(*args, standalone_mode=False, **options)
        except ClickException as error:
            sys.exit(_show(error))
        except typer.Abort:
            typer.echo("Error: the input ended before the command did.", err=True)
            sys.exit(1)
        # The code of `typer.Exit`; the verbs themselves return nothing.
        sys.exit(result if isinstance(result, int) else 0)


def _find_empty(words: Sequence[str]) -> str | None:
    """The flag whose value is an empty word, or what it is of otherwise: an empty path would be the current folder.

    Scripts look at their own flags, some of which may be empty.
    """
    if words and words[0] in GROUP_TITLES:
        return None
    for place, word in enumerate(words):
        if word.startswith("--") and word.endswith("="):
            return word[:-1]
        if not word.strip():
            before = words[place - 1] if place else ""
            return before if before.startswith("-") and before != "-" else "an argument"
    return None


def _show(error: Any) -> int:
    """Write an error; the exit code."""
    if type(error).__name__ == HELP_ERROR:  # asked for nothing: the help is the answer
        # Made with the error; with Rich it was printed then, and there is no text left.
        if error.message:
            typer.echo(error.message)
        return error.exit_code
    message = " ".join(error.format_message().split())
    if isinstance(error, UsageError) and error.ctx is not None:
        end = "" if message.endswith((".", "?")) else "."
        message = f"{message}{end} See `{error.ctx.command_path} --help`."
    typer.echo(f"Error: {message}", err=True)
    return error.exit_code
