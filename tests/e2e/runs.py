"""Command lines of tiny runs, the folder they start from, and what they leave behind."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.processes import START_METHOD
from umt_hf import UMTVideoConfig, UMTVideoForPreTraining, UMTVideoProcessor, UMTVideoTextProcessor
from umt_hf.modeling.configuration_umt_video_text import UMTVideoTextConfig
from umt_hf.modeling.modeling_umt_video_text import UMTVideoTextForPreTraining
from umt_hf.processing.processing_umt_video_text import build_tokenizer, clean_caption
from umt_hf.runs.folder import read_metrics

# Whether loaders start workers is seen where workers are not forked.
NUM_WORKERS = 1 if os.environ.get(START_METHOD) else 0
# What both stages of pre-training set so that a run is short and exact.
PRETRAINING = {
    "num_frames": 4,
    "num_aligned_layers": 2,
    "drop_path_rate": 0.0,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "scale_learning_rate": False,
    "warmup_steps": 2,
    "max_steps": 4,
    "dataloader_num_workers": NUM_WORKERS,
    "logging_steps": 1,
    "save_steps": 1000,
    "report_to": "none",
    "mixed_precision": "no",
}
# What every fine-tuning script takes from the `Trainer`.
FINE_TUNING = {
    "dataloader_num_workers": NUM_WORKERS,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TINY_CONFIG = {
    "vision_config": {
        "image_size": 64,
        "num_frames": 2,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "num_aligned_layers": 1,
        "teacher_hidden_size": 12,
    },
    "text_config": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "fusion_layer": 2,
        "encoder_width": 32,
        "max_position_embeddings": 40,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "mask_token_id": 4,
    },
    "projection_dim": 16,
}


def to_flags(**fields) -> list[str]:
    """Command line of a script: a flag for each field but those that are `None`, with all values of a list."""
    arguments = []
    for name, value in fields.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            arguments += [f"--{name}", *(str(v).lower() if isinstance(v, bool) else str(v) for v in values)]
    return arguments


def save_student(folder: Path, **changes) -> Path:
    """An untrained stage-1 folder for clips of 64 pixels."""
    torch.manual_seed(0)
    sizes = {"num_frames": 4, "hidden_size": 48, "intermediate_size": 96, "num_aligned_layers": 1} | changes
    config = UMTVideoConfig(
        image_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        position_embedding_frames=sizes["num_frames"],
        position_embedding_image_size=64,
        **sizes,
    )
    UMTVideoForPreTraining(config).save_pretrained(folder)
    return folder


def save_teacher(folder: Path, image_size: int = 64, patch_size: int = 16) -> Path:
    """An untrained CLIP for small clips."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        projection_dim=12,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


def save_video_text_model(folder: Path, shapes: Path) -> Path:
    """An untrained stage-2 model with a tokenizer that knows the words of the moving shapes."""
    captions = [row["caption"] for row in json.loads((shapes / "train_captions.json").read_text())]
    questions = [row["question"] for row in json.loads((shapes / "train_questions.json").read_text())]
    answers = json.loads((shapes / "answers.json").read_text())
    words = sorted({word for text in captions + questions + answers for word in clean_caption(text).split()})
    torch.manual_seed(0)
    config = UMTVideoTextConfig(**TINY_CONFIG)
    config.text_config.vocab_size = len(SPECIAL) + len(words)
    UMTVideoTextForPreTraining(config).save_pretrained(folder)
    UMTVideoTextProcessor(UMTVideoProcessor(num_frames=2), build_tokenizer(SPECIAL + words)).save_pretrained(folder)
    return folder


def read_losses(folder: Path) -> dict[int, float]:
    """Loss of each step of a pre-training run."""
    return {line["step"]: line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line}


def assert_complete(folder: Path, model_class: type) -> dict[str, torch.Tensor]:
    """The folder's weights have the model's own names, and it reloads with them and no others."""
    stored = load_file(folder / "model.safetensors")
    assert not [name for name in stored if "_orig_mod" in name or name.startswith("module.")]
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    state = model.state_dict()
    for name, tensor in stored.items():
        torch.testing.assert_close(state[name], tensor, atol=0, rtol=0, msg=name)
    return stored


def assert_same_weights(one: Path, other: Path, **tolerance) -> None:
    """Compare two folders' weights, to the last bit without a tolerance."""
    one, other = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], **(tolerance or {"atol": 0, "rtol": 0}), msg=name)


def name_fine_tuning_data(shapes: Path, student: Path, stage2: Path) -> dict[str, dict[str, Any]]:
    """Flags of data and model for each script of fine-tuning."""
    return {
        "classification": {
            "train_data": shapes / "train.csv",
            "validation_data": shapes / "train.csv",
            "model_name_or_path": student,
        },
        "detection": {
            "train_data": shapes / "train_boxes.json",
            "validation_data": shapes / "train_boxes.json",
            "label_keys": ["color", "shape"],
            "model_name_or_path": student,
            "short_side": 64,
        },
        "retrieval": {"train_data": shapes / "train_captions.json", "model_name_or_path": stage2},
        "question_answering": {"train_data": shapes / "train_questions.json", "model_name_or_path": stage2},
    }
