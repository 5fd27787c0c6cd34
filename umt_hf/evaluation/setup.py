"""What an evaluation starts from: model and processor with the settings of the run."""

import logging
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from ..data.splits import has_splits, require_split
from ..hub_cards.released_names import convert_named
from ..inference.engine import InferenceRun, inference_run
from ..inference.loading import keep_tokens, load_complete_model, load_video_text_processor
from ..processing.processing_umt_video_text import UMTVideoTextProcessor
from ..runs.arguments import EvaluatedModelArguments, EvaluationDataArguments, TimedWorkerArguments
from ..runs.config import flatten_recipe
from ..runs.folder import RECIPE_FILE
from ..runs.mistakes import read_rank

logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=PreTrainedModel)


class NamesData(Protocol):
    """Arguments of any task that name its data."""

    data: Any


def require_names(model: EvaluatedModelArguments, data: NamesData) -> tuple[str, str]:
    """Names of model and data; a released checkpoint is converted where the arguments ask for it.

    Raises:
        OSError: If it cannot be downloaded.
        ValueError: If one of them is not given, or the data has no splits and another than the default is asked for.
    """
    for name, value in (("model_name_or_path", model.model_name_or_path), ("data", data.data)):
        if value is None:
            raise ValueError(f"Set {name}.")
    # Key frames of detection are files, whose script has no such flag.
    require_split(str(data.data), getattr(data, "split", None), "test")
    convert_named(model)
    return str(model.model_name_or_path), str(data.data)


def load_model_and_processor(
    model_class: type[ModelT], model: EvaluatedModelArguments, data: EvaluationDataArguments
) -> tuple[ModelT, UMTVideoTextProcessor]:
    """The model with all its weights, and its processor of videos and texts with the settings of the run.

    Raises:
        ValueError: If model or data are not named, or the folder lacks weights.
    """
    name, _ = require_names(model, data)
    # A number of rounded weights would be another one, whatever the weights are stored in.
    loaded = load_complete_model(model_class, name, attn_implementation=model.attn_implementation, dtype=torch.float32)
    keep_tokens(loaded, model)
    processor = load_video_text_processor(name)
    override_settings(processor.video_processor, data, ("num_frames", "first_seconds", "decoder"))
    if data.max_text_tokens is not None:
        processor.tokenizer.model_max_length = data.max_text_tokens
    return loaded, processor


def say_tested(model_args: EvaluatedModelArguments, data: NamesData, described: str) -> None:
    """Say in one line what is tested, and warn if the model was trained on it, as its `run.yaml` may tell.

    Args:
        model_args: Name the model.
        data: Names the data.
        described: What was found, in words.
    """
    if read_rank() > 0:
        return
    split = getattr(data, "split", None) if has_splits(str(data.data)) else None
    logger.info("%s%s: %s.", data.data, f", split {split}" if split else "", described)
    recipe = Path(str(model_args.model_name_or_path), RECIPE_FILE)
    if not recipe.is_file():
        return
    run = flatten_recipe(recipe.read_text(encoding="utf-8-sig"))
    corpora = run.get("train_corpora") or []
    splits = [*(run.get("train_splits") or ["train"]), *["train"] * len(corpora)]
    trained = [(run.get("train_data"), run.get("train_split", "train")), *zip(corpora, splits, strict=False)]
    for source, trained_split in trained:
        # Of data without splits all is read, whatever the default says.
        if source and os.path.realpath(source) == os.path.realpath(str(data.data)) and split in (None, trained_split):
            logger.warning(
                "%s was trained on %s%s, as %s says: these figures say nothing of new videos.",
                model_args.model_name_or_path,
                source,
                f", split {split}" if split else "",
                recipe,
            )


def override_settings(processor: Any, arguments: Any, names: tuple[str, ...]) -> None:
    """Set those settings of a processor that the run's arguments give."""
    for name in names:
        if (value := getattr(arguments, name)) is not None:
            setattr(processor, name, value)


def measured_run(accelerator: Accelerator, data: TimedWorkerArguments) -> AbstractContextManager[InferenceRun]:
    """What a test computes runs in this: without gradients, with the run's time-out, and a line on where time went."""
    say = logger.info if accelerator.is_main_process else None
    return inference_run(say, data.dataloader_timeout_seconds)
