"""Arguments of both pre-training stages: one dataclass per section of a recipe."""

from dataclasses import dataclass
from typing import Any, Literal

from ..runs.config import describe


@dataclass(kw_only=True)
class ModelArguments:
    """The student."""

    model_name_or_path: str | None = describe(None, "Folder or Hub id to continue from; its own sizes then hold.")
    image_size: int = describe(224, "Side of the square clips, in pixels.")
    patch_size: int = describe(16, "Side of a patch, in pixels.")
    num_frames: int = describe(8, "Frames of a clip.")
    hidden_size: int = describe(768, "Width of the encoder.")
    num_hidden_layers: int = describe(12, "Layers of the encoder.")
    num_attention_heads: int = describe(12, "Attention heads of a layer.")
    intermediate_size: int = describe(3072, "Hidden width of the MLP.")
    drop_path_rate: float = describe(0.1, "Stochastic depth of the last layer, in [0, 1).")
    attn_implementation: str = describe(
        "sdpa", "Attention of student and teacher: sdpa, eager, flash_attention_2, ..."
    )
    gradient_checkpointing: bool = describe(False, "Recompute activations in the backward pass to save memory.")


@dataclass(kw_only=True)
class TeacherArguments:
    """The frozen teacher and the alignment with it."""

    teacher_name_or_path: str = describe("openai/clip-vit-base-patch16", "CLIP folder or Hub id.")
    teacher_image_size: int | None = describe(None, "Side of the frames the teacher sees, in pixels; none = its own.")
    num_aligned_layers: int = describe(6, "Layers aligned, counted from the last.")
    alignment_interval: float = describe(1.0, "Step between aligned layers.")
    alignment_norm: Literal["l2", "none"] = describe("l2", "Normalisation of features.")
    alignment_loss: Literal["l2", "mse", "smooth_l1"] = describe("l2", "Distance between features.")


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
class VideoTextModelArguments:
    """Video encoder, text tower and how they are joined."""

    model_name_or_path: str | None = describe(
        None, "Stage-2 folder or Hub id to continue from, instead of both below."
    )
    vision_name_or_path: str | None = describe(None, "Stage-1 folder or Hub id of the video encoder.")
    text_name_or_path: str = describe("google-bert/bert-base-uncased", "Folder or Hub id of a BERT, with tokenizer.")
    fusion_layer: int | None = describe(None, "First text layer that looks at the video; none = 9 of 12, 19 of 24.")
    projection_dim: int = describe(512, "Width of the space in which videos and texts are compared.")
    num_frames: int = describe(4, "Frames of a video.")
    max_text_tokens: int = describe(32, "Tokens of a text, [CLS] included.")
    drop_path_rate: float = describe(0.1, "Stochastic depth of the video encoder's last layer, in [0, 1).")
    attn_implementation: str = describe(
        "sdpa", "Attention of student and teacher: sdpa, eager, flash_attention_2, ..."
    )
    vision_gradient_checkpointing: bool = describe(False, "Recompute the video encoder in the backward pass.")
    text_gradient_checkpointing: bool = describe(False, "Recompute the text tower in the backward pass.")


@dataclass(kw_only=True)
class LossArguments:
    """Weights and laws of the four losses; a loss of weight 0 is not computed."""

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
class CorpusArguments:
    """Corpora of videos and of images, and how they are read; lists have a value for each corpus, or one for all."""

    train_data: list[str] = describe([], "JSON or SQLite lists, or `datasets` names, with captions.")
    media_types: list[str] = describe(["video"], "What a corpus holds: video or image.")
    data_roots: list[str] = describe([], "Folders that relative paths start from; none = the annotations' own.")
    batch_sizes: list[int] = describe(
        [], "Rows a process takes at a time; none = per_device_train_batch_size. Corpora of one kind and size mix."
    )
    captions: Literal["single", "each", "paragraph"] = describe(
        "single", "What a list of captions is: an error, a row for each, or sentences of one text."
    )
    pair_by: Literal["media", "caption"] = describe(
        "media", "What makes rows of a corpus true pairs of each other: the same video or image, or equal captions."
    )
    validation_data: str | None = describe(None, "Held-out videos with captions, to search each other with.")
    validation_root: str | None = describe(None, "Folder that their relative paths start from.")
    validation_captions: Literal["each", "paragraph"] = describe("each", "What a list of captions is there.")
    multiple_videos_per_text: bool = describe(False, "Whether equal held-out captions are one text of several videos.")
    rerank_top_k: int = describe(128, "Candidates that the matching head orders in evaluation; 0 = none.")
    decoder: Literal["pyav", "decord", "torchcodec"] = describe("pyav", "Video reader.")
    crop_scale: list[float] = describe([0.5, 1.0], "Smallest and largest share of a frame's area that is kept.")
    horizontal_flip_probability: float = describe(0.5, "Share of clips that are mirrored.")
    dataloader_num_workers: int = describe(4, "Worker processes that decode, for each training process.")
    max_skipped_ratio: float = describe(0.05, "Share of unreadable videos and images past which the run stops.")

    def __post_init__(self) -> None:
        if not self.train_data:
            raise ValueError("Set train_data: JSON or SQLite lists, or names of datasets, with captions.")
        for name in ("media_types", "data_roots", "batch_sizes"):
            if len(getattr(self, name)) not in (1, len(self.train_data)) and (
                name == "media_types" or getattr(self, name)
            ):
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} values for {len(self.train_data)} corpora: give one for "
                    "each, or one for all."
                )
        if unknown := sorted(set(self.media_types) - {"video", "image"}):
            raise ValueError(f"media_types must be video or image, got {', '.join(unknown)}.")

    def get_corpus(self, name: str, number: int) -> Any:
        """Value of a list for a corpus; `None` where the list is empty."""
        values = getattr(self, name)
        return None if not values else values[number if len(values) > 1 else 0]


@dataclass(kw_only=True)
class DataArguments:
    """Where clips come from and how they are read."""

    train_data: str | None = describe(None, "CSV (path,label), JSON list, folder of videos, or `datasets` name.")
    validation_data: str | None = describe(None, "Held-out videos for the alignment loss, in the same forms.")
    data_root: str | None = describe(None, "Folder that relative paths start from; none = the annotation's own.")
    csv_separator: str = describe(",", "Separator of CSV columns, one character.")
    dataset_config_name: str | None = describe(None, "Configuration of a `datasets` dataset.")
    train_split: str = describe("train", "Split of a `datasets` dataset to train on.")
    validation_split: str | None = describe(None, "Split of the same dataset to validate on.")
    video_column: str = describe("video", "Column of a `datasets` dataset that holds the video.")
    streaming: bool = describe(False, "Stream the dataset instead of downloading it.")
    shuffle_buffer_size: int = describe(1000, "Rows among which a streamed dataset is shuffled.")
    decoder: Literal["pyav", "decord", "torchcodec"] = describe("pyav", "Video reader.")
    sampling_strategy: Literal["segments", "uniform", "middle", "dense"] = describe(
        "segments", "How frames are drawn."
    )
    frame_stride: int = describe(1, "Frames between two of a clip, for dense sampling.")
    crop_scales: list[float] = describe([1.0, 0.875, 0.75, 0.66], "Multi-scale crop sizes, shares of the short side.")
    horizontal_flip_probability: float = describe(0.5, "Share of clips that are mirrored.")
    repeated_augmentation: int = describe(1, "Augmented copies of each decoded clip.")
    dataloader_num_workers: int = describe(4, "Worker processes that decode, for each training process.")
    max_eval_samples: int | None = describe(None, "Held-out videos used at most.")
    max_skipped_ratio: float = describe(0.05, "Share of unreadable videos past which the run stops.")


@dataclass(kw_only=True)
class TrainingArguments:
    """Optimisation, logging and saving; names follow Transformers' own `TrainingArguments`."""

    output_dir: str = describe("outputs/stage1", "Folder of the run: final model, checkpoints, log.")
    seed: int = describe(0, "Fixes weights, data order, augmentation and masks.")
    num_train_epochs: float = describe(200, "Passes over the data.")
    max_steps: int = describe(-1, "Optimizer steps; -1 = by epochs. Needed for streamed data.")
    per_device_train_batch_size: int = describe(64, "Videos a process takes at a time.")
    per_device_eval_batch_size: int | None = describe(
        None, "Videos a process validates at a time; none = as training."
    )
    gradient_accumulation_steps: int = describe(1, "Batches that make an optimizer step.")
    learning_rate: float = describe(1.5e-4, "Peak rate, before scaling.")
    min_learning_rate: float = describe(1e-5, "Last rate, before scaling.")
    warmup_start_learning_rate: float = describe(0.0, "First rate, before scaling.")
    lr_scheduler_type: Literal["cosine_to_minimum", "cosine_above_minimum"] = describe(
        "cosine_to_minimum", "Half a cosine to min_learning_rate, or to 0 and never below it (stage 2)."
    )
    scale_learning_rate: bool = describe(True, "Multiply rates by clips a step / 256, as published.")
    warmup_epochs: float = describe(40, "Passes of linear warm-up.")
    warmup_steps: int = describe(-1, "Steps of linear warm-up; -1 = by epochs.")
    weight_decay: float = describe(0.05, "AdamW decay of matrices.")
    adam_beta1: float = describe(0.9, "AdamW first moment.")
    adam_beta2: float = describe(0.95, "AdamW second moment.")
    adam_epsilon: float = describe(1e-8, "AdamW epsilon.")
    max_grad_norm: float | None = describe(None, "Gradient clipping; none = off.")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = describe(None, "none = as `accelerate` is configured.")
    max_nonfinite_steps: int = describe(20, "Steps in a row with NaN or Inf gradients past which the run stops.")
    logging_steps: int = describe(10, "Steps between log lines.")
    eval_steps: int = describe(-1, "Steps between held-out losses; -1 = only at the end.")
    save_steps: int = describe(1000, "Steps between checkpoints.")
    save_total_limit: int | None = describe(None, "Checkpoints kept; none = all.")
    resume_from_checkpoint: str | None = describe(None, "Checkpoint folder, or `auto` for the run's newest, if any.")
    report_to: str = describe("tensorboard", "Tracker of Accelerate: tensorboard, wandb, ..., or none.")
    push_to_hub: bool = describe(False, "Upload the run to the Hub, in the background.")
    hub_model_id: str | None = describe(None, "Repository; none = the name of output_dir, in your account.")
    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] = describe(
        "every_save",
        "What goes up: the final model; the model at every save; with it the newest checkpoint, as last-checkpoint; "
        "or every checkpoint.",
    )
    hub_private_repo: bool | None = describe(None, "Whether a new repository is private; none = as your account says.")
    hub_token: str | None = describe(None, "Token with write permission; none = HF_TOKEN or `hf auth login`.")
    hub_revision: str | None = describe(None, "Branch, made if it does not exist; none = main.")

    def __post_init__(self) -> None:
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps", "save_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("save_total_limit", "per_device_eval_batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 or none, got {getattr(self, name)}.")
        if self.max_steps == 0 or (self.max_steps < 0 and self.num_train_epochs <= 0):
            raise ValueError("Set max_steps or num_train_epochs to a positive number.")
