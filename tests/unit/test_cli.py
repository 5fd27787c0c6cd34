"""The command line delegates to the package and tells what it did."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import typer
from transformers import TrainingArguments
from typer.testing import CliRunner

import umt_hf
from umt_hf import cli
from umt_hf.cli.completion import TABLE
from umt_hf.cli.flag_table import build_flag_table
from umt_hf.zoo import load_task_titles

runner = CliRunner()


def test_moving_shapes(tmp_path):
    arguments = ["data", "moving-shapes", str(tmp_path / "shapes")]
    counts = ["--num-train-clips", "3", "--num-validation-clips", "1", "--num-test-clips", "1"]
    result = runner.invoke(cli.app, [*arguments, *counts, "--seed", "4"])
    assert result.exit_code == 0, result.output
    assert len((tmp_path / "shapes" / "train.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("arguments", [["missing.pth", "umt-vit-b16"], [], ["empty.pth", "umt-vit-b17"]])
def test_mistakes_are_usage_errors(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"surprise": torch.zeros(1)}}, "empty.pth")
    assert runner.invoke(cli.app, ["convert", *arguments]).exit_code == 2
    assert runner.invoke(cli.app, ["convert", "empty.pth", "umt-vit-b16"]).exit_code == 2


def test_a_launch_file_that_is_not_there_names_those_that_ship():
    result = runner.invoke(cli.app, ["pretrain", "stage1", "--accelerate_config", "fsdp"])
    assert result.exit_code == 2
    assert "fsdp: no such file; ddp and fsdp2 are the names of files that ship." in " ".join(result.output.split())


def test_help_reads_well():
    result = runner.invoke(cli.app, ["--help"])
    assert result.exit_code == 0 and "convert" in result.output and "data" in result.output


PANELS = ("Models", "Videos", "Training and tests", "Data", "Hub and machine")


def test_help_groups_the_commands():
    lines = runner.invoke(cli.app, ["--help"], env={"COLUMNS": "80"}).stdout.splitlines()
    assert all(any(line.startswith(f"╭─ {panel} ─") for line in lines) for panel in PANELS)
    assert not any(line.startswith("╭─ Commands") for line in lines)  # every command has its panel
    assert max(map(len, lines)) <= 80


def test_version():
    assert runner.invoke(cli.app, ["--version"]).stdout == f"umt-hf {umt_hf.__version__}\n"


def run_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """The installed command's entry point in a process of its own, which tells whether PyTorch came along."""
    code = (
        "import atexit, sys, umt_hf_launcher\n"
        "sys.argv[0] = 'umt-hf'\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        "umt_hf_launcher.main()\n"
    )
    command = [sys.executable, "-c", code, *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_help_and_completion_do_not_wait_for_pytorch():
    result = run_command("--help")
    assert result.returncode == 0 and "doctor" in result.stdout and result.stderr == "False\n"
    result = run_command(_UMT_HF_COMPLETE="complete_bash", COMP_WORDS="umt-hf cla", COMP_CWORD="1")
    assert result.stdout.split() == ["classify"] and result.stderr == "False\n"


@pytest.mark.parametrize(
    "words,expected",
    [
        ("umt-hf fine", {"finetune"}),
        ("umt-hf finetune ", {"classification", "detection", "retrieval", "question-answering"}),
        ("umt-hf evaluate mul", {"multiple-choice"}),
        ("umt-hf convert umt-vit-b16-k4", {"umt-vit-b16-k400"}),
        ("umt-hf zoo umt-vit-l16-m", {"umt-vit-l16-mit", "umt-vit-l16-mit-384"}),
        ("umt-hf zoo --size ", {"b16", "l16"}),
        ("umt-hf features --level ", {"frame", "clip", "tubelet"}),
        ("umt-hf data moving-shapes --severity s", {"strong"}),
        ("umt-hf pretrain stage1 --tr", {"--train_data", "--train_split", "--traceback"}),
        ("umt-hf pretrain stage1 --num_p", {"--num_processes"}),
        ("umt-hf pretrain stage1 --mask_ratio 0.5 --config stage1_umt", {"stage1_umt_vit_b16", "stage1_umt_vit_l16"}),
        ("umt-hf finetune detection --config ", {"detection_ava:b16", "detection_ava:l16", "detection_moving_shapes"}),
        ("umt-hf finetune classification --mode l", {"linear_probe", "lora"}),
        ("umt-hf finetune retrieval --mixed-precision b", {"bf16"}),
        ("umt-hf finetune retrieval --use_cpu ", {"true", "false"}),
        ("umt-hf evaluate question-answering --hel", {"--help"}),
    ],
)
def test_values_complete_without_pytorch(words, expected):
    count = len(words.split(" ")) - 1
    result = run_command(_UMT_HF_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(count))
    assert set(result.stdout.split()) == expected and result.stderr == "False\n"


def test_completion_of_a_script_costs_what_help_costs():
    """At most twice its CPU time, for the longest of the tables."""

    def measure(*arguments: str, **environment: str) -> float:
        before = os.times()
        assert run_command(*arguments, **environment).stdout
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    words = {"COMP_WORDS": "umt-hf finetune classification --", "COMP_CWORD": "3"}
    found = [(measure(_UMT_HF_COMPLETE="complete_bash", **words), measure("--help")) for _ in range(2)]
    assert min(completion for completion, _ in found) <= 2 * min(asked for _, asked in found), found


def test_the_table_of_flags_is_that_of_the_scripts():
    """Write it anew by `python -m umt_hf.cli.flag_table`."""
    # What the `Trainer` takes differs between the versions of Transformers; the rest does not.
    foreign = {f"--{own.name}" for own in dataclasses.fields(TrainingArguments)}
    foreign |= {f"--no_{own.name}" for own in dataclasses.fields(TrainingArguments)}

    def keep_own(table: dict) -> dict:
        verbs = {(group, verb): table[group]["all"] | table[group][verb] for group in table for verb in table[group]}
        return {name: {f: c for f, c in flags.items() if f not in foreign} for name, flags in verbs.items()}

    built, stored = build_flag_table(), json.loads(TABLE.read_text())
    assert keep_own(built) == keep_own(stored)
    assert set(stored["finetune"]["all"]) & foreign


def test_moving_shapes_takes_underscores(tmp_path):
    arguments = ["data", "moving-shapes", str(tmp_path / "shapes")]
    counts = ["--num_train_clips", "1", "--num_validation_clips=1", "--num-test-clips", "1"]
    result = runner.invoke(cli.app, [*arguments, *counts])
    assert result.exit_code == 0, result.output


def list_commands(command: Any, path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Words of every verb -> its command."""
    if not hasattr(command, "commands"):
        return {" ".join(path): command}
    return {k: v for name, own in command.commands.items() for k, v in list_commands(own, (*path, name)).items()}


@pytest.mark.parametrize("command", list_commands(typer.main.get_command(cli.app)).values(), ids=lambda own: own.name)
def test_every_flag_of_every_verb_has_two_spellings(command):
    context = command.context_class(command, **cli.SPELLING)
    for option in (option for own in command.params for option in own.opts if option.startswith("--")):
        for spelt in ("--" + option[2:].replace("-", "_"), "--" + option[2:].replace("_", "-")):
            found, rest, _ = command.make_parser(context).parse_args([spelt, "1"])
            assert found and spelt not in rest, spelt


@pytest.mark.parametrize(
    "word,count", [("retrieval", 14), ("questions", 6), ("question-answering", 6), ("stage 1", 2)]
)
def test_the_zoo_is_filtered_by_task(word, count):
    result = runner.invoke(cli.app, ["zoo", word, "--json"])
    assert result.exit_code == 0 and len(json.loads(result.stdout)) == count
    assert set(get_args(cli.Task)) == load_task_titles().keys()


def test_a_mistake_leaves_standard_output_empty():
    result = run_command("classify", "video.mp4", "--json", COLUMNS="80")
    assert result.returncode == 2 and result.stdout == ""
    assert "--model" in result.stderr and "Traceback" not in result.stderr


def test_the_command_is_a_module_too():
    """As `accelerate launch -m umt_hf.cli` starts it."""
    command = [sys.executable, "-m", "umt_hf.cli", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    assert result.stdout == f"umt-hf {umt_hf.__version__}\n", result.stderr


@pytest.mark.parametrize("words", [[], ["finetune"]])
def test_asked_for_nothing_the_command_shows_its_help_once(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.app(words)
    assert capsys.readouterr().out.count("Usage:") == 1
