"""`umt-hf features` as a user runs it."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from datasets import load_from_disk
from safetensors.numpy import load_file
from typer.testing import CliRunner

from tests.processes import run_ranks, run_until
from tests.unit.inference.test_features import save_model
from umt_hf import cli
from umt_hf.inference.features import name_features

runner = CliRunner()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def videos(shapes, tmp_path) -> Path:
    """Eight clips, two of them in a sub-folder."""
    folder = tmp_path / "videos"
    (folder / "more").mkdir(parents=True)
    for i, video in enumerate(sorted((shapes / "videos" / "train").iterdir())[:8]):
        shutil.copy(video, (folder / "more" if i > 5 else folder) / video.name)
    return folder


def run(*arguments, exit_code: int = 0):
    result = runner.invoke(cli.app, ["features", *map(str, arguments)])
    assert result.exit_code == exit_code, result.output
    return result


def call(arguments: list[str]) -> None:
    """What a process of its own does."""
    cli.app(arguments)


def extract(*arguments) -> dict:
    return json.loads(run("--json", *arguments).stdout.splitlines()[-1])


def count(report: dict) -> tuple[int, int, int]:
    return report["num_extracted"], report["num_unchanged"], len(report["skipped"])


def read_features(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def assert_same_features(first: Path, second: Path) -> None:
    ours, expected = read_features(first), read_features(second)
    assert list(ours) == list(expected)
    for name, arrays in expected.items():
        assert ours[name].keys() == arrays.keys()
        for key, values in arrays.items():
            np.testing.assert_array_equal(ours[name][key], values)


def test_ctrl_c_says_how_to_go_on(model, videos, tmp_path, monkeypatch):
    """What was found is said before; both go to standard error."""
    out = tmp_path / "features"
    assert "8 videos found, 8 of them new or changed." in run(videos, "--model", model, "--out", out).stderr

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("umt_hf.inference.features.files._save_video", interrupt)
    shutil.copy(next(videos.glob("*.mp4")), videos / "another.mp4")
    result = run(videos, "--model", model, "--out", out, exit_code=130)
    assert "9 videos found, 1 of them new or changed." in result.stderr and not result.stdout
    assert result.stderr.endswith(f"Interrupted. What is in {out} is complete; the same command goes on from there.\n")


@pytest.mark.heavy
def test_two_processes_equal_one(model, videos, tmp_path):
    (videos / "bad.mp4").write_bytes(b"no video")
    (videos / "worse.mp4").write_bytes(b"")
    flags = ["--model", str(model), "--level", "frame", "--format", "dataset", "--json"]
    one = extract(videos, tmp_path / "gone.mp4", *flags, "--out", tmp_path / "one")
    command = ["features", str(videos), str(tmp_path / "gone.mp4"), *flags, "--out", str(tmp_path / "two")]
    result = run_ranks(call, command)
    assert json.loads(result.stdout) == one and count(one) == (8, 0, 3)
    assert_same_features(tmp_path / "one", tmp_path / "two")
    for name in ("settings.json", "skipped.json"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()
    tables = [load_from_disk(tmp_path / name / "dataset") for name in ("one", "two")]
    assert tables[0]["path"][:] == tables[1]["path"][:] and len(set(tables[0]["path"][:])) == 8


def test_killed_run_goes_on_where_it_was(model, videos, tmp_path):
    """SIGKILL once a file is there."""
    out = tmp_path / "out"
    flags = ["--model", str(model), "--level", "frame", "--stride", "1", "--batch-size", "1", "--num-workers", "1"]
    run_until(out, "*.safetensors", call, ["features", str(videos), *flags, "--out", str(out)])
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert 1 <= len(kept) < 8
    assert count(extract(videos, *flags, "--out", out)) == (8 - len(kept), len(kept), 0)
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
    extract(videos, *flags, "--out", tmp_path / "whole")
    assert_same_features(out, tmp_path / "whole")
    assert not list(out.glob("*.unfinished"))


def test_half_written_file_is_written_anew(model, videos, tmp_path):
    flags = (videos / "more", "--model", model, "--out", tmp_path / "out")
    extract(*flags)
    before = read_features(tmp_path / "out")
    damaged = sorted((tmp_path / "out").glob("*.safetensors"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-5])
    assert count(extract(*flags)) == (1, 1, 0)
    np.testing.assert_array_equal(load_file(damaged)["features"], before[damaged.name]["features"])


def test_changed_video_is_extracted_again(model, videos, tmp_path):
    flags = (videos, "--model", model, "--out", tmp_path / "out")
    assert count(extract(*flags, "--format", "dataset")) == (8, 0, 0)
    assert count(extract(*flags)) == (0, 8, 0)
    changed, other = sorted(videos.glob("*.mp4"))[:2]
    changed_file, other_file = (name_features(tmp_path / "out", str(path)) for path in (changed, other))
    before, expected = load_file(changed_file)["features"], load_file(other_file)["features"]
    assert not np.allclose(before, expected)
    changed.write_bytes(other.read_bytes())
    assert count(extract(*flags)) == (1, 7, 0)
    np.testing.assert_array_equal(load_file(changed_file)["features"], expected)
    table = load_from_disk(tmp_path / "out" / "dataset")
    rows = [row["features"] for row in table if row["path"] == str(changed)]
    np.testing.assert_array_equal(np.array(rows, np.float32), expected)


def test_video_that_became_unreadable_is_reported_and_its_features_go(model, videos, tmp_path):
    flags = (videos, "--model", model, "--out", tmp_path / "out", "--format", "dataset")
    extract(*flags)
    broken = sorted(videos.glob("*.mp4"))[0]
    whole = broken.read_bytes()
    broken.write_bytes(whole[:700])
    result = run(*flags)
    assert "0 extracted, 7 unchanged, 1 skipped" in result.output
    (entry,) = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert entry["path"] == str(broken) and len(entry["reason"]) > 10
    assert f"skipped {broken}: {entry['reason']}" in result.output
    assert not name_features(tmp_path / "out", str(broken)).exists()
    assert str(broken) not in load_from_disk(tmp_path / "out" / "dataset")["path"][:]
    broken.write_bytes(whole)
    assert count(extract(*flags)) == (1, 7, 0)
    assert json.loads((tmp_path / "out" / "skipped.json").read_text()) == []


def test_other_settings_and_models_are_refused(model, videos, tmp_path):
    flags = (videos / "more", "--out", tmp_path / "out")
    extract(*flags, "--model", model)
    other = save_model(tmp_path / "other", hidden_size=32)
    for refused in (("--model", other), ("--model", model, "--fps", 5), ("--model", model, "--level", "frame")):
        assert "made with" in clean(run(*flags, *refused, exit_code=2).output)
    moved = shutil.copytree(model, tmp_path / "moved")
    assert count(extract(*flags, "--model", moved)) == (0, 2, 0)
    assert "something other" in clean(run(videos, "--out", videos, "--model", model, exit_code=2).output)
    assert "one of" in clean(run(*flags, "--model", model, "--level", "shot", exit_code=2).output)


def test_precision_is_one_of_the_settings(model, videos, tmp_path, monkeypatch):
    flags = (videos / "more", "--model", model, "--out", tmp_path / "out")
    extract(*flags)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as `accelerate launch --mixed_precision bf16` does
    AcceleratorState._reset_state(reset_partial_state=True)
    assert "made with mixed_precision='no', not 'bf16'" in clean(run(*flags, exit_code=2).output)


def clean(output: str) -> str:
    """Undo the box and the line breaks of a usage error."""
    return re.sub(r"[\s│]+", " ", output)
