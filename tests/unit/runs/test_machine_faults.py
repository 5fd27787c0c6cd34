"""Faults of the machine: what could not be written is named, and the exit code is another one than that of a typo."""

import errno
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from typer.testing import CliRunner

from tests.unit.video_files import write_video
from umt_hf import cli
from umt_hf.data.in_flight import StuckReadingError
from umt_hf.data.prepare import ShardSettings, prepare_shards
from umt_hf.data.unreadable import LOST_SHARD, UnreadableList, UnreadableVideos
from umt_hf.runs.disk import write_text
from umt_hf.runs.folder import MetricLog
from umt_hf.runs.mistakes import MachineError, UserError, choose_exit_code, end_in_one_line, naming_full_disk

resource = pytest.importorskip("resource", reason="Windows limits no sizes of files")
BIG = 20_000


@pytest.fixture
def full_disk():
    """Files of this process may not grow past a few bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_log(path: Path) -> None:
    MetricLog(path).write(1, {"text": "x" * BIG})


def write_tensors(path: Path) -> None:
    with naming_full_disk(path):
        save_file({"features": np.zeros(BIG, np.float32)}, path)


def write_state(path: Path) -> None:
    with naming_full_disk(path):
        torch.save({"state": torch.zeros(BIG)}, path)


WRITERS = {
    "text": lambda path: write_text(path, "x" * BIG),
    "log": write_log,
    "list": lambda path: UnreadableList(path).add(["x" * BIG]),
    "safetensors": write_tensors,
    "PyTorch": write_state,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_what_does_not_fit_on_the_disk_is_named(write, full_disk, tmp_path):
    path = tmp_path / "written.bin"
    with pytest.raises(MachineError) as error:
        write(path)
    assert str(error.value).startswith(f"{path} could not be written: file too large. Make room"), error.value
    # Without the room that there is now: what did not fit has been deleted by then.
    assert "MiB" not in str(error.value) and "Make room on its disk" in str(error.value)


def test_a_shard_that_does_not_fit_is_named(tmp_path, request):
    write_video(tmp_path / "a.mp4", num_frames=8)
    request.getfixturevalue("full_disk")
    with pytest.raises(MachineError, match=r"shards/train-000000\.tar could not be written: file too large"):
        prepare_shards([str(tmp_path / "a.mp4")], tmp_path / "shards", ShardSettings(8), num_workers=0)


def test_the_command_says_it_with_its_own_code(tmp_path, request):
    write_video(tmp_path / "a.mp4", num_frames=8)
    request.getfixturevalue("full_disk")
    words = ["prepare", str(tmp_path / "a.mp4"), "--out", str(tmp_path / "shards"), "--num-workers", "0"]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 4 and "train-000000.tar could not be written" in result.stderr, result.output


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, getattr(errno, "EDQUOT", errno.ENOSPC)])
def test_a_fault_that_nobody_named_keeps_the_code(number, capsys):
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended, end_in_one_line(lambda: "The newest checkpoint is run/checkpoint-7."):
            raise OSError(number, "as the system says it", "run/events")
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert ended.value.code == 4
    said = capsys.readouterr().err
    assert said == "Error: run/events: as the system says it. The newest checkpoint is run/checkpoint-7.\n"


def test_exit_codes_tell_faults_from_mistakes():
    assert choose_exit_code(StuckReadingError("a worker is gone")) == 4
    assert choose_exit_code(UserError("a typo")) == choose_exit_code(FileNotFoundError(2, "no such file", "a")) == 2
    assert choose_exit_code(ValueError("the words No space left on device in another error")) == 4


def test_a_shard_that_is_gone_is_a_fault_and_not_a_mistake():
    videos = UnreadableVideos()
    with pytest.raises(MachineError):
        videos.count(4, [f"a.tar, row 3: No such file or directory. {LOST_SHARD}"], 0.1)
    with pytest.raises(UserError) as error:
        UnreadableVideos().count(4, ["a.mp4: is empty."], 0.1)
    assert not isinstance(error.value, MachineError)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_writer_of_numbers_that_does_not_say_why_it_failed_is_a_fault(tmp_path):
    """As at an export to ONNX, whose weights NumPy writes."""
    said = pytest.raises(MachineError, match=r"model\.onnx could not be written: the writer failed \(.* requested and")
    with said, naming_full_disk(tmp_path / "model.onnx"), open("/dev/full", "wb") as file:
        np.zeros(1 << 20).tofile(file)


def test_other_errors_stay_as_they_are(tmp_path):
    for error in (ValueError("x"), RuntimeError("a bug"), FileNotFoundError(2, "no such file"), KeyError("a")):
        with pytest.raises(type(error)) as raised, naming_full_disk(tmp_path / "a"):
            raise error
        assert raised.value is error
    assert json.dumps(sorted(path.name for path in tmp_path.iterdir())) == "[]"
