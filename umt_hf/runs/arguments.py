"""Arguments that several scripts share, as dataclasses that others extend."""

from dataclasses import dataclass
from typing import Any, Literal

from .config import describe


@dataclass(kw_only=True)
class EvaluatedModelArguments:
    """The model."""

    model_name_or_path: str | None = describe(None, "Folder or Hub id of the model with its processor.")
    attn_implementation: str = describe("sdpa", "Attention: sdpa, eager, flash_attention_2, ...")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = describe(None, "none = as `accelerate` is configured.")


@dataclass(kw_only=True)
class EvaluationDataArguments:
    """Held-out videos and how they are read; what is left out is as the model's processor says."""

    data: str | None = describe(None, "JSON list, folder of Parquet files, or `datasets` name.")
    data_root: str | None = describe(None, "Folder that relative paths start from; none = the annotation's own.")
    dataset_config_name: str | None = describe(None, "Configuration of a `datasets` dataset.")
    split: str = describe("test", "Split of a `datasets` dataset.")
    video_column: str = describe("video", "Column that holds the video; `image` for images.")
    num_frames: int | None = describe(None, "Frames of a clip; 1 for images.")
    first_seconds: float | None = describe(None, "Sample from a video's first seconds alone (DiDeMo: 30).")
    max_text_tokens: int | None = describe(None, "Tokens of a text, [CLS] included.")
    decoder: Literal["pyav", "decord", "torchcodec"] | None = describe(None, "Video reader.")
    dataloader_num_workers: int = describe(4, "Worker processes that decode, for each process.")

    def source_options(self) -> dict[str, Any]:
        """Arguments of `load_videos`."""
        return {
            "data_root": self.data_root,
            "config_name": self.dataset_config_name,
            "split": self.split,
            "video_column": self.video_column,
        }


@dataclass(kw_only=True)
class ReportArguments:
    """How much at a time, and where the report goes."""

    output_dir: str = describe("outputs/evaluation", "Folder for report.json (and predictions.json).")
    per_device_eval_batch_size: int = describe(32, "Videos, texts or pairs a process takes at a time.")

    def __post_init__(self) -> None:
        if self.per_device_eval_batch_size < 1:
            raise ValueError(f"per_device_eval_batch_size must be at least 1, got {self.per_device_eval_batch_size}.")
