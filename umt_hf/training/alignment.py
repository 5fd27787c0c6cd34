"""What both pre-training stages need of the frozen teacher: loading it, drawing masks, and its features as targets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from ..inference.starts import require_other_model
from ..modeling.configuration_umt_video import UMTVideoConfig
from ..modeling.masking_umt_video import (
    sample_attention_indices,
    sample_random_indices,
    sample_tube_indices,
)
from ..runs.config import require
from ..teachers.quantization import quantize_teacher, require_quantization
from ..teachers.teacher import (
    OTHER_TEACHERS,
    TEACHER_TYPES,
    TEACHERS,
    VIDEO_TEACHER_TYPES,
    UMTTeacher,
    read_patch_size,
)
from .arguments import MaskArguments, TeacherArguments


@dataclass(frozen=True)
class TokenGrid:
    """Tokens of a clip: frame by frame, row by row."""

    num_frames: int
    patches_per_frame: int

    @property
    def num_tokens(self) -> int:
        """Tokens per clip."""
        return self.num_frames * self.patches_per_frame


def build_grid(config: UMTVideoConfig, num_frames: int | None = None) -> TokenGrid:
    """Grid of an encoder's clips; an image has `num_frames=1`."""
    side = config.image_size // config.patch_size
    return TokenGrid((num_frames or config.num_frames) // config.tubelet_size, side * side)


def load_teacher(
    args: TeacherArguments, attn_implementation: str, accelerator: Accelerator, flag: str = "--teacher_name_or_path"
) -> UMTTeacher:
    """The frozen teacher, the first one of several, on the run's device and in its precision.

    Args:
        args: Which teacher, and which of its layers.
        attn_implementation: Attention of its layers.
        accelerator: Of the run.
        flag: What a user sets it by, for errors.

    Raises:
        OSError: If there is no such folder or repository.
        ImportError: If it is to be quantised and torchao is missing, or the installed Transformers lacks its class.
        ValueError: If it is not a complete model that can teach, or cannot be quantised so on the run's device.
    """
    if args.teacher_quantization is not None:
        require_quantization(args.teacher_quantization, accelerator.device)
    try:
        name = require(args.list_teachers()[0], "teacher_name_or_path")
        name = require_other_model(name, TEACHER_TYPES, f"{TEACHERS}, which the teacher must be")
    except OSError as error:
        raise FileNotFoundError(f"The teacher is missing, give a CLIP, SigLIP or DINO by {flag}: {error}") from error
    return _load_tower(name, args.teacher_image_size, args, attn_implementation, accelerator)


def load_other_teachers(
    args: TeacherArguments, attn_implementation: str, accelerator: Accelerator, first: UMTTeacher
) -> list[UMTTeacher]:
    """The teachers behind the first one, which see as many patches as it does.

    Args:
        args: Which teachers, and which of their layers.
        attn_implementation: Attention of their layers.
        accelerator: Of the run.
        first: Of them all.

    Raises:
        OSError: If there is no such folder or repository.
        ImportError: As for the first.
        ValueError: If one is not a complete model that can teach, or cannot be quantised so on the run's device.
    """
    teachers = []
    for given in args.list_teachers()[1:]:
        types = (*TEACHER_TYPES, *VIDEO_TEACHER_TYPES)
        name = require_other_model(given, types, f"{OTHER_TEACHERS}, which a further teacher must be")
        image_size = first.grid_size * read_patch_size(name)
        teachers.append(_load_tower(name, image_size, args, attn_implementation, accelerator))
    return teachers


def _load_tower(
    name: str, image_size: int | None, args: TeacherArguments, attn_implementation: str, accelerator: Accelerator
) -> UMTTeacher:
    teacher = UMTTeacher.from_pretrained(
        name,
        args.num_aligned_layers,
        args.alignment_interval,
        image_size,
        args.alignment_norm,
        dtype=choose_precision(accelerator),
        attn_implementation=attn_implementation,
    )
    teacher.to(accelerator.device)
    if args.teacher_quantization is not None:
        quantize_teacher(teacher, args.teacher_quantization)
    return teacher


def choose_precision(accelerator: Accelerator) -> torch.dtype:
    """Precision of what is not trained: the run's, wherever it is set; bf16 where matrices are multiplied in fp8."""
    # FSDP may cast weights by another policy.
    policy = getattr(getattr(accelerator.state, "fsdp_plugin", None), "mixed_precision_policy", None)
    if (dtype := getattr(policy, "param_dtype", None)) is not None:
        return dtype
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
    return names.get(accelerator.mixed_precision, torch.float32)


def describe_alignment(
    args: TeacherArguments, mask: MaskArguments, teacher: UMTTeacher, others: Sequence[UMTTeacher] = ()
) -> dict[str, Any]:
    """Fields of the student's configuration that record the run's teachers and mask."""
    name, *other_names = args.list_teachers()
    recorded = [
        {"name_or_path": other_name, "image_size": other.image_size, "hidden_size": other.hidden_size}
        for other_name, other in zip(other_names, others, strict=True)
    ]
    return {
        "mask_type": mask.mask_type,
        "mask_ratio": mask.mask_ratio,
        "num_aligned_layers": args.num_aligned_layers,
        "alignment_interval": args.alignment_interval,
        "alignment_norm": args.alignment_norm,
        "alignment_loss": args.alignment_loss,
        "teacher_name_or_path": name,
        "teacher_image_size": teacher.image_size,
        "teacher_hidden_size": teacher.hidden_size,
        "other_teachers": recorded or None,
        "teacher_weights": args.teacher_weights or None,
    }


def check_grids(config: UMTVideoConfig, teacher: UMTTeacher) -> None:
    """Make sure that student and teacher divide a frame alike, and that a clip fills the teacher's tubelets, if any.

    Raises:
        ValueError: If they do not.
    """
    teacher.require_tubelets(config.num_frames)
    side = config.image_size // config.patch_size
    if side != teacher.grid_size:
        raise ValueError(
            f"The student sees {side} x {side} patches per frame and the teacher {teacher.grid_size} x "
            f"{teacher.grid_size}; set teacher_image_size={side * teacher.patch_size}."
        )


def compute_targets(
    teacher: UMTTeacher,
    pixel_values: torch.Tensor,
    mask_noise: torch.Tensor,
    mask_type: str,
    mask_ratio: float,
    others: Sequence[UMTTeacher] = (),
) -> tuple[torch.Tensor, ...]:
    """Teacher sees all tokens, the mask is drawn, and its features at the visible ones are the student's targets.

    Args:
        teacher: Frozen.
        pixel_values: Clips `(B, T, channels, H, W)`.
        mask_noise: Exponential noise `(B, N)` that came with the clips.
        mask_type: "attention", "tube" or "random".
        mask_ratio: Share of tokens hidden.
        others: Further teachers, which give features alone.

    Returns:
        Indices of the visible tokens `(B, V)` and the features `(K, B, V, C)` of each teacher.
    """
    num_frames = pixel_values.shape[1]
    grid = TokenGrid(num_frames, mask_noise.shape[1] // num_frames)

    def draw(saliency: torch.Tensor) -> torch.Tensor:
        return draw_visible_indices(mask_type, mask_ratio, saliency, mask_noise, grid)

    if mask_type != "random":
        visible, features = teacher.align_visible(pixel_values, draw)
    else:
        # Its frames have unequal numbers of visible tokens, for which the last layer cannot run in one batch.
        states, saliency = teacher.encode(pixel_values)
        visible = draw(saliency)
        features = teacher.project(states, pixel_values.shape[0], visible)
    return visible, features, *(other.compute_features(pixel_values, visible) for other in others)


def draw_visible_indices(
    mask_type: str, mask_ratio: float, saliency: torch.Tensor, noise: torch.Tensor, grid: TokenGrid
) -> torch.Tensor:
    """Indices of the visible tokens `(B, V)`, ascending, drawn from the clips' own noise `(B, N)`."""
    # Noise comes with the clips, so that a mask depends neither on the batch size nor on the number of processes.
    batch, frames, patches = noise.shape[0], grid.num_frames, grid.patches_per_frame
    if mask_type == "random":
        return sample_random_indices(batch, frames * patches, mask_ratio, noise=noise)
    if mask_type == "tube":
        return sample_tube_indices(batch, frames, patches, mask_ratio, noise=noise[:, :patches])
    return sample_attention_indices(saliency, mask_ratio, frames, noise=noise.unflatten(1, (frames, patches)))


def count_visible(mask_type: str, mask_ratio: float, grid: TokenGrid) -> int:
    """Visible tokens per clip."""
    per_draw, draws = grid.patches_per_frame, grid.num_frames
    if mask_type == "random":
        per_draw, draws = grid.num_tokens, 1
    return draws * (per_draw - int(per_draw * mask_ratio))
