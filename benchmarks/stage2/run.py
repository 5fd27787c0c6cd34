"""Time one complete stage-2 step by the losses that it has.

python -m benchmarks.stage2.run
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import HfArgumentParser

from benchmarks.common import (
    ReportArguments,
    describe_machine,
    format_spread,
    format_table,
    run_interleaved,
    summarize,
    synchronize,
    write_results,
)

from .workload import LOSSES, NUM_FRAMES, SIZES_OF_PAIRS, TEXT_LENGTH, Stage2Step, sample_pairs

QUESTION = "What does a stage-2 step cost, loss by loss?"
# Each with one loss more.
CHOICES = {" + ".join(LOSSES[:count]).upper(): LOSSES[:count] for count in range(1, len(LOSSES) + 1)}
STRETCH_SECONDS = 1.0


@dataclass(kw_only=True)
class Arguments(ReportArguments):
    """What to time, and on what."""

    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    sizes: list[str] | None = field(
        default=None,
        metadata={"help": f"Of {list(SIZES_OF_PAIRS)}; by default tiny b16 on CPU, b16 l16 on CUDA."},
    )
    batch_size: int | None = field(default=None, metadata={"help": "Pairs in a step; by default as the size says."})
    dtype: Literal["float32", "bfloat16"] | None = field(
        default=None, metadata={"help": "By default float32 on CPU; bfloat16 (autocast) on CUDA."}
    )
    repeats: int = field(default=3, metadata={"help": "Rounds; each times every choice of losses once."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; by default PyTorch's choice."})

    def __post_init__(self) -> None:
        is_cuda = torch.device(self.device).type == "cuda"
        self.sizes = self.sizes or (["b16", "l16"] if is_cuda else ["tiny", "b16"])
        self.dtype = self.dtype or ("bfloat16" if is_cuda else "float32")
        if unknown := set(self.sizes) - SIZES_OF_PAIRS.keys():
            raise ValueError(f"sizes must be among {list(SIZES_OF_PAIRS)}, got {sorted(unknown)}.")


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark and give the path of its JSON file."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    device, rows = torch.device(args.device), []
    for name in args.sizes:
        print(f"Timing {name} on {device} in {args.dtype} ...", flush=True)
        step = Stage2Step(name, device, getattr(torch, args.dtype))
        size = SIZES_OF_PAIRS[name]
        own = size.cuda_batch_size if device.type == "cuda" else size.cpu_batch_size
        batch = sample_pairs(size, args.batch_size or own, device)
        rows += [row | {"size": name, "dtype": args.dtype} for row in time_choices(step, batch, args.repeats)]
    settings = {name: value for name, value in asdict(args).items() if name not in ("output_dir", "name")}
    report = {
        "question": QUESTION,
        "machine": describe_machine(device),
        "settings": settings | {"num_frames": NUM_FRAMES, "text_length": TEXT_LENGTH},
        "rows": rows,
    }
    table = format_rows(rows)
    print(table)
    return write_results("stage2", report, table, args.output_dir, args.name)


def time_choices(step: Stage2Step, batch: dict[str, Any], repeats: int) -> list[dict[str, Any]]:
    """A row for each choice of losses, timed in turn."""
    pairs, flops, cases = len(batch["pixel_values"]), {}, {}
    for choice, losses in CHOICES.items():
        step.choose(losses)
        flops[choice] = step.count_flops(batch)
        time_steps(step, batch, losses, 1)
        seconds = time_steps(step, batch, losses, 1)
        cases[choice] = partial(time_steps, step, batch, losses, max(1, round(STRETCH_SECONDS / seconds)))
    found = run_interleaved(cases, repeats)
    everything = found[" + ".join(LOSSES).upper()]
    return [
        {
            "losses": choice,
            "batch_size": pairs,
            "step_seconds": summarize(found[choice]),
            "relative_to_all": summarize(own / other for own, other in zip(found[choice], everything, strict=True)),
            "pairs_per_second": summarize(pairs / seconds for seconds in found[choice]),
            "flops_per_pair": {"student": student / pairs, "teacher": teacher / pairs},
            "teacher_share": teacher / (student + teacher),
        }
        for choice, (student, teacher) in flops.items()
    ]


def time_steps(step: Stage2Step, batch: dict[str, Any], losses: Sequence[str], count: int) -> float:
    """Seconds of a step with these losses, the mean over some steps."""
    step.choose(losses)
    synchronize(step.device)
    start = time.perf_counter()
    for _ in range(count):
        step.run(batch)
    synchronize(step.device)
    return (time.perf_counter() - start) / count


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Write the rows as a Markdown table."""
    header = ["size", "batch", "precision", "losses", "s a step", "of all four", "pairs/s"]
    header += ["student, GFLOP a pair", "teacher, GFLOP a pair", "teacher's share"]
    lines = [
        [
            row["size"],
            str(row["batch_size"]),
            row["dtype"],
            row["losses"],
            format_spread(row["step_seconds"]),
            format_spread(row["relative_to_all"], ".2f"),
            format_spread(row["pairs_per_second"]),
            f"{row['flops_per_pair']['student'] / 1e9:.3g}",
            f"{row['flops_per_pair']['teacher'] / 1e9:.3g}",
            f"{row['teacher_share']:.0%}",
        ]
        for row in rows
    ]
    return format_table(header, lines)


if __name__ == "__main__":
    main()
