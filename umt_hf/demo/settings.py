"""Which models and videos the demo shows."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..runs.folder import CONFIG_FILE

SETTINGS_FILE = "demo.json"
ENVIRONMENT_PREFIX = "UMT_DEMO_"
# Where `make demo` leaves its models.
TOUR_FOLDER = Path("outputs/moving_shapes")


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Models, as folders or Hub ids, and videos. A tab whose model is missing says how to enable it.

    Args:
        classifier: Names what a clip shows.
        teacher: CLIP, whose saliency is drawn.
        student: Stage-1 model of that teacher. It says how frames are read and masked, and is compared with the
            teacher.
        video_text: Stage-2 or retrieval model, which searches the videos.
        question_answering: Answers questions about a clip.
        videos: Folder of videos to pick from and to search. Visitors of the page can download all of them.
        index: Folder for the search index; default: a temporary one, made anew at each start.
    """

    classifier: str | None = None
    teacher: str | None = None
    student: str | None = None
    video_text: str | None = None
    question_answering: str | None = None
    videos: str | None = None
    index: str | None = None

    def __post_init__(self) -> None:
        if self.student is not None and self.teacher is None:
            raise ValueError("student needs its teacher: give teacher as well.")
        if self.index is not None and self.video_text is None:
            raise ValueError("index needs the model that fills and searches it: give video_text as well.")

    @classmethod
    def load(cls, file: Path | None = None, environment: Mapping[str, str] | None = None) -> "DemoSettings":
        """Settings of a Space: what `file` says, unless a variable such as `UMT_DEMO_CLASSIFIER` says otherwise.

        Args:
            file: JSON object that `save` wrote; it may be missing.
            environment: Variables; default: the process's own. Empty ones do not count.
        """
        environment = os.environ if environment is None else environment
        saved = json.loads(file.read_text(encoding="utf-8-sig")) if file is not None and file.is_file() else {}
        variables = {field.name: environment.get(name_variable(field.name)) for field in fields(cls)}
        return cls(**{**saved, **{name: value for name, value in variables.items() if value}})

    @classmethod
    def find(cls, folder: Path = TOUR_FOLDER) -> "DemoSettings":
        """Settings for what `make demo` has left: the models and the test clips that are in the folder.

        Args:
            folder: Output folder of the tour; it may be missing.
        """
        models = {
            name: str(folder / name)
            for name in ("teacher", "student", "video_text")
            if (folder / name / CONFIG_FILE).is_file()
        }
        if "teacher" not in models:
            models.pop("student", None)
        videos = folder / "data" / "videos" / "test"
        return cls(**models, videos=str(videos) if models and videos.is_dir() else None)

    def save(self, file: Path) -> None:
        """Write them as a JSON object."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        file.write_text(json.dumps(given, indent=2) + "\n", encoding="utf-8")


def name_variable(field_name: str) -> str:
    """Environment variable of a setting."""
    return ENVIRONMENT_PREFIX + field_name.upper()


def name_option(field_name: str) -> str:
    """Option of `umt-hf demo` for a setting."""
    return "--" + field_name.replace("_", "-")
