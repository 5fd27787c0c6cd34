"""A user's mistake is one line with its cure, and exit code 2, in every script."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.e2e.mistakes import fail, read_error, run_script
from tests.e2e.runs import FINE_TUNING, read_losses, to_flags
from tests.processes import ROOT, Output, build_environment, find_free_port, read_output, run_ranks, start_process
from umt_hf.training import stage1

PRETRAINING = ("training.stage1", "training.stage2")
FINETUNING = tuple(f"finetuning.{task}" for task in ("classification", "detection", "retrieval", "question_answering"))
EVALUATION = tuple(
    f"evaluation.{task}"
    for task in ("classification", "detection", "retrieval", "multiple_choice", "question_answering")
)
SCRIPTS = (*PRETRAINING, *FINETUNING, *EVALUATION)


def build_flags(script: str, **changes) -> list[str]:
    """Flags that no run can do without."""
    fields = {"model_name_or_path": "missing_model"} if script not in PRETRAINING else {}
    fields |= FINE_TUNING if script in FINETUNING else {"dataloader_num_workers": 0}
    return to_flags(**fields | changes)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_misspelt_flag_is_named_with_the_nearest(script):
    error = read_error(fail(script, ["--dataloader_num_worker", "1"]))
    assert error == "Error: Unknown flag --dataloader_num_worker: did you mean --dataloader_num_workers?"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_misspelt_recipe_is_named_with_the_nearest(script):
    error = read_error(fail(script, ["--config", "stage1_umt_vit_b17"]))
    assert "'stage1_umt_vit_b17' is neither a file nor a recipe: did you mean stage1_umt_vit_b16" in error


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_script_of_another_recipe_is_named(script):
    recipe, owner = ("stage1_umt_vit_b16", "umt-hf pretrain stage1")
    if script == "training.stage1":
        recipe, owner = ("classification_k400:b16", "umt-hf finetune classification")
    assert f"Error: {recipe} is a recipe of `{owner}`, not of `umt-hf " in read_error(
        fail(script, ["--config", recipe])
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_missing_data_is_named(script, tmp_path):
    name = "data" if script in EVALUATION else "train_data"
    words = build_flags(script, **{name: tmp_path / "trian.csv"}, output_dir=tmp_path / "run")
    if script == "training.stage2":
        words = to_flags(train_corpora=[tmp_path / "trian.json"], media_types=["video"], output_dir=tmp_path / "run")
    error = read_error(fail(script, words))
    print(script, error)


@pytest.mark.parametrize(
    "number,code,word", [(signal.SIGINT, 130, "Interrupted"), (signal.SIGTERM, 143, "Terminated")]
)
def test_what_was_saved_is_said_after_an_interruption(number, code, word, flags, tmp_path):
    words = flags(save_steps=1, max_steps=1000, save_total_limit=2)
    output = tmp_path / "output"
    process = start_process(
        run_script, "training.stage1", words, environment=build_environment(0, 1, 0), output=output
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "run").glob("checkpoint-[0-9]")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(30)
    error = read_error(read_output(output))
    assert process.exitcode == code, error
    newest = max(int(path.name[11:]) for path in (tmp_path / "run").glob("checkpoint-*") if path.name[11:].isdigit())
    assert error == (
        f"{word}. The newest checkpoint is {tmp_path}/run/checkpoint-{newest}; the same command with "
        "--resume_from_checkpoint auto goes on from it."
    )


def test_an_interruption_before_the_first_checkpoint(flags, tmp_path):
    output = tmp_path / "output"
    process = start_process(
        run_script, "training.stage1", flags(max_steps=1000), environment=build_environment(0, 1, 0), output=output
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 130 and read_error(read_output(output)) == "Interrupted. No checkpoint was saved."


def test_several_processes_say_it_once():
    """The launcher stops those that fail like the main process; here the time they give it is over at once."""
    output = run_ranks(run_script, "training.stage1", ["--mask_ratio", "7"], 0.0, num_processes=2, exit_code=2)
    lines = [line for line in output.stderr.splitlines() if line.startswith(("Error", "Process"))]
    assert lines == [
        "Error: mask_ratio must be in [0, 1), got 7.0.",
        "Process 1: Error: mask_ratio must be in [0, 1), got 7.0.",
    ]


def run_verb(*words: str, **environment: str) -> subprocess.CompletedProcess:
    """The installed command."""
    command = [sys.executable, "-c", "import sys, umt_hf_launcher; sys.argv[0] = 'umt-hf'; umt_hf_launcher.main()"]
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([*command, *words], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_verb_runs_the_script_in_several_processes(flags, tmp_path):
    stage1.main(flags(output_dir=tmp_path / "one", per_device_train_batch_size=8, max_steps=2))
    options = ["--num_processes", "2", "--main_process_port", str(find_free_port())]
    result = run_verb("pretrain", "stage1", *options, *flags(output_dir=tmp_path / "two", max_steps=2))
    assert result.returncode == 0, result.stderr[-3000:]
    assert read_losses(tmp_path / "two") == pytest.approx(read_losses(tmp_path / "one"), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", ["1", "2"])
def test_the_verb_ends_with_the_scripts_line_and_code(num_processes):
    options = ["--num_processes", num_processes, "--main_process_port", str(find_free_port())]
    result = run_verb("finetune", "classification", *options, "--lerning_rate", "1")
    assert result.returncode == 2, result.stderr
    error = read_error(Output(result.stdout, result.stderr))
    assert error == "Error: Unknown flag --lerning_rate: did you mean --learning_rate?"


def test_a_configuration_of_the_launcher_that_is_broken(tmp_path):
    (tmp_path / "accelerate.yaml").write_text("distributed_type: [")
    result = run_verb("evaluate", "retrieval", "--accelerate_config", str(tmp_path / "accelerate.yaml"))
    assert result.returncode == 2 and "accelerate.yaml" in read_error(Output(result.stdout, result.stderr))
