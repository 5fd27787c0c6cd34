"""Lists and folders at an address: what an object store holds, and a list as a file of this machine.

A list that is fetched is kept in the cache of `datasets` under a hash of its bytes, so that later starts, and the
tables that are made of long lists, find it as it was.
"""

import functools
import hashlib
import logging
import os
import posixpath
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import datasets.config
import pyarrow as pa

from ...processing.media_files import URL_START, ask_store, download, find_protocol, open_store
from ...runs.disk import hold_lock, name_unfinished, put_file
from ...runs.mistakes import call_at_end
from .columns import call

logger = logging.getLogger(__name__)

FETCHED_FOLDER = "umt_hf_fetched"
DAYS_KEPT = 30
ROWS_NAMED = 3
UPWARDS = r"(^|[/\\])\.\.([/\\]|$)"


def split_address(url: str) -> tuple[str, str]:
    """Address of the folder of a file, and the file's name without what follows it in a web address."""
    if find_protocol(url) in ("http", "https"):
        parts = urlsplit(url)
        folder, name = posixpath.split(parts.path)
        return f"{parts.scheme}://{parts.netloc}{folder}", unquote(name)
    return posixpath.split(url)


def list_addresses(url: str) -> list[str]:
    """Names of all files below a folder of a store, relative to it and sorted; none where there is no such folder.

    Raises:
        ImportError: If the library of the store is missing.
        VideoDecodingError: If it does not answer.
    """
    store, path = open_store(url)

    def find(_: Any) -> list[str]:
        store.invalidate_cache(path)
        return store.find(path)

    top = f"{path.rstrip('/')}/"
    return sorted(name[len(top) :] for name in ask_store(url, find) if name.startswith(top))


def fetch_list(url: str) -> Path:
    """A list at an address as a file of this machine, by the same name; the same bytes are the same file.

    Raises:
        ImportError: If the library of the store is missing.
        VideoDecodingError: If it cannot be fetched or exceeds a limit of downloads.
    """
    content = download(url)
    digest = hashlib.blake2b(content, digest_size=16, key=hashlib.blake2b(url.encode()).digest()).hexdigest()
    name = "".join(mark if mark.isalnum() or mark in "._-" else "_" for mark in split_address(url)[1])[-100:]
    root = Path(datasets.config.HF_DATASETS_CACHE) / FETCHED_FOLDER
    try:
        with hold_lock(root / ".lock", url, wait=True):
            _clean(root)
            return _keep(root / digest, name, content)
    except OSError as error:
        folder = Path(tempfile.mkdtemp(prefix="umt_hf_fetched_"))
        call_at_end(functools.partial(shutil.rmtree, folder, ignore_errors=True))
        logger.warning("%s: cannot be kept in %s (%s); every process fetches it at every start.", url, root, error)
        return _keep(folder, name, content)


def _keep(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    if path.is_file() and path.stat().st_size == len(content):
        os.utime(folder)  # not the file, by whose time tables are found again
        return path
    unfinished = name_unfinished(path)
    unfinished.write_bytes(content)
    put_file(unfinished, path)
    return path


def _clean(root: Path) -> None:
    """Delete lists that nobody has asked for in a long time."""
    for folder in root.iterdir():
        if folder.is_dir() and time.time() - folder.stat().st_mtime > DAYS_KEPT * 86_400:
            shutil.rmtree(folder, ignore_errors=True)


def refuse_own_files(source: str, videos: pa.ChunkedArray, data_root: str | None) -> None:
    """Refuse rows of a list at an address that name files of this machine outside `data_root`.

    Args:
        source: The list's address.
        videos: Its paths, joined with the root, or rows with `path` and `bytes`.
        data_root: As the user gave it; `None` = rows may name addresses alone.

    Raises:
        ValueError: Names the first of them.
    """
    if pa.types.is_struct(videos.type):
        videos = pa.chunked_array([_list_opened_paths(chunk) for chunk in videos.chunks], pa.string())
    if pa.types.is_binary(videos.type) or pa.types.is_large_binary(videos.type):
        return
    if not (pa.types.is_string(videos.type) or pa.types.is_large_string(videos.type)):
        raise ValueError(
            f"{source}: the column of the videos holds {videos.type}; expected paths, addresses or bytes."
        )
    is_address = call("match_substring_regex", videos, pattern=f"(?i)^{URL_START.pattern}")
    is_own = call("match_substring_regex", videos, pattern="(?i)^file:")
    allowed = call("and", is_address, call("invert", is_own))
    if data_root is not None and find_protocol(data_root) is None:
        is_below = call("starts_with", videos, pattern=os.path.join(data_root, ""))
        leads_up = call(
            "match_substring_regex", call("utf8_slice_codeunits", videos, start=len(data_root)), pattern=UPWARDS
        )
        allowed = call("or", allowed, call("and", is_below, call("invert", leads_up)))
    refused = call("filter", videos, call("invert", allowed)).drop_null()
    if len(refused):
        named = ", ".join(refused[:ROWS_NAMED].to_pylist()) + (" ..." if len(refused) > ROWS_NAMED else "")
        raise ValueError(
            f"{source}: {len(refused)} row(s) name files of this machine ({named}), which a list at an address must "
            "not. Copy the list to this machine if you trust it."
        )


def _list_opened_paths(rows: pa.StructArray) -> pa.Array:
    """Paths of rows, null where there are bytes, beside which a path is a name and not opened."""
    names = [field.name for field in rows.type]
    if "path" not in names:
        return pa.nulls(len(rows), pa.string())
    paths = rows.field("path").cast(pa.string())
    if "bytes" not in names:
        return paths
    lengths = call("fill_null", call("binary_length", rows.field("bytes")), 0)
    return call("if_else", call("equal", lengths, 0), paths, pa.scalar(None, pa.string()))
