"""A teacher that chooses which tokens a video encoder keeps."""

from typing import Any

import torch
from torch import nn

from ..modeling.modeling_umt_video import UMTVideoModel
from .teacher import UMTTeacher, read_patch_size


def load_choosing_teacher(name_or_path: str, grid_size: int, **options: Any) -> UMTTeacher:
    """A teacher that sees frames in as many patches as the video encoder.

    Args:
        name_or_path: Folder or Hub id of a CLIP or another tower that can teach.
        grid_size: Patches on a side of a frame.
        **options: As for [`UMTTeacher.from_pretrained`].

    Raises:
        OSError: If there is no such folder or repository.
        ImportError: If the installed version of Transformers lacks its class.
        ValueError: If it cannot teach, or lacks weights.
    """
    image_size = grid_size * read_patch_size(name_or_path)
    return UMTTeacher.from_pretrained(name_or_path, 1, image_size=image_size, **options)


def attach_teacher(model: nn.Module, teacher: UMTTeacher) -> Any:
    """Give a model the saliency of each clip that its encoder sees, for `token_selector="teacher_saliency"`.

    The teacher does not become a part of the model: it is neither saved nor trained with it.

    Args:
        model: A [`UMTVideoModel`], or a model that has one as `vision_model`.
        teacher: It goes to the device of the clips.

    Returns:
        Handle, whose `remove()` takes the teacher away.
    """
    encoder: Any = model if isinstance(model, UMTVideoModel) else model.vision_model

    def add_saliency(_: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if options.get("saliency") is not None:
            return arguments, options
        pixel_values: torch.Tensor = arguments[0] if arguments else options["pixel_values"]
        weight = next(teacher.parameters())
        if weight.device != pixel_values.device:
            teacher.to(pixel_values.device)
        saliency = teacher.compute_saliency(pixel_values.to(weight.dtype))
        return arguments, {**options, "saliency": saliency}

    return encoder.register_forward_pre_hook(add_saliency, with_kwargs=True)


__all__ = ["attach_teacher", "load_choosing_teacher"]
