"""Completion of the scripts' flags, recipes and choices, out of a table, so that no shell waits for PyTorch.

The table is `flags.json`; `python -m umt_hf.cli.flag_table` writes it anew.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

TABLE = Path(__file__).with_name("flags.json")
ALWAYS = ("--help",)


@dataclass(frozen=True)
class Completion:
    """A word that a shell may complete to, with the attributes that Typer reads.

    Attributes:
        value: The word.
        type: "plain"; others are Typer's own.
        help: What shells show beside it.
    """

    value: str
    type: str = "plain"
    help: str | None = None


class ScriptCommand(TyperCommand):
    """A verb that hands its words on to a script, and completes them."""

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """What a word may become: a flag, or a value of the flag before it."""
        flags = read_flags(ctx.parent.info_name, ctx.info_name)
        if incomplete.startswith("-"):
            own = [Completion(flag) for flag in (*flags, *ALWAYS) if flag.startswith(incomplete)]
            return [*super().shell_complete(ctx, incomplete), *own]
        # Words that the verb does not know are kept in their order; values of a list may follow each other.
        last = next((word for word in reversed(ctx.args) if word.startswith("--")), "")
        choices = flags.get("--" + last[2:].replace("-", "_")) or []
        return [Completion(choice) for choice in choices if choice.startswith(incomplete)]


def read_flags(group: str, verb: str) -> dict[str, list[str]]:
    """Flags of a script, each with its choices; without any, an empty list.

    Args:
        group: First word of its verb.
        verb: Second word.
    """
    table = json.loads(TABLE.read_text(encoding="utf-8"))[group]
    return {**table["all"], **table[verb]}
