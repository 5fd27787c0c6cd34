"""The command line delegates to the package and tells what it did."""

import pytest
import torch
from typer.testing import CliRunner

from umt_hf import cli
from umt_hf.modeling import convert_umt_checkpoint
from umt_hf.modeling.configuration_umt_video import UMTVideoConfig
from umt_hf.processing.video_processing_umt_video import UMTVideoProcessor

runner = CliRunner()


def test_moving_shapes(tmp_path):
    arguments = ["data", "moving-shapes", str(tmp_path / "shapes")]
    counts = ["--num-train-clips", "3", "--num-validation-clips", "1", "--num-test-clips", "1"]
    result = runner.invoke(cli.app, [*arguments, *counts, "--seed", "4"])
    assert result.exit_code == 0, result.output
    assert len((tmp_path / "shapes" / "train.csv").read_text().splitlines()) == 3


def test_convert_writes_a_folder_with_processor(tmp_path, monkeypatch):
    from tests.parity.reference import load_case
    from tests.parity.test_student_parity import build_config

    info, data = load_case("student_k3_interval1")
    torch.save(data["weights"], tmp_path / "source.pth")
    config = build_config(info["constructor"])
    monkeypatch.setattr(convert_umt_checkpoint, "build_published_config", lambda name: (config, "pretraining"))
    result = runner.invoke(
        cli.app, ["convert", str(tmp_path / "source.pth"), "tiny", "--output", str(tmp_path / "model")]
    )
    assert result.exit_code == 0, result.output
    assert "tensors used" in result.output
    assert UMTVideoConfig.from_pretrained(tmp_path / "model").hidden_size == config.hidden_size
    assert UMTVideoProcessor.from_pretrained(tmp_path / "model").num_frames == config.num_frames


@pytest.mark.parametrize("arguments", [["missing.pth", "umt-vit-b16"], [], ["empty.pth", "umt-vit-b17"]])
def test_mistakes_are_usage_errors(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"surprise": torch.zeros(1)}}, "empty.pth")
    assert runner.invoke(cli.app, ["convert", *arguments]).exit_code == 2
    assert runner.invoke(cli.app, ["convert", "empty.pth", "umt-vit-b16"]).exit_code == 2


def test_help_reads_well():
    result = runner.invoke(cli.app, ["--help"])
    assert result.exit_code == 0 and "convert" in result.output and "data" in result.output
