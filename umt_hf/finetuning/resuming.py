"""How a run of fine-tuning is laid out, and which checkpoints it may go on from."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from ..runs.disk import write_text
from ..runs.folder import FINETUNING_SHAPE_FILE, read_run_json

logger = logging.getLogger(__name__)

# By which a checkpoint of a version that recorded no shape may be off before it counts as one of another shape.
TOLERANCE = 0.01


@dataclass(frozen=True)
class FinetuningShape:
    """How the videos of a run are dealt out to its steps.

    Args:
        num_processes: Processes.
        batch_size: Videos that a process takes at a time.
        gradient_accumulation_steps: Batches of a process that make a step.
        num_rows: Rows of the training data.
        drop_last: Whether the last batch of an epoch is left out if it is not full.
    """

    num_processes: int
    batch_size: int
    gradient_accumulation_steps: int
    num_rows: int
    drop_last: bool

    @property
    def videos_per_step(self) -> int:
        """Videos of a step, all processes and accumulated batches together."""
        return self.batch_size * self.num_processes * self.gradient_accumulation_steps

    @property
    def batches_per_epoch(self) -> int:
        """Batches that a process takes in an epoch, as the loaders of Accelerate count them."""
        round_off = math.floor if self.drop_last else math.ceil
        return round_off(round_off(self.num_rows / self.batch_size) / self.num_processes)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch, as the `Trainer` counts them."""
        return max(math.ceil(self.batches_per_epoch / self.gradient_accumulation_steps), 1)

    def measure_epoch(self, step: int) -> float:
        """Passes over the data after a number of steps, as the `Trainer` counts them."""
        epochs, rest = divmod(step, self.steps_per_epoch)
        batches = max(self.batches_per_epoch, 1)
        return epochs + min(rest * self.gradient_accumulation_steps, batches) / batches

    def describe(self) -> str:
        """In words: videos of a step, and what makes them up."""
        processes = "process" if self.num_processes == 1 else "processes"
        parts = (
            f"{self.num_processes} {processes} x {self.batch_size} x {self.gradient_accumulation_steps} accumulated"
        )
        return f"{self.videos_per_step} videos a step ({parts})"

    def save(self, folder: Path) -> None:
        """Write it into the folder of a checkpoint."""
        write_text(folder / FINETUNING_SHAPE_FILE, json.dumps(asdict(self), indent=2) + "\n")


def read_shape(checkpoint: Path) -> FinetuningShape | None:
    """The shape of the run that wrote a checkpoint; `None` where it is from a version that did not record it.

    Raises:
        ValueError: If the file is damaged.
    """
    file = checkpoint / FINETUNING_SHAPE_FILE
    return FinetuningShape(**read_run_json(file)) if file.is_file() else None


def list_needed_files(checkpoint: Path, num_processes: int, has_moments: bool) -> list[str]:
    """Files that a run needs of a checkpoint, and without which the `Trainer` would go on in silence.

    Args:
        checkpoint: Folder of the checkpoint.
        num_processes: Of this run; processes that did not exist when it was written have no random states.
        has_moments: Whether optimizer and schedule are saved, each as one file.

    Raises:
        ValueError: If its record of the shape is damaged.
    """
    shape = read_shape(checkpoint)
    former = shape.num_processes if shape is not None else 0
    # A run of one process writes and reads no number.
    states = ["rng_state.pth"] if former == num_processes == 1 else []
    if former > 1 and num_processes > 1:
        states = [f"rng_state_{rank}.pth" for rank in range(min(former, num_processes))]
    return [*((OPTIMIZER_NAME, SCHEDULER_NAME) if has_moments else ()), *states]


def require_same_steps(checkpoint: Path, former: dict[str, Any], present: FinetuningShape) -> None:
    """Refuse a checkpoint whose steps are not those of this run: the `Trainer` finds its place by counting steps.

    Args:
        checkpoint: Folder of the checkpoint.
        former: Its `trainer_state.json`.
        present: Shape of this run.

    Raises:
        ValueError: If a step takes another number of videos, or an epoch has another number of steps.
    """
    shape, step = read_shape(checkpoint), former["global_step"]
    anew = f"or start a new run from its weights by `--model_name_or_path {checkpoint}` in another output_dir."
    if shape is None:
        epoch = former.get("epoch") or 0.0
        if epoch > 0 and abs(present.measure_epoch(step) - epoch) > TOLERANCE * epoch:
            raise ValueError(
                f"{checkpoint} has {step / epoch:.4g} steps an epoch, and this run {present.steps_per_epoch} with "
                f"{present.describe()}: it would end early or skip data. Give the data, processes, "
                f"`--per_device_train_batch_size` and `--gradient_accumulation_steps` that it was made with, {anew}"
            )
        return
    if shape.videos_per_step != present.videos_per_step:
        raise ValueError(
            f"{checkpoint} is from a run of {shape.describe()}, and this one takes {present.describe()}: it would end "
            "early or skip data. Give processes, `--per_device_train_batch_size` and `--gradient_accumulation_steps` "
            f"whose product is {shape.videos_per_step}, {anew}"
        )
    if shape.steps_per_epoch != present.steps_per_epoch:
        raise ValueError(
            f"{checkpoint} is from a run of {shape.steps_per_epoch} steps an epoch ({shape.num_rows} rows), and this "
            f"one has {present.steps_per_epoch} ({present.num_rows} rows): it would end early or skip data. Give the "
            f"data, the batch and `--dataloader_drop_last` that it was made with, {anew}"
        )
    if _list_parts(shape) != _list_parts(present):
        logger.info(
            "The steps take the same videos as before: %s -> %s. Dropout, and what is contrasted within a batch, "
            "are not those of a run that never stopped.",
            shape.describe(),
            present.describe(),
        )


def _list_parts(shape: FinetuningShape) -> Sequence[int]:
    return shape.num_processes, shape.batch_size, shape.gradient_accumulation_steps


def say_if_over(checkpoint: Path, step: int, max_steps: int, num_epochs: float, shape: FinetuningShape) -> None:
    """Say that nothing is left to train, where a run is resumed at its end or beyond it.

    Args:
        checkpoint: Folder of the checkpoint.
        step: At which it was written.
        max_steps: Of the arguments; not above 0 = the epochs count.
        num_epochs: Of the arguments.
        shape: Shape of this run.
    """
    total = max_steps if max_steps > 0 else math.ceil(num_epochs * shape.steps_per_epoch)
    if step >= total:
        logger.info("%s is at step %d, and the run has %d: nothing is left to train.", checkpoint, step, total)
