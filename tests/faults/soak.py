"""`make soak`: both stages of pre-training for some minutes, while memory and handles are watched from outside.

python -m tests.faults.soak [--minutes 20]

A part of the list cannot be read, workers read, checkpoints are written and old ones deleted, and held-out data is
computed again and again. Fails where memory grows by more than `MAX_GROWTH`, or handles by more than `IN_FLIGHT`.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.faults.cases import Inputs, build_stage1, build_stage2
from tests.faults.kill import FORKED, work
from tests.processes import build_environment, read_output, start_process

MAX_GROWTH = 20.0  # MB, between the first and the last third of the time after warm-up
IN_FLIGHT = 2  # handles of batches on their way, by which two moments may differ
WARM_UP_SHARE = 0.25
INTERVAL = 0.2  # seconds
MEMORY = ("memory of the main process, MB", "memory of its largest worker, MB")
HANDLES = (
    "descriptors of the main process",
    "descriptors of a worker",
    "threads",
    "shared memory blocks",
    "files in /dev/shm",
    "files of the run",
)
LIMITS = {"max_steps": 10_000_000, "save_steps": 20, "save_total_limit": 2, "eval_steps": 15, "logging_steps": 5}
SHM = Path("/dev/shm")


@dataclass(frozen=True)
class Trend:
    """A quantity after warm-up.

    Args:
        name: Of the quantity.
        first: In the first third: the median of memory, the least number of handles.
        last: The same in the last third.
        largest: At any time.
        slope: Per minute, by least squares.
    """

    name: str
    first: float
    last: float
    largest: float
    slope: float

    @property
    def is_bad(self) -> bool:
        """Whether it grows."""
        return self.last - self.first > (MAX_GROWTH if self.name in MEMORY else IN_FLIGHT)


def sample(process: psutil.Process, run: Path) -> dict[str, float]:
    """What a run holds at this moment."""
    workers = [child for child in process.children() if "resource_tracker" not in " ".join(child.cmdline())]
    numbers = {process.pid, *(worker.pid for worker in workers)}
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    names = [path.name for path in SHM.iterdir()] if SHM.is_dir() else []
    values = (
        process.memory_info().rss / 1e6,
        max((worker.memory_info().rss / 1e6 for worker in workers), default=0.0),
        process.num_fds(),
        min((count for worker in workers if (count := worker.num_fds())), default=0),  # 0: it ends
        process.num_threads(),
        len(re.findall(r"/dev/shm/|/memfd:|/torch_", maps)),
        sum(any(f"_{number}_" in name for number in numbers) for name in names),
        sum(path.is_file() for path in run.rglob("*")),
    )
    return dict(zip((*MEMORY, *HANDLES), map(float, values), strict=True))


def measure_trend(name: str, seconds: Sequence[float], values: Sequence[float]) -> Trend:
    """First, last, largest and slope of a quantity, without the warm-up."""
    began = seconds[0] + WARM_UP_SHARE * (seconds[-1] - seconds[0])
    kept = [(second, value) for second, value in zip(seconds, values, strict=True) if second >= began]
    third = max(len(kept) // 3, 1)
    # Handles go up and down with saves and tests; what is never given back raises the least number.
    summarize = statistics.median if name in MEMORY else min
    first, last = ([value for _, value in part] for part in (kept[:third], kept[-third:]))
    times = [second / 60 for second, _ in kept]
    slope = statistics.linear_regression(times, [value for _, value in kept]).slope if len(set(times)) > 1 else 0.0
    return Trend(name, summarize(first), summarize(last), max(value for _, value in kept), slope)


def damage_list(inputs: Inputs, folder: Path) -> Path:
    """The list of the videos with four more that cannot be read: cut short, text, empty and missing."""
    rows = [f"{inputs.shapes}/{row}" for row in (inputs.shapes / "train.csv").read_text().splitlines()]
    content = Path(rows[0].rsplit(",", 1)[0]).read_bytes()
    for name, kept in (("cut.mp4", content[: len(content) // 2]), ("text.mp4", b"no video"), ("empty.mp4", b"")):
        (folder / name).write_bytes(kept)
    rows += [f"{folder / name},0" for name in ("cut.mp4", "text.mp4", "empty.mp4", "missing.mp4")]
    (folder / "damaged.csv").write_text("".join(f"{row}\n" for row in rows))
    captions = json.loads((inputs.shapes / "train_captions.json").read_text())
    captions = [row | {"video": str(inputs.shapes / row["video"])} for row in captions]
    captions += [{"video": str(folder / name), "caption": "a red circle"} for name in ("cut.mp4", "missing.mp4")]
    (folder / "damaged.json").write_text(json.dumps(captions))
    return folder


def build_words(stage: int, inputs: Inputs, run: Path) -> tuple[str, dict[str, Any]]:
    """Script of a stage, and the fields of its command line."""
    common = LIMITS | {"max_skipped_ratio": 0.9, "dataloader_num_workers": 2}
    if stage == 1:
        own = {"train_data": inputs.folder / "damaged.csv", "validation_data": inputs.shapes / "validation.csv"}
        return "training.stage1", build_stage1(inputs, run, 1) | common | own
    own = {"train_corpora": inputs.folder / "damaged.json", "validation_data": inputs.shapes / "test_captions.json"}
    return "training.stage2", build_stage2(inputs, run, 1) | common | own | {"rerank_top_k": 2}


def soak_stage(stage: int, inputs: Inputs, folder: Path, minutes: float) -> tuple[list[Trend], str]:
    """Train for some minutes, end the run by SIGTERM, and give what it held; with what is wrong about its end."""
    from tests.e2e.runs import to_flags

    target, fields = build_words(stage, inputs, folder / "run")
    folder.mkdir()
    arguments = (target, to_flags(**fields), str(folder), 0, None, False)
    variables = build_environment(0, 1, 0) | FORKED
    process = start_process(work, *arguments, environment=variables, output=folder / "output_0")
    deadline = time.monotonic() + 60 * minutes
    seconds, samples = [], []
    watched = psutil.Process(process.pid)
    while time.monotonic() < deadline and process.is_alive():
        with contextlib.suppress(psutil.Error, FileNotFoundError):  # a worker or a file may go meanwhile
            samples.append(sample(watched, folder / "run"))
            seconds.append(time.monotonic())
        process.join(INTERVAL)
    if process.is_alive():
        os.kill(process.pid, signal.SIGTERM)
    process.join(120)
    said = read_output(folder / "output_0").stderr
    trouble = "" if process.exitcode == 143 else f"ended with {process.exitcode}: {said[-3000:]}"
    process.kill()
    process.join()
    begun = next((i for i, values in enumerate(samples) if values["files of the run"] > 3), 0)
    trends = [
        measure_trend(name, seconds[begun:], [values[name] for values in samples[begun:]])
        for name in (*MEMORY, *HANDLES)
    ]
    return trends, trouble


def count_steps(run: Path) -> int:
    """Steps that a run has logged."""
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def print_trends(stage: int, steps: int, samples: list[Trend]) -> int:
    """Show a table; returns the number of quantities that grow."""
    print(f"Stage {stage}, {steps} steps:")
    print("| quantity | first third | last third | largest | per minute | |")
    print("| --- | ---: | ---: | ---: | ---: | --- |")
    for trend in samples:
        mark = "grows" if trend.is_bad else "flat"
        print(
            f"| {trend.name} | {trend.first:.1f} | {trend.last:.1f} | {trend.largest:.1f} | {trend.slope:+.3f} "
            f"| {mark} |"
        )
    return sum(trend.is_bad for trend in samples)


def main() -> int:
    """Run both stages; the exit code says whether something grew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0, help="of both stages together")
    args = parser.parse_args()
    faults = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        (folder / "inputs").mkdir()
        inputs = Inputs(folder / "inputs").prepare()
        damage_list(inputs, inputs.folder)
        for stage, share in ((1, 0.6), (2, 0.4)):
            trends, trouble = soak_stage(stage, inputs, folder / f"stage{stage}", share * args.minutes)
            faults += print_trends(stage, count_steps(folder / f"stage{stage}" / "run"), trends)
            if trouble:
                faults += 1
                print(f"Stage {stage} {trouble}")
    print(
        f"{args.minutes:g} minutes, {faults} faults (memory may grow by {MAX_GROWTH:.0f} MB, handles by {IN_FLIGHT})"
    )
    return int(bool(faults))


if __name__ == "__main__":
    raise SystemExit(main())
