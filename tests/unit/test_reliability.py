"""The tests that docs/reliability.md and SECURITY.md name are there, with what is collected under each name."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
PAGES = (PAGE, ROOT / "SECURITY.md")
TEST_ID = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def test_each_test_that_the_pages_name_is_collected(request):
    named = [found for page in PAGES for found in TEST_ID.findall(page.read_text(encoding="utf-8"))]
    assert len(named) > 25 and len(set(named)) > 25
    pytest.importorskip("gradio", reason="the tests of the page are not collected without it")
    collected = {item.nodeid.split("[")[0] for item in request.session.items}
    left = sorted({file for file, name in named if f"{file}::{name}" not in collected})
    if left:  # not all tests run
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-n", "0", *left]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        collected |= {line.split("[")[0] for line in done.stdout.splitlines()}
    assert not [f"{file}::{name}" for file, name in named if f"{file}::{name}" not in collected]


def test_each_row_of_the_page_names_a_test():
    tables = re.split(r"\n(?!\|)", PAGE.read_text(encoding="utf-8"))
    header = "| promise | shown by |\n| --- | --- |\n"
    promises = [row for part in tables if header in part for row in part.split(header)[1].strip().splitlines()]
    assert len(promises) >= 15 and all(TEST_ID.search(row) for row in promises)
    assert all(len(row.split(" | ")) == 2 for row in promises)


def test_the_page_states_the_limits_in_force():
    from umt_hf.processing.media_files import ReadingLimits

    text = PAGE.read_text(encoding="utf-8").replace(",", "")
    for name, value in vars(ReadingLimits()).items():
        (row,) = [line for line in text.splitlines() if f"`UMT_HF_{name.upper()}`" in line]
        assert f" {value} " in row
