"""Compare both stages of pre-training, as their scripts run them, with their steps alone.

python -m benchmarks.training.run
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
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
from benchmarks.processes import call_in_processes, import_once
from benchmarks.stage1_step.workload import SIZES
from umt_hf.runs.cores import count_physical_cores

from .inputs import STAGES, Inputs, write_inputs
from .loop import LOOP, STEP, Found, Job, run_job

EAGER = "eager"
AGREEMENT = {"cpu": 1e-4, "cuda": 3e-2}  # largest relative difference of the first losses
COUNTED_STEPS = 3


@dataclass(kw_only=True)
class Arguments(ReportArguments):
    """What to run, and how long."""

    stages: list[str] = field(default_factory=lambda: list(STAGES), metadata={"help": f"Of {', '.join(STAGES)}."})
    size: str = field(default="tiny", metadata={"help": f"One of {', '.join(SIZES)}."})
    batch_size: int = field(default=16, metadata={"help": "Clips in a step."})
    steps: int = field(default=8, metadata={"help": "Steps that are timed; as many come before."})
    workers: int = field(default=1, metadata={"help": "Processes that read videos."})
    threads: int | None = field(
        default=None, metadata={"help": "Of the process that trains; default: the cores that the workers leave."}
    )
    backend: str | None = field(
        default=None, metadata={"help": "Of torch.compile; default: aot_eager on a CPU, else inductor."}
    )
    repeats: int = field(default=3, metadata={"help": "Rounds without compilation."})
    compiled_repeats: int = field(default=2, metadata={"help": "Rounds with compilation."})


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark and give the path of its JSON file."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.threads = args.threads or max(1, count_physical_cores() - args.workers)
    args.backend = args.backend or ("inductor" if device.type == "cuda" else "aot_eager")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        inputs = write_inputs(args.size, Path(folder))
        for stage in args.stages:
            for backend, repeats in ((None, args.repeats), (args.backend, args.compiled_repeats)):
                print(f"Training {stage}, {backend or EAGER} ...", flush=True)
                rows += measure(stage, backend, repeats, args, inputs, AGREEMENT[device.type])
    report = {
        "question": "What does the training loop cost beyond its step?",
        "machine": describe_machine(device) | {"threads": args.threads},
        "settings": {name: value for name, value in asdict(args).items() if name not in ("output_dir", "name")},
        "rows": rows,
    }
    table = format_rows(rows)
    print(table)
    return write_results("training", report, table, args.output_dir, args.name)


def measure(
    stage: str, backend: str | None, repeats: int, args: Arguments, inputs: Inputs, tolerance: float
) -> list[dict[str, Any]]:
    """Rows of the step alone and of the script, which must have the same losses."""
    if not repeats:
        return []
    job = Job(stage, inputs, args.batch_size, args.steps, args.workers, backend)
    threads = args.threads or 1
    cases = {
        what: partial(_run, replace(job, what=what), threads)
        for what in (STEP, LOOP)  # run_interleaved starts each round with another one
    }
    found = run_interleaved(cases, repeats)
    check_agreement(found, tolerance)
    counted = None
    if backend is None:
        # Every operation is looked at, so that this run is not one of those that are timed.
        counted = _run(replace(job, steps=COUNTED_STEPS, counts_waits=True), threads)
    return summarize_rows(job, found, counted)


def _run(job: Job, threads: int) -> Found:
    return call_in_processes(run_job, job, threads=threads)[0]


def check_agreement(found: Mapping[str, Sequence[Found]], tolerance: float) -> None:
    """Make sure that all runs train alike.

    Raises:
        RuntimeError: If the losses of the first steps differ.
    """
    runs = [(what, run) for what, own in found.items() for run in own]
    first = torch.tensor(runs[0][1].losses)
    for what, run in runs[1:]:
        losses = torch.tensor(run.losses)
        if losses.shape != first.shape or not torch.allclose(losses, first, rtol=tolerance, atol=0):
            raise RuntimeError(
                f"{what} has other losses than {runs[0][0]}, so that their speeds cannot be compared: "
                f"{run.losses} and {runs[0][1].losses}."
            )


def summarize_rows(job: Job, found: Mapping[str, Sequence[Found]], counted: Found | None) -> list[dict[str, Any]]:
    """A row for the step alone and one for the script; the ratio of their times is taken within a round."""
    rows = []
    for what, runs in found.items():
        ratios = (run.step_seconds / alone.step_seconds for run, alone in zip(runs, found[STEP], strict=True))
        row = {
            "stage": job.stage,
            "size": job.inputs.size,
            "batch_size": job.batch_size,
            "mode": job.backend or EAGER,
            "what": what,
            "clips_per_second": summarize(run.clips_per_second for run in runs),
            "step_seconds": summarize(run.step_seconds for run in runs),
            "seconds_relative_to_step": summarize(ratios),
            "data_wait_share": None,
            "waits_per_step": None,
            "graphs": runs[0].graphs[1],
            "recompilations": max(run.graphs[1] - run.graphs[0] for run in runs),
            "graph_breaks": max(run.graph_breaks for run in runs),
        }
        if what == LOOP:
            row["data_wait_share"] = summarize(run.data_wait_share or 0.0 for run in runs)
            if counted is not None:
                row["waits_per_step"] = sum(counted.waits.values()) / max(counted.counted_steps, 1)
                row["waits"] = counted.waits
        rows.append(row)
    return rows


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Write the rows as a Markdown table."""
    header = ["stage", "size", "batch", "mode", "what", "clips/s", "ms a step", "x step alone", "waiting for data"]
    header += ["read back per step", "graphs", "recompiled", "breaks"]
    return format_table(header, map(format_row, rows))


def format_row(row: dict[str, Any]) -> list[str]:
    """Write one line of the table."""
    waits, is_eager = row["waits_per_step"], row["mode"] == EAGER
    milliseconds = {key: 1000 * row["step_seconds"][key] for key in ("median", "min", "max")}
    counts = ["-"] * 3 if is_eager else [str(row[key]) for key in ("graphs", "recompilations", "graph_breaks")]
    return [
        row["stage"],
        row["size"],
        str(row["batch_size"]),
        row["mode"],
        row["what"],
        format_spread(row["clips_per_second"]),
        format_spread(milliseconds),
        format_spread(row["seconds_relative_to_step"], ".2f"),
        format_spread(row["data_wait_share"], ".0%"),
        "-" if waits is None else f"{waits:g}",
        *counts,
    ]


if __name__ == "__main__":
    import_once()
    main()
