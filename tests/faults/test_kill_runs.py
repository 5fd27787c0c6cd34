"""The fast part of `make faults` on runs: proof that its checks see what is wrong, and one run that is killed."""

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.faults import kill, kill_runs
from tests.faults.cases import CASES, NUM_STEPS, Inputs
from tests.faults.compare import BAD, Findings, check_checkpoints, check_finished
from tests.faults.kill import MOMENTS, Ended, Kill, Killer, list_orphans
from tests.processes import CONTEXT
from umt_hf.runs.folder import FINAL_FOLDER

STAGE1, PREPARE = CASES[0], next(case for case in CASES if case.form == "shards")
FINE_TUNING = next(case for case in CASES if case.form == "finetuning")
CHANGED = next(case for case in CASES if case.tolerance)


def write_model(folder: Path, step: int) -> None:
    (folder / "training_state").mkdir(parents=True)
    save_file({"weight": torch.full((3,), float(step))}, folder / "model.safetensors")
    for name in ("config.json", "training_state/counters.json", "training_state/random_states_0.pkl"):
        (folder / name).write_text("{}")


@pytest.fixture
def whole(tmp_path) -> Path:
    """What a run leaves that kept all of its checkpoints."""
    folder = tmp_path / "whole"
    for step in range(1, NUM_STEPS + 1):
        write_model(folder / f"checkpoint-{step}", step)
    for name in ("model.safetensors", "config.json"):
        shutil.copy(folder / f"checkpoint-{NUM_STEPS}" / name, folder / name)
    lines = [{"step": step, "loss": 1 / step, "uta_loss": 1 / step} for step in range(1, NUM_STEPS + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": [*lines, {"step": 10, "runtime": 1}]}))
    return folder


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """The same of one that kept two."""
    folder = shutil.copytree(whole, tmp_path / "run")
    for step in range(1, NUM_STEPS - 1):
        shutil.rmtree(folder / f"checkpoint-{step}")
    return folder


def find(run: Path, whole: Path, case=STAGE1) -> set[str]:
    findings = Findings()
    check_finished(case, run, whole, findings)
    return {kind for kind, _ in findings.found}


def change_line(run: Path, number: int, change) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[number : number + 1] = change(lines[number])
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))


def change_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["weight"][1] += 1e-6
    save_file(weights, folder / "model.safetensors")


PLANTED = {
    "other loss": lambda run: change_line(run, 3, lambda line: [line.replace("0.25", "0.2500000001")]),
    "one of its losses": lambda run: change_line(run, 3, lambda line: [line.replace('"loss": 0.25', '"loss": 0.26')]),
    "no such loss": lambda run: change_line(run, 3, lambda line: [line.replace("uta_loss", "vtc_loss")]),
    "a missing step": lambda run: change_line(run, 3, lambda line: []),
    "a step twice": lambda run: change_line(run, 3, lambda line: [line, line]),
    "a line cut off": lambda run: change_line(run, 3, lambda line: [line, line[:9]]),
    "other weights": change_weights,
    "weights cut short": lambda run: (run / "model.safetensors").write_bytes(b"half"),
    "a checkpoint without its state": lambda run: shutil.rmtree(run / "checkpoint-9" / "training_state"),
    "a checkpoint with half a file": lambda run: (run / "checkpoint-9" / "model.safetensors").write_bytes(b"half"),
    "a checkpoint with other weights": lambda run: change_weights(run / "checkpoint-9"),
    "a lost checkpoint": lambda run: shutil.rmtree(run / "checkpoint-9"),
    "an unfinished folder": lambda run: (run / "checkpoint-9.unfinished").mkdir(),
    "an unfinished final model": lambda run: (run / "final.unfinished").mkdir(),
    "a deleted folder": lambda run: (run / "checkpoint-3.deleted").mkdir(),
    "an old checkpoint": lambda run: write_model(run / "checkpoint-3", 3),
    "an unknown file": lambda run: (run / "core").touch(),
    "a missing file": lambda run: (run / "config.json").unlink(),
}
SEEN_AS = {
    "one of its losses": "other loss",
    "no such loss": "other loss",
    "a missing step": "step missing or twice",
    "a step twice": "step missing or twice",
    "a line cut off": "step missing or twice",
    "weights cut short": "other weights",
    "a checkpoint without its state": "half checkpoint",
    "a checkpoint with half a file": "half checkpoint",
    "a checkpoint with other weights": "half checkpoint",
    "a lost checkpoint": "half checkpoint",
    "a missing file": "step missing or twice",
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_of_pre_training_are_seen(run, whole, fault):
    assert find(run, whole) == set()
    PLANTED[fault](run)
    expected = fault if fault in BAD else SEEN_AS.get(fault, "left over")
    assert find(run, whole) - {"other loss" if fault == "a line cut off" else ""} == {expected}


def test_planted_faults_of_fine_tuning_are_seen(run, whole):
    assert find(run, whole, FINE_TUNING) == set()
    state = json.loads((run / "trainer_state.json").read_text())
    state["log_history"][2]["loss"] += 1e-9
    state["log_history"].append(state["log_history"][4])
    (run / "trainer_state.json").write_text(json.dumps(state))
    assert find(run, whole, FINE_TUNING) == {"other loss", "step missing or twice"}


def test_another_number_of_processes_has_a_tolerance_and_no_more(run, whole):
    change_line(run, 3, lambda line: [line.replace("0.25", "0.2500000001")])
    change_weights(run)
    assert find(run, whole, CHANGED) == set()
    change_line(run, 3, lambda line: [line.replace("0.2500000001", "0.251")])
    assert find(run, whole, CHANGED) == {"other loss"}


def test_planted_faults_of_shards_are_seen(tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    (whole / "done").mkdir(parents=True)
    for name in ("train-000000.tar", "train-000001.tar", "done/train-000000.json"):
        (whole / name).write_bytes(name.encode())
    shutil.copytree(whole, run)
    (run / ".lock-train-0").touch()
    assert find(run, whole, PREPARE) == set()
    (run / "train-000001.tar").write_bytes(b"half")
    assert find(run, whole, PREPARE) == {"other weights"}
    findings = Findings()
    check_checkpoints(PREPARE, run, whole, findings)
    assert [kind for kind, _ in findings.found] == ["half checkpoint"]
    (run / "train-000001.tar").rename(run / "train-000001.tar.unfinished")
    assert find(run, whole, PREPARE) == {"step missing or twice", "left over"}


def test_processes_that_hang_or_end_without_a_word_are_seen():
    findings, said = Findings(), "Error: Process 0 waited in vain for another one at step 3: it is gone."
    good = Ended([2, -9], [1], [], [said, ""], [said, ""], 1.0)
    kill_runs.note_end(good, "here", findings, is_finished=False)
    assert findings.found == []
    for codes, killed, hung, line, kind in (
        ([-9, -9], [1], [0], "", "hang"),
        ([1, -9], [1], [], "RuntimeError: Connection closed by peer", "unclear last line"),
        ([-9, -9], [1], [], "", "unclear last line"),
        ([2, 2], [], [], said, "failed"),
    ):
        findings = Findings()
        kill_runs.note_end(Ended(codes, killed, hung, [line, said], [line, said], 1.0), "here", findings, False)
        assert [own for own, _ in findings.found] == [kind]
    traced = f"Traceback (most recent call last):\n{said}"
    assert Ended([2, -9], [1], [], [said, ""], [traced, ""], 1.0).list_unclear() == [0]


RUN = "/run/checkpoint-3"
SAVE = [
    ("os.mkdir", f"{RUN}.unfinished"),
    ("open", f"{RUN}.unfinished/config.json"),
    ("open", f"{RUN}.unfinished/training_state/counters.json"),
    ("os.rename", f"{RUN}.unfinished", RUN),
    ("open", "/run"),
    ("os.rename", "/run/checkpoint-1", "/run/checkpoint-1.deleted"),
    ("os.remove", "config.json"),
    ("os.rmdir", "/run/checkpoint-1.deleted"),
    ("open", f"/run/{FINAL_FOLDER}.unfinished/config.json"),
]


@pytest.mark.parametrize(
    ("moment", "event", "place"),
    [("write", 1, 0), ("write", 3, 2), ("write", 9, 3), ("rename", 1, 4), ("deletion", 1, 5), ("deletion", 3, 7)]
    + [("export", 1, 8)],
)
def test_a_kill_comes_at_its_moment(tmp_path, monkeypatch, moment, event, place):
    fired = []
    killer = Killer(Kill(moment, event=event), tmp_path)
    monkeypatch.setattr(killer, "fire", lambda: fired.append(True))
    for number, (name, *arguments) in enumerate(SAVE):  # noqa: B007
        killer._note("compile", ("x",))
        killer._note(name, tuple(arguments))
        if fired:
            break
    assert fired and number == place


def test_a_kill_may_wait_for_a_later_save(tmp_path, monkeypatch):
    fired = []
    killer = Killer(Kill("write", count=2), tmp_path)
    monkeypatch.setattr(killer, "fire", lambda: fired.append(True))
    for event, *arguments in SAVE:
        killer._note(event, tuple(arguments))
    assert not fired
    killer._note("os.mkdir", ("/run/checkpoint-4.unfinished",))
    assert fired


def test_kills_depend_on_the_seed_alone_and_meet_every_moment():
    def draw(seed):
        generator = random.Random(seed)
        return [kill_runs.draw_kill(moment, 2, 5.0, generator) for moment in MOMENTS * 20]

    assert draw(1) == draw(1) != draw(2)
    assert {own.ranks for own in draw(1)} == {(0,), (1,), (0, 1)}
    assert {own.delay > 0 for own in draw(1)} == {True, False}
    assert {moment for case in CASES for moment in case.moments} == set(MOMENTS)


def test_the_cases_are_those_that_are_promised():
    """At least 60 kills, of every kind of run."""
    assert sum(case.kills for case in CASES) >= 60
    kinds = {(case.stage, case.processes, case.sharding) for case in CASES}
    for stage in ("stage 1", "stage 2"):
        for kind in (((1,), "-"), ((2,), "DDP"), ((2,), "FSDP2"), ((2, 1), "DDP")):
            assert (stage, *kind) in kinds
    assert ("classification", (2,), "DDP") in kinds and ("prepare", (2,), "-") in kinds
    assert sum(case.kills for case in kill_runs.choose_cases(26, "")) >= 26
    assert len(kill_runs.choose_cases(None, "stage 1")) == 4


def leave_a_child() -> None:
    import os
    import subprocess

    os.setsid()
    subprocess.Popen(["sleep", "60"])


def test_a_process_that_is_left_behind_is_seen():
    process = CONTEXT.Process(target=leave_a_child)
    process.start()
    process.join()
    (orphan,) = list_orphans([process.pid], seconds=0)
    kill.os.kill(orphan, signal.SIGKILL)
    assert list_orphans([process.pid], seconds=10) == []


@pytest.mark.slow
def test_a_run_that_is_killed_three_times(tmp_path):
    """Stage 1, in one process with a worker that reads."""
    case = kill_runs.choose_cases(3, STAGE1.name)[0]
    inputs = Inputs(tmp_path / "inputs").prepare()
    row = kill_runs.run_case(case, inputs, tmp_path / "case", 0, kill_runs.Wholes(inputs, tmp_path / "wholes"))
    assert row.findings.found == [] and row.kills.total() == 3 and row.rounds >= 1
    assert set(row.kills) == {"write", "rename"}
