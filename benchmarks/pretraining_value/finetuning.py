"""A start and its fitted head, trained on; accuracy on the way and on the test clips."""

from pathlib import Path

import torch

from umt_hf.data.sources import load_videos
from umt_hf.finetuning import classification
from umt_hf.runs.config import parse_config

from . import settings
from .heads import replace_head
from .jobs import finish_run, measure, start_run
from .settings import Budget, describe_heads, list_flags


def fine_tune(folder: Path, seed: int, start: str, task: str, data: str, budget: Budget) -> None:
    """Train a start with its fitted head: accuracy on a fixed held-out subset as it goes, then on the test clips.

    Source: Kumar et al., "Fine-Tuning can Distort Pretrained Features", ICLR 2022 (the head first, then everything).
    """
    output = folder / "finetune" / f"seed_{seed}" / f"{start}_{task}_{data}"
    max_steps = budget.finetuning_steps if data == "full" else budget.low_data_steps
    eval_steps = max(max_steps // budget.num_curve_points, 1)
    own = {"max_steps": max_steps, "eval_steps": eval_steps, **settings.FINETUNING}
    clips = {"curve": budget.num_curve_clips, "corrupted": budget.num_corrupted_clips}
    if (result := start_run(output, **describe_heads(start, budget), finetuning=own, clips=clips)) is None:
        return
    frames = folder / "finetune" / "frames"
    flags = {
        "model_name_or_path": output.parent / start,
        "train_data": frames / f"{settings.SPLITS[data]}_{task}.csv",
        "validation_data": frames / f"curve_{task}.csv",
        "test_data": frames / f"test_{task}.csv",
        "output_dir": output,
        "num_classes": settings.TASKS[task],
        "seed": seed,
        **own,
    }
    parsed = parse_config(classification.SECTIONS, list_flags(flags))
    trainer = classification.build_classification_trainer(*parsed)
    replace_head(trainer.model, torch.load(output.parent / f"{start}_heads" / f"{task}_{data}.pt"))
    with measure(result):
        trainer.train()
    result["curve"] = [
        (line["step"], line["eval_top1_accuracy"])
        for line in trainer.state.log_history
        if "eval_top1_accuracy" in line
    ]
    result["test"] = trainer.evaluate(metric_key_prefix="test")["test_top1_accuracy"]
    if data == "full" and start in settings.CORRUPTED_STARTS:
        names = {"intact": "test_intact"} | {name: f"test_{name}_{settings.SEVERITY}" for name in settings.CORRUPTIONS}
        result["corrupted"] = {}
        for name, split in names.items():
            table = load_videos(str(frames / f"{split}_{task}.csv"))
            test = classification.build_accuracy_test(table, trainer.processing_class, parsed[1], parsed[4])
            result["corrupted"][name] = test(trainer.model, trainer.accelerator)["top1_accuracy"]
    finish_run(output, result)
