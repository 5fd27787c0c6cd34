"""Long lists as Arrow tables on disk: converted once on a machine, memory-mapped by all processes.

Tables are in `umt_hf_lists` in the cache of `datasets` (`HF_DATASETS_CACHE`, else `HF_HOME/datasets`). The name of one
holds a hash of the list's path, size and time, of the options that change the rows, and of `FORMAT`; so a list that
changes is read anew. A table is complete or absent under its name. Short lists are read into memory and leave nothing.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets.config
import datasets.table
import pyarrow as pa
from datasets import Dataset, Features

from ..runs.disk import flush, hold_lock
from ..runs.folder import UNFINISHED_SUFFIX
from ..runs.mistakes import call_at_end
from .labels import LABEL, LabelCoding, describe_mixed_labels, encode_labels
from .lists.columns import VIDEO, describe_mixed, fit_table, unify_schemas

logger = logging.getLogger(__name__)

FORMAT = 2  # to be raised whenever the same list would give other rows
CACHE_FOLDER = "umt_hf_lists"
ROWS_FILE, ENTRY_FILE, MAP_LOCK = "rows.arrow", "entry.json", ".map.lock"
# Shorter files are read by each process in about a second.
SHORTEST_CACHED_BYTES = 16 << 20
DAYS_KEPT = 30
BATCH_ROWS = 65_536

Read = Callable[[], Iterable[pa.Table]]


class CacheError(OSError):
    """The cache cannot be written."""


@dataclass(frozen=True)
class ListFile:
    """A list and what its rows depend on.

    Args:
        source: Its name, as given.
        options: What changes the rows, as JSON values.
        class_names: Names of the classes by number; `None` = those that the list has.
        needs_labels: Whether labels are read.
        files: What is read, where that is not `source`.
    """

    source: str
    options: dict[str, Any] = field(default_factory=dict)
    class_names: Sequence[str] | None = None
    needs_labels: bool = True
    files: Sequence[str] = ()

    @property
    def is_long(self) -> bool:
        """Whether the file is worth a table on disk."""
        return sum(size for _, size, _ in self.describe_files()) >= SHORTEST_CACHED_BYTES

    def describe_files(self) -> list[tuple[str, int, int]]:
        """Name, size and time in nanoseconds of the list, and of the journal that an SQLite base may have."""
        path = os.path.abspath(self.source)
        found = []
        for name in map(os.path.abspath, self.files) if self.files else (path, f"{path}-wal"):
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(name)
                found.append((name, status.st_size, status.st_mtime_ns))
        return found

    @property
    def name(self) -> str:
        """Beginning of the names of all tables of the list."""
        path = os.path.abspath(self.source)
        stem = "".join(mark if mark.isascii() and mark.isalnum() else "_" for mark in Path(path).name)[:40]
        return f"{stem}-{hash_text(path)}"

    def name_entry(self) -> str:
        """Name of the table of the list as it is now."""
        names = None if self.class_names is None else list(self.class_names)
        key = [FORMAT, self.describe_files(), self.source, self.options, names, self.needs_labels]
        return f"{self.name}-{hash_text(json.dumps(key, sort_keys=True))}"


def hash_text(text: str) -> str:
    """Sixteen hexadecimal digits."""
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).hexdigest()


def locate_cache() -> Path:
    """Folder of the tables."""
    return Path(datasets.config.HF_DATASETS_CACHE) / CACHE_FOLDER


def load_rows(file: ListFile, read: Read, is_lasting: Callable[[], bool] = lambda: True) -> Dataset:
    """Rows of a list: in memory if it is short, else memory-mapped from a table on disk.

    Args:
        file: The list.
        read: Reads it a chunk at a time.
        is_lasting: Says after reading whether the rows depend on the file and the options alone.

    Raises:
        ValueError: If it lists no videos, or changes while it is read.
        OSError: If there is no place for the table.
    """
    if not file.is_long:
        parts = list(read())
        layout = _settle(file, parts)
        table = pa.concat_tables([layout.apply(part) for part in parts]).combine_chunks()
        return Dataset(datasets.table.InMemoryTable(table))
    try:
        entry = _share(file, read, is_lasting)
    except CacheError as error:
        logger.warning(
            "%s: its table cannot be kept in %s (%s); every process and every start reads the list anew. Set "
            "HF_DATASETS_CACHE to a folder that can be written.",
            file.source, locate_cache(), error,
        )  # fmt: skip
        entry = None
    if entry is None:
        entry = _convert_privately(file, read)
    return Dataset.from_file(str(entry / ROWS_FILE))


@contextmanager
def map_once(table: Dataset) -> Generator[None, None, None]:
    """Let one process at a time map a table of the cache: the first one writes the result, and the others find it.

    Args:
        table: As `load_rows` or `datasets` gives it; one in memory, or outside the cache, is mapped by each process.
    """
    with contextlib.ExitStack() as stack:
        for file in table.cache_files[:1]:
            folder = Path(file["filename"]).parent
            if folder.is_relative_to(Path(datasets.config.HF_DATASETS_CACHE)):
                with contextlib.suppress(OSError):  # a cache that others wrote
                    stack.enter_context(hold_lock(folder / MAP_LOCK, str(folder), wait=True))
        yield


def _share(file: ListFile, read: Read, is_lasting: Callable[[], bool]) -> Path | None:
    """Folder of the complete table, which one process writes while the others wait; `None` if it may not be kept."""
    root = locate_cache()
    if (entry := _find(root / file.name_entry())) is not None:
        return entry
    if not os.access(next(folder for folder in (root, *root.parents) if folder.exists()), os.W_OK):
        raise CacheError("no permission to write")
    logger.info("%s: being made into a table in %s, once for all processes of this machine.", file.source, root)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold_lock(root / f"{file.name}.lock", file.source, wait=True))
        except OSError as error:
            raise CacheError(error.strerror or str(error)) from error
        name = file.name_entry()
        if (entry := _find(root / name)) is not None:
            return entry
        _clean(root, file.name)
        unfinished = root / f"{name}-{socket.gethostname()}-{os.getpid()}{UNFINISHED_SUFFIX}"
        try:
            with _failing_as_cache(unfinished):
                unfinished.mkdir(parents=True)
            _convert(file, read, unfinished)
            if file.name_entry() != name:
                raise ValueError(f"{file.source}: changed while it was read. Start again when it is complete.")
            if not is_lasting():
                logger.warning(
                    "%s: has names without a suffix, which are looked up on disk at every start, in each process. "
                    "Write the suffixes into long lists.",
                    file.source,
                )
                return None
            with _failing_as_cache(unfinished):
                flush(unfinished)
                if _find(root / name) is None:  # on a file system without locks another one may have been quicker
                    os.replace(unfinished, root / name)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return root / name


def _find(entry: Path) -> Path | None:
    """The folder, if it holds a complete table; what was said when it was made is said again."""
    try:
        said = json.loads((entry / ENTRY_FILE).read_text(encoding="utf-8"))["said"]
        (entry / ROWS_FILE).stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    with contextlib.suppress(OSError):  # a cache that others wrote
        os.utime(entry / ENTRY_FILE)
    for name, level, message in said:
        logging.getLogger(name).log(level, "%s", message)
    return entry


def _clean(root: Path, name: str) -> None:
    """Delete what killed processes of this machine left of a list, and tables that nobody has opened for long."""
    for path in root.glob(f"{name}-*"):
        is_left = path.name.endswith(UNFINISHED_SUFFIX) and f"-{socket.gethostname()}-" in path.name
        with contextlib.suppress(OSError):
            age = time.time() - (path / ENTRY_FILE).stat().st_mtime if not is_left else 0
            if is_left or age > DAYS_KEPT * 86_400:
                shutil.rmtree(path)


def _convert_privately(file: ListFile, read: Read) -> Path:
    """Write the table to a folder that goes with this process."""
    folder = Path(tempfile.mkdtemp(prefix="umt_hf_list_"))
    call_at_end(functools.partial(shutil.rmtree, folder, ignore_errors=True))
    try:
        _convert(file, read, folder)
    except CacheError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise OSError(
            f"{file.source}: its table can be written neither to {locate_cache()} nor to {folder.parent} ({error}). "
            "Set HF_DATASETS_CACHE to a folder with room for it."
        ) from error
    return folder


def _convert(file: ListFile, read: Read, folder: Path) -> None:
    """Write `rows.arrow`, and `entry.json` with what was said while reading."""
    with _hear() as said:
        paths = _write_parts(read(), folder)
        is_settled = _merge_parts(file, paths, folder)
    with _failing_as_cache(folder):
        if is_settled:
            os.replace(paths.pop(), folder / ROWS_FILE)
        for path in paths:
            path.unlink()
    entry = {"source": os.path.abspath(file.source), "rows_of": file.describe_files(), "said": said}
    with _failing_as_cache(folder):
        (folder / ENTRY_FILE).write_text(json.dumps(entry, indent=2), encoding="utf-8")


@contextmanager
def _hear() -> Generator[list[tuple[str, int, str]], None, None]:
    """What the readers of lists log meanwhile: logger, level and text."""
    said: list[tuple[str, int, str]] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append((record.name, record.levelno, record.getMessage()))

    listener, heard = Listener(), logging.getLogger(__name__.rpartition(".")[0])
    heard.addHandler(listener)
    try:
        yield said
    finally:
        heard.removeHandler(listener)


def _write_parts(chunks: Iterable[pa.Table], folder: Path) -> list[Path]:
    """Files of chunks, a new one where their columns or types change."""
    paths: list[Path] = []
    writer = None
    try:
        for chunk in _join_chunks(chunks):
            with _failing_as_cache(folder):
                if writer is None or chunk.schema != writer.schema:
                    writer = writer and writer.close()
                    paths.append(folder / f"part-{len(paths)}.arrow")
                    writer = _Writer(paths[-1], chunk.schema)
                writer.write(chunk)
    finally:
        with _failing_as_cache(folder):
            writer = writer and writer.close()
    return paths


def _join_chunks(chunks: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The rows in tables of about `BATCH_ROWS`, of chunks with the same columns."""
    waiting: list[pa.Table] = []
    for chunk in chunks:
        if waiting and (chunk.schema != waiting[0].schema or sum(map(len, waiting)) + len(chunk) > BATCH_ROWS):
            yield pa.concat_tables(waiting).combine_chunks()
            waiting = []
        waiting.append(chunk)
    if waiting:
        yield pa.concat_tables(waiting).combine_chunks()


def _merge_parts(file: ListFile, paths: list[Path], folder: Path) -> bool:
    """Write the rows of all parts in one form; whether the only part has it already, and nothing is written."""
    parts = [pa.ipc.open_stream(pa.memory_map(str(path))).read_all() for path in paths]
    layout = _settle(file, parts)
    if len(parts) == 1 and LABEL not in parts[0].column_names:
        return True
    with _failing_as_cache(folder), contextlib.closing(_Writer(folder / ROWS_FILE, layout.schema)) as writer:
        for batch in (batch for part in parts for batch in part.to_batches()):
            writer.write(layout.apply(pa.Table.from_batches([batch])))
    return False


class _Writer:
    """An Arrow file that grows.

    Args:
        path: The file.
        schema: Of the rows.
    """

    def __init__(self, path: Path, schema: pa.Schema):
        self.schema = schema
        self.sink = pa.OSFile(str(path), "wb")
        self.stream = pa.ipc.new_stream(self.sink, schema)

    def write(self, chunk: pa.Table) -> None:
        """Add rows."""
        self.stream.write_table(chunk)

    def close(self) -> None:
        """Write what is held back."""
        try:
            self.stream.close()
        finally:
            self.sink.close()


@contextmanager
def _failing_as_cache(folder: Path) -> Generator[None, None, None]:
    """Tell what the cache lacks from what a list lacks."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise CacheError(f"{folder}: {reason}") from error


@dataclass(frozen=True)
class _Layout:
    """What chunks of rows are brought to.

    Args:
        raw: Columns with labels as they are read.
        schema: Columns of the rows, with the features that `datasets` reads.
        coding: How labels become numbers; `None` = there are none.
    """

    raw: pa.Schema
    schema: pa.Schema
    coding: LabelCoding | None

    def apply(self, chunk: pa.Table) -> pa.Table:
        """A chunk as rows."""
        chunk = fit_table(chunk, self.raw)
        columns = {name: chunk.column(name) for name in self.schema.names}
        if self.coding is not None:
            columns[LABEL] = self.coding.encode(columns[LABEL])
        return pa.Table.from_arrays(list(columns.values()), schema=self.schema)


def _settle(file: ListFile, parts: list[pa.Table]) -> _Layout:
    """Columns of the rows of all parts, and how their labels become numbers.

    Raises:
        ValueError: If there are no rows, or columns or labels of several kinds.
    """
    if not sum(map(len, parts)):
        raise ValueError(f"{file.source} lists no videos.")
    _refuse_mixed_labels(file.source, parts)
    raw = unify_schemas(file.source, [part.schema for part in parts])
    coding = None
    if LABEL in raw.names:
        kinds = pa.schema([raw.field(VIDEO), raw.field(LABEL)])
        rows = pa.concat_tables([fit_table(part, kinds) for part in parts])
        try:
            coding = encode_labels(rows.column(LABEL), rows.column(VIDEO), file.source, file.class_names)
        except (pa.ArrowException, OverflowError) as error:
            raise ValueError(describe_mixed(file.source, error)) from error
    features = Features.from_arrow_schema(raw)
    features.pop(LABEL, None)
    if coding is not None:
        features = Features({name: coding.feature if name == LABEL else features[name] for name in raw.names})
    return _Layout(raw, features.arrow_schema, coding)


def _refuse_mixed_labels(source: str, parts: list[pa.Table]) -> None:
    firsts: dict[type, Any] = {}
    for part in parts:
        if LABEL in part.column_names:
            values = part.column(LABEL)
            flat = values.combine_chunks().flatten() if pa.types.is_list(values.type) else values
            if pa.types.is_integer(flat.type) or pa.types.is_string(flat.type):
                firsts.setdefault(int if pa.types.is_integer(flat.type) else str, flat[0].as_py())
    if len(firsts) == 2:
        raise ValueError(describe_mixed_labels(source, firsts[int], firsts[str]))
