"""Measure how long a checkpoint of stage 1 takes to write, against writing as many bytes.

python -m benchmarks.saves.run
"""

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
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
from benchmarks.stage1_step.workload import SIZES, build_student_config
from umt_hf import UMTVideoForPreTraining, UMTVideoProcessor
from umt_hf.training.checkpointing import STATE_FOLDER, export_run, save_checkpoint

SAVE, BYTES = "a checkpoint", "as many bytes in one file"
BLOCK_BYTES = 2**26


@dataclass(kw_only=True)
class Arguments(ReportArguments):
    """What is saved, and where."""

    sizes: list[str] = field(default_factory=lambda: ["b16", "l16"], metadata={"help": f"Of {', '.join(SIZES)}."})
    folder: Path | None = field(default=None, metadata={"help": "On the disk that is asked; default: the system's."})
    repeats: int = field(default=3, metadata={"help": "Rounds; each writes both."})


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark and give the path of its JSON file."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    rows = []
    for size in args.sizes:
        print(f"Saving {size} ...", flush=True)
        if args.folder is not None:
            args.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            rows += measure(size, Path(folder), args.repeats)
    report = {
        "question": "How long does a checkpoint take to write?",
        "machine": describe_machine(torch.device("cpu")),
        "settings": {"sizes": args.sizes, "repeats": args.repeats},
        "rows": rows,
    }
    table = format_rows(rows)
    print(table)
    return write_results("saves", report, table, args.output_dir, args.name)


def measure(size: str, folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Rows of a checkpoint and of its bytes alone, for a student with AdamW's moments as after a step."""
    accelerator = Accelerator(cpu=True)
    model = UMTVideoForPreTraining(build_student_config(SIZES[size]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    export = partial(export_run, accelerator, model, UMTVideoProcessor(), "")
    step, num_bytes = 0, 0

    def save() -> float:
        nonlocal step, num_bytes
        step += 1
        began = time.perf_counter()
        checkpoint = save_checkpoint(accelerator, folder, step, export, limit=None)
        seconds = time.perf_counter() - began
        num_bytes = count_bytes(checkpoint)
        check_saved(checkpoint, accelerator.unwrap_model(model))
        shutil.rmtree(checkpoint)
        return seconds

    save()  # how many bytes it is
    found = run_interleaved({SAVE: save, BYTES: lambda: write_bytes(folder / "bytes", num_bytes)}, repeats)
    accelerator.free_memory()
    return [
        {
            "size": size,
            "what": what,
            "bytes": num_bytes,
            "seconds": summarize(found[what]),
            "relative_to_bytes": summarize(own / raw for own, raw in zip(found[what], found[BYTES], strict=True)),
        }
        for what in found
    ]


def count_bytes(folder: Path) -> int:
    """Of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_saved(checkpoint: Path, model: torch.nn.Module) -> None:
    """Compare what was saved with the model.

    Raises:
        RuntimeError: If weights differ, or the state of the optimizer is not there.
    """
    saved = UMTVideoForPreTraining.from_pretrained(checkpoint).state_dict()
    differing = [name for name, own in model.state_dict().items() if not torch.equal(saved[name], own)]
    moments = checkpoint / STATE_FOLDER / "optimizer.bin"
    if differing or moments.stat().st_size < 8 * sum(own.numel() for own in model.parameters()):
        raise RuntimeError(f"{checkpoint} does not hold the run: {differing or moments}.")


def write_bytes(path: Path, num_bytes: int) -> float:
    """Write a file of a size through to the disk; the seconds that it takes."""
    block = os.urandom(BLOCK_BYTES)
    began = time.perf_counter()
    with path.open("wb") as file:
        for start in range(0, num_bytes, BLOCK_BYTES):
            file.write(block[: num_bytes - start])
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Write the rows as a Markdown table."""
    header = ["size", "what is written", "GB", "seconds", "x bytes alone", "GB/s"]
    lines = [
        [
            row["size"],
            row["what"],
            f"{row['bytes'] / 1e9:.2f}",
            format_spread(row["seconds"]),
            format_spread(row["relative_to_bytes"], ".2f"),
            f"{row['bytes'] / 1e9 / row['seconds']['median']:.2f}",
        ]
        for row in rows
    ]
    return format_table(header, lines)


if __name__ == "__main__":
    main()
