"""Numbers that nobody can mean are refused before anything is loaded, in every script."""

import copy
import dataclasses
import importlib

import pytest

from umt_hf.runs.config import ConfigParser, list_recipes, parse_config
from umt_hf.runs.preflight import (
    PLACES,
    RANGES,
    check_before_start,
    refuse_empty_places,
    refuse_numbers_out_of_range,
)
from umt_hf.runs.scripts import SCRIPTS, find_script_of_recipe

# Flag -> values that are refused, in each script that has the flag.
REFUSED = {
    "preemption_exit_code": ["300", "0", "-1"],
    "max_skipped_ratio": ["5", "nan", "-0.1"],
    "learning_rate": ["nan", "inf", "-1e-4"],
    "min_learning_rate": ["nan", "-1"],
    "weight_decay": ["nan", "-0.1", "inf"],
    "max_grad_norm": ["nan", "-1", "inf"],
    "warmup_epochs": ["-1", "nan"],
    "num_train_epochs": ["nan", "inf"],
    "max_steps": ["-5", "0", "-2"],
    "warmup_steps": ["-5"],
    "eval_steps": ["-5"],
    "mask_ratio": ["nan", "-0.5", "1"],
    "image_mask_ratio": ["nan", "1"],
    "drop_path_rate": ["1", "nan", "-0.1"],
    "adam_beta1": ["1", "nan"],
    "adam_beta2": ["1.5"],
    "adam_epsilon": ["0", "nan"],
    "horizontal_flip_probability": ["2", "nan"],
    "mlm_probability": ["0", "1", "nan"],
    "uta_loss_weight": ["-1", "nan"],
    "vtc_loss_weight": ["inf"],
    "layer_decay": ["0", "nan", "2"],
    "lora_rank": ["0"],
    "num_frames": ["0", "-4"],
    "num_clips": ["0"],
    "first_seconds": ["0", "nan"],
    "crop_scale": ["0", "nan"],
    "crop_scales": ["2"],
    "dataloader_num_workers": ["-1"],
    "num_hidden_layers": ["0"],
    "ddp_timeout_seconds": ["0"],
    "alignment_interval": ["0", "nan"],
    "repeated_augmentation": ["0"],
    "peak_tflops": ["nan", "inf"],
    "min_learning_rate_share": ["2", "nan"],
}


def find_sections(entry) -> dict[str, type]:
    return importlib.import_module(entry.module).SECTIONS


def parse(entry, *words: str) -> tuple:
    """Sections of a command line with what the script needs; ranges are looked at."""
    sections = find_sections(entry)
    needed = [f"--{action.dest}=given" for action in ConfigParser(sections, entry)._actions if action.required]
    if entry.verb == "stage2" and "--config" not in words:
        needed.append("--train_corpora=a.json")
    if entry.group == "finetune":
        needed.append("--use_cpu=true")
    parsed = parse_config(sections, [*needed, *words], entry)
    refuse_numbers_out_of_range(parsed)
    return parsed


def list_cases(section: type) -> list[tuple[str, str]]:
    names = {own.name for own in dataclasses.fields(section)}
    return [(name, value) for name, values in REFUSED.items() if name in names for value in values]


@pytest.mark.parametrize("entry", SCRIPTS, ids=lambda entry: entry.module)
def test_a_number_that_cannot_be_meant_is_refused_by_name(entry):
    for section in parse(entry):
        for name, value in list_cases(type(section)):
            changed = copy.copy(section)
            setattr(changed, name, [float(value), 1.0] if name.startswith("crop_scale") else float(value))
            with pytest.raises(ValueError, match=rf"^{name} must be .*, got \S+\.$"):
                refuse_numbers_out_of_range([changed])


def test_each_case_is_looked_at_in_some_script():
    sections = [section for entry in SCRIPTS for section in find_sections(entry).values()]
    cases = [case for section in sections for case in list_cases(section)]
    assert {name for name, _ in cases} == set(REFUSED) and len(cases) > 150


@pytest.mark.parametrize(
    ("verb", "word"),
    [
        ("stage1", "--preemption_exit_code=300"),
        ("stage1", "--max_skipped_ratio=nan"),
        ("stage2", "--learning_rate=nan"),
        ("stage2", "--peak_tflops=-1"),
        ("retrieval", "--weight_decay=-1"),
        ("detection", "--max_skipped_ratio=5"),
    ],
)
def test_it_is_refused_on_the_command_line(verb, word):
    entry = next(entry for entry in SCRIPTS if entry.verb == verb and entry.group != "evaluate")
    with pytest.raises(ValueError, match=rf"^{word[2:].split('=')[0]} must be .*\.$"):
        parse(entry, word)


@pytest.mark.parametrize("entry", SCRIPTS, ids=lambda entry: entry.module)
def test_defaults_and_recipes_are_within_the_ranges(entry):
    parse(entry)
    for recipe in list_recipes():
        if find_script_of_recipe(recipe) == entry:
            parse(entry, "--config", recipe)


def test_no_clipping_is_said_by_none_in_pre_training_and_by_0_in_fine_tuning():
    by_verb = {entry.verb: entry for entry in SCRIPTS if entry.group != "evaluate"}
    with pytest.raises(ValueError, match="max_grad_norm must be above 0, or none for no clipping"):
        parse(by_verb["stage1"], "--max_grad_norm", "0")
    parse(by_verb["stage1"], "--max_grad_norm", "none")
    parse(by_verb["classification"], "--max_grad_norm", "0")


def test_each_range_is_of_a_flag():
    names = {
        own.name
        for entry in SCRIPTS
        for section in find_sections(entry).values()
        for own in dataclasses.fields(section)
    }
    assert set(RANGES) <= names, set(RANGES) - names


@pytest.mark.parametrize("entry", SCRIPTS, ids=lambda entry: entry.module)
def test_an_empty_name_of_a_folder_or_file_is_refused_by_flag(entry):
    sections = parse(entry)
    refuse_empty_places(sections)
    looked_at = set()
    for section in sections:
        for name in PLACES & {own.name for own in dataclasses.fields(section)}:
            for empty in ([""], [" ", "a"]) if isinstance(getattr(section, name), list) else ("", " "):
                changed = copy.copy(section)
                setattr(changed, name, empty)
                with pytest.raises(ValueError, match=f"^--{name} is empty: give it a name"):
                    refuse_empty_places([changed])
            looked_at.add(name)
    assert "output_dir" in looked_at
    assert ("resume_from_checkpoint" in looked_at) == (entry.group != "evaluate")


@pytest.mark.parametrize("flag", ["--output_dir=", "--resume_from_checkpoint="])
@pytest.mark.parametrize("verb", ["stage1", "retrieval"])
def test_an_unset_variable_is_refused_on_the_command_line(verb, flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    entry = next(entry for entry in SCRIPTS if entry.verb == verb and entry.group != "evaluate")
    with pytest.raises(ValueError, match=f"^{flag[:-1]} is empty"):
        check_before_start(parse(entry, "--report_to=none", flag))
    assert not list(tmp_path.iterdir())


def test_each_place_is_a_flag():
    names = {
        own.name for entry in SCRIPTS for kind in find_sections(entry).values() for own in dataclasses.fields(kind)
    }
    assert names >= PLACES - {"logging_dir"}  # of some versions of Transformers
