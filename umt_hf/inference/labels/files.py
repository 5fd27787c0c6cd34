"""Classes of any number of videos into a file of JSON lines, which a killed run goes on with.

RESULTS                  a line per video: its path, size and time, and its likeliest classes, or those of each moment
RESULTS.manifest.json    model and settings that made them, and the videos that could not be read
.RESULTS.lock            held while a command writes
"""

import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image, UnidentifiedImageError

from ...data.video_files import SkippedVideo, VideoFile, list_videos
from ...plots import TimelineSpan, plot_timeline
from ...runs.disk import flush, hold_lock, name_unfinished, put_file, write_text
from ...runs.folder import collect_versions
from ..classification import LabelledVideo, LabelOptions, VideoClassifier, build_patient_accelerator, merge_views
from ..engine import in_model, inference_run, name_dtype
from ..features import name_features
from ..held_out import build_bar, evaluation_mode
from ..loading import PIXEL_SETTINGS, compute_fingerprint
from ..moments import MomentClips, MomentCollector, MomentRows, WindowSettings, read_moments
from .scored import ScoredLabel, rank_labels


@dataclass(frozen=True)
class LabelFileReport:
    """What a run of `label_files` did.

    Attributes:
        num_classified: Videos that were new or had changed.
        num_unchanged: Videos whose classes were there already.
        skipped: Videos that could not be read.
    """

    num_classified: int
    num_unchanged: int
    skipped: tuple[SkippedVideo, ...]

    def format(self) -> str:
        """Write it as lines for people, each skipped video with its reason."""
        line = f"{self.num_classified} classified, {self.num_unchanged} unchanged, {len(self.skipped)} skipped"
        return "\n".join([line, *(video.format() for video in self.skipped)])


@dataclass(frozen=True)
class LabelledMoment:
    """The likeliest classes of a moment of a video, best first."""

    start_seconds: float
    end_seconds: float
    labels: tuple[ScoredLabel, ...]


@dataclass(frozen=True)
class VideoTimeline:
    """What a video shows from moment to moment."""

    path: str
    moments: tuple[LabelledMoment, ...]

    def format(self) -> str:
        """Write it as lines for people: a line per moment, its classes side by side."""
        lines = [
            f"  {moment.start_seconds:8.1f}-{moment.end_seconds:8.1f}  "
            + "  ".join(scored.format().strip() for scored in moment.labels)
            for moment in self.moments
        ]
        return "\n".join([self.path, *lines])


class LabelFile:
    """The results of `label_files` on the disk.

    Args:
        path: File of the results.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.manifest = self.path.with_name(f"{self.path.name}.manifest.json")
        self.num_lines = 0

    def check(self, settings: dict[str, Any]) -> None:
        """Make sure that the results there were made as those to be added.

        Raises:
            FileExistsError: If the file holds something else.
            ValueError: If they were made with another model or other settings.
        """
        if not self.path.exists():
            return
        if not self.path.is_file() or not self.manifest.is_file():
            raise FileExistsError(f"{self.path} holds something other than results of this command; choose another.")
        made = json.loads(self.manifest.read_text(encoding="utf-8")).get("settings", {})
        for name, value in settings.items():
            if made.get(name) != value:
                raise ValueError(
                    f"{self.path} holds results made with {name}={made.get(name)!r}, not {value!r}. Use the same "
                    "settings and model, or a new file."
                )

    @contextmanager
    def reserve(self) -> Generator[None]:
        """Keep other commands out.

        Raises:
            BlockingIOError: If another command is writing.
        """
        with hold_lock(self.path.with_name(f".{self.path.name}.lock"), str(self.path)):
            yield

    def select_new(self, files: Sequence[VideoFile]) -> set[int]:
        """Rows of the files that have no line, and drop lines of files that have changed or a kill has cut off."""
        rows = {file.path: row for row, file in enumerate(files)}
        wanted, kept, is_complete = set(range(len(files))), 0, True
        if not self.path.exists():
            return wanted
        unfinished = name_unfinished(self.path)
        with self.path.open("rb") as lines, unfinished.open("wb") as copy:
            for number, line in enumerate(lines, start=1):
                found = self._read(line, number)
                row = None if found is None else rows.get(found.path)
                if found is None or (row is not None and (files[row] != found or row not in wanted)):
                    is_complete = False
                    continue
                wanted.discard(-1 if row is None else row)
                copy.write(line)
                kept += 1
        self.num_lines = kept
        # Lines of videos that are not among these stay: results of several folders may be in one file.
        if is_complete:
            unfinished.unlink()
        else:
            put_file(unfinished, self.path)
        return wanted

    def _read(self, line: bytes, number: int) -> VideoFile | None:
        """Which video a line is about; `None` for one that a kill has cut off."""
        if not line.endswith(b"\n"):
            return None
        try:
            content = json.loads(line)
            return VideoFile(content["path"], content["size_bytes"], content["modified_ns"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path}, line {number}: is not a result of this command; choose another."
            ) from error

    def read_timelines(self, files: Sequence[VideoFile]) -> Generator[VideoTimeline]:
        """Timelines of those files that have one, in the order of the lines."""
        paths = {file.path for file in files}
        with self.path.open("rb") as lines:
            for line in lines:
                content = json.loads(line)
                if content["path"] in paths and "moments" in content:
                    yield _build_timeline_of_line(content)

    def write_manifest(self, model: str, settings: dict[str, Any], skipped: Sequence[SkippedVideo]) -> None:
        """Record what makes the results, and which videos have none."""
        content = {"settings": settings, "model": model, **collect_versions(), "skipped": [*map(asdict, skipped)]}
        write_text(self.manifest, json.dumps(content, indent=1) + "\n")


def label_files(
    classifier: VideoClassifier,
    sources: Iterable[str],
    path: str | os.PathLike,
    options: LabelOptions,
    announce: Callable[[str], object] | None = None,
    count: Callable[[int, int], object] | None = None,
    windows: WindowSettings | None = None,
    draw: Callable[[VideoTimeline], object] | None = None,
) -> LabelFileReport:
    """Write the likeliest classes of videos to a file as they come; those that are there already are left alone.

    Every process that `accelerate launch` starts takes a share, the main one writes. The lines are in the order of the
    paths; a run that was killed and is started again gives the same file as one that was not.

    Args:
        classifier: Of every process.
        sources: Video files, and folders with videos at any depth. The main process's list counts.
        path: File of the results; its folder is made if need be.
        options: Views, batches and answers.
        announce: Gets a line on what was found, in the main process.
        count: Gets, after each video, how many are done and how many there are.
        windows: Of moments, each of which is classified by itself; default: complete videos.
        draw: Gets each timeline in the main process as it comes, and at the end those of all lines of the videos: a
            picture that is there already can be left alone, as `save_timeline` does.

    Returns:
        What was done, the same in all processes.

    Raises:
        FileExistsError: If the file holds something else.
        BlockingIOError: If another command is writing it.
        ValueError: If a source folder has no videos, or the results there were made with another model or other
            settings.
    """
    accelerator = build_patient_accelerator()
    results, settings = LabelFile(path), _describe(classifier, options, accelerator.mixed_precision)
    settings |= dict.fromkeys(("window_seconds", "stride_seconds")) if windows is None else asdict(windows)
    results.check(settings)
    accelerator.wait_for_everyone()  # before the main process writes what the others check
    is_main = accelerator.is_main_process
    with results.reserve() if is_main else nullcontext():
        plan: list[Any] = [_plan(results, sources) if is_main else None]
        files, wanted, missing = broadcast_object_list(plan)[0]
        num_unchanged = len(files) - len(wanted)
        if is_main:
            results.write_manifest(str(classifier.model.name_or_path), settings, missing)
            if announce is not None:
                announce(f"{len(files):,} videos found, {len(wanted):,} of them new or changed.")
        skipped = list(missing)
        if windows is None:
            found = classifier.label(files, options, accelerator, wanted)
        else:
            found = label_moments(classifier, files, windows, options, accelerator, wanted)
        run = inference_run(announce if is_main else None, options.dataloader_timeout_seconds)
        with run, results.path.open("ab") if is_main else nullcontext() as file, closing(found):
            for done, (row, video) in enumerate(found, start=num_unchanged + 1):
                if isinstance(video, SkippedVideo):
                    skipped.append(video)
                elif file is not None:
                    _write_line(file, files[row], video)
                    if draw is not None and isinstance(video, VideoTimeline):
                        draw(video)
                if count is not None:
                    count(done, len(files))
        skipped.sort(key=lambda video: video.path)
        if is_main:
            flush(results.path)
            if draw is not None:
                for video in results.read_timelines(files):
                    draw(video)
            results.write_manifest(str(classifier.model.name_or_path), settings, skipped)
    accelerator.wait_for_everyone()
    return LabelFileReport(len(wanted) - (len(skipped) - len(missing)), num_unchanged, tuple(skipped))


def iterate_timelines(
    classifier: VideoClassifier,
    sources: Iterable[str],
    windows: WindowSettings,
    options: LabelOptions,
    announce: Callable[[str], object],
) -> Generator[VideoTimeline | SkippedVideo]:
    """The likeliest classes of each moment of videos, video after video.

    Args:
        classifier: Of every process.
        sources: Video files, and folders with videos at any depth. The main process's list counts.
        windows: Length and distance of the moments.
        options: Batches and answers; `num_clips` and `num_crops` are not used, as a moment is one view.
        announce: Gets a line on what was found, in the main process.

    Yields:
        The sources that do not exist, then each video in order of its path; the same in all processes.

    Raises:
        ValueError: If a source folder has no videos.
    """
    accelerator = build_patient_accelerator()
    listed = [list_videos(sources) if accelerator.is_main_process else None]
    files, missing = broadcast_object_list(listed)[0]
    if accelerator.is_main_process:
        announce(f"{len(files):,} videos found.")
    yield from missing
    for _, video in label_moments(classifier, files, windows, options, accelerator, set(range(len(files)))):
        yield video


def label_moments(
    classifier: VideoClassifier,
    files: Sequence[VideoFile],
    windows: WindowSettings,
    options: LabelOptions,
    accelerator: Accelerator,
    wanted: set[int],
) -> Generator[tuple[int, VideoTimeline | SkippedVideo]]:
    """Label the moments of files in their order; each moment is one view.

    Args:
        classifier: Of every process.
        files: All of them, the same in every process.
        windows: Length and distance of the moments.
        options: Batches and answers.
        accelerator: Of the run; all processes must call this.
        wanted: Rows of those to label.

    Yields:
        Row and result, the same in all processes.
    """
    rows = sorted(wanted)
    places = {files[row].path: row for row in rows}
    rank, count = accelerator.process_index, accelerator.num_processes
    own = _label_own_moments(classifier, [files[row] for row in rows[rank::count]], windows, options, accelerator)
    with closing(own), build_bar(len(rows), "video", accelerator, options.show_progress) as progress:
        for _ in range(0, len(rows), count):
            video = next(own, None)
            found = [] if video is None else [(places[video.path], video)]
            for row, result in sorted(gather_object(found), key=lambda pair: pair[0]):
                progress.update()
                yield row, result


def _label_own_moments(
    classifier: VideoClassifier,
    files: Sequence[VideoFile],
    windows: WindowSettings,
    options: LabelOptions,
    accelerator: Accelerator,
) -> Generator[VideoTimeline | SkippedVideo]:
    """Timelines of this process's videos, one each, in order."""
    collector = MomentCollector()
    # Not joined: the last bits of a result depend on the batch, and a resumed run has other neighbours.
    reads = read_moments(
        files, classifier.processor, windows, options.batch_size, options.num_workers, is_joined=False
    )
    for read in (read for batch in reads for read in batch):
        if isinstance(read, SkippedVideo):
            yield from collector.skip(read)
            continue
        video = collector.add(read, _score_moments(classifier, read, accelerator))
        if isinstance(video, SkippedVideo):
            yield video
        elif video is not None:
            yield _build_timeline(classifier, video, options.top_k)


def _score_moments(classifier: VideoClassifier, read: MomentClips, accelerator: Accelerator) -> np.ndarray:
    """Probabilities `(windows, classes)`."""
    model = classifier.model
    with evaluation_mode(model, accelerator), in_model():
        logits = model(read.pixel_values.to(model.device, model.dtype)).logits.float().cpu()
    return merge_views(logits, 1, classifier.many_labels).numpy()


def _build_timeline(classifier: VideoClassifier, video: MomentRows, top_k: int) -> VideoTimeline | SkippedVideo:
    if not all(np.isfinite(scores).all() for scores in video.values):
        return SkippedVideo(video.file.path, "Its scores are not finite; the model cannot classify it.")
    moments = [
        LabelledMoment(moment.start_seconds, moment.end_seconds, rank_labels(scores, classifier.labels, top_k))
        for moment, scores in zip(video.moments, video.values, strict=True)
    ]
    return VideoTimeline(video.file.path, tuple(moments))


def _build_timeline_of_line(content: dict[str, Any]) -> VideoTimeline:
    moments = [
        LabelledMoment(
            moment["start_seconds"],
            moment["end_seconds"],
            tuple(ScoredLabel(**label) for label in moment["labels"]),
        )
        for moment in content["moments"]
    ]
    return VideoTimeline(content["path"], tuple(moments))


def save_timeline(video: VideoTimeline, folder: str | os.PathLike) -> Path:
    """Draw a timeline as a picture in a folder, which is made if need be; one that shows the same is left alone.

    Args:
        video: What it shows.
        folder: Of the pictures.

    Returns:
        The file, named after the video. Its comment says which timeline it shows.
    """
    path = name_features(folder, video.path).with_suffix(".png")
    digest = hashlib.blake2b(json.dumps(asdict(video)).encode(), digest_size=16).hexdigest()
    if _read_comment(path) == digest:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    spans = [
        TimelineSpan(moment.start_seconds, moment.end_seconds, {one.label: one.probability for one in moment.labels})
        for moment in video.moments
    ]
    plot_timeline(spans, path, Path(video.path).name, comment=digest)
    return path


def _read_comment(path: Path) -> str | None:
    """Comment of a picture; `None` where there is none, or no picture."""
    try:
        with Image.open(path) as picture:
            return picture.info.get("Comment")
    except (FileNotFoundError, UnidentifiedImageError):
        return None


def _plan(results: LabelFile, sources: Iterable[str]) -> tuple[list[VideoFile], set[int], list[SkippedVideo]]:
    """All files, the rows of those to classify, and sources that do not exist."""
    files, missing = list_videos(sources)
    return files, results.select_new(files), missing


def _write_line(file: BinaryIO, source: VideoFile, video: LabelledVideo | VideoTimeline) -> None:
    content = asdict(video)
    del content["path"]
    # In one piece, so that a kill cuts off the last line at most.
    file.write((json.dumps(asdict(source) | content) + "\n").encode())
    file.flush()


def _describe(classifier: VideoClassifier, options: LabelOptions, mixed_precision: str) -> dict[str, Any]:
    """What a result depends on."""
    processor = json.loads(classifier.processor.to_json_string())
    return {
        "dtype": name_dtype(classifier.model.dtype),  # first, since the fingerprint is that of rounded weights
        "templates": classifier.templates,  # before the fingerprint, which they change
        "classes": list(classifier.labels),
        "weights": compute_fingerprint(classifier.model, classifier.fresh),
        "mixed_precision": mixed_precision,
        "top_k": options.top_k,
        "num_frames": classifier.processor.num_frames,
        "num_clips": options.num_clips or classifier.processor.num_clips,
        "num_crops": options.num_crops or classifier.processor.num_crops,
        "video_processor": {name: processor.get(name) for name in PIXEL_SETTINGS},
        "kept_tokens": classifier.kept_tokens,
    }


__all__ = [
    "LabelFile",
    "LabelFileReport",
    "LabelledMoment",
    "VideoTimeline",
    "iterate_timelines",
    "label_files",
    "save_timeline",
]
