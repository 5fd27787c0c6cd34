"""What surrounds the package: workflows, issue forms, citation, and addresses that do not exist yet."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import OF_A_CLONE
from umt_hf.version import __version__

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings tomli
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted(file for file in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if file.name != "config.yml")
RELEASES = ROOT / "tests" / "fixtures" / "releases"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "mkdocs.yml", ROOT / "CITATION.cff"])
OWN_ADDRESS = re.compile(r"(?:https?://|git@)[^\s<>()\"'`]*\bumt[_-]hf\b(?:\.git)?(?![\w.-]*\w)", re.IGNORECASE)

by_name = pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)


def read_yaml(file: Path) -> dict:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def read_pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def make_targets() -> set[str]:
    return set(
        re.findall(r"^([\w-]+)(?: [\w -]+)?:(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )


def called_targets(workflow: dict) -> list[str]:
    """The targets of all `make` commands of a workflow, which may run nothing else."""
    called = []
    for job in workflow["jobs"].values():
        for step in job.get("steps", []):
            for line in filter(None, map(str.strip, step.get("run", "").splitlines())):
                command, *words = shlex.split(line)
                assert command == "make" and words, f"{line!r} is not a call of make: put it into the Makefile"
                called += [word for word in words if not word.startswith("-") and "=" not in word]
    return called


def test_the_four_workflows_are_there():
    assert [file.stem for file in WORKFLOWS] == ["docs", "oldest", "release", "tests"]


@by_name
def test_workflows_call_targets_of_the_makefile(file):
    called = called_targets(read_yaml(file))
    assert called and set(called) <= make_targets()
    expected = {"docs": "docs", "oldest": "test-oldest", "release": "dist", "tests": "test"}
    assert expected[file.stem] in called


def test_calls_that_are_not_of_the_makefile_are_found():
    workflow = {"jobs": {"a": {"steps": [{"uses": "x"}, {"run": "make -s test VENV=b\nmake deploy"}]}}}
    assert called_targets(workflow) == ["test", "deploy"]
    assert "test" in make_targets() and "deploy" not in make_targets()
    with pytest.raises(AssertionError, match="not a call of make"):
        called_targets({"jobs": {"a": {"steps": [{"run": "pip install x"}]}}})


@by_name
def test_workflows_have_little_power_and_an_end(file):
    """Read-only but for the publishing job, bounded in time, one run at a time, actions fixed to a commit."""
    workflow = read_yaml(file)
    assert "has not yet run on a forge" in file.read_text(encoding="utf-8").split("\nname:")[0]
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["group"] == f"{file.stem}-${{{{ github.ref }}}}"
    assert "cancel-in-progress" in workflow["concurrency"]
    for name, job in workflow["jobs"].items():
        is_publishing = (file.stem, name) == ("release", "publish")
        assert job.get("permissions") == ({"id-token": "write"} if is_publishing else None), name
        if "uses" in job:  # a workflow of this repository, with time-outs where its jobs stand
            assert (ROOT / job["uses"]).is_file() and "workflow_call" in read_yaml(ROOT / job["uses"])[True], name
            continue
        assert 0 < job["timeout-minutes"] <= 60, name
        for step in job["steps"]:
            assert "secrets." not in str(step), name
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"]), step["uses"]
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False


def test_one_commit_for_each_action():
    """An action is the same commit, with the same version beside it, wherever it is used."""
    lines = re.findall(
        r"uses: ([\w-]+/[\w-]+)@(.+)", "\n".join(file.read_text(encoding="utf-8") for file in WORKFLOWS)
    )
    commits = {}
    for action, commit in lines:
        assert re.fullmatch(r"[0-9a-f]{40} # v\d+\.\d+\.\d+", commit), action
        assert commits.setdefault(action, commit) == commit, action


def test_the_supported_pythons_are_tested():
    versions = read_yaml(ROOT / ".github/workflows/tests.yml")["jobs"]["tests"]["strategy"]["matrix"]["python"]
    assert versions == ["3.10", "3.11", "3.12", "3.13"]
    assert read_pyproject()["project"]["requires-python"] == f">={versions[0]}"
    oldest = read_yaml(ROOT / ".github/workflows/oldest.yml")["jobs"]["oldest"]["steps"]
    assert versions[0] in [step.get("with", {}).get("python-version") for step in oldest]


def test_publishing_waits_for_tests_and_a_tag():
    workflow = read_yaml(ROOT / ".github/workflows/release.yml")
    on = workflow[True]  # YAML 1.1 reads the key `on` as a boolean
    assert list(on) == ["push"] and list(on["push"]) == ["tags"]
    jobs = workflow["jobs"]
    assert jobs["publish"]["needs"] == "build" and jobs["build"]["needs"] == "tests"
    assert jobs["tests"]["uses"] == "./.github/workflows/tests.yml"
    assert not any("run" in step for step in jobs["publish"]["steps"])


def test_actionlint_finds_nothing():
    actionlint = shutil.which("actionlint", path=Path(sys.executable).parent) or shutil.which("actionlint")
    if actionlint is None:
        pytest.skip("needs actionlint (`make workflows` installs it)")
    command = [actionlint, "-no-color", "-shellcheck=", "-pyflakes=", *map(str, WORKFLOWS)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("file", FORMS, ids=lambda file: file.stem)
def test_issue_forms_are_complete(file):
    form = read_yaml(file)
    assert all(isinstance(form[key], str) and form[key].strip() for key in ("name", "description"))
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in form["body"]} <= {"markdown", "textarea", "input", "dropdown", "checkboxes"}
    assert len({field["id"] for field in fields}) == len(fields) and all(
        field["attributes"]["label"] for field in fields
    )
    assert any(field.get("validations", {}).get("required") for field in fields)
    for field in form["body"]:
        if field["type"] == "markdown":
            assert field["attributes"]["value"].strip()
        if field["type"] in ("dropdown", "checkboxes"):
            assert field["attributes"]["options"]


def test_a_bug_report_asks_for_the_doctor():
    assert [file.stem for file in FORMS] == ["bug_report", "feature_request"]
    required = [field for field in read_yaml(FORMS[0])["body"] if field.get("validations", {}).get("required")]
    assert any("umt-hf doctor" in field["attributes"]["label"] for field in required)
    assert read_yaml(ROOT / ".github/ISSUE_TEMPLATE/config.yml") == {"blank_issues_enabled": False}


def test_the_citation_is_the_papers():
    """The keys that the format requires, and the same paper as in the README's BibTeX entry."""
    citation = read_yaml(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software" and citation["message"]
    assert citation["title"].startswith("umt_hf")
    project = read_pyproject()["project"]
    assert citation["authors"] == project["authors"] == [{"name": "The umt_hf authors"}]
    assert citation["license"] == project["license"]
    paper = citation["preferred-citation"]
    assert paper["type"] == "conference-paper" and paper["url"] == "https://arxiv.org/abs/2303.16058"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"^ +(\w+) += \{([^{}]+)\},?$", readme, re.MULTILINE)
    bibtex = {key: " ".join(value.split()) for key, value in found}  # a value may go over several lines
    authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    assert authors == bibtex["author"] and paper["title"] == bibtex["title"]
    assert paper["collection-title"] == bibtex["booktitle"] and str(paper["year"]) == bibtex["year"]


def test_the_tests_of_a_clone_are_there():
    for name in OF_A_CLONE:
        file, _, test = name.partition("::")
        assert f"def {test or 'test_'}" in (ROOT / "tests" / file).read_text(encoding="utf-8"), name


def test_the_release_has_one_date():
    """In the changelog and the citation, and its files are kept for later versions."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## (\d+\.\d+\.\d+) \((\d{4}-\d\d-\d\d)\)$", changelog, re.MULTILINE)
    citation = read_yaml(ROOT / "CITATION.cff")
    assert released[0] == (__version__, str(citation["date-released"])) and citation["version"] == __version__
    assert {version for version, _ in released} == {path.name for path in RELEASES.iterdir()}


def test_no_address_before_there_is_one():
    """The three lines that the address goes into later, which CONTRIBUTING.md names, wait for it."""
    assert "urls" not in read_pyproject()["project"]
    assert "git clone <this repository>" in (ROOT / "README.md").read_text(encoding="utf-8")
    citation = read_yaml(ROOT / "CITATION.cff")
    assert not {"repository", "repository-code", "url"} & set(citation)
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for line in (
        "`git clone` in `README.md`",
        "`[project.urls]` in `pyproject.toml`",
        '`repository-code: "..."` in `CITATION.cff`',
    ):
        assert line in contributing
    for page in PAGES:
        found = OWN_ADDRESS.findall(page.read_text(encoding="utf-8"))
        assert not found, f"{page.relative_to(ROOT)}: {found}"


@pytest.mark.parametrize("text", [
    "[issues](https://github.com/someone/umt_hf/issues)", "git clone git@github.com:someone/umt-hf.git", "<https://example.org/umt_hf>",
])  # fmt: skip
def test_own_addresses_are_found(text):
    assert OWN_ADDRESS.search(text)
    assert not OWN_ADDRESS.search(text.replace("umt_hf", "unmasked_teacher").replace("umt-hf", "umt-demo"))


def test_security_names_how_to_report_and_what_is_trusted():
    text = " ".join((ROOT / "SECURITY.md").read_text(encoding="utf-8").split())
    for part in (
        "Report a vulnerability",
        "Supported versions",
        "untrusted input",
        "`weights_only=True`",
        "`training_state/`",
    ):
        assert part in text
