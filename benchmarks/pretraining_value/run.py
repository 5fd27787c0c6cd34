"""What stage 1 is worth when the encoder is fine-tuned, on the embedded data: against none and other pre-training.

    python -m benchmarks.pretraining_value.run --output_dir outputs/moving_shapes_full
    python -m benchmarks.pretraining_value.run --output_dir outputs/moving_shapes_full --seeds 10 11 12

Every start has the same weights before pre-training, the same clips, and then the same fine-tuning: from scratch; UMT
with semantic and with random masks; pixel reconstruction by Transformers' VideoMAE. Fine-tuning first fits the head on
the frozen encoder, and then trains everything. Two processes of one thread work through the runs; all seeds share data
and teacher. A demo that was stopped goes on where it was, and what was run with other settings is run again.
"""

import argparse
import dataclasses
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

from . import settings
from .data import prepare_data
from .finetuning import fine_tune
from .heads import fit_heads
from .jobs import Job, build_pool, run_jobs
from .pretraining import pretrain, train_teacher
from .settings import Budget
from .tables import report


def main(arguments: Sequence[str] | None = None, budget: Budget | None = None) -> None:
    """Prepare, run all seeds, print the tables and draw the curves.

    Args:
        arguments: Command line; `None` = the process's own.
        budget: How much of everything; `None` = the demo's.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/moving_shapes_full"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12], help="Weights, order of clips, masks.")
    parser.add_argument("--num_processes", type=int, default=settings.NUM_PROCESSES, help="Of one thread each.")
    budget = budget or Budget()
    for name in ("pretraining_steps", "head_steps", "finetuning_steps", "low_data_steps"):
        parser.add_argument(f"--{name}", type=int, default=getattr(budget, name), help="Default: %(default)s.")
    args = parser.parse_args(arguments)
    budget = dataclasses.replace(
        budget, **{name: value for name, value in vars(args).items() if name.endswith("steps")}
    )
    os.environ.update(settings.ENVIRONMENT)
    started = time.perf_counter()
    prepare_data(args.output_dir, budget)
    with build_pool(args.num_processes, args.output_dir / "finetune") as pool:
        jobs = plan_jobs(args.output_dir, args.seeds, budget)
        run_jobs(jobs, pool, args.num_processes, args.output_dir / "finetune")
    report(args.output_dir / "finetune", args.seeds, list(jobs))
    print(f"Time:    {(time.perf_counter() - started) / 60:.1f} minutes")


def plan_jobs(folder: Path, seeds: Sequence[int], budget: Budget) -> dict[str, Job]:
    """All runs by name, in the order they start in if nothing is missing: seed by seed."""
    jobs = {"teacher": Job(train_teacher, (folder, budget.teacher_steps))}
    for seed in seeds:
        for start in settings.STARTS:
            needs = frozenset({"teacher"} if start in settings.MASK_TYPES else ())
            jobs[f"{seed}/{start}"] = Job(pretrain, (folder, seed, start, budget), needs)
        for start in settings.STARTS:
            needs = frozenset({f"{seed}/{start}"})
            jobs[f"{seed}/{start}_heads"] = Job(fit_heads, (folder, seed, start, budget), needs)
        for task in settings.TASKS:
            for start in settings.STARTS:
                needs = frozenset({f"{seed}/{start}_heads"})
                for data in settings.SPLITS if start in settings.LOW_DATA_STARTS else ["full"]:
                    job = Job(fine_tune, (folder, seed, start, task, data, budget), needs)
                    jobs[f"{seed}/{start}_{task}_{data}"] = job
    return jobs


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main()
