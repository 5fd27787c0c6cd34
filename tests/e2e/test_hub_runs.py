"""Runs that push to the Hub as they go: whatever it does, they end well, and in the end it has their last state."""

import hashlib
import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download
from safetensors.torch import load_file

from tests.hub.server import TOKEN
from umt_hf import UMTVideoModel, UMTVideoProcessor
from umt_hf.hub_cards.publishing import PublishingError
from umt_hf.runs.folder import read_metrics
from umt_hf.training import background_push as hub_module
from umt_hf.training import stage1

from .conftest import ROOT

REPO = "me/run"


@pytest.fixture
def run(flags, tmp_path):
    """A run of three steps that pushes every save."""

    def start(**changes):
        stage1.main(flags(push_to_hub="true", **{"hub_model_id": REPO, "max_steps": 3, "save_steps": 1, **changes}))
        return tmp_path / "run"

    return start


def hash_weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def list_titles(hub) -> list[str]:
    return [commit.title for commit in hub.repo(REPO).commits.values()][1:]


def test_a_failing_hub_costs_nothing_but_the_push(hub, run, caplog):
    """The last state arrives when the same command runs again and the Hub is back."""
    hub.down()
    folder = run(save_total_limit=1, hub_private_repo="true")
    assert {line["step"] for line in read_metrics(folder / "metrics.jsonl")} == {1, 2, 3}
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "umt_hf" in r.name]
    assert sum("The training goes on" in message for message in warnings) == 1  # though three saves failed
    assert f"`umt-hf push {folder} {REPO} --private`" in warnings[-1]
    assert not list(folder.glob(".hub-*")) and not hub.repos
    hub.heal()
    run(resume_from_checkpoint="auto")
    assert hub.repo(REPO).find("main").files["model.safetensors"].sha256 == hash_weights(folder)
    assert UMTVideoModel.from_pretrained(REPO) and UMTVideoProcessor.from_pretrained(REPO)
    files = hub.list_files(REPO)
    assert {"run.yaml", "versions.json", "metrics.jsonl", "modeling_umt_video.py"} <= set(files)
    assert not any("checkpoint" in file or "training_state" in file for file in files)


def test_what_goes_up_is_whole_though_checkpoints_rotate_away(hub, run, monkeypatch):
    """A slow Hub: saves are overtaken by newer ones, and each that arrives is the one it says it is."""
    hub.delay(0.3, "PUT /lfs/")
    saved = {}
    push_checkpoint = hub_module.HubPush.push_checkpoint

    def watch(self, checkpoint):
        saved[f"Training in progress, {checkpoint.name}"] = hash_weights(checkpoint)
        push_checkpoint(self, checkpoint)

    monkeypatch.setattr(hub_module.HubPush, "push_checkpoint", watch)
    folder = run(save_total_limit=1)
    assert len(set(saved.values())) == 3 and [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3"]
    commits = list(hub.repo(REPO).commits.values())[1:]
    assert commits[0].title == "Training in progress, checkpoint-1"
    for commit in commits:
        expected = saved.get(commit.title, hash_weights(folder))
        assert commit.files["model.safetensors"].sha256 == expected, commit.title
    assert not list(folder.glob(".hub-*"))


@pytest.mark.parametrize("strategy", ["end", "checkpoint", "all_checkpoints"])
def test_strategies(strategy, hub, run, tmp_path):
    folder = run(hub_strategy=strategy, hub_revision="try", hub_private_repo="true")
    assert hub.repo(REPO).private and hub.list_files(REPO) == [".gitattributes"]
    folders = {path.split("/")[0] for path in hub.list_files(REPO, "try") if "/training_state/" in path}
    expected = {"end": set(), "checkpoint": {"last-checkpoint"}}
    assert folders == expected.get(strategy, {"checkpoint-1", "checkpoint-2", "checkpoint-3"})
    if strategy == "end":
        assert list_titles(hub) == ["End of training"]
    if strategy == "checkpoint":  # another machine goes on with it
        pulled = Path(snapshot_download(REPO, revision="try", local_dir=tmp_path / "pulled"))
        last = pulled / "last-checkpoint"
        run(output_dir=tmp_path / "other", resume_from_checkpoint=last, hub_model_id="me/other")
        weights, others = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "other"))
        assert all((weights[name] == others[name]).all() for name in weights)


def test_the_token_stays_secret_and_is_asked_for_first(hub, run, tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PublishingError, match="Nobody is logged in"):
        run()
    with pytest.raises(ValueError, match="epo"):
        run(hub_model_id="not/a/name")
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    caplog.set_level(logging.INFO)
    folder = run(hub_token=TOKEN, hub_strategy="checkpoint", report_to="tensorboard")
    assert "End of training" in list_titles(hub) and "HTTP Request: POST" not in caplog.text
    contents = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    contents += [file.path.read_bytes() for file in hub.repo(REPO).find("main").files.values()]
    assert not any(TOKEN.encode() in content for content in [*contents, caplog.text.encode()])


@pytest.mark.heavy
@pytest.mark.slow
def test_a_hanging_hub_does_not_keep_a_process_from_ending(hub, flags, tmp_path):
    """Bounded waiting, and exit code 0; the run ends once an upload hangs, however slow the machine is."""
    hub.delay(300, "preupload")
    hanging = tmp_path / "hanging"
    script = f"""
import time
from pathlib import Path
from umt_hf.training import background_push, stage1

finish = background_push.HubPush.finish

def finish_while_it_hangs(push):
    while not Path({str(hanging)!r}).exists():
        time.sleep(0.05)
    finish(push)

background_push.HubPush.finish = finish_while_it_hangs
background_push.FINAL_WAIT_SECONDS = 1.0
stage1.main()
"""
    arguments = flags(push_to_hub="true", hub_model_id=REPO, max_steps=1)
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        env=hub.environment(),
        stdout=subprocess.DEVNULL,
        stderr=(tmp_path / "stderr").open("w"),
        text=True,
    )
    deadline = time.monotonic() + 250
    while process.poll() is None and time.monotonic() < deadline:
        if hub.count_requests("preupload"):
            hanging.touch()
        time.sleep(0.05)
    process.kill()
    text = (tmp_path / "stderr").read_text()
    assert process.wait() == 0, text
    assert f"umt-hf push {tmp_path / 'run'} {REPO}" in text
    assert (tmp_path / "run" / "model.safetensors").is_file()
