"""This version loads, reads on and resumes what every release has left on a disk, as written by tests.e2e.releases."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from tests.e2e.releases import NUM_VIDEOS, QUERY, RELEASES, compute_answers
from tests.e2e.runs import read_losses
from umt_hf import VideoSearcher, cli
from umt_hf.inference.features import name_features
from umt_hf.training import stage1
from umt_hf.training.checkpointing import list_checkpoints

pytest.importorskip("lancedb")

VERSIONS = sorted(path.name for path in RELEASES.iterdir())


@pytest.fixture(params=VERSIONS)
def release(request, tmp_path, monkeypatch) -> Path:
    """A copy of a release's files, as the current folder."""
    folder = shutil.copytree(RELEASES / request.param, tmp_path / request.param)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def expected(release) -> dict:
    return json.loads((release / "expected.json").read_text())


def run(*words: str) -> dict:
    result = CliRunner().invoke(cli.app, [*words, "--num-workers", "0", "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def test_the_first_release_is_there_and_small():
    assert "0.1.0" in VERSIONS
    for version in VERSIONS:
        assert sum(path.stat().st_size for path in (RELEASES / version).rglob("*") if path.is_file()) < 1_000_000


def test_models_and_index_answer_as_they_did(release, expected):
    answers = compute_answers(release)
    assert answers["found"] == expected["found"] and len(answers["found"]) == NUM_VIDEOS
    for name in ("features", "logits", "logits_per_video", "similarities"):
        np.testing.assert_allclose(answers[name], expected[name], atol=1e-5, rtol=0, err_msg=name)


def test_a_run_goes_on_to_the_losses_it_had(release, expected):
    """By the settings that it recorded."""
    run_folder = release / "run"
    assert [path.name for path in list_checkpoints(run_folder)] == ["checkpoint-2"]
    stage1.main(["--config", "run/run.yaml", "--resume_from_checkpoint", "auto"])
    losses = {str(step): loss for step, loss in read_losses(run_folder).items()}
    # AdamW divides small gradients by their own size: what another processor or library adds in another order grows.
    assert losses == pytest.approx(expected["losses"], abs=1e-4)
    assert (run_folder / "checkpoint-4").is_dir()


def test_features_and_indexes_are_added_to(release):
    """A video at another place is new, is encoded with the settings on the disk, and gives what is there already."""
    shutil.copy("videos/00000.mp4", "new.mp4")
    report = run("features", "new.mp4", "--model", "run", "--out", "features")
    assert (report["num_extracted"], report["skipped"]) == (1, [])
    (old,) = (release / "features").glob("00000-*.safetensors")
    stored, found = load_file(old), load_file(name_features("features", str(release / "new.mp4")))
    assert stored.keys() == found.keys()
    for name, values in stored.items():
        np.testing.assert_allclose(found[name], values, atol=1e-5, rtol=0, err_msg=name)

    report = run("embed", "new.mp4", "--model", "video_text", "--out", "index")
    assert (report["num_encoded"], report["num_in_index"]) == (1, NUM_VIDEOS + 1)
    hits = VideoSearcher("index", "video_text").search(QUERY, top_k=NUM_VIDEOS + 1)
    similarities = {Path(hit.path).name: hit.similarity for hit in hits}
    assert similarities["new.mp4"] == pytest.approx(similarities["00000.mp4"], abs=1e-5)
