"""`none` on the command line and `null` in YAML are None for every value that may be None."""

import dataclasses
import inspect
import pickle
import sys
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from transformers import TrainingArguments

from tests.unit.runs.scripts import list_scripts, load_sections
from umt_hf.finetuning import classification, retrieval
from umt_hf.finetuning.trainer import EncoderFinetuningArguments, FinetuningArguments
from umt_hf.runs.config import (
    KEPT_WORDS,
    REQUIRED,
    describe,
    dump_changes,
    dump_config,
    list_optional,
    parse_config,
    script,
    set_defaults,
)
from umt_hf.training import stage1, stage2

SCRIPTS = list_scripts()
# What a section refuses to be without.
COMMON = {"umt_hf.training.stage2": ["--train_corpora", "train.json"]}


def list_optional_flags(name: str) -> list[tuple[str, str]]:
    return [(section, flag) for section, arguments in load_sections(name).items() for flag in list_optional(arguments)]


def build_command(name: str) -> list[str]:
    """A command line that parses, with a value for every flag that must have one."""
    fields = [field for section in load_sections(name).values() for field in dataclasses.fields(section)]
    required = [f for f in fields if f.init and f.default is REQUIRED and f.default_factory is REQUIRED]
    needed = [word for field in required for word in (f"--{field.name}", field.name)]
    return [*needed, *COMMON.get(name, []), *(["--use_cpu", "true"] if name.startswith("umt_hf.finetuning") else [])]


def read_all(name: str, arguments: list[str]) -> dict[tuple[str, str], Any]:
    sections = load_sections(name)
    parsed = dict(zip(sections, parse_config(sections, arguments), strict=True))
    return {(section, flag): getattr(parsed[section], flag) for section, flag in list_optional_flags(name)}


@pytest.fixture
def raw(monkeypatch):
    """`TrainingArguments` fills in some values itself: look at what it was given."""
    for section in (TrainingArguments, FinetuningArguments, EncoderFinetuningArguments):
        monkeypatch.setattr(section, "__post_init__", lambda self: None)


def test_there_are_many():
    assert sum(len(list_optional_flags(name)) for name in SCRIPTS) > 200


@pytest.mark.parametrize("name", SCRIPTS)
def test_none_is_none_on_the_command_line_and_null_in_yaml(name, raw, tmp_path):
    flags = list_optional_flags(name)
    expected = {(section, flag): "none" if flag in KEPT_WORDS else None for section, flag in flags}
    common = build_command(name)
    assert read_all(name, [*common, *(word for _, flag in flags for word in (f"--{flag}", "none"))]) == expected
    recipe: dict[str, dict[str, None]] = {}
    for section, flag in flags:
        recipe.setdefault(section, {})[flag] = None
    (tmp_path / "null.yaml").write_text(yaml.safe_dump(recipe))
    # A flag that must be given is given by the recipe.
    needed = [word for word in common if word not in {f"--{flag}" for _, flag in flags} | {flag for _, flag in flags}]
    assert read_all(name, [*needed, "--config", str(tmp_path / "null.yaml")]) == expected


def test_none_wins_over_a_recipe_and_survives_the_record_of_the_run(tmp_path):
    recipe = ["--config", "stage1_umt_vit_b16"]
    flags = ["--teacher_image_size", "none", "--mixed_precision", "none", "--save_total_limit", "none"]
    parsed = parse_config(stage1.SECTIONS, [*recipe, *flags])
    _, teacher, _, data, _, training = parsed
    assert (teacher.teacher_image_size, training.mixed_precision, training.save_total_limit) == (None, None, None)
    assert data.max_eval_samples is None and training.report_to == "tensorboard"
    (tmp_path / "run.yaml").write_text(dump_config(dict(zip(stage1.SECTIONS, parsed, strict=True))))
    assert "mixed_precision: null" in (tmp_path / "run.yaml").read_text()
    assert parse_config(stage1.SECTIONS, ["--config", str(tmp_path / "run.yaml")]) == parsed


def test_a_changed_record_keeps_none(tmp_path):
    flags = ["--model_name_or_path", "model", "--num_frames", "none", "--max_text_tokens", "none", "--use_cpu", "true"]
    parsed = parse_config(retrieval.SECTIONS, flags)
    (tmp_path / "run.yaml").write_text(dump_changes(dict(zip(retrieval.SECTIONS, parsed, strict=True))))
    again = parse_config(retrieval.SECTIONS, ["--config", str(tmp_path / "run.yaml")])
    assert (again[1].num_frames, again[1].max_text_tokens) == (None, None)
    assert again[1] == parsed[1] and again[0] == parsed[0]


def test_none_stays_a_word_where_it_is_a_choice(tmp_path):
    _, teacher, _, _, _, training = parse_config(stage1.SECTIONS, ["--alignment_norm", "none", "--report_to", "none"])
    assert (teacher.alignment_norm, training.report_to) == ("none", "none")
    flags = build_command("umt_hf.finetuning.classification")
    *_, training = parse_config(classification.SECTIONS, [*flags, "--class_weighting", "none", "--report_to", "none"])
    assert training.class_weighting == "none" and training.report_to in ([], "none")


@pytest.mark.parametrize("name", [name for name in SCRIPTS if not name.startswith("umt_hf.moving_shapes.tiny")])
def test_a_value_of_another_kind_is_told_by_its_kind(name):
    sections = load_sections(name)
    hints = {flag: get_type_hints(section)[flag] for section in sections.values() for flag in list_optional(section)}
    numbers = [flag for flag, hint in hints.items() if {int, float} & set(get_args(hint))]
    assert numbers
    for flag in numbers:
        with pytest.raises(ValueError, match=rf"--{flag}: invalid (int|float) value: '2\.5x'"):
            parse_config(sections, [*build_command(name), f"--{flag}", "2.5x"])


def test_what_must_have_a_value_refuses_none(tmp_path):
    with pytest.raises(ValueError, match="Argument --mask_ratio: invalid float value: 'none'"):
        parse_config(stage1.SECTIONS, ["--mask_ratio", "none"])
    (tmp_path / "null.yaml").write_text("mask:\n  mask_ratio: null\n")
    with pytest.raises(ValueError, match="mask_ratio in section 'mask' needs a value"):
        parse_config(stage1.SECTIONS, ["--config", str(tmp_path / "null.yaml")])
    with pytest.raises(ValueError, match="--mixed_precision: invalid choice: 'fp8'.*none|None"):
        parse_config(stage1.SECTIONS, ["--mixed_precision", "fp8"])


def test_lists_and_switches_that_may_be_none():
    @dataclasses.dataclass(kw_only=True)
    class Arguments:
        names: list[str] | None = describe(["a"], "Names.")
        is_private: bool | None = describe(True, "Privacy.")

    (parsed,) = parse_config({"data": Arguments}, ["--names", "none", "--is_private", "none"])
    assert (parsed.names, parsed.is_private) == (None, None)
    (parsed,) = parse_config({"data": Arguments}, ["--names", "b", "none"])
    assert parsed.names == ["b", None]
    (parsed,) = parse_config({"data": Arguments}, ["--is_private", "false"])
    assert (parsed.names, parsed.is_private) == (["a"], False)


def test_changed_defaults():
    @dataclasses.dataclass(kw_only=True)
    class Base:
        number: int | None = describe(None, "A number.")
        names: list[str] = describe([], "Names.")

    @dataclasses.dataclass(kw_only=True)
    @set_defaults(number=3, names=["a"])
    class Child(Base):
        own: int = describe(1, "Own.")

    @dataclasses.dataclass(kw_only=True)
    @set_defaults(number=REQUIRED)
    class Strict(Child):
        pass

    assert Child() == Child(number=3, names=["a"], own=1) and Base().number is None
    assert Child().names is not Child().names
    assert get_type_hints(Child)["number"] == int | None
    (child,) = parse_config({"data": Child}, ["--number", "none"])
    assert child.number is None
    with pytest.raises(ValueError, match="Set --number"):
        parse_config({"data": Strict}, [])
    assert parse_config({"data": Strict}, ["--number", "4"])[0] == Strict(number=4)
    with pytest.raises(ValueError, match="does not inherit other"):
        set_defaults(other=1)(type("Wrong", (Base,), {}))


def test_a_script_reads_its_own_command_line_or_the_process_s(monkeypatch):
    @dataclasses.dataclass(kw_only=True)
    class Arguments:
        number: int = describe(1, "A number.")

    @script({"data": Arguments})
    def main(data: Arguments) -> int:
        """Return the number."""
        return data.number

    assert main(["--number", "2"]) == main(arguments=["--number", "2"]) == 2
    assert (main.__doc__, main.__module__) == ("Return the number.", __name__)
    monkeypatch.setattr(sys, "argv", ["script", "--number", "3"])
    assert main() == 3
    assert pickle.loads(pickle.dumps(stage1.main)) is stage1.main  # launchers hand it to processes by name
    assert list(inspect.signature(stage1.main).parameters) == ["arguments"]
    assert stage2.main.__module__ == "umt_hf.training.stage2" and stage2.main.__doc__ == "Build and train."
