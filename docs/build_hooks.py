"""Hooks of MkDocs: tables of recipes and of flags, written from recipes and dataclasses whenever the site is built."""

import argparse
import importlib
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).parents[1] / "umt_hf" / "recipes"
MARK = "<!-- recipes -->"
# A name that is longer than this may be broken in a table.
LONG_NAME = re.compile(r"[^\s,]{25,}")
BREAKS = re.compile(r"(?<=[\w\]])(?:/|::|\.|_|=)(?=[\w{\[-])|[a-z](?=[A-Z])")
# Browsers would end a line behind these hyphens.
NAME_START = re.compile(r"(?<![\w-])(--\w|umt-h)")
WORD_BREAK = r"\g<0><wbr>"
FLAGS_MARK = re.compile(r"<!-- flags ([\w.]+) -->")
# Starts of names, in the order of the page; others follow under their own names.
HEADINGS = {
    "stage1": "Stage 1",
    "classification": "Classification",
    "detection": "Action detection",
    "stage2": "Stage 2",
    "zero_shot": "Retrieval after stage 2, without fine-tuning",
    "retrieval": "Retrieval, fine-tuned",
    "multiple_choice": "Multiple choice",
    "question_answering": "Question answering",
}


@dataclass(frozen=True)
class Recipe:
    """What a recipe file says about itself in the comments it opens with.

    Attributes:
        name: Name for `--config`, without a variant.
        title: First comment: what it is.
        notes: The other comments but the command: source, hardware, what was corrected.
        command: Command line that runs it.
        variants: Variant -> the figure it aims for, or an empty text.
    """

    name: str
    title: str
    notes: list[str]
    command: str
    variants: dict[str, str]


def read_recipe(path: Path) -> Recipe:
    """Read the opening comments and the variants of a recipe.

    Args:
        path: YAML file.

    Returns:
        Its description.

    Raises:
        ValueError: If the comments lack a title, a source or a command.
    """
    text = path.read_text(encoding="utf-8")
    lines = [line.removeprefix("#").strip() for line in re.match(r"(#.*\n)*", text)[0].splitlines()]
    start = next((i for i, line in enumerate(lines) if line.startswith("Command: ")), len(lines))
    command = " ".join(line.removesuffix("\\").strip() for line in lines[start:]).removeprefix("Command: ")
    notes = lines[1:start]
    if not command or not any(note.startswith("Source: ") for note in notes):
        raise ValueError(f"{path}: a recipe opens with a title, a line `# Source: ...` and a line `# Command: ...`.")
    figures: dict[str, str] = {}
    _, _, block = text.partition("\nvariants:\n")
    for variant, body in re.findall(r"^  (\w+):\n((?:    .*\n)*)", block, re.MULTILINE):
        aim = re.search(r"# Aims for (?:an? )?(.*)\.\n", body)
        figures[variant] = aim[1] if aim else ""
    return Recipe(path.stem, lines[0], notes, command, figures)


def list_recipe_files() -> dict[str, list[Path]]:
    """Heading -> recipe files under it, without those that others only inherit."""
    found: dict[str, list[Path]] = {heading: [] for heading in HEADINGS.values()}
    for path in sorted(RECIPES.glob("*.yaml")):
        if not path.stem.endswith("_base"):
            kind = next((kind for kind in HEADINGS if path.stem.startswith(f"{kind}_")), path.stem)
            found.setdefault(HEADINGS.get(kind, kind), []).append(path)
    return {heading: paths for heading, paths in found.items() if paths}


def format_recipe(recipe: Recipe) -> str:
    """A section of the page: title, command, a row for each variant, notes."""
    parts = [f"### {recipe.name}", recipe.title, "```bash\n" + break_command(recipe.command) + "\n```"]
    if recipe.variants:
        rows = [f"| `{recipe.name}:{name}` | {figure or 'none'} |" for name, figure in recipe.variants.items()]
        parts.append("\n".join(["| `--config` | published figure |", "| --- | --- |", *rows]))
    parts.append(" ".join(recipe.notes))
    return "\n\n".join(parts)


def break_command(command: str) -> str:
    """A command in lines of at most 80 characters; a flag keeps its values, unless they alone fill a line."""
    lines = [""]
    for part in re.split(r" (?=--)", command):
        joined = f"{lines[-1]} {part}".strip() if len(lines) == 1 else f"{lines[-1]} {part}"
        if len(joined) <= 78:
            lines[-1] = joined
        else:
            wrapped = textwrap.wrap(part, 74, break_long_words=False, break_on_hyphens=False)
            lines += [f"    {line}" for line in wrapped]
    return " \\\n".join(lines)


def write_recipes(markdown: str) -> str:
    """Put the recipes in the place of `<!-- recipes -->`."""
    if MARK not in markdown:
        return markdown
    parts = []
    for heading, paths in list_recipe_files().items():
        parts += [f"## {heading}", *(format_recipe(read_recipe(path)) for path in paths)]
    return markdown.replace(MARK, "\n\n".join(parts))


def write_flags(markdown: str) -> str:
    """Put a script's flags in the place of `<!-- flags umt_hf.training.stage1 -->`, section by section."""
    found = FLAGS_MARK.search(markdown)
    if found is None:
        return markdown
    # Only these pages need the package, and PyTorch with it.
    from umt_hf.runs.config import ConfigParser
    from umt_hf.runs.scripts import SCRIPTS_BY_MODULE

    entry = SCRIPTS_BY_MODULE[found[1]]
    parser = ConfigParser(importlib.import_module(entry.module).SECTIONS, entry)
    parts = [entry.title, f"{parser.epilog}"]
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.help and action.dest != "help"]
        if actions:
            title = "All scripts" if group.title == "options" else f"Section `{group.title}`"
            rows = [f"| {' | '.join(map(escape, describe_flag(parser, action)))} |" for action in actions]
            parts += [f"## {title}", "\n".join(["| flag | default | meaning |", "| --- | --- | --- |", *rows])]
    return markdown.replace(found[0], "\n\n".join(parts))


def describe_flag(parser: argparse.ArgumentParser, action: argparse.Action) -> tuple[str, str, str]:
    """A flag, its default and its help in the cells of a table."""
    default = "" if action.default in (None, argparse.SUPPRESS) or action.nargs == 0 else f"`{action.default}`"
    help_text = parser.formatter_class(parser.prog)._get_help_string(action) or ""
    help_text = re.sub(r"\s*\(default: %\(default\)s\)", "", help_text).replace("%%", "%")
    choices = (
        f" One of {', '.join(f'`{choice}`' for choice in action.choices if choice is not None)}."
        if action.choices
        else ""
    )
    return f"`{action.option_strings[0]}`", default, help_text + choices


def escape(text: str) -> str:
    """A text in one cell of a table."""
    return " ".join(text.replace("|", "\\|").split())


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs for each page before it is rendered."""
    return write_flags(write_recipes(markdown))


def on_page_content(html: str, **_: Any) -> str:
    """Called by MkDocs for each rendered page: docstrings write [`Name`], as Transformers' do, for the name alone."""
    html = re.sub(r"\[(<code>\w+</code>)\]", r"\1", html)
    return re.sub(r"<td[ >].*?</td>", lambda cell: let_names_break(cell[0]), html, flags=re.DOTALL)


def let_names_break(cell: str) -> str:
    """Long names in a table cell may end a line behind `/`, `::`, `.`, `_`, `=` or before a capital."""

    def break_text(text: re.Match[str]) -> str:
        broken = re.sub(LONG_NAME, lambda name: BREAKS.sub(WORD_BREAK, name[0]), text[0])
        return re.sub(NAME_START, r'<span class="nobreak">\1</span>', broken)

    return re.sub(r"(?<=>)[^<]+(?=<)", break_text, cell)
