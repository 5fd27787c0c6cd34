"""What is wrong with a run that was killed and went on, beside one that never stopped."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.faults.cases import NUM_STEPS, OF_A_RANK, SAVING, Case
from umt_hf.runs.disk import LOCK_FILE
from umt_hf.runs.folder import DELETED_SUFFIX, METRICS_FILE, REPLACED_SUFFIX, UNFINISHED_SUFFIX

STATE_FILE = "trainer_state.json"
WEIGHTS_FILE = "model.safetensors"
PARTS = (UNFINISHED_SUFFIX, DELETED_SUFFIX, REPLACED_SUFFIX)
CHECKPOINT = re.compile(r"checkpoint-\d+")
# Other numbers of processes add gradients in another order.
WEIGHTS_TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}
BAD = (
    "other loss",
    "step missing or twice",
    "other weights",
    "half checkpoint",
    "left over",
    "hang",
    "unclear last line",
    "failed",
)


@dataclass
class Findings:
    """What is wrong, in the words of `BAD`, with where."""

    found: list[tuple[str, str]] = field(default_factory=list)

    def add(self, kind: str, where: str) -> None:
        """Note one."""
        assert kind in BAD
        self.found.append((kind, where))

    def count(self, kind: str) -> int:
        """How many there are of a kind."""
        return sum(own == kind for own, _ in self.found)


def read_steps(folder: Path, form: str) -> list[tuple[int, dict[str, float]]]:
    """Losses by name, of each line of a run's log in its order; a line that is cut off counts as a step -1."""
    if form == "finetuning":
        lines = json.loads((folder / STATE_FILE).read_text())["log_history"]
        return [(line["step"], {"loss": line["loss"]}) for line in lines if "loss" in line]
    steps = []
    for text in (folder / METRICS_FILE).read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            line = {"step": -1, "loss": math.nan}
        if "loss" in line:
            names = [name for name in line if name == "loss" or name.endswith("_loss")]
            steps.append((line["step"], {name: line[name] for name in names}))
    return steps


def check_finished(case: Case, run: Path, whole: Path, findings: Findings, num_steps: int = NUM_STEPS) -> None:
    """Compare a run that was killed, went on and finished.

    Args:
        case: What it is.
        run: Its folder.
        whole: Of the run that never stopped, which has kept all of its checkpoints.
        findings: Get what is wrong.
        num_steps: Steps of both.
    """
    if case.form == "shards":
        _check_bytes(run, whole, findings)
    else:
        _check_losses(case, run, whole, findings, num_steps)
        check_weights(run / WEIGHTS_FILE, whole / WEIGHTS_FILE, case.tolerance, findings)
        check_checkpoints(case, run, whole, findings)
        kept = {f"checkpoint-{step}" for step in range(num_steps - SAVING["save_total_limit"] + 1, num_steps + 1)}
        there = {path.name for path in run.iterdir() if CHECKPOINT.fullmatch(path.name)}
        for name in sorted(kept ^ there):
            findings.add("left over" if name in there else "half checkpoint", f"{run / name}")
    _check_names(run, whole, findings)


def _check_losses(case: Case, run: Path, whole: Path, findings: Findings, num_steps: int) -> None:
    steps, expected = read_steps(run, case.form), dict(read_steps(whole, case.form))
    numbers = [step for step, _ in steps]
    if numbers != list(range(1, num_steps + 1)):
        findings.add("step missing or twice", f"{run}: {numbers}")
    for step, losses in steps:
        other = expected.get(step)
        if other is None:
            continue
        is_equal = losses.keys() == other.keys() and all(
            math.isclose(losses[name], other[name], rel_tol=0, abs_tol=case.tolerance) for name in losses
        )
        if not is_equal:
            findings.add("other loss", f"{run}: step {step}: {losses} instead of {other}")


def check_weights(file: Path, other: Path, tolerance: float, findings: Findings) -> None:
    """Compare two files of weights: to the last bit, or within what the order of sums may change."""
    options = WEIGHTS_TOLERANCE if tolerance else {"atol": 0, "rtol": 0}
    try:
        one, two = load_file(file), load_file(other)
        assert one.keys() == two.keys(), "other names"
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, two[name], **options, msg=lambda text, name=name: f"{name}: {text}")
    except Exception as error:  # whatever a damaged file makes of it
        findings.add("other weights", f"{file}: {' '.join(str(error).split())[:300]}")


def check_checkpoints(case: Case, run: Path, whole: Path, findings: Findings) -> None:
    """Look at everything that has the name of a checkpoint: whether it has all files, and the weights of its step.

    Args:
        case: What it is.
        run: Folder of a run that was killed at any moment, or has finished.
        whole: Of the run that never stopped.
        findings: Get what is wrong.
    """
    if case.form == "shards":
        for path in (path for path in run.glob("*.tar") if path.read_bytes() != (whole / path.name).read_bytes()):
            findings.add("half checkpoint", str(path))
        return
    for folder in (path for path in run.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)):
        needed = {name for name in list_files(whole / folder.name) if not Path(name).name.startswith(OF_A_RANK)}
        if missing := needed - list_files(folder):
            findings.add("half checkpoint", f"{folder}: without {sorted(missing)[:5]}")
            continue
        partial = Findings()
        check_weights(folder / WEIGHTS_FILE, whole / folder.name / WEIGHTS_FILE, case.tolerance, partial)
        for _, where in partial.found:
            findings.add("half checkpoint", where)


def list_files(folder: Path) -> set[str]:
    """Names of the files in a folder and below."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def _check_bytes(run: Path, whole: Path, findings: Findings) -> None:
    for name in sorted(list_files(whole)):
        if Path(name).name.startswith(LOCK_FILE):
            continue
        if not (run / name).is_file():
            findings.add("step missing or twice", f"{run / name} is missing")
        elif (run / name).read_bytes() != (whole / name).read_bytes():
            findings.add("other weights", f"{run / name}")


def _check_names(run: Path, whole: Path, findings: Findings) -> None:
    def list_own(names: Iterable[str]) -> set[str]:
        own = {name for name in names if not CHECKPOINT.fullmatch(name.split("/")[0])}
        return {name for name in own if not Path(name).name.startswith(LOCK_FILE)}

    for path in (path for path in run.rglob("*") if path.name.endswith(PARTS)):
        findings.add("left over", str(path))
    for name in sorted(list_own(list_files(run)) - list_own(list_files(whole))):
        if not any(part.endswith(PARTS) for part in Path(name).parts):
            findings.add("left over", f"{run / name}")
    for name in sorted(list_own(list_files(whole)) - list_own(list_files(run))):
        findings.add("step missing or twice", f"{run / name} is missing")
