"""What `umt-hf doctor` says is what was tried: right, missing and broken things each get their row."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AttentionInterface
from typer.testing import CliRunner

from umt_hf import cli, diagnostics
from umt_hf.diagnostics import Finding
from umt_hf.processing import decoding
from umt_hf.processing.decoding import PyAVReader

runner = CliRunner()
ROOT = Path(__file__).parents[2]


class DarkReader(PyAVReader):
    def _decode(self, indices):
        return np.zeros_like(super()._decode(indices))


def refuse(media):
    raise ImportError("no FFmpeg libraries")


def find(findings, name):
    return next(found for found in findings if found.name == name)


@pytest.mark.parametrize(("reader", "status", "reason"), [
    (refuse, "broken", "no FFmpeg libraries"), (DarkReader, "broken", "came back as [0, 0, 0, 0]"),
    (PyAVReader, "ok", "decodes"),
])  # fmt: skip
def test_readers_are_tried_on_a_video(reader, status, reason, monkeypatch):
    """A module that is there tells nothing."""
    monkeypatch.setattr(diagnostics, "_is_installed", lambda module: module != "decord")
    monkeypatch.setitem(decoding.READERS, "torchcodec", reader)
    findings = list(diagnostics._examine_decoders())
    assert find(findings, "pyav").status == "ok" and find(findings, "pyav").is_required
    assert find(findings, "decord").status == "missing" and "pip install decord2" in find(findings, "decord").advice
    found = find(findings, "torchcodec")
    assert found.status == status and reason in found.detail and bool(found.advice) == (status != "ok")
    assert status == "ok" or "pip install torchcodec-ffmpeg" in found.advice


@pytest.mark.parametrize(
    ("installed", "status", "words"),
    [
        ({"decord2": "3.4.0"}, "ok", "3.4.0"),
        ({"decord": "0.6.0"}, "missing", "decord 0.6.0 is installed in its place"),
        ({"decord": "0.6.0", "decord2": "3.4.0"}, "broken", "are both installed, in the same folder"),
    ],
)
def test_two_packages_in_one_folder_are_named(installed, status, words, monkeypatch):
    find_version = diagnostics._find_version
    monkeypatch.setattr(
        diagnostics,
        "_find_version",
        lambda name: installed.get(name) if name in ("decord", "decord2") else find_version(name),
    )
    monkeypatch.setattr(diagnostics, "_is_installed", lambda module: True)
    monkeypatch.setattr(diagnostics, "OPTIONAL", {"decord2": ("json", "pip install decord2")})
    found = find(diagnostics._examine_packages(), "decord2")
    assert found.status == status and words in found.detail
    assert ("pip uninstall decord decord2" in found.advice) == (status == "broken")


def test_attention_is_compared_with_eager(monkeypatch):
    def attend(module, query, key, value, attention_mask, **kwargs):
        return value.transpose(1, 2).contiguous(), None

    AttentionInterface.register("blind", attend)
    monkeypatch.setattr(diagnostics, "ATTENTIONS", ("sdpa", "eager", "blind", "flash_attention_2"))
    monkeypatch.setattr(diagnostics, "_is_installed", lambda module: False)
    findings = list(diagnostics._examine_attention())
    assert [found.status for found in findings] == ["ok", "ok", "broken", "missing"]
    assert "differs from eager" in findings[2].detail


def test_versions_are_compared_with_what_is_asked_for(monkeypatch):
    specifiers = {"av": ">=1000", "peft": ">=0.1"}
    monkeypatch.setattr(diagnostics, "_read_specifiers", lambda distribution: specifiers)
    findings = list(diagnostics._examine_packages())
    assert find(findings, "peft").status == "ok"
    assert find(findings, "av").status == "broken" and find(findings, "av").advice == "pip install 'av>=1000'"
    assert diagnostics.has_failed(findings)


def test_devices_and_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "deep" / "cache"))
    findings = [*diagnostics._examine_devices(), *diagnostics._examine_settings()]
    assert find(findings, "bfloat16").status == "ok"
    assert "HF_HUB_OFFLINE=1" in find(findings, "Hub").detail and find(findings, "cache").status == "ok"
    assert "PyTorch uses" in find(findings, "cpu").detail


FINDINGS = [
    Finding("packages", "torch", "broken", "cannot be imported", "pip install torch", is_required=True),
    Finding("devices", "GPU", "missing", "none found"),
]


@pytest.mark.parametrize(("findings", "exit_code"), [(FINDINGS, 1), (FINDINGS[1:], 0)])
def test_the_command(findings, exit_code, monkeypatch):
    monkeypatch.setattr(diagnostics, "examine_machine", lambda: findings)
    result = runner.invoke(cli.app, ["doctor", "--json"])
    assert result.exit_code == exit_code and json.loads(result.stdout)[-1]["name"] == "GPU"
    result = runner.invoke(cli.app, ["doctor"], env={"COLUMNS": "80"})
    assert result.exit_code == exit_code and "none found" in result.stdout
    assert ("-> pip install torch" in result.stdout) == bool(exit_code)


def test_each_line_is_printed_as_it_is_found(monkeypatch):
    """Before the next thing is tried, which may take long, and in the columns of all others."""
    printed = []

    def examine():
        yield FINDINGS[0]
        printed.append(sys.stdout.buffer.getvalue().decode())
        yield FINDINGS[1]

    monkeypatch.setattr(diagnostics, "examine_machine", examine)
    result = runner.invoke(cli.app, ["doctor"], env={"COLUMNS": "80"})
    assert "cannot be imported" in printed[0] and "none found" not in printed[0]
    rows = [line for line in result.stdout.splitlines() if "broken" in line or "missing" in line]
    assert rows[0].index("broken") == rows[1].index("missing")
    assert [line.rstrip() for line in result.stdout.splitlines() if line[0] != " "] == ["packages", "devices"]


def test_what_is_tried_is_found_one_by_one():
    findings = diagnostics.examine_machine()
    assert next(findings).name == "python"
    findings.close()


def test_it_runs_where_the_package_cannot_be_imported(tmp_path):
    """A real process: torchvision fails at import, and the other large libraries are stand-ins, to be quick."""
    for name in ("torch", "transformers", "accelerate", "datasets", "peft"):
        (tmp_path / f"{name}.py").write_text("__version__ = '1.0'")
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    command = [sys.executable, "-c", "import umt_hf_launcher; umt_hf_launcher.main()", "doctor", "--json"]
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    result = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1, result.stderr
    findings = {found["name"]: found for found in json.loads(result.stdout)}
    assert findings["torchvision"]["status"] == "broken"
    assert findings["torchvision"]["detail"] == "operator torchvision::nms does not exist"
    assert findings["av"]["status"] == "ok" and "umt_hf" not in findings


def test_the_readers_that_are_installed_decode_the_probe():
    pytest.importorskip("decord")
    assert {find(list(diagnostics._examine_decoders()), name).detail for name in ("pyav", "decord")} == {"decodes"}
