"""What the README and the guides say: every block runs, every flag, name and link is there, and the site builds."""

import ast
import dataclasses
import importlib
import importlib.util
import re
import shlex
import shutil
import socket
from pathlib import Path

import pytest
from fsspec.registry import _registry
from safetensors import safe_open

import umt_hf
from benchmarks.scale import model as scale_model
from tests.e2e.conftest import ROOT
from tests.e2e.pages import (
    NOT_RUN,
    PAGES,
    WRITTEN_BY,
    StandInStore,
    fill_store,
    find_reason,
    list_flags,
    list_named_scripts,
    load_clips_as_msrvtt,
    prepare,
    read_blocks,
    run_block,
    run_command,
    split_commands,
)
from umt_hf.runs.config import list_recipes
from umt_hf.runs.scripts import GROUP_TITLES, SCRIPTS

pytest.importorskip("lancedb")

# What the Python of a page prints, block by block.
PRINTED = {
    "docs/features.md": [
        r"0\.00 to .*\(16,\)",
        r"\d+ \S*videos\S+ \d.*\(16,\)",
        r"\(\d+, 16\) \d+\.\d+\n$",
        r"0\.00 to .*\(16,\)",
    ],
}
READMES = [str(path.relative_to(ROOT)) for path in [*ROOT.glob("benchmarks/**/*.md"), *ROOT.glob("umt_hf/**/*.md")]]
# Flags that pages name without the script that has them.
OTHER_FLAGS = {
    "docs/reproduction.md": {"--quick", "--budget"},  # of the tour
    # Of every evaluation, and of both pre-training stages.
    "docs/reliability.md": {"--disable_tqdm", "--dataloader_timeout_seconds", "--profile", "--teacher_quantization"},
    "docs/dependencies.md": {"--teacher_quantization"},
    "docs/pretraining.md": {"--nproc_per_node"},  # of torchrun
    "docs/precision.md": {"--teacher_quantization"},
    "docs/scaling.md": {f"--{field.name}" for field in dataclasses.fields(scale_model.Arguments)},
    "docs/data.md": {"--sort"},  # of tar
    "docs/hub_deployment.md": {"--secrets", "--timeout", "--with"},  # of `hf jobs uv run`
    "docs/hub.md": {"--mode"},  # of every fine-tuning script, which it does not list
}


@pytest.fixture(scope="session")
def prepared(shapes, tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("prepared"), shapes)


@pytest.fixture(scope="session")
def hooks():
    spec = importlib.util.spec_from_file_location("build_hooks", ROOT / "docs" / "build_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", [page for page in PAGES if read_blocks(page)])
def test_blocks_run(page, prepared, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(prepared, tmp_path / "copy")
    monkeypatch.chdir(folder)
    monkeypatch.setitem(_registry, "s3", StandInStore)
    fill_store(folder)
    monkeypatch.syspath_prepend(str(folder))  # as for a script there
    if importlib.util.find_spec("mteb"):
        monkeypatch.setattr("mteb.tasks.retrieval.eng.msr_vtt.load_dataset", load_clips_as_msrvtt)
    for written in WRITTEN_BY.get(page, []):
        shutil.rmtree(written)
    printed = []
    for block in read_blocks(page):
        capsys.readouterr()
        try:
            run_block(block)
        except Exception as error:
            raise AssertionError(f"the block at {page}:{block.line} fails: {error}") from error
        if block.language == "python":
            printed.append(capsys.readouterr().out)
    for text, pattern in zip(printed, PRINTED.get(page, [""] * len(printed)), strict=True):
        assert re.match(pattern, text, re.DOTALL), f"{page}: {text!r}"


@pytest.mark.parametrize("page", PAGES)
def test_blocks_import_the_package(page):
    """Without it the Auto classes do not know the models, which a block that runs in this process does not show."""
    for block in read_blocks(page):
        if block.language == "python" and re.search(r"\b(Auto\w+|pipeline)\b", block.text):
            assert re.search(r"\bumt_hf\b|trust_remote_code", block.text), f"{page}:{block.line}"


def read_inline_commands(text: str) -> list[list[str]]:
    """Words of the commands in a text's prose, tables and indented blocks; without what is cut short by `...`."""
    found = re.findall(r"(?<!`)`((?:umt-hf|accelerate launch) [^`]+)`(?!`)", text)
    found += re.findall(r"^    ((?:umt-hf|accelerate launch) (?:.*\\\n)*.*)$", text, re.MULTILINE)
    commands = []
    for command in found:
        line = command.rstrip().removesuffix(" -m").replace("\\|", "|").replace("\\\n", " ")
        words = shlex.split(line.split(" | ")[0])
        if "..." not in command and len(words) > 2 and not words[1].isupper():
            commands.append(words)
    return commands


def check_command(words: list[str]) -> None:
    """Parse a command that a text names; one that asks for help, or gives a verb alone, has to exist."""
    words = [word for word in words if word != "--help"]
    if words[0] == "umt-hf" and words[1] in GROUP_TITLES and len(words) <= 3:
        assert [entry for entry in SCRIPTS if [entry.group, entry.verb][: len(words) - 1] == words[1:]], words
    elif words[:3] != ["accelerate", "launch", "-m"] or len(words) > 4:
        try:
            run_command(words, is_run=False)
        except Exception as error:  # of typer's own copy of click, or of click
            # A text may name a flag alone; unknown ones are found before.
            if type(error).__name__ not in ("MissingParameter", "BadOptionUsage"):
                raise
    else:
        assert importlib.util.find_spec(words[3]), words


@pytest.mark.parametrize("page", [*PAGES, "examples/README.md", *READMES])
def test_commands_in_prose_and_tables_are_accepted(page, prepared, monkeypatch):
    monkeypatch.chdir(prepared)  # some commands want the folders that they are given
    for words in read_inline_commands((ROOT / page).read_text(encoding="utf-8")):
        try:
            check_command(words)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{page} names {shlex.join(words)}: {error!r}") from error


def test_commands_of_docstrings_are_accepted():
    """They stand at the top of the scripts' help and of the API pages."""
    checked = 0
    for path in sorted((ROOT / "umt_hf").rglob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        for words in read_inline_commands(docstring):
            checked += 1
            try:
                check_command(words)
            except (Exception, SystemExit) as error:
                raise AssertionError(f"{path.relative_to(ROOT)} names {shlex.join(words)}: {error!r}") from error
    assert checked >= 12


@pytest.mark.parametrize(
    "text",
    [
        "see `umt-hf classify video.mp4 --modle m`",
        "| a | `umt-hf pretrain stage3 --train_data x` |",
        "Title.\n\n    umt-hf finetune classification \\\n        --train_dta x\n",
        "`umt-hf evaluate retrievals --help`",
        "`accelerate launch -m umt_hf.training.stage1 --trian_data x`",
    ],
)
def test_wrong_commands_in_texts_are_noticed(text):
    ((words),) = read_inline_commands(text)
    with pytest.raises((Exception, SystemExit)):
        check_command(words)


def test_guides_start_scripts_by_the_command():
    """`umt-hf pretrain`, `finetune` and `evaluate`; `accelerate launch -m` is named once a guide, for clusters."""
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        launched = re.findall(r"accelerate launch -m (umt_hf\.(?:training|finetuning|evaluation)\S*)", text)
        assert len(launched) <= 1, f"{page}: {launched}"
        for block in read_blocks(page):
            assert not re.search(r"accelerate launch -m umt_hf\.(?!cli)", block.text), f"{page}:{block.line}"


def test_reasons_for_not_running_are_needed():
    for page, reasons in NOT_RUN.items():
        pages = PAGES if page == "any page" else [page] if page in PAGES else []
        blocks = [block for name in pages for block in read_blocks(name)]
        starts = [block.text for block in blocks if block.language == "python"]
        for block in blocks:
            if block.language == "bash":
                starts += [" ".join(words) + " " for words in split_commands(block.text)]
        for start in reasons if pages else ():
            assert any(text.startswith(start) for text in starts), f"{page} has no {start!r}"


@pytest.mark.parametrize(
    "text",
    [
        "umt-hf features videos --model m --out o --windows 3",
        "accelerate launch -m umt_hf.training.stage1 --train_dta x",
        "make breakfast",
        "pip install 'umt_hf[sarch]'",
        "rm -rf outputs",
    ],
)
def test_wrong_commands_are_noticed(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(text)
    with pytest.raises((AssertionError, ValueError)):
        run_command(words, find_reason("README.md", shlex.join(words) + " ") is None)


@pytest.mark.parametrize("page", PAGES)
def test_flags_exist(page):
    """A flag in a page is one of the scripts that the page names; in the migration page, that its section names."""
    text = (ROOT / page).read_text()
    parts = re.split(r"^## ", text, flags=re.MULTILINE) if page.endswith("migration.md") else [text]
    for part in parts:
        if page.endswith("migration.md"):  # the first cell of a row is the published code's
            part = re.sub(r"^\|[^|\n]*\|", "|", part, flags=re.MULTILINE)
        named = {
            flag for code in re.findall(r"`([^`\n]+)`", part) for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", code)
        }
        known = {"--config"} | OTHER_FLAGS.get(page, set()) | list_flags("accelerate launch")
        for script in list_named_scripts(part):
            known |= list_flags(script)
        assert named <= known, f"{page}, {part.splitlines()[0]!r}: {sorted(named - known)}"


def test_links_of_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    for link in re.findall(r"(?:\]\(|src=\")(?!https?:|#)([^)#\"]+)", text):
        assert (ROOT / link).exists(), link


def test_recipes_page_has_every_recipe(hooks):
    text = hooks.write_recipes((ROOT / "docs" / "recipes.md").read_text())
    for name in list_recipes():
        assert f"`{name}`" in text or f"### {name}\n" in text, name
    assert "| `classification_k400:l16` | top-1 of 90.3 % (8 frames x 3 x 4 views) |" in text
    assert "| `retrieval_msrvtt:l16_25m` | R@1 of 58.8 % text to video, 58.6 % video to text |" in text
    commands = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    assert len(commands) >= 30
    for command in commands:
        for words in split_commands(command):
            run_command(words, is_run=False)


@pytest.mark.parametrize("entry", SCRIPTS, ids=lambda entry: entry.module)
def test_the_page_of_flags_is_complete(hooks, entry):
    page = ROOT / "docs" / "flags" / f"{entry.group}_{entry.verb.replace('-', '_')}.md"
    text = hooks.write_flags(page.read_text())
    assert text.startswith(f"# {entry.command}\n") and "<!--" not in text
    sections = importlib.import_module(entry.module).SECTIONS
    for name, section in sections.items():
        assert f"## Section `{name}`" in text
        _, _, part = text.partition(f"## Section `{name}`")
        for own in dataclasses.fields(section):
            assert not own.init or f"\n| `--{own.name}` | " in part.split("\n## ")[0], own.name
    assert "%(default)s" not in text and "| `--config` |" in text


def test_recipes_without_a_source_are_refused(hooks, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("# Mine.\n# Command: umt-hf\nmask: {}\n")
    with pytest.raises(ValueError, match="Source"):
        hooks.read_recipe(recipe)


def test_api_pages_have_every_public_name():
    text = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    missing = [name for name in umt_hf.__all__ if f"::: umt_hf.{name}\n" not in text]
    assert not missing


def test_names_of_the_paper_index_exist():
    """Each row: names in backticks, then the module or modules that hold them."""
    rows = [line for line in (ROOT / "docs" / "paper_index.md").read_text().splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 20
    for row in rows:
        words = re.findall(r"`([^`]+)`", row.split("|")[2])
        files = [word for word in words if "/" in word]
        modules = [
            importlib.import_module(f"umt_hf.{file[:-3].replace('/', '.')}") for file in files if file[-3:] == ".py"
        ]
        for pattern in (file for file in files if not file.endswith(".py")):
            assert list((ROOT / "umt_hf").glob(pattern.rstrip("*") + "*")), f"{pattern} in {row}"
        assert files, row
        for name in (word for word in words if "/" not in word):
            assert any(has_name(module, name) for module in modules), f"{name} is in none of {files}"


def test_weight_names_of_the_migration_page_exist(prepared):
    """Second column of the table of names, against the models of every kind."""
    text = (ROOT / "docs" / "migration.md").read_text().split("| published name | name here |\n")[1].split("\n\n")[0]
    names = re.findall(r"`([^`]+)`", "".join(row.split("|")[2] for row in text.splitlines()[1:]))
    assert len(names) > 20
    keys = []
    for folder in ("umt-vit-b16", "umt-vit-b16-k400", "outputs/video_text", "outputs/answers"):
        with safe_open(prepared / folder / "model.safetensors", "pt") as weights:
            keys += weights.keys()
    missing = [name for name in names if not any(name in key for key in keys)]
    assert not missing


def has_name(module, name: str) -> bool:
    value = module
    for part in name.split("."):
        value = getattr(value, part, None)
    return value is not None


def test_site_builds_without_warnings_and_asks_nobody_else(tmp_path, monkeypatch):
    """As `make docs` does; a page that is not in the navigation, a dead link or a wrong docstring is a warning."""
    config = pytest.importorskip("mkdocs.config")
    build = pytest.importorskip("mkdocs.commands.build")

    def refuse(*_):
        raise AssertionError("the build asks the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(ROOT)
    build.build(config.load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path / "site")))
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(list((ROOT / "docs").rglob("*.md")))  # and one for what is not found
    for page in pages:
        html = page.read_text()
        assets = re.findall(r"<(?:script|img|iframe|source)[^>]+src=\"?([^\s\">]+)", html)
        assets += re.findall(r"<link[^>]+href=\"?([^\s\">]+)", html)
        assert assets
        assert not [asset for asset in assets if re.match(r"(https?:)?//", asset)], page
    for sheet in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", sheet.read_text()), sheet
    assert not list((tmp_path / "site").rglob("*.py"))
