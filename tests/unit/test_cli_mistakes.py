"""A mistake in any verb of `umt-hf` is one line on standard error with its cure, and exit code 2."""

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

import umt_hf_launcher
from tests.unit.test_cli import run_command
from umt_hf.cli import app

runner = CliRunner()


def read_mistake(*words: str, exit_code: int = 2) -> str:
    result = runner.invoke(app, [str(word) for word in words])
    lines = result.stderr.splitlines()
    assert result.exit_code == exit_code and result.stdout == "" and len(lines) == 1, result.output
    return lines[0]


@pytest.mark.parametrize(
    ("line", "cure"),
    [
        ("clasify x", "'clasify'. Did you mean 'classify'? See `"),
        ("finetune clasification", "Did you mean 'classification'? See `"),
        ("data moving-shape x", "Did you mean 'moving-shapes'?"),
        ("classify x", "Missing option '--model'. See `"),
        ("classify x --modle y", "--model"),
        ("classify --model y", "Missing argument"),
        ("classify x --model y --top-k 0", "'--top-k'"),
        ("features x --model y --out z --level fram", "'frame', 'clip', 'tubelet'"),
        ("zoo --size b17", "'b17' is not one of 'b16', 'l16'"),
        ("zoo umt-vit-b17", "Did you mean umt-vit-b16"),
        ("convert umt-vit-b17", "Did you mean umt-vit-b16"),
        ("convert missing.pth", "missing.pth: no such file."),
        ("card missing", "'missing' does not exist"),
        ("push missing me/x", "missing: no such folder."),
        ("info missing/", "missing/: no such folder."),
        ("info umt-vit-b17", "Did you mean umt-vit-b16"),
        ("info umt-vit-b16", "run `umt-hf convert umt-vit-b16`, or add --convert"),
        ("classify x --model umt-vit-b16-k400", "run `umt-hf convert umt-vit-b16-k400`"),
        ("features x --model umt-vit-b16-k400 --out o", "run `umt-hf convert umt-vit-b16-k400`"),
        ("embed x --model umt-vit-b16-25m --out o", "run `umt-hf convert umt-vit-b16-25m`"),
        ("ask x q --model umt-vit-b16-25m-msvd-qa", "run `umt-hf convert umt-vit-b16-25m-msvd-qa`"),
        ("detect x --model umt-vit-b16-ava --boxes 1,2,3,4 --frame 1", "run `umt-hf convert umt-vit-b16-ava`"),
        ("detect x --model y", "Give at least one box"),
        ("search missing words", "missing is not an index: there is no such folder."),
        ("demo --student x", "student needs its teacher"),
        ("finetune classification --mixed_precision x", "no, bf16, fp16, got 'x'"),
    ],
)
def test_a_mistake_is_one_line_with_its_cure(line, cure, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    (tmp_path / "x").write_bytes(b"no video")
    said = read_mistake(*line.split())
    assert said.startswith("Error: ") and cure in said, said
    assert {path.name for path in tmp_path.iterdir()} <= {"x", "home"}


def test_a_conversion_that_fails_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    result = runner.invoke(app, ["info", "umt-vit-b16", "--convert"])
    announced, error = result.stderr.splitlines()
    assert announced.startswith("Converting umt-vit-b16, once, into ") and result.exit_code == 2
    assert error.endswith("run: umt-hf convert b16_ptk710_f8_res224.pth umt-vit-b16")


def test_a_misspelt_name_is_found_without_pytorch():
    for words in (("convert", "umt-vit-b17"), ("zoo", "umt-vit-b17")):
        result = run_command(*words)
        assert result.returncode == 2 and result.stdout == ""
        assert result.stderr.splitlines()[0].startswith("Error: No released checkpoint is called 'umt-vit-b17'.")
        assert result.stderr.splitlines()[1:] == ["False"]


def test_without_words_there_is_help():
    for words in ([], ["data"], ["pretrain"]):
        result = runner.invoke(app, words)
        assert result.exit_code == 2 and "Usage:" in result.stdout and result.stderr == ""


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("embed", "x", "--model", "y", "--out", ""), "--out is empty"),
        (("features", "x", "--model", "y", "--out="), "--out is empty"),
        (("prepare", "x", "--out", " "), "--out is empty"),
        (("convert", "umt-vit-b16", "--output", ""), "--output is empty"),
        (("classify", "x", "--model", ""), "--model is empty"),
        (("data", "moving-shapes", ""), "an argument is empty"),
        (("push", "", "me/x"), "an argument is empty"),
        (("demo", "--index", ""), "--index is empty"),
    ],
)
def test_an_empty_name_is_refused_and_not_the_current_folder(words, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_mistake(*words) == f"Error: {named}. (Is a variable of the shell not set?)"
    assert not list(tmp_path.iterdir())


def test_an_interruption_while_the_command_loads_is_one_line(monkeypatch, capsys):
    def load(name):
        if name == "cli":
            raise KeyboardInterrupt

    monkeypatch.setattr(umt_hf_launcher, "load_alone", load)
    with pytest.raises(SystemExit) as ended:
        umt_hf_launcher.main()
    assert ended.value.code == 130 and capsys.readouterr().err == "Interrupted. Nothing was written.\n"
