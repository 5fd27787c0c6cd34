"""Recipes, flags and the parser: a YAML file sets defaults, the command line overrides."""

import dataclasses
import importlib.resources
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

RECIPES = importlib.resources.files("umt_hf") / "recipes"


def describe(default: Any, text: str) -> Any:
    """A dataclass field with a help line."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


def list_recipes() -> list[str]:
    """Names of the recipes that come with the package, `recipe:variant` where a recipe has variants."""
    names = []
    for path in _list_recipe_files():
        variants = _read_recipe(path).get("variants")
        names += [f"{path.stem}:{variant}" for variant in variants] if variants else [path.stem]
    return names


def load_recipe(name_or_path: str) -> dict[str, dict[str, Any]]:
    """Read a recipe, following its `inherits` key.

    Args:
        name_or_path: Name of a recipe of the package, or a YAML file; with `:variant` behind it where it has variants.

    Returns:
        Section -> key -> value.

    Raises:
        FileNotFoundError: If it is neither.
        ValueError: If the recipe has variants and none is named, or the one that is named does not exist.
    """
    name, variant = name_or_path, ""
    if not Path(name).is_file() and ":" in name:
        name, variant = name.rsplit(":", 1)
    path = Path(name)
    if not path.is_file():
        path = Path(str(RECIPES / f"{name}.yaml"))
    if not path.is_file():
        raise FileNotFoundError(
            f"{name_or_path!r} is neither a file nor a recipe; recipes: "
            f"{', '.join(recipe.stem for recipe in _list_recipe_files())}."
        )
    own = _read_recipe(path)
    merged = load_recipe(own.pop("inherits")) if "inherits" in own else {}
    variants = own.pop("variants", {})
    if variants and variant not in variants:
        choices = ", ".join(f"{name}:{known}" for known in variants)
        raise ValueError(f"{name_or_path!r}: name one of the recipe's variants: {choices}.")
    if variant and not variants:
        raise ValueError(f"{name_or_path!r}: the recipe {name} has no variants.")
    for layer in (own, variants.get(variant, {})):
        for section, values in layer.items():
            merged[section] = {**merged.get(section, {}), **(values or {})}
    return merged


def _list_recipe_files() -> list[Path]:
    """Files of the package's recipes, without those that only others inherit."""
    return [path for path in sorted(Path(str(RECIPES)).glob("*.yaml")) if not path.stem.endswith("_base")]


def _read_recipe(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text()) or {}


def parse_config(sections: dict[str, type], arguments: Sequence[str]) -> tuple[Any, ...]:
    """Build one instance per section: from `--config NAME_OR_FILE` if given, with the other flags on top.

    Args:
        sections: Section name -> dataclass.
        arguments: Command line without the program's name.

    Returns:
        Instances in the order of `sections`.

    Raises:
        ValueError: If the recipe has a section or key that does not exist.
    """
    config, arguments = _split_config(list(arguments))
    flags = [] if config is None else _recipe_to_flags(config, sections)
    parser = HfArgumentParser(tuple(sections.values()))
    recipes = [path.stem for path in _list_recipe_files()]
    parser.add_argument(
        "--config", help=f"YAML file, or a recipe (name:variant): {', '.join(recipes)}. Other flags win over it."
    )
    parsed = parser.parse_args_into_dataclasses([*flags, *arguments], look_for_args_file=False)
    return tuple(parsed[: len(sections)])


def _split_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Take `--config NAME` or `--config=NAME` out of a command line; the last one counts."""
    config, others = None, []
    rest = iter(arguments)
    for argument in rest:
        if argument.startswith("--config="):
            config = argument.removeprefix("--config=")
        elif argument == "--config":
            config = next(rest, "")
        else:
            others.append(argument)
    if config == "":
        raise ValueError("--config needs the name of a recipe or a YAML file.")
    return config, others


def _recipe_to_flags(name_or_path: str, sections: dict[str, type]) -> list[str]:
    flags: list[str] = []
    for section, values in load_recipe(name_or_path).items():
        if section not in sections:
            raise ValueError(f"{name_or_path}: unknown section {section!r}; sections: {', '.join(sections)}.")
        known = {f.name for f in dataclasses.fields(sections[section])}
        if unknown := sorted(values.keys() - known):
            raise ValueError(f"{name_or_path}: section {section!r} has unknown keys {unknown}.")
        for key, value in values.items():
            if value is not None and value != []:
                flags += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def dump_config(sections: dict[str, Any]) -> str:
    """Resolved sections as a recipe that `--config` reads again, without tokens."""
    return yaml.safe_dump({name: _without_tokens(values) for name, values in sections.items()}, sort_keys=False)


def flatten_config(sections: Sequence[Any]) -> dict[str, Any]:
    """Every field of resolved sections in one table, without tokens."""
    return {name: value for section in sections for name, value in _without_tokens(section).items()}


def _without_tokens(section: Any) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(section).items() if not name.endswith("_token")}
