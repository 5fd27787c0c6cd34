"""Run Transformers' linter for model files over the files that travel to the Hub.

    python -m tests.lint_model_files

A rule that does not fit a package outside the library is switched off by name, here alone.
"""

import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

SWITCHED_OFF = {
    "TRF016": "a false alarm: do_convert_rgb acts in preprocess, before the videos of a batch reach _preprocess",
    "TRF057": "auto_docstring fills in the library's own shapes, which are not ours; docstrings are Google's here",
}
WINGS = ("modeling", "processing")
PREFIXES = ("configuration_", "modeling_", "processing_", "video_processing_")


def write_rules(path: Path) -> None:
    """Write the linter's bundled rules with `SWITCHED_OFF` switched off: the command can only switch rules on."""
    rules = files("mlinter").joinpath("rules.toml").read_text(encoding="utf-8")
    for name in SWITCHED_OFF:
        rules, count = re.subn(rf"(\[rules\.{name}\]\n(?:[^\[].*\n)*?default_enabled = )true", r"\1false", rules)
        if count != 1:
            raise ValueError(f"{name} is not an enabled rule of the installed transformers-mlinter.")
    path.write_text(rules, encoding="utf-8")


def find_files() -> list[str]:
    """Files of the package that the linter knows by their names."""
    package = Path(__file__).parents[1] / "umt_hf"
    return [
        str(path) for wing in WINGS for path in sorted((package / wing).glob("*.py")) if path.name.startswith(PREFIXES)
    ]


def main() -> int:
    """Lint; the exit code is the linter's."""
    with TemporaryDirectory() as folder:
        rules = Path(folder) / "rules.toml"
        write_rules(rules)
        command = [sys.executable, "-m", "mlinter", "--no-progress", "--no-cache", "--rules-toml", str(rules)]
        return subprocess.run([*command, *find_files()], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
