"""Recipes and flags: the command line wins over the file, the file over the default, and what is wrong is named."""

import contextlib
import io
import math
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from umt_hf.runs.config import describe, dump_changes, dump_config, parse_config


@dataclass(kw_only=True)
class ModelSection:
    """A section with a field of every kind that the package has."""

    width: int = describe(4, "Channels.")
    depth: int | None = describe(None, "Layers; default: the model's own.")
    rate: float = describe(0.5, "A rate.")
    share: float | None = describe(0.25, "A share; default: off.")
    name: str = describe("plain", "A name.")


@dataclass(kw_only=True)
class DataSection:
    """The other half."""

    source: str | None = describe(None, "A path.")
    kind: Literal["near", "far"] = describe("near", "A choice.")
    order: Literal["up", "down"] | None = describe("up", "A choice; default: none.")
    is_shuffled: bool = describe(True, "A switch.")
    is_cached: bool = describe(False, "A switch.")
    sizes: list[int] = describe([1, 2], "Numbers.")
    scales: list[float] | None = describe(None, "Numbers; default: off.")
    names: list[str] = describe(["a"], "Names.")


SECTIONS = {"model": ModelSection, "data": DataSection}
PLACES = {own.name: section for section, kind in SECTIONS.items() for own in fields(kind)}
DEFAULTS = {name: value for kind in SECTIONS.values() for name, value in asdict(kind()).items()}
OPTIONAL = ("depth", "share", "source", "order", "scales")

whole = st.integers(-(10**6), 10**6)
real = st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([1e-4, 1e300, -0.0, math.inf])
# No line ends and the like, which YAML keeps only in quotes, and which a shell does not pass either.
text = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=6) | st.sampled_from(
    [
        "a b",
        "-1",
        "--x",
        "-",
        "--",
        "--config",
        "-h",
        "--width=3",
        "true",
        "null",
        "3",
        "1e-4",
        "a: b",
        "#",
        "é",
        "@",
        "'",
        '"',
    ]
)
text = text.filter(lambda word: word != "none")
VALUES = {
    "width": whole,
    "depth": st.none() | whole,
    "rate": real,
    "share": st.none() | real,
    "name": text,
    "source": st.none() | text,
    "kind": st.sampled_from(["near", "far"]),
    "order": st.sampled_from(["up", "down", None]),
    "is_shuffled": st.booleans(),
    "is_cached": st.booleans(),
    "sizes": st.lists(whole, min_size=1, max_size=3),
    "scales": st.none() | st.lists(real, min_size=1, max_size=3),
    "names": st.lists(text, min_size=1, max_size=3),
}
choices = st.fixed_dictionaries({}, optional=VALUES)


def write_recipe(values: dict[str, Any], folder: str) -> str:
    recipe: dict[str, dict] = {}
    for name, value in values.items():
        recipe.setdefault(PLACES[name], {})[name] = value
    path = Path(folder) / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    return str(path)


def spell(name: str, value: Any) -> list[str]:
    """A flag as a user writes it."""
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={'none' if value is None else value}"]


def parse(arguments: list[str]) -> dict[str, Any]:
    """Every field by name; what argparse prints before it exits is the error's text."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            parsed = parse_config(SECTIONS, arguments)
    except SystemExit as exit_:
        raise ValueError(errors.getvalue()) from exit_
    return {name: value for section in parsed for name, value in asdict(section).items()}


def can_be_a_flag(value: Any) -> bool:
    """On a command line, a word of a list that begins with a dash is a flag, and `--` alone is nothing."""
    return (
        value != "--"
        and not isinstance(value, list)
        or not any(str(item).startswith("-") and not is_number(item) for item in value)
    )


def is_number(item: Any) -> bool:
    return isinstance(item, int | float) and math.isfinite(item) and "e" not in str(item)


@given(choices, choices)
@example(in_file={"names": ["--x", "-h"], "source": "--config"}, on_line={})
@example(in_file={"scales": [-1e-7, -math.inf]}, on_line={})
def test_the_line_wins_over_the_file_and_the_file_over_the_default(in_file, on_line):
    on_line = {name: value for name, value in on_line.items() if can_be_a_flag(value)}
    with tempfile.TemporaryDirectory() as folder:
        recipe = write_recipe(in_file, folder)
        flags = [word for name, value in on_line.items() for word in spell(name, value)]
        assert parse(["--config", recipe, *flags]) == DEFAULTS | in_file | on_line
        assert parse([*flags, f"--config={recipe}"]) == DEFAULTS | in_file | on_line
    assert parse(flags) == DEFAULTS | on_line


@given(choices)
def test_what_a_run_records_is_read_back(values):
    sections = {
        section: kind(**{name: value for name, value in values.items() if PLACES[name] == section})
        for section, kind in SECTIONS.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        for dump in (dump_config, dump_changes):
            path.write_text(dump(sections), encoding="utf-8")
            assert parse(["--config", str(path)]) == DEFAULTS | values


WRONG = {
    "width": st.sampled_from(["x", 1.5, True, None, [1, 2], {"a": 1}, ""]),
    "depth": st.sampled_from(["x", 1.5, False, [1, 2], {"a": 1}]),
    "rate": st.sampled_from(["x", None, [0.1, 0.2], {"a": 1}, True]),
    "share": st.sampled_from(["x", [0.1, 0.2], {}, {"a": 1}]),
    "name": st.sampled_from([None, ["a", "b"], {"a": "b"}]),
    "source": st.sampled_from([["a", "b"], {"a": "b"}]),
    "kind": st.sampled_from(["other", None, 3, ["near", "far"]]),
    "order": st.sampled_from(["other", 3]),
    "is_shuffled": st.sampled_from(["maybe", None, 3, [True, False]]),
    "sizes": st.sampled_from(["x", None, [1, "x"], [1.5], {"a": 1}, [[1]], [None]]),
    "scales": st.sampled_from(["x", ["x"], [[0.1]], {"a": 1}]),
    "names": st.sampled_from([None, {"a": 1}, [["a"]], [{"a": 1}]]),
}


@given(choices, st.sampled_from(sorted(WRONG)).flatmap(lambda name: st.tuples(st.just(name), WRONG[name])))
def test_values_of_a_wrong_type_are_named(in_file, wrong):
    name, value = wrong
    with tempfile.TemporaryDirectory() as folder:
        recipe = write_recipe({**in_file, name: value}, folder)
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            parse(["--config", recipe])


@given(
    choices, st.sampled_from(["model", "data"]), st.sampled_from(["widht", "sizes", "depth", "x", 3, None, True, 1.5])
)
def test_unknown_keys_are_named(in_file, section, key):
    if PLACES.get(key) == section:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(write_recipe(in_file, folder))
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        recipe[section] = {**recipe.get(section, {}), key: 1, "zzz": 1}
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        with pytest.raises(ValueError, match=r"recipe\.yaml: section .* has unknown keys") as caught:
            parse(["--config", str(path)])
        assert str(key) in str(caught.value) and "zzz" in str(caught.value)
        assert key not in PLACES or f"{key} belongs in section {PLACES[key]!r}" in str(caught.value)


@given(
    st.recursive(
        st.none() | st.booleans() | whole | text,
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(text | st.sampled_from(["model", "data"]), inner),
        max_leaves=6,
    )
)
@example(content={"model": 3})
@example(content={"model": [1]})
@example(content=[1])
@example(content="text")
def test_any_yaml_is_a_recipe_or_named(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
        try:
            found = parse(["--config", str(path)])
        except ValueError as error:
            assert "recipe.yaml" in str(error)
            return
        assert found == DEFAULTS


@given(st.text(st.characters(codec="utf-8"), max_size=20) | st.binary(max_size=20))
def test_any_text_is_a_recipe_or_named(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        try:
            found = parse(["--config", str(path)])
        except ValueError as error:
            assert "recipe.yaml" in str(error)
            return
        assert found == DEFAULTS


@given(
    st.lists(
        st.sampled_from(["--widht", "3", "--width", "x", "--sizes", "--config", "--kind=far", "stray"]), max_size=4
    )
)
def test_any_line_is_read_or_named(arguments):
    try:
        found = parse(arguments)
    except (ValueError, FileNotFoundError) as error:
        assert any(word.split("=")[0] in str(error) for word in arguments)
        return
    assert set(found) == set(DEFAULTS)
