"""Convert synthetic files of the released checkpoints' real names, shapes and sizes, one after the other.

    python -m tests.hub.check_zoo                    # all entries: an hour or more, 10 GB of disk
    python -m tests.hub.check_zoo umt-vit-l16-25m    # some of them

Each file is written, served by a Hub on this machine, converted by `umt-hf convert` in a process of its own, and
removed. The table tells how long that process took and how much memory it held: `anonymous` is its own, the rest are
pages of the files it maps, which the system takes back when it needs them.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.hub.released import build_released_tensors, write_bert_tokenizer
from tests.hub.server import LoopbackHub
from umt_hf.zoo import ZooEntry, find_entry, load_zoo

POLL_SECONDS = 0.05


def read_memory(pid: int) -> tuple[int, int]:
    """Resident bytes of a process: all, and those that are no page of a file."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has ended
        return 0, 0
    sizes = dict(line.split(":", 1) for line in text.splitlines() if line.startswith(("VmRSS", "RssAnon")))
    return tuple(int(sizes[name].split()[0]) * 1024 if name in sizes else 0 for name in ("VmRSS", "RssAnon"))


def run_watched(command: list[str], environment: dict[str, str], folder: Path) -> tuple[str, int, int]:
    """Standard output of a command, and the most memory that it held, all and anonymous."""
    process = subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    peaks = (0, 0)
    while process.poll() is None:
        peaks = tuple(map(max, peaks, read_memory(process.pid)))
        time.sleep(POLL_SECONDS)
    output, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors.decode()[-3000:]}")
    return output.decode(), *peaks


def check_entry(entry: ZooEntry, root: Path) -> str:
    """Convert one entry; a line of the table."""
    source = root / "source.pth"
    torch.save({"model": build_released_tensors(entry)}, source)
    with LoopbackHub(root / "hub") as hub:
        hub.add_repo(entry.repo, {entry.file: source})
        if entry.tokenizer:
            hub.add_repo(entry.tokenizer, write_bert_tokenizer(root / "bert"))
        command = [sys.executable, "-m", "umt_hf.cli", "convert", entry.name, "--max-shard-size", "1GB", "--json"]
        environment = {**hub.environment(), "PYTHONPATH": os.getcwd()}
        start = time.perf_counter()
        output, peak, anonymous = run_watched(command, environment, root)
        seconds = time.perf_counter() - start
    report = json.loads(output)
    shards = list((root / entry.name).glob("*.safetensors"))
    size = source.stat().st_size
    assert report["output_difference"] == 0.0 and (root / entry.name / "README.md").is_file()
    return (
        f"{entry.name:<30} {size / 1e9:6.2f} {len(shards):6} {report['num_used']:6} {len(report['set_aside']):6} "
        f"{seconds:8.0f} {peak / 1e9:8.2f} {anonymous / 1e9:10.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="Entries; by default all.")
    names = parser.parse_args().names or list(load_zoo())
    heading = ("checkpoint", "GB", "shards", "used", "aside", "seconds", "peak GB", "anonymous")
    print("{:<30} {:>6} {:>6} {:>6} {:>6} {:>8} {:>8} {:>10}".format(*heading), flush=True)
    for name in names:
        root = Path(tempfile.mkdtemp(prefix="check_zoo_"))
        try:
            print(check_entry(find_entry(name), root), flush=True)
        finally:
            shutil.rmtree(root)


if __name__ == "__main__":
    main()
