"""What holds on every system: no module of POSIX alone, UTF-8 everywhere, names of files that Windows takes."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import umt_hf
from umt_hf.demo.settings import DemoSettings
from umt_hf.hub_cards.label_names import read_label_names
from umt_hf.inference.features import name_features
from umt_hf.processing.processing_umt_video_text import build_tokenizer
from umt_hf.runs.config import load_recipe

ROOT = Path(umt_hf.__file__).parents[1]
PACKAGE = Path(umt_hf.__file__).parent
SOURCES = [
    *sorted(PACKAGE.rglob("*.py")),
    ROOT / "umt_hf_launcher.py",
    *sorted((ROOT / "docs").glob("*.py")),
    *sorted((ROOT / "examples").glob("*.py")),
    *sorted((ROOT / "benchmarks").rglob("*.py")),
]
# What Windows lacks.
MODULES = ("fcntl", "grp", "posix", "pwd", "resource", "termios", "tty")
NAMES = {
    "os": {"fork", "sched_getaffinity", "O_DIRECTORY", "geteuid", "getuid", "setsid", "killpg", "mkfifo", "getpgid"},
    "signal": {"SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "alarm", "setitimer"},
}

WALK = """
import builtins, importlib, os, pkgutil, signal, sys
import accelerate, av, datasets, matplotlib.figure, peft, torch.distributed.nn, torchvision.transforms.v2, typer
import torch.utils.tensorboard
from transformers import CLIPVisionModelWithProjection, Trainer, pipeline
try:
    import gradio
except ImportError:
    pass

modules, names = eval(sys.argv[1])
load = builtins.__import__

def hide(name, globals=None, *rest):
    if name in modules and str((globals or {}).get("__name__", "")).startswith("umt_hf"):
        raise ModuleNotFoundError(f"No module named {name!r}")
    return load(name, globals, *rest)

builtins.__import__ = hide
for owner, hidden in names.items():
    for name in hidden:
        vars(sys.modules[owner]).pop(name, None)
import umt_hf

found = ["umt_hf"]
for module in pkgutil.walk_packages(umt_hf.__path__, "umt_hf."):
    if module.name.startswith("umt_hf.demo") and "gradio" not in sys.modules:
        continue
    importlib.import_module(module.name)
    found.append(module.name)
from umt_hf.finetuning.trainer import log_peak_memory
from umt_hf.runs.disk import write_text

log_peak_memory()
write_text(sys.argv[2], "kept")
print(len(found))
"""


def test_every_module_imports_without_what_windows_lacks(tmp_path):
    command = [sys.executable, "-c", WALK, repr((MODULES, NAMES)), str(tmp_path / "file")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.splitlines()[-1]) > 90 and (tmp_path / "file").read_text(encoding="utf-8") == "kept"


def test_what_windows_lacks_is_asked_for_first():
    """`hasattr(os, name)`, or `getattr` with a default, stands before each use."""
    found = []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner, name = node.value.id, node.attr
                if name in NAMES.get(owner, ()) and f'hasattr({owner}, "{name}")' not in text:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno} {owner}.{name}")
    assert found == []


def list_texts_without_encoding(path: Path) -> Iterator[str]:
    """Calls that read or write text in the encoding of whatever system runs them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        function, keywords = node.func, {keyword.arg: keyword.value for keyword in node.keywords}
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        owner = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ""
        is_text = name in ("read_text", "write_text") and bool(owner)
        if name == "open" and owner not in ("av", "Image", "os") and "opener" not in owner:
            given = node.args[0 if owner else 1 :]
            mode = keywords.get("mode", given[0] if given else ast.Constant("r"))
            is_text = "b" not in ast.unparse(mode)
        if owner == "subprocess":
            is_text = bool(keywords.keys() & {"text", "universal_newlines"})
        if name in ("fdopen", "TextIOWrapper", "NamedTemporaryFile", "TemporaryFile"):
            is_text = "b" not in ast.unparse(keywords.get("mode", ast.Constant("wb" if "Temp" in name else "r")))
        if is_text:
            yield f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(function)}"


def test_texts_are_utf_8_everywhere():
    assert len(SOURCES) > 100
    found = [line for path in SOURCES for line in list_texts_without_encoding(path)]
    assert found == []


def test_the_check_sees_texts_without_encoding(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.unit.test_portability.ROOT", tmp_path)
    lines = ["open('a')", "path.open('w')", "path.read_text()", "subprocess.run(words, text=True)", "os.fdopen(1)"]
    lines += ["open('a', 'rb')", "path.open(mode='wb')", "write_text(path, text)", "av.open(path)"]
    (tmp_path / "some.py").write_text("\n".join(lines), encoding="utf-8")
    found = list(list_texts_without_encoding(tmp_path / "some.py"))
    assert [int(line.split(":")[1].split(" ")[0]) for line in found] == [1, 2, 3, 4, 5]


CORE = """
import json, sys, warnings
from pathlib import Path
from umt_hf.demo.settings import DemoSettings
from umt_hf.hub_cards.label_names import read_label_names
from umt_hf.moving_shapes.render import write_moving_shapes
from umt_hf.processing.processing_umt_video_text import build_tokenizer
from umt_hf.runs.config import dump_config, load_recipe, parse_config
from umt_hf.runs.disk import write_text
from umt_hf.runs.folder import MetricLog, read_metrics
from umt_hf.training import stage1
from umt_hf.training.trainer import read_former_settings

warnings.filterwarnings("error", category=EncodingWarning, module="umt_hf")
folder = Path(sys.argv[1])
sections = stage1.SECTIONS
parsed = parse_config(sections, ["--train_data", "donn\\u00e9es.csv", "--output_dir", str(folder)])
write_text(folder / "run.yaml", dump_config(dict(zip(sections, parsed))))
assert read_former_settings(folder)["train_data"] == "donn\\u00e9es.csv"
assert load_recipe(str(folder / "run.yaml"))["data"]["train_data"] == "donn\\u00e9es.csv"
log = MetricLog(folder / "metrics.jsonl")
log.write(1, {"loss": 1.0})
assert read_metrics(folder / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]
(folder / "labels.txt").write_bytes("\\u00e9t\\u00e9\\n\\u96ea\\n".encode())
assert read_label_names(str(folder / "labels.txt"), 2) == ["\\u00e9t\\u00e9", "\\u96ea"]
DemoSettings().save(folder / "demo.json")
DemoSettings.load(folder / "demo.json", {})
write_moving_shapes(folder / "shapes", num_train_clips=1, num_validation_clips=1, num_test_clips=1)
print("done")
"""


def test_no_text_depends_on_the_locale(tmp_path):
    """In the C locale without Python's own cure, and with Python's warning of a missing encoding as an error."""
    environment = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONWARNDEFAULTENCODING": "1"}
    command = [sys.executable, "-c", CORE, str(tmp_path)]
    options = {"cwd": ROOT, "env": os.environ | environment, "capture_output": True, "timeout": 300}
    done = subprocess.run(command, **options, text=True, encoding="utf-8", errors="replace")
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stderr[-3000:]


MARK = b"\xef\xbb\xbf"


def test_byte_order_marks_are_understood(tmp_path):
    """Editors of Windows put one before the text of whatever file a user hands in."""
    (tmp_path / "recipe.yaml").write_bytes(MARK + b"training: {learning_rate: 0.5}\n")
    assert load_recipe(str(tmp_path / "recipe.yaml")) == {"training": {"learning_rate": 0.5}}
    (tmp_path / "labels.json").write_bytes(MARK + json.dumps(["a", "é"], ensure_ascii=False).encode())
    assert read_label_names(str(tmp_path / "labels.json"), 2) == ["a", "é"]
    (tmp_path / "demo.json").write_bytes(MARK + b'{"video_text": "folder"}')
    assert DemoSettings.load(tmp_path / "demo.json", {}).video_text == "folder"
    words = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n"
    (tmp_path / "vocab.txt").write_bytes(MARK + words.encode())
    assert build_tokenizer(str(tmp_path / "vocab.txt"), max_length=4).convert_tokens_to_ids("[PAD]") == 0


@pytest.mark.parametrize(
    "name", ["a:b.mp4", 'what?"*<>|.mp4', "back\\slash.mp4", "tab\there.mp4", "é雪.mp4", "a. .mp4"]
)
def test_names_of_features_are_names_on_windows(tmp_path, name):
    file = name_features(tmp_path, str(tmp_path / name))
    assert not set(file.name) & set('<>:"/\\|?*') and min(map(ord, file.name)) >= 32
    assert file.parent == tmp_path and not file.name.endswith((".", " "))
    assert file != name_features(tmp_path, str(tmp_path / "other" / name))
