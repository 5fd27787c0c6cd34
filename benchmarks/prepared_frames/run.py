"""Train stage 1 on videos and on some kept frames of each, and compare the held-out loss on the videos.

    python -m benchmarks.prepared_frames.run

A clip takes one frame of each of four equal parts. From a video of 24 frames it has six to choose from in each part;
from 16 kept frames four, as from the 32 frames that `umt-hf prepare` keeps for clips of eight; from 8 two; from 4 one.
Everything else is the same for a seed: weights, order of the videos, crops, masks. Two processes of one thread.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import HfArgumentParser

from benchmarks.common import ReportArguments, describe_machine, format_table, write_results
from benchmarks.pretraining_value.jobs import Job, build_pool, run_jobs
from umt_hf.data.prepare import ShardSettings, prepare_shards
from umt_hf.moving_shapes import tiny_clip
from umt_hf.moving_shapes.render import NUM_FRAMES, write_moving_shapes
from umt_hf.runs.folder import read_metrics
from umt_hf.training import stage1

ENVIRONMENT = {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
FRAMES_OF_CLIP = 4
QUALITY = 95  # pictures of 64 pixels lose much at 85, which is not the question here
VIDEOS = "videos"
PICTURE = "prepared_frames.png"
TRAINING = {
    "num_frames": FRAMES_OF_CLIP,
    "sampling_strategy": "segments",
    "dataloader_num_workers": 0,
    "warmup_steps": 20,
    "logging_steps": 10,
    "save_steps": 100_000,
    "report_to": "none",
    "disable_tqdm": True,
}


@dataclass(kw_only=True)
class Arguments(ReportArguments):
    """How much of everything."""

    num_clips: int = field(default=600, metadata={"help": "Training videos."})
    num_eval_clips: int = field(default=128, metadata={"help": "Held-out videos."})
    kept: list[int] = field(default_factory=lambda: [16, 8, 4], metadata={"help": "Frames kept of each video."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Weights, order, crops, masks."})
    max_steps: int = field(default=240, metadata={"help": "Optimizer steps of a run."})
    eval_steps: int = field(default=40, metadata={"help": "Steps from a held-out loss to the next."})
    teacher_steps: int = field(default=300, metadata={"help": "Optimizer steps of the teacher."})
    num_processes: int = field(default=2, metadata={"help": "Runs at a time, on one thread each."})


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the comparison and give the path of its JSON file; the picture is beside it."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    torch.set_num_threads(1)
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_moving_shapes(folder / "data", args.num_clips, args.num_eval_clips, 1)
        kept = {name_kept(number): number for number in args.kept}
        for number in args.kept:
            settings = ShardSettings(num_frames=number, quality=QUALITY)
            prepare_shards([str(folder / "data" / "train.csv")], folder / f"kept_{number}", settings)
        jobs = {"teacher": Job(train_teacher, (folder, args.teacher_steps))}
        for seed in args.seeds:
            for case in (VIDEOS, *kept):
                jobs[f"{case}, seed {seed}"] = Job(train, (folder, kept.get(case), seed, args), frozenset({"teacher"}))
        with build_pool(args.num_processes, folder) as pool:
            run_jobs(jobs, pool, args.num_processes, folder)
        curves = {case: [read_curve(folder, kept.get(case), seed) for seed in args.seeds] for case in (VIDEOS, *kept)}
    rows = [summarize_case(case, kept.get(case), curves) for case in curves]
    skipped = ("output_dir", "name")
    report = {
        "question": "What do fewer choices per segment do to the loss of stage 1?",
        "machine": describe_machine(torch.device("cpu")),
        "settings": {key: value for key, value in asdict(args).items() if key not in skipped},
        "rows": rows,
    }
    table = format_rows(rows)
    print(table)
    path = write_results("prepared_frames", report, table, args.output_dir, args.name)
    draw_curves(curves, path.with_name(PICTURE))
    return path


def name_kept(number: int) -> str:
    """What a case of kept frames is called."""
    return f"{number} frames kept"


def train_teacher(folder: Path, max_steps: int) -> None:
    """The tiny CLIP whose features are learned."""
    arguments = {"data": str(folder / "data"), "output_dir": str(folder / "teacher"), "max_steps": max_steps}
    tiny_clip.train_teacher(tiny_clip.TinyCLIPArguments(**arguments))


def locate_run(folder: Path, number: int | None, seed: int) -> Path:
    """Folder of a run."""
    return folder / "runs" / f"{number or VIDEOS}_{seed}"


def train(folder: Path, number: int | None, seed: int, args: Arguments) -> None:
    """Stage 1 on videos, or on `number` frames of each; held-out videos are complete in any case."""
    flags = {
        "config": "stage1_moving_shapes",
        "train_data": folder / ("data/train.csv" if number is None else f"kept_{number}"),
        "validation_data": folder / "data" / "validation.csv",
        "max_eval_samples": args.num_eval_clips,
        "teacher_name_or_path": folder / "teacher",
        "output_dir": locate_run(folder, number, seed),
        "max_steps": args.max_steps,
        "eval_steps": args.eval_steps,
        "seed": seed,
        **TRAINING,
    }
    stage1.main([part for name, value in flags.items() for part in (f"--{name}", str(value))])


def read_curve(folder: Path, number: int | None, seed: int) -> list[tuple[int, float]]:
    """Steps and held-out losses of a run."""
    lines = read_metrics(locate_run(folder, number, seed) / "metrics.jsonl")
    return [(line["step"], line["eval_loss"]) for line in lines if line.get("eval_loss") is not None]


def summarize_case(
    case: str, number: int | None, curves: Mapping[str, list[list[tuple[int, float]]]]
) -> dict[str, Any]:
    """Last held-out losses of a case, and their differences from those of the videos with the same seed."""
    last, reference = ([curve[-1][1] for curve in curves[name]] for name in (case, VIDEOS))
    differences = [loss - other for loss, other in zip(last, reference, strict=True)]
    return {
        "case": case,
        "choices_per_part": (number or NUM_FRAMES) / FRAMES_OF_CLIP,
        "held_out_losses": last,
        "differences": differences,
        "curves": curves[case],
    }


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Write the rows as a Markdown table."""
    header = ["trained on", "choices per part", "held-out loss on videos", "difference from videos, seed by seed"]
    lines = [
        [
            row["case"],
            f"{row['choices_per_part']:g}",
            format_mean(row["held_out_losses"]),
            "-" if row["case"] == VIDEOS else format_mean(row["differences"], "+"),
        ]
        for row in rows
    ]
    return format_table(header, lines)


def format_mean(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard deviation over the seeds."""
    spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.4f}{spread}"


def draw_curves(curves: Mapping[str, list[list[tuple[int, float]]]], picture: Path) -> None:
    """Draw held-out losses against steps: the mean of the seeds, and the range that they span."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for case, seeds in curves.items():
        steps, losses = [step for step, _ in seeds[0]], np.array([[loss for _, loss in curve] for curve in seeds])
        (line,) = axis.plot(steps, losses.mean(axis=0), "o-", label=case, markersize=3)
        axis.fill_between(steps, losses.min(axis=0), losses.max(axis=0), color=line.get_color(), alpha=0.18)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("held-out alignment loss on videos")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(picture, dpi=130)


if __name__ == "__main__":
    main()
