"""A released checkpoint to a complete, verified folder: download, conversion, processor, model card.

Weights stay in the memory-mapped file until they are written, and the folder is complete or absent.
"""

import glob
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from transformers import PreTrainedModel
from transformers.processing_utils import ProcessorMixin
from transformers.video_processing_utils import BaseVideoProcessor

from ..inference.loading import load_with_report
from ..inference.starts import require_tokenizer
from ..modeling.configuration_umt_video import UMTVideoConfig
from ..modeling.configuration_umt_video_text import UMTVideoTextConfig
from ..processing.processing_umt_video_text import UMTVideoTextProcessor, build_tokenizer
from ..processing.video_processing_umt_video import UMTVideoProcessor
from ..runs.disk import clear_leftovers, put_folder, require_replaceable, write_text
from ..runs.folder import CONFIG_FILE, CONVERSION_FILE, UNFINISHED_SUFFIX, collect_versions, hash_source
from ..runs.hub_access import find_on_hub
from ..runs.models import VIDEO_TEXT_TASKS
from ..zoo import ZooEntry, find_entry
from .card import write_model_card
from .convert_umt_checkpoint import (
    TASK_CLASSES,
    ConversionReport,
    build_label_maps,
    build_published_config,
    convert_state_dict,
    describe_checkpoint,
    load_converted_model,
    load_published_state_dict,
)
from .label_names import read_label_names
from .sentence_transformers import write_sentence_transformers_files

logger = logging.getLogger(__name__)

OUTPUT_TOLERANCE = 1e-5  # of the largest output
NUM_TRIAL_FRAMES = 2


@dataclass(frozen=True)
class CheckpointFile:
    """Where the weights come from.

    Args:
        path: The file.
        repo: Hub repository it was downloaded from; `None` for a local file.
        file: Path in the repository, or the local file's name.
        commit: Commit of the repository, 40 hexadecimal digits.
    """

    path: Path
    repo: str | None
    file: str
    commit: str | None


@dataclass
class ConvertedFolder:
    """What a conversion has written, also `conversion.json` of the folder.

    Args:
        name: Our name of the checkpoint.
        task: Of the model.
        model_class: Its class.
        folder: Where it is.
        repo: Hub repository of the source; `None` for a local file.
        file: Path in the repository, or the local file's name.
        commit: Commit of the repository.
        sha256: Of the source file.
        num_bytes: Of the source file.
        num_used: Tensors of the source that became weights.
        set_aside: Tensors of the source that are not needed -> why.
        output_difference: Largest difference between the outputs of the source's tensors and of the reloaded folder.
        unnamed: Why some or all classes have no names; `None` where all have one.
        versions: Of what took part.
    """

    name: str
    task: str
    model_class: str
    folder: str
    repo: str | None
    file: str
    commit: str | None
    sha256: str | None
    num_bytes: int
    num_used: int
    set_aside: dict[str, str]
    output_difference: float
    unnamed: str | None = None
    versions: dict[str, str] = field(default_factory=collect_versions)

    def format(self) -> str:
        """A summary for the terminal."""
        reasons: dict[str, int] = {}
        for reason in self.set_aside.values():
            reasons[reason] = reasons.get(reason, 0) + 1
        lines = [
            f"Wrote {self.folder}: {self.model_class}, {self.num_used} tensors used, {len(self.set_aside)} set aside"
        ]
        lines += [f"  {count} {reason}" for reason, count in reasons.items()]
        lines.append(
            "Verified: every weight equals the source's, none is missing or left over, "
            f"outputs differ by {self.output_difference:g}"
        )
        if self.unnamed is not None:
            lines.append(
                f"Classes without names are called LABEL_<number>: {self.unnamed}. `--labels FILE` sets them."
            )
        return "\n".join(lines)


def convert_released_checkpoint(
    source: str | os.PathLike,
    name: str | None = None,
    output_dir: str | os.PathLike | None = None,
    *,
    revision: str | None = None,
    tokenizer: str | os.PathLike | None = None,
    labels: str | os.PathLike | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> ConvertedFolder:
    """Turn a released checkpoint into a folder with model, processor, card and `conversion.json`, and verify it.

    Args:
        source: Our name of the checkpoint, which is downloaded, or a local `.pth` file.
        name: What a local file is; by default what the zoo says of a file of that name.
        output_dir: Folder to write; by default the name.
        revision: Of the Hub repository; by default the zoo's.
        tokenizer: Folder or Hub id of a BERT, or a `vocab.txt`, for models with text; by default the zoo's.
        labels: File with the names of the classes; see `read_label_names`.
        max_shard_size: Size of the largest weight file; larger models are split.
        overwrite: Whether a converted folder that exists is replaced.

    Returns:
        What was done.

    Raises:
        FileExistsError: If the folder exists and is not to be replaced, holds the checkpoint, or something else.
        OSError: If the file or the tokenizer cannot be had.
        ValueError: If there is no such checkpoint, or file, labels or tokenizer do not fit it; tensors are named.
        RuntimeError: If the folder does not give back what the file holds.
    """
    entry, path = resolve_source(source, name)
    output = Path(output_dir or entry.name)
    clear_leftovers(output.parent, (glob.escape(output.name),))  # of an interrupted conversion
    require_replaceable(output, overwrite, CONFIG_FILE, [path] if path else [])
    config, task = build_published_config(entry.name)
    if labels is not None:
        _set_label_names(config, entry, labels)
    processor = build_released_processor(entry, config, tokenizer)  # before a long download

    checkpoint = CheckpointFile(path, None, path.name, None) if path else download_checkpoint(entry, revision)
    report = ConversionReport()
    converted = _convert_file(checkpoint.path, entry, config, task, report)
    unfinished = output.with_name(output.name + UNFINISHED_SUFFIX)
    try:
        difference = write_and_verify(converted, config, task, processor, unfinished, max_shard_size)
        found = ConvertedFolder(
            name=entry.name,
            task=task,
            model_class=TASK_CLASSES[task].__name__,
            folder=str(output),
            repo=checkpoint.repo,
            file=checkpoint.file,
            commit=checkpoint.commit,
            sha256=hash_source(str(checkpoint.path)),
            num_bytes=checkpoint.path.stat().st_size,
            num_used=len(report.used),
            set_aside=report.set_aside,
            output_difference=difference,
            unnamed=entry.unnamed if labels is None else None,
        )
        _write_record(found, unfinished)
        write_sentence_transformers_files(unfinished, found.model_class)
        write_model_card(unfinished, entry)
        put_folder(unfinished, output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return found


def _set_label_names(config: UMTVideoConfig | UMTVideoTextConfig, entry: ZooEntry, labels: str | os.PathLike) -> None:
    if entry.num_labels is None:
        raise ValueError(f"{entry.name} has no classes, and needs no names of them.")
    for key, value in build_label_maps(read_label_names(os.fspath(labels), entry.num_labels)).items():
        setattr(config, key, value)


def _convert_file(
    path: Path, entry: ZooEntry, config: UMTVideoConfig | UMTVideoTextConfig, task: str, report: ConversionReport
) -> dict[str, torch.Tensor]:
    try:
        return convert_state_dict(load_published_state_dict(path), config, task, report)
    except ValueError as error:
        raise ValueError(f"{path} does not fit {entry.name}. {error}") from error


def _write_record(found: ConvertedFolder, folder: Path) -> None:
    # Without the folder's own place, which changes as soon as somebody moves or publishes it.
    record = {key: value for key, value in asdict(found).items() if key != "folder"}
    write_text(folder / CONVERSION_FILE, json.dumps(record, indent=2) + "\n")


def resolve_source(source: str | os.PathLike, name: str | None) -> tuple[ZooEntry, Path | None]:
    """What to convert: its description, and the file if it is a local one.

    Raises:
        FileNotFoundError: If a file is meant and there is none.
        ValueError: If there is no such checkpoint, or a file's name does not say what it is.
    """
    path = Path(source)
    if path.is_file():
        if name is not None:
            return describe_checkpoint(name), path
        try:
            # Released files are known by their names, also after a download by other means.
            return find_entry(path.name), path
        except ValueError as error:
            raise ValueError(f"Say what {path} is: `umt-hf convert {path} NAME`. {error}") from error
    if name is not None or path.suffix in (".pth", ".pt", ".bin"):
        raise FileNotFoundError(f"{path}: no such file.")
    return find_entry(str(source)), None


def download_checkpoint(entry: ZooEntry, revision: str | None = None) -> CheckpointFile:
    """Fetch an entry's file from the Hub, or take it from the cache of huggingface_hub.

    Args:
        entry: Of the zoo.
        revision: Branch, tag or commit of the repository; by default the entry's.

    Raises:
        OSError: If it cannot be fetched; the message says how to go on without the Hub.
        ValueError: If the checkpoint was never released.
    """
    if entry.file is None:
        raise ValueError(f"{entry.name} was never released: convert a .pth file of your own.")
    revision = revision or entry.revision
    try:
        # Asked within seconds; the client's own attempts take half a minute without a network.
        located = find_on_hub(entry.repo, entry.file, revision=revision)
        if os.path.isdir(located):
            path = Path(located, entry.file)
        else:
            path = Path(hf_hub_download(entry.repo, entry.file, revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, EntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0].split("cannot be read from the Hub: ")[-1]
        raise OSError(
            f"{entry.repo}/{entry.file} at revision {revision!r} cannot be fetched: {reason}\n"
            f"With the file at hand, run: umt-hf convert {Path(entry.file).name} {entry.name}"
        ) from error
    # <cache>/models--<repo>/snapshots/<commit>/<file>
    commit = path.parts[len(path.parts) - len(Path(entry.file).parts) - 1]
    return CheckpointFile(path, entry.repo, entry.file, commit)


def build_released_processor(
    entry: ZooEntry,
    config: UMTVideoConfig | UMTVideoTextConfig,
    tokenizer: str | os.PathLike | None = None,
) -> BaseVideoProcessor | ProcessorMixin:
    """The processor that feeds a released model as its published evaluation does.

    Args:
        entry: Of the zoo.
        config: Configuration of the model.
        tokenizer: As for `convert_released_checkpoint`.

    Raises:
        OSError: If the tokenizer cannot be loaded.
        ValueError: If the tokenizer has another number of words than the model, or the model has no text.
    """
    video_processor = UMTVideoProcessor.from_model_config(config, entry.task, **entry.processor)
    if entry.task not in VIDEO_TEXT_TASKS:
        if tokenizer is not None:
            raise ValueError(f"{entry.name} reads no text, and needs no tokenizer.")
        return video_processor
    source = entry.tokenizer if tokenizer is None else tokenizer
    if source is None or entry.max_text_tokens is None:
        raise ValueError(f"The zoo does not say how {entry.name} reads text.")
    try:
        located = source if os.path.exists(source) else require_tokenizer(source)
        words = build_tokenizer(located, max_length=entry.max_text_tokens)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(
            f"The tokenizer {source} cannot be loaded: {reason}\n"
            "Give a folder with the files of a BERT tokenizer, or its vocab.txt: --tokenizer FOLDER"
        ) from error
    vocab_size = getattr(config, "text_config", config).vocab_size
    if len(words) != vocab_size:
        raise ValueError(
            f"The tokenizer {source} has {len(words)} words, {entry.name} has {vocab_size}: "
            "give that of BERT, uncased."
        )
    return UMTVideoTextProcessor(video_processor, words)


def write_and_verify(
    converted: dict[str, torch.Tensor],
    config: UMTVideoConfig | UMTVideoTextConfig,
    task: str,
    processor: BaseVideoProcessor | ProcessorMixin,
    folder: Path,
    max_shard_size: str = "5GB",
) -> float:
    """Write model and processor, load them again, and compare with the source's tensors.

    Args:
        converted: From `convert_state_dict`; emptied once it is written and compared.
        config: Configuration of the model.
        task: As for `convert_state_dict`.
        processor: Of the model.
        folder: To write.
        max_shard_size: Size of the largest weight file.

    Returns:
        Largest difference between the outputs of the two models.

    Raises:
        RuntimeError: If a weight is missing, left over or different, or outputs differ.
    """
    model: Any = load_converted_model(converted, config, task).eval()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    processor.save_pretrained(folder)
    # Computed before reloading, so that only one copy of a large model is held at a time.
    before = compute_trial_outputs(model, task)
    del model

    loaded = load_with_report(TASK_CLASSES[task], folder)
    for kind in ("missing", "unexpected", "mismatched"):
        if names := getattr(loaded, kind):
            raise RuntimeError(f"The written folder has {kind} weights: {', '.join(names[:5])}.")
    reloaded = loaded.model
    stored = reloaded.state_dict()
    different = [key for key in stored if not torch.equal(stored[key], converted[key].to(stored[key].dtype))]
    if different:
        raise RuntimeError(f"{len(different)} weights changed on the way to disk: {', '.join(different[:5])}.")
    del stored
    converted.clear()  # lets go of the source before the weights are copied once more
    after = compute_trial_outputs(reloaded.eval(), task)
    difference = 0.0
    for key, expected in before.items():
        found = float((after[key] - expected).abs().max())
        if not found <= OUTPUT_TOLERANCE * float(expected.abs().max()):
            raise RuntimeError(f"{key} of the written folder differs by {found:g} from that of the source's tensors.")
        difference = max(difference, found)
    return difference


@torch.no_grad()
def compute_trial_outputs(model: PreTrainedModel, task: str) -> dict[str, torch.Tensor]:
    """Everything that a model computes of a short random clip, two for models with text, the same at every call.

    Args:
        model: Its weights become float32 copies in memory.
        task: As for `convert_state_dict`.

    Returns:
        Name -> tensor: aligned features, or logits of every head.
    """
    for weight in (*model.parameters(), *model.buffers()):
        # Where a mapped file holds a weight at an odd address, sums may run in another order.
        weight.data = weight.data.to(torch.float32, copy=True) if weight.is_floating_point() else weight.data
    generator = torch.Generator().manual_seed(0)
    config = getattr(model.config, "vision_config", model.config)
    num_clips = 2 if task in VIDEO_TEXT_TASKS else 1
    num_frames = NUM_TRIAL_FRAMES * config.tubelet_size
    shape = (num_clips, num_frames, config.num_channels, config.image_size, config.image_size)
    pixel_values = torch.randn(shape, generator=generator)
    if task == "pretraining":
        return {"aligned_features": model(pixel_values).aligned_features}
    if task == "classification":
        return {"logits": model(pixel_values).logits}
    if task == "detection":
        boxes = torch.tensor([0.1, 0.2, 0.7, 0.9]) * config.image_size
        return {"logits": model(pixel_values, boxes.view(1, 1, 4)).logits}
    text = model.config.text_config
    input_ids = torch.randint(text.mask_token_id + 1, text.vocab_size, (2, 8), generator=generator)
    input_ids[:, 0] = text.cls_token_id
    inputs = {
        "pixel_values": pixel_values,
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
    }
    if task == "question_answering":
        return {"logits": model(**inputs, labels=input_ids[:, :5]).logits}
    # Nothing is left to chance: each text's negative is the other video.
    other = torch.tensor([1, 0])
    inputs |= {"video_negatives": other, "text_negatives": other, "return_loss": True}
    keys = ["logits_per_video", "matching_logits"]
    if task == "video_text_pretraining":
        side = config.image_size // config.patch_size
        num_tokens = NUM_TRIAL_FRAMES * side * side
        teacher_shape = (len(config.aligned_layer_indices), 2, num_tokens, config.teacher_hidden_size)
        inputs["teacher_features"] = torch.randn(teacher_shape, generator=generator)
        inputs |= {"mlm_input_ids": input_ids, "mlm_labels": input_ids}
        keys += ["mlm_logits", "aligned_features"]
    outputs = model(**inputs)
    return {key: outputs[key] for key in keys}
