"""Recipes, flags and the parser: a YAML file sets defaults, the command line overrides."""

import argparse
import dataclasses
import difflib
import functools
import importlib.resources
import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import field
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from .mistakes import TRACEBACK_FLAG, describe_checkpoints, end_in_one_line, read_rank
from .noise import quiet_libraries
from .preflight import check_before_start, reserve_output
from .scripts import SCRIPTS_BY_MODULE, ScriptEntry, find_script_of_recipe

RECIPES = importlib.resources.files("umt_hf") / "recipes"
# Optional values of Transformers for which `none` is a word, not the absence of one.
KEPT_WORDS = {"report_to"}
REQUIRED = dataclasses.MISSING
# Similarity of two words from which on one is taken for the other with a letter mistyped.
SURE_RATIO = 0.9
NEAR_RATIO = 0.75
# What `umt-hf` hands to the launcher of the scripts.
LAUNCH_FLAGS = (
    "num_processes",
    "num_machines",
    "machine_rank",
    "main_process_ip",
    "main_process_port",
    "accelerate_config",
)
# Flag of some scripts -> what others call it.
OTHER_NAMES = {
    "train_data": ("train_corpora", "data"),
    "validation_data": ("data",),
    "test_data": ("validation_data", "data"),
    "train_corpora": ("train_data", "data"),
    "data": ("train_data", "train_corpora"),
    "train_split": ("train_splits", "split"),
    "train_splits": ("train_split", "split"),
    "data_root": ("data_roots",),
    "data_roots": ("data_root",),
    "test_split": ("split",),
    "validation_split": ("split",),
    "split": ("validation_split",),
}
# Flag -> flag that it would be ignored for.
RIVALS = {"num_train_epochs": "max_steps", "warmup_epochs": "warmup_steps"}

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
    """Names of the recipes that come with the package, `recipe:variant` where a recipe has variants.

    Examples:
        >>> from umt_hf.runs.config import list_recipes
        >>> [name for name in list_recipes() if name.startswith("stage1_umt")]
        ['stage1_umt_vit_b16', 'stage1_umt_vit_l16']
    """
    names = []
    for path in _list_recipe_files():
        variants = _read_recipe(path).get("variants")
        names += [f"{path.stem}:{variant}" for variant in variants] if variants else [path.stem]
    return names


def load_recipe(name_or_path: str, _inherited_by: tuple[Path, ...] = ()) -> dict[str, dict[str, Any]]:
    """Read a recipe, following its `inherits` key.

    Args:
        name_or_path: Name of a recipe of the package, or a YAML file; with `:variant` behind it where it has variants.

    Returns:
        Section -> key -> value.

    Raises:
        FileNotFoundError: If it is neither.
        ValueError: If the recipe has variants and none is named, or the one that is named does not exist, or the file
            is not YAML with keys in sections.

    Examples:
        >>> from umt_hf.runs.config import load_recipe
        >>> load_recipe("stage1_umt_vit_b16")["mask"]
        {'mask_type': 'attention', 'mask_ratio': 0.8}
    """
    name, variant = name_or_path, ""
    if not Path(name).is_file() and ":" in name:
        name, variant = name.rsplit(":", 1)
    path = Path(name)
    if not path.is_file():
        path = Path(str(RECIPES / f"{name}.yaml"))
    if not path.is_file():
        known = [recipe.stem for recipe in _list_recipe_files()]
        near = suggest(name, known)
        raise FileNotFoundError(
            f"{name_or_path!r} is neither a file nor a recipe{near or '; recipes: ' + ', '.join(known) + '.'}"
        )
    if path in _inherited_by:
        raise ValueError(f"{path}: the recipe inherits itself, by {', '.join(map(str, _inherited_by))}.")
    own = _read_recipe(path)
    merged = load_recipe(own.pop("inherits"), (*_inherited_by, path)) if "inherits" in own else {}
    variants = own.pop("variants", None) or {}
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


def suggest(word: str, known: Iterable[str]) -> str:
    """The words nearest to a mistyped one, as the end of a sentence; empty if none is near."""
    near = difflib.get_close_matches(word, list(dict.fromkeys(known)), n=2, cutoff=NEAR_RATIO)
    if near and difflib.SequenceMatcher(None, near[0], word).ratio() > SURE_RATIO:
        near = near[:1]
    return f": did you mean {' or '.join(near)}?" if near else ""


def _read_recipe(path: Path) -> dict[str, Any]:
    """Sections of a file.

    Raises:
        ValueError: If it is not YAML, or not sections of keys.
    """
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, ValueError) as error:  # also bytes that are not text, and dates that do not exist
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    recipe = {} if recipe is None else recipe
    layers = [recipe]
    if isinstance(recipe, dict):
        variants = recipe.get("variants")
        own = {name: values for name, values in recipe.items() if name not in ("inherits", "variants")}
        layers = [own, *(variants.values() if isinstance(variants, dict) else [variants or {}])]
    for layer in layers:
        sections = list(layer.values()) if isinstance(layer, dict) else [layer]
        if wrong := [values for values in sections if not isinstance(values, dict | None)]:
            raise ValueError(
                f"{path}: a recipe is sections of keys and values (`section: {{key: value}}`), got {wrong[0]!r}."
            )
    if not isinstance(recipe.get("inherits", ""), str):
        raise ValueError(f"{path}: inherits takes the name of a recipe or file, got {recipe['inherits']!r}.")
    return recipe


def parse_config(
    sections: dict[str, type], arguments: Sequence[str], entry: ScriptEntry | None = None
) -> tuple[Any, ...]:
    """Build one instance per section: from `--config NAME_OR_FILE` if given, with the other flags on top.

    Args:
        sections: Section name -> dataclass.
        arguments: Command line without the program's name.
        entry: The script, whose recipes its help names.

    Returns:
        Instances in the order of `sections`.

    Raises:
        ValueError: If the recipe has a section or key that does not exist, or a flag or key does not take its value.
    """
    config, arguments = _split_config(list(arguments))
    parser = ConfigParser(sections, entry)
    if config is not None:
        _require_own_recipe(config, entry)
        parser.take_recipe(config, sections)
        parser.drop_rivals(arguments)
    parser.refuse_unknown_flags(arguments)
    *parsed, rest = parser.parse_args_into_dataclasses(arguments, True, look_for_args_file=False)
    if rest:
        raise ValueError(f"{rest[0]!r} belongs to no flag.")
    return tuple(parsed[: len(sections)])


class ConfigParser(HfArgumentParser):
    """`HfArgumentParser` of a script's sections, with `--config`, that reads `none` as None where a field may be None.

    Args:
        sections: Section name -> dataclass.
        entry: The script, for its help.
    """

    def __init__(self, sections: dict[str, type], entry: ScriptEntry | None = None):
        self._group_names = {id(section): name for name, section in sections.items()}
        super().__init__(
            tuple(sections.values()),
            prog=entry.command if entry else None,
            usage="%(prog)s [--config RECIPE] [--flag value ...]",
            description=entry.title if entry else None,
            epilog=_describe_launch(entry) if entry else None,
            formatter_class=_HelpFormatter,
            # `--learning` is a mistake, not a short form of whatever begins so.
            allow_abbrev=False,
        )
        recipes = [path.stem for path in _list_recipe_files() if entry is None or path.stem.startswith(entry.recipes)]
        choices = f", or a recipe (name:variant): {', '.join(recipes)}" if recipes else ""
        self.add_argument("--config", help=f"YAML file{choices}. Other flags win over it.")
        self.add_argument(TRACEBACK_FLAG, action="store_true", help="Show where in the code an error comes from.")
        self.own_defaults = {action.dest: action.default for action in self._actions}
        self.optional = {name for section in sections.values() for name in list_optional(section)} - KEPT_WORDS
        for action in self._actions:
            if action.dest in self.optional:
                _accept_none(action)

    def _add_dataclass_arguments(self, dtype: Any) -> None:
        # Transformers makes a group of help of each class that has this attribute.
        dtype._argument_group_name = self._group_names[id(dtype)]
        try:
            super()._add_dataclass_arguments(dtype)
        finally:
            del dtype._argument_group_name

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong with a flag's value, without the usage of every flag.

        Raises:
            ValueError: Always.
        """
        # Both spellings of a flag work; one is enough to name it.
        message = re.sub(r"(--\w+)/--[\w-]+", r"\1", message)
        message = message.replace("the following arguments are required:", "set")
        # As the flag takes it.
        message = message.replace("', None)", "', 'none')").replace(", None)", ", none)").rstrip(".")
        raise ValueError(f"{message[:1].upper()}{message[1:]}.")

    def refuse_unknown_flags(self, arguments: Iterable[str]) -> None:
        """Look for mistyped flags before anything is said of flags that are missing.

        Raises:
            ValueError: If there is one.
        """
        known = self._option_string_actions
        choices = [*(option for option in known if "-" not in option[2:]), *(f"--{flag}" for flag in LAUNCH_FLAGS)]
        for word in arguments:
            name = word.split("=")[0]
            if name[2:].replace("-", "_") in LAUNCH_FLAGS:
                raise ValueError(f"{name} is a flag of `umt-hf` and of `accelerate launch`, not of the script itself.")
            if name.startswith("--") and name not in known:
                others = OTHER_NAMES.get(name[2:].replace("-", "_"), ())
                other = next((f"--{word}" for word in others if f"--{word}" in known), None)
                near = f": here it is {other}." if other else suggest("--" + name[2:].replace("-", "_"), choices)
                raise ValueError(f"Unknown flag {name}{near or ': --help lists all.'}")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As `ArgumentParser`; a list of the single value `none` is None."""
        known, rest = super().parse_known_args(args, namespace)
        for name in self.optional:
            if getattr(known, name, None) == [None]:
                setattr(known, name, None)
        return known, rest

    def drop_rivals(self, arguments: Iterable[str]) -> None:
        """Take back a recipe's number of steps where the command line gives epochs, which would be ignored for it."""
        given = {word.split("=")[0].lstrip("-").replace("-", "_") for word in arguments if word.startswith("--")}
        for flag, rival in RIVALS.items():
            if flag in given and rival not in given:
                for action in self._actions:
                    if action.dest == rival:
                        action.default = self.own_defaults[rival]

    def take_recipe(self, name_or_path: str, sections: dict[str, type]) -> None:
        """Make a recipe's values the defaults, each read as its flag would read it.

        (As words of a command line, values that begin with a dash would be flags.)

        Raises:
            ValueError: If a section or key does not exist, or a key does not take its value.
        """
        actions = {action.dest: action for action in self._actions if f"--{action.dest}" in action.option_strings}
        for section, values in _read_sections(name_or_path, sections).items():
            for key, value in values.items():
                if value == []:
                    continue
                action = actions[key]
                try:
                    action.default, action.required = _read_value(action, value), False
                except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
                    place, reason = f"{key} in section {section!r}", str(error).rstrip(".")
                    raise ValueError(f"{name_or_path}: {place} is {value!r}: {reason}.") from error


def _read_value(action: argparse.Action, value: Any) -> Any:
    """A recipe's value as the flag of `action` reads it from words.

    Raises:
        ValueError: If it does not; or another error of the flag's type.
    """
    value = "none" if value is None else value
    is_list = action.nargs in ("+", "*")
    items = value if isinstance(value, list) else [value]
    if len(items) > 1 and not is_list:
        raise ValueError("it takes a single value")
    if any(item is None or isinstance(item, dict | list) for item in items):
        raise ValueError("it takes plain values")
    read: Any = action.type or str
    found = [read(str(item)) for item in items]
    if action.choices is not None and (unknown := [item for item in found if item not in action.choices]):
        raise ValueError(f"{unknown[0]!r} is not one of {', '.join(map(str, action.choices))}")
    if found == [None]:
        return None
    return found if is_list else found[0]


def _describe_launch(entry: ScriptEntry) -> str:
    flags = ", ".join(f"--{flag}" for flag in LAUNCH_FLAGS)
    return (
        f"`{entry.command}` also takes {flags}, for Accelerate's launcher. "
        f"`accelerate launch -m {entry.module}` runs the same script."
    )


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help with defaults; a default of None is what the help text says in words."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        # `--mask-ratio` works beside `--mask_ratio`, and twice as much text would not help.
        return f"{action.option_strings[0]} {self._format_args(action, action.dest.upper())}"

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

    @functools.wraps(read)  # its name is in errors
    def read_or_none(text: str) -> Any:
        return None if text == "none" else read(text)

    action.type = read_or_none
    if action.choices is not None:
        words = [str(choice) for choice in action.choices]
        action.choices = [*action.choices, None]
        action.metavar = "{" + ",".join([*words, "none"]) + "}"


def script(sections: dict[str, type]) -> Callable[[Callable[..., Result]], Script[Result]]:
    """Make a script's `main` of a function that takes its sections.

    Args:
        sections: Section name -> dataclass; the function gets their instances in this order.

    Returns:
        Decorator. The function it returns sets up logging, parses a command line and runs. With the process's own
        command line, a user's error ends the process by one line; see `end_in_one_line`.
    """

    def decorate(run: Callable[..., Result]) -> Script[Result]:
        def main(arguments: Sequence[str] | None = None) -> Result:
            logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
            is_process = arguments is None
            words = sys.argv[1:] if arguments is None else arguments
            parsed: list[Any] = []

            def describe_interruption() -> str:
                folders = [values.output_dir for values in parsed if hasattr(values, "resume_from_checkpoint")]
                return describe_checkpoints(folders[0]) if folders else "Nothing was written."

            with (
                quiet_libraries(read_rank()),
                end_in_one_line(describe_interruption)
                if is_process and TRACEBACK_FLAG not in words
                else nullcontext(),
            ):
                parsed.extend(parse_config(sections, words, _find_entry(run)))
                check_before_start(parsed)
                with reserve_output(parsed):
                    return run(*parsed)

        # So that `main` pickles by name, as launchers of several processes need. The signature stays its own.
        functools.update_wrapper(main, run, ("__module__", "__name__", "__qualname__", "__doc__"), ())
        vars(main).pop("__wrapped__")
        return main

    return decorate


def _find_entry(run: Callable[..., Any]) -> ScriptEntry | None:
    """Row of the script that a function belongs to."""
    # Run by `python -m`, the module is called `__main__`, and its specification has the name.
    specification = sys.modules[run.__module__].__spec__
    return None if specification is None else SCRIPTS_BY_MODULE.get(specification.name)


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


def _require_own_recipe(name_or_path: str, entry: ScriptEntry | None) -> None:
    """Refuse a recipe of the package that another script takes.

    Raises:
        ValueError: Names that script.
    """
    owner = find_script_of_recipe(name_or_path)
    is_ours = Path(str(RECIPES), f"{name_or_path.split(':')[0]}.yaml").is_file() and not Path(name_or_path).is_file()
    if is_ours and entry is not None and owner is not None and owner != entry:
        raise ValueError(f"{name_or_path} is a recipe of `{owner.command}`, not of `{entry.command}`.")


def _read_sections(name_or_path: str, sections: dict[str, type]) -> dict[str, dict[str, Any]]:
    """A recipe whose sections and keys exist, and whose values are null only where they may be.

    Raises:
        ValueError: If one does not.
    """
    recipe = load_recipe(name_or_path)
    places = {own.name: name for name in sections for own in dataclasses.fields(sections[name])}
    for section, values in recipe.items():
        unknown = sorted((key for key in values if places.get(key) != section), key=str)
        hints = "".join(f" {key} belongs in section {places[key]!r}." for key in unknown if key in places)
        if section not in sections:
            raise ValueError(f"{name_or_path}: unknown section {section!r}; sections: {', '.join(sections)}.{hints}")
        if unknown:
            raise ValueError(f"{name_or_path}: section {section!r} has unknown keys {unknown}.{hints}")
        optional = list_optional(sections[section])
        for key, value in values.items():
            if value is None and key not in optional:
                raise ValueError(f"{name_or_path}: {key} in section {section!r} needs a value, got null.")
    return recipe


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
