"""Released checkpoints by their names: found on this machine, or converted into the cache once."""

import logging
import os
from collections.abc import Callable
from typing import Any

from filelock import FileLock

from ..runs.model_names import find_released, is_converted, name_cache_folder
from ..zoo import load_zoo
from .released_checkpoints import convert_released_checkpoint

logger = logging.getLogger(__name__)

LOCK_SUFFIX = ".lock"


def resolve_released(
    name_or_path: str | os.PathLike, convert: bool = False, announce: Callable[[str], Any] = logger.info
) -> str:
    """The folder of a released checkpoint, by its name; other names come back as they are.

    A folder of that name in the current directory comes first, then the cache under `HF_HOME`. Of several processes
    that are to convert the same checkpoint, one does and the others wait for it.

    Args:
        name_or_path: Of any model: a name of the zoo, a folder or a Hub id.
        convert: Whether a released checkpoint that is not on this machine is downloaded and converted into the cache.
        announce: Called with a line before a conversion, which takes a minute and a download.

    Returns:
        A folder; or the name as given, where it is another model's or nothing of it is here and `convert` is False.

    Raises:
        OSError: If the checkpoint cannot be downloaded, or the cache cannot be written.
        ValueError: If it was never released, or its file is not what the zoo says.
        RuntimeError: If the converted folder does not give back what the file holds.
    """
    name = find_released(name_or_path)
    if not convert or name not in load_zoo() or os.path.exists(name):
        return name
    folder = name_cache_folder(name)
    lock = FileLock(f"{folder}{LOCK_SUFFIX}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OSError(f"{folder.parent} cannot be written: {reason}. Set HF_HOME to another folder.") from error
    try:
        if not is_converted(folder):
            announce(f"Converting {name}, once, into {folder}.")
            convert_released_checkpoint(name, output_dir=folder, overwrite=True)
    finally:
        lock.release()
    return str(folder)
