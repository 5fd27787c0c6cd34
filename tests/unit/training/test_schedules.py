"""Learning rates of both loops at every step, against the values they had before they shared one schedule."""

import itertools
import json
from pathlib import Path

import pytest
from torch import nn

from umt_hf import UMTVideoConfig, UMTVideoForVideoClassification
from umt_hf.finetuning.trainer import (
    EncoderFinetuningArguments,
    EncoderFinetuningTrainer,
    FinetuningArguments,
    FinetuningTrainer,
)
from umt_hf.training.arguments import PretrainingArguments
from umt_hf.training.trainer import build_schedule

GOLDEN = Path(__file__).parents[2] / "fixtures" / "loops" / "rates.json"
KINDS = ("cosine_to_minimum", "cosine_above_minimum")
WARMUPS = ({"warmup_epochs": 0}, {"warmup_epochs": 1}, {"warmup_epochs": 2.5}, {"warmup_steps": 3})
PEAKS = (
    {},
    {"learning_rate": 1e-3, "min_learning_rate": 2e-4, "warmup_start_learning_rate": 1e-4},
    {"learning_rate": 1e-6, "min_learning_rate": 1e-4, "warmup_start_learning_rate": 1e-3},
)
SHARES = (0.0, 0.01, 0.2)


def name_case(*parts: object) -> str:
    return json.dumps(parts)


def compute_pretraining_rates() -> dict[str, list[float]]:
    """10 batches per epoch, 3 epochs."""
    rates = {}
    for kind, warmup, peak, is_scaled, accumulation in itertools.product(KINDS, WARMUPS, PEAKS, (False, True), (1, 4)):
        fields = {**warmup, **peak, "scale_learning_rate": is_scaled, "gradient_accumulation_steps": accumulation}
        args = PretrainingArguments(
            num_train_epochs=3, lr_scheduler_type=kind, per_device_train_batch_size=8, **fields
        )
        schedule = build_schedule(args, steps_per_epoch=10 / accumulation, num_processes=3, repeated_augmentation=2)
        steps = range(schedule.total_steps + 2)
        rates[name_case("pre-training", kind, fields)] = [schedule(step) for step in steps]
    return rates


def list_rates(trainer: FinetuningTrainer, num_steps: int) -> list[list[float]]:
    """Rates of all parameter groups at each step."""
    optimizer = trainer.create_optimizer()
    scheduler = trainer.create_scheduler(num_steps)
    rates = []
    for _ in range(num_steps + 1):
        rates.append(scheduler.get_last_lr())
        optimizer.step()
        scheduler.step()
    return rates


def compute_finetuning_rates(folder: Path) -> dict[str, list[list[float]]]:
    """23 videos by 4: 5 batches per epoch."""
    rates = {}
    options = {"output_dir": str(folder), "use_cpu": True, "report_to": "none", "per_device_train_batch_size": 4}
    common = {"train_dataset": list(range(23)), "evaluations": {}, "max_skipped_ratio": 0.1}
    for warmup, share, accumulation in itertools.product(WARMUPS, SHARES, (1, 2)):
        fields = {**warmup, "min_learning_rate_share": share, "gradient_accumulation_steps": accumulation}
        args = FinetuningArguments(**options, **fields)
        trainer = FinetuningTrainer(model=nn.Linear(2, 2), args=args, **common)
        rates[name_case("video-text", fields)] = list_rates(trainer, 15)
    config = UMTVideoConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16, num_labels=2
    )
    model = UMTVideoForVideoClassification(config)
    for warmup, peak, is_scaled, accumulation in itertools.product(WARMUPS, PEAKS, (False, True), (1, 2)):
        fields = {**warmup, **peak, "scale_learning_rate": is_scaled, "gradient_accumulation_steps": accumulation}
        args = EncoderFinetuningArguments(**options, **fields)
        trainer = EncoderFinetuningTrainer(model=model, args=args, layer_decay=0.5, repeated_augmentation=2, **common)
        rates[name_case("encoder", fields)] = list_rates(trainer, 12)
    return rates


@pytest.mark.parametrize("loop", ["pre-training", "fine-tuning"])
def test_rates_of_every_step(loop, tmp_path):
    rates = compute_pretraining_rates() if loop == "pre-training" else compute_finetuning_rates(tmp_path)
    golden = json.loads(GOLDEN.read_text())[loop]
    assert rates.keys() == golden.keys()
    for case, expected in golden.items():
        for step, (found, before) in enumerate(zip(rates[case], expected, strict=True)):
            assert found == pytest.approx(before, rel=1e-12, abs=0), (case, step)
