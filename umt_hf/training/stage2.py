r"""Stage 2: a stage-1 student and a BERT learn from videos and images with text, under the same frozen teacher.

    umt-hf pretrain stage2 --config stage2_umt_vit_b16_25m \
        --vision_name_or_path umt-vit-b16

Source: Li et al., "Unmasked Teacher", ICCV 2023, section 3.2.
"""

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset, concatenate_datasets
from torch import nn
from transformers import PreTrainedTokenizerFast

from ..data.annotations import RetrievalSet, load_pairs, load_retrieval_set
from ..data.lists.sharing import shared_folders
from ..data.loaders import build_loader
from ..data.splits import has_effect, name_kind, refuse_idle_options, require_split, select_data, share_options
from ..data.streams import choose_shards, load_shards
from ..evaluation.found import count_texts, iterate_names, join_roles, list_shared, name_media, refuse_missing
from ..evaluation.retrieval import evaluate_retrieval
from ..hub_cards.released_names import convert_named
from ..inference.loading import describe_fresh, load_complete_model
from ..inference.starts import locate_model, require_other_model, require_start, require_tokenizer
from ..modeling.configuration_umt_video_text import UMTVideoTextConfig
from ..modeling.losses_umt import lacks_negatives
from ..modeling.modeling_umt_video import UMTVideoModel
from ..modeling.modeling_umt_video_text import UMTVideoTextForPreTraining
from ..processing.processing_umt_video_text import UMTVideoTextProcessor, build_tokenizer
from ..processing.train_transforms import ResizedCropTransform
from ..processing.video_processing_umt_video import UMTVideoProcessor
from ..runs.arguments import CropArguments
from ..runs.config import dump_config, flatten_config, script
from ..runs.models import ALL_CLASSES
from ..runs.noise import leave_out_load_report
from ..teachers.teacher import UMTTeacher
from .alignment import build_grid, check_grids, compute_targets, describe_alignment, load_teacher
from .arguments import (
    CorpusArguments,
    ImageMaskArguments,
    LossArguments,
    PretrainingArguments,
    TeacherArguments,
    VideoTextModelArguments,
)
from .checkpointing import export_run
from .clips import finish_batch
from .corpora import (
    JoinedTable,
    TrainingTable,
    check_sampling,
    count_epoch_rows,
    find_num_frames,
    name_corpora,
    refuse_idle_shuffle,
)
from .order import Position, StepShape, TrackedPlan, count_steps, plan_mixed_batches
from .pairs import MediaType, MixedCorpora, PairCollator, PairDataset
from .step.forward import join_video_and_text
from .trainer import TrainState, build_accelerator, build_schedule, train

logger = logging.getLogger(__name__)

SECTIONS = {
    "model": VideoTextModelArguments,
    "teacher": TeacherArguments,
    "mask": ImageMaskArguments,
    "losses": LossArguments,
    "data": CorpusArguments,
    "augmentation": CropArguments,
    "training": PretrainingArguments,
}


@dataclasses.dataclass
class Corpus:
    """Rows that make batches of one kind.

    Args:
        table: Rows with `video`, `caption` and `corpus`.
        media_type: "video" or "image".
        batch_size: Rows per batch of a process.
        tables: Rows of each corpus in it, by its number.
    """

    table: TrainingTable
    media_type: MediaType
    batch_size: int
    tables: dict[int, TrainingTable]


class Stage2:
    """Video-text model, frozen teacher, and the corpora they share.

    Args:
        model: The model to train; its configuration records masks and loss weights.
        teacher: On the device and in the precision it runs in; `None` where nothing is aligned or masked.
        processor: Tokenizes texts, and is saved with the model.
        corpora: Kinds of batches.
        held_out: Videos and texts to search each other with, if any.
        data: How media are read.
        augmentation: What happens to training clips.
        training: Batch sizes and seed.
        resolved: The run's sections, saved beside every export.
    """

    def __init__(
        self,
        model: UMTVideoTextForPreTraining,
        teacher: UMTTeacher | None,
        processor: UMTVideoTextProcessor,
        corpora: list[Corpus],
        held_out: RetrievalSet | None,
        data: CorpusArguments,
        augmentation: CropArguments,
        training: PretrainingArguments,
        resolved: dict[str, Any],
    ):
        self.model: nn.Module = model  # later as the accelerator has prepared it
        self.compute_targets = compute_targets  # later compiled, where that is asked for
        self.teacher, self.processor = teacher, processor
        self.config: UMTVideoTextConfig = model.config
        self.corpora, self.held_out = corpora, held_out
        tables = {number: table for corpus in corpora for number, table in corpus.tables.items()}
        self.named_tables = name_corpora(data.train_corpora, [tables[number] for number in sorted(tables)])
        self.batch_sizes = [corpus.batch_size for corpus in corpora]
        self.table_lengths: list[int] | None = [count_epoch_rows(corpus.table) for corpus in corpora]
        self.data, self.augmentation = data, augmentation
        self.training, self.resolved = training, resolved

    def build_batches(self, accelerator: Accelerator, position: Position | None) -> Iterator[dict[str, Any]]:
        """Endless training batches of this process from a position on, each with the `position` after its step.

        A step has one kind of media.
        """
        config = self.config.vision_config
        transform = ResizedCropTransform(
            config.image_size,
            self.augmentation.crop_scale,
            flip_probability=self.augmentation.horizontal_flip_probability,
        )
        parts = [
            PairDataset(
                corpus.table,
                corpus.media_type,
                self.data.pair_by,
                transform=transform,
                num_frames=config.num_frames,
                num_tokens=build_grid(config, 1 if corpus.media_type == "image" else None).num_tokens,
                decoder=self.data.decoder or "pyav",
                captions=self.data.captions,
            )
            for corpus in self.corpora
        ]
        plan = plan_mixed_batches(
            [corpus.table for corpus in self.corpora],
            self.batch_sizes,
            self.training.seed,
            StepShape(accelerator.num_processes, accelerator.process_index, self.training.gradient_accumulation_steps),
            position,
        )
        tracked = TrackedPlan(plan)
        loader = build_loader(
            MixedCorpora(parts),
            tracked,
            self.data.dataloader_num_workers,
            collate_fn=PairCollator(transform, accelerator.device.type == "cpu", self.processor),
            pin_memory=accelerator.device.type == "cuda",
            timeout_seconds=self.data.dataloader_timeout_seconds,
            prefetch_factor=self.data.dataloader_prefetch_factor,
        )
        batches = warn_of_single_ids(loader) if accelerator.device.type != "cpu" else loader
        return tracked.track(finish_batch(batch, transform, accelerator.device) for batch in batches)

    def forward_step(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The four losses, each named by the kind of media, which the log keeps apart."""
        return join_video_and_text(self, batch)

    def monitor(self) -> dict[str, float]:
        """The learned temperature of the contrast."""
        # By the end of its name, since DDP and `torch.compile` put prefixes before it.
        (temperature,) = [p for name, p in self.model.named_parameters() if name.endswith("temperature")]
        return {"temperature": temperature.detach().float().mean().item()}

    def evaluate(self, accelerator: Accelerator) -> dict[str, float]:
        """Zero-shot retrieval among the held-out videos and texts."""
        if self.held_out is None:
            return {}
        metrics = evaluate_retrieval(
            cast(UMTVideoTextForPreTraining, accelerator.unwrap_model(self.model)),
            self.processor,
            self.held_out,
            accelerator,
            batch_size=self.training.per_device_eval_batch_size or self.training.per_device_train_batch_size,
            top_k=self.data.rerank_top_k or 1,
            rerank=self.data.rerank_top_k > 0,
            num_workers=self.data.dataloader_num_workers,
            show_progress=not self.training.disable_tqdm,
        )
        return {f"eval_{name}": value for name, value in metrics.items()}

    def export(self, accelerator: Accelerator, folder: Path) -> None:
        """Write the model with processor, resolved arguments and versions; called in all processes."""
        export_run(accelerator, self.model, self.processor, dump_config(self.resolved), folder)


def warn_of_single_ids(batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Pass batches on and say once if one has no negatives: the model does not look at ids that are on a device."""
    is_said = False
    for batch in batches:
        if not is_said and lacks_negatives(batch["pair_ids"], len(batch["pair_ids"])):
            logger.warning("A batch of a single pair id has no negatives: its matching loss is 0.")
            is_said = True
        yield batch


def load_corpora(data: CorpusArguments, training: PretrainingArguments) -> list[Corpus]:
    """Read the corpora; those of one kind and batch size are mixed within batches, as published."""
    groups: dict[tuple[MediaType, int], dict[int, TrainingTable]] = {}
    chosen = choose_shards(data.train_corpora, data.streaming)
    refuse_idle_shuffle(data.shuffle_buffer_size, chosen)
    for number, is_sharded in enumerate(chosen):
        kind = (
            data.get_corpus("media_types", number),
            data.get_corpus("batch_sizes", number) or training.per_device_train_batch_size,
        )
        groups.setdefault(kind, {})[number] = load_corpus(data, number, is_sharded)
    corpora = []
    for kind, tables in groups.items():
        weights = [data.get_corpus("corpus_weights", number) for number in tables]
        corpora.append(Corpus(join_corpora(list(tables.values()), weights), *kind, tables))
    return corpora


def load_corpus(data: CorpusArguments, number: int, is_sharded: bool) -> TrainingTable:
    """Rows of a corpus with `video`, `caption` and `corpus`."""
    source, media_type = data.train_corpora[number], data.get_corpus("media_types", number)
    root = data.get_corpus("data_roots", number)
    sharing = data.train_corpora if len(data.data_roots) == 1 else [source]
    root = share_options(source, sharing, {"data_root": root})["data_root"]
    split = require_split(source, data.get_corpus("train_splits", number), "train", "train_splits")
    # The number becomes a part of the pair ids, see `PairDataset`.
    if is_sharded:
        refuse_idle_options(source, name_kind(source), {"data_root": root})
        return load_shards(
            source,
            split,
            video_column=media_type,
            data_root=root,
            shuffle_rows=data.shuffle_buffer_size,
            needs_captions=True,
            extra={"corpus": number},
        )
    column = media_type if has_effect("video_column", source) else "video"
    rows = load_pairs(source, data.captions, data_root=root, split=split, video_column=column)
    table: Any = rows.select_columns(["video", "caption"])
    return table.add_column("corpus", np.full(len(table), number, np.int16))


def join_corpora(tables: list[TrainingTable], weights: list[float | None]) -> TrainingTable:
    """One table of several whose rows are mixed within batches."""
    listed = [table for table in tables if isinstance(table, Dataset)]
    if len(listed) == len(tables) and weights == [None] * len(tables):
        return concatenate_datasets(listed)
    if len(tables) == 1 and weights == [None]:
        return tables[0]
    return JoinedTable(tables, [1.0 if weight is None else weight for weight in weights])


def build_video_text_student(
    model: VideoTextModelArguments,
    losses: LossArguments,
    recorded: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
) -> UMTVideoTextForPreTraining:
    """Join a stage-1 student and a BERT, or go on from a stage-2 folder.

    Args:
        model: Where weights come from.
        losses: Fields of the configuration.
        recorded: Fields of the video encoder's configuration.
        tokenizer: Of the BERT; its special ids are the text tower's.

    Raises:
        ValueError: If neither a stage-1 nor a stage-2 folder is given, or a folder lacks weights of its part.
    """
    vision_fields = {**recorded, "drop_path_rate": model.drop_path_rate}
    if model.num_frames is not None:
        vision_fields["num_frames"] = model.num_frames
    fields = dataclasses.asdict(losses)
    require_towers(model)
    if model.model_name_or_path:
        config = UMTVideoTextConfig.from_pretrained(locate_model(model.model_name_or_path))
        for target, values in ((config, fields), (config.vision_config, vision_fields)):
            for name, value in values.items():
                setattr(target, name, value)
        student = load_complete_model(UMTVideoTextForPreTraining, model.model_name_or_path, config=config)
    else:
        text_fields = {
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.cls_token_id,
            "eos_token_id": tokenizer.sep_token_id,
            "mask_token_id": tokenizer.mask_token_id,
        }
        if model.fusion_layer is not None:
            text_fields["fusion_layer"] = model.fusion_layer
        # Missing weights of a tower are refused there; the rest is named here.
        with leave_out_load_report():
            joined = UMTVideoTextForPreTraining.from_vision_text_pretrained(
                locate_model(str(model.vision_name_or_path)),
                locate_model(model.text_name_or_path),
                vision_fields=vision_fields,
                text_fields=text_fields,
                projection_dim=model.projection_dim,
                output_loading_info=True,
                **fields,
            )
        student, info = cast("tuple[UMTVideoTextForPreTraining, dict[str, Any]]", joined)
        logger.info("Fresh weights: %s.", describe_fresh(info))
    student.set_attn_implementation(model.attn_implementation)
    for tower, is_checkpointed in (
        (student.vision_model, model.vision_gradient_checkpointing),
        (student.text_model, model.text_gradient_checkpointing),
    ):
        if is_checkpointed:
            tower.gradient_checkpointing_enable()
    return student


def require_towers(model: VideoTextModelArguments) -> None:
    """Refuse folders that stage 2 cannot start from, before anything of them is loaded.

    Raises:
        OSError: If there is no such folder or repository.
        ValueError: If none is given, or one is another kind of folder or model.
    """
    if model.model_name_or_path:
        require_start(model.model_name_or_path, UMTVideoTextForPreTraining.__name__)
    elif model.vision_name_or_path:
        require_start(model.vision_name_or_path, UMTVideoModel.__name__, ALL_CLASSES)
        try:
            require_other_model(model.text_name_or_path, ("bert",), "a BERT, where the text tower starts")
        except OSError as error:
            raise FileNotFoundError(
                f"The text model is missing, give a BERT by --text_name_or_path: {error}"
            ) from error
    else:
        raise ValueError(
            "Set vision_name_or_path, a stage-1 folder, to start stage 2; or model_name_or_path to continue it."
        )


def say_found_corpora(data: CorpusArguments, corpora: list[Corpus], held_out: RetrievalSet | None) -> None:
    """Say what each corpus holds, how it is batched, and what is held out; warn of what is in both."""
    rows = {number: len(table) for corpus in corpora for number, table in corpus.tables.items()}
    found = {
        source: f"{rows[number]:,} {data.get_corpus('media_types', number)}s with captions"
        for number, source in enumerate(data.train_corpora)
    }
    if held_out is not None:
        found["validation"] = count_texts(len(held_out.videos), len(held_out.texts))
    logger.info(join_roles(found))
    for corpus in corpora:
        logger.info(
            "%d rows of %ss, %d per batch", count_epoch_rows(corpus.table), corpus.media_type, corpus.batch_size
        )
    tables = [corpus.table for corpus in corpora if corpus.media_type == "video"]
    videos = (name for table in tables if isinstance(table, Dataset) for name in iterate_names(table))
    for doubt in list_shared(videos, {"validation": name_media(held_out.videos)} if held_out is not None else {}):
        logger.warning(doubt)


@script(SECTIONS)
def main(
    model_args: VideoTextModelArguments,
    teacher_args: TeacherArguments,
    mask_args: ImageMaskArguments,
    loss_args: LossArguments,
    data: CorpusArguments,
    augmentation: CropArguments,
    training: PretrainingArguments,
) -> TrainState:
    """Build and train."""
    if len(names := teacher_args.list_teachers()) > 1:
        raise ValueError(f"Stage 2 aligns with one teacher, and teacher_name_or_path names {len(names)}: give one.")
    parsed = (model_args, teacher_args, mask_args, loss_args, data, augmentation, training)
    convert_named(model_args)
    require_towers(model_args)
    tokenizer_source = require_tokenizer(model_args.model_name_or_path or model_args.text_name_or_path)
    weights = [value for name, value in vars(loss_args).items() if name.endswith("_loss_weight")]

    accelerator = build_accelerator(training, find_unused_parameters=0 in weights)
    with shared_folders():
        corpora = load_corpora(data, training)
    held_out = None
    if (validation := select_data(data, "validation")) is not None:
        source, split = validation
        held_out = load_retrieval_set(
            source,
            data.validation_captions,
            data.multiple_videos_per_text,
            data_root=data.validation_root,
            split=split,
        )
        refuse_missing(name_media(held_out.videos), "validation")
    # Whatever the data rule out, before a model is loaded.
    start = model_args.model_name_or_path or model_args.vision_name_or_path
    for corpus in corpora:
        check_sampling(corpus.table, find_num_frames(model_args.num_frames, start), "middle")
    shape = StepShape(accelerator.num_processes, accumulation_steps=training.gradient_accumulation_steps)
    per_epoch = sum(
        count_steps(corpus.table, corpus.batch_size, shape, corpus.media_type, "batch_sizes") for corpus in corpora
    )
    if accelerator.is_main_process:
        say_found_corpora(data, corpora, held_out)
    schedule = build_schedule(training, per_epoch, accelerator.num_processes)
    teacher, recorded = None, {}
    if loss_args.uta_loss_weight > 0:
        teacher = load_teacher(teacher_args, model_args.attn_implementation, accelerator)
        recorded = describe_alignment(teacher_args, mask_args, teacher)
        recorded["image_mask_ratio"] = mask_args.image_mask_ratio
    lengths = {} if model_args.max_text_tokens is None else {"max_length": model_args.max_text_tokens}
    tokenizer = build_tokenizer(tokenizer_source, **lengths)
    model = build_video_text_student(model_args, loss_args, recorded, tokenizer)
    if teacher is not None:
        check_grids(model.config.vision_config, teacher)
    video_processor = UMTVideoProcessor.from_model_config(model.config, decoder=data.decoder)
    processor = UMTVideoTextProcessor(video_processor, tokenizer)
    resolved = dict(zip(SECTIONS, parsed, strict=True))
    stage = Stage2(model, teacher, processor, corpora, held_out, data, augmentation, training, resolved)
    return train(stage, training, accelerator, schedule, data.max_skipped_ratio, flatten_config(parsed))


if __name__ == "__main__":
    main()
