"""Plain words in docstrings, help, messages, comments and pages: phrases that made readers stop do not come back."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PHRASES = (
    r"(?<!there )\b(is|are) no [a-z]",
    r"\bhangs? on\b",
    r"\blaws?\b",
    r"\btold\b",
    r"\blies\b",
    r"\bmend",
    r"\bof its own\b",
    r"as it says",
    r"\bwhole\b",
)
# "none = " is a phrase of help texts and pages; with a capital it is the default of an argument.
PATTERN = re.compile(f"(?i:{'|'.join(PHRASES)})|none = ")
LICENSE = re.compile(r"\A# Copyright 2026 The umt_hf authors\..*?\n(?=[^#])", re.DOTALL)  # its words are not ours
PACKAGE = sorted([*(ROOT / "umt_hf").rglob("*.py"), ROOT / "umt_hf_launcher.py"])
TEXTS = sorted(
    [
        *(path for ending in ("*.yaml", "*.jinja", "*.md") for path in (ROOT / "umt_hf").rglob(ending)),
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "docs").glob("*.py"),
        *(ROOT / "examples").rglob("*.*"),
        *(path for ending in ("*.py", "README.md") for path in (ROOT / "benchmarks").rglob(ending)),
        *(path for ending in ("*.md", "*.yml") for path in (ROOT / ".github").rglob(ending)),
        ROOT / "Makefile",
        ROOT / "mkdocs.yml",
    ]
)


def find_phrases(text: str) -> list[str]:
    """Line number and phrase of each match; names such as `load_whole` count too."""
    text = LICENSE.sub(lambda header: "\n" * header[0].count("\n"), text)
    spaced = re.sub(r"(?<=[a-z])_(?=[a-z])", " ", text)
    return [f"{spaced.count(chr(10), 0, found.start()) + 1}: {found[0]}" for found in PATTERN.finditer(spaced)]


@pytest.mark.parametrize("path", [*PACKAGE, *TEXTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_plain_words(path):
    if path.suffix != ".pyc":
        assert find_phrases(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "It is no index.",
        "hangs on it",
        "a sampling law",
        "are told",
        "it lies there",
        "mended",
        "none = off",
        "a step of its own",
        "as it says",
        "load_whole_model",
        "There are no videos, which\nare no errors.",
    ],
)
def test_planted_phrases_are_found(text):
    assert len(find_phrases(text)) == 1


def test_plain_sentences_pass():
    assert (
        find_phrases("There is no index. It depends on the schedule. Everything is complete. A lawn, amended.") == []
    )
