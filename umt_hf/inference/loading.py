"""Models and processors, loaded strictly, and the fingerprint of what shapes their answers."""

import hashlib
import math
from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from ..processing.processing_umt_video_text import UMTVideoTextProcessor
from ..runs.arguments import EvaluatedModelArguments, EvaluationDataArguments


def load_whole_model(model_class: type[PreTrainedModel], args: EvaluatedModelArguments) -> PreTrainedModel:
    """The model with all its weights.

    Raises:
        ValueError: If the folder lacks weights: random ones would give a number too.
    """
    model, info = model_class.from_pretrained(
        args.model_name_or_path, attn_implementation=args.attn_implementation, output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError(
            f"{args.model_name_or_path} is no whole {model_class.__name__}: it lacks "
            f"{', '.join(sorted(info['missing_keys'])[:5])}."
        )
    return model


def require_names(model: EvaluatedModelArguments, data: EvaluationDataArguments) -> None:
    """Make sure that model and data are named.

    Raises:
        ValueError: If one of them is not.
    """
    for name, value in (("model_name_or_path", model.model_name_or_path), ("data", data.data)):
        if value is None:
            raise ValueError(f"Set {name}.")


def load_model_and_processor(
    model_class: type[PreTrainedModel], model: EvaluatedModelArguments, data: EvaluationDataArguments
) -> tuple[PreTrainedModel, UMTVideoTextProcessor]:
    """The model with all its weights, and its processor with the settings of the run.

    Raises:
        ValueError: If model or data are not named, or the folder lacks weights.
    """
    require_names(model, data)
    loaded = load_whole_model(model_class, model)
    processor = UMTVideoTextProcessor.from_pretrained(model.model_name_or_path)
    for name in ("num_frames", "first_seconds", "decoder"):
        if (value := getattr(data, name)) is not None:
            setattr(processor.video_processor, name, value)
    if data.max_text_tokens is not None:
        processor.tokenizer.model_max_length = data.max_text_tokens
    return loaded, processor


# Settings of a video processor that change the pixels a model sees.
PIXEL_SETTINGS = (
    "size", "crop_size", "do_resize", "do_center_crop", "do_rescale", "do_normalize", "resample", "rescale_factor",
    "image_mean", "image_std", "sampling_strategy", "frame_stride",
)  # fmt: skip
FINGERPRINT_VALUES = 4096


def compute_fingerprint(model: torch.nn.Module, left_out: Iterable[str] = ()) -> str:
    """Tell weights from others, by the names, shapes and up to 4096 evenly spread values of all tensors.

    Args:
        model: Its state dict is read.
        left_out: Names of tensors that do not count.

    Returns:
        32 hexadecimal digits, the same on every machine.
    """
    digest, left_out = hashlib.blake2b(digest_size=16), set(left_out)
    for name, tensor in sorted(model.state_dict().items()):
        if name not in left_out:
            stride = max(1, math.ceil(tensor.numel() / FINGERPRINT_VALUES))
            values = tensor.flatten()[::stride].float().cpu().contiguous().numpy()
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + values.tobytes())
    return digest.hexdigest()
