"""The description that a package index shows: README.md without links that lead nowhere there.

All else about the package is in pyproject.toml. Links of README.md are relative, which a forge resolves and an index
does not. Without a public address a link becomes its text and the path in the repository, and the paragraph of
pictures goes; with `Repository = "..."` in `[project.urls]` links and pictures get that address.
"""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
LINK = r"\[([^\[\]]+)\]\((?!\w+:|#)([^)\s]+)\)"


def describe(readme: str, address: str | None = None) -> str:
    """README.md for a page elsewhere.

    Args:
        readme: Its text.
        address: Of the repository on a forge; `None` = it has none.
    """
    if address is not None:
        readme = re.sub(r'(<img src=")(?!\w+:)', rf"\1{address}/raw/main/", readme)
        return re.sub(LINK, rf"[\1]({address}/blob/main/\2)", readme)
    readme = re.sub(r"(?:^<img .*\n)(?:^.+\n)*\n", "", readme, flags=re.MULTILINE)
    readme = re.sub(rf"\({LINK}\)", r"(\1: `\2`)", readme)
    return re.sub(LINK, r"\1 (`\2`)", readme)


def read_address() -> str | None:
    """The repository's address, if pyproject.toml has one."""
    found = re.search(
        r'^Repository = "([^"]+?)/?"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
    )
    return found[1] if found else None


if __name__ == "__main__":
    setup(
        long_description=describe((ROOT / "README.md").read_text(encoding="utf-8"), read_address()),
        long_description_content_type="text/markdown",
    )
