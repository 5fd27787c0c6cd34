"""`make faults`: every hostile file against the reference, with one table of what was found.

python -m tests.faults.run [--seed 0] [--opens 5000] [--decoder pyav]
"""

import argparse
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults.check import (
    FAULTS,
    HANG_SECONDS,
    Verdict,
    Watch,
    check_file,
    count_descriptors,
    is_port_free,
    read_memory,
    write_file,
)
from tests.faults.files import LISTENING_PORT, HostileFile, make_files
from tests.faults.second import print_comparison
from umt_hf.processing.decoding import VideoDecodingError, open_video

MARK = "/umt_hf_faults_mark/"
OPENS = 5000
SAMPLE = 500
MAX_GROWTH = 20e6  # bytes


def check_apart(files: list[HostileFile], folder: Path, decoder: str, seed: int) -> list[Verdict]:
    """Check files in another process, so that a hang or a crash is a finding too."""
    context = multiprocessing.get_context("fork")
    verdicts: list[Verdict] = []
    while len(verdicts) < len(files):
        receiver, sender = context.Pipe(duplex=False)
        start = len(verdicts)
        worker = context.Process(target=_work, args=(files[start:], folder, decoder, seed, sender))
        worker.start()
        sender.close()
        while len(verdicts) < len(files):
            try:
                if not receiver.poll(HANG_SECONDS):
                    verdicts.append(Verdict("hang", f"over {HANG_SECONDS} s"))
                    break
                verdicts.append(receiver.recv())
            except EOFError:
                worker.join()
                verdicts.append(Verdict("crash", f"exit code {worker.exitcode}"))
                break
        worker.kill()
        worker.join()
    return verdicts


def _work(files: list[HostileFile], folder: Path, decoder: str, seed: int, sender: Any) -> None:
    os.chdir(folder / "secret")  # where a relative name in a playlist would be found
    watch = Watch().install()
    for number, file in enumerate(files):
        os.path.exists(f"{MARK}{number}")  # seen by strace
        sender.send(check_file(file, folder, watch, decoder, seed))


def measure_memory(files: list[HostileFile], folder: Path, opens: int, seed: int) -> dict[str, float]:
    """Open files again and again, half of them broken, and watch memory and descriptors."""
    generator = random.Random(seed)
    small = [f for f in files if f.source is None and len(f.content) < 60_000 and f.kind != "pictures"]
    chosen = generator.sample([f for f in small if f.expected == "right"], 11)
    chosen += generator.sample([f for f in small if f.expected != "right"], 11)
    sources = [str(write_file(file, folder)) for file in chosen]
    descriptors, memory = count_descriptors(), []
    for number in range(opens):
        try:
            with open_video(sources[number % len(sources)]) as reader:
                reader.get_frames([0, reader.num_frames - 1])
        except VideoDecodingError:
            pass
        memory.append(read_memory())
    sample = min(SAMPLE, opens // 4)
    growth = float(np.mean(memory[-sample:]) - np.mean(memory[:sample]))
    return {"opens": opens, "growth_bytes": growth, "descriptors": count_descriptors() - descriptors}


def trace(folder: Path, seed: int) -> list[str] | None:
    """Run the files under `strace`, and list what was opened or connected to; `None` where it is missing."""
    if shutil.which("strace") is None:
        return None
    log = folder / "strace.log"
    options = [
        "-f",
        "-qq",
        "-s",
        "300",
        "-e",
        "trace=openat,open,socket,connect,access,newfstatat,stat",
        "-o",
        str(log),
    ]
    command = [
        "strace",
        *options,
        sys.executable,
        "-m",
        "tests.faults.run",
        "--traced",
        str(folder),
        "--seed",
        str(seed),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    text = log.read_text(errors="replace")
    if done.returncode or MARK not in text:
        return [f"strace did not run: {done.stderr[-300:]}"]
    return find_foreign_calls(text[text.index(MARK) :], folder)


def find_foreign_calls(text: str, folder: Path) -> list[str]:
    """Openings of a trace that are neither a hostile file itself nor Python's."""
    allowed = (
        *(entry for entry in sys.path[1:] if entry),
        sys.prefix,
        "/proc/",
        "/sys/",
        "/dev/",
        "/usr/",
        "/lib",
        "/etc/ld.so",
    )
    foreign = []
    for line in text.splitlines():
        opened = re.search(r'open(?:at)?\([^"]*"((?:[^"\\]|\\.)*)"', line)
        if re.search(r"\b(socket|connect)\(", line) and "AF_UNIX" not in line and "socketpair" not in line:
            foreign.append(line.strip())
        elif opened is not None and "ENOENT" not in line:
            path = opened[1]
            is_hostile = path.startswith(str(folder)) and not path.startswith(str(folder / "secret"))
            if not is_hostile and not path.startswith(allowed) and "/umt_hf_" not in path:
                foreign.append(line.strip())
    return foreign


def run_traced(folder: Path, seed: int) -> None:
    """What `trace` runs: the files in this process, without comparing, after everything was imported."""
    files = make_files(folder, seed)
    paths = [None if file.source is not None else write_file(file, folder) for file in files]
    os.chdir(folder / "secret")
    for file in files[:40]:  # everything that is loaded late
        _open_quietly(file.content)
    for file, path in zip(files, paths, strict=True):
        os.path.exists(f"{MARK}{file.name}")
        _open_quietly(file.source(folder) if file.source is not None else str(path))
        if path is not None and path.suffix != ".npy":
            _open_quietly(file.content)


def _open_quietly(source: str | bytes) -> None:
    try:
        with open_video(source) as reader:
            reader.get_frames([0, reader.num_frames - 1])
    except VideoDecodingError:
        pass


def print_table(files: list[HostileFile], verdicts: list[Verdict]) -> int:
    """Show what became of each kind, and each fault; returns the number of faults."""
    columns = ("right", "refused", *FAULTS, "hang", "crash")
    counts = Counter((file.kind, verdict.outcome) for file, verdict in zip(files, verdicts, strict=True))
    kinds = list(dict.fromkeys(file.kind for file in files))
    print(f"| {'kind':<24} | files | " + " | ".join(columns) + " |")
    print(f"| {'-' * 24} | ----- | " + " | ".join("-" * len(column) for column in columns) + " |")
    for kind in [*kinds, "all"]:
        row = [sum(n for (k, o), n in counts.items() if o == column and kind in (k, "all")) for column in columns]
        cells = " | ".join(f"{number:>{len(column)}}" for number, column in zip(row, columns, strict=True))
        print(f"| {kind:<24} | {sum(row):>5} | {cells} |")
    for file, verdict in zip(files, verdicts, strict=True):
        if verdict.outcome not in ("right", "refused"):
            print(f"{file.kind}: {file.name!r}: {verdict.outcome}: {verdict.detail}")
    return sum(verdict.outcome not in ("right", "refused") for verdict in verdicts)


def main() -> int:
    """Run everything; the exit code says whether there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--opens", type=int, default=OPENS)
    parser.add_argument("--decoder", default="pyav", choices=("pyav", "decord", "torchcodec"))
    parser.add_argument("--traced", type=Path)
    args = parser.parse_args()
    if args.traced is not None:
        run_traced(args.traced, args.seed)
        return 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        files = make_files(folder, args.seed)
        if args.decoder != "pyav":  # the others patch damaged pictures up, as their descriptions say
            files = [file for file in files if file.expected != "either"]
        faults = print_table(files, check_apart(files, folder, args.decoder, args.seed))
        if args.decoder != "pyav":
            return int(bool(faults))
        if not is_port_free(LISTENING_PORT):
            faults += 1
            print(f"UDP port {LISTENING_PORT} is taken.")
        faults += print_comparison(files, folder)
        foreign = trace(folder, args.seed)
        print("strace: " + ("not installed" if foreign is None else f"{len(foreign)} other files or sockets"))
        for line in (foreign or [])[:20]:
            print(f"  {line}")
        memory = measure_memory(files, folder, args.opens, args.seed)
        print(
            f"{memory['opens']} opens: mean memory of the last {SAMPLE} less that of the first: "
            f"{memory['growth_bytes'] / 1e6:.1f} MB (limit {MAX_GROWTH / 1e6:.0f}); "
            f"{memory['descriptors']:+d} descriptors"
        )
        faults += len(foreign or []) + (memory["growth_bytes"] >= MAX_GROWTH) + (memory["descriptors"] != 0)
    print(f"{len(files)} files, {faults} faults, {time.monotonic() - started:.0f} s")
    return int(bool(faults))


if __name__ == "__main__":
    raise SystemExit(main())
