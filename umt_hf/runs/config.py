"""Recipes, flags and the parser: a YAML file sets defaults, the command line overrides."""

import argparse
import dataclasses
import functools
import importlib.resources
import inspect
import logging
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

RECIPES = importlib.resources.files("umt_hf") / "recipes"
# Optional values of Transformers for which `none` is a word, not the absence of one.
KEPT_WORDS = {"report_to"}
REQUIRED = dataclasses.MISSING

Section = TypeVar("Section", bound=type)
Result = TypeVar("Result")
Value = TypeVar("Value")
ResultOut = TypeVar("ResultOut", covariant=True)


class Script(Protocol[ResultOut]):
    """What `script` makes of a function: it reads a command line."""

    def __call__(self, arguments: Sequence[str] | None = None) -> ResultOut:
        """Run with `arguments`, or with the process's own."""


def describe(default: Any, text: str) -> Any:
    """A dataclass field with a help line."""
    return _build_field(default, {"help": text})


def _build_field(default: Any, metadata: Any) -> Any:
    if isinstance(default, list):  # a mutable default needs a factory
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def require(value: Value | None, name: str) -> Value:
    """A value that a run needs.

    Raises:
        ValueError: If it is None.
    """
    if value is None:
        raise ValueError(f"Set {name}.")
    return value


def set_defaults(**defaults: Any) -> Callable[[Section], Section]:
    """Give inherited fields other defaults; stands between `@dataclass` and the class.

    Type and help stay those of the declaration. The default `REQUIRED` means that the flag must be given.

    Raises:
        ValueError: If a field is not inherited.
    """

    def apply(section: Section) -> Section:
        hints = get_type_hints(section)
        inherited = {
            own.name: own
            for base in reversed(section.__mro__[1:])
            if dataclasses.is_dataclass(base)
            for own in dataclasses.fields(base)
        }
        if unknown := sorted(defaults.keys() - inherited.keys()):
            raise ValueError(f"{section.__name__} does not inherit {', '.join(unknown)}.")
        for name, default in defaults.items():
            setattr(section, name, _build_field(default, inherited[name].metadata))
        # `dataclass` takes as fields what the class itself annotates. Not `field.type`: `HfArgumentParser` strips it.
        # Not `section.__dict__`: from Python 3.14 on annotations are not there before someone asks for them.
        changed = {name: hints[name] for name in defaults}
        section.__annotations__ = {**inspect.get_annotations(section), **changed}
        return section

    return apply


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
    return yaml.safe_load(path.read_text(encoding="utf-8-sig")) or {}


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
    parsed = ConfigParser(sections).parse_args_into_dataclasses([*flags, *arguments], look_for_args_file=False)
    return tuple(parsed[: len(sections)])


class ConfigParser(HfArgumentParser):
    """`HfArgumentParser` of a script's sections, with `--config`, that reads `none` as None where a field may be None.

    Args:
        sections: Section name -> dataclass.
    """

    def __init__(self, sections: dict[str, type]):
        super().__init__(tuple(sections.values()), formatter_class=_HelpFormatter)
        recipes = ", ".join(path.stem for path in _list_recipe_files())
        self.add_argument(
            "--config", help=f"YAML file, or a recipe (name:variant): {recipes}. Other flags win over it."
        )
        self.optional = {name for section in sections.values() for name in list_optional(section)} - KEPT_WORDS
        for action in self._actions:
            if action.dest in self.optional:
                _accept_none(action)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As `ArgumentParser`; a list of the single value `none` is None."""
        known, rest = super().parse_known_args(args, namespace)
        for name in self.optional:
            if getattr(known, name, None) == [None]:
                setattr(known, name, None)
        return known, rest


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help with defaults; a default of None is what the help text says in words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = super()._get_help_string(action)
        if action.default is None or text is None:
            return action.help
        # A section may have another default than the declaration, whose words are then not true.
        return re.sub(r"[;,] default: .*(?= \(default: %)", ".", text)


def list_optional(section: type) -> list[str]:
    """Fields of a dataclass that may be None."""
    hints = get_type_hints(section)
    return [own.name for own in dataclasses.fields(section) if own.init and type(None) in get_args(hints[own.name])]


def _accept_none(action: argparse.Action) -> None:
    """Let a flag read `none` as None, whatever else it reads."""
    read: Any = action.type or str
    action.type = lambda text: None if text == "none" else read(text)
    if action.choices is not None:
        words = [str(choice) for choice in action.choices]
        action.choices = [*action.choices, None]
        action.metavar = "{" + ",".join([*words, "none"]) + "}"


def script(sections: dict[str, type]) -> Callable[[Callable[..., Result]], Script[Result]]:
    """Make a script's `main` of a function that takes its sections.

    Args:
        sections: Section name -> dataclass; the function gets their instances in this order.

    Returns:
        Decorator. The function it returns takes a command line (by default the process's own), sets up logging, parses
        and runs.
    """

    def decorate(run: Callable[..., Result]) -> Script[Result]:
        def main(arguments: Sequence[str] | None = None) -> Result:
            logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
            return run(*parse_config(sections, sys.argv[1:] if arguments is None else arguments))

        # So that `main` pickles by name, as launchers of several processes need. The signature stays its own.
        functools.update_wrapper(main, run, ("__module__", "__name__", "__qualname__", "__doc__"), ())
        vars(main).pop("__wrapped__")
        return main

    return decorate


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
    places = {own.name: name for name in sections for own in dataclasses.fields(sections[name])}
    for section, values in load_recipe(name_or_path).items():
        unknown = sorted(key for key in values if places.get(key) != section)
        hints = "".join(f" {key} belongs in section {places[key]!r}." for key in unknown if key in places)
        if section not in sections:
            raise ValueError(f"{name_or_path}: unknown section {section!r}; sections: {', '.join(sections)}.{hints}")
        if unknown:
            raise ValueError(f"{name_or_path}: section {section!r} has unknown keys {unknown}.{hints}")
        optional = list_optional(sections[section])
        for key, value in values.items():
            if value is None and key not in optional:
                raise ValueError(f"{name_or_path}: {key} in section {section!r} needs a value, got null.")
            if value != []:
                values_of_key = value if isinstance(value, list) else ["none" if value is None else value]
                flags += [f"--{key}", *map(str, values_of_key)]
    return flags


def dump_config(sections: dict[str, Any]) -> str:
    """Resolved sections as a recipe that `--config` reads again, without tokens."""
    return yaml.safe_dump(
        {name: _without_tokens(values) for name, values in sections.items()}, sort_keys=False, allow_unicode=True
    )


def flatten_config(sections: Sequence[Any]) -> dict[str, Any]:
    """Every field of resolved sections in one table, without tokens."""
    return {name: value for section in sections for name, value in _without_tokens(section).items()}


def dump_changes(sections: dict[str, Any]) -> str:
    """Arguments that differ from their defaults, as a recipe that `--config` reads again, without tokens."""
    recipe: dict[str, dict[str, Any]] = {}
    for name, values in sections.items():
        # Transformers' own `to_dict` turns enumerations into the words that its flags take.
        found = values.to_dict() if hasattr(values, "to_dict") else dataclasses.asdict(values)
        optional = list_optional(type(values))
        for own in dataclasses.fields(values):
            if own.name.endswith("_token"):  # masked, even where there is none
                continue
            value = found[own.name]
            default = own.default if own.default_factory is dataclasses.MISSING else own.default_factory()
            is_said = isinstance(value, bool | int | float | str | list) or (value is None and own.name in optional)
            if is_said and value not in (default, []):
                recipe.setdefault(name, {})[own.name] = value
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)


def flatten_recipe(text: str) -> dict[str, Any]:
    """Every value of a dumped recipe in one table."""
    sections = yaml.safe_load(text) or {}
    return {name: value for section in sections.values() for name, value in section.items()}


def _without_tokens(section: Any) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(section).items() if not name.endswith("_token")}
