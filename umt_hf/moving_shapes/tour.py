"""Both stages on the embedded data: render, train a tiny teacher, pre-train, load, evaluate, draw.

    python -m umt_hf.moving_shapes.tour --output_dir outputs/moving_shapes
    python -m umt_hf.moving_shapes.tour --output_dir outputs/seeds --seeds 10 11 12
    python -m umt_hf.moving_shapes.tour --output_dir outputs/look --quick

Training and evaluation each run in a new process, by the command that a user would type. A tour that was stopped goes
on where it was: the clips, the teacher and the checkpoints that exist are used again.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from ..runs.disk import write_text
from ..runs.folder import CONFIG_FILE, LOSS_PICTURE
from . import caption_search, probes
from .render import write_moving_shapes
from .tiny_bert import TextTowerArguments, write_text_tower

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]
# Threads that wait without spinning leave the cores to the workers that decode.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}

Step = list[Any] | Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much of everything; the defaults are those of `make demo`.

    Attributes:
        num_clips: Clips to train, validate and test on.
        teacher_steps: Optimizer steps of the teacher.
        max_steps: Optimizer steps of each stage; `None` = its recipe's.
        probe_steps: Optimizer steps of a probe.
        num_quartets: Clips that are rendered with each of the four motions, to search among them.
    """

    num_clips: tuple[int, int, int] = (3000, 600, 900)
    teacher_steps: int = 1600
    max_steps: int | None = None
    probe_steps: int = probes.PROBE_STEPS
    num_quartets: int = caption_search.NUM_QUARTETS


QUICK = Budget(num_clips=(48, 12, 12), teacher_steps=4, max_steps=2, probe_steps=50, num_quartets=2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages for one seed or several, and print a table after each.

    Args:
        arguments: Command line; `None` = the process's.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/moving_shapes"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="Each seed draws other data and weights.")
    parser.add_argument("--stages", type=int, nargs="+", choices=(1, 2), default=[1, 2], help="2 needs what 1 leaves.")
    parser.add_argument("--max_steps", type=int, help="Optimizer steps of each stage; default: the recipe's.")
    parser.add_argument(
        "--quick", action="store_true", help="See in a minute that all works; accuracies mean nothing."
    )
    args = parser.parse_args(arguments)
    budget = QUICK if args.quick else Budget()
    if args.max_steps is not None:
        budget = dataclasses.replace(budget, max_steps=args.max_steps)
    if 1 in args.stages:
        results = [run_stage1(folder, seed, budget) for seed, folder in list_folders(args.output_dir, args.seeds)]
        show_table(probes.format_probe_table(results), args.output_dir / "table.md", len(results))
        if len(results) == 1:
            typer.echo(f"\nPictures: {args.output_dir / LOSS_PICTURE}, {args.output_dir / 'masks.png'}")
            typer.echo(f"Model:    {args.output_dir / 'student'}  (AutoModel.from_pretrained)\n")
    if 2 in args.stages:
        results = [run_stage2(folder, seed, budget) for seed, folder in list_folders(args.output_dir, args.seeds)]
        show_table(caption_search.format_search_table(results), args.output_dir / "table_stage2.md", len(results))
        if len(results) == 1:
            typer.echo(f"\nPictures: {args.output_dir / 'losses_stage2.png'}, {args.output_dir / 'retrieval.png'}")
            typer.echo(f"Model:    {args.output_dir / 'video_text'}  (AutoModel.from_pretrained, umt-hf embed)")


def list_folders(output_dir: Path, seeds: Sequence[int]) -> list[tuple[int, Path]]:
    """Each seed with its folder: `output_dir` itself for a single one."""
    return [(seed, output_dir if len(seeds) == 1 else output_dir / f"seed_{seed}") for seed in seeds]


def show_table(table: str, path: Path, num_seeds: int) -> None:
    """Print a table; that of several seeds is also written."""
    typer.echo(table)
    if num_seeds > 1:
        path.write_text(table + "\n", encoding="utf-8")


def run_stage1(folder: Path, seed: int, budget: Budget) -> dict[str, Any]:
    """Data, teacher, student and probes of one seed.

    Returns:
        Content of `results.json`: the probes' accuracies, and the seconds of each step.
    """
    data, teacher, student = folder / "data", folder / "teacher", folder / "student"
    module = [sys.executable, "-m"]
    clip = ["--data", data, "--output_dir", teacher, "--seed", seed, "--max_steps", budget.teacher_steps]
    training = ["--train_data", data / "train.csv", "--validation_data", data / "validation.csv"]
    training += ["--teacher_name_or_path", teacher, "--output_dir", student]
    steps: dict[str, Step] = {
        "render the videos": lambda: write_moving_shapes(data, *budget.num_clips, seed=seed),
        "train the teacher": [*module, "umt_hf.moving_shapes.tiny_clip", *clip],
        "pre-train": build_training("stage1", training, seed, budget),
        "evaluate in a new process": [*module, "umt_hf.moving_shapes.probes", "--output_dir", folder]
        + ["--probe_steps", budget.probe_steps],
    }
    if (teacher / CONFIG_FILE).is_file():
        del steps["train the teacher"]
    return run_steps(seed, steps, folder / "results.json")


def run_stage2(folder: Path, seed: int, budget: Budget) -> dict[str, Any]:
    """Text tower, video-text model and search of one seed.

    Returns:
        Content of `results_stage2.json`: recalls, and the seconds of each step.
    """
    data, text_tower = folder / "data", folder / "text_tower"
    tower = TextTowerArguments(data=str(data), output_dir=str(text_tower), seed=seed)
    training = ["--train_corpora", data / "train_captions.json", "--vision_name_or_path", folder / "student"]
    training += ["--text_name_or_path", text_tower, "--teacher_name_or_path", folder / "teacher"]
    training += ["--output_dir", folder / "video_text"]
    search = [sys.executable, "-m", "umt_hf.moving_shapes.caption_search", "--output_dir", folder]
    steps: dict[str, Step] = {
        "make the text tower": lambda: write_text_tower(tower),
        "pre-train with text": build_training("stage2", training, seed, budget),
        "search in a new process": [*search, "--seed", seed, "--num_quartets", budget.num_quartets],
    }
    return run_steps(seed, steps, folder / "results_stage2.json")


def build_training(stage: str, flags: list[Any], seed: int, budget: Budget) -> list[Any]:
    """Command that runs a stage's recipe, or goes on with it."""
    command = [*LAUNCH, "-m", f"umt_hf.training.{stage}", "--config", f"{stage}_moving_shapes", *flags]
    command += ["--seed", seed, "--resume_from_checkpoint", "auto"]
    return command if budget.max_steps is None else [*command, "--max_steps", budget.max_steps]


def run_steps(seed: int, steps: dict[str, Step], results: Path) -> dict[str, Any]:
    """Run the steps of a stage and add their seconds to the results, which the last one writes.

    Args:
        seed: Seed that is shown.
        steps: By name, a command that runs in a new process, or a function.
        results: File of the results.

    Returns:
        Its content.
    """
    seconds = {}
    for number, (name, step) in enumerate(steps.items(), start=1):
        typer.echo(f"[seed {seed}, {number}/{len(steps)}] {name}")
        started = time.perf_counter()
        if callable(step):
            step()
        else:
            subprocess.run([str(part) for part in step], check=True, env={**os.environ, **ENVIRONMENT})
        seconds[name] = round(time.perf_counter() - started, 1)
    typer.echo("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
    content = json.loads(results.read_text(encoding="utf-8")) | {"seconds": seconds}
    write_text(results, json.dumps(content, indent=2) + "\n")
    return content


if __name__ == "__main__":
    main()
