"""The verbs that start scripts: `umt-hf pretrain`, `finetune` and `evaluate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..runs.scripts import GROUP_TITLES, SCRIPTS, ScriptEntry
from .completion import ScriptCommand
from .launching import LAUNCH_FILES, LaunchOptions, launch

PRECISIONS = ("no", "bf16", "fp16")
PANEL = "Training and tests"
# The script reads its own flags, `--help` among them.
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def add_scripts(app: typer.Typer) -> None:
    """Add a group of verbs for each group of scripts."""
    for group, title in GROUP_TITLES.items():
        verbs = typer.Typer(no_args_is_help=True)
        for entry in SCRIPTS:
            if entry.group == group:
                options = {"cls": ScriptCommand, "context_settings": CONTEXT}
                verbs.command(entry.verb, help=entry.title, **options)(_build_verb(entry))
        app.add_typer(verbs, name=group, help=title, rich_help_panel=PANEL)


def _check_config(name: str | None) -> str | None:
    """A file, or the name of one that ships."""
    shipped = sorted(file.stem for file in LAUNCH_FILES.glob("*.yaml"))
    if name is not None and not Path(name).is_file() and name not in shipped:
        names = f"{', '.join(shipped[:-1])} and {shipped[-1]}"
        raise typer.BadParameter(f"{name}: no such file; {names} are the names of files that ship.")
    return name


def _build_verb(entry: ScriptEntry) -> Any:
    def run(
        context: typer.Context,
        num_processes: Annotated[int | None, typer.Option("--num_processes", "--num-processes", min=1)] = None,
        num_machines: Annotated[int | None, typer.Option("--num_machines", "--num-machines", min=1)] = None,
        machine_rank: Annotated[int | None, typer.Option("--machine_rank", "--machine-rank", min=0)] = None,
        main_process_ip: Annotated[str | None, typer.Option("--main_process_ip", "--main-process-ip")] = None,
        main_process_port: Annotated[int | None, typer.Option("--main_process_port", "--main-process-port")] = None,
        accelerate_config: Annotated[
            str | None,
            typer.Option("--accelerate_config", "--accelerate-config", callback=_check_config),
        ] = None,
    ) -> None:
        options = LaunchOptions(
            num_processes, num_machines, machine_rank, main_process_ip, main_process_port, accelerate_config
        )
        launch(entry, translate_precision(entry, context.args), options)

    return run


def translate_precision(entry: ScriptEntry, arguments: Sequence[str]) -> list[str]:
    """The flags of a script, with `--mixed_precision` in the words of the `Trainer` where it is one's.

    Raises:
        typer.BadParameter: If the precision is unknown.
    """
    if entry.group != "finetune":
        return list(arguments)
    translated: list[str] = []
    words = iter(arguments)
    for word in words:
        name, _, value = word.partition("=")
        if name.replace("-", "_") != "__mixed_precision":
            translated.append(word)
            continue
        value = value or next(words, "")
        if value not in PRECISIONS:
            raise typer.BadParameter(f"--mixed_precision must be one of {', '.join(PRECISIONS)}, got {value!r}.")
        for kind in ("bf16", "fp16"):
            translated += [f"--{kind}", str(value == kind).lower()]
    return translated
