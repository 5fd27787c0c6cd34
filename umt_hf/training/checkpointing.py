"""Checkpoints that are complete or absent, resuming, and exported model folders.

A run's folder holds the final model, `checkpoint-<step>/` folders and `metrics.jsonl`. Each checkpoint is itself a
model folder that `from_pretrained` loads, with the state of the run in `training_state/`.
"""

import json
import logging
import os
import re
import shutil
import socket
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.processing_utils import ProcessorMixin
from transformers.video_processing_utils import BaseVideoProcessor

from ..hub_cards.sentence_transformers import write_sentence_transformers_files
from ..runs.disk import clear_leftovers, fill_folder, name_unfinished, put_folder, remove_folder, write_text
from ..runs.folder import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FOLDER,
    CONFIG_FILE,
    DELETED_SUFFIX,
    FINAL_FOLDER,
    RECIPE_FILE,
    REPLACED_SUFFIX,
    STATE_FOLDER,
    SUPERSEDED_SUFFIX,
    TRAINER_ARGUMENTS_FILE,
    UNFINISHED_SUFFIX,
    VERSIONS_FILE,
    WEIGHTS_INDEX_FILE,
    collect_versions,
    read_run_json,
)
from ..runs.mistakes import naming_full_disk
from .sharding import get_local_part

logger = logging.getLogger(__name__)

COMPILED_PART = "_orig_mod."  # what `torch.compile` puts into the names of a compiled module's weights
NAMED_TENSORS = 5
SECONDS_TO_APPEAR = 10.0
ARCHIVE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl")  # of what `torch.save` writes
SMALL_ARCHIVE = 1 << 20  # bytes up to which the sums of an archive's content are checked too
# Settings of a configuration that no weight depends on.
WEIGHTLESS_SETTINGS = frozenset({
    "_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "drop_path_rate",
    "_attn_implementation", "attn_implementation", "id2label", "label2id",
})  # fmt: skip


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: str | Path,
    step: int,
    save_model: Callable[[Path], None],
    limit: int | None,
    save_counters: Callable[[Path], None] | None = None,
) -> Path:
    """Write `checkpoint-<step>` under another name, and rename it when it is complete.

    Args:
        accelerator: Holds what is to be saved.
        output_dir: Folder of the run.
        step: Optimizer steps taken.
        save_model: Called in all processes with the folder the model is to be exported to.
        limit: Checkpoints kept; the oldest go first. `None` = all.
        save_counters: Called in the main process with the folder of the state.

    Returns:
        The checkpoint's folder.

    Raises:
        MachineError: If the disk is full.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    unfinished = name_unfinished(final)
    with naming_full_disk(final):
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        accelerator.wait_for_everyone()
        # Called by all: sharded weights are collected, and every process has a random state to save.
        save_model(unfinished)
        accelerator.save_state(str(unfinished / STATE_FOLDER))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if save_counters is not None:
                save_counters(unfinished / STATE_FOLDER)
            put_folder(unfinished, final)
    if accelerator.is_main_process:
        logger.info("Wrote %s.", final)
        remove_surplus(output_dir, limit, final)
    accelerator.wait_for_everyone()
    return final


def remove_surplus(output_dir: str | Path, limit: int | None, newest: Path) -> None:
    """Delete the oldest checkpoints of a run above a limit; the main process calls it.

    Args:
        output_dir: Folder of the run.
        limit: Checkpoints kept; `None` = all.
        newest: Stays, whatever its step.
    """
    if limit is not None:
        others = [path for path in list_checkpoints(output_dir) if path.resolve() != newest.resolve()]
        for old in others[: max(len(others) - (limit - 1), 0)]:
            remove_folder(old)


def list_checkpoints(output_dir: str | Path, state: str = STATE_FOLDER) -> list[Path]:
    """Complete checkpoints of a run, which are those that have their `state` and weights; oldest first."""
    named = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in named if is_complete(path, state)), key=read_step)


def read_step(checkpoint: Path) -> int:
    """Step in the name of a checkpoint."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def find_checkpoint(
    resume_from_checkpoint: str | None, output_dir: str | Path, state: str = STATE_FOLDER
) -> Path | None:
    """The checkpoint to resume from, if any.

    Args:
        resume_from_checkpoint: A folder; "auto" for the newest of the run, if there is one; `None` for a new run.
        output_dir: Folder of the run.
        state: File or folder that complete checkpoints have.

    Raises:
        FileNotFoundError: If the folder is not a checkpoint, or not a complete one.
        FileExistsError: If a run without `resume_from_checkpoint` would mix with an older one's checkpoints.
    """
    existing = list_checkpoints(output_dir, state)
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
    if path.name.endswith((UNFINISHED_SUFFIX, DELETED_SUFFIX, REPLACED_SUFFIX)):
        raise FileNotFoundError(f"{path} is not a complete checkpoint: a killed run has left it. Choose another one.")
    if not path.is_dir():
        names = ", ".join(found.name for found in existing) or "none"
        raise FileNotFoundError(
            f"{path}: there is no such folder; complete checkpoints in {output_dir}: {names}. Give one of them, or "
            "`auto` for the newest."
        )
    if not is_complete(path, state):
        missing = state if not (path / state).exists() else "weights"
        raise FileNotFoundError(
            f"{path} is not a complete checkpoint: it has no {missing}. Give another one, or `auto` for the newest."
        )
    return path


def choose_checkpoint(
    resume_from_checkpoint: str | None,
    output_dir: str | Path,
    state: str = STATE_FOLDER,
    list_needed: Callable[[Path], Sequence[str]] | None = None,
) -> Path | None:
    """The checkpoint that the main process finds, for all processes; called in all of them.

    Args:
        resume_from_checkpoint: As for `find_checkpoint`.
        output_dir: Folder of the run.
        state: File or folder that complete checkpoints have.
        list_needed: Names the files that a checkpoint must have, beyond `state` and weights.

    Raises:
        FileNotFoundError: In all processes, if it is not a checkpoint, or one of them does not see it.
        FileExistsError: In all processes, as by `find_checkpoint`.
        ValueError: In all processes, if a file of it is damaged or missing.
    """
    processes = PartialState()
    checkpoint = _ask_main(lambda: find_checkpoint(resume_from_checkpoint, output_dir, state))
    if checkpoint is None:
        return None
    # Main and others may be on different machines, and a network disk shows a new folder late.
    missing = [] if _appears(checkpoint, state) else [f"{processes.process_index} on {socket.gethostname()}"]
    missing = gather_object(missing)
    if missing:
        raise FileNotFoundError(
            f"{checkpoint}: process {missing[0]} does not see it as the main process does"
            f"{f' ({len(missing)} processes do not)' if len(missing) > 1 else ''}. Put output_dir on a disk that all "
            "machines share."
        )
    # Now, since without a common disk the files of the other processes are missing too.
    _ask_main(lambda: _require_intact(checkpoint, state, list_needed))
    return checkpoint


def _ask_main(function: Callable[[], Path | None]) -> Path | None:
    """What a function gives, or how it fails, in the main process; called in all of them."""
    answer: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            answer[0] = function()
        except (FileExistsError, FileNotFoundError, ValueError) as error:
            answer[1] = error
    broadcast_object_list(answer)
    found, error = answer
    if error is not None:
        raise error
    return found


def _require_intact(checkpoint: Path, state: str, list_needed: Callable[[Path], Sequence[str]] | None) -> None:
    """Refuse a checkpoint with a file that is damaged or missing, and name the newest one before it that is intact.

    Raises:
        ValueError: If there is such a file.
    """
    damage = _find_damage(checkpoint, list_needed)
    if damage is None:
        return
    older = []
    if re.fullmatch(r"checkpoint-\d+", checkpoint.name):
        older = [
            path for path in list_checkpoints(checkpoint.parent, state) if read_step(path) < read_step(checkpoint)
        ]
    intact = next((path for path in reversed(older) if _find_damage(path, list_needed) is None), None)
    if intact is None:
        cure = f"No older checkpoint of {checkpoint.parent} is intact: start anew in another output_dir."
    else:
        cure = f"Go on from an older one by `--resume_from_checkpoint {intact}`."
    raise ValueError(f"{damage} {cure}")


def _find_damage(checkpoint: Path, list_needed: Callable[[Path], Sequence[str]] | None) -> str | None:
    """What is damaged or missing in a checkpoint, as a sentence; `None` if nothing is. Large files are not read."""
    try:
        needed = [*_list_parts(checkpoint), *(list_needed(checkpoint) if list_needed is not None else ())]
    except ValueError as error:  # of a file that says what is needed
        return str(error)
    for name in needed:
        if not (checkpoint / name).exists():
            return f"{checkpoint} is damaged: it has no {name}."
    recipe = checkpoint / RECIPE_FILE
    if recipe.is_file() and not recipe.read_bytes().strip():
        return f"{recipe} is damaged: it is empty."
    for file in sorted(checkpoint.rglob("*")):
        if file.is_file() and file.name != TRAINER_ARGUMENTS_FILE and not _is_intact(file):
            return f"{file} is damaged: it was cut short, or its content is not what was written."
    return None


def _list_parts(checkpoint: Path) -> list[str]:
    """Files that belong to the weights of a checkpoint: their configuration, and each part of divided ones."""
    parts = [CONFIG_FILE] if next(checkpoint.glob("model*.safetensors"), None) else []
    parts += [ADAPTER_CONFIG_FILE] if next(checkpoint.glob("adapter_model*"), None) else []
    index = checkpoint / WEIGHTS_INDEX_FILE
    return parts + (sorted(set(read_run_json(index)["weight_map"].values())) if index.is_file() else [])


def _is_intact(file: Path) -> bool:
    """Whether a file of tensors has its full length, and a small one holds what was written."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt"):
                return True
        except SafetensorError:
            return False
    if file.suffix not in ARCHIVE_SUFFIXES:
        return True
    try:
        with zipfile.ZipFile(file) as archive:
            return file.stat().st_size > SMALL_ARCHIVE or archive.testzip() is None
    except (zipfile.BadZipFile, NotImplementedError):
        return False


def _appears(checkpoint: Path, state: str) -> bool:
    deadline = time.monotonic() + SECONDS_TO_APPEAR
    while not is_complete(checkpoint, state):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def set_aside_later(output_dir: str | Path, step: int, state: str = STATE_FOLDER) -> None:
    """Rename the checkpoints of a run that are later than the step it is resumed from; called in all processes.

    `auto` would otherwise go back to them, and a limit on the number of checkpoints would keep them, not the new ones.

    Args:
        output_dir: Folder of the run.
        step: Of the checkpoint that it is resumed from.
        state: File or folder that complete checkpoints have.
    """
    processes = PartialState()
    processes.wait_for_everyone()
    if processes.is_main_process:
        later = [path for path in list_checkpoints(output_dir, state) if read_step(path) > step]
        stamp = time.strftime("%Y%m%d-%H%M%S")
        # The last one first: `auto` takes none of the others for the newest of the run.
        for path in reversed(later):
            os.replace(path, path.with_name(f"{path.name}{SUPERSEDED_SUFFIX}-{stamp}"))
        if later:
            logger.warning(
                "The run goes on from step %d: %s got the ending %s-%s. Delete what you do not need.",
                step,
                ", ".join(path.name for path in later),
                SUPERSEDED_SUFFIX,
                stamp,
            )
    processes.wait_for_everyone()


def is_complete(checkpoint: Path, state: str = STATE_FOLDER) -> bool:
    """Whether a folder has the state of a run, and weights beside it or in it."""
    patterns = ("*.safetensors", "*/*.safetensors", "*_model*", "*/*_model*", "global_step*")
    return (checkpoint / state).exists() and any(next(checkpoint.glob(pattern), None) for pattern in patterns)


def remove_unfinished(output_dir: str | Path) -> None:
    """Delete what a killed run has left of checkpoints and models; the main process calls it before a run."""
    clear_leftovers(Path(output_dir), ("checkpoint-*", FINAL_FOLDER, ADAPTER_FOLDER))


def refuse_nonfinite_weights(model: nn.Module, accelerator: Accelerator, found_in: str) -> None:
    """Stop, in all processes, if a weight is NaN or infinite.

    Args:
        model: Each process may hold a part of it.
        accelerator: Of the run.
        found_in: Begins the message: where the weights are from.

    Raises:
        ValueError: With the names of the tensors.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    # Of one byte are quantised ones, whose values say nothing by themselves.
    numbers = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point() and tensor.element_size() > 1]
    bad = [name for name, tensor in numbers if not _is_finite(tensor)]
    # All stop together, also where the bad part is another's.
    total = accelerator.reduce(torch.tensor(len(bad), device=accelerator.device), reduction="sum")
    if int(total):
        names = ", ".join(bad[:NAMED_TENSORS]) or "in another process"
        more = f" and {len(bad) - NAMED_TENSORS} more" if len(bad) > NAMED_TENSORS else ""
        raise ValueError(f"{found_in}: weights are NaN or infinite ({names}{more}). Start from a folder without them.")


def _is_finite(tensor: torch.Tensor) -> bool:
    local = get_local_part(tensor)
    return local.is_meta or bool(torch.isfinite(local.detach()).all())


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
    with fill_folder(folder) as unfinished:
        exported.save_pretrained(unfinished, state_dict=take_own_names(state_dict, exported))
        require_own_weights(unfinished, exported)
        processor.save_pretrained(unfinished)
        write_sentence_transformers_files(unfinished)
        write_text(unfinished / RECIPE_FILE, recipe)
        write_text(unfinished / VERSIONS_FILE, json.dumps(collect_versions(), indent=2) + "\n")


def take_own_names(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights under a model's own names, without the parts that `torch.compile` puts into them.

    Raises:
        RuntimeError: If they are not the model's weights, each once.
    """
    renamed = {name.replace(COMPILED_PART, ""): tensor for name, tensor in state_dict.items()}
    own = {name.replace(COMPILED_PART, ""): weight for name, weight in model.state_dict(keep_vars=True).items()}
    if renamed.keys() != own.keys() or len(renamed) != len(state_dict):
        raise RuntimeError(
            f"The weights to be saved are not those of the {type(model).__name__}, first: "
            f"{', '.join(sorted(renamed.keys() ^ own.keys())[:5])}. Nothing was written; report this as a bug."
        )
    # Of weights that are tied, sharded training collects a copy for each name.
    first = {id(weight): name for name, weight in reversed(own.items())}
    return {name: renamed[first[id(weight)]] for name, weight in own.items()}


def require_own_weights(folder: Path, model: PreTrainedModel | nn.Module) -> None:
    """Make sure that the safetensors files of a folder hold the weights of a model, by name and shape.

    Args:
        folder: As `save_pretrained` wrote it.
        model: What was saved; weights that share memory are stored once.

    Raises:
        RuntimeError: If a weight is missing, unknown or of another shape; the first of them are named.
    """
    lost, wrong = find_other_weights(folder, model)
    if lost or wrong:
        raise RuntimeError(
            f"{folder} does not hold the weights of the {type(model).__name__}: "
            f"{len(lost)} missing and {len(wrong)} unknown or of another shape, first "
            f"{', '.join([*lost, *wrong][:5])}. Do not use it; report this as a bug."
        )


def find_other_weights(folder: Path, model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of a model's weights that the safetensors files of a folder lack, and of stored ones that do not fit it.

    Args:
        folder: As `save_pretrained` wrote it; headers of files alone are read.
        model: Weights that share memory are stored once.
    """
    weights = model.state_dict(keep_vars=True)
    needed = {name.replace(COMPILED_PART, ""): tensor for name, tensor in weights.items()}
    stored = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "pt") as content:
            stored |= {name: tuple(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118
    found = {id(needed[name]) for name in stored if name in needed}
    lost = [name for name, tensor in needed.items() if id(tensor) not in found]
    # ZeRO-3 leaves an empty tensor where it has divided one.
    shapes = {name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in needed.items()}
    wrong = [name for name, shape in stored.items() if shape != shapes.get(name)]
    return lost, wrong


def require_same_model(checkpoint: Path, model: nn.Module) -> None:
    """Refuse a checkpoint of a model with other weights, before anything is loaded from it.

    Args:
        checkpoint: Folder of a model with the state of a run.
        model: The run's, as it was built.

    Raises:
        ValueError: With the settings that differ.
    """
    # Sharded training may keep its weights in the state alone.
    if isinstance(model, PeftModel) or not list(checkpoint.glob("model*.safetensors")):
        _require_same_adapters(checkpoint, model)
        return
    if not any(find_other_weights(checkpoint, model)):
        return
    config: Any = getattr(model, "config", None)
    file = checkpoint / CONFIG_FILE
    former = _flatten(read_run_json(file)) if file.is_file() else {}
    present = _flatten(json.loads(json.dumps(config.to_dict(), default=str))) if config is not None else {}
    differing = [
        f"{name} {former[name]} there, {value} here"
        for name, value in present.items()
        if name in former and former[name] != value and name.split(".")[-1] not in WEIGHTLESS_SETTINGS
    ]
    raise ValueError(_describe_other_model(checkpoint, differing))


def _require_same_adapters(checkpoint: Path, model: nn.Module) -> None:
    file = checkpoint / ADAPTER_CONFIG_FILE
    there, here = ("adapters" if some else "all weights" for some in (file.is_file(), isinstance(model, PeftModel)))
    differing = [] if there == here else [f"trained are {there} there, {here} here"]
    if there == here == "adapters":
        present: Any = model.active_peft_config  # pyrefly: ignore[missing-attribute]  it has adapters
        former, present = read_run_json(file), present.to_dict()
        names = {"r": "lora_rank", "use_dora": "dora"}
        differing = [
            f"{flag} {former[name]} there, {present[name]} here"
            for name, flag in names.items()
            if name in former and former[name] != present[name]
        ]
    if differing:
        raise ValueError(_describe_other_model(checkpoint, differing))


def _describe_other_model(checkpoint: Path, differing: list[str]) -> str:
    return (
        f"{checkpoint} is of another model than this run's ({'; '.join(differing) or 'other weights'}). Give the "
        "settings that it was made with, or start a new run in another output_dir."
    )


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted names, those of nested configurations included."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        is_config = isinstance(value, dict) and name.endswith("_config")
        flat |= _flatten(value, f"{prefix}{name}.") if is_config else {f"{prefix}{name}": value}
    return flat
