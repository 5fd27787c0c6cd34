"""What would end a run after minutes of loading is looked for before: folders to write, trackers to import."""

import dataclasses
import importlib.util
import math
import tempfile
from argparse import ArgumentTypeError
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .disk import LOCK_FILE, hold_lock
from .mistakes import read_rank

# Tracker, as Accelerate and Transformers call it -> packages, any of which it needs.
TRACKER_PACKAGES = {
    "aim": ("aim",),
    "clearml": ("clearml",),
    "comet_ml": ("comet_ml",),
    "dvclive": ("dvclive",),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
ALL_OR_NONE = ("all", "none")
# Ranges of numbers, by the names of their flags; `(` and `)` leave the bound itself out.
SHARE, SIZE, POSITIVE, NOT_NEGATIVE = "[0, 1]", "[1, inf)", "(0, inf)", "[0, inf)"
RANGES = {
    "adam_beta1": "[0, 1)",
    "adam_beta2": "[0, 1)",
    "adam_epsilon": POSITIVE,
    "alignment_interval": POSITIVE,
    "crop_scale": "(0, 1]",
    "crop_scales": "(0, 1]",
    "dataloader_num_workers": NOT_NEGATIVE,
    "ddp_timeout_seconds": SIZE,
    "drop_path_rate": "[0, 1)",
    "eval_steps": "[-1, inf)",
    "first_seconds": POSITIVE,
    "frame_span": SIZE,
    "frame_stride": SIZE,
    "gradient_accumulation_steps": SIZE,
    "hidden_size": SIZE,
    "horizontal_flip_probability": SHARE,
    "image_mask_ratio": "[0, 1)",
    "image_size": SIZE,
    "intermediate_size": SIZE,
    "layer_decay": "(0, 1]",
    "learning_rate": NOT_NEGATIVE,
    "lora_rank": SIZE,
    "mask_ratio": "[0, 1)",
    "max_answer_tokens": SIZE,
    "max_eval_samples": SIZE,
    "max_grad_norm": NOT_NEGATIVE,
    "max_skipped_ratio": SHARE,
    "max_text_tokens": SIZE,
    "min_learning_rate": NOT_NEGATIVE,
    "min_learning_rate_share": SHARE,
    "mlm_loss_weight": NOT_NEGATIVE,
    "mlm_probability": "(0, 1)",
    "num_aligned_layers": SIZE,
    "num_attention_heads": SIZE,
    "num_clips": SIZE,
    "num_crops": SIZE,
    "num_frames": SIZE,
    "num_hidden_layers": SIZE,
    "num_train_epochs": NOT_NEGATIVE,
    "patch_size": SIZE,
    "preemption_exit_code": "[1, 255]",
    "projection_dim": SIZE,
    "repeated_augmentation": SIZE,
    "rerank_top_k": NOT_NEGATIVE,
    "seed": NOT_NEGATIVE,
    "shuffle_buffer_size": SIZE,
    "teacher_image_size": SIZE,
    "top_k": SIZE,
    "uta_loss_weight": NOT_NEGATIVE,
    "vtc_loss_weight": NOT_NEGATIVE,
    "vtm_loss_weight": NOT_NEGATIVE,
    "warmup_epochs": NOT_NEGATIVE,
    "warmup_start_learning_rate": NOT_NEGATIVE,
    "warmup_steps": "[-1, inf)",
    "weight_decay": NOT_NEGATIVE,
}

# Flags of files, folders and their like; an empty one most often comes of a variable of the shell that is not set.
PLACES = frozenset({
    "output_dir", "resume_from_checkpoint", "model_name_or_path", "teacher_name_or_path", "vision_name_or_path",
    "text_name_or_path", "train_data", "validation_data", "test_data", "data", "train_corpora", "data_root",
    "data_roots", "validation_root", "class_names", "detector_boxes", "ground_truth", "excluded", "label_map",
    "answers", "cache_dir", "logging_dir",
})  # fmt: skip


def check_before_start(sections: Iterable[Any]) -> None:
    """Look at a run's arguments before anything is loaded.

    Raises:
        ValueError: If a number is out of its range, the name of a file or folder empty, or a tracker unknown or not
            installed.
        OSError: If the output folder cannot be written.
    """
    sections = list(sections)
    refuse_numbers_out_of_range(sections)
    refuse_empty_places(sections)
    choose_output_dir(sections)
    for section in sections:
        trackers = getattr(section, "report_to", None) or []
        for tracker in [trackers] if isinstance(trackers, str) else trackers:
            require_tracker(tracker)
        if getattr(section, "output_dir", None) and read_rank() == 0:
            require_writable(Path(section.output_dir))


def refuse_numbers_out_of_range(sections: Iterable[Any]) -> None:
    """Refuse numbers that nobody can mean: NaN and infinity, and those out of the range of their flag.

    Raises:
        ValueError: Names flag, range and value.
    """
    for section in sections:
        for own in dataclasses.fields(section):
            value = getattr(section, own.name, None)
            for number in value if isinstance(value, list) else [value]:
                if not isinstance(number, int | float) or isinstance(number, bool):
                    continue
                if not math.isfinite(number):
                    raise ValueError(f"{own.name} must be a finite number, got {number}.")
                if (bounds := RANGES.get(own.name)) is not None and not _is_within(number, bounds):
                    raise ValueError(f"{own.name} must be {_describe_range(bounds)}, got {number}.")
                # Negative ones would all mean "by epochs", and none at all a model without training.
                if own.name == "max_steps" and number < 1 and number != -1:
                    raise ValueError(f"max_steps must be at least 1, or -1 for a length in epochs, got {number}.")


def refuse_empty_places(sections: Iterable[Any]) -> None:
    """Refuse an empty name of a file or folder, which would be the current folder.

    Raises:
        ValueError: Names the flag.
    """
    for section in sections:
        for own in dataclasses.fields(section):
            value = getattr(section, own.name, None)
            words = value if isinstance(value, list) else [value]
            if own.name in PLACES and any(isinstance(word, str) and not word.strip() for word in words):
                raise ValueError(f"--{own.name} is empty: give it a name. (Is a variable of the shell not set?)")


def name_folder(word: str) -> Path:
    """A folder as a command line names it, for a parser that has no sections.

    Raises:
        ArgumentTypeError: If the name is empty.
    """
    if not word.strip():
        raise ArgumentTypeError("it is empty: give it a name. (Is a variable of the shell not set?)")
    return Path(word)


def _is_within(number: float, bounds: str) -> bool:
    low, high = map(float, bounds[1:-1].split(","))
    is_above = number >= low if bounds[0] == "[" else number > low
    return is_above and (number <= high if bounds[-1] == "]" else number < high)


def _describe_range(bounds: str) -> str:
    if not bounds.endswith("inf)"):
        return f"in {bounds}"
    low = bounds[1:].split(",")[0]
    return f"at least {low}" if bounds[0] == "[" else f"above {low}"


def choose_output_dir(sections: Iterable[Any]) -> None:
    """Let an evaluation's report go to a folder of its model, unless a folder is given."""
    sections = list(sections)
    model = next((found for section in sections if (found := getattr(section, "model_name_or_path", None))), None)
    for section in sections:
        # Without a model the script says so.
        if model is not None and hasattr(section, "choose_output_dir"):
            section.choose_output_dir(str(model))


@contextmanager
def reserve_output(sections: Iterable[Any]) -> Generator[None]:
    """Keep other runs out of a training run's folder while this one lasts; the main process does.

    Raises:
        BlockingIOError: If another run writes there.
    """
    # Evaluations write complete files at their end, and need no lock.
    folder = next((section.output_dir for section in sections if hasattr(section, "resume_from_checkpoint")), None)
    if folder is None or read_rank() > 0:
        yield
        return
    with hold_lock(Path(folder) / LOCK_FILE, f"output_dir={folder}"):
        yield


def require_tracker(name: str) -> None:
    """Refuse a tracker without which a run would go on untracked.

    Raises:
        ValueError: If it is unknown or not installed.
    """
    if name in ALL_OR_NONE:
        return
    packages = TRACKER_PACKAGES.get(name)
    if packages is None:
        raise ValueError(f"report_to={name} is not a tracker; choose one of {', '.join(TRACKER_PACKAGES)}, or none.")
    if not any(importlib.util.find_spec(package) for package in packages):
        raise ValueError(f"report_to={name} needs a package: run `pip install {packages[0]}`, or report to none.")


def require_writable(folder: Path) -> None:
    """Refuse an output folder that cannot be made or written; leaves nothing behind.

    Raises:
        OSError: Names it, and the reason.
    """
    try:
        if folder.exists():
            with tempfile.TemporaryFile(dir=folder):
                return
        first = next(path for path in (*reversed(folder.absolute().parents), folder.absolute()) if not path.exists())
        first.mkdir()
        first.rmdir()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OSError(f"output_dir={folder} cannot be written: {reason}. Choose another folder.") from error
