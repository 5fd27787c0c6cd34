"""Flags that take several words, as those of the scripts do."""

from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand

LISTS = ("--labels", "--template")  # take all words up to the next flag


class ListCommand(TyperCommand):
    """A verb with flags that take several words: `--labels dog cat` is `--labels dog --labels cat`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Write such a flag before each of its words."""
        return super().parse_args(ctx, repeat_flags(args))


def repeat_flags(words: Sequence[str]) -> list[str]:
    """Words of a command line in which each value of a flag of `LISTS` has the flag before it."""
    found: list[str] = []
    flag = None
    is_first = False
    for place, word in enumerate(words):
        if word == "--":
            return [*found, *words[place:]]
        if word.startswith("-") and word != "-" and not is_first:
            flag = word if word in LISTS else None
            is_first = flag is not None
            found += [word]
            continue
        if flag is not None and not is_first:
            found.append(flag)
        is_first = False
        found.append(word)
    return found
