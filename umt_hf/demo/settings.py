"""Which models and videos the demo shows."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..runs.folder import CONFIG_FILE

SETTINGS_FILE = "demo.json"
ENVIRONMENT_PREFIX = "UMT_DEMO_"
# Fields that name a model.
MODELS = ("classifier", "teacher", "student", "video_text", "question_answering")
# Where `make demo` leaves its models.
TOUR_FOLDER = Path("outputs/moving_shapes")


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Models, as folders or Hub ids, and videos. A tab whose model is missing says how to enable it.

    Args:
        classifier: Names what a clip shows.
        teacher: CLIP, SigLIP or DINO, whose saliency is drawn.
        student: Stage-1 model of that teacher. It says how frames are read and masked, and is compared with the
            teacher.
        video_text: Stage-2 or retrieval model, which searches the videos.
        question_answering: Answers questions about a clip.
        videos: Folder of videos to pick from and to search. Visitors of the page can download all of them.
        index: Folder for the search index; default: a temporary one, made anew at each start.
        max_upload_mb: Megabytes of an uploaded file at most.
        max_waiting: Requests of all visitors that may wait at a time; one more is refused.
        timeout_seconds: For the work of one request; then it is stopped, and a sentence says so.
    """

    classifier: str | None = None
    teacher: str | None = None
    student: str | None = None
    video_text: str | None = None
    question_answering: str | None = None
    videos: str | None = None
    index: str | None = None
    max_upload_mb: int = 500
    max_waiting: int = 32
    timeout_seconds: int = 120

    def __post_init__(self) -> None:
        for name in ("max_upload_mb", "max_waiting", "timeout_seconds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.student is not None and self.teacher is None:
            raise ValueError("student needs its teacher: give teacher as well.")
        if self.index is not None and self.video_text is None:
            raise ValueError("index needs the model that fills and searches it: give video_text as well.")

    @property
    def are_empty(self) -> bool:
        """Whether no model and no videos are named."""
        return all(getattr(self, name) is None for name in (*MODELS, "videos"))

    @classmethod
    def load(cls, file: Path | None = None, environment: Mapping[str, str] | None = None) -> "DemoSettings":
        """Settings of a Space: what `file` says, unless a variable such as `UMT_DEMO_CLASSIFIER` says otherwise.

        Args:
            file: JSON object that `save` wrote; it may be missing.
            environment: Variables; default: the process's own. Empty ones do not count.
        """
        environment = os.environ if environment is None else environment
        saved = json.loads(file.read_text(encoding="utf-8-sig")) if file is not None and file.is_file() else {}
        given: dict[str, Any] = {}
        for field in fields(cls):
            if value := environment.get(name_variable(field.name)):
                given[field.name] = _read_number(name_variable(field.name), value) if field.type is int else value
        return cls(**{**saved, **given})

    @classmethod
    def find(cls, folder: Path = TOUR_FOLDER) -> "DemoSettings":
        """Settings for what `make demo` has left: the models and the test clips that are in the folder.

        Args:
            folder: Output folder of the tour; it may be missing.
        """
        models: dict[str, Any] = {
            name: str(folder / name)
            for name in ("teacher", "student", "video_text")
            if (folder / name / CONFIG_FILE).is_file()
        }
        if "teacher" not in models:
            models.pop("student", None)
        videos = folder / "data" / "videos" / "test"
        return cls(**models, videos=str(videos) if models and videos.is_dir() else None)

    def save(self, file: Path) -> None:
        """Write those that are not the defaults as a JSON object."""
        defaults = {field.name: field.default for field in fields(self)}
        given = {name: value for name, value in asdict(self).items() if value != defaults[name]}
        file.write_text(json.dumps(given, indent=2) + "\n", encoding="utf-8")


def name_variable(field_name: str) -> str:
    """Environment variable of a setting."""
    return ENVIRONMENT_PREFIX + field_name.upper()


def name_option(field_name: str) -> str:
    """Option of `umt-hf demo` for a setting."""
    return "--" + field_name.replace("_", "-")


def _read_number(name: str, value: str) -> int:
    if not value.strip().isdecimal():
        raise ValueError(f"{name}={value} is not a number. Give digits alone.")
    return int(value)
