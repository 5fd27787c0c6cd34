"""Arguments of both pre-training stages: one dataclass per section of a recipe."""

from dataclasses import dataclass
from typing import Any, Literal

from ..modeling.configuration_umt_video import require_teacher_weights
from ..runs.arguments import (
    CaptionArguments,
    ClipSizeArguments,
    CSVArguments,
    DivergenceArguments,
    DropPathArguments,
    EncoderSizeArguments,
    FlipArguments,
    FrameCountArguments,
    HeldOutNumberArguments,
    ModelSourceArguments,
    PrecisionArguments,
    ProgressArguments,
    ProjectionArguments,
    ReadAheadArguments,
    ReadingArguments,
    RepeatArguments,
    RerankingArguments,
    ScaledScheduleArguments,
    SkippingArguments,
    SourceArguments,
    SplitArguments,
    StrideArguments,
    TeacherNameArguments,
    TextLengthArguments,
    TrainingDataArguments,
    ValidationDataArguments,
    ValidationSplitArguments,
)
from ..runs.config import describe, set_defaults

SHUFFLE_ROWS = 1000


@dataclass(kw_only=True)
@set_defaults(image_size=224, num_frames=8)
class ModelArguments(ModelSourceArguments, ClipSizeArguments, EncoderSizeArguments, DropPathArguments):
    """The student: a folder to continue, with its sizes, or a fresh encoder of these sizes."""

    gradient_checkpointing: bool = describe(False, "Recompute activations in the backward pass to save memory.")


@dataclass(kw_only=True)
@set_defaults(teacher_name_or_path="openai/clip-vit-base-patch16")
class TeacherArguments(TeacherNameArguments):
    """The frozen teacher and the alignment with it; or several teachers, of which the first draws the masks."""

    teacher_name_or_path: str | list[str]  # pyrefly: ignore[bad-override]  elsewhere one teacher chooses tokens
    teacher_weights: list[float] = describe(
        [],
        "Weights of the losses of several teachers: an image tower, and others behind it in teacher_name_or_path, a "
        "VideoMAE or V-JEPA 2 too; default: 1 for each.",
    )
    teacher_image_size: int | None = describe(
        None,
        "Side of the frames that the teacher sees, in pixels; default: its own. Further teachers follow its grid.",
    )
    num_aligned_layers: int = describe(6, "Layers aligned, counted from the last.")
    alignment_interval: float = describe(1.0, "Step between aligned layers.")
    alignment_norm: Literal["l2", "none"] = describe("l2", "Normalisation of features.")
    alignment_loss: Literal["l2", "mse", "smooth_l1"] = describe("l2", "Distance between features.")
    teacher_quantization: Literal["int8_weight_only", "int8_dynamic", "fp8_dynamic"] | None = describe(
        None, "8 bits for the teacher, by torchao; fp8 wants a GPU of compute capability 8.9. Default: off."
    )

    def __post_init__(self) -> None:
        if len(names := self.list_teachers()) == 1:
            self.teacher_name_or_path = names[0]
        if self.teacher_weights:
            if len(names) == 1:
                raise ValueError("teacher_weights is for several teachers, and teacher_name_or_path names one.")
            require_teacher_weights(self.teacher_weights, len(names))

    def list_teachers(self) -> list[str]:
        """Names of all teachers."""
        names = self.teacher_name_or_path
        return names if isinstance(names, list) else [names]


@dataclass(kw_only=True)
class MaskArguments:
    """Which tokens the student does not see."""

    mask_type: Literal["attention", "tube", "random"] = describe("attention", "How hidden tokens are chosen.")
    mask_ratio: float = describe(0.8, "Share of tokens hidden, in [0, 1).")

    def __post_init__(self) -> None:
        if not 0.0 <= self.mask_ratio < 1.0:
            raise ValueError(f"mask_ratio must be in [0, 1), got {self.mask_ratio}.")


@dataclass(kw_only=True)
class ImageMaskArguments(MaskArguments):
    """Which tokens of videos and of images the student does not see."""

    image_mask_ratio: float = describe(0.5, "Share of an image's tokens hidden, in [0, 1).")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.image_mask_ratio < 1.0:
            raise ValueError(f"image_mask_ratio must be in [0, 1), got {self.image_mask_ratio}.")


@dataclass(kw_only=True)
@set_defaults(num_frames=4, max_text_tokens=32)
class VideoTextModelArguments(
    ModelSourceArguments, FrameCountArguments, DropPathArguments, TextLengthArguments, ProjectionArguments
):
    """Video encoder, text tower and how they are joined; or a stage-2 folder to continue."""

    vision_name_or_path: str | None = describe(None, "Stage-1 folder or Hub id of the video encoder.")
    text_name_or_path: str = describe("google-bert/bert-base-uncased", "Folder or Hub id of a BERT, with tokenizer.")
    fusion_layer: int | None = describe(
        None, "First text layer that looks at the video; default: 9 of 12 layers, 19 of 24."
    )
    vision_gradient_checkpointing: bool = describe(False, "Recompute the video encoder in the backward pass.")
    text_gradient_checkpointing: bool = describe(False, "Recompute the text tower in the backward pass.")


@dataclass(kw_only=True)
class LossArguments:
    """Weights and settings of the four losses; a loss of weight 0 is not computed."""

    uta_loss_weight: float = describe(1.0, "Alignment with the teacher. At 0 there is no teacher and no mask.")
    vtc_loss_weight: float = describe(1.0, "Video-text contrast.")
    vtm_loss_weight: float = describe(1.0, "Video-text matching.")
    mlm_loss_weight: float = describe(1.0, "Masked language modelling.")
    vtm_hard_negatives: bool = describe(True, "Draw negatives by their similarity instead of uniformly.")
    mlm_probability: float = describe(0.5, "Share of tokens to be predicted, in (0, 1).")
    contrastive_gather: Literal["exact", "published"] = describe(
        "exact", "Gradients across processes: exact, or the published ones, divided by the number of processes."
    )


@dataclass(kw_only=True)
class StreamArguments:
    """Corpora, shards and streams, and how often each of several corpora is passed over."""

    train_corpora: list[str] = describe(
        [], "Several lists, folders of shards or `datasets` names to train on; in stage 2, with captions."
    )
    corpus_weights: list[float] = describe(
        [], "Passes over each corpus in an epoch: 0.5 takes half of its rows, 2 each row twice; default: 1 for all."
    )
    streaming: bool = describe(False, "Read Parquet files, here or on the Hub, where they are. Tars always are.")
    shuffle_buffer_size: int = describe(
        SHUFFLE_ROWS, "Rows of shards that are shuffled among each other; as many shards as hold them are mixed."
    )


def check_buffer(num_rows: int) -> None:
    """Refuse a number of rows that cannot be mixed.

    Raises:
        ValueError: If it is below 1, at which shards are read in a random order and their rows within each.
    """
    if num_rows < 1:
        raise ValueError(f"shuffle_buffer_size must be at least 1, got {num_rows}; 1 shuffles the rows of each shard.")


def check_weights(weights: list[float], num_corpora: int) -> None:
    """Refuse weights that do not fit the corpora.

    Raises:
        ValueError: If there are others than one for each, or one is not positive.
    """
    if weights and len(weights) != num_corpora:
        raise ValueError(f"corpus_weights has {len(weights)} values for {num_corpora} corpora: give one for each.")
    if any(not 0 < weight < float("inf") for weight in weights):
        raise ValueError(f"corpus_weights must be positive, got {weights}.")


@dataclass(kw_only=True)
@set_defaults(decoder="pyav")
class CorpusArguments(
    ValidationDataArguments,
    ValidationSplitArguments,
    CaptionArguments,
    ReadingArguments,
    RerankingArguments,
    ReadAheadArguments,
    SkippingArguments,
    StreamArguments,
):
    """Corpora of videos and of images, and how they are read; lists have a value for each corpus, or one for all."""

    media_types: list[str] = describe(["video"], "What a corpus holds: video or image.")
    data_roots: list[str] = describe([], "Folders that relative paths start from; default: the annotations' folders.")
    train_splits: list[str] = describe(["train"], "Splits to train on, of corpora that are `datasets` datasets.")
    batch_sizes: list[int] = describe(
        [],
        "Rows that a process takes at a time; default: per_device_train_batch_size. Corpora of one kind and size mix.",
    )
    pair_by: Literal["media", "caption"] = describe(
        "media", "What makes rows of a corpus true pairs of each other: the same video or image, or equal captions."
    )
    validation_root: str | None = describe(
        None, "Folder that relative paths of validation_data start from; default: its own."
    )
    validation_captions: Literal["each", "paragraph"] = describe(
        "each", "What a list of captions in validation_data is: a text for each, or the sentences of one text."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.train_corpora:
            raise ValueError("Set train_corpora: JSON or SQLite lists, or names of datasets, with captions.")
        check_weights(self.corpus_weights, len(self.train_corpora))
        check_buffer(self.shuffle_buffer_size)
        for name in ("media_types", "train_splits", "data_roots", "batch_sizes"):
            if len(getattr(self, name)) not in (1, len(self.train_corpora)) and (
                name in ("media_types", "train_splits") or getattr(self, name)
            ):
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} values for {len(self.train_corpora)} corpora: give one "
                    "for each, or one for all."
                )
        if unknown := sorted(set(self.media_types) - {"video", "image"}):
            raise ValueError(f"media_types must be video or image, got {', '.join(unknown)}.")

    def get_corpus(self, name: str, number: int) -> Any:
        """Value of a list for a corpus; `None` where the list is empty."""
        values = getattr(self, name)
        return None if not values else values[number if len(values) > 1 else 0]


@dataclass(kw_only=True)
@set_defaults(decoder="pyav", sampling_strategy="segments", frame_stride=1)
class DataArguments(
    TrainingDataArguments,
    SourceArguments,
    CSVArguments,
    SplitArguments,
    StrideArguments,
    ReadAheadArguments,
    SkippingArguments,
    StreamArguments,
    HeldOutNumberArguments,
):
    """Where clips come from and how they are read."""

    dataloader_persistent_workers: bool = describe(
        False, "Keep the worker processes of the held-out data between tests; those of the training data always stay."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataloader_persistent_workers and self.dataloader_num_workers == 0:
            raise ValueError(
                "dataloader_persistent_workers has no effect with dataloader_num_workers=0: leave it out."
            )
        if self.train_data is not None and self.train_corpora:
            raise ValueError("Set train_data or train_corpora, not both.")
        check_weights(self.corpus_weights, len(self.train_corpora) or 1)
        check_buffer(self.shuffle_buffer_size)

    def get_weights(self) -> list[float]:
        """Passes over each corpus in an epoch."""
        return self.corpus_weights or [1.0] * max(len(self.train_corpora), 1)


@dataclass(kw_only=True)
class PretrainingAugmentationArguments(FlipArguments, RepeatArguments):
    """What happens to the training clips of stage 1."""

    crop_scales: list[float] = describe([1.0, 0.875, 0.75, 0.66], "Multi-scale crop sizes, shares of the short side.")


@dataclass(kw_only=True)
@set_defaults(min_learning_rate=1e-5, warmup_start_learning_rate=0.0, scale_learning_rate=True, warmup_epochs=40)
class PretrainingArguments(ScaledScheduleArguments, PrecisionArguments, DivergenceArguments, ProgressArguments):
    """Optimisation, logging and saving; names follow Transformers' `TrainingArguments`."""

    output_dir: str = describe("outputs/stage1", "Folder of the run: final model, checkpoints, log.")
    seed: int = describe(0, "Fixes weights, data order, augmentation and masks.")
    num_train_epochs: float = describe(200, "Passes over the data.")
    max_steps: int = describe(-1, "Optimizer steps; -1: by epochs.")
    per_device_train_batch_size: int = describe(64, "Videos that a process takes at a time.")
    per_device_eval_batch_size: int | None = describe(
        None, "Videos that a process validates at a time; default: as in training."
    )
    gradient_accumulation_steps: int = describe(1, "Batches that make an optimizer step.")
    learning_rate: float = describe(1.5e-4, "Peak learning rate, before scaling.")
    lr_scheduler_type: Literal["cosine_to_minimum", "cosine_above_minimum"] = describe(
        "cosine_to_minimum", "Half a cosine to min_learning_rate, or to 0 and never below it (stage 2)."
    )
    warmup_steps: int = describe(-1, "Steps of linear warm-up; -1: by epochs.")
    weight_decay: float = describe(0.05, "AdamW decay of matrices.")
    adam_beta1: float = describe(0.9, "AdamW first moment.")
    adam_beta2: float = describe(0.95, "AdamW second moment.")
    adam_epsilon: float = describe(1e-8, "AdamW epsilon.")
    max_grad_norm: float | None = describe(None, "Norm to which gradients are clipped; default: off.")
    logging_steps: int = describe(10, "Steps between log lines.")
    eval_steps: int = describe(-1, "Steps between held-out losses; -1: only at the end.")
    save_steps: int = describe(1000, "Steps between checkpoints.")
    save_total_limit: int | None = describe(None, "Largest number of checkpoints kept; default: all.")
    resume_from_checkpoint: str | None = describe(None, "Checkpoint folder, or `auto` for the run's newest, if any.")
    allow_schedule_change: bool = describe(
        False, "Resume although the run has another number of steps than the one that wrote the checkpoint."
    )
    ddp_timeout_seconds: int = describe(1800, "Seconds that processes wait for each other before the run ends.")
    preemption_signal: Literal["SIGUSR1", "SIGUSR2"] | None = describe(
        None, "Signal by which a scheduler announces the end; like SIGTERM, the run saves and ends at its next step."
    )
    preemption_exit_code: int = describe(143, "Exit code of a run that a signal has ended after it saved.")
    torch_compile: bool = describe(False, "Compile student and teacher by `torch.compile`.")
    torch_compile_backend: str | None = describe(
        None, "Backend of `torch.compile`; default: inductor. Setting it switches torch_compile on."
    )
    torch_compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = (
        describe(None, "Mode of `torch.compile`. Setting it switches torch_compile on.")
    )
    report_to: str = describe("tensorboard", "Tracker of Accelerate: tensorboard, wandb, ..., or none.")
    profile: bool = describe(
        False, "Write a profile of three steps of the main process, as a Chrome trace, to profile/ in output_dir."
    )
    peak_tflops: float | None = describe(
        None,
        "Peak of a device in 10^12 operations per second, for MFU; default: known for some GPUs in 16 bits.",
    )
    push_to_hub: bool = describe(False, "Upload the run to the Hub, in the background.")
    hub_model_id: str | None = describe(None, "Repository; default: the name of output_dir, in your account.")
    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] = describe(
        "every_save",
        "What is uploaded: the final model; the model at every save; with it the newest checkpoint, as "
        "last-checkpoint; or every checkpoint.",
    )
    hub_private_repo: bool | None = describe(
        None, "Whether a new repository is private; default: your account's setting."
    )
    hub_token: str | None = describe(None, "Token with write permission; default: HF_TOKEN or `hf auth login`.")
    hub_revision: str | None = describe(None, "Branch, created if it does not exist; default: main.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.torch_compile = self.torch_compile or bool(self.torch_compile_backend or self.torch_compile_mode)
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps", "save_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm must be above 0, or none for no clipping, got {self.max_grad_norm}.")
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ValueError(f"peak_tflops must be above 0, got {self.peak_tflops}.")
        for name in ("save_total_limit", "per_device_eval_batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, or none, got {getattr(self, name)}.")
        if self.max_steps == 0 or (self.max_steps < 0 and self.num_train_epochs <= 0):
            raise ValueError("Set max_steps or num_train_epochs to a positive number.")
