"""Time stage 1 in one process and in several, and count what they send each other.

python -m benchmarks.scale.run
"""

import tempfile
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
from benchmarks.processes import import_once
from benchmarks.training.inputs import Inputs, write_inputs
from umt_hf.runs.cores import count_physical_cores

from .loop import DDP, FSDP2, Found, run
from .traffic import Traffic


@dataclass(frozen=True)
class Work:
    """Of a size: clips of a step and process, steps that are timed (as many come before), rounds."""

    batch_size: int
    steps: int
    repeats: int


WORK = {"tiny": Work(32, 10, 3), "b16": Work(2, 1, 2), "l16": Work(1, 1, 2)}
# Kind and precision.
COUNTED = ((DDP, "no"), (DDP, "bf16"), (FSDP2, "no"), (FSDP2, "bf16"))
COUNTED_PROCESSES = 2
COUNTED_STEPS = 2
TOLERANCE = 1e-4  # of losses, relative


@dataclass(kw_only=True)
class Arguments(ReportArguments):
    """Which sizes to run in how many processes."""

    sizes: list[str] = field(default_factory=lambda: ["tiny", "b16"], metadata={"help": f"Of {', '.join(WORK)}."})
    processes: list[int] | None = field(
        default=None, metadata={"help": "Default: 1, 2 and 4, as far as there is a core for each."}
    )
    threads: int = field(default=1, metadata={"help": "Of each process."})
    batch_size: int | None = field(default=None, metadata={"help": "Of a step and process; default: the size's."})
    steps: int | None = field(default=None, metadata={"help": "Timed steps; default: the size's."})
    repeats: int | None = field(default=None, metadata={"help": "Rounds; default: the size's."})


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark and give the path of its JSON file."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    cores = count_physical_cores()
    processes = args.processes or [1, *(count for count in (2, 4) if count * args.threads <= cores)]
    rows, traffic = [], []
    for size in args.sizes:
        print(f"Training {size} in {', '.join(map(str, processes))} process(es) ...", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            inputs = write_inputs(size, Path(folder))
            check_agreement(inputs, args.threads)
            rows += measure_speed(inputs, processes, args)
            # FSDP2 was made for accelerators: what it sends is counted at a size that takes seconds on a CPU.
            kinds = COUNTED if size == "tiny" or torch.cuda.is_available() else COUNTED[:1]
            traffic += [measure_traffic(inputs, *kind, args.threads) for kind in kinds]
    report = {
        "question": "How does training scale with processes?",
        "machine": describe_machine(torch.device("cpu")) | {"threads": args.threads},
        "settings": {name: value for name, value in asdict(args).items() if name not in ("output_dir", "name")},
        "rows": rows,
        "traffic": traffic,
    }
    table = f"{format_rows(rows)}\n\n{format_traffic(traffic)}"
    print(table)
    return write_results("scale", report, table, args.output_dir, args.name)


def check_agreement(inputs: Inputs, threads: int) -> None:
    """Make sure that two processes train as one does that takes the clips of both.

    Raises:
        RuntimeError: If their losses differ.
    """
    one = run(inputs, 1, threads, batch_size=2, steps=1)
    for kind in (DDP, FSDP2) if inputs.size == "tiny" else (DDP,):
        two = run(inputs, 2, threads, batch_size=1, steps=1, kind=kind)
        if not torch.allclose(torch.tensor(two.losses), torch.tensor(one.losses), rtol=TOLERANCE, atol=0):
            raise RuntimeError(
                f"Two processes ({kind}) have other losses than one with their clips, so that their speeds cannot be "
                f"compared: {two.losses} and {one.losses}."
            )


def measure_speed(inputs: Inputs, processes: Sequence[int], args: Arguments) -> list[dict[str, Any]]:
    """A row for each number of processes, each of which takes as many clips; ratios are taken within a round."""
    work = WORK[inputs.size]
    batch_size, steps = args.batch_size or work.batch_size, args.steps or work.steps
    cases = {
        str(count): partial(run, inputs, count, args.threads, batch_size=batch_size, steps=steps)
        for count in processes
    }
    found = run_interleaved(cases, args.repeats or work.repeats)
    first = found[str(processes[0])]
    return [
        {
            "size": inputs.size,
            "batch_size": batch_size,
            "processes": count,
            "clips_per_second": summarize(own.clips_per_second for own in found[str(count)]),
            "relative_to_first": summarize(_list_ratios(found[str(count)], first, 1)),
            "efficiency": summarize(_list_ratios(found[str(count)], first, count / processes[0])),
        }
        for count in processes
    ]


def _list_ratios(runs: Sequence[Found], first: Sequence[Found], expected: float) -> list[float]:
    pairs = zip(runs, first, strict=True)
    return [own.clips_per_second / other.clips_per_second / expected for own, other in pairs]


def measure_traffic(inputs: Inputs, kind: str, precision: str, threads: int) -> dict[str, Any]:
    """What two processes hand over in a step, beside what the formulas say.

    Raises:
        RuntimeError: If it is something else.
    """
    steps = (COUNTED_STEPS + 2) // 2 + 1
    fields = {"batch_size": 1, "steps": steps, "kind": kind, "precision": precision, "counts": True}
    found = run(inputs, COUNTED_PROCESSES, threads, **fields)
    counted = found.traffic
    assert counted is not None, "It was asked for."
    expected = predict_traffic(kind, found.parameters, found.root_parameters, precision)
    if counted != expected:
        raise RuntimeError(f"A step of {kind} hands over {counted}, not {expected} as the formula says.")
    return {
        "size": inputs.size,
        "kind": kind,
        "precision": precision,
        "processes": COUNTED_PROCESSES,
        "parameters": found.parameters,
        "counted": asdict(counted),
        "predicted": asdict(expected),
        "small_bytes": found.small_bytes,
        "sent_bytes": counted.count_sent(COUNTED_PROCESSES),
    }


def predict_traffic(kind: str, parameters: int, root_parameters: int = 0, precision: str = "no") -> Traffic:
    """What a step hands over to the communication library, by formula.

    Args:
        kind: "ddp"; "fsdp2" and "zero3", which gather weights for the forward and again for the backward pass;
            "zero2", which keeps complete weights and divides gradients and moments.
        parameters: Trained weights.
        root_parameters: Those of them that FSDP2 gathers once, outside the parts that it divides.
        precision: As for `--mixed_precision`. Weights are float32 in any case; what is divided travels in bf16, if
            that is the run's.

    Raises:
        ValueError: If there is no such kind.
    """
    if kind == DDP:
        return Traffic(reduced=4 * parameters)
    size = 4 if precision == "no" else 2
    if kind == FSDP2:
        return Traffic(gathered=size * (2 * parameters - root_parameters), scattered=size * parameters)
    if kind == "zero3":
        return Traffic(gathered=size * 2 * parameters, scattered=size * parameters)
    if kind == "zero2":
        return Traffic(gathered=size * parameters, scattered=size * parameters)
    raise ValueError(f"kind must be ddp, fsdp2, zero2 or zero3, got {kind!r}.")


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Write the speeds as a Markdown table."""
    header = ["size", "batch per process", "processes", "clips/s", "x first", "efficiency"]
    return format_table(
        header,
        (
            [
                row["size"],
                str(row["batch_size"]),
                str(row["processes"]),
                format_spread(row["clips_per_second"]),
                format_spread(row["relative_to_first"], ".2f"),
                format_spread(row["efficiency"], ".0%"),
            ]
            for row in rows
        ),
    )


def format_traffic(rows: Sequence[dict[str, Any]]) -> str:
    """Write the bytes as a Markdown table."""
    header = [
        "size",
        "kind",
        "precision",
        "weights",
        "reduced, bytes per weight",
        "gathered",
        "scattered",
        "by formula",
    ]
    header += ["sent per step and process, MB"]
    lines = []
    for row in rows:
        counted, predicted = (
            [f"{row[name][part] / row['parameters']:.2f}" for part in ("reduced", "gathered", "scattered")]
            for name in ("counted", "predicted")
        )
        sent = f"{row['sent_bytes'] / 1e6:.3g}"
        precision = "float32" if row["precision"] == "no" else row["precision"]
        lines.append(
            [row["size"], row["kind"], precision, f"{row['parameters']:,}", *counted, " + ".join(predicted), sent]
        )
    return format_table(header, lines)


if __name__ == "__main__":
    import_once()
    main()
