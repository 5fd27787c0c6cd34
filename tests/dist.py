"""Install the files of `dist/`, each into an environment of its own, and run their tests far from the tree.

`python -m tests.dist ARGUMENTS_OF_PYTEST`. Libraries are those of this environment, so that nothing is downloaded. The
tests are those of the source distribution; tests/conftest.py lists the ones that need a clone.
"""

import hashlib
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
from pathlib import Path

DIST = Path(__file__).parents[1] / "dist"
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def install(file: Path, folder: Path) -> dict[str, str]:
    """Install a file into an environment that sees the libraries of this one; SHA-256 of each file of the package."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", "--no-compile"]
    command = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", *options, file]
    subprocess.run(command, check=True, env=ENVIRONMENT)
    files = [path for path in site.rglob("*") if path.is_file() and ".dist-info" not in str(path.relative_to(site))]
    return {str(path.relative_to(site)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> int:
    """Give the exit code of the tests."""
    (sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    with tempfile.TemporaryDirectory(prefix="umt_hf_dist_") as temporary:
        folder = Path(temporary)
        if install(wheel, folder / "wheel") != install(sdist, folder / "sdist"):
            raise SystemExit(f"{wheel.name} and {sdist.name} install other files: build both from one tree.")
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        (source,) = folder.glob("umt_hf-*")
        (folder / "elsewhere").mkdir()
        for name in ("tests", "pyproject.toml"):  # the second has the markers
            (source / name).rename(folder / "elsewhere" / name)
        command = [folder / "wheel" / "bin" / "python", "-m", "pytest", "-p", "no:cacheprovider", *sys.argv[1:]]
        return subprocess.run(command, cwd=folder / "elsewhere", env=ENVIRONMENT).returncode


if __name__ == "__main__":
    sys.exit(main())
