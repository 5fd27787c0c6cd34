"""A short run of stage 1 in a separate process, and its loss on held-out clips against the float32 teacher."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from benchmarks.common import run_in_new_process
from umt_hf.modeling.modeling_umt_video import UMTVideoForPreTraining
from umt_hf.training import stage1
from umt_hf.training.alignment import load_teacher
from umt_hf.training.arguments import (
    DataArguments,
    PretrainingArguments,
    PretrainingAugmentationArguments,
    TeacherArguments,
)

FLOATS = {"float32": "no", "bfloat16": "bf16"}


@dataclass(frozen=True)
class TrainingJob:
    """What to train.

    Args:
        folder: Of the demo, with `data` and `teacher`.
        precision: Of the run ("float32" or "bfloat16"), or of its teacher beside a student in float32.
        seed: Of weights, order, masks.
        steps: Optimizer steps.
        batch_size: Clips in a step.
        output_dir: Folder of the run.
    """

    folder: str
    precision: str
    seed: int
    steps: int
    batch_size: int
    output_dir: str


def measure_loss(job: TrainingJob) -> float:
    """Train in a new process and give the held-out loss.

    Raises:
        RuntimeError: If the process fails.
    """
    return run_in_new_process("benchmarks.teacher_precision.training", asdict(job))


def run_job(job: TrainingJob) -> float:
    """Train in this process and give the held-out loss."""
    folder = Path(job.folder)
    flags = {
        "config": "stage1_moving_shapes",
        "train_data": folder / "data" / "train.csv",
        "teacher_name_or_path": folder / "teacher",
        "output_dir": job.output_dir,
        "max_steps": job.steps,
        "warmup_steps": job.steps // 10,
        "save_steps": job.steps,
        "eval_steps": -1,
        "seed": job.seed,
        "per_device_train_batch_size": job.batch_size,
        "dataloader_num_workers": 1,
        "mixed_precision": FLOATS.get(job.precision, "no"),
        "report_to": "none",
        "disable_tqdm": True,
    }
    if job.precision not in FLOATS:
        flags["teacher_quantization"] = job.precision
    stage1.main([text for name, value in flags.items() for text in (f"--{name}", str(value))])
    return measure_held_out(folder, Path(job.output_dir))


def measure_held_out(folder: Path, student: Path) -> float:
    """Loss of a student on the demo's held-out clips against the float32 teacher, with masks fixed by row."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    model = UMTVideoForPreTraining.from_pretrained(student).eval()
    config = model.config
    teacher = load_teacher(
        TeacherArguments(
            teacher_name_or_path=str(folder / "teacher"),
            num_aligned_layers=config.num_aligned_layers,
            alignment_interval=config.alignment_interval,
            alignment_norm=config.alignment_norm,
        ),
        "sdpa",
        accelerator,
    )
    data = DataArguments(
        train_data=str(folder / "data" / "train.csv"),
        validation_data=str(folder / "data" / "validation.csv"),
        dataloader_num_workers=0,
    )
    training = PretrainingArguments(output_dir=str(student), per_device_train_batch_size=32, disable_tqdm=True)
    stage = stage1.Stage1(
        model, teacher, data, PretrainingAugmentationArguments(), training, stage1.load_tables(data), {}
    )
    with torch.no_grad():
        return stage.evaluate(accelerator)["eval_loss"]


if __name__ == "__main__":
    print(json.dumps(run_job(TrainingJob(**json.loads(sys.argv[1])))))
