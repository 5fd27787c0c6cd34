r"""Both stages on the embedded data: render, train a tiny teacher, pre-train, load, evaluate, draw.

    python -m umt_hf.moving_shapes.tour
    python -m umt_hf.moving_shapes.tour --budget full --output_dir outputs/full
    python -m umt_hf.moving_shapes.tour --budget full --output_dir outputs/seeds \
        --seeds 10 11 12
    python -m umt_hf.moving_shapes.tour --output_dir outputs/look --quick

Training and evaluation each run in new processes, by the script that a user would start. A tour that was stopped goes
on where it was: the clips, the teacher and the checkpoints that exist are used again. At the end it says what to look
at; the exit code is 1 if one of the statements there does not hold.
"""

import argparse
import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import typer

from ..runs.disk import write_text
from ..runs.folder import CONFIG_FILE, LOSS_PICTURE
from ..runs.mistakes import end_in_one_line
from ..runs.preflight import name_folder
from ..training import stage1, stage2
from . import caption_search, probes, tiny_clip
from .render import write_moving_shapes
from .statements import format_statements, list_statements
from .steps import Cost, Step, can_fork, format_costs, read_cpu_seconds, run_steps
from .tiny_bert import TextTowerArguments, write_text_tower

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
RESULTS = {"stage1": "results.json", "stage2": "results_stage2.json"}
STEPS_OF_STAGE_2 = ("make the text tower", "pre-train with text", "search in a new process")
FAILED_CODE = 1
BATCH_SIZE = 32  # clips per step in the recipes of both stages


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much of everything.

    Attributes:
        num_clips: Clips to train, validate and test on.
        teacher_steps: Optimizer steps of the teacher.
        recipes: What the names of the stages' recipes end with.
        max_steps: Optimizer steps of each stage; `None` = its recipe's.
        probe_steps: Optimizer steps of a probe.
        num_quartets: Clips that are rendered with each of the four motions, to search among them.
        num_lanes: Processes of steps that run side by side, each on one core. A stage is trained by as many, which
            share each of its batches; other steps are one process, beside another where they do not need each other.
    """

    num_clips: tuple[int, int, int]
    teacher_steps: int
    recipes: str
    max_steps: int | None = None
    probe_steps: int = probes.PROBE_STEPS
    num_quartets: int = caption_search.NUM_QUARTETS
    num_lanes: int = 1


BUDGETS = {
    "short": Budget(
        num_clips=(1200, 200, 400),
        teacher_steps=600,
        recipes="moving_shapes_short",
        num_quartets=40,
        num_lanes=2,
    ),
    "full": Budget(num_clips=(3000, 600, 900), teacher_steps=1600, recipes="moving_shapes"),
}
# What `--quick` leaves of a budget.
QUICK: dict[str, Any] = {
    "num_clips": (48, 12, 12),
    "teacher_steps": 4,
    "max_steps": 2,
    "probe_steps": 50,
    "num_quartets": 2,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages for one seed or several, and print what came out.

    Args:
        arguments: Command line; `None` = the process's.

    Returns:
        Exit code: 1 if a statement does not hold. Runs of fewer steps than their budget's make none.
    """
    started, cpu = psutil.Process().create_time(), read_cpu_seconds()
    starting = Cost(round(time.time() - started, 1), round(cpu, 1))
    args = build_parser().parse_args(arguments)
    os.environ.update(ENVIRONMENT)
    budget = dataclasses.replace(BUDGETS[args.budget], **(QUICK if args.quick else {}))
    if args.max_steps is not None:
        budget = dataclasses.replace(budget, max_steps=args.max_steps)
    costs: dict[str, Cost] = {"start Python and import": starting}
    results = []
    for seed, folder in list_folders(args.output_dir, args.seeds):
        is_single = len(args.seeds) == 1
        steps = plan_steps(folder, seed, budget, args.stages)
        found = run_steps(steps, budget.num_lanes, folder / "logs", f"seed {seed}, ")
        costs |= {name if is_single else f"seed {seed}, {name}": cost for name, cost in found.items()}
        results.append({f"stage{stage}": add_seconds(folder, stage, found) for stage in args.stages})
    show_tables(args.output_dir, results)
    code = 0
    if budget.max_steps is None:
        statements = [list_statements(result) for result in results]
        typer.echo(f"\nWhat to look at:\n{format_statements(statements)}")
        code = 0 if all(statement.holds for rows in statements for statement in rows) else FAILED_CODE
    total = Cost(time.time() - started, read_cpu_seconds())
    typer.echo(f"\n{format_costs(costs, total)}")
    if len(args.seeds) == 1 and 2 in args.stages:
        typer.echo("\nTo try next:\n" + "\n".join(f"  {command}" for command in list_next_commands(args.output_dir)))
    return code


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=name_folder, default=Path("outputs/moving_shapes"))
    parser.add_argument(
        "--budget",
        choices=list(BUDGETS),
        default="short",
        help="short: minutes on two cores, which share the training of both stages; full: that of the tables in the "
        "documentation, one step after the other in one process each. Default: short.",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="Each seed draws other data and weights.")
    parser.add_argument("--stages", type=int, nargs="+", choices=(1, 2), default=[1, 2], help="2 needs what 1 leaves.")
    parser.add_argument("--max_steps", type=int, help="Optimizer steps of each stage; default: the recipe's.")
    parser.add_argument(
        "--quick", action="store_true", help="See in a minute that all works; accuracies mean nothing."
    )
    return parser


def list_folders(output_dir: Path, seeds: Sequence[int]) -> list[tuple[int, Path]]:
    """Each seed with its folder: `output_dir` itself for a single one."""
    return [(seed, output_dir if len(seeds) == 1 else output_dir / f"seed_{seed}") for seed in seeds]


def plan_steps(folder: Path, seed: int, budget: Budget, stages: Sequence[int]) -> dict[str, Step]:
    """Steps of one seed, by what they are called in lines and tables.

    Args:
        folder: Folder of the seed.
        seed: Of data, weights and batches.
        budget: How much of everything.
        stages: 1, 2 or both.
    """
    data, teacher = folder / "data", folder / "teacher"
    # Where steps share the machine, each has its core. Accelerate gives the stages one thread in any case.
    one = 1 if budget.num_lanes > 1 else None
    steps: dict[str, Step] = {}
    if 1 in stages:
        steps["render the videos"] = Step(function=write_moving_shapes, arguments=(data, *budget.num_clips, seed))
        if not (teacher / CONFIG_FILE).is_file():
            flags = ["--data", data, "--output_dir", teacher, "--seed", seed, "--max_steps", budget.teacher_steps]
            steps["train the teacher"] = Step(
                function=tiny_clip.main,
                arguments=([str(flag) for flag in flags],),
                needs=frozenset({"render the videos"}),
                num_threads=one,
            )
    if 2 in stages:
        tower = TextTowerArguments(data=str(data), output_dir=str(folder / "text_tower"), seed=seed)
        steps["make the text tower"] = Step(
            function=write_text_tower, arguments=(tower,), needs=frozenset({"render the videos"}), is_beside=True
        )
    if 1 in stages:
        flags = ["--train_data", data / "train.csv", "--validation_data", data / "validation.csv"]
        flags += ["--teacher_name_or_path", teacher, "--output_dir", folder / "student"]
        needs = frozenset({"render the videos", "train the teacher"})
        steps["pre-train"] = plan_training("stage1", flags, seed, budget, needs)
    if 2 in stages:
        flags = ["--train_corpora", data / "train_captions.json", "--vision_name_or_path", folder / "student"]
        flags += ["--text_name_or_path", folder / "text_tower", "--teacher_name_or_path", teacher]
        flags += ["--output_dir", folder / "video_text"]
        needs = frozenset({"pre-train", "make the text tower"})
        steps["pre-train with text"] = plan_training("stage2", flags, seed, budget, needs)
    if 1 in stages:
        steps["evaluate in a new process"] = Step(
            function=probes.measure_probes,
            arguments=(folder, budget.probe_steps),
            needs=frozenset({"pre-train"}),
            is_beside=True,
            num_threads=one,
        )
    if 2 in stages:
        steps["search in a new process"] = Step(
            function=caption_search.measure_caption_search,
            arguments=(folder, seed, budget.num_quartets),
            needs=frozenset({"pre-train with text"}),
            num_threads=one,
        )
    return steps


def plan_training(stage: str, flags: list[Any], seed: int, budget: Budget, needs: frozenset[str]) -> Step:
    """Step that runs a stage's recipe, or goes on with it."""
    # A second process nearly halves the time, a second thread does not at this size. Where processes are not forked,
    # each would import everything again, and on an accelerator one is enough.
    num_processes = budget.num_lanes if can_fork() else 1
    flags = ["--config", f"{stage}_{budget.recipes}", *flags, "--seed", seed, "--resume_from_checkpoint", "auto"]
    if num_processes > 1:
        flags += ["--per_device_train_batch_size", BATCH_SIZE // num_processes]
    if budget.max_steps is not None:
        flags += ["--max_steps", budget.max_steps]
    words = [str(flag) for flag in flags]
    function = {"stage1": stage1.main, "stage2": stage2.main}[stage]
    launch = f" --num_processes {num_processes}" if num_processes > 1 else ""
    return Step(
        function=function,
        arguments=(words,),
        needs=needs,
        command=f"umt-hf pretrain {stage}{launch} {' '.join(words)}",
        num_threads=1,
        num_processes=num_processes,
    )


def add_seconds(folder: Path, stage: int, costs: Mapping[str, Cost]) -> dict[str, Any]:
    """Add the seconds of a stage's steps to its results, which its last step has written.

    Returns:
        Their content.
    """
    file = folder / RESULTS[f"stage{stage}"]
    own = {name: cost for name, cost in costs.items() if (name in STEPS_OF_STAGE_2) == (stage == 2)}
    content = json.loads(file.read_text(encoding="utf-8")) | {
        "seconds": {name: cost.wall for name, cost in own.items()},
        "cpu_seconds": {name: cost.cpu for name, cost in own.items()},
    }
    write_text(file, json.dumps(content, indent=2) + "\n")
    return content


def show_tables(output_dir: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Print what probes and search have measured, and what to open; tables of several seeds are also written."""
    contents = {
        "stage1": (probes.format_probe_table, "table.md", "student", (LOSS_PICTURE, "masks.png")),
        "stage2": (
            caption_search.format_search_table,
            "table_stage2.md",
            "video_text",
            ("losses_stage2.png", "retrieval.png"),
        ),
    }
    for stage, (format_table, file, model, pictures) in contents.items():
        found = [result[stage] for result in results if stage in result]
        if not found:
            continue
        table = format_table(found)
        typer.echo(f"\n{table}")
        if len(found) > 1:
            (output_dir / file).write_text(table + "\n", encoding="utf-8")
        else:
            typer.echo(f"\nPictures: {', '.join(str(output_dir / picture) for picture in pictures)}")
            typer.echo(f"Model:    {output_dir / model}  (AutoModel.from_pretrained)")


def list_next_commands(output_dir: Path) -> list[str]:
    """What to try on the models and clips of a tour: search the clips by text, and see it all in the browser."""
    command = find_command()
    index, clips = output_dir / "index", output_dir / "data" / "videos" / "test"
    page = [f"{command} demo"]
    if output_dir != build_parser().get_default("output_dir"):
        page += [f"--teacher {output_dir / 'teacher'}", f"--student {output_dir / 'student'}"]
        page += [f"--video-text {output_dir / 'video_text'}", f"--videos {clips}"]
    return [
        f"{command} embed {clips} --model {output_dir / 'video_text'} --out {index}",
        f'{command} search {index} "a red ring moving clockwise" --top-k 5',
        " ".join(page),
    ]


def find_command() -> str:
    """How `umt-hf` is called here: by its name, or by its path where the environment is not active."""
    own = Path(sys.executable).with_name("umt-hf")
    found = shutil.which("umt-hf")
    if not own.is_file() or (found is not None and Path(found).samefile(own)):
        return "umt-hf"
    return os.path.relpath(own) if own.is_relative_to(Path.cwd()) else str(own)


if __name__ == "__main__":
    with end_in_one_line(lambda: "The same command goes on where this one stopped."):
        sys.exit(main())
