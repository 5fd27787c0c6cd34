"""Classes of any number of videos into a file of JSON lines, which a killed run goes on with.

RESULTS                  a line per video: its path, size and time, and its likeliest classes
RESULTS.manifest.json    model and settings that made them, and the videos that could not be read
.RESULTS.lock            held while a command writes
"""

import json
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from accelerate.utils import broadcast_object_list

from ..data.video_files import SkippedVideo, VideoFile, list_videos
from ..runs.disk import flush, hold_lock, name_unfinished, put_file, write_text
from ..runs.folder import collect_versions
from .classification import LabelledVideo, LabelOptions, VideoClassifier, build_patient_accelerator
from .engine import inference_run, name_dtype
from .loading import PIXEL_SETTINGS, compute_fingerprint


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
        return "\n".join([line, *(f"skipped {video.path}: {video.reason}" for video in self.skipped)])


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
        found = classifier.label(files, options, accelerator, wanted)
        run = inference_run(announce if is_main else None, options.dataloader_timeout_seconds)
        with run, results.path.open("ab") if is_main else nullcontext() as file, closing(found):
            for done, (row, video) in enumerate(found, start=num_unchanged + 1):
                if isinstance(video, SkippedVideo):
                    skipped.append(video)
                elif file is not None:
                    _write_line(file, files[row], video)
                if count is not None:
                    count(done, len(files))
        skipped.sort(key=lambda video: video.path)
        if is_main:
            flush(results.path)
            results.write_manifest(str(classifier.model.name_or_path), settings, skipped)
    accelerator.wait_for_everyone()
    return LabelFileReport(len(wanted) - (len(skipped) - len(missing)), num_unchanged, tuple(skipped))


def _plan(results: LabelFile, sources: Iterable[str]) -> tuple[list[VideoFile], set[int], list[SkippedVideo]]:
    """All files, the rows of those to classify, and sources that do not exist."""
    files, missing = list_videos(sources)
    return files, results.select_new(files), missing


def _write_line(file: BinaryIO, source: VideoFile, video: LabelledVideo) -> None:
    # In one piece, so that a kill cuts off the last line at most.
    file.write((json.dumps(asdict(source) | {"labels": [asdict(one) for one in video.labels]}) + "\n").encode())
    file.flush()


def _describe(classifier: VideoClassifier, options: LabelOptions, mixed_precision: str) -> dict[str, Any]:
    """What a result depends on."""
    processor = json.loads(classifier.processor.to_json_string())
    return {
        "dtype": name_dtype(classifier.model.dtype),  # first, since the fingerprint is that of rounded weights
        "weights": compute_fingerprint(classifier.model),
        "mixed_precision": mixed_precision,
        "classes": list(classifier.labels),
        "top_k": options.top_k,
        "num_frames": classifier.processor.num_frames,
        "num_clips": options.num_clips or classifier.processor.num_clips,
        "num_crops": options.num_crops or classifier.processor.num_crops,
        "video_processor": {name: processor.get(name) for name in PIXEL_SETTINGS},
        "kept_tokens": classifier.kept_tokens,
    }


__all__ = ["LabelFile", "LabelFileReport", "label_files"]
