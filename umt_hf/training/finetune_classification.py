"""Fine-tune a UMT encoder to classify videos, with the Hugging Face `Trainer`.

    accelerate launch -m umt_hf.training.finetune_classification --model_name_or_path outputs/umt-vit-b16 \
        --train_data videos/train --validation_data videos/validation --output_dir outputs/classifier

Source: Li et al., "Unmasked Teacher", ICCV 2023, section 4.
"""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import EvalPrediction, HfArgumentParser, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..modeling.modeling_umt_video import UMTVideoForVideoClassification
from ..processing.decoding import VideoDecodingError, open_video
from ..processing.sampling import sample_frame_indices
from ..processing.train_transforms import PretrainingTransform
from ..processing.video_processing_umt_video import UMTVideoProcessor
from .data.clips import build_generator
from .data.sources import load_videos
from .metrics.accuracy import TopKAccuracy

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ClassificationArguments:
    """What to fine-tune, and on which videos."""

    model_name_or_path: str = field(metadata={"help": "Stage-1 or classification folder, or Hub id."})
    train_data: str = field(metadata={"help": "CSV (path,label) or folder with a sub-folder for each class."})
    validation_data: str = field(metadata={"help": "Held-out videos in the same form."})
    class_names: str | None = field(default=None, metadata={"help": "JSON object, class index -> name, for a CSV."})
    num_frames: int | None = field(default=None, metadata={"help": "Frames of a clip; none = the encoder's own."})
    mode: Literal["full", "linear_probe", "lora"] = field(
        default="full", metadata={"help": "Train everything, the head alone, or low-rank adapters and the head."}
    )
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapters on query and value projections."})
    data_root: str | None = field(
        default=None, metadata={"help": "Folder that relative paths of a CSV start from; none = the CSV's own."}
    )
    csv_separator: str = field(default=",", metadata={"help": "Separator of CSV columns, one character."})
    decoder: str = field(default="pyav", metadata={"help": "Video reader: pyav, decord or torchcodec."})
    sampling_strategy: str = field(default="uniform", metadata={"help": "How frames are chosen."})
    horizontal_flip_probability: float = field(
        default=0.5, metadata={"help": "Share of clips mirrored in training; 0 where left and right matter."}
    )


class LabeledClips(torch.utils.data.Dataset):
    """Normalised clips with labels: augmented for training, else as `UMTVideoProcessor` makes them.

    A clip's augmentation is drawn from the global random state, as the `Trainer` expects of its data sets.

    Args:
        table: Rows with `video` and `label`.
        processor: Of the model.
        augment: Crop and flip for training; `None` for evaluation.
    """

    def __init__(self, table: Dataset, processor: UMTVideoProcessor, augment: PretrainingTransform | None = None):
        self.table, self.processor, self.augment = table, processor, augment

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`pixel_values (T, C, H, W)` and `labels`.

        Raises:
            VideoDecodingError: If the video cannot be read: a labelled set is to be mended, not guessed at.
        """
        row = self.table[index]
        if self.augment is None:
            pixel_values = self.processor(row["video"], return_tensors="pt")["pixel_values"][0]
        else:
            pixel_values = self._read_augmented(row["video"])
        return {"pixel_values": pixel_values, "labels": row["label"]}

    def _read_augmented(self, video: str) -> torch.Tensor:
        generator = build_generator(int(torch.randint(2**62, ())))
        with open_video(video, self.processor.decoder) as reader:
            indices = sample_frame_indices(
                reader.num_frames, self.processor.num_frames, self.processor.sampling_strategy, generator=generator
            )
            frames = torch.from_numpy(reader.get_frames(indices)).permute(0, 3, 1, 2)
        crop = self.augment.sample(frames.shape[-2], frames.shape[-1], generator)
        return self.augment.resize_and_normalize([self.augment.crop(frames, crop)], [crop.flip])[0]


def build_model(args: ClassificationArguments, names: list[str]) -> Any:
    """The classifier in the asked mode; `id2label` speaks the classes' names."""
    fields = {} if args.num_frames is None else {"num_frames": args.num_frames}
    model = UMTVideoForVideoClassification.from_pretrained(
        args.model_name_or_path,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        ignore_mismatched_sizes=True,
        **fields,
    )
    if args.mode == "linear_probe":
        model.vision_model.requires_grad_(False)
    if args.mode == "lora":
        config = LoraConfig(
            r=args.lora_rank,
            lora_alpha=2 * args.lora_rank,
            target_modules=["q_proj", "v_proj"],
            modules_to_save=["fc_norm", "classifier"],
        )
        model = get_peft_model(model, config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("%s: %s of %s parameters are trained.", args.mode, f"{trained:,}", f"{model.num_parameters():,}")
    return model


def load_labelled_videos(args: ClassificationArguments) -> tuple[Dataset, Dataset, list[str]]:
    """Training videos, held-out videos with the same labels, and the names of the classes.

    Raises:
        ValueError: If videos have no labels, or labels that the classes do not have.
    """
    options = {"data_root": args.data_root, "csv_separator": args.csv_separator}
    train = load_videos(args.train_data, **options)
    names = read_class_names(args, train)
    validation = load_videos(args.validation_data, class_names=names, **options)
    for source, table in ((args.train_data, train), (args.validation_data, validation)):
        if "label" not in table.column_names:
            raise ValueError(f"{source}: no labels; give a CSV (path,label) or one sub-folder for each class.")
        if max(table["label"]) >= len(names):
            raise ValueError(
                f"{source}: label {max(table['label'])} is too high for {len(names)} classes {names[:5]}."
            )
    return train, validation, names


def read_class_names(args: ClassificationArguments, table: Dataset) -> list[str]:
    """Names of the classes, by index: from `class_names`, else the sub-folders' names, else `LABEL_<i>`.

    Raises:
        ValueError: If the videos have no labels, or the file of names is not an object of indices and names.
    """
    if "label" not in table.column_names:
        raise ValueError(f"{args.train_data}: no labels; give a CSV (path,label) or one sub-folder for each class.")
    if args.class_names is not None:
        names = json.loads(Path(args.class_names).read_text())
        if not isinstance(names, dict) or sorted(names) != sorted(str(i) for i in range(len(names))):
            raise ValueError(f'{args.class_names}: expected a JSON object such as {{"0": "run", "1": "jump"}}.')
        return [names[str(i)] for i in range(len(names))]
    folder = Path(args.train_data)
    if folder.is_dir():
        return sorted({Path(video).relative_to(folder).parts[0] for video in table["video"]})
    return [f"LABEL_{i}" for i in range(max(table["label"]) + 1)]


def compute_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Top-1 and top-5 accuracy for the `Trainer`."""
    return TopKAccuracy().compute(
        predictions=np.asarray(prediction.predictions).tolist(), references=prediction.label_ids.tolist()
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Parse, build, train, evaluate; the classifier is saved with its processor and loads in `pipeline`.

    Args:
        arguments: Command line; `None` = the process's own.

    Returns:
        Metrics on the held-out videos.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    parser = HfArgumentParser((ClassificationArguments, TrainingArguments))
    args, training = parser.parse_args_into_dataclasses(sys.argv[1:] if arguments is None else list(arguments))
    training.remove_unused_columns = False

    train_table, validation_table, names = load_labelled_videos(args)
    model = build_model(args, names)
    config = model.config
    processor = UMTVideoProcessor.from_model_config(
        config, sampling_strategy=args.sampling_strategy, decoder=args.decoder
    )
    augment = PretrainingTransform(config.image_size, flip_probability=args.horizontal_flip_probability)
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=LabeledClips(train_table, processor, augment),
        eval_dataset=LabeledClips(validation_table, processor),
        processing_class=processor,
        compute_metrics=compute_accuracy,
    )
    checkpoint = training.resume_from_checkpoint
    if checkpoint == "auto":
        checkpoint = get_last_checkpoint(training.output_dir) if Path(training.output_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    if args.mode == "lora":  # one folder that needs no PEFT to load
        trainer.model = trainer.model.merge_and_unload()
    metrics = trainer.evaluate()
    trainer.save_model()
    trainer.save_metrics("eval", metrics)
    return metrics


if __name__ == "__main__":
    main()

__all__ = ["ClassificationArguments", "LabeledClips", "VideoDecodingError", "main"]
