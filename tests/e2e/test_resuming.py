"""One run, whatever happens to it: other processes, another batch or schedule, an older checkpoint, two disks."""

import contextlib
import functools
import json
import logging
import os
import re
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.e2e.mistakes import run_script
from tests.e2e.runs import assert_same_weights, read_losses
from tests.processes import build_environment, find_free_port, read_output, run_ranks, start_process
from umt_hf.runs.folder import read_metrics
from umt_hf.training import checkpointing, stage1
from umt_hf.training.checkpointing import list_checkpoints, read_step

# 8 videos a step.
WHOLE = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
PARTS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
TWO_PROCESSES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


def copy_run(source: Path, step: int, target: Path) -> Path:
    """A run as it was after a step."""
    shutil.copytree(source, target)
    for checkpoint in list_checkpoints(target):
        if read_step(checkpoint) > step:
            shutil.rmtree(checkpoint)
    return target


@pytest.fixture
def few(shapes, tmp_path) -> Path:
    """A list of 18 videos, whose rest of an epoch fills a small batch, and no step."""
    lines = (shapes / "train.csv").read_text().splitlines()[:18]
    (tmp_path / "few.csv").write_text("".join(f"{shapes}/{line}\n" for line in lines))
    return tmp_path / "few.csv"


def test_a_run_goes_on_to_the_same_losses_in_another_shape(flags, few, tmp_path, caplog):
    """From one process to accumulated batches to two processes and back, over the ends of epochs."""
    caplog.set_level(logging.INFO)
    common = {"train_data": few, "num_train_epochs": 5, "max_steps": None, "save_steps": 1, "validation_data": None}
    stage1.main(flags(output_dir=tmp_path / "whole", **common, **WHOLE))
    assert sorted(read_losses(tmp_path / "whole")) == list(range(1, 11))
    run = copy_run(tmp_path / "whole", 3, tmp_path / "run")

    def resume(function=stage1.main, **shape):
        function(flags(output_dir=run, resume_from_checkpoint="auto", **common, **shape))

    resume(**PARTS)
    assert "The steps take the same videos as before: 1 process(es) x 8 videos x 1 batch(es) -> " in caplog.text
    assert "other numbers of videos" not in caplog.text and "other settings" not in caplog.text
    assert read_losses(run) == pytest.approx(read_losses(tmp_path / "whole"), abs=1e-6)
    for checkpoint in list_checkpoints(run)[5:]:
        shutil.rmtree(checkpoint)
    resume(functools.partial(run_ranks, stage1.main), **TWO_PROCESSES)
    assert read_losses(run) == pytest.approx(read_losses(tmp_path / "whole"), abs=1e-6)
    for checkpoint in list_checkpoints(run)[8:]:
        shutil.rmtree(checkpoint)
    resume(**WHOLE)
    assert read_losses(run) == pytest.approx(read_losses(tmp_path / "whole"), abs=1e-6)
    assert_same_weights(tmp_path / "whole", run, atol=2e-5, rtol=1e-4)


def test_another_global_batch_goes_on_with_the_next_videos(flags, tmp_path, caplog):
    stage1.main(flags(max_steps=2, save_steps=1, **WHOLE))
    run = tmp_path / "run"
    shutil.rmtree(run / "checkpoint-2")
    smaller = WHOLE | {"per_device_train_batch_size": 4}
    state = stage1.main(flags(max_steps=2, resume_from_checkpoint="auto", **smaller))
    assert "A step takes other numbers of videos than before (1 process(es) x 8 videos" in caplog.text
    assert state.position == {"epoch": 0, "row": 12} and state.videos == 12


def test_another_length_of_the_schedule_has_to_be_asked_for(flags, tmp_path):
    stage1.main(flags(max_steps=2))
    with pytest.raises(ValueError, match="checkpoint-2 is from a run of 2 steps, and this one has 3.*--max_steps"):
        stage1.main(flags(max_steps=3, resume_from_checkpoint="auto"))
    state = stage1.main(flags(max_steps=3, resume_from_checkpoint="auto", allow_schedule_change=True))
    assert state.step == 3


def test_an_older_checkpoint_begins_a_new_line(flags, tmp_path, caplog):
    """Its saves are kept, `auto` follows it, and the later ones of the line that was given up lie aside."""
    run = tmp_path / "run"
    stage1.main(flags(max_steps=6, save_steps=2))
    arguments = {"max_steps": 6, "save_steps": 1, "save_total_limit": 2, "seed": 1}
    stage1.main(flags(resume_from_checkpoint=run / "checkpoint-2", **arguments))
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-5", "checkpoint-6"]
    aside = sorted(path.name.split(".superseded-")[0] for path in run.glob("*.superseded-*"))
    assert aside == ["checkpoint-4", "checkpoint-6"]
    assert "The run goes on from step 2: checkpoint-4, checkpoint-6 got the ending .superseded-" in caplog.text
    state = stage1.main(flags(resume_from_checkpoint="auto", **arguments))
    assert state.step == 6 and "from checkpoint-6" not in caplog.text
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line] == list(range(1, 7))
    with pytest.raises(FileNotFoundError, match="there is no such folder; complete checkpoints in "):
        stage1.main(flags(resume_from_checkpoint=run / "checkpoint-3", **arguments))


def test_a_kill_between_the_last_save_and_the_deletion_leaves_no_surplus(flags, tmp_path):
    """A run that had finished saves nothing more when it is started again."""
    arguments = {"max_steps": 4, "save_steps": 1, "validation_data": None}
    stage1.main(flags(**arguments))
    run = tmp_path / "run"
    stage1.main(flags(**arguments, save_total_limit=2, resume_from_checkpoint="auto"))
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-3", "checkpoint-4"]
    # The one that a run goes back to is the newest by then.
    stage1.main(flags(output_dir=tmp_path / "other", **arguments))
    older = {"resume_from_checkpoint": tmp_path / "other" / "checkpoint-1", "save_total_limit": 1}
    stage1.main(flags(output_dir=tmp_path / "other", **arguments, **older))
    assert [path.name for path in list_checkpoints(tmp_path / "other")] == ["checkpoint-4"]
    assert len(list((tmp_path / "other").glob("*.superseded-*"))) == 3


def test_counts_of_videos_survive_other_numbers_of_processes(flags, shapes, tmp_path):
    rows = (shapes / "train.csv").read_text().splitlines()
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    (tmp_path / "train.csv").write_text(
        "".join(f"{broken},0\n" if i % 4 == 0 else f"{shapes}/{row}\n" for i, row in enumerate(rows))
    )
    common = {"train_data": tmp_path / "train.csv", "validation_data": None, "max_steps": 6, "save_steps": 3}
    common |= {"max_skipped_ratio": 0.9}
    stage1.main(flags(output_dir=tmp_path / "whole", **common, **WHOLE))
    run = copy_run(tmp_path / "whole", 3, tmp_path / "run")
    two = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    run_ranks(stage1.main, flags(output_dir=run, resume_from_checkpoint="auto", **common, **two))
    counts = [read_metrics(folder / "metrics.jsonl")[-1]["skipped_videos"] for folder in (tmp_path / "whole", run)]
    assert counts[0] == counts[1] >= 6
    saved = [
        json.loads((f / "checkpoint-6" / "training_state" / "counters.json").read_text())
        for f in (tmp_path / "whole", run)
    ]
    assert [(counters["videos"], counters["skipped_videos"]) for counters in saved] == [(48, counts[0])] * 2
    assert saved[1]["shape"] == {
        "num_processes": 2,
        "gradient_accumulation_steps": 1,
        "batch_sizes": [4],
        "total_steps": 6,
    }


def run_on_its_own_disk(arguments: list[str], folder: str) -> None:
    """Stage 1, with an output folder that other processes do not see under this name."""
    checkpointing.SECONDS_TO_APPEAR = 0.5
    own = Path(folder) / os.environ["RANK"]
    own.mkdir(exist_ok=True)
    os.chdir(own)
    stage1.main(arguments)


def test_two_machines_without_a_shared_disk_do_not_train_different_models(flags, tmp_path):
    """What one has saved the other does not find: it says so, instead of beginning anew."""
    common = flags(output_dir="run", max_steps=4, save_steps=2, validation_data=None)
    run_ranks(run_on_its_own_disk, common, str(tmp_path))
    assert [path.name for path in list_checkpoints(tmp_path / "0" / "run")] == ["checkpoint-2", "checkpoint-4"]
    shutil.rmtree(tmp_path / "0" / "run" / "checkpoint-4")
    said = run_ranks(
        run_on_its_own_disk, [*common, "--resume_from_checkpoint", "auto"], str(tmp_path), exit_code=1, timeout=60
    )
    assert "run/checkpoint-2: process 1 on " in said.stderr and "a disk that all machines share" in said.stderr


def start_ranks(arguments: list[str], folder: Path, num_processes: int) -> tuple[list, list[Path]]:
    port = find_free_port()
    outputs = [folder / f"output_{rank}" for rank in range(num_processes)]
    return [
        start_process(
            run_script,
            "training.stage1",
            arguments,
            environment=build_environment(rank, num_processes, port),
            output=output,
        )
        for rank, output in enumerate(outputs)
    ], outputs


def wait_until(is_time, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not is_time():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def has_steps(run: Path, count: int) -> bool:
    return (run / "metrics.jsonl").exists() and len(read_losses(run)) >= count


def assert_saved_and_ended(run: Path, processes: list, outputs: list[Path], code: int) -> Path:
    """Join processes that got a signal; returns the checkpoint."""
    for process in processes:
        process.join(60)
    said = read_output(outputs[0]).stderr
    assert [process.exitcode for process in processes] == [code] * len(processes), said[-2000:]
    (checkpoint,) = list_checkpoints(run)
    assert said.strip().splitlines()[-1] == (
        f"Terminated. The newest checkpoint is {checkpoint}; the same command with --resume_from_checkpoint auto goes "
        "on from it."
    )
    assert json.loads((checkpoint / "training_state" / "counters.json").read_text())["step"] == read_step(checkpoint)
    assert "Traceback" not in said
    return checkpoint


@pytest.mark.parametrize(
    ("number", "changes", "code", "num_processes"),
    [
        (signal.SIGTERM, {}, 143, 1),
        (signal.SIGUSR1, {"preemption_signal": "SIGUSR1", "preemption_exit_code": 75}, 75, 1),
        (signal.SIGTERM, {"dataloader_num_workers": 1}, 143, 2),
    ],
    ids=["sigterm", "named signal", "in one of two processes"],
)
def test_a_signal_saves_and_the_run_goes_on_to_the_same_losses(flags, tmp_path, number, changes, code, num_processes):
    common = {"max_steps": 40, "validation_data": None, "per_device_train_batch_size": 4}
    arguments = flags(**common, **changes)
    processes, outputs = start_ranks(arguments, tmp_path, num_processes)
    wait_until(lambda: has_steps(tmp_path / "run", 2))
    os.kill(processes[-1].pid, number)
    checkpoint = assert_saved_and_ended(tmp_path / "run", processes, outputs, code)
    assert 2 <= read_step(checkpoint) < 40
    if num_processes == 1:
        stage1.main(flags(output_dir=tmp_path / "whole", **common))
        stage1.main(flags(**common, resume_from_checkpoint="auto"))
        assert read_losses(tmp_path / "run") == read_losses(tmp_path / "whole")


@pytest.mark.parametrize(
    ("number", "changes", "code", "num_processes"),
    [
        pytest.param(signal.SIGTERM, {}, 143, 1, marks=pytest.mark.heavy),
        pytest.param(signal.SIGTERM, {}, 143, 2, marks=pytest.mark.heavy),
        pytest.param(
            signal.SIGUSR1,
            {"preemption_signal": "SIGUSR1", "preemption_exit_code": 75},
            75,
            1,
            marks=pytest.mark.heavy,
        ),
    ],
    ids=["one process", "two processes", "named signal"],
)
def test_a_signal_to_every_process_and_worker_twice_saves_all_the_same(
    flags, tmp_path, number, changes, code, num_processes
):
    """As Slurm, `timeout`, `kill -- -GROUP` and `torchrun` send it; some of them hand it on as well."""
    arguments = flags(
        max_steps=5000,
        validation_data=None,
        per_device_train_batch_size=4,
        num_frames=8,
        **changes,
        dataloader_num_workers=2,
        ddp_timeout_seconds=20,
    )
    processes, outputs = start_ranks(arguments, tmp_path, num_processes)
    wait_until(lambda: has_steps(tmp_path / "run", 2))
    everyone = [own for process in processes for own in find_family(process.pid)]
    assert len(everyone) >= 3 * num_processes
    for _ in range(2):
        for process in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
    assert_saved_and_ended(tmp_path / "run", processes, outputs, code)
    wait_until(lambda: not any(map(is_alive, everyone)), seconds=20)


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def find_family(pid: int) -> list[psutil.Process]:
    own = psutil.Process(pid)
    children = own.children(recursive=True)
    return [own, *(child for child in children if "resource_tracker" not in " ".join(child.cmdline()))]


def test_a_process_that_stops_ends_the_run_with_the_step_in_the_last_line(flags, tmp_path):
    arguments = flags(max_steps=1000, validation_data=None, ddp_timeout_seconds=5)
    processes, outputs = start_ranks(arguments, tmp_path, 2)
    wait_until(lambda: has_steps(tmp_path / "run", 2))
    os.kill(processes[1].pid, signal.SIGSTOP)
    try:
        processes[0].join(40)
        said = read_output(outputs[0]).stderr.strip().splitlines()
        assert processes[0].exitcode == 4, said[-5:]
        assert re.match(r"Error: Process 0 waited in vain for another one at step \d+: ", said[-1])
        assert "--resume_from_checkpoint auto" in said[-1] and not any("Traceback" in line for line in said)
    finally:
        processes[1].kill()
        processes[1].join()


def test_a_process_that_is_killed_ends_the_other(flags, tmp_path):
    processes, outputs = start_ranks(flags(max_steps=1000, validation_data=None), tmp_path, 2)
    wait_until(lambda: has_steps(tmp_path / "run", 2))
    processes[1].kill()
    processes[0].join(30)
    last = read_output(outputs[0]).stderr.strip().splitlines()[-1]
    assert processes[0].exitcode == 4 and last.startswith("Error: Process 0 waited in vain"), last
