"""Measure the memory of feature extraction from long videos, against decoding everything first.

python -m benchmarks.features.run
"""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import HfArgumentParser

from benchmarks.common import (
    ReportArguments,
    describe_machine,
    format_spread,
    format_table,
    run_interleaved,
    summarize,
    write_results,
)
from benchmarks.decoding.videos import write_kinetics_like

from .extraction import AT_ONCE, ENCODER, IMAGE_SIZE, STREAMED, WINDOW, Extraction, ExtractionJob, measure_extraction

VIDEO_FPS = 30  # of `write_kinetics_like`
WAYS = (STREAMED, AT_ONCE)


@dataclass(kw_only=True)
class Arguments(ReportArguments):
    """Which videos to extract the features of."""

    minutes: list[float] = field(default_factory=lambda: [1, 10], metadata={"help": "Lengths, the shortest first."})
    fps: float = field(default=2, metadata={"help": "Frames a second that are read of a video's 30."})
    batch_size: int = field(default=8, metadata={"help": "Windows that go through the model at a time."})
    repeats: int = field(default=2, metadata={"help": "Rounds; each extracts in both ways."})
    threads: int = field(default=1, metadata={"help": "Threads of torch."})


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark and give the path of its JSON file."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    torch.set_num_threads(args.threads)
    found = {}
    for minutes in args.minutes:
        print(f"Extracting from {minutes:g} minutes ...", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            found[minutes] = measure_ways(Path(folder), minutes, args)
    rows = summarize_rows(found)
    report = {
        "question": "How much memory do the features of a 10-minute video take?",
        "machine": describe_machine(torch.device("cpu")),
        "settings": {name: value for name, value in asdict(args).items() if name not in ("output_dir", "name")}
        | {"image_size": IMAGE_SIZE, "window": WINDOW, "stride": WINDOW, "encoder": ENCODER},
        "rows": rows,
    }
    table = format_rows(rows)
    print(table)
    return write_results("features", report, table, args.output_dir, args.name)


def measure_ways(folder: Path, minutes: float, args: Arguments) -> dict[str, list[Extraction]]:
    """Render a video of a length and extract its features in both ways in turn, each time in a new process.

    Raises:
        RuntimeError: If the two ways find other features.
    """
    video = folder / "video.mp4"
    write_kinetics_like(video, num_frames=round(minutes * 60 * VIDEO_FPS))
    files = {way: folder / f"{number}.npy" for number, way in enumerate(WAYS)}
    jobs = {
        way: ExtractionJob(way, str(video), str(file), args.fps, args.batch_size, args.threads)
        for way, file in files.items()
    }
    found = run_interleaved({way: partial(measure_extraction, job) for way, job in jobs.items()}, args.repeats)
    check_agreement(*(np.load(file) for file in files.values()))
    return found


def check_agreement(streamed: np.ndarray, at_once: np.ndarray) -> None:
    """Compare the features that both ways found.

    Raises:
        RuntimeError: If they differ by more than rounding.
    """
    if streamed.shape != at_once.shape or not np.allclose(streamed, at_once, atol=1e-5):
        raise RuntimeError("Streamed windows have other features than a video decoded at once: not the same work.")


def summarize_rows(found: dict[float, dict[str, list[Extraction]]]) -> list[dict[str, Any]]:
    """A row for each length and way; ratios are taken within a round, and to the first length."""
    shortest = next(iter(found.values()))
    return [
        {
            "minutes": minutes,
            "way": way,
            "num_windows": ways[way][0].num_windows,
            "peak_memory_bytes": summarize(own.peak_bytes for own in ways[way]),
            "memory_relative_to_shortest": summarize(
                own.peak_bytes / first.peak_bytes for own, first in zip(ways[way], shortest[way], strict=True)
            ),
            "memory_relative_to_baseline": summarize(
                own.peak_bytes / other.peak_bytes for own, other in zip(ways[way], ways[AT_ONCE], strict=True)
            ),
            "windows_per_second": summarize(own.num_windows / own.seconds for own in ways[way]),
            "speed_relative_to_baseline": summarize(
                other.seconds / own.seconds for own, other in zip(ways[way], ways[AT_ONCE], strict=True)
            ),
        }
        for minutes, ways in found.items()
        for way in WAYS
    ]


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Write the rows as a Markdown table."""
    header = ["minutes", "windows", "way", "peak memory, MiB", f"x {rows[0]['minutes']:g} minutes", "x baseline"]
    header += ["windows/s", "x baseline"]
    lines = [
        [
            f"{row['minutes']:g}",
            str(row["num_windows"]),
            row["way"],
            format_spread({name: row["peak_memory_bytes"][name] / 2**20 for name in ("median", "min", "max")}, ".0f"),
            format_spread(row["memory_relative_to_shortest"], ".2f"),
            format_spread(row["memory_relative_to_baseline"], ".2f"),
            format_spread(row["windows_per_second"]),
            format_spread(row["speed_relative_to_baseline"], ".2f"),
        ]
        for row in rows
    ]
    return format_table(header, lines)


if __name__ == "__main__":
    main()
