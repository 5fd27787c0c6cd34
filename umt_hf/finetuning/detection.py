r"""Fine-tune a UMT encoder to detect actions in given boxes, with the Hugging Face `Trainer`.

    umt-hf finetune detection --model_name_or_path outputs/umt-vit-b16 \
        --train_data train.json --validation_data validation.json \
        --output_dir outputs/detector
    umt-hf finetune detection --config detection_ava:b16 --data_root videos/ava

Source: Li et al., "Unmasked Teacher", ICCV 2023, section 4, and the published settings for AVA.
"""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import set_seed

from ..data.key_frames import KeyFrame, build_key_frame_table, load_key_frames
from ..evaluation.detection import (
    DetectionData,
    TestedBoxArguments,
    compute_detection_metrics,
    detect_actions,
    load_detection_data,
)
from ..evaluation.found import count_key_frames, join_roles, list_shared, refuse_missing
from ..hub_cards.convert_umt_checkpoint import build_label_maps
from ..hub_cards.label_names import read_label_names
from ..hub_cards.released_names import convert_named
from ..inference.detection import pad_boxes, read_frames, to_shares
from ..inference.loading import load_with_report, require_weights
from ..modeling.configuration_umt_video import UMTVideoConfig
from ..modeling.modeling_umt_video import UMTVideoForActionDetection
from ..processing.detection_transforms import DetectionTransform
from ..processing.video_processing_umt_video import UMTVideoProcessor
from ..runs.arguments import (
    ClassNameArguments,
    ClipSizeArguments,
    DropPathArguments,
    EncoderSizeArguments,
    FlipArguments,
    KeyFrameSamplingArguments,
    ModelSourceArguments,
    SkippingArguments,
    SourceArguments,
    TrainedPartArguments,
    TrainingDataArguments,
)
from ..runs.config import describe, script, set_defaults
from ..runs.mistakes import read_rank
from ..runs.models import ALL_CLASSES
from .best_metric import check_best_metric
from .found_videos import count_videos_of_classes, list_counts, list_dominant
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

FRESH_WEIGHTS = ("classifier.", "vision_model.norm.")


@dataclass(kw_only=True)
class DetectionModelArguments(
    ModelSourceArguments, ClipSizeArguments, EncoderSizeArguments, DropPathArguments, TrainedPartArguments
):
    """The stage-1, classification or detection folder to start from, or the sizes of a fresh encoder."""


@dataclass(kw_only=True)
@set_defaults(decoder="pyav", sampling_strategy="dense", frame_stride=8, frame_span=300)
class KeyFrameArguments(
    TrainingDataArguments,
    TestedBoxArguments,
    ClassNameArguments,
    SourceArguments,
    KeyFrameSamplingArguments,
    SkippingArguments,
):
    """Key frames to train on and to test (AVA's CSV or JSON, or a JSON list), and how clips are taken."""

    short_side: int | None = describe(
        None, "Short side of the frames that are cropped, in pixels; default: 8/7 of image_size."
    )

    def load_test(self, names: Sequence[str]) -> DetectionData:
        """Read the held-out key frames, whose classes are `names`."""
        assert self.validation_data is not None, "Checked where the run is put together."
        return load_detection_data(
            self.validation_data,
            data_root=self.data_root,
            class_names=names,
            label_keys=self.label_keys,
            detector_boxes=self.detector_boxes,
            min_box_score=self.min_box_score,
            ground_truth=self.ground_truth,
            excluded=self.excluded,
            label_map=self.label_map,
        )


@dataclass(kw_only=True)
class DetectionAugmentationArguments(FlipArguments):
    """What happens to training clips; the defaults are the published ones."""

    hue_degrees: float = describe(20.0, "Largest change of a clip's hue; 0 where colours matter.")
    saturation_jitter: float = describe(0.1, "Largest change of its saturation, as a share of the range.")
    value_jitter: float = describe(0.1, "Largest change of its brightness, as a share of the range.")
    min_visible_ratio: float = describe(0.25, "Share of a box that must be in the crop for it to be kept.")
    box_jitter: list[float] = describe(
        [0.2, 0.1, 0.1, 0.05], "Shares of a side by which edges move: x outwards, x inwards, y outwards, y inwards."
    )
    max_boxes: int = describe(100, "Boxes of a clip, drawn at random where there are more.")


SECTIONS = {
    "model": DetectionModelArguments,
    "data": KeyFrameArguments,
    "augmentation": DetectionAugmentationArguments,
    "training": EncoderFinetuningArguments,
}


class BoxedClips(TrainingClips):
    """Clips around key frames with boxes and labels.

    Args:
        table: Rows as `build_key_frame_table` makes them.
        processor: Of the model; gives frames, sampling and decoder.
        transform: Augmentation.
        num_labels: Number of classes.
        seed: Seed of the run.
    """

    def __init__(
        self, table: Dataset, processor: UMTVideoProcessor, transform: DetectionTransform, num_labels: int, seed: int
    ):
        super().__init__(table, seed)
        self.processor, self.transform, self.num_labels = processor, transform, num_labels

    def read_augmented(self, row: dict[str, Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
        """`pixel_values (T, 3, H, W)`, `boxes (M, 4)` in its pixels and `labels (M, num_labels)`."""
        frames = read_frames(self.processor, row["video"], row["key_seconds"], row["key_frame"])
        # Sizes of 0 in the annotations: boxes are stated for the video's own frames.
        shares = to_shares(row["boxes"], row["width"] or frames.shape[-1], row["height"] or frames.shape[-2])
        clip, boxes, kept = self.transform(frames, shares, generator)
        labels = torch.zeros(len(kept), self.num_labels)
        for target, number in zip(labels, kept.tolist(), strict=True):
            target[row["labels"][number]] = 1
        return {"pixel_values": clip, "boxes": boxes, "labels": labels}


def collate_boxed_clips(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Clips with boxes to a batch for the model, with `failures`."""
    boxes = pad_boxes([sample["boxes"] for sample in samples])
    num_labels = samples[0]["labels"].shape[1]
    # As many rows as there are boxes at most, and one where there is none at all.
    targets = [*(sample["labels"] for sample in samples), torch.zeros(1, num_labels)]
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        **boxes,
        "labels": pad_sequence(targets, batch_first=True)[:-1],
        "failures": [line for sample in samples for line in sample["failures"]],
    }


def build_detector(args: DetectionModelArguments, names: list[str]) -> Any:
    """The detector in the asked mode; `id2label` is set from the class names.

    Raises:
        ValueError: If the start is not a UMT model, or lacks weights of its encoder.
    """
    fields: dict[str, Any] = {"drop_path_rate": args.drop_path_rate, **build_label_maps(names)}
    for name in ("num_frames", "image_size"):
        if (value := getattr(args, name)) is not None:
            fields[name] = value
    if args.model_name_or_path is None:
        sizes = {size.name: getattr(args, size.name) for size in dataclasses.fields(EncoderSizeArguments)}
        config = UMTVideoConfig(**sizes, **fields)
        config.position_embedding_frames = config.num_frames
        config.position_embedding_image_size = config.image_size
        model = UMTVideoForActionDetection._from_config(config, attn_implementation=args.attn_implementation)
    else:
        loaded = load_with_report(
            UMTVideoForActionDetection,
            args.model_name_or_path,
            ALL_CLASSES,
            dtype=torch.float32,
            attn_implementation=args.attn_implementation,
            **fields,
        )
        require_weights(loaded, args.model_name_or_path, FRESH_WEIGHTS)
        model = loaded.model
    return add_adapters(model, args.mode, args.lora_rank, ["vision_model.norm", "classifier"])


def build_box_test(
    data: DetectionData, processor: UMTVideoProcessor, args: KeyFrameArguments, training: EncoderFinetuningArguments
) -> Evaluation:
    """Frame mAP on held-out key frames."""

    def test(model: UMTVideoForActionDetection, accelerator: Accelerator) -> dict[str, float]:
        found = detect_actions(
            model,
            processor,
            data.frames,
            accelerator,
            batch_size=training.per_device_eval_batch_size,
            num_workers=training.dataloader_num_workers,
            show_progress=not training.disable_tqdm,
            max_skipped_ratio=args.max_skipped_ratio,
        )
        return {
            "map50": compute_detection_metrics(data, found)["map50"],
            "unreadable_videos": float(len(found.unreadable)),
        }

    return test


def say_found_frames(frames: Sequence[KeyFrame], held_out: DetectionData, names: Sequence[str]) -> None:
    """Say what was found, and warn of videos on both sides and of a class that nearly all boxes show."""
    described = {"training": count_key_frames(frames), "validation": count_key_frames(held_out.frames)}
    logger.info("%s %s", join_roles(described), describe_box_classes(frames, names))
    labels = [label for frame in frames for own in frame.labels for label in own]
    doubts = list_dominant(labels, sum(len(frame.boxes) for frame in frames), names, "training boxes")
    doubts += list_shared(
        [frame.video for frame in frames], {"validation": [frame.video for frame in held_out.frames]}
    )
    for doubt in doubts:
        logger.warning(doubt)


def describe_box_classes(frames: Sequence[KeyFrame], names: Sequence[str]) -> str:
    """The classes with their numbers of boxes."""
    counts = count_videos_of_classes(own for frame in frames for own in frame.labels)
    return f"{len(names):,} classes: {list_counts(counts, names)}."


def load_training_frames(source: str, data: KeyFrameArguments) -> tuple[list[KeyFrame], list[str]]:
    """Key frames with boxes, and the names of the classes.

    Raises:
        ValueError: If no key frame has a box, or no box a label.
    """
    class_names = None if data.class_names is None else read_label_names(data.class_names)
    frames, names = load_key_frames(source, data.data_root, class_names, data.label_keys)
    frames = [frame for frame in frames if frame.boxes]
    if not frames:
        raise ValueError(f"{source}: no key frame has a box to train on.")
    if not names:
        raise ValueError(
            f"{source}: no box has a label under {', '.join(data.label_keys)}. Name the keys that hold labels, for "
            "example `--label_keys color shape`."
        )
    return frames, names


def build_detection_trainer(
    args: DetectionModelArguments,
    data: KeyFrameArguments,
    augmentation: DetectionAugmentationArguments,
    training: EncoderFinetuningArguments,
) -> EncoderFinetuningTrainer:
    """Data, model, augmentation and test of a run, put together.

    Raises:
        ValueError: If there is no training data, none of its key frames has a box, or `metric_for_best_model` is not
            measured.
    """
    if data.train_data is None or data.validation_data is None:
        raise ValueError("Set train_data and validation_data: AVA's CSV or JSON, or a JSON list of key frames.")
    check_best_metric(training, ["map50"])
    frames, names = load_training_frames(data.train_data, data)
    held_out = data.load_test(names)
    refuse_missing([frame.video for frame in held_out.frames], "validation", data.max_skipped_ratio)
    if read_rank() == 0:
        say_found_frames(frames, held_out, names)
    model = build_detector(args, names)
    side = model.config.image_size
    short_side = data.short_side or side * 8 // 7
    processor = UMTVideoProcessor.from_model_config(
        model.config,
        "detection",
        size={"shortest_edge": short_side},
        sampling_strategy=data.sampling_strategy,
        frame_stride=data.frame_stride,
        frame_span=data.frame_span,
        decoder=data.decoder,
    )
    transform = DetectionTransform(
        side,
        short_side,
        processor.image_mean,
        processor.image_std,
        hue_degrees=augmentation.hue_degrees,
        saturation=augmentation.saturation_jitter,
        value=augmentation.value_jitter,
        flip_probability=augmentation.horizontal_flip_probability,
        min_visible_ratio=augmentation.min_visible_ratio,
        box_jitter=augmentation.box_jitter,
        max_boxes=augmentation.max_boxes,
    )
    return EncoderFinetuningTrainer(
        model=model,
        args=training,
        train_dataset=BoxedClips(build_key_frame_table(frames), processor, transform, len(names), training.seed),
        data_collator=collate_boxed_clips,
        processing_class=processor,
        evaluations={"eval": build_box_test(held_out, processor, data, training)},
        max_skipped_ratio=data.max_skipped_ratio,
        layer_decay=training.layer_decay if args.mode == "full" else 1.0,
    )


@script(SECTIONS)
def main(*sections: Any) -> dict[str, float]:
    """Build, train, test; the detector is saved with its processor.

    Returns:
        Metrics on the held-out key frames.
    """
    convert_named(sections[0])
    set_seed(sections[-1].seed)  # before the model is built: its head is fresh
    metrics = fine_tune(build_detection_trainer(*sections), dict(zip(SECTIONS, sections, strict=True)))
    log_peak_memory()
    return metrics


if __name__ == "__main__":
    main()
