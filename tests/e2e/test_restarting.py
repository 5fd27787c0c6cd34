"""The loop of docs/pretraining.md that starts a run again, as it stands on the page."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.runs import read_losses
from tests.processes import ROOT
from umt_hf.training import stage1


def run_loop(folder: Path, command: str, **variables: str) -> subprocess.CompletedProcess:
    """Run the loop, with commands in place of `umt-hf` and `sleep`."""
    (found,) = re.findall(r"^```sh\n(.*?)^```", (ROOT / "docs/pretraining.md").read_text(), re.MULTILINE | re.DOTALL)
    for name, text in (("umt-hf", command), ("sleep", 'echo "slept $1" >> "$UMT_HF_TEST_FOLDER/slept"')):
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "UMT_HF_TEST_FOLDER": str(folder),
        **variables,
    }
    return subprocess.run(["sh", "-c", found], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


# Takes the next of the codes in a file.
NEXT_CODE = (
    'cd "$UMT_HF_TEST_FOLDER"; code=$(head -n 1 codes); tail -n +2 codes > rest; mv rest codes; echo x >> starts; '
    "exit $code"
)


@pytest.mark.parametrize(
    ("codes", "code", "starts", "pauses"),
    [
        ([0], 0, 1, 0),
        ([143, 143, 0], 0, 3, 0),
        ([137, 4, 143, 0], 0, 4, 2),
        ([2, 0], 2, 1, 0),
        ([4, 3, 0], 3, 2, 1),
        ([143] * 12 + [4] * 12, 4, 22, 9),
    ],
    ids=["finished", "asked to end", "killed", "mistaken", "diverged", "fails for ever"],
)
def test_which_ends_start_a_run_again(tmp_path, codes, code, starts, pauses):
    (tmp_path / "codes").write_text("".join(f"{own}\n" for own in codes))
    assert run_loop(tmp_path, NEXT_CODE).returncode == code
    assert len((tmp_path / "starts").read_text().splitlines()) == starts
    slept = (tmp_path / "slept").read_text().splitlines() if pauses else []
    assert slept == ["slept 30"] * pauses


@pytest.mark.slow
def test_a_killed_run_is_started_again_and_goes_on_to_the_same_losses(flags, tmp_path):
    common = {"max_steps": 5, "save_steps": 1, "save_total_limit": 2, "validation_data": None}
    stage1.main(flags(output_dir=tmp_path / "whole", **common))
    (tmp_path / "flags").write_text("\n".join(flags(**common)))
    command = f'exec {sys.executable} -m tests.e2e.restarted "$@"'
    done = run_loop(tmp_path, command, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert len((tmp_path / "starts").read_text().splitlines()) == 2
    assert "Resuming from" in done.stderr and "checkpoint-2 at step 2" in done.stderr
    assert read_losses(tmp_path / "run") == read_losses(tmp_path / "whole")
