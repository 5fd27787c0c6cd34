"""Arguments that several scripts share: each is declared once, in a dataclass that the scripts' sections extend."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from .config import describe, require

TEST_FOLDER, REPORTS_FOLDER = "test", "outputs/evaluation"
PROBES = ("linear_probe", "attentive_probe")


# ---------------------------------------------------------------------------------------------------------- the model
@dataclass(kw_only=True)
class ModelSourceArguments:
    """The model and its attention."""

    model_name_or_path: str | None = describe(
        None, "Folder, Hub id or released checkpoint (`umt-hf zoo`) of the model to train further or to test."
    )
    convert: bool = describe(
        False, "Download and convert a released checkpoint that is not on this machine, once, into the cache."
    )
    attn_implementation: str = describe(
        "sdpa", "Attention of the model, and of its teacher: sdpa, eager, flash_attention_2, ..."
    )


@dataclass(kw_only=True)
class PrecisionArguments:
    """The precision of Accelerate."""

    mixed_precision: Literal["no", "bf16", "fp16"] | None = describe(
        None, "Precision; default: as `accelerate` is configured."
    )


@dataclass(kw_only=True)
class TeacherNameArguments:
    """The frozen teacher."""

    teacher_name_or_path: str | None = describe(
        None, "Folder or Hub id of an image tower: a CLIP, MetaCLIP 2, SigLIP, DINOv2, DINOv3 or TIPSv2."
    )


@dataclass(kw_only=True)
class KeptTokenArguments(TeacherNameArguments):
    """Which tokens of a clip the video encoder sees; the teacher is for one that chooses them."""

    keep_ratio: float | None = describe(
        None,
        "Share of the tokens of each frame that the encoder sees, in (0, 1]: fewer are faster and less accurate; "
        "default: the model's own, which is 1 unless it was saved with another.",
    )
    token_selector: Literal["random", "frame_difference", "teacher_saliency"] | None = describe(
        None,
        "Which tokens are kept: random places, those that change most from frame to frame, or those that a teacher "
        "attends to; default: the model's own, frame_difference.",
    )

    def __post_init__(self) -> None:
        if self.keep_ratio is not None and not 0 < self.keep_ratio <= 1:
            raise ValueError(f"keep_ratio must be above 0 and at most 1, got {self.keep_ratio}.")


@dataclass(kw_only=True)
class EvaluatedModelArguments(ModelSourceArguments, PrecisionArguments, KeptTokenArguments):
    """The model under test, with its processor."""


@dataclass(kw_only=True)
class FrameCountArguments:
    """Length of a clip."""

    num_frames: int | None = describe(None, "Frames of a clip, 1 for images; default: the model's own.")


@dataclass(kw_only=True)
class ClipSizeArguments(FrameCountArguments):
    """Length and side of a clip."""

    image_size: int | None = describe(None, "Side of the square clips, in pixels; default: the model's own.")


@dataclass(kw_only=True)
class TowerSizeArguments:
    """Sizes of a transformer that starts from fresh weights."""

    hidden_size: int = describe(768, "Width of a layer.")
    num_hidden_layers: int = describe(12, "Number of layers.")
    num_attention_heads: int = describe(12, "Attention heads of a layer.")


@dataclass(kw_only=True)
class PatchArguments:
    """Size of a patch."""

    patch_size: int = describe(16, "Side of a patch, in pixels; student and teacher need the same grid.")


@dataclass(kw_only=True)
class EncoderSizeArguments(PatchArguments, TowerSizeArguments):
    """Sizes of a video encoder that starts from fresh weights; a folder brings its own."""

    intermediate_size: int = describe(3072, "Hidden width of the MLP.")


@dataclass(kw_only=True)
class ProjectionArguments:
    """The space that vision and text share."""

    projection_dim: int = describe(512, "Width of the space in which videos or images are compared with texts.")


@dataclass(kw_only=True)
class DropPathArguments:
    """Stochastic depth."""

    drop_path_rate: float = describe(
        0.1, "Stochastic depth of the video encoder's last layer, in [0, 1); 0 where the encoder is frozen."
    )


@dataclass(kw_only=True)
class TrainedPartArguments:
    """Which part of the model is trained."""

    mode: Literal["full", "linear_probe", "attentive_probe", "lora", "dora"] = describe(
        "full",
        "Train everything, low-rank adapters and the heads (lora, dora), or a head alone (probes: classification).",
    )
    lora_rank: int = describe(16, "Rank of the adapters on query and value projections.")
    has_probes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.mode in PROBES and not self.has_probes:
            raise ValueError(f"mode={self.mode} is for classification; choose full, lora or dora.")


# ----------------------------------------------------------------------------------------------------------- the data
@dataclass(kw_only=True)
class ReadingArguments:
    """How videos are read."""

    decoder: Literal["pyav", "decord", "torchcodec"] | None = describe(
        None, "Video reader; default: the one that the model's processor names, pyav for a new one."
    )


@dataclass(kw_only=True)
class SourceArguments(ReadingArguments):
    """Where videos are, and how they are read."""

    data_root: str | None = describe(
        None, "Folder that relative paths start from; default: the annotation file's folder."
    )


@dataclass(kw_only=True)
class NamedDataArguments:
    """The data of a script that reads one set."""

    data: str | None = describe(None, "Data to read: annotation file (CSV, JSON), folder, or `datasets` dataset.")


@dataclass(kw_only=True)
class ValidationDataArguments:
    """Held-out data."""

    validation_data: str | None = describe(
        None, "Held-out data during training: annotation file (CSV, JSON), folder, or `datasets` dataset."
    )


@dataclass(kw_only=True)
class TrainingDataArguments(ValidationDataArguments):
    """Data to train on, and held-out data."""

    train_data: str | None = describe(
        None, "Data to train on: annotation file (CSV, JSON), folder, or `datasets` dataset."
    )


@dataclass(kw_only=True)
class TestDataArguments:
    """Data for the last test."""

    test_data: str | None = describe(None, "Data scored once, after training, in the same forms.")


@dataclass(kw_only=True)
class ClassNameArguments:
    """Names of the classes."""

    class_names: str | None = describe(
        None,
        "File of the classes' names: text (a name per line), CSV (index and name), or JSON (a list, index -> name or "
        "name -> index); default: what the data say.",
    )


@dataclass(kw_only=True)
class SkippingArguments:
    """What an unreadable video does to a run."""

    max_skipped_ratio: float = describe(0.05, "Share of unreadable videos above which the run stops with an error.")


@dataclass(kw_only=True)
class WorkerArguments:
    """Processes that read."""

    dataloader_num_workers: int | None = describe(
        None,
        "Worker processes that decode, for each process; default: its share of the machine's cores, from 1 to 4; "
        "0: none.",
    )


@dataclass(kw_only=True)
class TimedWorkerArguments(WorkerArguments):
    """Processes that read, and how long they may take."""

    dataloader_timeout_seconds: int = describe(
        600, "Seconds that worker processes may give nothing before the run ends and names the videos; 0: never."
    )

    def __post_init__(self) -> None:
        if self.dataloader_timeout_seconds < 0:
            raise ValueError(f"dataloader_timeout_seconds must be at least 0, got {self.dataloader_timeout_seconds}.")


@dataclass(kw_only=True)
class ReadAheadArguments(TimedWorkerArguments):
    """Processes that read beside the training."""

    dataloader_prefetch_factor: int | None = describe(
        None, "Batches that each worker process reads ahead; default: 2. They lie in shared memory."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataloader_prefetch_factor is not None and self.dataloader_prefetch_factor < 1:
            raise ValueError(f"dataloader_prefetch_factor must be at least 1, got {self.dataloader_prefetch_factor}.")
        if self.dataloader_prefetch_factor is not None and self.dataloader_num_workers == 0:
            raise ValueError("dataloader_prefetch_factor has no effect with dataloader_num_workers=0: leave it out.")


@dataclass(kw_only=True)
class CSVArguments:
    """How CSV files are written."""

    csv_separator: str | None = describe(
        None, "Separator of CSV columns, one character; default: found among comma, tab, semicolon and space."
    )


@dataclass(kw_only=True)
class DatasetArguments:
    """Which part of a `datasets` dataset is read."""

    dataset_config_name: str | None = describe(None, "Configuration of a `datasets` dataset.")
    video_column: str = describe("video", "Column that holds the video; `image` for images.")


@dataclass(kw_only=True)
class ValidationSplitArguments:
    """Which split of a `datasets` dataset is validated on."""

    validation_split: str | None = describe(
        None,
        "Split of validation_data to validate on, where that is a `datasets` dataset; of train_data, where "
        "validation_data is not given. Default: validation.",
    )


@dataclass(kw_only=True)
class SplitArguments(DatasetArguments, ValidationSplitArguments):
    """Which splits of a `datasets` dataset are trained and validated on."""

    train_split: str = describe("train", "Split of train_data to train on, where that is a `datasets` dataset.")


@dataclass(kw_only=True)
class TestSplitArguments(SplitArguments):
    """Which splits of a `datasets` dataset are trained, validated and tested on."""

    test_split: str | None = describe(
        None,
        "Split of test_data to test on, where that is a `datasets` dataset; of train_data, where test_data is not "
        "given. Default: test.",
    )


@dataclass(kw_only=True)
class HeldOutNumberArguments:
    """How many videos are held out."""

    max_eval_samples: int | None = describe(
        None,
        "Largest number of held-out videos: the first ones in pre-training; in a test they are drawn at random, the "
        "same ones each time; default: all.",
    )


@dataclass(kw_only=True)
class TestedSplitArguments(DatasetArguments):
    """Which split of a `datasets` dataset an evaluation reads."""

    split: str = describe("test", "Split of data to test on, where that is a `datasets` dataset.")

    def dataset_options(self) -> dict[str, Any]:
        """Arguments of `load_videos` that choose the split."""
        return {"config_name": self.dataset_config_name, "split": self.split, "video_column": self.video_column}


@dataclass(kw_only=True)
class SamplingArguments:
    """Which frames a clip takes."""

    sampling_strategy: Literal["segments", "uniform", "middle", "dense"] | None = describe(
        None, "How frames are chosen; default: as the model's processor does."
    )


@dataclass(kw_only=True)
class StrideArguments(SamplingArguments):
    """Which frames a clip takes, and how far apart."""

    frame_stride: int | None = describe(
        None, "Frames from one to the next of a dense clip; default: the processor's own."
    )


@dataclass(kw_only=True)
class KeyFrameSamplingArguments(StrideArguments):
    """Which frames around a key frame a clip takes: neighbours, or the middles of equal parts of a span."""

    frame_span: int | None = describe(
        None, "Frames around the key frame that segments are parts of; default: the processor's own."
    )

    def __post_init__(self) -> None:
        if self.sampling_strategy not in (None, "dense", "segments"):
            raise ValueError(f"sampling_strategy={self.sampling_strategy}: around key frames it is dense or segments.")


@dataclass(kw_only=True)
class ClipSpanArguments(FrameCountArguments):
    """How many frames of which part of a video."""

    first_seconds: float | None = describe(
        None, "Use only the first seconds of a video (DiDeMo: 30); default: all of it."
    )


@dataclass(kw_only=True)
class TextLengthArguments:
    """Length of a text."""

    max_text_tokens: int | None = describe(None, "Tokens of a text, [CLS] included; default: the tokenizer's own.")


@dataclass(kw_only=True)
class CaptionArguments:
    """Which videos and captions belong together."""

    captions: Literal["single", "each", "paragraph"] = describe(
        "single", "What a list of captions is: an error, a text for each, or the sentences of one text."
    )
    multiple_videos_per_text: bool = describe(False, "Whether equal captions are one text with several videos (SSv2).")


@dataclass(kw_only=True)
class AnswerLengthArguments:
    """Length of an answer."""

    max_answer_tokens: int = describe(5, "Tokens of an answer, [CLS] and [SEP] included.")


@dataclass(kw_only=True)
class EvaluationDataArguments(
    NamedDataArguments,
    SourceArguments,
    TestedSplitArguments,
    ClipSpanArguments,
    TextLengthArguments,
    TimedWorkerArguments,
):
    """Held-out videos with texts and how they are read; what is left out is taken from the model's processor."""

    def source_options(self) -> dict[str, Any]:
        """Arguments of `load_videos`."""
        return {"data_root": self.data_root, **self.dataset_options()}


# --------------------------------------------------------------------------------------------------- the augmentation
@dataclass(kw_only=True)
class FlipArguments:
    """Mirroring."""

    horizontal_flip_probability: float = describe(
        0.5, "Share of training clips that are mirrored; 0 where left and right matter."
    )


@dataclass(kw_only=True)
class CropArguments(FlipArguments):
    """Crops of a share of the frame, and mirroring."""

    crop_scale: list[float] = describe(
        [0.5, 1.0], "Smallest and largest share of a frame's area that a training crop keeps."
    )


@dataclass(kw_only=True)
class RepeatArguments:
    """Copies of a clip."""

    repeated_augmentation: int = describe(1, "Augmented copies of each decoded clip.")


@dataclass(kw_only=True)
class ProgressArguments:
    """What is shown while a script runs."""

    disable_tqdm: bool = describe(False, "Show no progress bars.")


# ----------------------------------------------------------------------------------------------------- the evaluation
@dataclass(kw_only=True)
class ReportArguments(ProgressArguments):
    """How much at a time, and where the report goes."""

    output_dir: str | None = describe(
        None,
        "Folder for report.json (and predictions.json); default: test in the model's folder, or "
        "outputs/evaluation/NAME where that is not a folder that can be written.",
    )
    per_device_eval_batch_size: int = describe(32, "Videos, texts or pairs that a process takes at a time.")

    def __post_init__(self) -> None:
        if self.per_device_eval_batch_size < 1:
            raise ValueError(f"per_device_eval_batch_size must be at least 1, got {self.per_device_eval_batch_size}.")

    @property
    def report_folder(self) -> str:
        """The folder, once it is chosen."""
        return require(self.output_dir, "output_dir")

    def choose_output_dir(self, model: str) -> None:
        """Fill in the folder of the report where none is given, so that models do not overwrite each other's.

        Args:
            model: Folder or Hub id of the tested model; its card takes the figures of a report in its folder.
        """
        if self.output_dir is None:
            own = Path(model)
            is_ours = own.is_dir() and os.access(own, os.W_OK)
            name = own.resolve().name if own.is_dir() else model.strip("/").replace("/", "--")
            self.output_dir = str(own / TEST_FOLDER if is_ours else Path(REPORTS_FOLDER, name))


@dataclass(kw_only=True)
class ViewArguments:
    """Views of each tested video."""

    num_clips: int = describe(4, "Clips of a tested video; published: 4, Something-Something 2.")
    num_crops: int = describe(3, "Crops of a tested clip.")


@dataclass(kw_only=True)
class RerankingArguments:
    """What the matching head does in retrieval."""

    rerank_top_k: int = describe(128, "Candidates of each query that the matching head ranks again; 0 = off.")


@dataclass(kw_only=True)
class AnswerArguments:
    """How questions are answered."""

    answers: str | None = describe(
        None, "JSON list of the possible answers; default: answers are generated word by word."
    )
    top_k: int | None = describe(
        None, "Answers of the list that are scored in full; default: 128, as published, or all of a shorter list."
    )


# ------------------------------------------------------------------------------------------------------- the training
@dataclass(kw_only=True)
class DivergenceArguments:
    """When a run that diverges stops."""

    max_nonfinite_steps: int = describe(
        20,
        "Steps in a row with NaN or Inf gradients after which the run stops, or half of its steps if that is fewer; "
        "such steps change no weight.",
    )

    def __post_init__(self) -> None:
        if self.max_nonfinite_steps < 0:
            raise ValueError(f"max_nonfinite_steps must be at least 0, got {self.max_nonfinite_steps}.")


@dataclass(kw_only=True)
class WarmupArguments:
    """Length of the warm-up."""

    warmup_epochs: float = describe(1.0, "Epochs of linear warm-up, unless warmup_steps is given.")


@dataclass(kw_only=True)
class ScaledScheduleArguments(WarmupArguments):
    """Published schedule of video encoders: rates for 256 clips per step."""

    min_learning_rate: float = describe(1e-6, "Last learning rate, before scaling.")
    warmup_start_learning_rate: float = describe(1e-6, "First learning rate, before scaling.")
    scale_learning_rate: bool = describe(
        False, "Multiply learning rates by the clips per step / 256, as published for video encoders."
    )
