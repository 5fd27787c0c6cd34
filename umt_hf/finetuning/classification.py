r"""Fine-tune a UMT encoder to classify videos, with the Hugging Face `Trainer`.

    umt-hf finetune classification --model_name_or_path outputs/umt-vit-b16 \
        --train_data videos/train --validation_data videos/validation \
        --output_dir outputs/classifier
    umt-hf finetune classification --model_name_or_path outputs/umt-vit-b16 \
        --train_data my_dataset --validation_split validation \
        --output_dir outputs/classifier
    umt-hf finetune classification --config classification_k400:b16 \
        --data_root videos/k400

Source: Li et al., "Unmasked Teacher", ICCV 2023, section 4, and the published fine-tuning settings.
"""

import json
import logging
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback, set_seed

from ..data.labels import get_label_names
from ..data.lists.sharing import shared_folders
from ..data.sources import get_source, load_videos
from ..data.splits import select_data, share_options
from ..data.streams import check_stored_frames
from ..data.targets import fit_labels, has_label_lists, list_labels
from ..evaluation.classification import classify_videos, list_metric_names
from ..evaluation.found import list_names, refuse_missing
from ..hub_cards.label_names import read_label_names
from ..hub_cards.released_names import convert_named
from ..inference.labels.scored import MULTI_LABEL
from ..inference.loading import load_complete_model, load_with_report
from ..inference.starts import locate_model
from ..modeling.configuration_umt_video import UMTVideoConfig
from ..modeling.modeling_umt_video import UMTVideoForVideoClassification
from ..processing.classification_transforms import ClassificationTransform, ClipMix
from ..processing.clips import read_clip
from ..processing.video_processing_umt_video import UMTVideoProcessor
from ..runs.arguments import (
    ClassNameArguments,
    ClipSizeArguments,
    CropArguments,
    CSVArguments,
    DropPathArguments,
    ModelSourceArguments,
    RepeatArguments,
    SamplingArguments,
    SkippingArguments,
    SourceArguments,
    TestDataArguments,
    TestSplitArguments,
    TrainedPartArguments,
    TrainingDataArguments,
    ViewArguments,
)
from ..runs.config import REQUIRED, describe, require, script, set_defaults
from ..runs.mistakes import read_rank
from ..runs.models import ALL_CLASSES
from ..training.clips import build_generator
from ..training.trainer import count_videos
from .best_metric import check_best_metric
from .found_videos import describe_found, hold_out, list_doubts
from .trainer import (
    EncoderFinetuningArguments,
    EncoderFinetuningTrainer,
    Evaluation,
    TrainingClips,
    add_adapters,
    fine_tune,
    log_peak_memory,
)

logger = logging.getLogger(__name__)

FRESH_WEIGHTS = ("classifier.", "fc_norm.", "attentive_pooling.")
PROBE_POOLING = {"linear_probe": "mean", "attentive_probe": "attentive"}
AVERAGE_FILE = "averaged_weights.pt"
MIX_KEY = -2  # keeps the draw of a batch's mixing apart from those of its clips


@dataclass(kw_only=True)
@set_defaults(model_name_or_path=REQUIRED)
class ClassificationModelArguments(ModelSourceArguments, ClipSizeArguments, DropPathArguments, TrainedPartArguments):
    """The stage-1 or classification folder to start from, and which part of it is trained."""

    head_rows: str | None = describe(
        None,
        "Rows of the model's head that the classes start from: first, or a JSON list of indices (K710 to "
        "K400/600/700); default: a fresh head where the classes differ.",
    )
    has_probes: ClassVar[bool] = True


@dataclass(kw_only=True)
@set_defaults(train_data=REQUIRED, decoder="pyav", sampling_strategy="uniform")
class ClassificationDataArguments(
    TrainingDataArguments,
    TestDataArguments,
    ClassNameArguments,
    SourceArguments,
    TestSplitArguments,
    CSVArguments,
    SamplingArguments,
    SkippingArguments,
):
    """Labelled videos: a CSV (path,label), a folder with a sub-folder for each class, or a `datasets` dataset."""

    num_classes: int | None = describe(None, "Classes of data without names; default: the highest training label + 1.")
    validation_ratio: float = describe(
        0.0, "Share of the training videos of each class held out where no validation data is given, in [0, 1)."
    )

    def __post_init__(self) -> None:
        if not 0.0 <= self.validation_ratio < 1.0:
            raise ValueError(f"validation_ratio must be in [0, 1), got {self.validation_ratio}.")

    def load(
        self, role: Literal["train", "validation", "test"], names: list[str] | None = None
    ) -> tuple[str, Dataset] | None:
        """Source and rows of a role's data, `None` where there is none; with `names` labels are numbered by them."""
        if (selected := select_data(self, role)) is None:
            return None
        source, split = selected
        options = share_options(
            source,
            (self.train_data, self.validation_data, self.test_data),
            {
                "data_root": self.data_root,
                "csv_separator": self.csv_separator,
                "config_name": self.dataset_config_name,
                "video_column": self.video_column,
            },
        )
        table = load_videos(source, split=split, class_names=names, **options)
        return source, table


@dataclass
class ClassificationData:
    """Videos of a run, whose labels are indices into the classes' names.

    Args:
        train: To train on.
        validation: Held out during training.
        test: Held out for the last test, if any.
        names: Of the classes.
        many_labels: Whether each video has a list of labels.
    """

    train: Dataset
    validation: Dataset
    test: Dataset | None
    names: list[str]
    many_labels: bool


@dataclass(kw_only=True)
class AugmentationArguments(CropArguments, RepeatArguments):
    """What happens to training clips; the defaults are mild, the recipes set the published ones."""

    rand_augment: str | None = describe(
        None, "RandAugment policy, rand-m7-n4-mstd0.5-inc1 as published; default: off."
    )
    crop_ratio: list[float] = describe([0.75, 1.3333], "Smallest and largest ratio of a crop's width to its height.")
    erasing_probability: float = describe(0.0, "Share of clips in which a box is filled with noise.")
    mixup_alpha: float = describe(0.0, "Beta parameter of MixUp; 0 = off.")
    cutmix_alpha: float = describe(0.0, "Beta parameter of CutMix; 0 = off. With both on, each has half the batches.")


@dataclass(kw_only=True)
class ClassificationTrainingArguments(EncoderFinetuningArguments):
    """`TrainingArguments` with the published optimizer, layer decay and schedule."""

    class_weighting: Literal["none", "balanced"] = describe(
        "none", "How much a class counts: all the same, or by the inverse of its number of training videos (balanced)."
    )
    ema_decay: float = describe(0.0, "Decay of averaged weights, which are then tested and saved; 0 = off.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ema_decay and (self.load_best_model_at_end or self.deepspeed or self.fsdp):
            raise ValueError("ema_decay goes with neither load_best_model_at_end, DeepSpeed nor FSDP; set it to 0.")


SECTIONS = {
    "model": ClassificationModelArguments,
    "data": ClassificationDataArguments,
    "augmentation": AugmentationArguments,
    "evaluation": ViewArguments,
    "training": ClassificationTrainingArguments,
}


class LabeledClips(TrainingClips):
    """Clips `(repeats, T, C, H, W)` of videos with labels.

    Args:
        table: Rows with `video` and `label`.
        processor: Of the model; gives frames, sampling and decoder.
        transform: Augmentation.
        seed: Seed of the run.
        repeated_augmentation: Clips made of each video.
    """

    def __init__(
        self,
        table: Dataset,
        processor: UMTVideoProcessor,
        transform: ClassificationTransform,
        seed: int,
        repeated_augmentation: int = 1,
    ):
        check_stored_frames(table, processor.num_frames, processor.sampling_strategy)
        super().__init__(table, seed)
        self.processor, self.transform = processor, transform
        self.repeated_augmentation = repeated_augmentation

    def read_augmented(self, row: dict[str, Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Read frames of a video once, and augment them as often as asked."""
        frames = read_clip(
            get_source(row["video"]),
            self.processor.num_frames,
            self.processor.sampling_strategy,
            generator=generator,
            decoder=self.processor.decoder,
        )
        clips = [self.transform(frames, generator) for _ in range(self.repeated_augmentation)]
        return {"pixel_values": torch.stack(clips)}


class LabelledClipCollator:
    """Labelled clips to a batch, mixed with each other where that is asked for.

    Args:
        mix: MixUp and CutMix, or `None`.
        num_classes: Number of classes, where videos have lists of labels; `None` = each has one.
    """

    def __init__(self, mix: ClipMix | None = None, num_classes: int | None = None):
        self.mix, self.num_classes = mix, num_classes

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """`pixel_values`, `labels` (indices, or targets of each class), `num_videos` and `failures`."""
        # The first clips of all videos, then the second ones: mixing pairs neighbours, which then show two videos.
        pixel_values = torch.stack([sample["pixel_values"] for sample in samples], dim=1).flatten(0, 1)
        repeats = len(pixel_values) // len(samples)
        labels = torch.cat([self.encode([sample["row"]["label"] for sample in samples])] * repeats)
        if self.mix is not None:
            key = [part for sample in samples for part in sample["key"]]
            pixel_values, labels = self.mix(pixel_values, labels, build_generator(MIX_KEY, *key))
        failures = [line for sample in samples for line in sample["failures"]]
        return {"pixel_values": pixel_values, "labels": labels, "num_videos": len(samples), "failures": failures}

    def encode(self, labels: Sequence[Any]) -> torch.Tensor:
        """Class indices `(B,)`, or for lists of labels 1 where a class is shown, `(B, classes)`."""
        if self.num_classes is None:
            return torch.tensor(labels)
        targets = torch.zeros(len(labels), self.num_classes)
        for target, own in zip(targets, labels, strict=True):
            target[own] = 1
        return targets


class ClassificationTrainer(EncoderFinetuningTrainer):
    """`EncoderFinetuningTrainer` with soft targets, class weights and averaged weights.

    Args:
        class_weights: Weight of each class in the loss, or `None`.
        many_labels: Whether labels are targets of each class, from several labels per video.
        **kwargs: As for `EncoderFinetuningTrainer`.
    """

    args: ClassificationTrainingArguments  # pyrefly: ignore[bad-override-mutable-attribute]  narrower than in the base class

    def __init__(self, *, class_weights: torch.Tensor | None = None, many_labels: bool = False, **kwargs: Any):
        super().__init__(**kwargs)
        self.class_weights, self.many_labels = class_weights, many_labels
        self.averaged: AveragedModel | None = None
        self.resumed_from: str | None = None
        if self.args.ema_decay:
            self.add_callback(_AveragingCallback(self))

    # pyrefly: ignore[bad-override]  further arguments differ between versions of Transformers
    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Train; with `ema_decay` the model then has the averaged weights."""
        self.resumed_from = resume_from_checkpoint
        result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self.averaged is not None:
            # What is tested and saved from here on is the average.
            self.model.load_state_dict(self.averaged.module.state_dict())
        return result

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,  # noqa: ARG002 (the base class's signature)
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Cross entropy with indices or soft targets, smoothed by `label_smoothing_factor`.

        With several labels per video it is the binary cross entropy of each class, averaged over classes and clips.

        Raises:
            RuntimeError: If too many videos were unreadable.
        """
        count_videos(self.videos, inputs["failures"], inputs["num_videos"], self.max_skipped_ratio, self.unreadable)
        # Not the model's own loss, which takes neither soft targets nor class weights nor smoothing.
        outputs = model(pixel_values=inputs["pixel_values"])
        logits = outputs.logits.float()
        if self.many_labels:
            loss = nn.functional.binary_cross_entropy_with_logits(logits, inputs["labels"])
            return (loss, outputs) if return_outputs else loss
        weights = None if self.class_weights is None else self.class_weights.to(logits.device)
        loss = nn.functional.cross_entropy(
            logits, inputs["labels"], weight=weights, label_smoothing=self.args.label_smoothing_factor
        )
        return (loss, outputs) if return_outputs else loss

    def complete_checkpoint(self, folder: Path) -> None:
        """Add the average to a checkpoint."""
        super().complete_checkpoint(folder)
        if self.averaged is not None:
            torch.save(self.averaged.state_dict(), folder / AVERAGE_FILE)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Metrics, of the averaged weights where there are any."""
        with self._averaged_model():
            return super().evaluate(*args, **kwargs)

    @contextmanager
    def _averaged_model(self):
        model = self.model
        if self.averaged is not None:
            self.model = self.averaged.module
        try:
            yield
        finally:
            self.model = model


class _AveragingCallback(TrainerCallback):
    """Averages weights after every step."""

    def __init__(self, trainer: ClassificationTrainer):
        self.trainer = trainer

    @property
    def averaged(self) -> AveragedModel:
        assert self.trainer.averaged is not None, "The average starts with the training."
        return self.trainer.averaged

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 (the base class's signature)
        average = get_ema_multi_avg_fn(args.ema_decay)
        self.trainer.averaged = AveragedModel(self.trainer.model, multi_avg_fn=average)
        if self.trainer.resumed_from:
            file = Path(self.trainer.resumed_from) / AVERAGE_FILE
            self.averaged.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 (the base class's signature)
        self.averaged.update_parameters(self.trainer.model)


def build_classifier(args: ClassificationModelArguments, names: list[str], many_labels: bool = False) -> Any:
    """The classifier in the asked mode; `id2label` is set from the class names, `problem_type` from the labels.

    Raises:
        ValueError: If the start is not a UMT model or lacks weights of its encoder, or `head_rows` does not fit it.
    """
    is_frozen = args.mode in PROBE_POOLING
    # Not the start's problem type, which is that of other data.
    fields: dict[str, Any] = {"problem_type": MULTI_LABEL if many_labels else None}
    fields["drop_path_rate"] = 0.0 if is_frozen else args.drop_path_rate
    if is_frozen:
        fields["pooling_type"] = PROBE_POOLING[args.mode]
    for name in ("num_frames", "image_size"):
        if (value := getattr(args, name)) is not None:
            fields[name] = value
    model = load_complete_model(
        UMTVideoForVideoClassification,
        require(args.model_name_or_path, "model_name_or_path"),
        allowed_fresh=FRESH_WEIGHTS,
        accepted=ALL_CLASSES,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        dtype=torch.float32,
        attn_implementation=args.attn_implementation,
        **fields,
    )
    if args.head_rows is not None:
        copy_head_rows(model, args)
    if is_frozen:
        model.vision_model.requires_grad_(False)
    heads = [name for name, _ in model.named_children() if name != "vision_model"]
    return add_adapters(model, args.mode, args.lora_rank, heads)


def copy_head_rows(model: UMTVideoForVideoClassification, args: ClassificationModelArguments) -> None:
    """Start each class with a row of the head that the start has, as published from K710 to K400, K600 and K700.

    Raises:
        ValueError: If there are not as many rows as classes, or the start has no such rows.
    """
    num_classes = model.classifier.out_features
    head_rows, folder = args.head_rows or "first", require(args.model_name_or_path, "model_name_or_path")
    rows = (
        list(range(num_classes))
        if head_rows == "first"
        else json.loads(Path(head_rows).read_text(encoding="utf-8-sig"))
    )
    num_rows = UMTVideoConfig.from_pretrained(locate_model(folder)).num_labels or 0
    if len(rows) != num_classes or not all(isinstance(row, int) and 0 <= row < num_rows for row in rows):
        raise ValueError(
            f"head_rows={args.head_rows}: expected {num_classes} indices below {num_rows}, the rows of the head of "
            f"{args.model_name_or_path}; got {len(rows)}."
        )
    loaded = load_with_report(UMTVideoForVideoClassification, folder, ALL_CLASSES)
    if any(name.startswith("classifier.") for name in loaded.fresh):
        raise ValueError(f"head_rows={args.head_rows}: {args.model_name_or_path} has no classifier to take rows of.")
    start = loaded.model
    with torch.no_grad():
        model.classifier.weight.copy_(start.classifier.weight[rows])
        model.classifier.bias.copy_(start.classifier.bias[rows])


def load_labelled_videos(args: ClassificationDataArguments, seed: int = 0) -> ClassificationData:
    """Read training and held-out videos, whose labels are those of the training classes; say what was found.

    Args:
        args: Where they are.
        seed: Draws the videos that are held out where no validation data is given.

    Raises:
        ValueError: If there is no held-out data or a single class, videos have no labels, or labels that the classes
            do not have, or held-out videos have several labels and training videos one.
    """
    given = None if args.class_names is None else read_label_names(args.class_names)
    if (found := args.load("train", given)) is None:
        raise ValueError("Set train_data: a CSV file, a folder of class folders, or a `datasets` dataset.")
    source, train = found
    labels = list_labels(source, train)
    names = given or get_label_names(train.features)
    if names is None:
        highest = max((label for own in labels for label in own), default=-1)
        names = [f"LABEL_{i}" for i in range(args.num_classes or highest + 1)]
    many_labels = has_label_lists(train)
    if len(names) == 1 and not many_labels:
        raise ValueError(f"{source}: all videos are of one class, {names[0]!r}, so that there is nothing to learn.")
    validation, test = args.load("validation", names), args.load("test", names)
    train = fit_labels(source, train, names, many_labels)
    if validation is not None:
        held_out = fit_labels(*validation, names, many_labels)
    elif args.validation_ratio > 0:
        train, held_out = hold_out(train, args.validation_ratio, seed)
    else:
        raise ValueError(
            "Set validation_data; or validation_ratio, the share of the training videos to hold out; or "
            "validation_split, if train_data is a `datasets` dataset of splits."
        )
    tested = None if test is None else fit_labels(*test, names, many_labels)
    if read_rank() == 0:
        logger.info(describe_found(train, held_out, tested, names))
        roles = {"validation": held_out} | ({} if tested is None else {"test": tested})
        for doubt in list_doubts(train, roles, names):
            logger.warning(doubt)
    return ClassificationData(train, held_out, tested, names, many_labels)


def require_files(videos: ClassificationData, max_skipped_ratio: float) -> None:
    """Refuse held-out data of which more files are missing than its test accepts.

    Raises:
        ValueError: How many there are.
    """
    for role, table in (("validation", videos.validation), ("test", videos.test)):
        if table is not None:
            refuse_missing(list_names(table), role, max_skipped_ratio)


def compute_class_weights(labels: Sequence[int], num_classes: int) -> torch.Tensor:
    """Weights inverse to the classes' numbers of videos, 1 for one of mean size, `(num_classes,)`.

    Raises:
        ValueError: If a class has no training video.
    """
    counts = np.bincount(labels, minlength=num_classes)
    if not counts.all():
        raise ValueError(
            f"class_weighting=balanced: classes {np.flatnonzero(counts == 0).tolist()[:10]} have no training videos."
        )
    return torch.tensor(len(labels) / (num_classes * counts), dtype=torch.float32)


def build_accuracy_test(
    table: Dataset,
    processor: UMTVideoProcessor,
    args: ClassificationDataArguments,
    training: ClassificationTrainingArguments,
    num_clips: int = 1,
    num_crops: int = 1,
) -> Evaluation:
    """Figures on held-out videos, by one view or several."""
    check_stored_frames(table, processor.num_frames, processor.sampling_strategy)

    def test(model: UMTVideoForVideoClassification, accelerator: Accelerator) -> dict[str, float]:
        return classify_videos(
            model,
            processor,
            table["video"],
            table["label"],
            accelerator,
            batch_size=training.per_device_eval_batch_size,
            num_clips=num_clips,
            num_crops=num_crops,
            num_workers=training.dataloader_num_workers,
            show_progress=not training.disable_tqdm,
            max_skipped_ratio=args.max_skipped_ratio,
        ).compute_metrics()

    return test


def check_training_options(training: ClassificationTrainingArguments, videos: ClassificationData) -> None:
    """Refuse, before anything is loaded or trained, options that these labels give no meaning to.

    Raises:
        ValueError: Which option it is.
    """
    check_best_metric(training, list_metric_names(len(videos.names), videos.many_labels))
    if videos.many_labels and (training.class_weighting != "none" or training.label_smoothing_factor):
        raise ValueError(
            "Videos have lists of labels, for which class_weighting=balanced and label_smoothing_factor are not "
            "defined; leave them out. MixUp and CutMix are: they mix the targets of each class as they mix the clips."
        )


def build_classification_trainer(
    args: ClassificationModelArguments,
    data: ClassificationDataArguments,
    augmentation: AugmentationArguments,
    views: ViewArguments,
    training: ClassificationTrainingArguments,
) -> ClassificationTrainer:
    """Data, model, augmentation and tests of a run, put together."""
    with shared_folders():
        videos = load_labelled_videos(data, training.seed)
    names = videos.names
    check_training_options(training, videos)
    require_files(videos, data.max_skipped_ratio)
    model = build_classifier(args, names, videos.many_labels)
    processor = UMTVideoProcessor.from_model_config(
        model.config, sampling_strategy=data.sampling_strategy, decoder=data.decoder
    )
    smallest, largest = augmentation.crop_scale
    narrowest, widest = augmentation.crop_ratio
    transform = ClassificationTransform(
        model.config.image_size,
        (smallest, largest),
        (narrowest, widest),
        augmentation.horizontal_flip_probability,
        augmentation.rand_augment,
        augmentation.erasing_probability,
    )
    mix = None
    if augmentation.mixup_alpha or augmentation.cutmix_alpha:
        mix = ClipMix(len(names), augmentation.mixup_alpha, augmentation.cutmix_alpha)
    tests = {"eval": build_accuracy_test(videos.validation, processor, data, training)}
    if videos.test is not None:
        tests["test"] = build_accuracy_test(videos.test, processor, data, training, views.num_clips, views.num_crops)
    repeats = augmentation.repeated_augmentation
    is_balanced = training.class_weighting == "balanced"
    return ClassificationTrainer(
        model=model,
        args=training,
        train_dataset=LabeledClips(videos.train, processor, transform, training.seed, repeats),
        data_collator=LabelledClipCollator(mix, len(names) if videos.many_labels else None),
        processing_class=processor,
        evaluations=tests,
        max_skipped_ratio=data.max_skipped_ratio,
        layer_decay=training.layer_decay if args.mode == "full" else 1.0,
        class_weights=compute_class_weights(videos.train["label"], len(names)) if is_balanced else None,
        many_labels=videos.many_labels,
        repeated_augmentation=repeats,
    )


@script(SECTIONS)
def main(*sections: Any) -> dict[str, float]:
    """Build, train, evaluate; the classifier is saved with its processor and loads in `pipeline`.

    Returns:
        Metrics on the held-out videos.
    """
    convert_named(sections[0])
    set_seed(sections[-1].seed)  # before the model is built: its head is fresh
    metrics = fine_tune(build_classification_trainer(*sections), dict(zip(SECTIONS, sections, strict=True)))
    log_peak_memory()
    return metrics


if __name__ == "__main__":
    main()
