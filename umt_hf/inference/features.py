r"""Extract features of videos of any length: a UMT encoder slides over their frames and files hold what it sees.

    umt-hf features videos/ --model outputs/stage1 --out features --level frame \
        --window 16 --stride 8

Frames stream from the decoder: at any time a batch of windows is held, never the decoded video.

Legend: N frames, T frames of a window, S time steps (tubelets) of a video, W windows, D width.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset, Features, List, Value
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from ..data.lists.paths import is_url
from ..data.video_files import SkippedVideo, VideoFile, list_videos
from ..modeling.modeling_umt_video import UMTVideoModel
from ..modeling.selection_umt_video import spread_tokens
from ..processing.decoding import (
    DecodedFramesReader,
    FrameFolderReader,
    VideoDecodingError,
    VideoReader,
    open_video,
)
from ..processing.video_processing_umt_video import UMTVideoProcessor
from ..runs.arguments import KeptTokenArguments
from ..runs.disk import put_file, put_folder, remove_folder, write_text
from ..runs.folder import UNFINISHED_SUFFIX, collect_versions
from ..runs.mistakes import naming_full_disk
from .loading import (
    PIXEL_SETTINGS,
    compute_fingerprint,
    keep_tokens,
    load_complete_model,
    load_video_processor,
    place_model,
)
from .starts import require_start

FeatureLevel = Literal["frame", "clip", "tubelet"]
FeatureFormat = Literal["safetensors", "dataset"]

NAME_BYTES = 200  # of a video's name in that of its features; file systems allow 255 for the complete name
FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]')


@dataclass(frozen=True)
class WindowPlan:
    """Which frames of a video each window sees.

    Attributes:
        frames: Numbers of the frames read, `(N,)`, rising.
        seconds: Their times from the video's first frame, `(N,)`.
        starts: First place of each window among the frames, rising.
        window: Frames of a window.
        num_padded: Times that the last frame is repeated: to fill the only window of a shorter video, or its last
            tubelet.
    """

    frames: np.ndarray
    seconds: np.ndarray
    starts: list[int]
    window: int
    num_padded: int


@dataclass(frozen=True)
class VideoFeatures:
    """Features of a video in the order of time; row by row they belong to the frames from `first` to `last`.

    Attributes:
        features: Float32; `(N, D)` for frames, `(W, D)` for clips, `(S, rows, columns, D)` for tubelets.
        first_frame: Number of the first frame of a row, int64.
        last_frame: Number of the last one.
        start_seconds: Time of the first frame, counted from the first of the video, float64; NaN where the video is a
            folder of pictures or an array, which have no times.
        end_seconds: Time of the last one.
        num_padded_frames: Times that the last frame was repeated; see `WindowPlan`.
    """

    features: np.ndarray
    first_frame: np.ndarray
    last_frame: np.ndarray
    start_seconds: np.ndarray
    end_seconds: np.ndarray
    num_padded_frames: int


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
        return "\n".join([line, *(f"skipped {video.path}: {video.reason}" for video in self.skipped)])


def choose_frames(seconds: np.ndarray, fps: float | None) -> np.ndarray:
    """Choose frames at an even rate in time.

    Args:
        seconds: Times of all frames, `(num_frames,)`, rising from 0.
        fps: Frames per second; default: every frame.

    Returns:
        Numbers of the frames nearest to `0, 1 / fps, 2 / fps, ...`, each once: never more than the video has.
    """
    if fps is None:
        return np.arange(len(seconds))
    ticks = np.arange(int(seconds[-1] * fps + 1e-6) + 1) / fps
    after = np.searchsorted(seconds, ticks).clip(max=len(seconds) - 1)
    before = (after - 1).clip(min=0)
    return np.unique(np.where(ticks - seconds[before] < seconds[after] - ticks, before, after))


def plan_windows(seconds: np.ndarray, window: int, stride: int, tubelet_size: int, fps: float | None) -> WindowPlan:
    """Lay windows over a video; the last one is moved back to end with it.

    Args:
        seconds: Times of all frames, rising from 0.
        window: Frames of a window, a multiple of `tubelet_size`.
        stride: Frames from one window to the next, likewise.
        tubelet_size: Frames of a token.
        fps: Frames per second to read; default: every frame.
    """
    frames = choose_frames(seconds, fps)
    padded = max(window, -(-len(frames) // tubelet_size) * tubelet_size)
    # The last window is moved back instead of being padded: repeated frames would look like a pause.
    starts = list(range(0, padded - window, stride)) + [padded - window]
    return WindowPlan(frames, seconds[frames], starts, window, padded - len(frames))


def resolve_windows(
    model: UMTVideoModel, window: int | None, stride: int | None, fps: float | None
) -> tuple[int, int]:
    """Fill in and check window and stride.

    Raises:
        ValueError: If one is not positive or cuts a tubelet, the stride would leave frames out, or `fps` is not
            positive.
    """
    tubelet = model.config.tubelet_size
    window = model.config.num_frames if window is None else window
    stride = max(window // 2 // tubelet, 1) * tubelet if stride is None else stride
    for name, value in (("window", window), ("stride", stride)):
        if value < 1 or value % tubelet:
            raise ValueError(f"{name} must be a positive multiple of the model's tubelet_size {tubelet}, got {value}.")
    if stride > window:
        raise ValueError(f"stride {stride} is longer than window {window} and leaves frames out; make it shorter.")
    if fps is not None and not 0 < fps < float("inf"):
        raise ValueError(f"fps must be positive, got {fps}.")
    return window, stride


@torch.inference_mode()
def extract_features(
    video: str | os.PathLike,
    model: UMTVideoModel,
    processor: UMTVideoProcessor,
    level: FeatureLevel = "clip",
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    fps: float | None = None,
) -> VideoFeatures:
    """Slide a model over a video.

    A clip's feature is the mean over the window's tokens (`pooler_output`). A tubelet's is the token itself, a frame's
    the mean over the tokens of its tubelet; where windows overlap, both are averaged over the windows that see them.
    With a `keep_ratio` below 1 means are over the tokens that are kept, and tubelets without a token are 0.

    Args:
        video: What `open_video` takes.
        model: In evaluation mode.
        processor: Prepares the frames; its sampling plays no part.
        level: What has a feature.
        window: Frames the model sees at a time; default: its `num_frames`.
        stride: Frames from one window to the next; default: half a window.
        batch_size: Windows that go through the model at a time.
        fps: Frames per second that are read; default: every frame.

    Returns:
        Features with the frames and times they belong to. The last window ends with the video; a video shorter than a
        window is filled with its last frame.

    Raises:
        VideoDecodingError: If the video cannot be read.
        ValueError: If an argument makes no sense.

    Examples:
        >>> from umt_hf.inference.features import extract_features, load_encoder
        >>> model, processor = load_encoder("umt-vit-b16")
        >>> found = extract_features("video.mp4", model, processor, stride=8)
        >>> found.features.shape[0]  # 24 frames, three windows of 8
        3
    """
    if level not in get_args(FeatureLevel):
        raise ValueError(f"level must be one of {list(get_args(FeatureLevel))}, got {level!r}.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    window, stride = resolve_windows(model, window, stride, fps)
    tubelet = model.config.tubelet_size
    with open_video(video, processor.decoder) as reader:
        plan = plan_windows(_read_times(reader, fps), window, stride, tubelet, fps)
        windows = _slide(_read_frames(reader.iterate_frames(plan.frames.tolist()), plan, processor), plan)
        merge = _collect_clips if level == "clip" else _average_steps
        features = merge(_encode(windows, plan, model, batch_size, level), plan, tubelet)
    if level == "frame":
        features = features.repeat(tubelet, axis=0)[: len(plan.frames)]
    first, last = _find_extents(plan, level, tubelet)
    return VideoFeatures(
        features, plan.frames[first], plan.frames[last], plan.seconds[first], plan.seconds[last], plan.num_padded
    )


def _read_times(reader: VideoReader, fps: float | None) -> np.ndarray:
    """Times of all frames; NaN where these are pictures or an array, which have none."""
    if fps is None and isinstance(reader, FrameFolderReader | DecodedFramesReader):
        return np.full(reader.num_frames, np.nan)
    return reader.compute_timestamps()


def _read_frames(
    frames: Iterator[np.ndarray], plan: WindowPlan, processor: UMTVideoProcessor
) -> Iterator[torch.Tensor]:
    """Prepare frames, `(C, H, W)` each, a window's worth at a time, and repeat the last as planned."""
    pixel_values = torch.empty(0)  # of no frame: every plan reads one at least
    while block := list(islice(frames, plan.window)):
        batch = processor(np.stack(block), do_sample_frames=False, num_clips=1, num_crops=1, return_tensors="pt")
        pixel_values = batch["pixel_values"][0]
        yield from pixel_values
    for _ in range(plan.num_padded):
        yield pixel_values[-1]


def _slide(frames: Iterator[torch.Tensor], plan: WindowPlan) -> Iterator[torch.Tensor]:
    """Windows `(T, C, H, W)`; frames are let go as soon as no window needs them."""
    held: list[torch.Tensor] = []
    previous = 0
    for start in plan.starts:
        # Only what the next window shares with this one is kept.
        held = held[start - previous :]
        held += islice(frames, plan.window - len(held))
        previous = start
        yield torch.stack(held)


def _encode(
    windows: Iterator[torch.Tensor], plan: WindowPlan, model: UMTVideoModel, batch_size: int, level: FeatureLevel
) -> Iterator[tuple[int, np.ndarray]]:
    """Start and features of each window: `(D,)` for clips, `(steps, D)` or `(steps, rows, columns, D)` for others."""
    starts = iter(plan.starts)
    while batch := list(islice(windows, batch_size)):
        pixel_values = torch.stack(batch)
        outputs = model(pixel_values=pixel_values.to(model.device))
        if level == "clip":
            features = outputs.pooler_output
        else:
            grid = model.embeddings.patch_embeddings.compute_grid(pixel_values)
            features, kept = outputs.last_hidden_state, outputs.kept_indices
            if level == "frame":  # each has as many tokens, whatever share of them is kept
                features = features.unflatten(1, (grid[0], -1)).mean(dim=2)
            else:
                features = features if kept is None else spread_tokens(features, kept, grid[0] * grid[1] * grid[2])
                features = features.unflatten(1, grid)
        yield from zip(islice(starts, len(batch)), features.float().cpu().numpy(), strict=True)


def _collect_clips(encoded: Iterator[tuple[int, np.ndarray]], _plan: WindowPlan, _tubelet: int) -> np.ndarray:
    return np.stack([features for _, features in encoded])


def _average_steps(encoded: Iterator[tuple[int, np.ndarray]], plan: WindowPlan, tubelet: int) -> np.ndarray:
    """Mean of each time step's features over the windows that see it, without the steps of repeats alone."""
    num_steps = (len(plan.frames) + plan.num_padded) // tubelet
    counts, sums = np.zeros(num_steps, np.float32), np.zeros((num_steps, 0), np.float32)
    for start, features in encoded:
        if not sums.size:  # the first window says how wide features are
            sums = np.zeros((num_steps, *features.shape[1:]), np.float32)
        steps = slice(start // tubelet, start // tubelet + len(features))
        # Sums, since all windows of a long video would not fit into memory.
        sums[steps] += features
        counts[steps] += 1
    sums /= counts.reshape(-1, *[1] * (sums.ndim - 1))
    return sums[: -(-len(plan.frames) // tubelet)]


def _find_extents(plan: WindowPlan, level: FeatureLevel, tubelet: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of the first and last frame of each row of features."""
    total = len(plan.frames)
    if level == "frame":
        return np.arange(total), np.arange(total)
    first = np.array(plan.starts) if level == "clip" else np.arange(0, total, tubelet)
    length = plan.window if level == "clip" else tubelet
    return first, (first + length - 1).clip(max=total - 1)


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
    tokens: KeptTokenArguments | None = None,
) -> FeatureReport:
    """Extract the features of videos into a folder, one safetensors file per video; finished ones are left alone.

    Every process that `accelerate launch` starts takes a share of the videos. A file is complete or absent, so that a
    killed run goes on where it was.

    Args:
        sources: Video files, and folders with videos at any depth. The main process's list counts.
        model: Folder or Hub id of a UMT model with its processor.
        folder: Where `settings.json`, `skipped.json` and the files go.
        level: See `extract_features`, as for the next four.
        window: Frames the model sees at a time.
        stride: Frames from one window to the next.
        batch_size: Windows that go through the model at a time.
        fps: Frames per second that are read.
        format: "dataset" also joins all files of the folder into a `datasets` dataset in `dataset/`, one row per
            feature; later runs keep it up to date.
        announce: Gets a line on what was found, in the main process.
        tokens: Which tokens of a window the encoder sees; default: as the model's configuration says.

    Returns:
        What was done, the same in all processes.

    Raises:
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
    if level not in get_args(FeatureLevel):
        raise ValueError(f"level must be one of {list(get_args(FeatureLevel))}, got {level!r}.")
    # One process may get the long videos; the others wait.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
    encoder, processor = load_encoder(model)
    kept_tokens = keep_tokens(encoder, tokens)
    window, stride = resolve_windows(encoder, window, stride, fps)
    folder = Path(folder)
    settings = {"level": level, "window": window, "stride": stride, "fps": fps, **_describe(encoder, processor)}
    settings |= {"mixed_precision": accelerator.mixed_precision, "kept_tokens": kept_tokens}
    _check_settings(folder, settings)
    accelerator.wait_for_everyone()  # before the main process writes what the others check

    plan: list[Any] = [None]
    if accelerator.is_main_process:
        files, missing = list_videos(sources)
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / "settings.json", {"settings": settings, "model": str(model), **collect_versions()})
        plan = [([file for file in files if not _is_finished(folder, file)], len(files), missing)]
        if announce is not None:
            announce(f"{len(files):,} videos found, {len(plan[0][0]):,} of them new or changed.")
    new, num_files, missing = broadcast_object_list(plan)[0]
    encoder = place_model(encoder, accelerator.device)

    def extract(path: str) -> VideoFeatures:
        with accelerator.autocast():
            return extract_features(path, encoder, processor, level, window, stride, batch_size, fps)

    share = tqdm(
        new[accelerator.process_index :: accelerator.num_processes],
        unit="video",
        disable=not accelerator.is_main_process,
    )
    skipped = [found for file in share if (found := _save_video(folder, file, extract, settings)) is not None]
    skipped = sorted(missing + gather_object(skipped), key=lambda video: video.path)
    if accelerator.is_main_process:
        _write_json(folder / "skipped.json", [asdict(video) for video in skipped])
        if format == "dataset" or (folder / "dataset").is_dir():  # which is never older than the files
            _write_dataset(folder)
    accelerator.wait_for_everyone()
    return FeatureReport(len(new) - (len(skipped) - len(missing)), num_files - len(new), tuple(skipped))


def _save_video(
    folder: Path, file: VideoFile, extract: Callable[[str], VideoFeatures], settings: dict[str, Any]
) -> SkippedVideo | None:
    """Write a video's features, or say why there are none."""
    try:
        found = extract(file.path)
        if not np.isfinite(found.features).all():
            raise VideoDecodingError(f"{file.path}: has features that are not finite; the model cannot encode it.")
    except (VideoDecodingError, OSError) as error:
        name_features(folder, file.path).unlink(missing_ok=True)  # those of its earlier contents
        return SkippedVideo(file.path, str(error).removeprefix(f"{file.path}: "))
    _write_features(folder, file, found, settings)
    return None


def name_features(folder: str | os.PathLike, video: str) -> Path:
    """File of a video's features: the video's name, and a digest of its path, since others may have the same name.

    Characters that Windows forbids in names are replaced.
    """
    path = video if is_url(video) else os.path.abspath(video)
    digest = hashlib.blake2b(path.encode(errors="surrogateescape"), digest_size=4).hexdigest()
    # What follows the name in a URL may hold keys, and characters that a file system does not take.
    name = Path(urlsplit(path).path if is_url(path) else path).stem
    stem = FORBIDDEN.sub("_", name).encode(errors="surrogateescape")[:NAME_BYTES].decode(errors="ignore")
    return Path(folder) / f"{stem}-{digest}.safetensors"


def _describe(model: UMTVideoModel, processor: UMTVideoProcessor) -> dict[str, Any]:
    settings = json.loads(processor.to_json_string())
    pixels = {name: settings.get(name) for name in PIXEL_SETTINGS if name not in ("sampling_strategy", "frame_stride")}
    return {"weights": compute_fingerprint(model), "video_processor": pixels}


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Make sure that a folder's features were made as those to be added."""
    path = folder / "settings.json"
    if not path.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(f"{folder} holds something other than features; choose another folder.")
        return
    made = json.loads(path.read_text(encoding="utf-8")).get("settings", {})
    for name, value in settings.items():
        if made.get(name) != value:
            raise ValueError(
                f"{folder} holds features made with {name}={made.get(name)!r}, not {value!r}. Use the same settings "
                "and model, or a new folder."
            )


def _is_finished(folder: Path, file: VideoFile) -> bool:
    # Size and time of the video stand in the file: features of a changed video do not count.
    path = name_features(folder, file.path)
    if not path.is_file():
        return False
    try:
        with safe_open(path, "np") as stored:
            metadata = stored.metadata() or {}
    except SafetensorError:  # damaged since: extracted again
        return False
    return (metadata.get("size_bytes"), metadata.get("modified_ns")) == (str(file.size_bytes), str(file.modified_ns))


def _write_features(folder: Path, file: VideoFile, found: VideoFeatures, settings: dict[str, Any]) -> None:
    arrays = {
        name: np.ascontiguousarray(value) for name, value in vars(found).items() if isinstance(value, np.ndarray)
    }
    metadata = {name: str(value) for name, value in asdict(file).items()}
    metadata |= {"num_padded_frames": str(found.num_padded_frames), "settings": json.dumps(settings)}
    final = name_features(folder, file.path)
    unfinished = final.with_name(final.name + UNFINISHED_SUFFIX)
    with naming_full_disk(final):
        save_file(arrays, unfinished, metadata)
        put_file(unfinished, final)


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


__all__ = ["FeatureReport", "VideoFeatures", "extract_features", "load_encoder", "save_features"]
