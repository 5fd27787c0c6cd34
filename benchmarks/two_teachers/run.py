"""Stage 1 under an image teacher, and under an image and a video teacher, for equal processor time.

python -m benchmarks.two_teachers.run --folder outputs/moving_shapes
"""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from transformers import HfArgumentParser

from benchmarks.common import ReportArguments, describe_machine, format_spread, format_table, summarize, write_results
from benchmarks.pretraining_value import settings as shared
from benchmarks.pretraining_value.data import decode_split
from umt_hf import UMTTeacher, UMTVideoModel
from umt_hf.moving_shapes.probes import APPEARANCES, CHANCE, MOTIONS, PROBES, fit_probe, pool
from umt_hf.training import stage1

from . import video_teacher
from .clips import load_probed_split, normalize

QUESTION = "Does a video teacher beside an image teacher help motion, at equal processor time?"
SPLITS = ("train", "validation", "test")
IMAGE, BOTH = "image teacher", "image and video teacher"
# Column -> task, probe and pooling, as those of the tour.
COLUMNS = {
    "motion, frames in order": (MOTIONS, "MLP", "ordered"),
    "motion, mean": (MOTIONS, "MLP", "mean"),
    "appearance, mean": (APPEARANCES, "linear", "mean"),
}
SHORT, LONG = 10, 40  # steps of the runs whose difference is the cost of a step
Splits = dict[str, dict[str, torch.Tensor]]


@dataclass(kw_only=True)
class Arguments(ReportArguments):
    """What to train, for how long."""

    folder: Path = field(
        default=Path("outputs/moving_shapes"), metadata={"help": "Of `make demo`: its data and teacher."}
    )
    seeds: list[int] = field(default_factory=lambda: [51, 52, 53], metadata={"help": "Weights, order, masks."})
    steps: int = field(default=480, metadata={"help": "Optimizer steps with the image teacher alone."})
    teacher_weights: list[float] = field(default_factory=lambda: [1.0, 1.0], metadata={"help": "Of the two losses."})
    video_teacher_steps: int = field(default=1000, metadata={"help": "Optimizer steps of the video teacher."})
    probe_steps: int = field(default=800, metadata={"help": "Optimizer steps of a probe."})


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark and give the path of its JSON file."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    if not (args.folder / "teacher").is_dir():
        raise SystemExit(f"{args.folder} has no teacher: run `make demo` first, or give its folder by --folder.")
    os.environ.update(shared.ENVIRONMENT)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for split in SPLITS:
            decode_split(args.folder / "data", work / "frames", split)
        seconds = video_teacher.train_video_teacher(work / "frames", work / "videomae", args.video_teacher_steps)
        teachers = {IMAGE: [args.folder / "teacher"], BOTH: [args.folder / "teacher", work / "videomae"]}
        costs = {arm: measure_step(args, work, paths) for arm, paths in teachers.items()}
        print(f"The video teacher took {seconds:.0f} s, a step of each arm {costs}.", flush=True)
        splits = {split: load_probed_split(work / "frames", split) for split in SPLITS}
        rows = [
            probe_teacher(args, splits, f"{kind} teacher itself", path)
            for kind, path in zip(("image", "video"), teachers[BOTH], strict=True)
        ]
        for arm, steps in plan_steps(args.steps, costs).items():
            rows.append(measure_arm(args, work, splits, arm, teachers[arm], steps))
    settings = {name: value for name, value in asdict(args).items() if name not in ("output_dir", "name", "folder")}
    settings |= {"video_teacher": video_teacher.SIZES | video_teacher.TRAINING, "video_teacher_seconds": seconds}
    machine = describe_machine(torch.device("cpu"))
    report = {"question": QUESTION, "machine": machine, "settings": settings, "rows": rows}
    table = format_rows(rows)
    print(table)
    return write_results("two_teachers", report, table, args.output_dir, args.name)


def plan_steps(steps: int, costs: dict[str, float]) -> dict[str, int]:
    """Optimizer steps of each arm, which take equal processor time.

    Args:
        steps: With the image teacher alone.
        costs: Seconds of a step, by arm.
    """
    return {arm: round(steps * costs[IMAGE] / cost) for arm, cost in costs.items()}


def measure_step(args: Arguments, work: Path, teachers: Sequence[Path]) -> float:
    """Seconds of processor time of an optimizer step, without what a run takes once."""
    short, long = (
        train(args, work, teachers, 0, steps, work / f"cost of {len(teachers)}" / str(steps))
        for steps in (SHORT, LONG)
    )
    return (long - short) / (LONG - SHORT)


def train(args: Arguments, work: Path, teachers: Sequence[Path], seed: int, steps: int, output_dir: Path) -> float:
    """Train a student by stage 1 and give the seconds of processor time that it took, teachers included."""
    AcceleratorState._reset_state(reset_partial_state=True)
    flags = {
        **shared.STUDENT,
        **shared.PRETRAINING,
        "mixed_precision": "no",
        "train_data": work / "frames" / "train_motion.csv",
        "teacher_name_or_path": tuple(teachers),
        "num_aligned_layers": 1,
        "mask_ratio": shared.MASK_RATIO,
        "max_steps": steps,
        "warmup_steps": steps // 10,
        "seed": seed,
        "output_dir": output_dir,
        "disable_tqdm": True,
    }
    if len(teachers) > 1:
        flags["teacher_weights"] = tuple(args.teacher_weights)
    started = time.process_time()
    stage1.main(shared.list_flags(flags))
    return time.process_time() - started


def measure_arm(
    args: Arguments, work: Path, splits: Splits, arm: str, teachers: Sequence[Path], steps: int
) -> dict[str, Any]:
    """Processor time and accuracies of an arm over all seeds."""
    found = []
    for seed in args.seeds:
        seconds = train(args, work, teachers, seed, steps, work / arm / str(seed))
        found.append({"seconds": seconds, **probe_student(args, splits, work / arm / str(seed))})
        print(arm, steps, seed, found[-1], flush=True)
    return {"arm": arm, "steps": steps, **{name: summarize(run[name] for run in found) for name in found[0]}}


def probe_student(args: Arguments, splits: Splits, folder: Path) -> dict[str, float]:
    """Accuracies of a student's features, of all tokens."""
    encoder = UMTVideoModel.from_pretrained(folder).eval()
    return probe(args, splits, lambda pixels: encoder(pixels).last_hidden_state)


def probe_teacher(args: Arguments, splits: Splits, name: str, folder: Path) -> dict[str, Any]:
    """Accuracies of a teacher's own features."""
    teacher = UMTTeacher.from_pretrained(str(folder), 1)
    found = probe(args, splits, lambda pixels: teacher.compute_features(pixels)[0])
    return {"arm": name, "steps": None, "seconds": None} | {
        column: summarize([value]) for column, value in found.items()
    }


@torch.no_grad()
def embed(encode: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """A mean per frame of the tokens `(B, T * P, D)` of clips: `(clips, T, D)`."""
    tokens = torch.cat([encode(normalize(part)) for part in pixels.split(50)])
    return tokens.unflatten(1, (pixels.shape[1], -1)).mean(2)


def probe(args: Arguments, splits: Splits, encode: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
    """Accuracy of each probe on frozen features."""
    frames = {name: embed(encode, split["pixels"]) for name, split in splits.items()}
    return {
        column: fit_probe(
            [(pool(frames[name], pooling), split[task]) for name, split in splits.items()],
            PROBES[kind],
            args.probe_steps,
        )
        for column, (task, kind, pooling) in COLUMNS.items()
    }


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Write the rows as a Markdown table."""
    header = ["features of", "steps", "processor seconds", *COLUMNS]
    lines = [
        [
            row["arm"],
            "-" if row["steps"] is None else str(row["steps"]),
            format_spread(row["seconds"], ".0f"),
            *(format_spread(row[column], ".3f") for column in COLUMNS),
        ]
        for row in rows
    ]
    chance = ["chance", "-", "-", *(f"{CHANCE[task]:.3f}" for task, _, _ in COLUMNS.values())]
    return format_table(header, [*lines, chance])


if __name__ == "__main__":
    main()
