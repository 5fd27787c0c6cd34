"""Compare stage-1 steps on a CPU by the number of threads.

python -m benchmarks.threads.run
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
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
from umt_hf.runs.cores import count_physical_cores

from .steps import Steps, ThreadJob, measure_steps

# Size -> clips in a step, steps.
WORK = {"tiny": (32, 40), "b16": (1, 2)}


@dataclass(kw_only=True)
class Arguments(ReportArguments):
    """Which sizes to run with how many threads."""

    sizes: list[str] = field(default_factory=lambda: list(WORK), metadata={"help": f"Of {', '.join(WORK)}."})
    threads: list[int] | None = field(default=None, metadata={"help": "Default: 1 and the machine's cores."})
    steps: int | None = field(default=None, metadata={"help": "Steps of a process; by default a few seconds' worth."})
    batch_size: int | None = field(default=None, metadata={"help": "Clips in a step; by default the size's own."})
    repeats: int = field(default=3, metadata={"help": "Rounds; each runs all numbers of threads."})


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark and give the path of its JSON file."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    threads = args.threads or sorted({1, count_physical_cores()})
    rows = []
    for size in args.sizes:
        print(f"Training at size {size} with {' and '.join(map(str, threads))} thread(s) ...", flush=True)
        batch_size, steps = args.batch_size or WORK[size][0], args.steps or WORK[size][1]
        jobs = {str(count): ThreadJob(size, batch_size, steps, count) for count in threads}
        cases = {count: partial(measure_steps, job) for count, job in jobs.items()}
        rows += summarize_rows(size, batch_size, run_interleaved(cases, args.repeats))
    report = {
        "question": "How many threads should a process train with on a CPU?",
        "machine": describe_machine(torch.device("cpu")),
        "settings": {name: value for name, value in asdict(args).items() if name not in ("output_dir", "name")},
        "rows": rows,
    }
    table = format_rows(rows)
    print(table)
    return write_results("threads", report, table, args.output_dir, args.name)


def summarize_rows(size: str, batch_size: int, found: dict[str, list[Steps]]) -> list[dict[str, Any]]:
    """A row for each number of threads; ratios are taken within a round, to the first number."""
    first = next(iter(found.values()))
    return [
        {
            "size": size,
            "batch_size": batch_size,
            "threads": int(threads),
            "clips_per_second": summarize(own.clips / own.wall_seconds for own in runs),
            "speed_relative_to_first": summarize(
                other.wall_seconds / own.wall_seconds for own, other in zip(runs, first, strict=True)
            ),
            "cpu_seconds_per_clip": summarize(own.cpu_seconds / own.clips for own in runs),
            "cpu_relative_to_first": summarize(
                own.cpu_seconds / other.cpu_seconds for own, other in zip(runs, first, strict=True)
            ),
            "cores_used": summarize(own.cpu_seconds / own.wall_seconds for own in runs),
        }
        for threads, runs in found.items()
    ]


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Write the rows as a Markdown table."""
    header = ["size", "batch", "threads", "clips/s", "x first", "CPU s a clip", "x first", "cores used"]
    lines = [
        [
            row["size"],
            str(row["batch_size"]),
            str(row["threads"]),
            format_spread(row["clips_per_second"]),
            format_spread(row["speed_relative_to_first"], ".2f"),
            format_spread(row["cpu_seconds_per_clip"]),
            format_spread(row["cpu_relative_to_first"], ".2f"),
            format_spread(row["cores_used"], ".2f"),
        ]
        for row in rows
    ]
    return format_table(header, lines)


if __name__ == "__main__":
    main()
