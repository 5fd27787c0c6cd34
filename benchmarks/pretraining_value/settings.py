"""What is compared, on what, and how long: the settings that all runs share."""

from dataclasses import dataclass
from typing import Any

# One thread in each of two processes is faster at this size than two threads in one.
ENVIRONMENT = {
    "ACCELERATE_USE_CPU": "true",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
NUM_PROCESSES = 2
STARTS = {
    "scratch": "from scratch",
    "semantic": "UMT, semantic mask",
    "random": "UMT, random mask",
    "pixel": "pixel reconstruction (VideoMAE)",
}
MASK_TYPES = {"semantic": "attention", "random": "random"}
TASKS = {"appearance": 36, "motion": 4}
SPLITS = {"full": "train", "low": "train_low_data"}
LOW_DATA_STARTS = CORRUPTED_STARTS = ("scratch", "semantic")
LOW_DATA_RATIO = 0.1
CORRUPTIONS = ("noise", "blur", "brightness", "occlusion", "frame_drops")
SEVERITY = "medium"

STUDENT = {
    "image_size": 64,
    "patch_size": 16,
    "num_frames": 8,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 256,
}
INITIALIZER_RANGE = 0.12  # 1 / sqrt(width): at the usual 0.02 so narrow an encoder hardly moves in a short run
MASK_RATIO = 0.8
PRETRAINING = {
    "drop_path_rate": 0.0,
    "per_device_train_batch_size": 32,
    "learning_rate": 2e-3,
    "min_learning_rate": 1e-5,
    "scale_learning_rate": False,
    "warmup_steps": 30,
    "crop_scales": 1.0,
    "horizontal_flip_probability": 0.0,
    "dataloader_num_workers": 0,
    "logging_steps": 25,
    "save_steps": 100000,
    "report_to": "none",
    "mixed_precision": "bf16",
}
HEAD = {"batch_size": 256, "learning_rate": 1e-3, "weight_decay": 0.05}
FINETUNING = {
    "learning_rate": 5e-4,
    "layer_decay": 1.0,
    "warmup_epochs": 0,
    "warmup_steps": 20,
    "drop_path_rate": 0.0,
    "crop_scale": (1.0, 1.0),
    "crop_ratio": (1.0, 1.0),
    # A mirrored clip turns the other way round.
    "horizontal_flip_probability": 0.0,
    "sampling_strategy": "segments",
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 50,
    "num_clips": 1,
    "num_crops": 1,
    "dataloader_num_workers": 0,
    "eval_strategy": "steps",
    "eval_on_start": True,
    "logging_steps": 50,
    "save_strategy": "no",
    "report_to": "none",
    "bf16": True,  # as in pre-training: a process keeps one precision
    "use_cpu": True,
    "disable_tqdm": True,
}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much of everything; the defaults are the demo's."""

    num_clips: tuple[int, int, int] = (3000, 600, 900)
    teacher_steps: int = 1600
    pretraining_steps: int = 400
    head_steps: int = 800
    finetuning_steps: int = 100
    low_data_steps: int = 50
    num_curve_points: int = 5
    num_curve_clips: int = 120
    num_corrupted_clips: int = 300


def describe_pretraining(start: str, budget: Budget) -> dict[str, Any]:
    """All settings that the weights of a start depend on."""
    student = {**STUDENT, "initializer_range": INITIALIZER_RANGE}
    if start == "scratch":
        return {"student": student}
    settings = {"num_clips": budget.num_clips, "steps": budget.pretraining_steps, "mask_ratio": MASK_RATIO}
    return {"student": student, "pretraining": {**settings, **PRETRAINING}}


def describe_heads(start: str, budget: Budget) -> dict[str, Any]:
    """All settings that the heads on a frozen start depend on."""
    head = {**HEAD, "steps": budget.head_steps, "num_clips": budget.num_clips}
    return {**describe_pretraining(start, budget), "head": head}


def list_flags(flags: dict[str, Any]) -> list[str]:
    """Command line of a script."""
    arguments = []
    for name, value in flags.items():
        arguments += [f"--{name}", *(str(part) for part in (value if isinstance(value, tuple) else (value,)))]
    return arguments
