"""What the fine-tuning scripts share: clips, the `Trainer`, adapters, saving.

Source: Li et al., "Unmasked Teacher", ICCV 2023, section 4, and the published fine-tuning settings.
"""

import copy
import dataclasses
import functools
import json
import logging
import math
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..data.annotations import name_video
from ..data.in_flight import noted
from ..data.lists.fingerprints import Fingerprint, fingerprint_rows
from ..data.loaders import WatchedReads
from ..data.sources import get_source
from ..data.splits import select_data, share_options
from ..data.streams import check_stored_frames
from ..data.unreadable import UnreadableList, UnreadableVideos, read_first_readable, sample_replacements
from ..evaluation.found import join_roles, list_shared, refuse_missing
from ..hub_cards.sentence_transformers import write_sentence_transformers_files
from ..inference.loading import load_video_text_processor
from ..inference.starts import locate_model
from ..modeling.configuration_umt_video_text import UMTVideoTextConfig
from ..processing.clips import read_clip
from ..processing.media_files import VideoDecodingError
from ..processing.processing_umt_video_text import UMTVideoTextProcessor
from ..processing.train_transforms import ResizedCropTransform
from ..processing.video_processing_umt_video import UMTVideoProcessor
from ..runs.arguments import (
    ClipSpanArguments,
    CropArguments,
    DivergenceArguments,
    DropPathArguments,
    ModelSourceArguments,
    ScaledScheduleArguments,
    SkippingArguments,
    SourceArguments,
    TestDataArguments,
    TestSplitArguments,
    TimedWorkerArguments,
    TrainedPartArguments,
    TrainingDataArguments,
    WarmupArguments,
)
from ..runs.config import REQUIRED, describe, dump_changes, flatten_recipe, require, set_defaults
from ..runs.cores import count_workers
from ..runs.disk import fill_folder, name_unfinished, put_folder, remove_folder, write_text
from ..runs.folder import (
    ADAPTER_FOLDER,
    FINAL_FOLDER,
    RECIPE_FILE,
    TRAINING_DATA_FILE,
    UNREADABLE_FILE,
    VERSIONS_FILE,
    collect_versions,
    read_run_json,
)
from ..runs.mistakes import UserError, naming_full_disk, read_rank
from ..training.background_push import HubPush, build_hub_push
from ..training.checkpointing import (
    choose_checkpoint,
    list_checkpoints,
    refuse_nonfinite_weights,
    remove_unfinished,
    require_own_weights,
    require_same_model,
    set_aside_later,
)
from ..training.clips import build_generator
from ..training.interruption import named_silence
from ..training.optimization import Schedule, build_parameter_groups, keep_group_settings, scale_learning_rate
from ..training.reporting.metric_meter import MetricMeter
from ..training.trainer import (
    NonfiniteSteps,
    count_videos,
    limit_nonfinite_steps,
    read_former_settings,
    sum_skipped_videos,
    warn_of_changes,
    warn_of_other_rows,
)
from .resuming import FinetuningShape, list_needed_files, require_same_steps, say_if_over

try:
    import resource
except ImportError:  # Windows
    resource = None

logger = logging.getLogger(__name__)

RESULTS_FILE, ALL_RESULTS_FILE = "{}_results.json", "all_results.json"
LOGGED_LOSSES = ("vtc_loss", "vtm_loss")
ROLES: dict[str, Literal["validation", "test"]] = {"eval": "validation", "test": "test"}


@dataclass(frozen=True)
class FoundSet:
    """What a set of videos with texts holds.

    Attributes:
        described: In words.
        names: Of its videos.
    """

    described: str
    names: list[str]


HeldOut = TypeVar("HeldOut")
# Gets the model, with its adapters inside, if any, but without what distributes it.
Evaluation = Callable[[Any, Accelerator], dict[str, float]]


@dataclass(kw_only=True)
@set_defaults(model_name_or_path=REQUIRED, drop_path_rate=0.2)
class FinetunedModelArguments(ModelSourceArguments, DropPathArguments, TrainedPartArguments):
    """The stage-2 or fine-tuned folder to start from, and which part of it is trained."""


@dataclass(kw_only=True)
@set_defaults(num_frames=12, decoder="pyav")
class VideoTextDataArguments(
    TrainingDataArguments,
    TestDataArguments,
    SourceArguments,
    TestSplitArguments,
    ClipSpanArguments,
    SkippingArguments,
):
    """Where videos with texts come from and how they are read."""

    def select_source(self, role: Literal["train", "validation", "test"]) -> tuple[str, dict[str, Any]]:
        """What to call `load_pairs` and its like with.

        Raises:
            ValueError: If there is no such data, or a split is asked of data without splits.
        """
        selected = select_data(self, role)
        if selected is None:
            raise ValueError(f"Set {role}_data: a JSON file, or the name of a dataset.")
        source, split = selected
        options = {"data_root": self.data_root, "config_name": self.dataset_config_name}
        options = share_options(
            source,
            (self.train_data, self.validation_data, self.test_data),
            {**options, "video_column": self.video_column},
        )
        return source, {**options, "split": split}


@dataclass(kw_only=True)
class FinetuningArguments(WarmupArguments, DivergenceArguments, TimedWorkerArguments, TrainingArguments):
    """`TrainingArguments` with the published schedule and defaults."""

    output_dir: str | None = describe("outputs/finetuned", "Folder of the run: final model, checkpoints, results.")
    learning_rate: float = describe(2e-5, "Peak rate, whatever the number of processes.")
    min_learning_rate_share: float = describe(0.01, "Share of the peak below which the rate never falls.")
    lr_scheduler_type: str = describe("cosine", "cosine is the published schedule; others are those of Transformers.")
    weight_decay: float = describe(0.02, "AdamW decay of matrices and of the temperature.")
    max_grad_norm: float = describe(0.0, "Gradient clipping; 0 = off.")
    num_train_epochs: float = describe(10, "Passes over the data.")
    per_device_train_batch_size: int = describe(32, "Videos that a process takes at a time.")
    dataloader_drop_last: bool = describe(True, "Leave out the last batch of an epoch if it is not full.")
    remove_unused_columns: bool = describe(False, "Must stay off: batches are made of videos and texts here.")
    logging_nan_inf_filter: bool = describe(False, "Whether NaN and infinite losses are logged as finite ones.")

    def __post_init__(self) -> None:
        DivergenceArguments.__post_init__(self)
        TimedWorkerArguments.__post_init__(self)
        if self.dataloader_num_workers is None:
            # pyrefly: ignore[bad-override]  a number from here on, as the `Trainer` needs it
            self.dataloader_num_workers = count_workers()
        # The reentrant kind finds no gradient where the layers below an adapter are frozen. The name is that of
        # Transformers from 5.24 on, or the one before.
        names = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
        known = [name for name in names if hasattr(self, name)]
        if all(getattr(self, name) is None for name in known):
            setattr(self, known[0], {"use_reentrant": False})
        TrainingArguments.__post_init__(self)


@dataclass(kw_only=True)
@set_defaults(learning_rate=1e-4, min_learning_rate_share=0.0, weight_decay=0.05, dataloader_drop_last=False)
class EncoderFinetuningArguments(ScaledScheduleArguments, FinetuningArguments):
    """The same for video encoders without text: layer decay, and rates from a first to a last one."""

    layer_decay: float = describe(0.75, "Factor between the rates of neighbouring layers in mode full; 1 = off.")

    def __post_init__(self) -> None:
        if self.ddp_find_unused_parameters is None:
            # A step uses all that is trained; to look for the rest costs time, and PyTorch says so in each process.
            self.ddp_find_unused_parameters = False
        super().__post_init__()
        if self.dataloader_persistent_workers:
            raise ValueError("dataloader_persistent_workers: workers that outlive an epoch would repeat its draws.")


class TrainingClips(torch.utils.data.Dataset, ABC):
    """Augmented training clips with the rows they come from.

    A video that cannot be read is replaced together with its row, so that no text or label meets another video. What
    is drawn for a clip depends on seed, epoch and row alone, so neither workers nor processes nor a resumed run change
    it.

    Args:
        table: Rows with a `video`.
        seed: Seed of the run.
    """

    def __init__(self, table: Dataset, seed: int):
        self.table, self.seed = table, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The clip, the `row` with its `number`, the `key` of the draw, and a line for each unreadable video.

        Raises:
            UserError: If neither the video nor any of its replacements can be read.
        """
        key = (self.seed, self.epoch, index)
        generator = build_generator(*key)
        others = sample_replacements(len(self.table), generator)

        # One source for the choice of replacements and for all tries: the key alone decides what comes out.
        def read(number: int) -> dict[str, Any]:
            row = self.table[number]
            with noted(row["video"], number):
                return {**self.read_augmented(row, generator), "row": row, "number": number}

        sample, failures = read_first_readable((index, *others), read)
        if sample is None:
            raise UserError(f"{len(failures)} videos in a row could not be read. The last: {failures[-1]}")
        return {**sample, "key": key, "failures": failures}

    @abstractmethod
    def read_augmented(self, row: dict[str, Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Read and augment the video of a row, drawing from `generator`: `pixel_values` and what goes with them."""


class VideoTextClips(TrainingClips):
    """Clips `(T, C, H, W)` of videos with text.

    Args:
        table: Rows with a `video`.
        data: How clips are read.
        augmentation: How they are cropped and mirrored.
        image_size: Side of the model's input, in pixels.
        seed: Seed of the run.
    """

    def __init__(
        self, table: Dataset, data: VideoTextDataArguments, augmentation: CropArguments, image_size: int, seed: int
    ):
        check_stored_frames(table, data.num_frames, "middle", data.first_seconds)
        super().__init__(table, seed)
        self.data = data
        self.transform = ResizedCropTransform(
            image_size,
            scale=tuple(augmentation.crop_scale),
            flip_probability=augmentation.horizontal_flip_probability,
        )

    def read_augmented(self, row: dict[str, Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Read frames of a video, and crop and flip them all alike.

        Raises:
            VideoDecodingError: If the video cannot be read, or the row has no caption where others have one.
        """
        if "caption" in row and row["caption"] is None:
            raise VideoDecodingError(f"{name_video(row['video'], 0)}: has no caption. Fill it in.")
        frames = read_clip(
            get_source(row["video"]),
            require(self.data.num_frames, "num_frames"),
            "middle",  # the published strategy for training on videos with text
            generator=generator,
            first_seconds=self.data.first_seconds,
            decoder=self.data.decoder or "pyav",
        )
        crop = self.transform.sample(frames.shape[-2], frames.shape[-1], generator)
        clips = self.transform.resize_and_normalize([self.transform.crop(frames, crop)], [crop.flip])
        return {"pixel_values": clips[0]}


class FinetuningTrainer(Trainer):
    """Hugging Face `Trainer` with the published optimizer groups and schedule, and evaluations given as functions.

    With `push_to_hub` it pushes as the pre-training stages do, in the background.

    Args:
        args: Arguments of the run.
        evaluations: What `evaluate` calls for each prefix, "eval" for the validation data. It gets the model (with its
            adapters inside, if any) and the accelerator, in every process, and returns metrics without prefix.
        max_skipped_ratio: Share of unreadable training videos past which the run stops.
        layer_decay: Factor between the rates of neighbouring layers; `None` = all the same.
        **kwargs: As for `Trainer`.
    """

    args: FinetuningArguments  # pyrefly: ignore[bad-override-mutable-attribute]  narrower than in the base class
    model: nn.Module  # pyrefly: ignore[bad-override-mutable-attribute]  the same
    train_dataset: TrainingClips  # pyrefly: ignore[bad-override-mutable-attribute]  the same

    def __init__(
        self,
        *,
        args: FinetuningArguments,
        evaluations: dict[str, Evaluation],
        max_skipped_ratio: float,
        layer_decay: float | None = None,
        **kwargs: Any,
    ):
        # `Trainer` waits for the Hub and fails with it, and it pickles its arguments with the token in them.
        own = copy.copy(args)
        own.push_to_hub, own.hub_token = False, None
        # It would delete old checkpoints bit by bit under their names.
        self.save_total_limit, own.save_total_limit = args.save_total_limit, None
        # `Trainer` only asks whether there is something to evaluate on.
        eval_dataset: Any = list(evaluations) if "eval" in evaluations else None
        super().__init__(args=own, eval_dataset=eval_dataset, **kwargs)
        checkpoints = functools.partial(list_checkpoints, state=TRAINER_STATE_NAME)
        self.hub = build_hub_push(args, checkpoints, self.is_world_process_zero())
        self.evaluations, self.max_skipped_ratio = evaluations, max_skipped_ratio
        self.layer_decay = layer_decay
        self.videos = UnreadableVideos()
        self.unreadable = UnreadableList(Path(str(args.output_dir)) / UNREADABLE_FILE)
        self.meter = MetricMeter(self.accelerator)
        self.bad_steps = NonfiniteSteps()
        self.reads = WatchedReads(args.dataloader_timeout_seconds)
        self.recipe = ""  # what checkpoints record of the run's arguments
        self.data: Fingerprint | None = None  # and of its training data
        self._unfinished: Path | None = None
        self.add_callback(_EpochCallback(self.train_dataset))
        self.add_callback(_StartCallback(self))

    @property
    def rate_scale(self) -> float:
        """What the stated learning rate is multiplied by."""
        return 1.0

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.state.global_step

    @property
    def shape(self) -> FinetuningShape:
        """How the videos of the run are dealt out to its steps."""
        args, rows = self.args, len(self.train_dataset)
        accumulation = args.gradient_accumulation_steps
        return FinetuningShape(args.world_size, args.train_batch_size, accumulation, rows, args.dataloader_drop_last)

    def get_train_dataloader(self) -> DataLoader:
        """The loader of the base class, with the time-out of the arguments."""
        loader = super().get_train_dataloader()
        self.reads.watch(loader)
        return loader

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Take batches, as the base class does; none where a run that has finished is started again.

        Raises:
            StuckReadingError: If workers gave nothing in time, or one has died.
        """
        if self.step >= self.state.max_steps:  # the base class asks only after a step
            self.control.should_training_stop = True
            return [], None
        with self.reads:
            return super().get_batch_samples(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Optimizer of the arguments over `build_parameter_groups`, whose `lr_scale` the schedule applies."""
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            groups = build_parameter_groups(trained, self.args.weight_decay, self.layer_decay)
            # Names would be saved with every checkpoint.
            groups = [{key: value for key, value in group.items() if key != "names"} for group in groups]
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            options["lr"] = self.args.learning_rate * self.rate_scale
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The published schedule, or another one of Transformers where `lr_scheduler_type` says so."""
        if self.lr_scheduler is not None or self.args.lr_scheduler_type != "cosine":
            return super().create_scheduler(num_training_steps, optimizer)
        # Full batches alone, as published.
        batches = len(self.train_dataset) // (self.args.train_batch_size * self.args.world_size)
        schedule = self.build_schedule(num_training_steps, batches)
        optimizer = self.create_optimizer() if optimizer is None else optimizer
        scales = [group.get("lr_scale", 1.0) for group in optimizer.param_groups]
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, [lambda step, scale=scale: scale * schedule(step) for scale in scales]
        )
        self._created_lr_scheduler = True  # as `Trainer` itself notes it
        return self.lr_scheduler

    def build_schedule(self, total_steps: int, batches_per_epoch: int) -> Schedule:
        """The published schedule in shares of the peak rate, which the optimizer has."""
        args = self.args
        warmup_steps = args.warmup_epochs * batches_per_epoch / args.gradient_accumulation_steps
        return Schedule(
            total_steps,
            args.get_warmup_steps(total_steps) or warmup_steps,
            peak=1.0,
            minimum=args.min_learning_rate_share,
            kind="cosine_above_minimum",
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Loss of a batch; its unreadable videos are counted, and each of its losses is kept for the log.

        Raises:
            RuntimeError: If too many videos were unreadable.
        """
        failures = inputs.pop("failures")
        count_videos(self.videos, failures, len(inputs["pixel_values"]), self.max_skipped_ratio, self.unreadable)
        found: Any = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss, outputs = found
        self.meter.update({name: outputs[name] for name in LOGGED_LOSSES if outputs.get(name) is not None})
        return (loss, outputs) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if self.args.should_save and isinstance(model, PreTrainedModel):
            require_own_weights(Path(output_dir or require(self.args.output_dir, "output_dir")), model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Norm of a step's gradients; those of a bad step are dropped, so that it changes no weight.

        The norm is that of all processes, so they all skip and stop together.

        Raises:
            RuntimeError: If too many steps in a row are bad.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        is_finite = norm is None or math.isfinite(float(norm))
        scaler = self.accelerator.scaler
        # The loss scaler of fp16 must see every step: it skips bad ones itself and lowers its scale.
        if not is_finite and scaler is None:
            for parameter in model.parameters():
                parameter.grad = None
        limit = limit_nonfinite_steps(self.args.max_nonfinite_steps, self.state.max_steps, scaler is not None)
        self.bad_steps.count_step(is_finite, self.state.global_step, limit)
        return norm

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load moments and position; rates, decays and schedule are those of the arguments, which are recorded."""
        if self.optimizer is None or self.lr_scheduler is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        rates = list(getattr(self.lr_scheduler, "base_lrs", []))
        with keep_group_settings(self.optimizer):
            super()._load_optimizer_and_scheduler(checkpoint)
        scheduler = self.lr_scheduler
        if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            scheduler.base_lrs = rates
            shares = [compute(scheduler.last_epoch) for compute in scheduler.lr_lambdas]
            scheduler._last_lr = [rate * share for rate, share in zip(rates, shares, strict=True)]
            for group, rate in zip(self.optimizer.param_groups, scheduler._last_lr, strict=True):
                group["lr"] = rate
        else:
            for group, rate in zip(self.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                group["lr"] = rate

    def _get_output_dir(self, trial: Any) -> str:
        """The run's folder; while a checkpoint is written, the folder that it is written in."""
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint under another name, and rename it when it is complete; then delete old ones."""
        run_dir = Path(super()._get_output_dir(trial))
        final = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        # The base class makes its folder in this one.
        unfinished = name_unfinished(final)
        with naming_full_disk(final):
            self._write_checkpoint(model, trial, unfinished, final)
        if self.args.should_save:
            self.remove_old_checkpoints(final)
        self.accelerator.wait_for_everyone()

    def _write_checkpoint(self, model: nn.Module, trial: Any, unfinished: Path, final: Path) -> None:
        if self.args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self._unfinished = unfinished
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._unfinished = None
        written = unfinished / final.name
        if self.state.best_model_checkpoint == str(written):
            self.state.best_model_checkpoint = str(final)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.complete_checkpoint(written)
            put_folder(written, final)
            unfinished.rmdir()

    def complete_checkpoint(self, folder: Path) -> None:
        """Add what the base class does not know of; called where checkpoints are written."""
        self.shape.save(folder)
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))  # with the name that the best checkpoint has
        if self.recipe:
            write_text(folder / RECIPE_FILE, self.recipe)
        if self.data is not None:
            write_text(folder / TRAINING_DATA_FILE, json.dumps(self.data) + "\n")

    def remove_old_checkpoints(self, newest: Path | None) -> None:
        """Delete the oldest checkpoints above `save_total_limit`, but neither the best nor `newest`."""
        limit = self.save_total_limit
        if not limit or limit < 0:
            return
        found = list_checkpoints(str(self.args.output_dir), TRAINER_STATE_NAME)
        found.sort(key=lambda path: (path / TRAINER_STATE_NAME).stat().st_mtime_ns)
        best = self.state.best_model_checkpoint
        kept = {path.resolve() for path in (newest, best and Path(best)) if path}
        surplus = len(found) - max(limit, len(kept))
        for path in [path for path in found if path.resolve() not in kept][: max(surplus, 0)]:
            remove_folder(path)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and with the training loss each of its parts and the unreadable videos of all processes."""
        if "loss" in logs:
            skipped = sum_skipped_videos(self.videos, self.accelerator)
            counts = {"skipped_videos": skipped, "nonfinite_steps": self.bad_steps.nonfinite_steps}
            logs = {**logs, **self.meter.flush(), **counts}
            # The base class subtracts the sum from itself, so that one NaN would stay for ever.
            self._tr_loss.zero_()
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Any = None,  # noqa: ARG002 (the base class's signature)
        ignore_keys: list[str] | None = None,  # noqa: ARG002
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Metrics of the evaluation of that prefix, whose data it knows itself."""
        # Evaluations are written for the model itself; adapters work in it as they do in PEFT's wrapper.
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        metrics = self.evaluations[metric_key_prefix](model, self.accelerator)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        # As `Trainer.evaluate` ends: callbacks stop early by these metrics.
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class EncoderFinetuningTrainer(FinetuningTrainer):
    """`FinetuningTrainer` with the published rates of video encoders without text.

    Args:
        repeated_augmentation: Clips per video, for the scaling of rates.
        **kwargs: As for `FinetuningTrainer`.
    """

    args: EncoderFinetuningArguments  # pyrefly: ignore[bad-override-mutable-attribute]  narrower than in the base class

    def __init__(self, *, repeated_augmentation: int = 1, **kwargs: Any):
        super().__init__(**kwargs)
        self.repeated_augmentation = repeated_augmentation
        # The loss is the batch's own, so `Trainer` has to divide it where gradients are accumulated.
        self.model_accepts_loss_kwargs = False

    @property
    def rate_scale(self) -> float:
        """What stated learning rates are multiplied by."""
        if not self.args.scale_learning_rate:
            return 1.0
        args = self.args
        total = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        return scale_learning_rate(1.0, total, self.repeated_augmentation)

    def build_schedule(self, total_steps: int, batches_per_epoch: int) -> Schedule:
        """The other published schedule: from a first rate up to the peak, and down to a last one."""
        args = self.args
        # As published: steps of an epoch are rounded down before they are multiplied.
        warmup_steps = int(args.warmup_epochs * (batches_per_epoch // args.gradient_accumulation_steps))
        return Schedule(
            total_steps,
            args.get_warmup_steps(total_steps) or warmup_steps,
            peak=1.0,
            minimum=min(args.min_learning_rate / args.learning_rate, 1.0),
            warmup_start=min(args.warmup_start_learning_rate / args.learning_rate, 1.0),
        )


class _EpochCallback(TrainerCallback):
    """Gives the clips the number of the epoch, also after resuming."""

    def __init__(self, clips: TrainingClips):
        self.clips = clips

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 (the base class's signature)
        # After resuming within an epoch it is a fraction.
        self.clips.epoch = int(state.epoch or 0)


class _StartCallback(TrainerCallback):
    """Looks at the weights before the first step, when those of a checkpoint are loaded too."""

    def __init__(self, trainer: FinetuningTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 (the base class's signature)
        trainer = self.trainer
        start = str(getattr(trainer.model, "name_or_path", "") or "The model to start from")
        resumed = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        refuse_nonfinite_weights(trainer.model, trainer.accelerator, resumed if state.global_step else start)


class _PushCallback(TrainerCallback):
    """Hands the run's saves to the Hub."""

    def __init__(self, hub: HubPush):
        self.hub = hub

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 (the base class's signature)
        self.hub.push_checkpoint(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def load_config(args: FinetunedModelArguments, data: VideoTextDataArguments) -> UMTVideoTextConfig:
    """Configuration of the folder to start from, with what the run changes in it."""
    start = require(args.model_name_or_path, "model_name_or_path")
    config = UMTVideoTextConfig.from_pretrained(locate_model(start))
    if data.num_frames is None:  # so that the clips have as many, and that the run records them
        data.num_frames = config.vision_config.num_frames
    config.vision_config.num_frames = data.num_frames
    config.vision_config.drop_path_rate = args.drop_path_rate
    return config


def build_processor(
    name_or_path: str | None, config: UMTVideoTextConfig, data: VideoTextDataArguments, max_tokens: int | None
) -> UMTVideoTextProcessor:
    """The folder's tokenizer for `max_tokens` tokens, and the published test view: the middle of each part of a video.

    Frames are resized straight to the model's square (bicubic, aspect ratio not kept).
    """
    processor = load_video_text_processor(require(name_or_path, "model_name_or_path"))
    if max_tokens is not None:
        processor.tokenizer.model_max_length = max_tokens
    processor.video_processor = UMTVideoProcessor.from_model_config(
        config, first_seconds=data.first_seconds, decoder=data.decoder
    )
    return processor


def add_adapters(model: PreTrainedModel, mode: str, rank: int, heads: list[str]) -> PreTrainedModel | PeftModel:
    """In mode "lora" or "dora", freeze a model but for its heads and adapters on every query and value projection.

    Args:
        model: Any model of the family.
        mode: Other modes leave the model as it is.
        rank: Rank of the adapters.
        heads: Modules that are trained in full.
    """
    adapted: Any = model
    if mode in ("lora", "dora"):
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=["q_proj", "v_proj"],
            modules_to_save=heads,
            use_dora=mode == "dora",
        )
        adapted = get_peft_model(model, config)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    logger.info("%s: %s of %s parameters are trained.", mode, f"{trained:,}", f"{adapted.num_parameters():,}")
    return adapted


def fine_tune(trainer: FinetuningTrainer, sections: dict[str, Any]) -> dict[str, float]:
    """Train, save the model with its processor, and evaluate it; adapters by themselves too, and then merged.

    Args:
        trainer: With everything it needs.
        sections: Resolved arguments of the run, recorded in `run.yaml`.

    Returns:
        Metrics of all evaluations.

    Raises:
        FileExistsError: If a run without `resume_from_checkpoint` would mix with an older one's checkpoints.
        FileNotFoundError: If the checkpoint to resume from is not complete.
        RuntimeError: If the run diverges.
        ValueError: If weights are not finite, before the first step or after the last; if the checkpoint is damaged or
            has steps of other videos; or if the saved model cannot be evaluated.
    """
    args = trainer.args
    output_dir = Path(require(args.output_dir, "output_dir"))
    is_main = trainer.is_world_process_zero()
    if is_main:
        remove_unfinished(output_dir)
    trainer.accelerator.wait_for_everyone()
    is_divided = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    has_moments = not (is_divided or args.save_only_model)
    list_needed = functools.partial(list_needed_files, num_processes=args.world_size, has_moments=has_moments)
    checkpoint = choose_checkpoint(args.resume_from_checkpoint, output_dir, TRAINER_STATE_NAME, list_needed)
    if checkpoint is not None:
        require_same_model(checkpoint, trainer.model)
        former = read_run_json(checkpoint / TRAINER_STATE_NAME)
        require_same_steps(checkpoint, former, trainer.shape)
        set_aside_later(output_dir, former["global_step"], TRAINER_STATE_NAME)
        if is_main:
            say_if_over(checkpoint, former["global_step"], args.max_steps, args.num_train_epochs, trainer.shape)
    trainer.recipe = dump_changes(sections)
    if is_main:
        trainer.data = fingerprint_rows(trainer.train_dataset.table)
    if checkpoint is not None and trainer.data is not None:
        _name_changes(checkpoint, trainer.recipe, sections)
        file = checkpoint / TRAINING_DATA_FILE
        warn_of_other_rows([read_run_json(file)] if file.is_file() else [], {"train_data": trainer.data})
    if trainer.hub is not None:
        trainer.add_callback(_PushCallback(trainer.hub))  # the last one: what others add to a checkpoint goes up too
    with named_silence(trainer.accelerator, trainer, "--ddp_timeout"):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    refuse_nonfinite_weights(trainer.model, trainer.accelerator, "The trained model")
    # Before it is tested: a held-out video that cannot be read is not to cost the training.
    _write_model(trainer, output_dir)
    metrics = _test_all(trainer, output_dir)
    if is_main:
        figures = "".join(f"\n  {name:<36} {value:10.4f}" for name, value in metrics.items())
        logger.info("Wrote %s, which `from_pretrained` loads.%s", output_dir, figures)
    if trainer.hub is not None:
        trainer.hub.finish()
    return metrics


def _name_changes(checkpoint: Path, recipe: str, sections: dict[str, Any]) -> None:
    """Warn of arguments that differ from those of the run that wrote a checkpoint."""
    if not (checkpoint / RECIPE_FILE).is_file():
        logger.warning("%s does not say with which settings it was made; those of this run are used.", checkpoint)
        return
    former, present = read_former_settings(checkpoint), flatten_recipe(recipe)
    # A recipe leaves out defaults.
    defaults = {
        own.name: own.default if own.default_factory is dataclasses.MISSING else own.default_factory()
        for section in sections.values()
        for own in dataclasses.fields(section)
    }
    names = [name for name in (*present, *former) if name in defaults]
    warn_of_changes(
        {name: former.get(name, defaults[name]) for name in names},
        {name: present.get(name, defaults[name]) for name in names},
    )


def _test_all(trainer: FinetuningTrainer, output_dir: Path) -> dict[str, float]:
    """Metrics of all evaluations, which the run's folder keeps.

    Raises:
        ValueError: If one of them fails; it names the folder, which has the model by then.
    """
    try:
        metrics = {name: value for prefix in trainer.evaluations for name, value in _test(trainer, prefix).items()}
    except ValueError as error:
        raise ValueError(
            f"{output_dir} holds the trained model, but testing it failed: {error} With that put right, "
            f"`umt-hf evaluate` tests it with --model_name_or_path {output_dir}."
        ) from error
    if metrics and trainer.is_world_process_zero():
        trainer.state.save_to_json(str(output_dir / TRAINER_STATE_NAME))  # with the last figures in its history
        write_text(output_dir / ALL_RESULTS_FILE, json.dumps(metrics, indent=4, sort_keys=True))
    return metrics


def _test(trainer: FinetuningTrainer, prefix: str) -> dict[str, float]:
    """Metrics of an evaluation, which the run's folder keeps."""
    found = trainer.evaluate(metric_key_prefix=prefix)
    if trainer.is_world_process_zero():
        folder = Path(require(trainer.args.output_dir, "output_dir"))
        write_text(folder / RESULTS_FILE.format(prefix), json.dumps(found, indent=4, sort_keys=True))
    return found


def _write_model(trainer: FinetuningTrainer, output_dir: Path) -> None:
    """Write the final model with its processor and records, all at once; called in all processes."""
    is_main, folder = trainer.is_world_process_zero(), name_unfinished(output_dir / FINAL_FOLDER)
    with naming_full_disk(output_dir), fill_folder(output_dir) if trainer.args.should_save else nullcontext():
        if isinstance(trainer.model, PeftModel):  # one folder that needs no PEFT to load
            if is_main:
                trainer.model.save_pretrained(str(folder / ADAPTER_FOLDER))
            trainer.model = trainer.model.merge_and_unload()
        trainer.save_model(str(folder))
        if is_main:
            trainer.state.save_to_json(str(folder / TRAINER_STATE_NAME))
            write_sentence_transformers_files(folder)
            write_text(folder / RECIPE_FILE, trainer.recipe)
            write_text(folder / VERSIONS_FILE, json.dumps(collect_versions(), indent=2) + "\n")
            # Figures of an earlier model would stand beside this one if its test fails.
            for name in (ALL_RESULTS_FILE, *map(RESULTS_FILE.format, ("eval", "test"))):
                (output_dir / name).unlink(missing_ok=True)
    trainer.remove_old_checkpoints(None)


def log_peak_memory() -> None:
    """Log the peak memory of this process, on the accelerator if there is one."""
    if torch.cuda.is_available():
        place, peak = "GPU", torch.cuda.max_memory_allocated()
    elif resource is not None:
        # macOS counts bytes, Linux KiB.
        unit = 1 if sys.platform == "darwin" else 1024
        place, peak = "process", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    else:
        return
    logger.info("Peak memory of the %s: %.2f GiB.", place, peak / 2**30)


def say_found_sets(train: FoundSet, held_out: Mapping[str, FoundSet]) -> None:
    """Say in one line what was found for each role, and warn of held-out videos that are trained on.

    Args:
        train: Training data.
        held_out: Data of each evaluation, by the prefix of its metrics.

    Raises:
        ValueError: If held-out videos are not there.
    """
    roles = {ROLES[prefix]: found for prefix, found in held_out.items()}
    for role, found in roles.items():
        refuse_missing(found.names, role)
    if read_rank() > 0:
        return
    logger.info(join_roles({"training": train.described, **{role: found.described for role, found in roles.items()}}))
    for doubt in list_shared(train.names, {role: found.names for role, found in roles.items()}):
        logger.warning(doubt)


def load_held_out(
    training: TrainingArguments, data: VideoTextDataArguments, load: Callable[[str, dict[str, Any]], HeldOut]
) -> dict[str, HeldOut]:
    """Each kind of held-out data that is given, read before a model is loaded.

    Args:
        training: Says whether there must be validation data.
        data: Names the data.
        load: Reads a source with its options.

    Returns:
        Prefix of the metrics -> what was read.

    Raises:
        ValueError: If evaluations are asked for, and there is no validation data.
    """
    named = {prefix: role for prefix, role in ROLES.items() if select_data(data, role) is not None}
    if training.eval_strategy != "no" and "eval" not in named:
        raise ValueError("eval_strategy needs validation_data: a JSON file, or the name of a dataset.")
    return {prefix: load(*data.select_source(role)) for prefix, role in named.items()}
