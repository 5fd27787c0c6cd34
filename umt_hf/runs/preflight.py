"""What would end a run after minutes of loading is looked for before: folders to write, trackers to import."""

import importlib.util
import tempfile
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .disk import LOCK_FILE, hold_lock
from .mistakes import read_rank

# Tracker, as Accelerate and Transformers call it -> packages, any of which it needs.
TRACKER_PACKAGES = {
    "aim": ("aim",),
    "clearml": ("clearml",),
    "comet_ml": ("comet_ml",),
    "dvclive": ("dvclive",),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
ALL_OR_NONE = ("all", "none")


def check_before_start(sections: Iterable[Any]) -> None:
    """Look at a run's arguments before anything is loaded.

    Raises:
        ValueError: If a tracker is unknown or not installed.
        OSError: If the output folder cannot be written.
    """
    sections = list(sections)
    choose_output_dir(sections)
    for section in sections:
        trackers = getattr(section, "report_to", None) or []
        for tracker in [trackers] if isinstance(trackers, str) else trackers:
            require_tracker(tracker)
        if getattr(section, "output_dir", None) and read_rank() == 0:
            require_writable(Path(section.output_dir))


def choose_output_dir(sections: Iterable[Any]) -> None:
    """Let an evaluation's report go to a folder of its model, unless a folder is given."""
    sections = list(sections)
    model = next((found for section in sections if (found := getattr(section, "model_name_or_path", None))), None)
    for section in sections:
        # Without a model the script says so.
        if model is not None and hasattr(section, "choose_output_dir"):
            section.choose_output_dir(str(model))


@contextmanager
def reserve_output(sections: Iterable[Any]) -> Generator[None]:
    """Keep other runs out of a training run's folder while this one lasts; the main process does.

    Raises:
        BlockingIOError: If another run writes there.
    """
    # Evaluations write complete files at their end, and need no lock.
    folder = next((section.output_dir for section in sections if hasattr(section, "resume_from_checkpoint")), None)
    if folder is None or read_rank() > 0:
        yield
        return
    with hold_lock(Path(folder) / LOCK_FILE, f"output_dir={folder}"):
        yield


def require_tracker(name: str) -> None:
    """Refuse a tracker without which a run would go on untracked.

    Raises:
        ValueError: If it is unknown or not installed.
    """
    if name in ALL_OR_NONE:
        return
    packages = TRACKER_PACKAGES.get(name)
    if packages is None:
        raise ValueError(f"report_to={name} is not a tracker; choose one of {', '.join(TRACKER_PACKAGES)}, or none.")
    if not any(importlib.util.find_spec(package) for package in packages):
        raise ValueError(f"report_to={name} needs a package: run `pip install {packages[0]}`, or report to none.")


def require_writable(folder: Path) -> None:
    """Refuse an output folder that cannot be made or written; leaves nothing behind.

    Raises:
        OSError: Names it, and the reason.
    """
    try:
        if folder.exists():
            with tempfile.TemporaryFile(dir=folder):
                return
        first = next(path for path in (*reversed(folder.absolute().parents), folder.absolute()) if not path.exists())
        first.mkdir()
        first.rmdir()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OSError(f"output_dir={folder} cannot be written: {reason}. Choose another folder.") from error
