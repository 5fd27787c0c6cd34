"""What a folder is, and whether a step can start from it: found, and refused by name, before a weight is loaded."""

import difflib
import json
import os
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from ..data.lists.paths import describe_near
from ..modeling.configuration_umt_video import UMTVideoConfig
from ..modeling.configuration_umt_video_text import UMTVideoTextConfig
from ..runs.folder import (
    ADAPTER_CONFIG_FILE,
    CONFIG_FILE,
    EXPORT_FILE,
    IMAGE_PROCESSOR_FILE,
    PROCESSOR_FILE,
    TOKENIZER_FILE,
    VIDEO_PROCESSOR_FILE,
    WEIGHTS_FILE,
    WEIGHTS_INDEX_FILE,
)
from ..runs.hub_access import find_on_hub
from ..runs.model_names import find_released
from ..runs.models import ALL_CLASSES, COMPLETE_FOR, MODEL_TYPES, MODELS_BY_NAME, TRAINED_BY, ModelClass
from ..runs.scripts import SCRIPTS_BY_MODULE
from ..teachers.teacher import NO_TEACHERS, TEACHER_TYPES, VIDEO_TEACHER_TYPES
from ..zoo import ZooEntry, load_zoo

# Models of others that a run does use, and where.
OTHER_PLACES = {
    **dict.fromkeys(TEACHER_TYPES, "such an image tower is a teacher: --teacher_name_or_path"),
    **dict.fromkeys(
        VIDEO_TEACHER_TYPES,
        "such a video model teaches beside an image tower, which draws the masks: name it second in "
        "--teacher_name_or_path of `umt-hf pretrain stage1`",
    ),
    **NO_TEACHERS,
    "bert": "a BERT is where the text tower of stage 2 starts: --text_name_or_path of `umt-hf pretrain stage2`",
    "umt_text": "it is a text tower alone",
}
CONFIGURATIONS: dict[str, Any] = {config.model_type: config for config in (UMTVideoConfig, UMTVideoTextConfig)}
PICKLED_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".pkl")
DATA_FILES = ("dataset_dict.json", "dataset_info.json", "state.json")
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
DATA_SUFFIXES = (".csv", ".jsonl", ".parquet", ".arrow", ".tar")
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")
PROCESSOR_TYPE = "UMTVideoProcessor"
LISTED_NAMES = 3
ALMOST = 0.8
TENSOR_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16}
TENSOR_BITS |= {"I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64}


def require_start(
    name_or_path: str | os.PathLike, wanted: str, accepted: Collection[str] | None = None, **options: Any
) -> None:
    """Refuse what is not a model of the right class, and name what it is and which command takes it.

    Args:
        name_or_path: Folder or Hub id.
        wanted: Name of the class that is to be loaded; of an unknown one, the folder must hold any UMT model.
        accepted: Classes whose folders will do; default: those that hold all weights of `wanted`.
        **options: Of `from_pretrained`; those that say where a repository is are used.

    Raises:
        OSError: If there is no such folder or repository, or it holds no configuration.
        ValueError: If it is another kind of file, folder or model, or a file of its weights is damaged.
    """
    name_or_path = locate_model(name_or_path, **options)
    fields = read_model_fields(name_or_path, **options)
    require_model_type(name_or_path, fields, MODEL_TYPES, "a UMT model")
    found = MODELS_BY_NAME.get(next(iter(fields.get("architectures") or []), ""))
    row = MODELS_BY_NAME.get(wanted)
    if accepted is None:
        accepted = COMPLETE_FOR.get(wanted, (wanted,) if row else ALL_CLASSES)
    if found is not None and row is not None and found.name not in accepted:
        raise ValueError(_describe_other_task(name_or_path, found, row))
    try:
        CONFIGURATIONS[fields["model_type"]].from_dict(dict(fields))
    except StrictDataclassError as error:
        raise ValueError(describe_bad_config(name_or_path, error)) from error
    if (folder := Path(name_or_path) / (options.get("subfolder") or "")).is_dir():
        require_weight_files(folder, options.get("variant"))


def describe_bad_config(name_or_path: str | os.PathLike, error: StrictDataclassError) -> str:
    """What is wrong with the values of a configuration, in one sentence."""
    reason = str(error).strip().split("\n")[-1].strip().removeprefix("ValueError: ").removeprefix("TypeError: ")
    return f"{os.path.join(name_or_path, CONFIG_FILE)} does not describe a model: {reason}"


def read_model_fields(name_or_path: str | os.PathLike, **options: Any) -> dict[str, Any]:
    """Fields of a model's `config.json`.

    Args:
        name_or_path: Folder or Hub id.
        **options: As for `require_start`.

    Raises:
        OSError: If there is no such folder or repository, or it holds no configuration.
        ValueError: If it is a file, an adapter, a folder of other things, or its configuration cannot be read.
    """
    name = locate_model(name_or_path, **options)
    path = Path(name)
    if path.is_dir():
        folder = path / (options.get("subfolder") or "")
        if (folder / ADAPTER_CONFIG_FILE).is_file():
            raise ValueError(_describe_adapter(folder))
        if not (folder / CONFIG_FILE).is_file():
            raise FileNotFoundError(_describe_contents(folder))
        return read_json_object(folder / CONFIG_FILE)
    try:
        return PreTrainedConfig.get_config_dict(name, **_select_hub_options(options))[0]
    except OSError as error:
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(f"{name} is not a folder here, and cannot be read from the Hub: {reason}") from error


def locate_model(name_or_path: str | os.PathLike, **options: Any) -> str:
    """What to load a model by.

    Args:
        name_or_path: Folder, Hub id or released checkpoint.
        **options: Of `from_pretrained`; those that say where a repository is are used.

    Returns:
        A folder of this machine, or the id of a repository that the Hub has.

    Raises:
        OSError: If there is no such folder or repository, or the Hub cannot be reached.
        ValueError: If it is a file.
    """
    name = find_released(name_or_path)
    path = Path(name)
    if path.is_file():
        raise ValueError(_describe_file(path))
    if path.is_dir():
        return name
    if looks_like_path(name):
        raise FileNotFoundError(_describe_missing(name))
    if (entry := load_zoo().get(name)) is not None:
        raise FileNotFoundError(_describe_released(entry))
    try:
        return find_on_hub(name, **_select_hub_options(options))
    except OSError as error:
        near = difflib.get_close_matches(name, load_zoo(), LISTED_NAMES, ALMOST)
        if not near:
            raise
        raise type(error)(f"{error} Did you mean {' or '.join(near)}?") from error


def _select_hub_options(options: dict[str, Any]) -> dict[str, Any]:
    return {key: options[key] for key in HUB_OPTIONS if options.get(key) is not None}


def require_model_type(
    name_or_path: str | os.PathLike, fields: dict[str, Any], types: Collection[str], what: str
) -> None:
    """Refuse a model of another type.

    Args:
        name_or_path: What errors call it.
        fields: Of its `config.json`.
        types: Types that will do.
        what: They, in words.

    Raises:
        ValueError: If its type is another one.
    """
    model_type = fields.get("model_type")
    if model_type in types:
        return
    architecture = next(iter(fields.get("architectures") or []), None)
    is_ours = architecture in MODELS_BY_NAME
    place = MODELS_BY_NAME[str(architecture)].title if is_ours else OTHER_PLACES.get(str(model_type))
    raise ValueError(
        f"{name_or_path} is not {what}: its {CONFIG_FILE} is of type {model_type!r}"
        f"{f' and names {architecture}' if architecture else ''}{f' ({place})' if place else ''}."
    )


def require_other_model(name_or_path: str | os.PathLike, types: Collection[str], what: str) -> str:
    """Refuse what is not a model of another family that a run needs: a teacher, a text tower.

    Args:
        name_or_path: Folder or Hub id.
        types: Model types that will do.
        what: They, in words.

    Returns:
        What to load it by; see `locate_model`.

    Raises:
        OSError: If there is no such folder or repository, or it holds no configuration.
        ValueError: If it is another kind of file, folder or model, or a file of its weights is damaged.
    """
    name = locate_model(name_or_path)
    require_model_type(name_or_path, read_model_fields(name), types, what)
    if Path(name).is_dir():
        require_weight_files(Path(name), are_pickles_read=True)
    return name


def require_weight_files(folder: Path, variant: str | None = None, are_pickles_read: bool = False) -> None:
    """Refuse a folder whose safetensors files are missing, cut short or damaged.

    Args:
        folder: Of a model.
        variant: As for `from_pretrained`; files of a variant are left to it.
        are_pickles_read: Whether a folder with other files of weights alone will do, as for models of others.

    Raises:
        OSError: If there is none.
        ValueError: If a shard is missing or a file damaged; file and tensor are named.
    """
    if variant is not None:
        return
    files = [folder / WEIGHTS_FILE]
    if not files[0].is_file() and (folder / WEIGHTS_INDEX_FILE).is_file():
        shards: dict[str, str] = read_json_object(folder / WEIGHTS_INDEX_FILE).get("weight_map") or {}
        files = [folder / name for name in sorted(set(shards.values()))]
        for file in files:
            if not file.is_file():
                tensor = next(name for name, shard in shards.items() if shard == file.name)
                raise ValueError(
                    f"{folder} lacks {file.name}, which its {WEIGHTS_INDEX_FILE} names for {tensor} and others: copy "
                    "the complete folder again."
                )
        if not files:
            raise ValueError(f"{folder / WEIGHTS_INDEX_FILE} names no files of weights: write the folder again.")
        for file in files:
            held = require_safetensors(file)
            if lost := [name for name, shard in shards.items() if shard == file.name and name not in held]:
                raise ValueError(f"{file} lacks {lost[0]}, which {WEIGHTS_INDEX_FILE} says it holds: copy it again.")
        return
    if files[0].is_file():
        require_safetensors(files[0])
        return
    if (folder / EXPORT_FILE).is_file():
        raise ValueError(
            f"{folder} is an export, which `umt-hf classify` and ExportedVideoModel read; give the model's folder."
        )
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED_SUFFIXES)
    if not (pickled and are_pickles_read):
        found = f"; of {pickled[0]} nothing is read" if pickled else ""
        raise FileNotFoundError(f"{folder} has no weights: there is no {WEIGHTS_FILE}{found}.")


def require_safetensors(file: Path) -> set[str]:
    """Names of the tensors of a file that is complete.

    Raises:
        ValueError: If it is empty, cut short or damaged; file and tensor are named.
    """
    size = file.stat().st_size
    problem = f"{file} is damaged: {{}}. Copy or write it again."
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(
                problem.format("it is empty" if size == 0 else f"it ends after {size} bytes, in its header")
            )
        try:
            header = json.loads(stream.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
                start, end = entry["data_offsets"]
                if 8 + length + end > size:
                    raise ValueError(problem.format(f"it ends after {size} bytes, within {name}"))
                if (bits := TENSOR_BITS.get(entry["dtype"])) is not None:
                    count = 1
                    for side in entry["shape"]:
                        count *= side
                    if count * bits != 8 * (end - start):
                        shape = tuple(entry["shape"])
                        raise ValueError(
                            problem.format(f"{name} has shape {shape} of {entry['dtype']}, but {end - start} bytes")
                        )
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(problem.format("its header cannot be read")) from error
    try:
        with safe_open(file, "pt"):
            return set(tensors)
    except SafetensorError as error:
        raise ValueError(problem.format(str(error).rstrip("."))) from error


def require_processor(name_or_path: str | os.PathLike, with_tokenizer: bool = False) -> None:
    """Refuse a local folder without a processor, or with that of another model.

    Args:
        name_or_path: Folder; a Hub id is left to `from_pretrained`.
        with_tokenizer: Whether a tokenizer is needed too.

    Raises:
        OSError: If the processor or the tokenizer is missing.
        ValueError: If it is another model's.
    """
    folder = Path(locate_model(name_or_path))
    if not folder.is_dir():
        return
    names = (PROCESSOR_FILE, VIDEO_PROCESSOR_FILE, IMAGE_PROCESSOR_FILE)
    found = {name: read_json_object(folder / name) for name in names if (folder / name).is_file()}
    if not found:
        raise FileNotFoundError(
            f"{folder} has no video processor ({', '.join(names[:2])}): save the one that the model was trained with "
            "there, or `UMTVideoProcessor.from_model_config(model.config)`."
        )
    for name, fields in found.items():
        fields = fields.get("video_processor", fields)
        kind = fields.get("video_processor_type") or fields.get("image_processor_type")
        if kind not in (None, PROCESSOR_TYPE):
            raise ValueError(f"{folder / name} is of another model, a {kind}; the model needs a {PROCESSOR_TYPE}.")
    if with_tokenizer and not (folder / TOKENIZER_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} has no UMTVideoTextProcessor: {TOKENIZER_FILE} is missing; copy it from the model that this "
            "one was trained from."
        )


def require_tokenizer(name_or_path: str | os.PathLike) -> str:
    """Refuse a local folder without a tokenizer; a Hub id is left to `from_pretrained`.

    Returns:
        What to load it by; see `locate_model`.

    Raises:
        OSError: If it has none.
    """
    name = locate_model(name_or_path)
    folder = Path(name)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        names = " or ".join(TOKENIZER_FILES)
        raise FileNotFoundError(f"{folder} has no tokenizer: {names} is missing; copy it there.")
    return name


def read_json_object(path: Path) -> dict[str, Any]:
    """Content of a JSON file that holds an object.

    Raises:
        ValueError: If it is something else; the file is named.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # of UTF-8 and of JSON alike
        raise ValueError(f"{path} is damaged: it cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object.")
    return content


def looks_like_path(name: str) -> bool:
    """Whether a name that is not a folder here was meant as one, and not as a Hub id `owner/name`."""
    path = Path(name)
    return (
        path.is_absolute()
        or name.startswith((".", "~"))
        or name.endswith(("/", os.sep))
        or len(path.parts) > 2
        or "\\" in name
        or path.suffix in (*PICKLED_SUFFIXES, ".safetensors")
        or (len(path.parts) == 2 and Path(path.parts[0]).exists())
    )


def _describe_missing(name: str) -> str:
    path = Path(name).expanduser()
    if path.is_dir():
        return f"{name}: the shell did not replace ~; write {path}."
    return f"{name}: no such {'file' if path.suffix in PICKLED_SUFFIXES else 'folder'}.{describe_near(path)}"


def _describe_released(entry: ZooEntry) -> str:
    if entry.file is None:
        return f"{entry.name} was published without its weights; `umt-hf zoo` lists those that were released."
    return (
        f"{entry.name} is a released checkpoint that is not on this machine yet: run `umt-hf convert {entry.name}`, "
        "or add --convert to a command or script."
    )


def _describe_file(path: Path) -> str:
    if path.suffix in PICKLED_SUFFIXES:
        return (
            f"{path} is a file of weights, not a model folder: convert it with `umt-hf convert "
            f"{shlex.quote(str(path))}`, and give the folder that this writes."
        )
    if path.suffix == ".safetensors":
        return f"{path} is one file of a model: give its folder, {path.parent}."
    return f"{path} is a file, not a model folder."


def _describe_adapter(folder: Path) -> str:
    base = read_json_object(folder / ADAPTER_CONFIG_FILE).get("base_model_name_or_path")
    advice = "merge it with its base (`merge_and_unload`, `save_pretrained`) and give that folder"
    if (folder.parent / CONFIG_FILE).is_file() and (folder.parent / WEIGHTS_FILE).is_file():
        advice = f"give {folder.parent}, which holds the merged model"
    return f"{folder} is an adapter{f' of {base}' if base else ''}, not a complete model: {advice}."


def _describe_contents(folder: Path) -> str:
    """What a folder without a configuration holds instead."""
    start = f"{folder} is not a model folder: it has no {CONFIG_FILE}"
    entries = sorted(folder.iterdir())
    if not entries:
        return f"{start}; it is empty."
    models = [entry for entry in entries if (entry / CONFIG_FILE).is_file()]
    if models:
        last = max(models, key=lambda entry: (entry.name.startswith("checkpoint-"), entry.stat().st_mtime))
        return f"{start}; give the model in it: {last}."
    if pickled := [entry for entry in entries if entry.suffix in PICKLED_SUFFIXES]:
        return f"{start}; convert its weights with `umt-hf convert {shlex.quote(str(pickled[0]))}`."
    is_data = any(entry.name in DATA_FILES or entry.suffix.lower() in DATA_SUFFIXES for entry in entries)
    if is_data or _holds_videos(entries):
        return f"{start}; it holds data, which goes where the command asks for videos or data."
    return f"{start}; it holds {', '.join(entry.name for entry in entries[:LISTED_NAMES])}" + (
        " ..." if len(entries) > LISTED_NAMES else "."
    )


def _holds_videos(entries: list[Path]) -> bool:
    inside = [inner for entry in entries[:LISTED_NAMES] if entry.is_dir() for inner in sorted(entry.iterdir())[:10]]
    return any(path.suffix.lower() in VIDEO_SUFFIXES for path in [*entries, *inside])


def _describe_other_task(name: str, found: ModelClass, wanted: ModelClass) -> str:
    quoted = shlex.quote(name)
    message = f"{name} is a {found.title} folder ({found.name}), and this step needs a {wanted.title} folder: "
    script, flag, starts = TRAINED_BY.get(wanted.name, ("", "", ()))
    if found.name in starts:
        entry = SCRIPTS_BY_MODULE[script]
        verb = "fine-tune" if entry.group == "finetune" else "train"
        message += f"{verb} it with `{entry.command} --{flag} {quoted} ...`, or "
    return f"{message}use it with `{found.command.format(model=quoted)}`."


__all__ = [
    "describe_bad_config",
    "locate_model",
    "looks_like_path",
    "read_model_fields",
    "require_model_type",
    "require_other_model",
    "require_processor",
    "require_start",
    "require_tokenizer",
    "require_weight_files",
]
