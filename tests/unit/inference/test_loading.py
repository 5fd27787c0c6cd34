"""One strict loader."""

from pathlib import Path

import umt_hf

PACKAGE = Path(umt_hf.__file__).parent
# `modeling` travels to the Hub and takes nothing of ours along; teachers stand below `inference`.
BELOW = ("modeling", "teachers")


def test_missing_weights_are_read_in_one_module():
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if "missing_keys" in path.read_text(encoding="utf-8") and path.relative_to(PACKAGE).parts[0] not in BELOW
    }
    assert found == {"inference/loading.py"}
