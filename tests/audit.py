"""Licences and known vulnerabilities of the libraries: `make audit`.

`python -m tests.audit licenses` looks at what the package and its extras ask for, and what that asks for in turn, as
far as it is installed. `python -m tests.audit vulnerabilities` reads what pip-audit writes with `--format json`, since
pip-audit itself passes where its service knows not one of the packages, as behind an index of files alone.
"""

import json
import re
import sys
from email.message import Message
from importlib.metadata import PackageNotFoundError, metadata, requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# Those that ask for a notice, and those that hold for their own files alone.
ALLOWED = re.compile(
    r"\b(Apache|MIT|0?BSD|ISC|HPND|PSF|Python Software|MPL|Mozilla|Academic Free|Zlib|CC0|BSL-1|CNRI|LLVM-exception)"
)
# PyTorch's wheels for Linux ask for these, which have terms of NVIDIA.
FROM_NVIDIA = re.compile(r"nvidia-|cuda-toolkit$")
STATED = {"torchao": "BSD-3-Clause"}  # in its LICENSE file alone
OF_DEVELOPERS = {"dev", "docs"}  # extras


def read_licenses(name: str, facts: Message) -> list[str]:
    """What a package says of its licence: the expression, else the classifiers, else the first line of the text."""
    if expression := STATED.get(name) or facts.get("License-Expression"):
        return re.split(r" (?:AND|OR|WITH) ", re.sub(r"[()]", "", expression))
    classifiers = [line.split(" :: ")[-1] for line in facts.get_all("Classifier", []) if line.startswith("License")]
    text = facts.get("License", "").strip() or "no licence stated"
    return classifiers or re.split(r" AND |;", text.splitlines()[0])


def list_refused(found: dict[str, Message | None]) -> list[str]:
    """Packages with a licence that is not allowed, and what they say."""
    installed = {name: facts for name, facts in sorted(found.items()) if facts is not None}
    read = {name: read_licenses(name, facts) for name, facts in installed.items() if not FROM_NVIDIA.match(name)}
    return [f"{name} ({', '.join(said)})" for name, said in read.items() if not all(map(ALLOWED.search, said))]


def collect(name: str, extras: set[str], found: dict[str, Message | None]) -> None:
    """Add a package and what it asks for; `None` for what is not installed."""
    try:
        found[name] = metadata(name)
    except PackageNotFoundError:
        found[name] = None
        return
    for wanted in map(Requirement, requires(name) or []):
        needed = canonicalize_name(wanted.name)
        is_asked = wanted.marker is None or any(wanted.marker.evaluate({"extra": extra}) for extra in {"", *extras})
        if is_asked and needed not in found:
            collect(needed, wanted.extras, found)


def check_licenses() -> str | None:
    """Give what is wrong as a sentence."""
    found: dict[str, Message | None] = {}
    collect("umt-hf", {*metadata("umt_hf").get_all("Provides-Extra", [])} - OF_DEVELOPERS, found)
    missing = [name for name, facts in sorted(found.items()) if facts is None]
    if refused := list_refused(found):
        return f"Not in the licences that tests/audit.py allows: {'; '.join(refused)}."
    print(
        f"Licences of {len(found) - len(missing)} packages are allowed; not installed: {', '.join(missing) or 'none'}."
    )
    return None


def check_vulnerabilities(report: str) -> str | None:
    """Give what is wrong in a report of pip-audit as a sentence."""
    where = "Run `make audit` where https://pypi.org/pypi/ is reached."
    try:
        packages = [package for package in json.loads(report)["dependencies"] if package["name"] != "umt-hf"]
    except ValueError:
        return f"pip-audit wrote no report. {where}"
    if known := [f"{package['name']} {one['id']}" for package in packages for one in package.get("vulns", [])]:
        return f"Known vulnerabilities: {', '.join(known)}. Ask for the fixed versions in pyproject.toml."
    if unknown := [package["name"] for package in packages if "skip_reason" in package]:
        return f"pip-audit found nothing about {len(unknown)} of {len(packages)} packages ({unknown[0]}, ...). {where}"
    print(f"No vulnerability of {len(packages)} packages is known.")
    return None


if __name__ == "__main__":
    sys.exit(check_licenses() if sys.argv[1] == "licenses" else check_vulnerabilities(sys.stdin.read()))
