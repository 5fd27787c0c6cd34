"""Models and processors, loaded strictly, and the fingerprint of what shapes their answers."""

import hashlib
import logging
import math
import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from ..modeling import modeling_umt_video, modeling_umt_video_text
from ..processing.processing_umt_video_text import UMTVideoTextProcessor
from ..processing.video_processing_umt_video import UMTVideoProcessor
from ..runs.arguments import KeptTokenArguments
from ..runs.folder import WEIGHTS_FILE
from ..runs.models import MODELS_BY_NAME, ModelClass
from ..runs.noise import leave_out_load_report
from ..teachers.saliency import attach_teacher, load_choosing_teacher
from ..teachers.teacher import TEACHER_TYPES, TEACHERS
from .starts import describe_bad_config, locate_model, require_other_model, require_processor, require_start

logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=PreTrainedModel)
NAMED_WEIGHTS = 5
LOADING_OPTIONS = ("attn_implementation", "device_map", "dtype", "quantization_config", "revision", "token")
MODULES = {module.__name__.rsplit(".", 1)[-1]: module for module in (modeling_umt_video, modeling_umt_video_text)}


@dataclass(frozen=True)
class LoadedModel(Generic[ModelT]):
    """A model, and how its weights and those of its folder differ, by name.

    Attributes:
        model: The model.
        missing: Weights that the folder lacks; they are random.
        unexpected: Weights of the folder that the model does not have.
        mismatched: Weights that the folder holds in another shape; they are random.
        shapes: Of each of those, the shape in the folder and the one that the model needs.
    """

    model: ModelT
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    @property
    def fresh(self) -> tuple[str, ...]:
        """Weights that are random."""
        return tuple(sorted({*self.missing, *self.mismatched}))


def get_model_class(row: ModelClass) -> type[PreTrainedModel]:
    """The class that a row of the table describes."""
    return getattr(MODULES[row.module], row.name)


def find_class_name(model_class: type[PreTrainedModel]) -> str:
    """Name of the class in the table of classes; of one that is not there, that of its nearest base class in it."""
    names = [base.__name__ for base in model_class.__mro__]
    return next((name for name in names if name in MODELS_BY_NAME), names[0])


def load_with_report(
    model_class: type[ModelT], name_or_path: str | os.PathLike, accepted: Collection[str] | None = None, **options: Any
) -> LoadedModel[ModelT]:
    """Load a model, complete or not; see `load_complete_model`.

    Args:
        model_class: Class of the model.
        name_or_path: Folder or Hub id.
        accepted: Classes whose folders will do; default: those that hold all of the model's weights.
        **options: Passed to `from_pretrained`, where `None` leaves a choice to it.

    Raises:
        ValueError: If it is another kind of file, folder or model, or a file of it is damaged.
        OSError: If there is no such folder or repository.
    """
    # Of these, `None` is Transformers' own choice; of a field of the configuration it is a value.
    options = {name: value for name, value in options.items() if value is not None or name not in LOADING_OPTIONS}
    name_or_path = locate_model(name_or_path, **options)
    require_start(name_or_path, find_class_name(model_class), accepted, **options)
    # Wrong shapes are reported by name here; Transformers' own error for them names no weight.
    options["ignore_mismatched_sizes"] = True
    try:
        # The names are returned, and looked at by each caller.
        with leave_out_load_report():
            # Only with `output_loading_info` does it return a pair, which its signature leaves out.
            model, info = cast("Any", model_class.from_pretrained(name_or_path, output_loading_info=True, **options))
    except StrictDataclassError as error:
        raise ValueError(describe_bad_config(name_or_path, error)) from error
    shapes = {
        entry[0]: (tuple(entry[1]), tuple(entry[2])) for entry in info["mismatched_keys"] if not isinstance(entry, str)
    }
    mismatched = [entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]]
    if info["unexpected_keys"] and find_class_name(model_class) in (model.config.architectures or []):
        # Of another class's folder, parts that this one does without are expected.
        names = _list_first(list(_sort(info["unexpected_keys"])))
        logger.warning("%s holds weights that a %s does not have: %s.", name_or_path, model_class.__name__, names)
    return LoadedModel(model, *map(_sort, (info["missing_keys"], info["unexpected_keys"], mismatched)), shapes=shapes)


def describe_fresh(found: Iterable[str] | dict[str, Any]) -> str:
    """Parts of a model whose weights are random, for a log line.

    Args:
        found: Names of weights, or what `from_pretrained` says of them; the layers of a stack become one part.
    """
    names: Iterable[str] = found["missing_keys"] if isinstance(found, dict) else found
    parts = (re.sub(r"\.\d+(?=\.|$)", "", name).rsplit(".", 1)[0] for name in sorted(names))
    return ", ".join(dict.fromkeys(re.sub(r"\.(q|k|v|o)_proj$", "", part) for part in parts)) or "none"


def load_complete_model(
    model_class: type[ModelT],
    name_or_path: str | os.PathLike,
    *,
    attn_implementation: str | None = None,
    dtype: torch.dtype | None = None,
    allowed_fresh: tuple[str, ...] = (),
    accepted: Collection[str] | None = None,
    hint: str = "",
    **options: Any,
) -> ModelT:
    """Load a model with all its weights.

    Anything else is refused by name: a file, another kind of folder, a model of another type or task, one with
    a damaged file, and one that lacks weights or holds them in other shapes.

    Args:
        model_class: Class of the model.
        name_or_path: Folder or Hub id.
        attn_implementation: "sdpa", "eager", ...; default: Transformers' choice.
        dtype: Default: that of the stored weights.
        allowed_fresh: Beginnings of the names of weights that may start random.
        accepted: Classes whose folders will do; default: those that hold all of the model's weights.
        hint: What to do about a folder that is not complete; ends the message.
        **options: Passed to `from_pretrained`.

    Raises:
        ValueError: If the folder lacks weights or is another kind of folder; the first of the weights are named.
        OSError: If there is no such folder or repository.
    """
    loaded = load_with_report(
        model_class, name_or_path, accepted, attn_implementation=attn_implementation, dtype=dtype, **options
    )
    require_weights(loaded, name_or_path, allowed_fresh, hint)
    return loaded.model


def require_weights(
    loaded: LoadedModel, name_or_path: str | os.PathLike, allowed_fresh: tuple[str, ...] = (), hint: str = ""
) -> None:
    """Refuse a model with random weights: they would give an answer too, and nobody would notice.

    Raises:
        ValueError: If weights are fresh, but for those whose names begin with one of `allowed_fresh`.
    """
    # An empty tuple is not the beginning of any name.
    missing, mismatched = (
        [name for name in names if not name.startswith(allowed_fresh)] for names in (loaded.missing, loaded.mismatched)
    )
    faults = []
    if mismatched:
        found = [f"{name}{_describe_shapes(loaded.shapes.get(name))}" for name in mismatched]
        faults.append(f"its {WEIGHTS_FILE} holds in other shapes {_list_first(found)}")
    if missing:
        faults.append(f"it lacks {_list_first(missing)}")
    if not faults and (bad := list_nonfinite_weights(loaded.model)):
        # Not refused: what does not depend on them can still be had, and answers that do are refused one by one.
        logger.warning("%s: weights are NaN or infinite: %s.", name_or_path, _list_first(bad))
    if not faults and loaded.fresh:
        logger.info("Fresh weights: %s.", describe_fresh(loaded.fresh))
    if faults:
        raise ValueError(
            f"{name_or_path} is not a complete {type(loaded.model).__name__.lstrip('_')}: {'; '.join(faults)}."
            f"{hint and f' {hint}'}"
        )


def list_nonfinite_weights(model: torch.nn.Module) -> list[str]:
    """Names of weights that are NaN or infinite; a pass over all of them, some 20 ms for 100 million."""
    # Of one byte are quantised ones, whose values say nothing by themselves.
    return [
        name
        for name, tensor in model.named_parameters()
        if tensor.is_floating_point()
        and tensor.element_size() > 1
        and not tensor.is_meta
        and not bool(torch.isfinite(tensor.detach()).all())
    ]


def _list_first(names: list[str]) -> str:
    rest = f" and {len(names) - NAMED_WEIGHTS} more weights" if len(names) > NAMED_WEIGHTS else ""
    return f"{', '.join(names[:NAMED_WEIGHTS])}{rest}"


def _describe_shapes(shapes: tuple[tuple[int, ...], tuple[int, ...]] | None) -> str:
    return "" if shapes is None else f" {shapes[0]}, which should be {shapes[1]}"


def load_video_processor(name_or_path: str | os.PathLike) -> UMTVideoProcessor:
    """The video processor of a folder or Hub id, alone or out of a processor of videos and texts.

    Raises:
        OSError: If it has none.
        ValueError: If it is another model's.
    """
    name_or_path = locate_model(name_or_path)
    require_processor(name_or_path)
    return cast("UMTVideoProcessor", UMTVideoProcessor.from_pretrained(name_or_path))


def load_video_text_processor(name_or_path: str | os.PathLike) -> UMTVideoTextProcessor:
    """The processor of videos and texts of a folder or Hub id.

    Raises:
        OSError: If it has none.
        ValueError: If it is another model's.
    """
    name_or_path = locate_model(name_or_path)
    require_processor(name_or_path, with_tokenizer=True)
    return UMTVideoTextProcessor.from_pretrained(name_or_path)


def resolve_device(device: str | torch.device | None) -> torch.device:
    """A device by name; default: that of the process, as Accelerate chooses it."""
    return torch.device(cast("torch.device", get_process_state().device) if device is None else device)


def get_process_state() -> PartialState:
    """This process among those of the run, on the CPU where the launcher was asked for that.

    (Whoever asks `PartialState` first decides for all: without the variable each process would be alone.)
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def place_model(model: ModelT, device: torch.device, dtype: torch.dtype | None = None) -> ModelT:
    """The model in evaluation mode, on a device, and in another precision than that of its weights if asked."""
    # The signature of Transformers' `to` is lost to type checkers behind a decorator.
    return cast("Any", model.eval()).to(device, **({} if dtype is None else {"dtype": dtype}))


def keep_tokens(model: PreTrainedModel, tokens: KeptTokenArguments | None = None) -> dict[str, Any] | None:
    """Set which tokens a model's video encoder sees, and give it the teacher that chooses them.

    Args:
        model: With a video encoder.
        tokens: What is asked for; default, also of each field: what the model's configuration says.

    Returns:
        What makes its answers others than those from all tokens, for the record; `None` where it sees all.

    Raises:
        OSError: If the teacher is not there.
        ValueError: If the choice needs a teacher and has none, or has one that it does not need.
    """
    tokens, config = tokens or KeptTokenArguments(), cast("Any", model.config)
    for name in ("keep_ratio", "token_selector"):
        if (value := getattr(tokens, name)) is not None:
            setattr(config, name, value)
    teacher = tokens.teacher_name_or_path
    is_chosen = config.keep_ratio < 1 and config.token_selector == "teacher_saliency"
    if is_chosen != (teacher is not None):
        raise ValueError(
            "token_selector=teacher_saliency needs the teacher that chooses the tokens: set teacher_name_or_path."
            if is_chosen
            else "teacher_name_or_path is for token_selector=teacher_saliency with a keep_ratio below 1: set both."
        )
    if teacher is not None:
        vision = getattr(config, "vision_config", config)
        source = require_other_model(teacher, TEACHER_TYPES, f"{TEACHERS}, which the teacher must be")
        attach_teacher(model, load_choosing_teacher(source, vision.image_size // vision.patch_size))
    return describe_kept_tokens(config, teacher)


def describe_kept_tokens(config: Any, teacher: str | None = None) -> dict[str, Any] | None:
    """Which tokens an encoder sees, for the record; `None` where it sees all.

    Args:
        config: The model's.
        teacher: Name of the one that chooses them.
    """
    if config.keep_ratio == 1:
        return None
    record = {name: getattr(config, name) for name in ("keep_ratio", "token_selector", "token_selector_seed")}
    if teacher is not None:  # a folder is the same one from wherever the next command starts
        record["teacher_name_or_path"] = os.path.abspath(teacher) if os.path.isdir(teacher) else teacher
    return record


def list_class_names(config: PreTrainedConfig) -> list[str]:
    """Names of a model's classes, in their order."""
    names = cast("dict[int, str]", config.id2label)
    return [names[i] for i in range(len(names))]


def _sort(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(map(str, names)))


# Settings of a video processor that change the pixels a model sees.
PIXEL_SETTINGS = (
    "size", "crop_size", "do_resize", "do_center_crop", "do_rescale", "do_normalize", "resample", "rescale_factor",
    "image_mean", "image_std", "sampling_strategy", "frame_stride",
)  # fmt: skip
FINGERPRINT_VALUES = 4096


def compute_fingerprint(model: torch.nn.Module, left_out: Iterable[str] = ()) -> str:
    """Fingerprint of weights, from the names, shapes and up to 4096 evenly spread values of all tensors.

    Args:
        model: Its state dict is read.
        left_out: Names of tensors that do not count.

    Returns:
        32 hexadecimal digits, the same on every machine.
    """
    digest, left_out = hashlib.blake2b(digest_size=16), set(left_out)
    for name, tensor in sorted(model.state_dict().items()):
        # Random weights would give another fingerprint at every load.
        if name not in left_out:
            # Spread over the tensor: a fine-tuned model may differ in some of its rows alone.
            stride = max(1, math.ceil(tensor.numel() / FINGERPRINT_VALUES))
            values = tensor.flatten()[::stride].float().cpu().contiguous().numpy()
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + values.tobytes())
    return digest.hexdigest()
