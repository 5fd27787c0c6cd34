"""What a run lets see of itself, and reads that never end: whole runs, in processes of their own."""

import itertools
import json
import logging
import os
import re
import signal
import time
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from tests.e2e.mistakes import read_error, run_script
from tests.e2e.runs import assert_same_weights, read_losses
from tests.faults.kill import list_orphans
from tests.processes import CONTEXT, START_METHOD, build_environment, read_output, run_ranks, start_process
from umt_hf.runs import mistakes
from umt_hf.runs.folder import read_metrics
from umt_hf.training import clips, stage1

NUMBERS = {
    "loss", "uta_loss", "grad_norm", "learning_rate", "clips_per_second", "step_seconds", "data_wait_share",
    "data_wait_share_max", "loss_spread", "memory_gib", "epoch", "skipped_videos", "nonfinite_steps",
}  # fmt: skip
LINE = re.compile(
    r"Step 4 of 4: epoch 0\.67, loss \d\.\d+, gradient norm \S+, lr \S+, \d+\.\d clips/s, \S+ s/step, data wait \d+%, "
    r"\d+\.\d\d GiB, 0 skipped, 0 not finite"
)


def test_numbers_of_an_interval_are_in_the_log_and_in_a_line(flags, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    stage1.main(flags(max_steps=4, logging_steps=2, save_steps=2))
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == [2, 4]
    assert [line.keys() - {"step", "time", "save_seconds"} for line in trained] == [NUMBERS] * 2
    assert "save_seconds" not in trained[0] and trained[1]["save_seconds"] > 0
    assert all(datetime.fromisoformat(line["time"]).tzinfo is not None for line in lines)
    assert trained[0]["time"] <= trained[1]["time"] and [line["epoch"] for line in trained] == [8 / 24, 16 / 24]
    assert all(0 < line["grad_norm"] < 1000 and 0.05 < line["memory_gib"] < 64 for line in trained)
    said = [record.getMessage() for record in caplog.records if record.name.endswith("run_log")]
    assert len(said) == 3 and LINE.fullmatch(said[1].replace(f", save {trained[1]['save_seconds']:.1f} s", "")), said
    assert re.fullmatch(r"Step 4, held out: eval_loss \d\.\d+, eval_uta_loss \d\.\d+", said[2])


def test_the_share_of_a_peak_is_logged_where_the_peak_is_known(flags, tmp_path):
    """Counting leaves no trace in what is trained, dropout included."""
    common = {"max_steps": 3, "drop_path_rate": 0.2, "validation_data": None}
    stage1.main(flags(output_dir=tmp_path / "plain", **common))
    stage1.main(flags(peak_tflops=0.01, **common))
    for line in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        assert 0 < line["mfu"] < line["mfu_with_teacher"] < 10
    assert read_losses(tmp_path / "run") == read_losses(tmp_path / "plain")
    assert_same_weights(tmp_path / "run", tmp_path / "plain")


def test_a_profile_of_the_main_process(flags, tmp_path):
    run_ranks(stage1.main, flags(max_steps=9, profile=True, validation_data=None, per_device_train_batch_size=2))
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    events = [event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]]
    assert trace.name == "steps-6-8.json" and sum(name.startswith("ProfilerStep#") for name in events) >= 3
    assert any("addmm" in name for name in events)


def test_each_unreadable_video_is_named_once_by_all_processes(flags, shapes, tmp_path):
    """Over epochs, in two processes, in the held-out data, and after the run was started again."""
    rows = [f"{shapes}/{row}" for row in (shapes / "train.csv").read_text().splitlines()]
    broken = [tmp_path / f"broken {number}.mp4" for number in range(4)]
    for path in broken:
        path.write_bytes(b"no video")
    (tmp_path / "train.csv").write_text("".join(f"{row}\n" for row in [f"{path},0" for path in broken[:3]] + rows[3:]))
    (tmp_path / "held_out.csv").write_text(f"{broken[3]},0\n" + "".join(f"{row}\n" for row in rows[:5]))
    common = {"train_data": tmp_path / "train.csv", "validation_data": tmp_path / "held_out.csv", "eval_steps": 3}
    common |= {"max_skipped_ratio": 0.9, "save_steps": 5}
    said = [run_ranks(stage1.main, flags(max_steps=10, **common)).stderr]
    arguments = flags(max_steps=15, **common, resume_from_checkpoint="auto", allow_schedule_change=True)
    said.append(run_ranks(stage1.main, arguments).stderr)
    listed = (tmp_path / "run" / "unreadable.txt").read_text().splitlines()
    assert sorted(line.split(":")[0] for line in listed) == sorted(map(str, broken))
    for path in broken:
        assert ["".join(said).count(f"{path}: "), said[0].count(f"{path}: ")] == [1, 1], path
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-2]["skipped_videos"] >= 9


# Workers are then children of the run, and know what is patched in it.
FORKED = {START_METHOD: "fork"}


def run_on_a_disk_that_does_not_answer(words: list[str]) -> None:
    """Stage 1, whose workers wait for ever for a file of a certain name."""
    read = clips.read_clip

    def wait_or_read(source, *arguments, **options):
        while "stuck" in str(source):
            time.sleep(1)
        return read(source, *arguments, **options)

    clips.read_clip = wait_or_read
    run_script("training.stage1", words)


def test_a_file_that_never_comes_ends_the_run_and_is_named_with_the_step(flags, shapes, tmp_path):
    """As on a network disk that does not answer."""
    rows = [f"{shapes}/{row}" for row in (shapes / "train.csv").read_text().splitlines()]
    stuck = tmp_path / "stuck.mp4"
    (tmp_path / "train.csv").write_text("".join(f"{row}\n" for row in [*rows[:8], f"{stuck},0", *rows[9:]]))
    arguments = flags(
        train_data=tmp_path / "train.csv", validation_data=None, dataloader_num_workers=2, max_steps=1000,
        dataloader_timeout_seconds=3, per_device_train_batch_size=2, save_steps=1,
    )  # fmt: skip
    began = time.monotonic()
    said = read_error(
        run_ranks(run_on_a_disk_that_does_not_answer, arguments, exit_code=4, environment=FORKED, num_processes=1)
    )
    assert said.startswith("Error: Step ")
    assert time.monotonic() - began < 60
    assert re.search(rf"Step \d+: No data came for 3 s \(--dataloader_timeout_seconds\); being read: {stuck} \(", said)


def stop_reading(rank: int, words: list[str]) -> None:
    """Stage 1, one of whose processes has a worker that waits for ever for its fourth file."""
    read, numbers = clips.read_clip, itertools.count(1)

    def wait_or_read(source, *arguments, **options):
        while os.environ["RANK"] == str(rank) and next(numbers) > 3:
            time.sleep(600)
        return read(source, *arguments, **options)

    clips.read_clip = wait_or_read
    run_script("training.stage1", words, patience=mistakes.SECONDS_TO_BE_STOPPED)


@pytest.mark.parametrize("rank", [0, 1])
def test_of_two_processes_one_waits_for_a_file_and_both_end_soon(flags, tmp_path, rank):
    """The process with the file names it, the other one the step, each at the end of its own output."""
    arguments = flags(
        validation_data=None, dataloader_num_workers=1, max_steps=1000, dataloader_timeout_seconds=3,
        per_device_train_batch_size=2, ddp_timeout_seconds=20,
    )  # fmt: skip
    began = time.monotonic()
    said = run_ranks(stop_reading, rank, arguments, exit_code=4, environment=FORKED, timeout=60).stderr
    assert time.monotonic() - began < 40 and "Traceback" not in said
    prefix = "Process 1: " if rank else ""
    assert re.search(rf"^{prefix}Error: Step \d+: No data came for 3 s .*read: \S+\.mp4 \(", said, re.MULTILINE), said
    assert re.search(rf"Error: Process {1 - rank} waited in vain for another one at step \d+: ", said)


def start(arguments: list[str], tmp_path: Path):
    output = tmp_path / "output"
    environment = build_environment(0, 1, 0) | FORKED
    return start_process(run_script, "training.stage1", arguments, environment=environment, output=output), output


def wait_for_losses(run: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while not ((run / "metrics.jsonl").exists() and len(read_losses(run)) >= count):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "words"), [("SIGSTOP", "No data came for 3 s"), ("SIGKILL", "DataLoader worker (pid")]
)
def test_a_worker_that_stops_or_dies_ends_the_run_and_its_file_is_named(flags, tmp_path, number, words):
    arguments = flags(
        validation_data=None, dataloader_num_workers=1, max_steps=5000, dataloader_timeout_seconds=3, logging_steps=1
    )
    process, output = start(arguments, tmp_path)
    wait_for_losses(tmp_path / "run", 2)
    children = psutil.Process(process.pid).children()
    (worker,) = [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]
    began = time.monotonic()
    os.kill(worker.pid, getattr(signal, number))
    process.join(40)
    said = read_output(output).stderr
    assert process.exitcode == 4 and time.monotonic() - began < 35, said[-3000:]
    assert "Traceback" not in said
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    last = said.strip().splitlines()[-1]
    assert re.search(r"Error: Step \d+: ", last) and words in last and re.search(r"read: \S+\.mp4 \(worker ", last)


TRACKERS = {"tensorboard": "events.out.tfevents*", "wandb": "run-*.wandb", "trackio": "*.db"}


@pytest.mark.parametrize("tracker", TRACKERS)
def test_trackers_start_and_get_the_numbers(tracker, flags, tmp_path):
    """On this machine alone: wandb offline, trackio in its own folder."""
    pytest.importorskip(tracker, reason=f"{tracker} is not installed; `make test-extras` installs it")
    folder = tmp_path / "tracked"
    environment = {
        "WANDB_MODE": "offline", "WANDB_DIR": str(folder), "WANDB_SILENT": "true", "TRACKIO_DIR": str(folder),
        "TRACKIO_SHOW_DASHBOARD": "0",
    }  # fmt: skip
    folder.mkdir()
    arguments = flags(max_steps=2, report_to=tracker, validation_data=None)
    run_ranks(stage1.main, arguments, num_processes=1, environment=environment, timeout=120)
    assert len(read_losses(tmp_path / "run")) == 2
    written = [*folder.rglob(TRACKERS[tracker]), *(tmp_path / "run").rglob(TRACKERS[tracker])]
    assert written and any(path.stat().st_size for path in written)
    if tracker != "trackio":  # a database, which compresses nothing, too; but it keeps its log beside it
        assert any(b"grad_norm" in path.read_bytes() for path in written)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataloader_num_workers": 0, "dataloader_prefetch_factor": 3}, "dataloader_prefetch_factor has no effect"),
        ({"dataloader_num_workers": 1, "dataloader_prefetch_factor": 0}, "must be at least 1"),
        ({"dataloader_num_workers": 0, "dataloader_persistent_workers": True}, "dataloader_persistent_workers has no"),
        ({"dataloader_timeout_seconds": -1}, "dataloader_timeout_seconds must be at least 0"),
        ({"peak_tflops": 0}, "peak_tflops must be above 0"),
        ({"profile": True, "max_steps": 4}, "--profile needs 8 steps, and the run has 4 left"),
    ],
)
def test_flags_that_cannot_have_an_effect_are_refused(flags, changes, message):
    with pytest.raises(ValueError, match=message):
        stage1.main(flags(**changes))


def test_workers_of_the_held_out_data_stay(flags, tmp_path, monkeypatch):
    """And read ahead as far as asked; figures are the same."""
    seen = []
    original = stage1.build_loader

    def build(*arguments, **options):
        seen.append((options["prefetch_factor"], options["persistent_workers"], options["timeout_seconds"]))
        return original(*arguments, **options)

    monkeypatch.setattr(stage1, "build_loader", build)
    common = {"max_steps": 4, "eval_steps": 1, "dataloader_num_workers": 1}
    stage1.main(flags(output_dir=tmp_path / "plain", **common))
    assert seen[0] == (None, False, 600) and len(seen) == 5
    seen.clear()
    stage1.main(flags(dataloader_persistent_workers=True, dataloader_prefetch_factor=3, **common))
    assert seen == [(3, False, 600), (3, True, 600)]
    one, other = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "plain"))
    assert [(line.get("loss"), line.get("eval_loss")) for line in one] == [
        (line.get("loss"), line.get("eval_loss")) for line in other
    ]


def train_with_a_fork_server(words: list[str]) -> None:
    os.setsid()
    CONTEXT.set_forkserver_preload([])  # what the tests have in theirs takes long to import
    run_script("training.stage1", words)


@pytest.mark.slow
def test_workers_that_are_not_forked_end_with_a_killed_run(flags, tmp_path):
    """From Python 3.14 on a worker's parent is the fork server, which lives as long as the worker does."""
    arguments = flags(validation_data=None, dataloader_num_workers=1, max_steps=5000)
    environment = build_environment(0, 1, 0) | {START_METHOD: "forkserver"}
    process = start_process(train_with_a_fork_server, arguments, environment=environment, output=tmp_path / "output")
    wait_for_losses(tmp_path / "run", 2)
    process.kill()
    process.join()
    assert list_orphans([process.pid]) == []
