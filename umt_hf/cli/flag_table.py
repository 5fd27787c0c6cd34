"""Writes the table of the scripts' flags that shells complete from: `python -m umt_hf.cli.flag_table`."""

import argparse
import importlib
import json
from typing import Any

from ..runs.config import ConfigParser, list_recipes
from ..runs.scripts import GROUP_TITLES, SCRIPTS, ScriptEntry
from .completion import ALWAYS, TABLE
from .scripts import PRECISIONS

Flags = dict[str, list[str]]
SWITCH = ["true", "false"]


def build_flag_table() -> dict[str, dict[str, Flags]]:
    """Group -> verb -> flag -> choices, with what all verbs of a group share under "all"."""
    table: dict[str, dict[str, Flags]] = {}
    for group in GROUP_TITLES:
        own = {entry.verb: list_flags(entry) for entry in SCRIPTS if entry.group == group}
        first, *others = own.values()
        shared = {flag: choices for flag, choices in first.items() if all(o.get(flag) == choices for o in others)}
        table[group] = {"all": shared}
        for verb, flags in own.items():
            table[group][verb] = {flag: choices for flag, choices in flags.items() if flag not in shared}
    return table


def list_flags(entry: ScriptEntry) -> Flags:
    """Flags of a script in the order of its help; those of `--config` are the recipes that it takes."""
    parser = ConfigParser(importlib.import_module(entry.module).SECTIONS, entry)
    flags = {action.option_strings[0]: list_choices(action) for action in parser._actions if action.option_strings}
    flags["--config"] = [name for name in list_recipes() if entry.recipes and name.startswith(entry.recipes)]
    if entry.group == "finetune":
        flags["--mixed_precision"] = list(PRECISIONS)  # the verb translates it
    return {flag: choices for flag, choices in flags.items() if flag.startswith("--") and flag not in ALWAYS}


def list_choices(action: argparse.Action) -> list[str]:
    """Words that a flag takes, where they can be listed."""
    if action.choices is not None:
        return [str(getattr(choice, "value", choice)) for choice in action.choices if choice is not None]
    is_switch: Any = action.nargs == "?" and action.const is True
    return SWITCH if is_switch else []


def main() -> None:
    """Write the table."""
    lines = []
    for group, verbs in build_flag_table().items():
        rows = []
        for verb, flags in verbs.items():
            own = ",\n".join(f"   {json.dumps(flag)}: {json.dumps(choices)}" for flag, choices in flags.items())
            rows.append(f"  {json.dumps(verb)}: {{\n{own}\n  }}")
        lines.append(f" {json.dumps(group)}: {{\n" + ",\n".join(rows) + "\n }")
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
