"""The script for a GPU runs its logic on a CPU: all rows, in time, without video libraries and `datasets`."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.cuda import limits
from benchmarks.cuda import run as cuda
from benchmarks.cuda.limits import NotHere, OutOfTime, Row, measure_rows
from benchmarks.cuda.rows import Setup, list_rows

CPU = torch.device("cpu")
ROOT = Path(cuda.__file__).parents[2]
TINY = ["--device", "cpu", "--tiny", "--seconds", "1500", "--row_seconds", "0.05", "--name", "here"]


def read_rows(folder: Path) -> dict[str, dict]:
    report = json.loads((folder / "here" / "cuda.json").read_text())
    assert "output_dir" not in report["settings"]
    return {row["row"]: row for row in report["rows"]}


@pytest.mark.slow
@pytest.mark.heavy
def test_every_row_runs_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda, "choose_compiler", lambda _: "aot_eager")
    path = cuda.main([*TINY, "--output_dir", str(tmp_path)])
    rows = read_rows(tmp_path)
    assert path == tmp_path / "here" / "cuda.json"
    assert list(rows) == [row.name for row in list_rows(Setup(CPU, True, "aot_eager", 1.0))]
    for name, row in rows.items():
        if "fp8" in name and importlib.util.find_spec("torchao") is None:
            assert row["reason"] == "torchao is not installed"
            continue
        if "cuDNN" in name and row["status"] == "not run":
            assert "scaled_dot_product_attention" in row["reason"]  # cuDNN is for GPUs
            continue
        assert row["status"] == "measured", row
        if "agree" in name:
            continue
        assert row["clips_per_second"]["median"] > 0
        if "engine" in name:
            assert 0 <= row["model_share"] <= 1 and 0 <= row["waiting_share"] <= 1
        if "umt_hf" in name and "compiled" not in name:
            assert row["waits_per_step"] == 0
        if "compiled" in name:
            assert row["graphs"] >= 1 and row["recompiles"] == 0, row
    assert path.with_suffix(".md").read_text().count("\n| ") == len(rows) + 2


@pytest.mark.slow
@pytest.mark.heavy
def test_it_needs_neither_datasets_nor_a_video_library(tmp_path):
    """What the machine with the GPU may lack."""
    missing = ["datasets", "av", "decord", "evaluate", "lancedb", "torchcodec", "torchao", "bitsandbytes"]
    only = ["files to batches", "engine", "l16, 64 clips: plain", "pairs: stage 2", "fp8"]
    arguments = [*TINY, "--output_dir", str(tmp_path), "--only", *only]
    code = (
        f"import sys\nfor name in {missing}: sys.modules[name] = None\n"
        "from benchmarks.cuda import run\nrun.choose_compiler = lambda _: 'aot_eager'\n"
        f"run.main({arguments})"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=600)
    rows = read_rows(tmp_path)
    files = rows.pop("files to batches on the device")
    assert files["source"].startswith(".npy")
    assert rows.pop("b16, features of files through the engine")["reason"] == "datasets is not installed"
    for name, row in rows.items():
        expected = "torchao is not installed" if "fp8" in name else None
        assert expected == row["reason"], row
    assert len(rows) == 6


@pytest.mark.heavy
def test_a_row_that_takes_too_long_or_fails_costs_no_other_row(monkeypatch):
    def sleep() -> dict:
        try:
            time.sleep(60)
        except Exception:  # as compilers do
            return {}
        return {}

    def lack() -> dict:
        raise NotHere("needs another machine")

    rows = [Row("a", 5, lambda: {"x": 1}), Row("b", 0.2, sleep), Row("c", 9, lack), Row("d", 9, lambda: 1 / 0)]
    monkeypatch.setattr(limits, "LEAST_SECONDS", 0.1)
    began = time.perf_counter()
    found = list(measure_rows(rows, 60, CPU))
    assert time.perf_counter() - began < 20
    assert [row["status"] for row in found] == ["measured", "not run", "not run", "not run"]
    assert found[0]["x"] == 1 and found[1]["reason"] == "it took over 0 s"
    assert found[2]["reason"] == "needs another machine" and found[3]["reason"].startswith("ZeroDivisionError")
    assert not issubclass(OutOfTime, Exception)


def test_rows_for_which_no_time_is_left_are_named():
    rows = [Row("a", 5, dict), Row("b", 5, dict)]
    found = list(measure_rows(rows, 1.0, CPU))
    assert [row["reason"] for row in found] == ["no time was left"] * 2


def test_the_table_is_written_after_each_row(tmp_path, monkeypatch):
    seen = []

    def measure_two(rows, seconds, device):
        for name in ("first", "second"):
            yield {"row": name, "status": "not run", "reason": "a | b\nc", "wall_seconds": 0.0}
            seen.append(len(read_rows(tmp_path)))

    monkeypatch.setattr(cuda, "choose_compiler", lambda _: "aot_eager")
    monkeypatch.setattr(cuda, "measure_rows", measure_two)
    cuda.main([*TINY, "--output_dir", str(tmp_path)])
    assert seen == [1, 2]
    assert "a / b c" in (tmp_path / "here" / "cuda.md").read_text()


def test_without_a_gpu_it_says_how_to_try_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cpu --tiny"):
        cuda.main([])
