"""The table of the model classes: complete, once, and what everything else derives from."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedModel
from typer.testing import CliRunner

import umt_hf
from umt_hf import cli
from umt_hf.hub_cards.convert_umt_checkpoint import TASK_CLASSES
from umt_hf.inference.loading import MODULES, get_model_class
from umt_hf.modeling import modeling_umt_text
from umt_hf.runs.models import MODEL_CLASSES, MODEL_TYPES, MODELS_BY_NAME, VIDEO_TEXT_TASKS
from umt_hf.zoo import load_task_titles

PACKAGE = Path(umt_hf.__file__).parent
# The text towers are parts of the video-text models and not saved alone.
TEXT_TOWERS = {"UMTTextModel", "UMTTextLMHeadModel"}


def list_public_models() -> set[str]:
    """Every model class of a modeling file, whichever file defines it."""
    files = [*(PACKAGE / "modeling").glob("modeling_*.py")]
    assert {path.stem for path in files} == {*MODULES, modeling_umt_text.__name__.rsplit(".", 1)[-1]}
    found = set()
    for module in (*MODULES.values(), modeling_umt_text):
        found |= {
            name
            for name, value in inspect.getmembers(module, inspect.isclass)
            if issubclass(value, PreTrainedModel) and value.__module__ == module.__name__ and name in umt_hf.__all__
        }
    return found


def test_every_class_has_one_row():
    names = [row.name for row in MODEL_CLASSES]
    assert len(set(names)) == len(names) == 8
    assert set(names) == list_public_models() - TEXT_TOWERS
    for row in MODEL_CLASSES:
        model_class = get_model_class(row)
        assert model_class.__name__ == row.name and model_class.config_class.model_type == row.model_type
        assert model_class.__module__.endswith(f".{row.module}")


def test_consumers_derive_from_the_table():
    tasks = [row.task for row in MODEL_CLASSES if row.task is not None]
    assert tasks == list(TASK_CLASSES) and len(set(tasks)) == len(tasks)
    assert set(load_task_titles()) == set(tasks)
    assert MODEL_TYPES == ("umt_video", "umt_video_text")
    assert all(
        MODELS_BY_NAME[TASK_CLASSES[task].__name__].module == "modeling_umt_video_text" for task in VIDEO_TEXT_TASKS
    )


@pytest.mark.parametrize("row", MODEL_CLASSES, ids=lambda row: row.name)
def test_commands_exist(row):
    name = row.command.split()[1]
    assert "{model}" in row.command and row.command.startswith("umt-hf ")
    assert CliRunner().invoke(cli.app, [name, "--help"]).exit_code == 0


def test_no_other_table_of_the_classes():
    """No other module holds a literal collection with three or more of the names, as words or as classes."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent.name == "modeling" or path == PACKAGE / "__init__.py" or path == PACKAGE / "runs" / "models.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Dict | ast.List | ast.Tuple | ast.Set):
                inside = {
                    getattr(item, "value", getattr(item, "id", None))
                    for item in ast.walk(node)
                    if isinstance(item, ast.Constant | ast.Name)
                }
                assert len(inside & set(MODELS_BY_NAME)) < 3, f"{path}:{node.lineno}"


def test_the_table_imports_nothing():
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('models', {str(PACKAGE / 'runs' / 'models.py')!r})\n"
        "module = sys.modules['models'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(len(module.MODEL_CLASSES), 'torch' in sys.modules, 'transformers' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout == "8 False False\n", result.stderr
