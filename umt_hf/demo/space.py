"""The demo as a Space on the Hub: this folder's files, the package itself, its settings and its videos."""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from huggingface_hub import HfApi

from ..hub_cards.publishing import check_destination
from ..runs.folder import CARD_FILE
from .settings import MODELS, SETTINGS_FILE, DemoSettings

SPACE_FILES = (CARD_FILE, "requirements.txt", "app.py")
VIDEO_FOLDER = "videos"


def push_space(repo_id: str, settings: DemoSettings, private: bool = False, token: str | None = None) -> str:
    """Make or update a Space that shows the demo.

    Args:
        repo_id: Name of the Space, with or without a namespace.
        settings: Models by their Hub ids; the folder of videos is uploaded.
        private: Whether a new Space is private.
        token: Of the Hub; default: the one that is stored.

    Returns:
        Address of the Space.

    Raises:
        ValueError: If a model is a folder of this machine, which a Space could not load.
        PublishingError: If nobody is logged in.
        HfHubHTTPError: If the Hub refuses.
    """
    check_pushable(settings)
    check_destination(repo_id, token)
    api = HfApi(token=token)
    url = api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        write_space(Path(folder), settings)
        api.upload_folder(repo_id=url.repo_id, repo_type="space", folder_path=folder, commit_message="UMT demo")
    return str(url)


def check_pushable(settings: DemoSettings) -> None:
    """Make sure that a Space could load the models.

    Raises:
        ValueError: If one is a folder of this machine, or an index is named.
    """
    if settings.index is not None:
        raise ValueError("A Space makes its index when it starts: leave index out.")
    for name in MODELS:
        value = getattr(settings, name)
        if value is not None and Path(value).is_dir():
            raise ValueError(f"{name}={value} is a folder of this machine: push it to the Hub first and give its id.")


def write_space(folder: Path, settings: DemoSettings) -> None:
    """Write the files of a Space: `python app.py` runs it.

    Args:
        folder: Where they go.
        settings: Its videos are copied.
    """
    for name in SPACE_FILES:
        shutil.copy(Path(__file__).parent / name, folder / name)
    package = Path(__file__).parents[1]
    shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    if settings.videos is not None:
        shutil.copytree(settings.videos, folder / VIDEO_FOLDER)
        settings = replace(settings, videos=VIDEO_FOLDER)
    settings.save(folder / SETTINGS_FILE)
