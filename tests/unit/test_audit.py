"""What `make audit` passes and refuses."""

import json
from email.message import Message

import pytest

from tests.audit import check_vulnerabilities, collect, list_refused


def say(**facts: str) -> Message:
    message = Message()
    for name, value in facts.items():
        message[name.replace("_", "-")] = value
    return message


def test_what_the_libraries_ask_for_is_looked_at_too():
    found: dict = {}
    collect("umt-hf", {"demo"}, found)
    assert {"torch", "gradio", "fsspec"} <= found.keys() and "pytest" not in found


def test_other_licences_are_refused():
    found = {
        "a": say(License_Expression="MPL-2.0 AND (Apache-2.0 OR MIT)"),
        "b": say(License_Expression="MIT AND GPL-3.0-only"),
        "c": say(Classifier="License :: OSI Approved :: GNU Affero General Public License v3"),
        "d": say(License="BSD-3-Clause\nwith a long text"),
        "e": say(),
        "nvidia-f": say(License="Proprietary"),
        "g": None,
    }
    refused = ["b (MIT, GPL-3.0-only)", "c (GNU Affero General Public License v3)", "e (no licence stated)"]
    assert list_refused(found) == refused


@pytest.mark.parametrize(
    "packages,message",
    [
        ([{"name": "a", "vulns": []}, {"name": "umt-hf", "skip_reason": "not found"}], None),
        ([{"name": "a", "vulns": [{"id": "CVE-1"}]}, {"name": "b", "skip_reason": "not found"}], "a CVE-1"),
        ([{"name": "a", "vulns": []}, {"name": "b", "skip_reason": "not found"}], "nothing about 1 of 2 packages (b"),
    ],
)
def test_vulnerabilities_and_silence_are_named(packages, message):
    problem = check_vulnerabilities(json.dumps({"dependencies": packages}))
    assert problem is None if message is None else message in problem


def test_no_report_is_named():
    assert "wrote no report" in check_vulnerabilities("")
