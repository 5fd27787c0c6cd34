"""What a clip costs at any size, counted by running the models on tensors that have shapes and no memory."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionModelWithProjection

from benchmarks.stage1_step.workload import Size, build_student_config, build_teacher_config
from umt_hf import UMTVideoForPreTraining
from umt_hf.modeling.configuration_umt_video_text import UMTVideoTextConfig
from umt_hf.modeling.modeling_umt_video_text import UMTVideoTextForPreTraining
from umt_hf.teachers.teacher import UMTTeacher
from umt_hf.training.alignment import compute_targets
from umt_hf.training.reporting.flops import BACKWARD_SHARE, OTHER_ATTENTION

from .loop import count_parameters


@dataclass(frozen=True)
class Text:
    """A text tower and what stage 2 adds.

    Args:
        width: Of the tower.
        layers: Of the tower, with those that fuse.
        heads: Of the tower.
        fusion_layer: First layer that looks at the video.
        tokens: Of a caption.
        frames: Of a clip in stage 2.
        projection: Width in which videos and texts are compared.
        vocabulary: Word pieces.
    """

    width: int
    layers: int
    heads: int
    fusion_layer: int
    tokens: int = 32
    frames: int = 4
    projection: int = 512
    vocabulary: int = 30522


# Those of the recipes.
TEXTS = {"b16": Text(768, 12, 12, 9), "l16": Text(1024, 24, 16, 19, projection=768)}


@dataclass(frozen=True)
class Counts:
    """What a step costs.

    Args:
        parameters: Trained weights.
        root_parameters: Those of them outside embeddings and layers.
        teacher_parameters: Frozen weights.
        largest_layer: Weights of the largest layer.
        student_flops: Of a clip, forward and backward, in stage 2 with the text.
        teacher_flops: Of a clip.
        clip_bytes: Saved for the backward pass per clip.
        copy_bytes: Saved once for all clips of a batch: above all weights in the precision of the products.
    """

    parameters: int
    root_parameters: int
    teacher_parameters: int
    largest_layer: int
    student_flops: float
    teacher_flops: float
    clip_bytes: float
    copy_bytes: float


def count(size: Size, text: Text | None = None, dtype: torch.dtype = torch.bfloat16) -> Counts:
    """Count the step of stage 1, or with a text tower of stage 2, without computing anything.

    Args:
        size: Student and teacher.
        text: What stage 2 adds; `None` = stage 1.
        dtype: Of the products; float32 = no autocast.
    """
    # Values are never looked at: what the models check of them on a CPU is left out, as in a compiled graph.
    with FakeTensorMode(), mock.patch("torch.compiler.is_compiling", lambda: True):
        student = build_student(size, text)
        teacher = build_teacher(size, dtype)
        few, more = (measure_step(student, teacher, make_batch(size, text, clips), dtype) for clips in (2, 3))
        layers = [part for name, part in student.named_modules() if name.split(".")[-2:-1] == ["layers"]]
        parameters, root = count_parameters(student)
    return Counts(
        parameters=parameters,
        root_parameters=root,
        teacher_parameters=sum(weight.numel() for weight in teacher.parameters()),
        largest_layer=max(sum(weight.numel() for weight in layer.parameters()) for layer in layers),
        student_flops=(1 + BACKWARD_SHARE) * (more["student"] - few["student"]),
        teacher_flops=more["teacher"] - few["teacher"],
        clip_bytes=more["saved"] - few["saved"],
        copy_bytes=few["saved"] - 2 * (more["saved"] - few["saved"]),
    )


def build_student(size: Size, text: Text | None) -> Any:
    """The model of a stage at random weights, in training mode."""
    config = build_student_config(size)
    if text is None:
        return UMTVideoForPreTraining._from_config(config, attn_implementation="sdpa").train()
    shorter = {"num_frames": text.frames, "position_embedding_frames": text.frames}
    joined = UMTVideoTextConfig(
        vision_config=config.to_dict() | shorter,
        text_config={
            "vocab_size": text.vocabulary,
            "hidden_size": text.width,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "intermediate_size": 4 * text.width,
            "fusion_layer": text.fusion_layer,
            "encoder_width": size.student.width,
        },
        projection_dim=text.projection,
    )
    return UMTVideoTextForPreTraining._from_config(joined, attn_implementation="sdpa").train()


def build_teacher(size: Size, dtype: torch.dtype) -> UMTTeacher:
    """The frozen teacher at random weights."""
    config = build_teacher_config(size)
    tower = CLIPVisionModelWithProjection._from_config(config, attn_implementation="sdpa", dtype=dtype)
    return UMTTeacher(tower, size.aligned_layers)


def make_batch(size: Size, text: Text | None, clips: int) -> dict[str, torch.Tensor]:
    """A batch of a stage, without values that mean anything."""
    frames, encoder = (size.frames, size.student) if text is None else (text.frames, size.student)
    batch = {
        "pixel_values": torch.zeros(clips, frames, 3, encoder.image_size, encoder.image_size),
        "mask_noise": torch.ones(clips, frames * encoder.patches),
    }
    if text is not None:
        ids = torch.full((clips, text.tokens), 1000 % text.vocabulary)
        batch |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return batch


def measure_step(
    student: Any, teacher: UMTTeacher, batch: dict[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, float]:
    """Operations of both forward passes, and the bytes that the student's keeps for its backward pass."""
    counter = FlopCounterMode(display=False, custom_mapping=OTHER_ATTENTION)
    config = getattr(student.config, "vision_config", student.config)
    texts = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    with counter, autocast(dtype), saved_bytes(student) as read_saved:
        visible, features = compute_targets(
            teacher, batch["pixel_values"], batch["mask_noise"], config.mask_type, config.mask_ratio
        )
        of_teacher = counter.get_total_flops()
        student(
            pixel_values=batch["pixel_values"],
            visible_indices=visible,
            teacher_features=features,
            normalize_teacher_features=False,
            **(texts | {"return_loss": True} if texts else {}),
        )
        saved = read_saved()
    return {"teacher": of_teacher, "student": counter.get_total_flops() - of_teacher, "saved": saved}


def autocast(dtype: torch.dtype) -> AbstractContextManager:
    """Context in which products run in a precision; that of CPUs, whose list of operations is nearly that of GPUs."""
    return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)


@contextmanager
def saved_bytes(model: torch.nn.Module) -> Iterator[Callable[[], int]]:
    """A function that says how much memory the passes within keep for their backward pass, the weights aside."""
    weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, so that no other one gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(storage.nbytes() for storage in kept.values())
