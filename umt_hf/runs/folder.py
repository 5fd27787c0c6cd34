"""The folder of a run or a model: names of its files, versions, the log of metrics, hashes of sources."""

import hashlib
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers

from ..version import __version__
from .mistakes import naming_full_disk

# A model, as Transformers saves it.
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"
PROCESSOR_FILE = "processor_config.json"
VIDEO_PROCESSOR_FILE = "video_preprocessor_config.json"
IMAGE_PROCESSOR_FILE = "preprocessor_config.json"
TOKENIZER_FILE = "tokenizer_config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
EXPORT_FILE = "export.json"  # of graphs for other runtimes, by Transformers
# What a run leaves beside its model.
RECIPE_FILE = "run.yaml"
VERSIONS_FILE = "versions.json"
METRICS_FILE = "metrics.jsonl"
UNREADABLE_FILE = "unreadable.txt"
TRAINER_STATE_FILE = "trainer_state.json"
TRAINER_ARGUMENTS_FILE = "training_args.bin"
STATE_FOLDER = "training_state"
COUNTERS_FILE = "counters.json"
TRAINING_DATA_FILE = "training_data.json"  # of a checkpoint of fine-tuning
FINETUNING_SHAPE_FILE = "run_shape.json"  # the same
CONVERSION_FILE = "conversion.json"
# What people read.
CARD_FILE = "README.md"
LOSS_PICTURE = "losses.png"
# An evaluation.
REPORT_FILE = "report.json"
PREDICTIONS_FILE = "predictions.json"
BOX_RESULTS_FILE = "results.csv"
BOX_PICTURE = "detections.png"
CONFUSION_PICTURE = "confusion.png"

# Names that nothing takes for the finished thing.
UNFINISHED_SUFFIX = ".unfinished"
DELETED_SUFFIX = ".deleted"
REPLACED_SUFFIX = ".replaced"
SUPERSEDED_SUFFIX = ".superseded"  # then the time at which the run went on from an earlier checkpoint
FINAL_FOLDER = "final-model"
ADAPTER_FOLDER = "adapter"


CURE_OF_DAMAGE = "Restore it, or go on from an earlier checkpoint."


def collect_versions() -> dict[str, str]:
    """Versions of what a run depends on."""
    return {
        "umt_hf": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }


def read_run_json(path: str | Path) -> Any:
    """Content of a JSON file of a run or a model.

    Raises:
        ValueError: If the file is damaged; it is named.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # also bytes that are not text
        raise ValueError(f"{path} is damaged: it cannot be read as JSON ({error}). {CURE_OF_DAMAGE}") from error


class MetricLog:
    """The run's log as JSON lines; a resumed run first drops the lines that it will write again.

    Args:
        path: File to append to.
        last_step: Step from which the run goes on.
    """

    def __init__(self, path: str | Path, last_step: int = 0):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(self.path) if line["step"] <= last_step] if last_step else []
        # Renamed into place, so that a kill never leaves half of a log.
        unfinished = self.path.with_name(self.path.name + UNFINISHED_SUFFIX)
        with naming_full_disk(self.path):
            unfinished.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8", newline="\n")
            os.replace(unfinished, self.path)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one line."""
        # JSON has no NaN or infinity.
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        with naming_full_disk(self.path), self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Lines of a run's log; the last may be cut off by a kill and is then left out.

    Raises:
        ValueError: If another one is damaged; file and line are named.
    """
    path = Path(path)
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    metrics = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            continue
        try:
            metrics.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: is not JSON ({error}). Delete the line.") from error
    return metrics


def hash_source(source: str) -> str | None:
    """SHA-256 of a file, or of the names and contents of a folder's files; `None` for a dataset of the Hub."""
    path = Path(source)
    if not path.exists():
        return None
    digest = hashlib.sha256()
    if path.is_file():
        _update(digest, path)
        return digest.hexdigest()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(str(file.relative_to(path)).encode())
        _update(digest, file)
    return digest.hexdigest()


def _update(digest: Any, path: Path) -> None:
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
