"""Every class and main function of the API pages has a short example, which runs as it stands."""

import ast
import doctest
import importlib
import inspect
import re
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import umt_hf
from tests.unit.example_files import write_example_files

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))
BLOCK = re.compile(r"^::: (\S+)\n(?:    options:\n      members: \[(.*?)\])?", re.MULTILINE)
MAX_COLUMNS, MAX_LINES = 80, 16
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
NEEDS = {
    "embed_videos": "lancedb",
    "list_new_videos": "lancedb",
    "write_rows": "lancedb",
    "VideoIndex": "lancedb",
    "VideoSearcher": "lancedb",
    "ExportedVideoModel": "onnxruntime",
    "export_model": "onnxruntime",
}
# Beside the classes, and beside what the pages name by itself.
MAIN_FUNCTIONS = {
    "data.key_frames": ("load_key_frames",),
    "data.sources": ("load_videos",),
    "evaluation.metrics.ranks": ("compute_ranks",),
    "hub_cards.convert_umt_checkpoint": ("build_published_config", "describe_checkpoint"),
    "inference.features": ("extract_features", "load_encoder", "save_features"),
    "inference.batches": ("list_new_videos", "write_rows"),
    "inference.export": ("export_model",),
    "inference.streaming": ("stream_features", "stream_labels"),
    "modeling.losses_umt": ("mlm_loss", "sample_mlm_corruption", "uta_loss", "vtc_loss", "vtm_loss"),
    "modeling.masking_umt_video": ("sample_attention_mask", "sample_random_mask", "sample_tube_mask"),
    "moving_shapes.render": ("render_clip", "sample_clip", "write_moving_shapes"),
    "processing.decoding": ("open_video",),
    "processing.images": ("read_image",),
    "processing.processing_umt_video_text": ("build_tokenizer", "clean_caption"),
    "processing.sampling": ("compute_key_frame_offsets", "compute_spatial_crops", "sample_frame_indices"),
    "runs.config": ("list_recipes", "load_recipe"),
    "training.optimization": ("build_parameter_groups", "compute_learning_rate"),
}
# Classes that a user neither makes nor calls: what makes them has the example.
MADE_BY = {
    "umt_hf.data": "main functions",
    "umt_hf.evaluation.detection": "detect_actions",
    "umt_hf.finetuning": "build_classification_trainer",
    "umt_hf.processing.decoding": "open_video",
    "umt_hf.processing.media_files": "open_video",
    "umt_hf.runs": "flags",
    "umt_hf.training.pairs": "stage 2",
    "umt_hf.training.stage1": "its flags",
    "umt_hf.training.stage2": "its flags",
    "umt_hf.training.trainer": "the stages",
    "umt_hf.inference.search.VideoTextEncoder": "embed_videos and VideoSearcher",
}


def resolve(name: str) -> Any:
    """What a dotted name means: a module, or something in one."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return getattr(resolve(module), attribute)


def list_defined(module: ModuleType) -> list[Any]:
    """Public classes that a module itself defines, without dataclasses, whose fields say all."""
    classes = [item for name, item in vars(module).items() if inspect.isclass(item) and not name.startswith("_")]
    own = [item for item in classes if item.__module__ == module.__name__]
    return [item for item in own if "__dataclass_fields__" not in vars(item)]


def is_made_by_others(item: Any) -> bool:
    full = f"{item.__module__}.{item.__qualname__}"
    return any(full == name or full.startswith(f"{name}.") for name in MADE_BY)


def list_documented() -> dict[str, Any]:
    """Classes and functions that need an example, by the last part of their names."""
    found = {name: getattr(umt_hf, name) for name in umt_hf.__all__}
    for name, members in BLOCK.findall("".join(page.read_text() for page in PAGES)):
        item = resolve(name)
        if not inspect.ismodule(item):
            found[item.__name__] = item
            continue
        items = [getattr(item, member) for member in members.split(", ")] if members else list_defined(item)
        classes = [each for each in items if inspect.isclass(each) and "__dataclass_fields__" not in vars(each)]
        found |= {each.__name__: each for each in classes if not is_made_by_others(each)}
    for module, names in MAIN_FUNCTIONS.items():
        found |= {name: getattr(resolve(f"umt_hf.{module}"), name) for name in names}
    return found


DOCUMENTED = list_documented()


def list_all_examples() -> dict[str, str]:
    """Docstrings of the package with a prompt in them, by place: also those that nothing demands."""
    found = {}
    for path in sorted((ROOT / "umt_hf").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and ">>>" in text:
                    found[f"{path.relative_to(ROOT)}:{getattr(node, 'name', '')}"] = text
    return found


EXAMPLES = list_all_examples()


def check_form(docstring: str) -> list[str]:
    """What is wrong with the look of an example, in words."""
    if "\nExamples:\n" not in docstring:
        return ["there is no section `Examples:`"]
    section = docstring.split("\nExamples:\n")[1]
    lines = textwrap.dedent(re.split(r"\n(?=\S)", section)[0]).strip("\n").splitlines()
    faults = [f"over {MAX_COLUMNS} columns: {line}" for line in lines if len(line) > MAX_COLUMNS]
    if not any(line.startswith(">>> ") for line in lines):
        faults.append("nothing runs in it")
    if any("```" in line for line in lines):
        faults.append("a fence, which Examples: does without")
    return [*faults, f"{len(lines)} lines"] if len(lines) > MAX_LINES else faults


def run_example(docstring: str, name: str) -> tuple[int, str]:
    """Run an example in a fresh namespace: how many lines failed, and the report on them."""
    test = doctest.DocTestParser().get_doctest(docstring, {"__name__": "__main__"}, name, None, None)
    assert test.examples, f"{name} has no example"
    report: list[str] = []
    failed = doctest.DocTestRunner(optionflags=FLAGS, verbose=False).run(test, out=report.append).failed
    return failed, "".join(report)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return write_example_files(tmp_path_factory.mktemp("example_files"))


@pytest.fixture
def workplace(files, tmp_path, monkeypatch) -> Path:
    """A folder of its own for each example, so that none finds what another has written."""
    for entry in files.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_examples_of_everything():
    assert set(umt_hf.__all__) <= set(DOCUMENTED) and len(DOCUMENTED) > 60
    missing = {name: faults for name, item in DOCUMENTED.items() if (faults := check_form(inspect.getdoc(item) or ""))}
    assert missing == {}
    own = {name: item for name, item in DOCUMENTED.items() if ">>>" not in vars(item).get("__doc__", item.__doc__)}
    assert own == {}  # not the example of a base class


def test_places_of_exceptions_exist():
    for name in MADE_BY:
        assert resolve(name)


@pytest.mark.parametrize("place", EXAMPLES)
def test_examples_have_one_form(place):
    assert check_form(EXAMPLES[place]) == []


@pytest.mark.parametrize("place", EXAMPLES)
def test_examples_run(place, workplace):
    name = place.rpartition(":")[2]
    if module := NEEDS.get(name):
        pytest.importorskip(module)
    failed, report = run_example(EXAMPLES[place], name)
    assert not failed, report


def test_planted_faults_are_found(workplace):
    failed, report = run_example("Sum.\n\nExamples:\n    >>> 1 + 1\n    3\n", "planted")
    assert failed == 1 and "Expected:\n    3\nGot:\n    2" in report
    failed, report = run_example("Sum.\n\nExamples:\n    >>> open_video('video.mp4')\n", "planted")
    assert failed == 1 and "NameError" in report
    assert check_form("Sum.\n\nExample:\n    >>> 1 + 1\n    2") == ["there is no section `Examples:`"]
    assert check_form("Sum.\n\nExamples:\n    See the page.") == ["nothing runs in it"]
    assert check_form(f"Sum.\n\nExamples:\n    >>> {'x' * 77}\n")[0].startswith("over 80 columns")
    assert check_form("Sum.\n\nExamples:\n    ```python\n    >>> 1\n    1\n    ```")[-1].startswith("a fence")


def test_files_that_examples_name_are_described():
    text = (ROOT / "docs" / "api" / "models.md").read_text()
    for name in ("video.mp4", "videos", "umt-vit-b16", "openai/clip-vit-base-patch16"):
        assert f"`{name}`" in text
    for page in PAGES:
        assert page.name == "models.md" or "models.md#the-examples" in page.read_text()
