"""One vocabulary: an argument that means the same is declared once, in a dataclass that others extend."""

import ast
import collections
import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

from tests.unit.runs.scripts import ROOT, list_scripts, load_sections
from umt_hf.runs.config import ConfigParser, list_recipes, load_recipe

SCRIPTS = list_scripts()
SECTION_NAMES = ["model", "teacher", "mask", "losses", "data", "augmentation", "evaluation", "training"]
TRANSFORMERS_NAMES = {field.name for field in dataclasses.fields(TrainingArguments)}


def list_declarations(sections: list[type]) -> dict[str, set[type]]:
    """Field -> the topmost dataclasses that declare it."""
    found: dict[str, set[type]] = collections.defaultdict(set)
    for section in sections:
        for field in dataclasses.fields(section):
            bases = [base for base in section.__mro__ if dataclasses.is_dataclass(base)]
            declaring = [base for base in bases if field.name in inspect.get_annotations(base)]
            found[field.name].add(declaring[-1])
    return found


def find_double_names(sections: list[type]) -> dict[str, list[str]]:
    """Names that unrelated dataclasses declare, those of Transformers aside."""
    return {
        name: sorted(section.__name__ for section in declaring)
        for name, declaring in list_declarations(sections).items()
        if len(declaring) > 1 and name not in TRANSFORMERS_NAMES
    }


def list_all_sections() -> list[type]:
    return [section for script in SCRIPTS for section in load_sections(script).values()]


def test_all_scripts_are_found():
    assert len(SCRIPTS) == 15 and "umt_hf.training.stage1" in SCRIPTS and "umt_hf.moving_shapes.tiny_clip" in SCRIPTS


def test_a_name_is_declared_once():
    assert find_double_names(list_all_sections()) == {}


def test_a_planted_second_declaration_is_found():
    @dataclasses.dataclass(kw_only=True)
    class Planted:
        decoder: str = "pyav"

    assert find_double_names([*list_all_sections(), Planted]) == {"decoder": ["Planted", "ReadingArguments"]}


def test_names_of_transformers_are_taken_on_purpose():
    """Sections that do not extend `TrainingArguments` use its names only for what it means by them."""
    own = [section for section in list_all_sections() if not issubclass(section, TrainingArguments)]
    shared = {field.name for section in own for field in dataclasses.fields(section)} & TRANSFORMERS_NAMES
    assert shared == {
        *("output_dir", "seed", "num_train_epochs", "max_steps", "warmup_steps", "learning_rate", "weight_decay"),
        *("lr_scheduler_type", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "gradient_checkpointing"),
        *("gradient_accumulation_steps", "per_device_train_batch_size", "per_device_eval_batch_size"),
        *("dataloader_prefetch_factor", "dataloader_persistent_workers"),
        *("dataloader_num_workers", "logging_steps", "eval_steps", "save_steps", "save_total_limit"),
        *("torch_compile", "torch_compile_backend", "torch_compile_mode"),
        *("resume_from_checkpoint", "report_to", "push_to_hub", "hub_model_id", "hub_strategy"),
        *("hub_private_repo", "hub_token", "hub_revision", "disable_tqdm"),
        *("torch_compile", "torch_compile_backend", "torch_compile_mode"),
    }


def test_changed_defaults_keep_type_and_help():
    """A shared field has one type and one help text, whatever its default is."""
    texts = collections.defaultdict(set)
    for section in list_all_sections():
        for field in dataclasses.fields(section):
            if field.name not in TRANSFORMERS_NAMES:
                texts[field.name].add(field.metadata["help"])
    assert {name: found for name, found in texts.items() if len(found) > 1} == {}


@pytest.mark.parametrize("script", SCRIPTS)
def test_sections_have_the_common_names_in_order(script):
    names = list(load_sections(script))
    assert names == [name for name in SECTION_NAMES if name in names]


@pytest.mark.parametrize("recipe", list_recipes())
def test_recipes_have_the_common_sections(recipe):
    assert set(load_recipe(recipe)) <= set(SECTION_NAMES)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_in_the_help_once(script):
    sections = load_sections(script)
    flags = re.findall(r"^  (--\w+)", ConfigParser(sections).format_help(), re.M)
    assert len(flags) == len(set(flags))
    fields = [field for section in sections.values() for field in dataclasses.fields(section) if field.init]
    assert "(default: None)" not in ConfigParser(sections).format_help()
    assert {"--config", *(f"--{field.name}" for field in fields)} <= set(flags)


def test_help_says_default_instead_of_none():
    for section in list_all_sections():
        for field in dataclasses.fields(section):
            if field.name not in TRANSFORMERS_NAMES or section.__module__.startswith("umt_hf.training"):
                assert "none =" not in field.metadata["help"], (section, field.name)


def test_no_two_public_things_have_one_name():
    """Classes and functions at the top of modules; each script has a `main`."""
    places: dict[str, set[str]] = collections.defaultdict(set)  # a function's overloads are one thing
    for path in sorted((ROOT / "umt_hf").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            is_named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if is_named and not node.name.startswith("_") and node.name != "main":
                places[node.name].add(str(path.relative_to(ROOT)))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def test_scripts_share_one_main():
    text = "\n".join(path.read_text() for path in (ROOT / "umt_hf").rglob("*.py"))
    assert text.count("logging.basicConfig(") == 1
    assert len(re.findall(r"(?<!def )\bparse_config\(", text)) == 1


def test_recipes_name_no_section_twice():
    """YAML would keep the last one without a word."""
    for path in sorted((ROOT / "umt_hf" / "recipes").glob("*.yaml")):
        keys = [key.value for key, _ in yaml.compose(path.read_text()).value]
        assert len(keys) == len(set(keys)), Path(path).name


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_states_one_default(name):
    """That of the section, which may differ from the one that the declaration speaks of."""
    parser = ConfigParser(load_sections(name))
    for action in parser._actions:
        own = (parser.formatter_class("x")._get_help_string(action) or "").lower()
        assert own.count("default:") <= 1, (action.dest, own)
