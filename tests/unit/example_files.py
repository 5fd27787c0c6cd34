"""What the examples in docstrings find in the working directory: a video, folders of videos, and small models.

The models have names, frames and classes of released ones, and random weights; docs/api/models.md says so to readers.
Where an example prints a class or an answer, the bias of the head makes it the same on every machine.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, PreTrainedModel

from umt_hf import (
    UMTVideoConfig,
    UMTVideoForActionDetection,
    UMTVideoForPreTraining,
    UMTVideoForVideoClassification,
    UMTVideoProcessor,
    UMTVideoTextConfig,
    UMTVideoTextForPreTraining,
    UMTVideoTextForQuestionAnswering,
    UMTVideoTextProcessor,
)
from umt_hf.data.ava_labels import AVA_LABELS
from umt_hf.moving_shapes.render import render_clip, sample_clip, write_video
from umt_hf.processing.processing_umt_video_text import SPECIAL_TOKENS, build_tokenizer

ZOOM = 4  # 256 x 256 pixels
VISION = {"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 96, "num_aligned_layers": 2}
TEXT = {"hidden_size": 48, "num_hidden_layers": 3, "fusion_layer": 2, "intermediate_size": 96, "encoder_width": 48}
WORDS = ("a", "blue", "circle", "color", "dog", "green", "is", "red", "ring", "running", "the", "what")
CLASSES = {"a": "dancing ballet", "b": "cooking egg"}
LABELS = ("abseiling", "cooking egg", "dancing ballet", "playing guitar", "riding a bike")


def draw_frames(index: int) -> np.ndarray:
    """24 frames of 256 x 256 pixels."""
    return render_clip(sample_clip(0, "train", index))[0].repeat(ZOOM, axis=1).repeat(ZOOM, axis=2)


def favour(bias: torch.nn.Parameter, row: int) -> None:
    """Let a head always answer with one of its rows."""
    with torch.no_grad():
        bias[row] = 100.0


def save(model: PreTrainedModel, processor: UMTVideoProcessor | UMTVideoTextProcessor, folder: Path) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def write_video_models(folder: Path, vision: dict[str, int]) -> None:
    config = UMTVideoConfig(**vision)
    save(UMTVideoForPreTraining(config), UMTVideoProcessor.from_model_config(config), folder / "umt-vit-b16")

    config = UMTVideoConfig(**vision, id2label=dict(enumerate(LABELS)), label2id={n: i for i, n in enumerate(LABELS)})
    model = UMTVideoForVideoClassification(config)
    favour(model.classifier.bias, LABELS.index("riding a bike"))
    save(model, UMTVideoProcessor.from_model_config(config), folder / "umt-vit-b16-k400")

    names = dict(enumerate(AVA_LABELS))
    config = UMTVideoConfig(**vision, id2label=names, label2id={name: i for i, name in names.items()})
    model = UMTVideoForActionDetection(config)
    favour(model.classifier.bias, AVA_LABELS.index("stand"))
    save(model, UMTVideoProcessor.from_model_config(config, "detection"), folder / "umt-vit-b16-ava")


def write_video_text_models(folder: Path, vision: dict[str, int]) -> None:
    words = [*SPECIAL_TOKENS.values(), *WORDS]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = build_tokenizer(words)
    ids = {
        name: tokenizer.convert_tokens_to_ids(f"[{token}]")
        for name, token in zip(
            ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id"),
            ("PAD", "CLS", "SEP", "MASK"),
            strict=True,
        )
    }
    text = {**TEXT, "vocab_size": len(words), **ids}
    config = UMTVideoTextConfig(vision_config=vision, text_config=text, projection_dim=32)
    processor = UMTVideoTextProcessor(UMTVideoProcessor.from_model_config(config), tokenizer)
    save(UMTVideoTextForPreTraining(config), processor, folder / "umt-vit-b16-25m")
    model = UMTVideoTextForQuestionAnswering(config)
    favour(model.answer_decoder.get_output_embeddings().bias, tokenizer.convert_tokens_to_ids("blue"))
    save(model, processor, folder / "umt-vit-b16-25m-msrvtt-qa")


def write_example_files(folder: Path, image_size: int = 224) -> Path:
    """Write everything that an example may name; its models and teacher see frames of that size."""
    vision = {**VISION, "image_size": image_size}
    torch.manual_seed(0)
    write_video(folder / "video.mp4", draw_frames(0))
    write_video(folder / "video.mkv", draw_frames(0))  # which can be read forwards
    for name, label in CLASSES.items():
        (folder / "videos" / label).mkdir(parents=True)
        for index in range(2):
            write_video(folder / "videos" / label / f"{name}{index}.mp4", draw_frames(index + 1))
    write_video_models(folder, vision)
    write_video_text_models(folder, vision)
    teacher = CLIPVisionConfig(
        image_size=image_size,
        patch_size=16,
        hidden_size=24,
        num_hidden_layers=6,
        num_attention_heads=2,
        intermediate_size=32,
        projection_dim=512,
    )
    CLIPVisionModelWithProjection(teacher).save_pretrained(folder / "openai" / "clip-vit-base-patch16")
    return folder
