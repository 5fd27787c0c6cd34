r"""Features of many videos in a folder: a file for each, complete or absent.

umt-hf features videos/ --model outputs/stage1 --out features --level frame \
        --window 16 --stride 8
"""

import json
import os
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset, Features, List, Value
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from ...data.video_files import SkippedVideo, VideoFile, list_videos, split_name
from ...modeling.modeling_umt_video import UMTVideoModel
from ...processing.video_processing_umt_video import UMTVideoProcessor
from ...runs.arguments import KeptTokenArguments
from ...runs.cores import count_workers
from ...runs.disk import LOCK_FILE, hold_lock, put_file, put_folder, remove_folder, write_text
from ...runs.folder import UNFINISHED_SUFFIX, collect_versions
from ...runs.mistakes import naming_full_disk
from ..engine import TIMEOUT_SECONDS, DType, choose_dtype, compile_model, inference_run, name_dtype, read_ahead
from ..loading import (
    PIXEL_SETTINGS,
    compute_fingerprint,
    keep_tokens,
    load_complete_model,
    load_video_processor,
    place_model,
)
from ..starts import require_start
from .windows import BlockStream, FeatureLevel, VideoFeatures, resolve_windows, slide

FeatureFormat = Literal["safetensors", "dataset", "npy"]

NUMPY_FOLDER, NUMPY_NAMES = "npy", "names.json"
EARLIER_SETTINGS = {"dtype": "float32"}  # of folders that do not say


@dataclass(frozen=True)
class FeatureReport:
    """What a run of `save_features` did.

    Attributes:
        num_extracted: Videos that were new or had changed.
        num_unchanged: Videos whose features were there already.
        skipped: Videos that could not be read.
    """

    num_extracted: int
    num_unchanged: int
    skipped: tuple[SkippedVideo, ...]

    def format(self) -> str:
        """Write it as lines for people, each skipped video with its reason."""
        line = f"{self.num_extracted} extracted, {self.num_unchanged} unchanged, {len(self.skipped)} skipped"
        return "\n".join([line, *(video.format() for video in self.skipped)])


class _VideoEncoder(UMTVideoModel):
    """The encoder alone: no warning about the heads and text towers that a folder holds beside it."""

    _keys_to_ignore_on_load_unexpected = [r"."]


def load_encoder(model: str | os.PathLike) -> tuple[UMTVideoModel, UMTVideoProcessor]:
    """Load the video encoder of any UMT model folder, and its video processor.

    Args:
        model: Folder or Hub id: stage 1, a classifier, stage 2, retrieval or question answering; with a processor of
            videos, or of videos and texts.

    Returns:
        The encoder in evaluation mode, float32, and the processor.

    Raises:
        ValueError: If it is another kind of folder or model, or lacks weights of the encoder.
        OSError: If it has no model or no processor.

    Examples:
        >>> from umt_hf.inference.features import load_encoder
        >>> model, processor = load_encoder("umt-vit-b16-25m")
        >>> inputs = processor("video.mp4", return_tensors="pt")
        >>> vector = model(**inputs).pooler_output
    """
    require_start(model, UMTVideoModel.__name__)
    processor = load_video_processor(model)
    return load_complete_model(_VideoEncoder, model, dtype=torch.float32).eval(), processor


def save_features(
    sources: Iterable[str],
    model: str | os.PathLike,
    folder: str | os.PathLike,
    level: FeatureLevel = "clip",
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    fps: float | None = None,
    format: FeatureFormat = "safetensors",
    announce: Callable[[str], object] | None = None,
    *,
    stride_seconds: float | None = None,
    num_workers: int | None = 0,
    dtype: DType | None = None,
    torch_compile: bool = False,
    dataloader_timeout_seconds: int = TIMEOUT_SECONDS,
    tokens: KeptTokenArguments | None = None,
) -> FeatureReport:
    """Extract the features of videos into a folder, one safetensors file per video; finished ones are left alone.

    Every process that `accelerate launch` starts takes a share of the videos. A file is complete or absent, so that a
    killed run goes on where it was.

    Args:
        sources: Video files, and folders with videos at any depth. The main process's list counts.
        model: Folder or Hub id of a UMT model with its processor.
        folder: Where `settings.json`, `skipped.json` and the files go.
        level: See `extract_features`, as for the next four and `stride_seconds`.
        window: Frames the model sees at a time.
        stride: Frames from one window to the next.
        batch_size: Windows that go through the model at a time.
        fps: Frames per second that are read.
        format: "dataset" also joins all files of the folder into a `datasets` dataset in `dataset/`, one row per
            feature; "npy" also writes an array per video into `npy/`, of the rows at even distances and named after
            the video. Later runs keep both up to date.
        announce: Gets lines on what was found and where the time went, in the main process.
        stride_seconds: Seconds from one window to the next.
        num_workers: Processes that read ahead, for each process; 0: none; `None`: as the machine has cores, 1 to 4.
        dtype: What the model is computed in; default: bfloat16 on a GPU that has it, float32 elsewhere.
        torch_compile: Whether the model is compiled by `torch.compile`.
        dataloader_timeout_seconds: For which these processes may give nothing; 0: for ever.
        tokens: Which tokens of a window the encoder sees; default: as the model's configuration says.

    Returns:
        What was done, the same in all processes.

    Raises:
        BlockingIOError: If another command is writing into the folder.
        FileExistsError: If the folder holds something else.
        ValueError: If an argument makes no sense, a source folder has no videos, or the folder's features were made
            with another model or other settings.

    Examples:
        >>> from umt_hf.inference.features import save_features
        >>> report = save_features(["videos"], "umt-vit-b16", "features", fps=4)
        >>> print(report.format())
        4 extracted, 0 unchanged, 0 skipped
    """
    if format not in get_args(FeatureFormat):
        raise ValueError(f"format must be one of {list(get_args(FeatureFormat))}, got {format!r}.")
    # One process may get the long videos; the others wait.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
    say = announce if accelerator.is_main_process else None
    extractor = _Extractor(accelerator, model, dtype, torch_compile, batch_size, num_workers, tokens)
    extractor.choose_windows(level, window, stride, fps, stride_seconds)
    store = _FeatureFolder(Path(folder), extractor.describe())
    store.check()
    accelerator.wait_for_everyone()  # before the main process writes what the others check
    with store.reserve() if accelerator.is_main_process else nullcontext():
        plan: list[Any] = [store.plan(sources, str(model), format, say) if accelerator.is_main_process else None]
        new, num_files, missing, store.names = broadcast_object_list(plan)[0]
        with inference_run(say, dataloader_timeout_seconds):
            skipped = extractor.run(new[accelerator.process_index :: accelerator.num_processes], store)
        skipped = sorted(missing + gather_object(skipped), key=lambda video: video.path)
        if accelerator.is_main_process:
            store.finish(skipped, format)
        accelerator.wait_for_everyone()
    return FeatureReport(len(new) - (len(skipped) - len(missing)), num_files - len(new), tuple(skipped))


class _Extractor:
    """Reads and encodes the videos of a process.

    Args:
        accelerator: Of the run.
        model: Folder or Hub id.
        dtype: See `save_features`, as for the next three.
        torch_compile: Whether the model is compiled.
        batch_size: Windows at a time.
        num_workers: Processes that read.
        tokens: Which tokens of a window the encoder sees.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: str | os.PathLike,
        dtype: DType | None,
        torch_compile: bool,
        batch_size: int,
        num_workers: int | None,
        tokens: KeptTokenArguments | None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.dtype = choose_dtype(dtype, accelerator.device, accelerator.mixed_precision)
        encoder, self.processor = load_encoder(model)
        # Before its weights are rounded.
        self.description = _describe(encoder, self.processor) | {"kept_tokens": keep_tokens(encoder, tokens)}
        self.accelerator, self.batch_size, self.num_workers = accelerator, batch_size, num_workers
        self.model = place_model(encoder, accelerator.device, self.dtype)
        # On a CPU nothing is gained by sharing, and the last bits of a window would depend on its neighbours.
        self.shares_batches = torch_compile or accelerator.device.type != "cpu"
        if torch_compile:
            compile_model(self.model)

    def choose_windows(
        self,
        level: FeatureLevel,
        window: int | None,
        stride: int | None,
        fps: float | None,
        stride_seconds: float | None,
    ) -> None:
        """Set how windows slide; see `resolve_windows`."""
        self.windows = resolve_windows(self.model, level, window, stride, fps, stride_seconds)

    def describe(self) -> dict[str, Any]:
        """What features depend on."""
        windows = {name: value for name, value in asdict(self.windows).items() if name != "tubelet_size"}
        precision = {"dtype": name_dtype(self.dtype), "mixed_precision": self.accelerator.mixed_precision}
        return windows | precision | self.description

    def run(self, files: Sequence[VideoFile], store: "_FeatureFolder") -> list[SkippedVideo]:
        """Write the features of videos as they come, and give those that have none."""
        workers = min(count_workers() if self.num_workers is None else self.num_workers, len(files))
        stream = BlockStream([file.path for file in files], self.processor, self.windows, self.dtype)
        is_hidden = not self.accelerator.is_main_process
        blocks = read_ahead(stream, None, workers, pin_memory=self.accelerator.device.type == "cuda")
        found = slide(
            blocks, self.model, self.windows, self.batch_size, self.shares_batches, self.accelerator.autocast
        )
        skipped = []
        with closing(blocks), closing(found), tqdm(total=len(files), unit="video", disable=is_hidden) as progress:
            for number, features in found:
                reason = _save_video(store, files[number], features)
                skipped += [] if reason is None else [SkippedVideo(files[number].path, reason)]
                progress.update()
        return skipped


class _FeatureFolder:
    """The files of `save_features`.

    Args:
        folder: Where they are or will be.
        settings: What made them.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder, self.settings = folder, settings
        self.names: dict[str, str] | None = None  # of arrays, by the path of the video, where there are any

    def check(self) -> None:
        """Make sure that a folder's features were made as those to be added."""
        folder, path = self.folder, self.folder / "settings.json"
        if not path.is_file():
            if folder.exists() and (not folder.is_dir() or set(os.listdir(folder)) - {LOCK_FILE}):
                raise FileExistsError(f"{folder} holds something other than features; choose another folder.")
            return
        made = EARLIER_SETTINGS | json.loads(path.read_text(encoding="utf-8")).get("settings", {})
        for name, value in self.settings.items():
            if made.get(name) != value:
                raise ValueError(
                    f"{folder} holds features made with {name}={made.get(name)!r}, not {value!r}. Use the same "
                    "settings and model, or a new folder."
                )

    @contextmanager
    def reserve(self) -> Generator[None]:
        """Keep other commands out.

        Raises:
            BlockingIOError: If another command is writing.
        """
        with hold_lock(self.folder / LOCK_FILE, str(self.folder)):
            yield

    def plan(
        self, sources: Iterable[str], model: str, format: FeatureFormat, announce: Callable[[str], object] | None
    ) -> tuple[list[VideoFile], int, list[SkippedVideo], dict[str, str] | None]:
        """Videos to read, the number of all, those that do not exist, and names of arrays; in the main process."""
        files, missing = list_videos(sources)
        self.folder.mkdir(parents=True, exist_ok=True)
        _write_json(self.folder / "settings.json", {"settings": self.settings, "model": model, **collect_versions()})
        if format == "npy" or (self.folder / NUMPY_FOLDER).is_dir():
            self.names = self._name_arrays(files)
        new = [file for file in files if not self._is_finished(file)]
        if announce is not None:
            announce(f"{len(files):,} videos found, {len(new):,} of them new or changed.")
            window, stride = self.settings["window"], self.settings["stride"]
            if stride is not None and stride < window:
                announce(f"Windows overlap: each frame goes through the model {window / stride:.3g} times.")
        return new, len(files), missing, self.names

    def write(self, file: VideoFile, found: VideoFeatures) -> None:
        """Write a video's features."""
        arrays = {
            name: np.ascontiguousarray(value) for name, value in vars(found).items() if isinstance(value, np.ndarray)
        }
        metadata = {name: str(value) for name, value in asdict(file).items()}
        metadata |= {name: str(getattr(found, name)) for name in ("num_padded_frames", "num_even_rows")}
        metadata["settings"] = json.dumps(self.settings)
        # The array first: it is the other file that says that a video is done.
        self._write_array(file, found.features[: found.num_even_rows])
        final = name_features(self.folder, file.path)
        unfinished = final.with_name(final.name + UNFINISHED_SUFFIX)
        with naming_full_disk(final):
            save_file(arrays, unfinished, metadata)
            put_file(unfinished, final)

    def remove(self, file: VideoFile) -> None:
        """Remove features of a video's earlier contents."""
        name_features(self.folder, file.path).unlink(missing_ok=True)
        if self.names is not None:
            self._get_array_path(file).unlink(missing_ok=True)

    def finish(self, skipped: Sequence[SkippedVideo], format: FeatureFormat) -> None:
        """Write what describes the run, and the dataset, which is never older than the files; in the main process."""
        _write_json(self.folder / "skipped.json", [asdict(video) for video in skipped])
        if self.names is not None:  # of those that have an array
            folder = self.folder / NUMPY_FOLDER
            written = {name: video for video, name in self.names.items() if (folder / f"{name}.npy").is_file()}
            _write_json(folder / NUMPY_NAMES, written)
        if format == "dataset" or (self.folder / "dataset").is_dir():
            _write_dataset(self.folder)

    def _is_finished(self, file: VideoFile) -> bool:
        # Size and time of the video stand in the file: features of a changed video do not count.
        path = name_features(self.folder, file.path)
        if not path.is_file():
            return False
        try:
            with safe_open(path, "np") as stored:
                metadata = stored.metadata() or {}
                stated = (metadata.get("size_bytes"), metadata.get("modified_ns"))
                if stated != (str(file.size_bytes), str(file.modified_ns)):
                    return False
                if self.names is not None and not self._get_array_path(file).is_file():
                    features = stored.get_tensor("features")
                    self._write_array(file, features[: int(metadata.get("num_even_rows", len(features)))])
        except SafetensorError:  # damaged since: extracted again
            return False
        return True

    def _get_array_path(self, file: VideoFile) -> Path:
        return self.folder / NUMPY_FOLDER / f"{(self.names or {})[file.path]}.npy"

    def _write_array(self, file: VideoFile, features: np.ndarray) -> None:
        if self.names is None:
            return
        final = self._get_array_path(file)
        unfinished = final.with_name(final.name + UNFINISHED_SUFFIX)
        with naming_full_disk(final):
            with unfinished.open("wb") as content:
                np.save(content, features)
            put_file(unfinished, final)

    def _name_arrays(self, files: Sequence[VideoFile]) -> dict[str, str]:
        """Give each video a name that no other has, and keep those given before."""
        path = self.folder / NUMPY_FOLDER / NUMPY_NAMES
        path.parent.mkdir(exist_ok=True)
        names = {}
        if path.is_file():
            names = {video: name for name, video in json.loads(path.read_text(encoding="utf-8")).items()}
        taken = {name.casefold() for name in names.values()}  # as some file systems compare names
        for file in files:
            if file.path not in names:
                stem, digest = split_name(file.path)
                names[file.path] = stem if stem.casefold() not in taken else f"{stem}-{digest}"
                taken.add(names[file.path].casefold())
        _write_json(path, {name: video for video, name in names.items()})
        return names


def _save_video(store: _FeatureFolder, file: VideoFile, found: VideoFeatures | str) -> str | None:
    """Write a video's features, or say why there are none."""
    if not isinstance(found, str) and not np.isfinite(found.features).all():
        found = "has features that are not finite; the model cannot encode it."
    if isinstance(found, str):
        store.remove(file)
        return found
    store.write(file, found)
    return None


def name_features(folder: str | os.PathLike, video: str) -> Path:
    """File of a video's features: the video's name, and a digest of its path, since others may have the same name.

    Characters that Windows forbids in names are replaced.
    """
    return Path(folder) / f"{'-'.join(split_name(video))}.safetensors"


def _describe(model: UMTVideoModel, processor: UMTVideoProcessor) -> dict[str, Any]:
    settings = json.loads(processor.to_json_string())
    pixels = {name: settings.get(name) for name in PIXEL_SETTINGS if name not in ("sampling_strategy", "frame_stride")}
    return {"weights": compute_fingerprint(model), "video_processor": pixels}


def _write_dataset(folder: Path) -> None:
    """Join the files of a folder, one feature a row, in order of their names."""
    final, unfinished, cache = (folder / name for name in ("dataset", f"dataset{UNFINISHED_SUFFIX}", "dataset.cache"))
    for leftover in (unfinished, cache):
        shutil.rmtree(leftover, ignore_errors=True)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        remove_folder(final)
        return
    with safe_open(files[0], "np") as stored:
        shape = stored.get_slice("features").get_shape()
    feature = Value("float32")
    for length in reversed(shape[1:]):
        feature = List(feature, length=length)
    columns = Features(
        {"path": Value("string"), "first_frame": Value("int64"), "last_frame": Value("int64")}
        | {"start_seconds": Value("float64"), "end_seconds": Value("float64"), "features": feature}
    )
    table = Dataset.from_generator(
        _iterate_rows, features=columns, cache_dir=str(cache), gen_kwargs={"files": [str(file) for file in files]}
    )
    table.save_to_disk(unfinished)
    put_folder(unfinished, final)
    del table
    shutil.rmtree(cache)


def _iterate_rows(files: Sequence[str]) -> Iterator[dict[str, Any]]:
    for file in files:
        with safe_open(file, "np") as stored:
            path = stored.metadata()["path"]
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118, not a mapping
        for row in range(len(arrays["features"])):
            yield {"path": path, **{name: values[row] for name, values in arrays.items()}}


def _write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


__all__ = ["FeatureReport", "load_encoder", "name_features", "save_features"]
