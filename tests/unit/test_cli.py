"""The command line delegates to the package and tells what it did."""

import pytest
import torch
from typer.testing import CliRunner

from umt_hf import cli

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


def test_help_reads_well():
    result = runner.invoke(cli.app, ["--help"])
    assert result.exit_code == 0 and "convert" in result.output and "data" in result.output
