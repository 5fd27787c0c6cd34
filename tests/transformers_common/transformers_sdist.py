"""Transformers' own common tests, at the version that is installed.

The wheel carries no tests, but the source distribution has the mixins that every model of Transformers passes
(`tests/test_*.py`). `import_common_tests` fetches them once through pip, keeps them in the user's cache, and imports
them. What those files import from folders that the source distribution leaves out is replaced by `STAND_INS`.
"""

import functools
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import deque
from pathlib import Path
from types import ModuleType

import pytest
import transformers
from filelock import FileLock
from transformers import testing_utils

PACKAGE = "transformers_common_tests"
CACHE_DIR = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "umt_hf" / "tests"


class SourceUnavailableError(RuntimeError):
    """The source distribution is neither cached nor can be downloaded."""


class ExportTesterMixin:
    """Base of `ModelTesterMixin` in newer versions, for Transformers' exporters; its tests are not distributed."""


class GenerationTesterMixin:
    """Asked for with `issubclass` alone: the tests of models that can `generate` inherit it, ours must not."""


# Every field that all configs share, away from its default: what `ConfigTester` expects a config to keep.
CONFIG_COMMON_KWARGS = {
    "architectures": ["UMTVideoModel"],
    "chunk_size_feed_forward": 5,
    "dtype": "float16",
    "id2label": {0: "walking"},
    "is_encoder_decoder": True,
    "label2id": {"walking": 0},
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
}

STAND_INS = {
    "exporters.test_export": {"ExportTesterMixin": ExportTesterMixin},
    "generation.test_utils": {"GenerationTesterMixin": GenerationTesterMixin},
    "utils.test_configuration_utils": {"config_common_kwargs": CONFIG_COMMON_KWARGS},
}


def import_common_tests(name: str) -> ModuleType:
    """Import one file of Transformers' common tests; skip the test file that asks where it cannot be had.

    Args:
        name: Module name without package or suffix, for example `"test_modeling_common"`.
    """
    source, reason = locate_common_tests()
    if source is None:
        pytest.skip(reason, allow_module_level=True)
    if PACKAGE not in sys.modules:
        register_package(source)
    return importlib.import_module(f"{PACKAGE}.{name}")


@functools.cache
def locate_common_tests() -> tuple[Path | None, str]:
    """Folder with the common tests of the installed Transformers, or `None` and the reason."""
    try:
        return fetch_common_tests(transformers.__version__, CACHE_DIR), ""
    except SourceUnavailableError as error:
        return None, str(error)


def fetch_common_tests(version: str, cache_dir: Path) -> Path:
    """Return the cached common tests of one Transformers version, downloading them first where they are missing.

    Raises:
        SourceUnavailableError: If pip cannot get the source distribution (no network, no such release).
    """
    folder = cache_dir / f"transformers-{version}"
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir / "transformers.lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
                archive = download_source(version, Path(scratch))
                # Renamed when complete, so that an interrupted run leaves no half-filled cache behind.
                extract_common_tests(archive, Path(scratch) / "tests").rename(folder)
    return folder


def download_source(version: str, folder: Path) -> Path:
    """Download the source distribution of `version` into `folder` with this environment's pip."""
    if importlib.util.find_spec("pip") is None:
        raise SourceUnavailableError("pip fetches Transformers' common tests: install it with the `dev` extra")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=transformers"]
    command += ["--retries=1", f"--dest={folder}", f"transformers=={version}"]
    outcome = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    archives = list(folder.glob("transformers-*.tar.gz"))
    if outcome.returncode != 0 or len(archives) != 1:
        last_lines = " ".join(deque(outcome.stdout.strip().splitlines(), maxlen=2))
        raise SourceUnavailableError(f"no source distribution of transformers {version}: {last_lines}")
    return archives[0]


def extract_common_tests(archive: Path, folder: Path) -> Path:
    """Write the files `tests/test_*.py` of a source distribution into a new `folder`, as a package."""
    folder.mkdir()
    (folder / "__init__.py").touch()
    with tarfile.open(archive) as source:
        for member in source:
            if member.isfile() and re.fullmatch(r"[^/]+/tests/test_\w+\.py", member.name):
                (folder / Path(member.name).name).write_bytes(source.extractfile(member).read())
    return folder


def register_package(source: Path) -> None:
    """Make the fetched folder importable as `PACKAGE`, with the stand-ins in place."""
    package = ModuleType(PACKAGE)
    package.__path__ = [str(source)]
    sys.modules[PACKAGE] = package
    for name, content in STAND_INS.items():
        module = ModuleType(f"{PACKAGE}.{name}")
        vars(module).update(content)
        sys.modules[module.__name__] = module


def list_marks() -> set[str]:
    """Names of the pytest marks that the common tests put on their methods, directly or by a decorator."""
    source, _ = locate_common_tests()
    files = [Path(testing_utils.__file__), *(source.glob("*.py") if source else [])]
    return {name for file in files for name in re.findall(r"\bmark\.(\w+)", file.read_text(encoding="utf-8"))}
