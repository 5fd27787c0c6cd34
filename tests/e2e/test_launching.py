"""The scripts as users start them, by `accelerate launch -m`; other tests call `main`, here or in a forked process."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.e2e.runs import FINE_TUNING, assert_same_weights, read_losses, to_flags
from tests.processes import ROOT, find_free_port
from umt_hf.training import stage1


def launch(*words: str, **fields) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", *words, *to_flags(**fields)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.slow
def test_stage_1_in_two_processes(flags, tmp_path):
    """The command of docs/pretraining.md for several processes without a GPU."""
    stage1.main(flags(output_dir=tmp_path / "one", per_device_train_batch_size=8, max_steps=2))
    words = ["--multi_gpu", "--num_processes", "2", "--main_process_port", str(find_free_port())]
    launch(*words, "-m", "umt_hf.training.stage1", *flags(output_dir=tmp_path / "two", max_steps=2))
    assert read_losses(tmp_path / "two") == pytest.approx(read_losses(tmp_path / "one"), abs=1e-5)
    assert_same_weights(tmp_path / "one", tmp_path / "two", atol=2e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no groups of processes here")
@pytest.mark.parametrize(("whom", "times"), [("command", 1), pytest.param("group", 3, marks=pytest.mark.heavy)])
def test_an_interruption_reaches_the_script_once(flags, tmp_path, whom, times):
    """Of the command alone, as by a notebook or a supervisor, or of all that it has started, as by `timeout`."""
    command = [sys.executable, "-m", "umt_hf.cli", "pretrain", "stage1", *flags(max_steps=100_000)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    with (tmp_path / "log").open("wb") as log:
        run = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        for _ in range(times):
            os.kill(run.pid, signal.SIGINT) if whom == "command" else os.killpg(run.pid, signal.SIGINT)
        code = run.wait(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    said = (tmp_path / "log").read_text(errors="replace")
    assert code == 130 and said.count("Interrupted. No checkpoint was saved.") == 1, said[-3000:]
    assert "Traceback" not in said


@pytest.mark.heavy
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["umt-hf", "torchrun"])
def test_two_machines_train_as_one_process(flags, tmp_path, launcher):
    """The commands of docs/scaling.md, for two machines on the loopback device with a process each."""
    stage1.main(flags(output_dir=tmp_path / "one", per_device_train_batch_size=8, max_steps=2))
    port, arguments = str(find_free_port()), flags(output_dir=tmp_path / "two", max_steps=2)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    machines = []
    for rank in ("0", "1"):
        if launcher == "umt-hf":
            words = ["umt_hf.cli", "pretrain", "stage1", "--num_processes", "2", "--num_machines", "2"]
            words += ["--machine_rank", rank, "--main_process_ip", "127.0.0.1", "--main_process_port", port]
        else:
            words = ["torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d"]
            words += ["--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "run", "-m", "umt_hf.training.stage1"]
        log = (tmp_path / f"{rank}.log").open("wb")
        command = [sys.executable, "-m", *words, *arguments]
        machines.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    try:
        codes = [machine.wait(timeout=300) for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    written = "".join((tmp_path / f"{rank}.log").read_text(errors="replace")[-3000:] for rank in (0, 1))
    assert codes == [0, 0], written
    assert read_losses(tmp_path / "two") == pytest.approx(read_losses(tmp_path / "one"), abs=1e-5)


@pytest.mark.heavy
@pytest.mark.slow
def test_a_classifier_is_fine_tuned_and_evaluated(colors, student, tmp_path):
    data = {"train_data": colors / "few_train.csv", "validation_data": colors / "few_validation.csv"}
    fields = {**FINE_TUNING, **data, "model_name_or_path": student, "output_dir": tmp_path / "run", "max_steps": 1}
    launch("-m", "umt_hf.finetuning.classification", **fields)
    metrics = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    fields = {"model_name_or_path": tmp_path / "run", "data": colors / "few_validation.csv", "num_clips": 1}
    fields |= {"num_crops": 1, "output_dir": tmp_path / "test", "dataloader_num_workers": 0}
    launch("-m", "umt_hf.evaluation.classification", **fields)
    report = json.loads((tmp_path / "test" / "report.json").read_text())
    assert report["num_videos"] == 8
    assert report["metrics"]["top1_accuracy"] == pytest.approx(metrics["eval_top1_accuracy"])
