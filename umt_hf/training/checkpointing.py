"""Checkpoints that are complete or absent, resuming, and exported model folders.

A run's folder holds the final model, `checkpoint-<step>/` folders and `metrics.jsonl`. Each checkpoint is itself a
model folder that `from_pretrained` loads, with the state of the run in `training_state/`.
"""

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.processing_utils import ProcessorMixin
from transformers.video_processing_utils import BaseVideoProcessor

from ..runs.folder import RECIPE_FILE, STATE_FOLDER, UNFINISHED_SUFFIX, VERSIONS_FILE, collect_versions

logger = logging.getLogger(__name__)

COMPILED_PART = "_orig_mod."  # what `torch.compile` puts into the names of a compiled module's weights


def save_checkpoint(
    accelerator: Accelerator, output_dir: str | Path, step: int, save_model: Any, limit: int | None
) -> Path:
    """Write `checkpoint-<step>` under another name, and rename it when it is complete.

    Args:
        accelerator: Holds what is to be saved.
        output_dir: Folder of the run.
        step: Optimizer steps taken.
        save_model: Called in all processes with the folder the model is to be exported to.
        limit: Checkpoints kept; the oldest go first. `None` = all.

    Returns:
        The checkpoint's folder.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    unfinished = final.with_name(final.name + UNFINISHED_SUFFIX)
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    accelerator.wait_for_everyone()
    # Called by all: sharded weights are collected, and every process has a random state to save.
    save_model(unfinished)
    accelerator.save_state(str(unfinished / STATE_FOLDER))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        # A rename is atomic: a run that is killed here leaves no half-written folder of this name.
        shutil.rmtree(final, ignore_errors=True)
        os.replace(unfinished, final)
        if limit is not None:
            for old in list_checkpoints(output_dir)[:-limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def list_checkpoints(output_dir: str | Path, state: str = STATE_FOLDER) -> list[Path]:
    """Complete checkpoints of a run, which are those that have their `state`; oldest first."""
    found = [
        (int(match[1]), path)
        for path in Path(output_dir).glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / state).exists()
    ]
    return [path for _, path in sorted(found)]


def find_checkpoint(resume_from_checkpoint: str | None, output_dir: str | Path) -> Path | None:
    """The checkpoint to resume from, if any.

    Args:
        resume_from_checkpoint: A folder; "auto" for the newest of the run, if there is one; `None` for a new run.
        output_dir: Folder of the run.

    Raises:
        FileNotFoundError: If the folder is not a checkpoint.
        FileExistsError: If a run without `resume_from_checkpoint` would mix with an older one's checkpoints.
    """
    existing = list_checkpoints(output_dir)
    if resume_from_checkpoint is None:
        if existing:
            raise FileExistsError(
                f"{output_dir} holds checkpoints of an earlier run ({existing[-1].name}). Add "
                "`--resume_from_checkpoint auto` to go on with it, or choose another output_dir."
            )
        return None
    if resume_from_checkpoint == "auto":
        return existing[-1] if existing else None
    path = Path(resume_from_checkpoint)
    if not (path / STATE_FOLDER).is_dir():
        raise FileNotFoundError(f"{path} is not a checkpoint: it has no {STATE_FOLDER} folder.")
    return path


def remove_unfinished(output_dir: str | Path) -> None:
    """Delete unfinished checkpoints of a run that was killed."""
    for path in Path(output_dir).glob(f"checkpoint-*{UNFINISHED_SUFFIX}"):
        logger.warning("Removing %s, an unfinished checkpoint of a run that was killed.", path)
        shutil.rmtree(path)


def export_run(
    accelerator: Accelerator,
    model: nn.Module,
    processor: ProcessorMixin | BaseVideoProcessor,
    recipe: str,
    folder: Path,
) -> None:
    """Write a model with its processor, the run's resolved recipe and versions; called in all processes.

    Args:
        accelerator: Collects the weights where they are sharded.
        model: As the accelerator has prepared it.
        processor: Of the model.
        recipe: From `dump_config`.
        folder: For `from_pretrained`.

    Raises:
        RuntimeError: If what is written is not the model's weights.
    """
    # All processes take part in collecting shards; one of them writes.
    state_dict = accelerator.get_state_dict(model)
    if not accelerator.is_main_process:
        return
    exported: Any = accelerator.unwrap_model(model, keep_torch_compile=False)
    exported.save_pretrained(folder, state_dict=take_own_names(state_dict, exported))
    require_own_weights(folder, exported)
    processor.save_pretrained(folder)
    (folder / RECIPE_FILE).write_text(recipe)
    (folder / VERSIONS_FILE).write_text(json.dumps(collect_versions(), indent=2) + "\n")


def take_own_names(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights under a model's own names, without the parts that `torch.compile` puts into them.

    Raises:
        RuntimeError: If they are not the model's weights, each once.
    """
    renamed = {name.replace(COMPILED_PART, ""): tensor for name, tensor in state_dict.items()}
    own = {name.replace(COMPILED_PART, "") for name in model.state_dict()}
    if renamed.keys() != own or len(renamed) != len(state_dict):
        raise RuntimeError(
            f"The weights to be saved are not those of the {type(model).__name__}, first: "
            f"{', '.join(sorted(renamed.keys() ^ own)[:5])}. Nothing was written; report this as a bug."
        )
    return renamed


def require_own_weights(folder: Path, model: PreTrainedModel | nn.Module) -> None:
    """Make sure that the safetensors files of a folder hold the weights of a model, by name and shape.

    Args:
        folder: As `save_pretrained` wrote it.
        model: What was saved; weights that share memory are stored once.

    Raises:
        RuntimeError: If a weight is missing, unknown or of another shape; the first of them are named.
    """
    weights = model.state_dict(keep_vars=True)
    needed = {name.replace(COMPILED_PART, ""): tensor for name, tensor in weights.items()}
    stored = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "pt") as content:
            stored |= {name: tuple(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118
    found = {id(needed[name]) for name in stored if name in needed}
    lost = [name for name, tensor in needed.items() if id(tensor) not in found]
    wrong = [name for name, shape in stored.items() if name not in needed or shape != tuple(needed[name].shape)]
    if lost or wrong:
        raise RuntimeError(
            f"{folder} does not hold the weights of the {type(model).__name__}: "
            f"{len(lost)} missing and {len(wrong)} unknown or of another shape, first "
            f"{', '.join([*lost, *wrong][:5])}. Do not use it; report this as a bug."
        )
