"""Stage 1: align a video encoder with a frozen image tower, such as a CLIP, on the tokens that stay visible.

    umt-hf pretrain stage1 --config stage1_umt_vit_b16 --train_data train.csv

Source: Li et al., "Unmasked Teacher", ICCV 2023, section 3.1.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader

from ..data.lists.sharing import shared_folders
from ..data.loaders import build_loader
from ..data.sources import load_videos
from ..data.splits import name_kind, refuse_idle_options, require_split, select_data, share_options
from ..data.streams import choose_shards, holds_tars, load_shards
from ..data.unreadable import UnreadableList
from ..evaluation.found import list_names, list_shared, refuse_missing
from ..hub_cards.released_names import convert_named
from ..inference.held_out import build_bar
from ..inference.loading import load_complete_model
from ..modeling.configuration_umt_video import UMTVideoConfig
from ..modeling.modeling_umt_video import UMTVideoForPreTraining
from ..processing.train_transforms import PretrainingTransform
from ..processing.video_processing_umt_video import UMTVideoProcessor
from ..runs.config import dump_config, flatten_config, script
from ..runs.folder import UNREADABLE_FILE
from ..runs.mistakes import read_rank
from ..teachers.teacher import UMTTeacher
from .alignment import (
    build_grid,
    check_grids,
    compute_targets,
    describe_alignment,
    load_other_teachers,
    load_teacher,
)
from .arguments import (
    DataArguments,
    MaskArguments,
    ModelArguments,
    PretrainingArguments,
    PretrainingAugmentationArguments,
    TeacherArguments,
)
from .checkpointing import export_run
from .clips import (
    ClipCollator,
    ClipDataset,
    ClipRequest,
    finish_batch,
)
from .corpora import (
    JoinedTable,
    TrainingTable,
    check_sampling,
    count_epoch_rows,
    find_num_frames,
    iterate_video_names,
    name_corpora,
    refuse_idle_shuffle,
)
from .order import Position, StepShape, TrackedPlan, count_steps, plan_batches
from .step.forward import align_student
from .trainer import TrainState, build_accelerator, build_schedule, compute_held_out_losses, train

logger = logging.getLogger(__name__)

SECTIONS = {
    "model": ModelArguments,
    "teacher": TeacherArguments,
    "mask": MaskArguments,
    "data": DataArguments,
    "augmentation": PretrainingAugmentationArguments,
    "training": PretrainingArguments,
}

SIZES = (
    "image_size",
    "patch_size",
    "num_frames",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)


class Stage1:
    """Student, frozen teacher, and the data they share.

    Args:
        model: Student.
        teacher: On the device and in the precision it runs in.
        data: How clips are read.
        augmentation: What happens to training clips.
        training: Batch sizes and seed.
        tables: Training rows and, if any, held-out rows.
        resolved: The run's sections, saved beside every export.
        other_teachers: Further ones, likewise, whose features the student learns as well.
    """

    def __init__(
        self,
        model: UMTVideoForPreTraining,
        teacher: UMTTeacher,
        data: DataArguments,
        augmentation: PretrainingAugmentationArguments,
        training: PretrainingArguments,
        tables: tuple[TrainingTable, TrainingTable | None],
        resolved: dict[str, Any],
        other_teachers: Sequence[UMTTeacher] = (),
    ):
        self.model: nn.Module = model  # later as the accelerator has prepared it
        self.compute_targets = compute_targets  # later compiled, where that is asked for
        self.teacher, self.other_teachers = teacher, other_teachers
        self.config: UMTVideoConfig = model.config
        self.data, self.augmentation = data, augmentation
        self.training, self.resolved = training, resolved
        self.train_table, self.eval_table = tables
        parts = self.train_table.parts if isinstance(self.train_table, JoinedTable) else [self.train_table]
        sources = data.train_corpora or [data.train_data or "training data"]
        self.named_tables = name_corpora(sources, parts)
        self.batch_sizes = [training.per_device_train_batch_size]
        self.table_lengths: list[int] | None = [count_epoch_rows(self.train_table)]
        size = self.config.image_size
        self.train_transform = PretrainingTransform(
            size, augmentation.crop_scales, augmentation.horizontal_flip_probability
        )
        self.eval_transform = PretrainingTransform(size)
        self.eval_loader: DataLoader | None = None  # where its workers are to stay

    def build_batches(self, accelerator: Accelerator, position: Position | None) -> Iterator[dict[str, Any]]:
        """Endless training batches of this process from a position on, each with the `position` after its step."""
        shape = StepShape(
            accelerator.num_processes, accelerator.process_index, self.training.gradient_accumulation_steps
        )
        size, seed = self.training.per_device_train_batch_size, self.training.seed
        tracked = TrackedPlan(plan_batches(self.train_table, size, seed, shape, position))
        loader = self._build_loader(self.train_table, tracked, self.train_transform, accelerator, is_training=True)
        return tracked.track(finish_batch(batch, self.train_transform, accelerator.device) for batch in loader)

    def evaluate(self, accelerator: Accelerator) -> dict[str, float]:
        """Loss on the held-out clips: middle frames, centre crop, masks fixed by row."""
        if self.eval_table is None:
            return {}
        loader = self.eval_loader
        if loader is None:
            rows = range(accelerator.process_index, len(self.eval_table), accelerator.num_processes)
            size = self.training.per_device_eval_batch_size or self.training.per_device_train_batch_size
            # The key is the row alone: every evaluation draws the same masks.
            requests = [ClipRequest(row, (row,)) for row in rows]
            plan = [requests[i : i + size] for i in range(0, len(requests), size)]
            loader = self._build_loader(self.eval_table, plan, self.eval_transform, accelerator, is_training=False)
            if self.data.dataloader_persistent_workers:
                self.eval_loader = loader
        batches = (finish_batch(batch, self.eval_transform, accelerator.device) for batch in loader)
        with build_bar(len(loader), "batch", accelerator, not self.training.disable_tqdm, batches) as bar:
            unreadable = UnreadableList(Path(self.training.output_dir) / UNREADABLE_FILE)
            return compute_held_out_losses(self, bar, accelerator, unreadable)

    def monitor(self) -> dict[str, float]:
        """Nothing but the losses changes."""
        return {}

    def _build_loader(
        self,
        table: TrainingTable,
        plan: Iterable[list[ClipRequest]],
        transform: PretrainingTransform,
        accelerator: Accelerator,
        is_training: bool,
    ) -> DataLoader:
        dataset = ClipDataset(
            table,
            transform,
            self.config.num_frames,
            build_grid(self.config).num_tokens,
            self.data.sampling_strategy or "segments",
            self.data.frame_stride or 1,
            self.data.decoder or "pyav",
            self.augmentation.repeated_augmentation if is_training else 1,
            is_training,
        )
        return build_loader(
            dataset,
            plan,
            self.data.dataloader_num_workers,
            # Pixels are finished on the accelerator; where there is none, by the workers, beside the training.
            collate_fn=ClipCollator(transform, use_worker=accelerator.device.type == "cpu", keep_size=is_training),
            pin_memory=accelerator.device.type == "cuda",
            timeout_seconds=self.data.dataloader_timeout_seconds,
            prefetch_factor=self.data.dataloader_prefetch_factor,
            persistent_workers=self.data.dataloader_persistent_workers and not is_training,
        )

    def forward_step(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The student sees the visible tokens and is compared with the teacher on them."""
        return align_student(self, batch)

    def export(self, accelerator: Accelerator, folder: Path) -> None:
        """Write the student with processor, resolved arguments and versions; called in all processes."""
        processor = UMTVideoProcessor.from_model_config(self.config, decoder=self.data.decoder)
        export_run(accelerator, self.model, processor, dump_config(self.resolved), folder)


def build_student(
    model: ModelArguments,
    teacher: TeacherArguments,
    mask: MaskArguments,
    teacher_tower: UMTTeacher,
    other_towers: Sequence[UMTTeacher] = (),
) -> UMTVideoForPreTraining:
    """A student from scratch, or one that goes on from a folder; its config records the run's mask and teachers.

    Raises:
        ValueError: If student and teachers do not divide a clip into the same grid, or the folder to go on from is not
            a complete stage-1 model.
    """
    recorded = describe_alignment(teacher, mask, teacher_tower, other_towers)
    if model.model_name_or_path:
        student = load_complete_model(
            UMTVideoForPreTraining,
            model.model_name_or_path,
            attn_implementation=model.attn_implementation,
            drop_path_rate=model.drop_path_rate,
            hint="Its alignment heads must fit the run's teachers, num_aligned_layers and alignment_interval.",
            **recorded,
        )
    else:
        sizes = {name: getattr(model, name) for name in (*SIZES, "drop_path_rate")}
        config = UMTVideoConfig(**{name: value for name, value in sizes.items() if value is not None}, **recorded)
        config.position_embedding_frames = config.num_frames
        config.position_embedding_image_size = config.image_size
        config._attn_implementation = model.attn_implementation
        student = UMTVideoForPreTraining(config)
    for name in SIZES:  # a continued model keeps its own: record these
        setattr(model, name, getattr(student.config, name))
    if model.gradient_checkpointing:
        student.gradient_checkpointing_enable()
    for tower in (teacher_tower, *other_towers):
        check_grids(student.config, tower)
    return student


def load_tables(data: DataArguments) -> tuple[TrainingTable, TrainingTable | None]:
    """Training rows and held-out rows.

    Raises:
        ValueError: If there is no training data, or a split is asked of data without splits.
    """
    sources = list_sources(data)
    chosen = choose_shards([source for source, _ in sources], data.streaming)
    refuse_idle_shuffle(data.shuffle_buffer_size, chosen)
    parts = [load_corpus_rows(*source, data, is_sharded) for source, is_sharded in zip(sources, chosen, strict=True)]
    training = parts[0] if len(parts) == 1 and not data.corpus_weights else JoinedTable(parts, data.get_weights())
    validation = select_data(data, "validation")
    if validation is None:
        return training, None
    held_out = load_corpus_rows(*validation, data, holds_tars(validation[0]))
    if data.max_eval_samples is not None and data.max_eval_samples < len(held_out):
        rows = range(data.max_eval_samples)
        # pyrefly: ignore[bad-argument-type]  shards are a data set, too
        held_out = held_out.select(rows) if isinstance(held_out, Dataset) else torch.utils.data.Subset(held_out, rows)
    return training, held_out


def list_sources(data: DataArguments) -> list[tuple[str, str]]:
    """Training data and its split, of each corpus."""
    if data.train_corpora:
        split = data.train_split
        return [(source, require_split(source, split, "train", "train_split")) for source in data.train_corpora]
    if (train := select_data(data, "train")) is None:
        raise ValueError("Set train_data: a CSV file, JSON file, folder of videos, or name of a dataset.")
    return [train]


def load_corpus_rows(source: str, split: str, data: DataArguments, is_sharded: bool) -> TrainingTable:
    """Rows of a corpus, as shards or as a table."""
    options = {
        "data_root": data.data_root,
        "csv_separator": data.csv_separator,
        "config_name": data.dataset_config_name,
        "video_column": data.video_column,
    }
    sources = [*(name for name, _ in list_sources(data)), data.validation_data]
    options = share_options(source, sources, options)
    if is_sharded:
        # In tars the column says whether pictures are meant.
        refuse_idle_options(source, name_kind(source), options | {"video_column": "video"})
        return load_shards(
            source,
            split,
            options["config_name"],
            data.video_column,
            options["data_root"],
            data.shuffle_buffer_size,
            reads_captions=False,
        )
    return load_videos(source, split=split, needs_labels=False, **options)


def count_rows(table: TrainingTable | None) -> str:
    """Number of rows that an epoch takes, in words where there are none."""
    return "none" if table is None else f"{count_epoch_rows(table):,}"


def say_found_videos(tables: tuple[TrainingTable, TrainingTable | None]) -> None:
    """Say how many videos there are, and whether some of them are in both tables; in the main process."""
    training, held_out = tables
    logger.info("%s training videos, %s held out.", *map(count_rows, tables))
    if read_rank() == 0 and held_out is not None:
        for doubt in list_shared(iterate_video_names(training), {"validation": [*iterate_video_names(held_out)]}):
            logger.warning(doubt)


def refuse_idle_held_out(table: TrainingTable | None, num_processes: int) -> None:
    """Refuse held-out videos of which some process would have none, or none is there.

    Raises:
        ValueError: How many there are.
    """
    if table is None:
        return
    if len(table) < num_processes:
        raise ValueError(f"{len(table)} held-out videos are fewer than {num_processes} processes.")
    if isinstance(table, Dataset):
        # Those that cannot be read are left out when it is tested, as long as one can.
        refuse_missing(list_names(table), "validation", 1 - 0.5 / len(table))


@script(SECTIONS)
def main(
    model_args: ModelArguments,
    teacher_args: TeacherArguments,
    mask_args: MaskArguments,
    data: DataArguments,
    augmentation: PretrainingAugmentationArguments,
    training: PretrainingArguments,
) -> TrainState:
    """Build and train."""
    parsed = (model_args, teacher_args, mask_args, data, augmentation, training)
    resolved = dict(zip(SECTIONS, parsed, strict=True))
    accelerator = build_accelerator(training)
    with shared_folders():
        tables = load_tables(data)
    convert_named(model_args)
    say_found_videos(tables)
    # Whatever the data rule out, before a model is loaded.
    refuse_idle_held_out(tables[1], accelerator.num_processes)
    start = model_args.model_name_or_path
    num_frames = find_num_frames(model_args.num_frames if start is None else None, start)
    for table in tables:
        check_sampling(table, num_frames, data.sampling_strategy or "segments")
    shape = StepShape(accelerator.num_processes, accumulation_steps=training.gradient_accumulation_steps)
    per_epoch = count_steps(tables[0], training.per_device_train_batch_size, shape)
    schedule = build_schedule(training, per_epoch, accelerator.num_processes, augmentation.repeated_augmentation)
    teacher = load_teacher(teacher_args, model_args.attn_implementation, accelerator)
    others = load_other_teachers(teacher_args, model_args.attn_implementation, accelerator, teacher)
    student = build_student(model_args, teacher_args, mask_args, teacher, others)
    stage = Stage1(student, teacher, data, augmentation, training, tables, resolved, others)
    logger.info(
        "Attention: student %s, precision %s", student.config._attn_implementation, accelerator.mixed_precision
    )
    return train(stage, training, accelerator, schedule, data.max_skipped_ratio, flatten_config(parsed))


if __name__ == "__main__":
    main()
