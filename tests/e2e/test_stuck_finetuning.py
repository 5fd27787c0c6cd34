"""Fine-tuning whose reads never end, or one of whose processes is gone: one line, and soon."""

import importlib
import itertools
import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.e2e.mistakes import read_error, run_script
from tests.e2e.runs import FINE_TUNING, name_fine_tuning_data, save_video_text_model, to_flags
from tests.processes import START_METHOD, build_environment, read_output, run_ranks, start_process
from umt_hf.finetuning import classification
from umt_hf.finetuning.trainer import TrainingClips
from umt_hf.runs.mistakes import SECONDS_TO_BE_STOPPED
from umt_hf.training.checkpointing import list_checkpoints

FORKED = {START_METHOD: "fork"}  # workers then know what is patched in the run
STATE = "trainer_state.json"


@pytest.fixture(scope="module")
def stage2(shapes, tmp_path_factory) -> Path:
    return save_video_text_model(tmp_path_factory.mktemp("stage2"), shapes)


@pytest.fixture
def flags(shapes, student, stage2, tmp_path):
    def build(script: str, **changes) -> list[str]:
        data = name_fine_tuning_data(shapes, student, stage2)
        fields = {**FINE_TUNING, **data[script], "output_dir": tmp_path / "run", "num_frames": 2, "warmup_epochs": 0}
        fields |= {"per_device_train_batch_size": 2, "max_steps": 1000, "logging_steps": 1}
        fields |= {"dataloader_num_workers": 1, "dataloader_timeout_seconds": 3}
        return to_flags(**fields | changes)

    return build


def list_classes(base: type) -> list[type]:
    return [base, *itertools.chain(*map(list_classes, base.__subclasses__()))]


def stop_reading(script: str, words: list[str], count: int, rank: str) -> None:
    """A script, one of whose processes has a worker that waits for ever for a file after some others."""
    numbers = itertools.count(1)

    def wrap(read):
        def wait_or_read(*arguments):
            while os.environ.get("RANK", "0") == rank and next(numbers) > count:
                time.sleep(600)
            return read(*arguments)

        return wait_or_read

    importlib.import_module(f"umt_hf.finetuning.{script}")  # its classes are there from here on
    for own in list_classes(TrainingClips):
        if "read_augmented" in vars(own):
            own.read_augmented = wrap(own.read_augmented)
    run_script(f"finetuning.{script}", words, patience=SECONDS_TO_BE_STOPPED)


@pytest.mark.parametrize(
    "script",
    [
        "classification",
        "question_answering",
        *(pytest.param(name, marks=pytest.mark.heavy) for name in ("detection", "retrieval")),
    ],
)
def test_a_file_that_never_comes_ends_every_script_and_is_named_with_the_step(flags, script):
    began = time.monotonic()
    options = {"exit_code": 4, "environment": FORKED, "num_processes": 1, "timeout": 150}
    said = read_error(run_ranks(stop_reading, script, flags(script), 6, "0", **options))
    assert time.monotonic() - began < 120
    pattern = r"Error: Step \d+: No data came for 3 s \(--dataloader_timeout_seconds\); being read: \S+\.mp4 \(worker "
    assert re.match(pattern, said), said


@pytest.mark.heavy
def test_a_run_that_was_resumed_within_an_epoch_is_watched_too(flags, tmp_path):
    """Accelerate then builds another loader."""
    changes = {"save_strategy": "steps", "save_steps": 2}
    arguments = flags("classification", **changes)
    options = {"exit_code": 4, "environment": FORKED, "num_processes": 1, "timeout": 150}
    run_ranks(stop_reading, "classification", arguments, 8, "0", **options)
    assert list_checkpoints(tmp_path / "run", STATE)
    resumed = [*arguments, "--resume_from_checkpoint", "auto"]
    said = read_error(run_ranks(stop_reading, "classification", resumed, 6, "0", **options))
    assert re.search(r"No data came for 3 s .* being read: \S+\.mp4 \(worker ", said), said


@pytest.mark.heavy  # tests/e2e/test_watching.py has the same of pre-training
@pytest.mark.parametrize("rank", [0, 1])
def test_of_two_processes_one_waits_for_a_file_and_both_end_soon(flags, rank):
    began = time.monotonic()
    options = {"exit_code": 4, "environment": FORKED, "timeout": 150}
    arguments = flags("classification", ddp_timeout=20)
    said = run_ranks(stop_reading, "classification", arguments, 6, str(rank), **options).stderr
    assert time.monotonic() - began < 120 and "Traceback" not in said
    assert re.search(r"Error: Step \d+: No data came for 3 s .*read: \S+\.mp4 \(", said), said
    assert re.search(rf"Error: Process {1 - rank} waited in vain for another one at step \d+: .*--ddp_timeout;", said)


def test_a_worker_that_stops_is_named_with_its_file(flags, tmp_path):
    output = tmp_path / "output"
    environment = build_environment(0, 1, 0) | FORKED
    arguments = flags("classification", save_strategy="steps", save_steps=1, num_train_epochs=100)
    process = start_process(run_script, "finetuning.classification", arguments, environment=environment, output=output)
    deadline = time.monotonic() + 120
    while not list_checkpoints(tmp_path / "run", STATE) and time.monotonic() < deadline:
        time.sleep(0.02)
    workers: list = []
    while not workers and time.monotonic() < deadline:  # a new one in each epoch
        children = psutil.Process(process.pid).children()
        workers = [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]
    workers[0].send_signal(signal.SIGSTOP)
    process.join(60)
    said = read_output(output).stderr
    assert process.exitcode == 4 and "Traceback" not in said, said[-3000:]
    assert re.match(r"Error: Step \d+: No data came for 3 s .*read: \S+\.mp4 \(", said.strip().splitlines()[-1])


def test_a_negative_time_is_refused(flags):
    with pytest.raises(ValueError, match="dataloader_timeout_seconds must be at least 0"):
        classification.main(flags("classification", dataloader_timeout_seconds=-1))
