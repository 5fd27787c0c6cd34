"""Runs that `make faults` kills: their data, the models that they start from, and their command lines."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.e2e import sharded
from tests.e2e.runs import FINE_TUNING, PRETRAINING, save_student, save_teacher, to_flags
from umt_hf.moving_shapes.render import write_moving_shapes
from umt_hf.moving_shapes.tiny_bert import TextTowerArguments, write_text_tower

NUM_STEPS = 10
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "patch_size": 16,
    "image_size": 64,
}
SAVING = {"max_steps": NUM_STEPS, "save_steps": 1, "save_total_limit": 2}
# Of a save's files each rank has written some itself.
OF_A_RANK = ("random_states_", "rng_state", "__")


@dataclass(frozen=True)
class Case:
    """A kind of run that is killed.

    Args:
        stage: What runs.
        target: Its script, or the command "prepare".
        processes: Numbers of processes, in turn: of the first start, of the next one, ...
        sharding: "-", "DDP" or "FSDP2".
        build: Gives a command line for the prepared inputs, the folder of the run and the number of processes.
        kills: At least.
        moments: When it is killed, in turn.
        tolerance: Between its losses and those of the run that never stopped; 0 = to the last bit.
        form: What it leaves behind: "pretraining", "finetuning" or "shards".
    """

    stage: str
    target: str
    processes: tuple[int, ...]
    sharding: str
    build: Callable[["Inputs", Path, int], dict[str, Any]]
    kills: int
    moments: tuple[str, ...] = ("write", "rename", "write", "deletion", "random", "export")
    tolerance: float = 0.0
    form: str = "pretraining"

    @property
    def change(self) -> str:
        """Other numbers of processes at restarts, in words."""
        return " -> ".join(map(str, self.processes)) if len(self.processes) > 1 else "-"

    @property
    def name(self) -> str:
        """For folders and messages."""
        return f"{self.stage}, {'/'.join(map(str, self.processes))} process(es), {self.sharding}"

    def build_words(self, inputs: "Inputs", run: Path, num_processes: int, **changes: Any) -> list[str]:
        """Command line of a start, or of a restart."""
        fields = self.build(inputs, run, num_processes) | changes
        return [*map(str, fields.pop("", [])), *to_flags(**fields)]

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which a launcher asks for divided weights."""
        if self.sharding != "FSDP2":
            return {}
        return sharded.build_environment(sharded.LAUNCH / "fsdp2.yaml")


@dataclass
class Inputs:
    """Rendered videos and untrained models.

    Args:
        folder: Where they are.
    """

    folder: Path
    shapes: Path = field(init=False)
    teacher: Path = field(init=False)
    student: Path = field(init=False)
    text_tower: Path = field(init=False)
    text_tower_without_dropout: Path = field(init=False)

    def __post_init__(self) -> None:
        for name in ("shapes", "teacher", "student", "text_tower", "text_tower_without_dropout"):
            setattr(self, name, self.folder / name)

    def prepare(self) -> "Inputs":
        """Make them."""
        write_moving_shapes(self.shapes, num_train_clips=24, num_validation_clips=2, num_test_clips=2)
        rows = (self.shapes / "train.csv").read_text().splitlines()[:4]
        (self.folder / "few.csv").write_text("".join(f"{self.shapes}/{row}\n" for row in rows))
        save_teacher(self.teacher)
        save_student(self.student, hidden_size=32, intermediate_size=48, num_aligned_layers=2, teacher_hidden_size=12)
        write_text_tower(
            TextTowerArguments(
                data=str(self.shapes),
                output_dir=str(self.text_tower),
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
            )
        )
        shutil.copytree(self.text_tower, self.text_tower_without_dropout)
        config = json.loads((self.text_tower / "config.json").read_text())
        config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        (self.text_tower_without_dropout / "config.json").write_text(json.dumps(config))
        return self


def build_stage1(inputs: Inputs, run: Path, num_processes: int) -> dict[str, Any]:
    """Stage 1 on 4 videos a step, with a worker that reads where there is one process."""
    return {
        **PRETRAINING,
        **TINY,
        **SAVING,
        "train_data": inputs.shapes / "train.csv",
        "teacher_name_or_path": inputs.teacher,
        "per_device_train_batch_size": 4 // num_processes,
        "dataloader_num_workers": 2 - num_processes,
        "output_dir": run,
    }


def build_stage2(inputs: Inputs, run: Path, num_processes: int) -> dict[str, Any]:
    """Stage 2 on 4 videos a step, with all four losses and dropout."""
    return {
        **PRETRAINING,
        **SAVING,
        "fusion_layer": 1,
        "projection_dim": 16,
        "max_text_tokens": 12,
        "mask_ratio": 0.5,
        "train_corpora": inputs.shapes / "train_captions.json",
        "teacher_name_or_path": inputs.teacher,
        "vision_name_or_path": inputs.student,
        "text_name_or_path": inputs.text_tower,
        "per_device_train_batch_size": 4 // num_processes,
        "output_dir": run,
    }


def build_stage2_alike(inputs: Inputs, run: Path, num_processes: int) -> dict[str, Any]:
    """Stage 2 with what does not depend on the number of processes: alignment and contrast, without dropout."""
    return build_stage2(inputs, run, num_processes) | {
        "text_name_or_path": inputs.text_tower_without_dropout,
        "vtm_loss_weight": 0,
        "mlm_loss_weight": 0,
    }


def build_classification(inputs: Inputs, run: Path, num_processes: int) -> dict[str, Any]:
    """Fine-tuning of a classifier, with weights that are averaged."""
    return {
        **FINE_TUNING,
        **SAVING,
        "drop_path_rate": 0.1,
        "warmup_epochs": 0,
        "num_frames": 2,
        "train_data": inputs.shapes / "train.csv",
        "validation_data": inputs.folder / "few.csv",
        "model_name_or_path": inputs.student,
        "per_device_train_batch_size": 4 // num_processes,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "steps",
        "ema_decay": 0.5,
        "output_dir": run,
    }


def build_prepare(inputs: Inputs, run: Path, num_processes: int) -> dict[str, Any]:
    """Shards of 2 videos, written by this process, or with one process by two workers."""
    return {
        "": [inputs.shapes / "train.csv"],
        "out": run,
        "num-frames": 8,
        "videos-per-shard": 2,
        "num-workers": 0,
    }


def build_prepare_by_workers(inputs: Inputs, run: Path, num_processes: int) -> dict[str, Any]:
    """Shards that two worker processes write."""
    return build_prepare(inputs, run, num_processes) | {"num-workers": 2}


_OF_SHARDS = {"target": "prepare", "sharding": "-", "form": "shards"}
_OF_CLASSES = {"stage": "classification", "target": "finetuning.classification", "build": build_classification}
_OF_STAGE1 = {"stage": "stage 1", "target": "training.stage1", "build": build_stage1}
_OF_STAGE2 = {"stage": "stage 2", "target": "training.stage2", "build": build_stage2}
CASES = (
    Case(**_OF_STAGE1, processes=(1,), sharding="-", kills=10),
    Case(**_OF_STAGE1, processes=(2,), sharding="DDP", kills=8),
    Case(**_OF_STAGE1, processes=(2,), sharding="FSDP2", kills=6),
    Case(**_OF_STAGE1, processes=(2, 1), sharding="DDP", kills=6, tolerance=1e-6),
    Case(**_OF_STAGE2, processes=(1,), sharding="-", kills=8),
    Case(**_OF_STAGE2, processes=(2,), sharding="DDP", kills=6),
    Case(**_OF_STAGE2, processes=(2,), sharding="FSDP2", kills=4),
    Case(**_OF_STAGE2 | {"build": build_stage2_alike}, processes=(2, 1), sharding="DDP", kills=4, tolerance=1e-5),
    Case(**_OF_CLASSES, processes=(1,), sharding="-", kills=8, form="finetuning"),
    Case(**_OF_CLASSES, processes=(2,), sharding="DDP", kills=4, form="finetuning"),
    Case("prepare", build=build_prepare, processes=(1,), kills=5, moments=("write", "rename", "random"), **_OF_SHARDS),
    Case(
        "prepare, workers", build=build_prepare_by_workers, processes=(1,), kills=3, moments=("random",), **_OF_SHARDS
    ),
    Case("prepare", build=build_prepare, processes=(2,), kills=4, moments=("write", "rename", "random"), **_OF_SHARDS),
)
