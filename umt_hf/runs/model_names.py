"""What the name of a released checkpoint means on this machine: a folder here, or one that was converted before."""

import os
from pathlib import Path

from huggingface_hub import constants

from ..zoo import load_zoo
from .folder import CONFIG_FILE, CONVERSION_FILE

CACHE_FOLDER = "umt_hf"


def name_cache_folder(name: str) -> Path:
    """Where a released checkpoint is converted to by `--convert`: under `HF_HOME`, by its name."""
    return Path(constants.HF_HOME, CACHE_FOLDER, name)


def find_released(name_or_path: str | os.PathLike) -> str:
    """The folder that the name of a released checkpoint means, if it is on this machine.

    A folder of that name in the current directory comes first, then the cache that `--convert` fills.

    Args:
        name_or_path: Of any model.

    Returns:
        The folder in the cache, or `name_or_path` as it is: a folder, a Hub id, or a checkpoint that is not here yet.
    """
    name = os.fspath(name_or_path)
    if name not in load_zoo() or os.path.exists(name):
        return name
    folder = name_cache_folder(name)
    return str(folder) if is_converted(folder) else name


def is_converted(folder: Path) -> bool:
    """Whether a conversion has written the folder, to its end."""
    return (folder / CONFIG_FILE).is_file() and (folder / CONVERSION_FILE).is_file()
