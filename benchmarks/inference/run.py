"""Time the commands for many videos end to end, against decoding everything before the model runs.

python -m benchmarks.inference.run
"""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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
from umt_hf.inference.engine import choose_dtype, name_dtype
from umt_hf.inference.loading import resolve_device

from .commands import (
    AT_ONCE,
    COMMANDS,
    ENGINE,
    IMAGE_SIZE,
    WAYS,
    WINDOW,
    Found,
    Job,
    check_agreement,
    run_at_once,
    run_command,
    save_models,
)

RUNNERS = {ENGINE: run_command, AT_ONCE: run_at_once}


@dataclass(kw_only=True)
class Arguments(ReportArguments):
    """Which videos and models."""

    commands: list[str] = field(default_factory=lambda: list(COMMANDS), metadata={"help": "What to time."})
    num_videos: int = field(default=24, metadata={"help": "Files; a few rendered ones are copied."})
    num_frames: int = field(default=300, metadata={"help": "Frames of each, 30 a second."})
    fps: float = field(default=4, metadata={"help": "Frames a second that features are made of."})
    batch_size: int = field(default=8, metadata={"help": "Windows, videos or views at a time."})
    num_workers: int | None = field(default=None, metadata={"help": "Processes that read; default: the command's."})
    hidden_size: int = field(default=192, metadata={"help": "Width of the towers, a multiple of 64."})
    num_hidden_layers: int = field(default=2, metadata={"help": "Layers of the towers."})
    repeats: int = field(default=5, metadata={"help": "Rounds; each runs every command in both ways."})
    threads: int = field(default=1, metadata={"help": "Threads of torch."})


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark and give the path of its JSON file."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    torch.set_num_threads(args.threads)
    device = resolve_device(None)
    with tempfile.TemporaryDirectory() as folder:
        videos = write_videos(Path(folder) / "videos", args)
        save_models(Path(folder) / "models", args.hidden_size, args.num_hidden_layers)
        rows = []
        for command in args.commands:
            print(f"Running {command} ...", flush=True)
            job = Job(command, videos, Path(folder) / "models", args.fps, args.batch_size, args.num_workers)
            rows += summarize_rows(job, measure_ways(job, Path(folder) / "out", args.repeats))
    report = {
        "question": "How many videos a second do the commands for many videos take, and what do they wait for?",
        "machine": describe_machine(device),
        "settings": {name: value for name, value in asdict(args).items() if name not in ("output_dir", "name")}
        | {"image_size": IMAGE_SIZE, "window": WINDOW, "dtype": name_dtype(choose_dtype(None, device))},
        "rows": rows,
    }
    table = format_rows(rows)
    print(table)
    return write_results("inference", report, table, args.output_dir, args.name)


def write_videos(folder: Path, args: Arguments) -> tuple[str, ...]:
    """Render a video and copy it."""
    folder.mkdir()
    paths = [folder / f"video_{number:04d}.mp4" for number in range(args.num_videos)]
    write_kinetics_like(paths[0], num_frames=args.num_frames)
    for path in paths[1:]:
        shutil.copy(paths[0], path)
    return tuple(map(str, paths))


def measure_ways(job: Job, folder: Path, repeats: int) -> dict[str, list[Found]]:
    """Run a command in both ways in turn, after a look whether they compute the same."""

    def run(way: str) -> Found:
        shutil.rmtree(folder, ignore_errors=True)
        return RUNNERS[way](job, folder)

    check_agreement(job, run(ENGINE), run(AT_ONCE))
    return run_interleaved({way: lambda way=way: run(way) for way in WAYS}, repeats)


def summarize_rows(job: Job, found: dict[str, list[Found]]) -> list[dict[str, Any]]:
    """A row for each way; ratios are taken within a round."""
    return [
        {
            "command": job.command,
            "way": way,
            "num_videos": len(job.videos),
            "videos_per_second": summarize(len(job.videos) / own.seconds for own in found[way]),
            "speed_relative_to_baseline": summarize(
                other.seconds / own.seconds for own, other in zip(found[way], found[AT_ONCE], strict=True)
            ),
            "waiting_ratio": summarize(own.waiting_seconds / own.seconds for own in found[way]),
            "model_ratio": summarize(own.model_seconds / own.seconds for own in found[way]),
        }
        for way in WAYS
    ]


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Write the rows as a Markdown table."""
    header = ["command", "way", "videos/s", "x baseline", "waiting for data", "in the model"]
    lines = [
        [
            row["command"],
            row["way"],
            format_spread(row["videos_per_second"]),
            format_spread(row["speed_relative_to_baseline"], ".2f"),
            format_spread(row["waiting_ratio"], ".0%"),
            format_spread(row["model_ratio"], ".0%"),
        ]
        for row in rows
    ]
    return format_table(header, lines)


if __name__ == "__main__":
    main()
