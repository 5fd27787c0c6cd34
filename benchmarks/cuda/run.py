"""Measure what a GPU session is worth, in at most nine minutes, the most valuable rows first.

python -m benchmarks.cuda.run
python -m benchmarks.cuda.run --device cpu --tiny --seconds 60 --output_dir /tmp/try
"""

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
    write_results,
)
from benchmarks.stage1_step.steps import choose_compiler

from .limits import measure_rows
from .rows import Setup, list_rows

QUESTION = "What does one GPU do in nine minutes?"


@dataclass(kw_only=True)
class Arguments(ReportArguments):
    """Where, and for how long."""

    device: str = field(default="cuda", metadata={"help": "cuda; cpu to try the script."})
    tiny: bool = field(
        default=False, metadata={"help": "Let the smallest models stand in for all, to try the script."}
    )
    seconds: float = field(default=520.0, metadata={"help": "For all rows; the rest is not run."})
    row_seconds: float = field(default=4.0, metadata={"help": "For which steps are timed in a row."})
    only: list[str] | None = field(default=None, metadata={"help": "Rows whose name has one of these words in it."})


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark and give the path of its JSON file, which is written anew after each row."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device: give --device cpu --tiny to try the script.")
    setup = Setup(device, args.tiny, choose_compiler(device.type), args.row_seconds)
    settings = {name: value for name, value in asdict(args).items() if name not in ("output_dir", "name")}
    report: dict[str, Any] = {
        "question": QUESTION,
        "machine": describe_machine(device),
        "settings": settings,
        "rows": [],
    }
    rows = [row for row in list_rows(setup) if not args.only or any(word in row.name for word in args.only)]
    for found in measure_rows(rows, args.seconds, device):
        report["rows"].append(found)
        path = write_results("cuda", report, format_rows(report["rows"]), args.output_dir, args.name)
        print(f"{found['row']}: {found['reason'] or _say_rate(found)}", flush=True)
    print(format_rows(report["rows"]))
    return path


def _say_rate(found: dict[str, Any]) -> str:
    rate = found.get("clips_per_second")
    return found["status"] if rate is None else f"{format_spread(rate)} a second"


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Write the rows as a Markdown table."""
    header = ["row", "clips/s", "of matmul ceiling", "of peak", "waits a step", "graph breaks", "recompiles"]
    header += ["first step, s", "peak memory, GiB", "remark"]
    return format_table(header, map(format_row, rows))


def format_row(row: dict[str, Any]) -> list[str]:
    """Write one line of the table."""

    def show(name: str, form: str, factor: float = 1.0) -> str:
        value = row.get(name)
        return "-" if value is None else format(value * factor, form)

    is_compiled = row.get("compiler") is not None
    return [
        row["row"],
        format_spread(row.get("clips_per_second")),
        show("ceiling_fraction", ".0%"),
        show("peak_fraction", ".0%"),
        show("waits_per_step", ".0f"),
        show("graph_breaks", ".0f") if is_compiled else "-",
        show("recompiles", ".0f") if is_compiled else "-",
        show("first_step_seconds", ".1f"),
        show("peak_memory_bytes", ".1f", 2**-30),
        " ".join((row["reason"] or row.get("source") or row.get("quantization") or "").split())[:120].replace(
            "|", "/"
        ),
    ]


if __name__ == "__main__":
    main()
