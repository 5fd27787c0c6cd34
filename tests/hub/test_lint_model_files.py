"""The linter of Transformers' model files runs over what travels, and would see a fault there."""

from pathlib import Path

import pytest

from tests import lint_model_files


def test_rules_are_switched_off_by_name(tmp_path):
    mlinter = pytest.importorskip("mlinter", reason="transformers-mlinter needs a newer Python or is not installed")
    bundled = (Path(mlinter.__file__).parent / "rules.toml").read_text()
    lint_model_files.write_rules(tmp_path / "rules.toml")
    changed = [
        (before, after)
        for before, after in zip(bundled.splitlines(), (tmp_path / "rules.toml").read_text().splitlines(), strict=True)
        if before != after
    ]
    assert changed == [("default_enabled = true", "default_enabled = false")] * len(lint_model_files.SWITCHED_OFF)


def test_a_planted_fault_is_found(tmp_path, monkeypatch):
    pytest.importorskip("mlinter", reason="transformers-mlinter needs a newer Python or is not installed")
    assert lint_model_files.main() == 0
    source = (Path(__file__).parents[2] / "umt_hf" / "modeling" / "modeling_umt_video.py").read_text()
    planted = tmp_path / "modeling_umt_video.py"
    planted.write_text(source.replace("# CODEPATH:", "# "))
    monkeypatch.setattr(lint_model_files, "find_files", lambda: [str(planted)])
    assert lint_model_files.main() != 0
