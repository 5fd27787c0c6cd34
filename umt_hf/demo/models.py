"""The models behind the page, each with the one thing that it does for a visitor.

Legend: T frames, P patches per frame, K aligned layers, C channels of the aligned features.
"""

import functools
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn
from torch.nn import functional as F

from ..data.video_files import list_videos
from ..hub_cards.released_names import resolve_released
from ..inference.classification import VideoClassifier
from ..inference.loading import load_complete_model, load_video_processor, place_model
from ..inference.moments import cut_moment
from ..inference.question_answering import VideoAnswerer
from ..inference.search import VideoSearcher, embed_videos, read_embed_options
from ..inference.video_index import VideoIndex
from ..modeling.configuration_umt_video import UMTVideoConfig
from ..modeling.masking_umt_video import build_mask
from ..modeling.modeling_umt_video import UMTVideoForPreTraining
from ..plots import draw_masked_frames
from ..processing.decoding import VideoDecodingError, open_video
from ..processing.video_processing_umt_video import UMTVideoProcessor
from ..runs.model_names import find_released
from ..training.alignment import check_grids, load_teacher
from ..training.arguments import TeacherArguments
from ..zoo import load_zoo
from .first_look import CLIP, StoredViewer
from .looks import TeacherLook, draw_visible
from .settings import MODELS, DemoSettings, name_option

logger = logging.getLogger(__name__)

REMEMBERED_CLIPS = 4
THUMBNAIL_SIDE = 240
# Tasks of the released checkpoints that a setting takes.
TASKS = {
    "classifier": ("classification",),
    "student": ("pretraining",),
    "video_text": ("retrieval", "video_text_pretraining"),
    "question_answering": ("question_answering",),
}


class TeacherViewer:
    """Shows what the teacher looks at, and which patches a mask leaves.

    Args:
        teacher: Folder or Hub id of a CLIP or another tower that can teach.
        student: Of a stage-1 model that was trained with it; default: frames are read in the teacher's size.

    Raises:
        ValueError: If the two do not divide a frame alike, or the student lacks weights.
    """

    def __init__(self, teacher: str, student: str | None = None):
        # In full precision, whatever Accelerate is configured for: one clip at a time costs little.
        accelerator = Accelerator(mixed_precision="no")
        self.device = accelerator.device
        self.student = None
        if student is None:
            chosen = TeacherArguments(teacher_name_or_path=teacher, num_aligned_layers=1)
            self.teacher = load_teacher(chosen, "sdpa", accelerator, "--teacher")
            side = self.teacher.image_size
            self.config = UMTVideoConfig(image_size=side, patch_size=self.teacher.patch_size)
            self.processor = UMTVideoProcessor.from_model_config(self.config)
        else:
            self.student = place_model(load_complete_model(UMTVideoForPreTraining, student), self.device)
            self.processor = load_video_processor(student)
            self.config = self.student.config
            names = ("teacher_image_size", "num_aligned_layers", "alignment_interval", "alignment_norm")
            fields = {name: getattr(self.config, name) for name in names}
            chosen = TeacherArguments(teacher_name_or_path=teacher, **fields)
            self.teacher = load_teacher(chosen, "sdpa", accelerator, "--teacher")
            check_grids(self.config, self.teacher)
        # The teacher's pass takes longest and is the same for every mask.
        self._encode = functools.lru_cache(maxsize=REMEMBERED_CLIPS)(self._encode_clip)

    @torch.inference_mode()
    def look(self, video: str, mask_type: str, mask_ratio: float, seed: int = 0) -> TeacherLook:
        """Draw saliency and mask over the frames of a clip.

        With the same seed, the patches that are visible at one ratio stay visible at all lower ones.

        Args:
            video: Path.
            mask_type: "attention", "tube" or "random".
            mask_ratio: Share of patches hidden, in [0, 1).
            seed: Of the mask.

        Raises:
            VideoDecodingError: If the video cannot be read.
        """
        pixel_values, states, saliency = self._encode(video, os.stat(video).st_mtime_ns)
        num_patches = saliency.numel()
        visible = draw_visible(mask_type, mask_ratio, saliency, seed)
        agreement = None
        if self.student is not None:
            targets = self.teacher.project(states, 1, visible)
            features = self.student(pixel_values, visible_indices=visible).aligned_features
            agreement = F.cosine_similarity(features, targets, dim=-1).mean().item()
        frames = draw_masked_frames(pixel_values[0], saliency, build_mask(visible, num_patches)[0])
        return TeacherLook(frames, visible.shape[1], num_patches, agreement)

    def _encode_clip(self, video: str, _modified_ns: int) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """Frames `(1, T, 3, H, W)`, teacher's states and saliency `(T, P)`, kept while a visitor moves the slider."""
        pixel_values = self.processor(video, return_tensors="pt")["pixel_values"].to(self.device)
        return pixel_values, *self.teacher.encode(pixel_values)


@dataclass(frozen=True)
class FoundClip:
    """A video that a search found.

    Args:
        path: Its file.
        similarity: Cosine of video and text.
        matching_score: Raw logit of the matching head; `None` if not re-ranked.
        picture: Its middle frame, or that of its best moment.
        start_seconds: Where the best moment begins; `None` if the index holds complete videos.
    """

    path: str
    similarity: float
    picture: Image.Image
    start_seconds: float | None = None
    matching_score: float | None = None


class FolderSearcher:
    """Finds videos of a folder by text.

    Args:
        videos: The folder.
        model: Folder or Hub id of a stage-2 or retrieval model with its processor.
        index: Folder of the index, which is made or brought up to date; default: a temporary one. With one of moments,
            a search says when in a video.

    Raises:
        ImportError: If LanceDB is not installed.
        ValueError: If no video can be read, the model is not a dual encoder, or the index was built by another.
    """

    def __init__(self, videos: str, model: str, index: str | None = None):
        self._temporary = None
        if index is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="umt_hf_index_")
            index = os.path.join(self._temporary.name, "index")
        # Only new and changed videos are encoded, so that a kept index makes the start quick.
        kept = VideoIndex(index)
        report = embed_videos([videos], model, index, **(read_embed_options(kept) if kept.exists() else {}))
        self.skipped = report.skipped
        self.num_videos = report.num_in_index
        self.searcher = VideoSearcher(index, model)

    @property
    def has_matching_head(self) -> bool:
        """Whether `search` can re-rank."""
        return self.searcher.encoder.has_matching_head

    @property
    def paths(self) -> list[str]:
        """All videos of the index."""
        return self.searcher.table.list_paths()

    def search(self, query: str, top_k: int = 8, rerank: bool = False) -> list[FoundClip]:
        """The videos that fit a text best, best first; those that cannot be read any more are left out.

        Raises:
            ValueError: If the query is empty.
        """
        hits = self.searcher.search(query, top_k, rerank)
        found = {hit.path: hit for hit in hits}
        middles = {
            hit.path: (hit.start_seconds + hit.end_seconds) / 2
            for hit in hits
            if hit.start_seconds is not None and hit.end_seconds is not None
        }
        return [
            FoundClip(path, found[path].similarity, picture, found[path].start_seconds, found[path].matching_score)
            for path, picture in draw_thumbnails(found, middles)
        ]


@dataclass
class DemoModels:
    """The loaded models, and the videos of the folder; `None` where a setting is left out.

    Without a teacher, the viewer shows the clip of the package with a stored saliency.

    Args:
        classifier: Names what a clip shows.
        viewer: Shows saliency and masks.
        searcher: Searches the videos.
        answerer: Answers questions.
        videos: Files of the folder.
        pending: Released checkpoints that are not on this machine yet: setting -> name. Their parts are `None`;
            without its student, the viewer is that of the teacher alone.
        settings: What they were loaded from.
    """

    classifier: VideoClassifier | None
    viewer: TeacherViewer | StoredViewer
    searcher: FolderSearcher | None
    answerer: VideoAnswerer | None
    videos: tuple[str, ...]
    pending: dict[str, str] = field(default_factory=dict)
    settings: DemoSettings = DemoSettings()

    def list_modules(self) -> list[nn.Module]:
        """Networks that work for visitors."""
        owners = [self.classifier, self.answerer, self.searcher.searcher.encoder if self.searcher else None]
        models: list[nn.Module] = [owner.model for owner in owners if owner is not None]
        if isinstance(self.viewer, TeacherViewer):
            models += [self.viewer.teacher, *([self.viewer.student] if self.viewer.student is not None else [])]
        return models

    def convert(self, setting: str) -> None:
        """Convert the released checkpoint of a setting into the cache, unless it is there, and load it from there.

        Raises:
            OSError: If it cannot be downloaded, or the cache cannot be written.
            ValueError: If its file is not what the zoo says.
            RuntimeError: If the converted folder does not give back what the file holds.
        """
        if setting in self.pending:
            resolve_released(self.pending[setting], convert=True)
            self.load(setting)
            del self.pending[setting]

    def load(self, setting: str) -> None:
        """Load the model of a setting; a student comes with its teacher."""
        settings, name = self.settings, getattr(self.settings, setting)
        if setting == "classifier":
            self.classifier = VideoClassifier(name)
        elif setting == "video_text" and settings.videos is not None:
            self.searcher = FolderSearcher(settings.videos, name, settings.index)
        elif setting == "question_answering":
            self.answerer = VideoAnswerer(name)
        elif setting in ("teacher", "student") and settings.teacher is not None:
            self.viewer = TeacherViewer(settings.teacher, settings.student if setting == "student" else None)


def load_demo_models(settings: DemoSettings) -> DemoModels:
    """Load what the settings name, and index the videos.

    A released checkpoint that is not on this machine is not loaded, but named in `pending`.

    Raises:
        ImportError: If LanceDB is missing and a search is asked for.
        OSError: If there is no such model.
        ValueError: If a model is of another kind, or the folder of videos holds none.
    """
    videos: tuple[str, ...] = ()
    if settings.videos is not None:
        files, missing = list_videos([settings.videos])
        if missing:
            raise ValueError(f"{settings.videos}: no such folder. Give a folder of videos.")
        videos = tuple(file.path for file in files)
    given = _list_given(settings)
    pending = {setting: name for setting, name in given.items() if _is_pending(setting, name)}
    models = DemoModels(None, StoredViewer(), None, None, videos, pending, settings)
    for setting in given:
        is_with_student = setting == "teacher" and "student" in given and "student" not in pending
        if setting not in pending and not is_with_student:
            models.load(setting)
    return models


def _list_given(settings: DemoSettings) -> dict[str, str]:
    return {setting: name for setting in MODELS if (name := getattr(settings, setting)) is not None}


def _is_pending(setting: str, name: str) -> bool:
    """Whether it is a released checkpoint for this setting that is not on this machine.

    Raises:
        ValueError: If it is one for something else.
    """
    entry = load_zoo().get(name)
    if entry is None or entry.file is None or find_released(name) != name or os.path.exists(name):
        return False
    tasks = TASKS.get(setting, ())
    if entry.task not in tasks:
        fits = f"needs a checkpoint for {' or '.join(tasks)}" if tasks else "needs an image tower, such as a CLIP"
        raise ValueError(f"{name} is a released checkpoint for {entry.task}, and {name_option(setting)} {fits}.")
    return True


def check_clip(video: str) -> None:
    """Make sure that a video can be read.

    Raises:
        VideoDecodingError: If it cannot.
    """
    with open_video(video) as reader:
        reader.get_frames([0])


def draw_thumbnail(video: str, seconds: float | None = None) -> Image.Image:
    """The middle frame of a video, or that of a time, small.

    Raises:
        VideoDecodingError: If the video cannot be read.
    """
    with open_video(video) as reader:
        place = reader.num_frames // 2
        if seconds is not None:
            place = cut_moment(reader.compute_timestamps(), seconds, seconds).first_frame
        picture = Image.fromarray(reader.get_frames([place])[0])
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return picture


def draw_thumbnails(
    videos: Iterable[str], seconds: Mapping[str, float] | None = None
) -> list[tuple[str, Image.Image]]:
    """Videos with a picture of each, of a time where one is given, without those that cannot be read."""
    drawn = []
    for video in videos:
        try:
            drawn.append((video, draw_thumbnail(video, (seconds or {}).get(video))))
        except VideoDecodingError as error:
            logger.warning("Not shown: %s", error)
    return drawn


def choose_examples(videos: Sequence[str], count: int = 8) -> list[tuple[str, Image.Image]]:
    """Some videos, evenly spread over a list, with a picture of each; the clip of the package where there is none."""
    # Neighbours in a folder are often of one class.
    places = np.linspace(0, len(videos) - 1, min(count, len(videos))).round().astype(int)
    return draw_thumbnails(videos[place] for place in places) or draw_thumbnails([str(CLIP)])


def describe_problem(error: Exception, paths: Iterable[str]) -> str:
    """An error's message for visitors: files by their name, without the folders of the server.

    Args:
        error: What was raised.
        paths: Files that it may name.
    """
    message = str(error)
    for path in paths:
        # Visitors need not know where the server keeps its files.
        message = message.replace(path, Path(path).name)
    return message
