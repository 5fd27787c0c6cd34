"""Code that users read fits a page: 80 columns in pages and docstrings, and names in tables that can be broken."""

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COLUMNS = 80
# Of a name in a table, between two places where it may be broken; three of these fit side by side.
CELL_COLUMNS = 32
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/*.md", "benchmarks/**/*.md", "umt_hf/**/*.md")
    for path in ROOT.glob(pattern)
)
MODULES = sorted((ROOT / "umt_hf").rglob("*.py"))


def load_hooks():
    """`docs/build_hooks.py`, which is in no package."""
    spec = importlib.util.spec_from_file_location("build_hooks_of_the_docs", ROOT / "docs" / "build_hooks.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass asks for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooks():
    return load_hooks()


def find_wide_code(text: str) -> list[str]:
    """Line number, width and text of the lines of fenced blocks that are too wide."""
    found = []
    is_code = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            is_code = not is_code
        elif is_code and len(line) > COLUMNS:
            found.append(f"{number}: {len(line)} columns: {line}")
    return found


def find_wide_examples(docstring: str) -> list[str]:
    """The same of a docstring: fenced blocks, examples and indented commands, which the API pages show as code."""
    fenced = find_wide_code(docstring)
    lines = [line.strip() for line in docstring.splitlines() if re.match(r"\s*(>>> |\.\.\. )|    \S", line)]
    known = (">>> ", "... ", "umt-hf ", "accelerate ", "python -m ", "--", "path,", "{")
    return fenced + [line for line in lines if line.startswith(known) and len(line) > COLUMNS]


def find_wide_cells(text: str, hooks) -> list[str]:
    """Names in tables that nothing breaks before they are too wide."""
    found = []
    for line in text.splitlines():
        if line.startswith("|"):
            for code in re.findall(r"`([^`]+)`", line):
                html = hooks.let_names_break(f"<td><code>{code.replace('<', '')}</code></td>")
                parts = re.split(r"<wbr>|\s|-(?=\w)", re.sub(r"</?(?:td|code|span)[^>]*>", "", html))
                found += [code for part in parts if len(part) > CELL_COLUMNS]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_of_pages_fits(page, hooks):
    text = hooks.write_recipes(page.read_text(encoding="utf-8"))
    assert find_wide_code(text) == []
    assert find_wide_cells(text, hooks) == []


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "flags").glob("*.md")), ids=lambda page: page.stem)
def test_tables_of_flags_fit(page, hooks):
    text = hooks.write_flags(page.read_text(encoding="utf-8"))
    assert text.count("\n| `--") > 10
    assert find_wide_code(text) == [] and find_wide_cells(text, hooks) == []


def test_code_of_docstrings_fits():
    found = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                lines = find_wide_examples(ast.get_docstring(node) or "")
                found += [f"{path.relative_to(ROOT)}: {line}" for line in lines]
    assert found == []


def test_what_is_too_wide_is_found(hooks):
    wide = "umt-hf classify " + "v" * 70
    assert len(find_wide_code(f"text {wide}\n```bash\n{wide}\numt-hf zoo\n```\n{wide}\n")) == 1
    assert len(find_wide_examples(f"Title.\n\n    {wide}\n")) == 1
    assert len(find_wide_examples(f"Title.\n\n```python\n>>> f({'v' * 80})\n```\n")) >= 1
    # A backslash at the end of a line joins the lines of a docstring that is not raw.
    command = f"    {wide[:60]} \\\n        --flag {'v' * 40}\n"
    for prefix, num_found in (("", 1), ("r", 0)):
        docstring = ast.get_docstring(ast.parse(f'{prefix}"""Title.\n\n{command}\nText."""')) or ""
        assert len(find_wide_examples(docstring)) == num_found
    assert find_wide_cells(f"| `{'v' * 40}` | `tests/unit/a.py::test_{'long_' * 20}` |", hooks) == ["v" * 40]


def test_long_names_of_a_table_may_be_broken(hooks):
    cell = "<td><code>tests/unit/test_zoo.py::test_label_names</code> and <code>--top_k</code></td>"
    assert hooks.let_names_break(cell) == (
        "<td><code>tests/<wbr>unit/<wbr>test_<wbr>zoo.<wbr>py::<wbr>test_<wbr>label_<wbr>names</code> and "
        '<code><span class="nobreak">--t</span>op_k</code></td>'
    )
    assert "<wbr>" in hooks.on_page_content(cell) and "<wbr>" not in hooks.on_page_content(cell.replace("td", "p"))


def test_a_command_keeps_a_flag_and_its_values_together(hooks):
    command = "umt-hf pretrain stage2 " + " ".join(f"--flag_{number} value_{number}" for number in range(9))
    lines = hooks.break_command(command).split(" \\\n")
    assert " ".join(line.strip() for line in lines) == command
    assert len(lines) > 2 and all(len(line) <= COLUMNS - 2 and not line.strip().startswith("value") for line in lines)
    assert max(map(len, hooks.break_command(f"umt-hf x --files {'file.csv ' * 30}").splitlines())) <= COLUMNS
