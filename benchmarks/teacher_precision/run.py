"""Compare teachers in float32, bfloat16 and 8 bits: how close their targets are, and where the student's loss ends.

python -m benchmarks.teacher_precision.run --folder outputs/moving_shapes
"""

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import CLIPVisionModelWithProjection, HfArgumentParser

from benchmarks.common import (
    ReportArguments,
    describe_machine,
    format_spread,
    format_table,
    run_interleaved,
    summarize,
    write_results,
)
from benchmarks.stage1_step.workload import SIZES, build_teacher_config, sample_pixel_values
from umt_hf.teachers.quantization import quantize_teacher
from umt_hf.teachers.teacher import UMTTeacher

from .training import FLOATS, TrainingJob, measure_loss

QUESTION = "What does a teacher in 8 bits cost the student?"
PRECISIONS = (*FLOATS, "int8_weight_only", "int8_dynamic")


@dataclass(kw_only=True)
class Arguments(ReportArguments):
    """What to compare."""

    folder: Path = field(
        default=Path("outputs/moving_shapes"), metadata={"help": "Of `make demo`: its data and teacher."}
    )
    precisions: list[str] = field(default_factory=lambda: list(PRECISIONS), metadata={"help": "float32 comes first."})
    seeds: list[int] = field(default_factory=lambda: [10, 11, 12], metadata={"help": "A run for each precision."})
    steps: int = field(default=200, metadata={"help": "Optimizer steps of a run."})
    batch_size: int = field(default=32, metadata={"help": "Clips in a step."})
    sizes: list[str] = field(
        default_factory=lambda: ["b16"], metadata={"help": "Random teachers whose targets are compared as well."}
    )


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark and give the path of its JSON file."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    if not (args.folder / "teacher").is_dir():
        raise SystemExit(f"{args.folder} has no teacher: run `make demo` first, or give its folder by --folder.")
    cosines = {"moving_shapes": compare_targets(load_tower(args.folder / "teacher"), args.precisions, 32, "tiny")}
    for size in args.sizes:
        torch.manual_seed(0)
        tower = CLIPVisionModelWithProjection._from_config(build_teacher_config(SIZES[size]))
        cosines[f"{size}, random"] = compare_targets(tower, args.precisions, 1, size)
    losses = train_all(args)
    rows = [
        {
            "precision": precision,
            "least_cosine": {name: found[precision] for name, found in cosines.items()},
            "held_out_loss": summarize(losses[precision]),
            "relative_to_float32": summarize(
                own / exact for own, exact in zip(losses[precision], losses[args.precisions[0]], strict=True)
            ),
        }
        for precision in args.precisions
    ]
    settings = {name: value for name, value in asdict(args).items() if name not in ("output_dir", "name", "folder")}
    machine = describe_machine(torch.device("cpu"))
    report = {"question": QUESTION, "machine": machine, "settings": settings, "rows": rows}
    table = format_rows(rows)
    print(table)
    return write_results("teacher_precision", report, table, args.output_dir, args.name)


def load_tower(folder: Path) -> CLIPVisionModelWithProjection:
    """The vision tower of a CLIP, in float32."""
    return UMTTeacher.from_pretrained(str(folder), 1).vision_tower


def compare_targets(
    tower: CLIPVisionModelWithProjection, precisions: Sequence[str], clips: int, size: str
) -> dict[str, float]:
    """Least cosine between the targets at any token and those in float32, by precision."""
    pixel_values = sample_pixel_values(SIZES[size], clips, torch.device("cpu"))
    exact = UMTTeacher(copy.deepcopy(tower), 1)(pixel_values).features
    found = {}
    for precision in precisions:
        teacher = UMTTeacher(copy.deepcopy(tower), 1)
        if precision in FLOATS:
            teacher.to(getattr(torch, precision))
        else:
            quantize_teacher(teacher, precision)
        features = teacher(pixel_values.to(next(teacher.parameters()).dtype)).features
        found[precision] = float(F.cosine_similarity(features, exact, dim=-1).min())
    return found


def train_all(args: Arguments) -> dict[str, list[float]]:
    """Held-out losses of each precision, a run for each seed."""
    losses: dict[str, list[float]] = {precision: [] for precision in args.precisions}
    for seed in args.seeds:
        print(f"Training with seed {seed} in {', '.join(args.precisions)} ...", flush=True)
        cases = {precision: _build_case(args, precision, seed) for precision in args.precisions}
        for precision, (loss,) in run_interleaved(cases, 1).items():
            losses[precision].append(loss)
    return losses


def _build_case(args: Arguments, precision: str, seed: int) -> Any:
    def measure() -> float:
        with tempfile.TemporaryDirectory() as folder:
            job = TrainingJob(str(args.folder.resolve()), precision, seed, args.steps, args.batch_size, folder)
            return measure_loss(job)

    return measure


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Write the rows as a Markdown table."""
    names = list(rows[0]["least_cosine"])
    header = ["precision", *(f"least cosine, {name}" for name in names), "held-out loss", "of float32's"]
    lines = [
        [
            row["precision"],
            *(f"{row['least_cosine'][name]:.5f}" for name in names),
            format_spread(row["held_out_loss"], ".4f"),
            format_spread(row["relative_to_float32"], ".4f"),
        ]
        for row in rows
    ]
    return format_table(header, lines)


if __name__ == "__main__":
    main()
