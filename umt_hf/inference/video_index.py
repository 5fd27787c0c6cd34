"""A searchable index of videos, or of moments in them: a LanceDB database that grows by commits.

INDEX/
  videos.lance/    a row per video, or per moment of one; its schema records which encoder made the vectors
  stored.lance/    what re-ranking needs of each row, where the index was made so; plain searches never open it
  skipped.lance/   videos that could not be read, and why

A commit is there completely or not at all, also after a kill, and several commands may write at once. Folders of this
machine and object storage (s3://, gs://, az://) hold the same.

Legend: D width of a vector.
"""

import json
import logging
import os
import random
import re
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from ..data.lists.folders import is_text
from ..data.video_files import SkippedVideo, VideoFile
from ..runs.disk import LOCK_FILE, hold_lock
from ..runs.folder import collect_versions
from ..runs.mistakes import MachineError, UserError, naming_full_disk

logger = logging.getLogger(__name__)

T = TypeVar("T")

VECTOR_COLUMN = "vector"
FACTS = ["path", "size_bytes", "modified_ns", "num_frames", "duration_seconds", "start_seconds", "end_seconds"]
FORMAT = 2
# Of LanceDB: vectors are read without being decoded, three times as fast as from 2.1 on.
FILE_FORMAT = "2.0"
ROWS_PER_COMMIT = 1000
SECONDS_PER_COMMIT = 30.0
REMOTE_VERSIONS_KEPT = timedelta(hours=1)  # in object storage, where no lock is: longer than any writer takes
MAX_FRAGMENTS = 200  # each commit adds one, which every later search and commit reads about
FLAT_ROWS = 100_000  # up to which a search compares the query with all vectors
PROBED_SHARE = 32  # of the lists of neighbours, one in so many is searched
MIN_PROBES = 16
CANDIDATES, MIN_CANDIDATES = 4, 400  # found by cosine for each row wanted, and at least; then compared exactly
ATTEMPTS = 12
MAX_INTEGER = 2**63 - 1  # of a column
REMOTE_ATTEMPTS = 3  # to open a table of object storage, which may not be there
VIDEOS_TABLE, SKIPPED_TABLE, STORED_TABLE = "videos", "skipped", "stored"
STATES_COLUMN = "states"
STORED_KEY = ["path", "size_bytes", "modified_ns", "start_seconds"]  # of a row here and in the table of videos
STORED_BYTES_PER_COMMIT = 2**28
# Up to which commits of the stored table are joined: joining holds thousands of rows, and writes all of them again.
JOINED_STORED_BYTES = 2**30

_SETTINGS = b"umt_hf"
_PATHS_AT_A_TIME = 500
_LISTS_PREFIX = "vector_lists_"
_MEANWHILE = re.compile(r"conflict|concurrent|not found|already exists|retry|no such file", re.IGNORECASE)
_NO_TABLE = re.compile(r"table '\w+' was not found", re.IGNORECASE)
_UNREACHABLE = re.compile(r"kind: (connect|timeout)|connect error|dns error|timed out|status: 5\d\d", re.IGNORECASE)
_OF_LANCEDB = re.compile(r"lance|/rustc/|invalid input|object store|os error", re.IGNORECASE)
_random = random.Random()  # of waits between attempts; the global one stays where it is
# How what a flag of `umt-hf embed` sets is written, by its name in an encoder's description.
_FLAGS: dict[str, Callable[[Any], str]] = {
    "dtype": lambda value: f"--dtype {value}",
    "kept_tokens": lambda value: _write_kept_tokens(value),
    "mixed_precision": lambda value: f"`accelerate launch --mixed_precision {value}`",
    "num_frames": lambda value: f"--num-frames {value}",
}
_process: list[int] = []  # in which LanceDB was loaded; its threads do not survive a fork


def build_schema(width: int, settings: dict[str, Any]) -> pa.Schema:
    """Columns of a row; further ones of a later version go behind them.

    Args:
        width: D.
        settings: What is recorded with them.
    """
    columns = [
        pa.field("path", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("modified_ns", pa.int64(), nullable=False),
        pa.field("num_frames", pa.int64()),
        pa.field("duration_seconds", pa.float64()),
        pa.field("start_seconds", pa.float64()),
        pa.field("end_seconds", pa.float64()),
        pa.field(VECTOR_COLUMN, pa.list_(pa.float32(), width), nullable=False),
    ]
    return pa.schema(columns, metadata={_SETTINGS: json.dumps(settings).encode()})


def build_stored_schema() -> pa.Schema:
    """Columns of what is stored of a row for re-ranking: the row's key, a shape, and numbers of that shape."""
    columns = [
        pa.field("path", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("modified_ns", pa.int64(), nullable=False),
        pa.field("start_seconds", pa.float64()),
        pa.field("num_bytes", pa.int64(), nullable=False),
        pa.field("shape", pa.list_(pa.int32()), nullable=False),
        pa.field(STATES_COLUMN, pa.large_binary(), nullable=False),
    ]
    return pa.schema(columns)


@dataclass(frozen=True)
class SearchFilter:
    """Which videos of an index are searched.

    Attributes:
        path: Pattern of the complete path, with `*` for any text and `?` for a character; default: any.
        min_duration: Seconds that a video has at least.
        max_duration: Seconds that it has at most.
        after: Time from which on its file has changed last.
        before: Time before which it has.

    Raises:
        ValueError: If a duration is negative, the bounds leave nothing between them, or the path is not UTF-8.
    """

    path: str | None = None
    min_duration: float | None = None
    max_duration: float | None = None
    after: datetime | None = None
    before: datetime | None = None

    def __post_init__(self) -> None:
        for name in ("min_duration", "max_duration"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a number of seconds, 0 or more, got {value}.")
        if self.path is not None and not is_text(self.path):
            raise ValueError("path must be text that can be written as UTF-8: an index has no other names.")
        shortest, longest = self.min_duration, self.max_duration
        if shortest is not None and longest is not None and shortest > longest:
            raise ValueError(f"min_duration {shortest} is above max_duration {longest}.")
        bounds = [_count_nanoseconds(bound) for bound in (self.after, self.before) if bound is not None]
        if len(bounds) == 2 and bounds[0] >= bounds[1]:
            raise ValueError(f"after ({self.after}) must be earlier than before ({self.before}).")

    def to_sql(self) -> str | None:
        """The condition as LanceDB reads it; `None` where everything is searched."""
        parts = []
        if self.path is not None:
            literal = re.sub(r"([\\%_])", r"\\\1", self.path).replace("*", "%").replace("?", "_")
            parts.append(f"path LIKE {_quote(literal)}")
        if self.min_duration is not None:
            parts.append(f"duration_seconds >= {float(self.min_duration)!r}")
        if self.max_duration is not None:
            parts.append(f"duration_seconds <= {float(self.max_duration)!r}")
        if self.after is not None:
            parts.append(f"modified_ns >= {_count_nanoseconds(self.after)}")
        if self.before is not None:
            parts.append(f"modified_ns < {_count_nanoseconds(self.before)}")
        return " AND ".join(parts) or None


class VideoIndex:
    """An index: any number of commands may read and write it at the same time.

    It is opened in the process that uses it: LanceDB does not survive a fork.

    Args:
        folder: Where it is or will be: a folder, or an address such as `s3://bucket/index`.
        storage_options: Of object storage, as LanceDB takes them; default: those of the environment.
        flat_rows: Rows up to which a search compares the query with all vectors.
        max_fragments: Commits after which they are joined and old versions go.

    Examples:
        >>> from umt_hf import embed_videos
        >>> from umt_hf.inference.video_index import VideoIndex
        >>> report = embed_videos(["videos"], "umt-vit-b16-25m", "index")
        >>> VideoIndex("index").count_rows()
        4
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        storage_options: dict[str, str] | None = None,
        flat_rows: int = FLAT_ROWS,
        max_fragments: int = MAX_FRAGMENTS,
    ):
        self.folder = os.fspath(folder)
        self.storage_options = storage_options
        self.flat_rows, self.max_fragments = flat_rows, max_fragments
        self._database: Any = None
        self._tables: dict[str, Any] = {}
        self._is_writing = False

    @property
    def is_remote(self) -> bool:
        """Whether it is in object storage."""
        return "://" in self.folder

    def read_encoder(self) -> dict[str, Any]:
        """What is known of the encoder that made the vectors.

        Raises:
            FileNotFoundError: If the folder is not an index.
            ImportError: If LanceDB is not installed.
            ValueError: If it is an index of an earlier version.
        """
        return self._read_settings()["encoder"]

    def check_encoder(self, encoder: dict[str, Any]) -> None:
        """Make sure that vectors of an encoder may be compared with those of the index, if there are any.

        Args:
            encoder: Its description; all but the name it is loaded by must agree.

        Raises:
            FileExistsError: If the folder holds something other than an index.
            ValueError: If the index was built by another encoder, of moments of other lengths, to store something
                else for re-ranking, or by an earlier version.
        """
        if not self.exists():
            if not self.is_remote and os.path.isdir(self.folder) and not self._is_unused():
                raise FileExistsError(f"{self.folder} is not an index and not empty; choose another folder.")
            return
        built = self.read_encoder()
        # The name may differ: a folder that has moved is the same model.
        by_flag = _FLAGS.keys() | {"moments", "stored"}
        for name in sorted(encoder.keys() - {"model"}, key=lambda name: (name in by_flag, name)):
            if encoder[name] == built.get(name):
                continue
            if name == "moments":
                raise ValueError(
                    f"{self.folder} holds {describe_moments(built.get(name))} and these would be "
                    f"{describe_moments(encoder[name])}. Use the same window and stride, or a new index folder."
                )
            if name in _FLAGS:
                before, now = (_FLAGS[name](recorded) for recorded in (built.get(name), encoder[name]))
                raise ValueError(
                    f"{self.folder} was built with {before}, and these vectors would be of {now}. Use the same, or a "
                    "new index folder."
                )
            if name == "stored":
                raise ValueError(
                    f"{self.folder} stores {describe_stored(built.get(name))} and this would store "
                    f"{describe_stored(encoder[name])}. Use the same store and store_dtype, or a new index folder."
                )
            raise ValueError(
                f"{self.folder} was built by another model: its {name} is {built.get(name)!r} (from "
                f"{built['model']}), that of {encoder['model']} is {encoder[name]!r}. Use the model that it was "
                "built with, or a new index folder."
            )

    def exists(self) -> bool:
        """Whether there is an index.

        Raises:
            UserError: If it cannot be read.
            ValueError: If it is one of an earlier version.
        """
        if not self.is_remote:
            folder = Path(self.folder)
            if (folder / "index.json").is_file():
                raise ValueError(
                    f"{folder} is an index of an earlier version, which is not read any more. Embed its videos again, "
                    "with --out naming a new folder, and delete the old one."
                )
            if not (folder / f"{VIDEOS_TABLE}.lance").is_dir():
                return False
        return self._retry(lambda: self._open(VIDEOS_TABLE) is not None)

    def create(self, encoder: dict[str, Any]) -> None:
        """Make the index, unless it is there; of several commands that come at once, the first one does.

        Args:
            encoder: Description of the encoder whose vectors will be added, with their width as `projection_dim`.

        Raises:
            ValueError: If another command has just made it with another encoder.
        """
        settings = {"format": FORMAT, "encoder": encoder, "versions": collect_versions()}
        skipped = pa.schema([pa.field("path", pa.string(), False), pa.field("reason", pa.string(), False)])
        schemas = {SKIPPED_TABLE: skipped}
        if encoder.get("stored") is not None:
            schemas[STORED_TABLE] = build_stored_schema()
        schemas[VIDEOS_TABLE] = build_schema(encoder["projection_dim"], settings)  # last: then there is an index
        for name, schema in schemas.items():
            self._retry(lambda name=name, schema=schema: self._make_table(name, schema), "written")
        self.check_encoder(encoder)

    def select_new(self, files: Sequence[VideoFile]) -> list[VideoFile]:
        """Files that are not in the index, or have changed since."""
        known: set[tuple[str, int, int]] = set()
        for batch in self.read(["path", "size_bytes", "modified_ns"]):
            known.update(zip(*(column.to_pylist() for column in batch.columns), strict=True))
        return [file for file in files if (file.path, file.size_bytes, file.modified_ns) not in known]

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Put rows in, all or none of them.

        Args:
            rows: Fields of `VideoFile`, `num_frames`, `duration_seconds`, `start_seconds` and `end_seconds` (these
                two of a moment) where they are known, and `vector`, a float32 array `(D,)`. All rows of a video.
        """
        if not rows:
            return
        schema = self._retry(lambda: self._open_existing(VIDEOS_TABLE).schema)
        data = pa.Table.from_pydict(
            {name: _build_column([row.get(name) for row in rows], schema.field(name).type) for name in schema.names},
            schema=schema,
        )
        self._append(VIDEOS_TABLE, data)
        if self._retry(lambda: _count_fragments(self._open_existing(VIDEOS_TABLE))) > self.max_fragments:
            self._optimize()

    def add_stored(self, rows: Sequence[dict[str, Any]]) -> None:
        """Put in what re-ranking needs of rows, all or none of it; before the rows, so that none is without it.

        Args:
            rows: Fields of `VideoFile`, `start_seconds` (of a moment) and `states`, an array.
        """
        if not rows:
            return
        states = [np.ascontiguousarray(row[STATES_COLUMN]) for row in rows]
        columns = {name: [row[name] for row in rows] for name in STORED_KEY}
        columns |= {"num_bytes": [own.nbytes for own in states], "shape": [list(own.shape) for own in states]}
        columns[STATES_COLUMN] = [own.tobytes() for own in states]
        data = pa.Table.from_pydict(columns, schema=build_stored_schema())
        self._append(STORED_TABLE, data)

    def read_stored(self, rows: Sequence[dict[str, Any]], dtype: str) -> dict[str, np.ndarray]:
        """What is stored of rows for re-ranking; nothing of other rows is read.

        Args:
            rows: As `VectorTable.find_nearest` gives them, each of another video.
            dtype: Precision in which it is stored.

        Returns:
            Arrays by path, without rows of which nothing is stored.
        """
        wanted = {tuple(row[name] for name in STORED_KEY) for row in rows}
        found = {}
        for row in self._retry(lambda: self._find_stored(wanted)):
            states = row[STATES_COLUMN].as_buffer()
            found[row["path"].as_py()] = np.frombuffer(states, dtype).reshape(row["shape"].as_py())
        return found

    def measure_stored(self) -> tuple[int, int]:
        """Rows of which something is stored for re-ranking, and its bytes."""
        if not self._list_tables(STORED_TABLE):
            return 0, 0
        sizes = self._retry(lambda: self._open_existing(STORED_TABLE).search().select(["num_bytes"]).to_arrow())
        return len(sizes), sum(sizes["num_bytes"].to_pylist())

    def finish(self, skipped: Sequence[SkippedVideo]) -> int:
        """Bring the index up to date after a command: rows of earlier contents go, lists of vectors are kept up.

        Args:
            skipped: Videos that could not be read now. Rows of their earlier contents go.

        Returns:
            Videos in the index.
        """
        for name in self._list_tables(VIDEOS_TABLE, STORED_TABLE):
            self._delete(name, [f"path IN ({names})" for names in _group_names(v.path for v in skipped)])
            self._delete_superseded(name)
        paths = set(self.list_paths())
        self._record_skipped(skipped, paths)
        self._join_fragments()
        self._keep_lists()
        return len(paths)

    def list_paths(self) -> list[str]:
        """All videos, in order."""
        return sorted({path for batch in self.read(["path"]) for path in batch.column("path").to_pylist()})

    def count_rows(self) -> int:
        """Videos, or moments of videos, in the index; with those that will be gone after `finish`."""
        return self._retry(lambda: self._open_existing(VIDEOS_TABLE).count_rows())

    def read_skipped(self) -> list[SkippedVideo]:
        """Videos that could not be read, in order of their paths."""
        if not self._list_tables(SKIPPED_TABLE):
            return []
        rows = self._retry(lambda: self._open_existing(SKIPPED_TABLE).to_arrow()).to_pylist()
        return [SkippedVideo(path, reason) for path, reason in sorted({r["path"]: r["reason"] for r in rows}.items())]

    def load(self) -> "VectorTable":
        """Its rows, ready to be searched.

        Raises:
            FileNotFoundError: If the folder is not an index.
            ImportError: If LanceDB is not installed.
            ValueError: If there are no videos in it.
        """
        self._read_settings()
        if not self.count_rows():
            raise ValueError(f"{self.folder} holds no videos yet; `umt-hf embed` adds them.")
        return VectorTable(self)

    def find_by_lists(self, vector: np.ndarray, count: int, where: str | None) -> tuple[pa.Table, np.ndarray]:
        """Rows with the largest inner products among lists of neighbours, best first, and these products."""

        def find() -> list[pa.RecordBatch]:
            table = self._open_existing(VIDEOS_TABLE)
            query = table.search(vector, vector_column_name=VECTOR_COLUMN).distance_type("cosine")
            query = query.select([*FACTS, VECTOR_COLUMN, "_distance"])
            if (num_lists := _count_lists(table)) is not None:
                # A filter may leave a list empty.
                query = query.nprobes(num_lists if where else max(num_lists // PROBED_SHARE, MIN_PROBES))
            query = query if where is None else query.where(where, prefilter=True)
            return query.limit(max(CANDIDATES * count, MIN_CANDIDATES)).to_arrow().to_batches()

        # Lists of inner products come out so uneven that a search reads most of the vectors; those of cosines do not.
        # Vectors are nearly of one length, so that the best by inner product are among the best by cosine.
        return compare_all(self._retry(find), vector, count)

    def find_exactly(self, vector: np.ndarray, count: int, where: str | None) -> tuple[pa.Table, np.ndarray]:
        """The same among all vectors, read a part at a time."""
        columns = [*FACTS, VECTOR_COLUMN]
        return self._retry(lambda: compare_all(self._scan(columns, where), vector, count))

    def has_lists(self) -> bool:
        """Whether vectors are in lists of neighbours, of which a search takes some."""
        return self._retry(lambda: _count_lists(self._open_existing(VIDEOS_TABLE))) is not None

    def read(self, columns: Sequence[str]) -> list[pa.RecordBatch]:
        """Columns of all rows."""
        return self._retry(lambda: list(self._scan(columns)))

    def _read_settings(self) -> dict[str, Any]:
        require_lancedb()
        if not self.exists():
            is_there = self.is_remote or os.path.isdir(self.folder)
            lack = "it has no videos" if is_there else "there is no such folder"
            raise FileNotFoundError(f"{self.folder} is not an index: {lack}. `umt-hf embed` makes one.")
        metadata = self._retry(lambda: self._open_existing(VIDEOS_TABLE).schema.metadata) or {}
        if _SETTINGS not in metadata:
            raise ValueError(f"{self.folder} is a LanceDB database of something else; choose another folder.")
        return json.loads(metadata[_SETTINGS])

    def _is_unused(self) -> bool:
        """Whether nothing but what a command left that was killed while it made the index is in the folder."""
        tables = (VIDEOS_TABLE, SKIPPED_TABLE, STORED_TABLE)
        return not set(os.listdir(self.folder)) - {LOCK_FILE, *(f"{name}.lance" for name in tables)}

    def _connect(self) -> Any:
        if self._database is None:
            require_lancedb()
            import lancedb

            _process[:] = [os.getpid()]
            options = {"new_table_data_storage_version": FILE_FORMAT, **(self.storage_options or {})}
            # A name with a colon would be taken for an address.
            place = self.folder if self.is_remote else os.path.abspath(self.folder)
            self._database = lancedb.connect(place, storage_options=options, read_consistency_interval=timedelta(0))
        return self._database

    def _open(self, name: str) -> Any | None:
        """A table; `None` where there is none."""
        if _process and _process != [os.getpid()]:
            raise UserError(
                "LanceDB was loaded before this process was forked, and would crash in it. Start processes that "
                "search by the method 'forkserver' or 'spawn'."
            )
        folder = None if self.is_remote else Path(self.folder) / f"{name}.lance" / "_versions"
        for attempt in range(1, ATTEMPTS + 1):
            if name in self._tables:
                break
            if folder is not None and not (folder.is_dir() and any(folder.iterdir())):
                return None  # LanceDB would make the folder
            try:
                self._tables[name] = self._connect().open_table(name)
            except (OSError, ValueError, RuntimeError) as error:
                if folder is None and attempt == REMOTE_ATTEMPTS and _NO_TABLE.search(str(error)):
                    return None
                if attempt == (REMOTE_ATTEMPTS if folder is None else ATTEMPTS) or not _is_passing(error):
                    raise
                # Its last version was replaced while it was opened.
                time.sleep(_random.uniform(0, 0.05))
        return self._tables[name]

    def _open_existing(self, name: str) -> Any:
        if (table := self._open(name)) is None:
            raise FileNotFoundError(f"{self.folder} is not an index: it has no {name}. `umt-hf embed` makes one.")
        return table

    def _list_tables(self, *names: str) -> list[str]:
        """Those of some tables that are there."""
        return [name for name in names if self._retry(lambda name=name: self._open(name) is not None)]

    def _make_table(self, name: str, schema: pa.Schema) -> None:
        if self._open(name) is None:
            self._tables[name] = self._connect().create_table(name, schema=schema, exist_ok=True)

    def _retry(self, work: Callable[[], T], done: str = "read") -> T:
        """Do a piece of work, again where another process has changed the index in between.

        Args:
            work: What is done.
            done: What it is, "read" or "written", for the message where it fails.
        """
        with self._naming_faults(done):
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    with self._writing() if done == "written" else nullcontext():
                        return work()
                except (OSError, RuntimeError, ValueError) as error:
                    if attempt == ATTEMPTS or not _is_passing(error):
                        raise
                    logger.debug("Again after %s", error)
                    time.sleep(_random.uniform(0, min(0.02 * 2**attempt, 2.0)))
                    self._tables.clear()
        raise AssertionError("The last attempt returns or raises.")

    @contextmanager
    def _writing(self) -> Generator[None]:
        """Keep other commands of this machine from writing meanwhile, by a lock that ends with a process.

        LanceDB numbers versions and lets the first writer of a number win. Once old versions are dropped, a writer
        that has looked for the newest number before could write one that is free again, and its rows would be lost.
        """
        if self.is_remote or self._is_writing:
            yield
            return
        with hold_lock(Path(self.folder) / LOCK_FILE, self.folder, wait=True):
            self._is_writing = True
            try:
                yield
            finally:
                self._is_writing = False

    @contextmanager
    def _naming_faults(self, done: str) -> Generator[None]:
        """Say in one sentence what LanceDB could not do, with the name of the index; other errors stay."""
        writes_here = done == "written" and not self.is_remote
        try:
            with naming_full_disk(self.folder) if writes_here else nullcontext():
                yield
        except (OSError, RuntimeError, ValueError) as error:
            is_ours = isinstance(error, UserError) or (isinstance(error, FileNotFoundError) and error.errno is None)
            if is_ours or not _OF_LANCEDB.search(str(error)):
                raise
            reason = _shorten_reason(str(error))
            if self.is_remote and _UNREACHABLE.search(str(error)):
                raise MachineError(
                    f"{self.folder} cannot be reached: {reason}. Check the network and the variables of the storage, "
                    "such as AWS_ENDPOINT."
                ) from error
            if self.is_remote:
                cure = "Check the address, and that the keys in the variables of the storage allow it"
            elif done == "written":
                cure = "Make its folder writable, or choose another one"
            else:
                cure = "If its files are damaged, embed its videos again into a new folder"
            raise UserError(f"{self.folder} could not be {done}: {reason}. {cure}.") from error

    def _scan(self, columns: Sequence[str], where: str | None = None) -> Iterator[pa.RecordBatch]:
        table = self._open_existing(VIDEOS_TABLE)
        query = table.search().select(list(columns))
        yield from (query if where is None else query.where(where)).to_batches()

    def _append(self, name: str, data: pa.Table) -> None:
        """Put rows in once: an attempt that failed may have done so before, and is not repeated then."""
        has_failed = False

        def append() -> None:
            nonlocal has_failed
            if not has_failed or not self._holds(name, data):
                has_failed = True
                self._open_existing(name).add(data)

        self._retry(append, "written")

    def _holds(self, name: str, data: pa.Table) -> bool:
        """Whether all rows of a table of rows are there."""
        table, there = self._open_existing(name), set()
        for names in _group_names(set(data["path"].to_pylist())):
            found = table.search().where(f"path IN ({names})").select(STORED_KEY).to_arrow()
            there.update(key for _, key in _list_keys(found))
        return all(key in there for _, key in _list_keys(data))

    def _delete_superseded(self, name: str) -> None:
        """Delete rows that others replace, again until none is found; on this machine one command at a time does.

        Another command that joins commits in between numbers the rows anew; the conditions then match nothing. It may
        also bring them into another order, so that two that do this at once could each delete another copy of a row.
        """
        with self._writing():
            for _ in range(ATTEMPTS):
                if not (conditions := self._find_superseded(name)):
                    return
                self._delete(name, conditions)

    def _find_stored(self, keys: set[tuple[Any, ...]]) -> list[dict[str, pa.Scalar]]:
        """What is stored of the rows with these keys, each once: first where it is, then that alone."""
        if not keys or (table := self._open(STORED_TABLE)) is None:
            return []
        where = " OR ".join(f"path IN ({names})" for names in _group_names({path for path, *_ in keys}))
        listed = table.search().where(where).select(STORED_KEY).with_row_id(True).to_arrow()
        places = {key: place for place, key in _list_keys(listed) if key in keys}
        if not places:
            return []
        ids = listed["_rowid"].take(pa.array(list(places.values()))).to_pylist()
        found = table.take_row_ids(ids).select([*STORED_KEY, "shape", STATES_COLUMN]).to_arrow()
        # Another command may have joined commits in between, after which ids are those of other rows.
        places = {key: place for place, key in _list_keys(found) if key in keys}
        return [{name: found[name][place] for name in found.column_names} for place in places.values()]

    def _find_superseded(self, name: str) -> list[str]:
        """Conditions on rows that others replace: of a video's earlier contents, or another command's copy."""
        columns = STORED_KEY
        found = self._retry(lambda: self._open_existing(name).search().select(columns).with_row_id(True).to_arrow())
        if not len(found):
            return []
        path = found["path"].combine_chunks().dictionary_encode().indices.to_numpy()
        size, changed = (found[name].to_numpy() for name in columns[1:3])
        start = found["start_seconds"].fill_null(-1).to_numpy()
        # Rows are in the order in which they came; the last one of a path says what is in its file now.
        last = np.zeros(path.max() + 1, int)
        last[path] = np.arange(len(path))
        is_old = (size != size[last[path]]) | (changed != changed[last[path]])
        current = np.flatnonzero(~is_old)
        pairs = np.stack([path[current].astype(float), start[current]])
        is_superseded = is_old.copy()
        is_superseded[current] = True
        is_superseded[current[np.unique(pairs, axis=1, return_index=True)[1]]] = False
        rows = np.flatnonzero(is_superseded)
        conditions = []
        for start in range(0, len(rows), _PATHS_AT_A_TIME):
            part = found.take(pa.array(rows[start : start + _PATHS_AT_A_TIME]))
            # The paths too: a number may be that of another row by then.
            (names,) = _group_names(set(part["path"].to_pylist()))
            conditions.append(f"_rowid IN ({', '.join(map(str, part['_rowid'].to_pylist()))}) AND path IN ({names})")
        return conditions

    def _record_skipped(self, skipped: Sequence[SkippedVideo], paths: set[str]) -> None:
        reasons = {video.path: video.reason for video in self.read_skipped()} | {v.path: v.reason for v in skipped}
        gone = [video.path for video in skipped] + [path for path in reasons if path in paths]
        self._delete(SKIPPED_TABLE, [f"path IN ({names})" for names in _group_names(gone)])
        if new := [asdict(video) for video in skipped if video.path not in paths]:
            data = pa.Table.from_pylist(new, schema=self._retry(lambda: self._open_existing(SKIPPED_TABLE).schema))
            self._retry(lambda: self._open_existing(SKIPPED_TABLE).add(data), "written")

    def _delete(self, name: str, conditions: Iterable[str]) -> None:
        for condition in conditions:
            self._retry(lambda condition=condition: self._open_existing(name).delete(condition), "written")

    def _join_fragments(self) -> None:
        """Join what many commits left, those that only deleted rows too."""
        for name in self._list_tables(VIDEOS_TABLE, SKIPPED_TABLE, STORED_TABLE):
            if name == STORED_TABLE and self.measure_stored()[1] > JOINED_STORED_BYTES:
                continue
            if self._retry(lambda name=name: len(self._open_existing(name).list_versions())) > self.max_fragments:
                self._optimize(name)

    def _optimize(self, name: str = VIDEOS_TABLE) -> None:
        """Join fragments, put new rows into the lists of neighbours, and drop versions before the last."""
        with self._naming_faults("written"), self._writing(), warnings.catch_warnings():
            # That others which are in the middle of something fail: `_retry` lets them begin again.
            warnings.filterwarnings("ignore", "optimize.cleanup_older_than=0")
            try:
                kept = REMOTE_VERSIONS_KEPT if self.is_remote else timedelta(0)
                table = self._open_existing(name)
                table.optimize(cleanup_older_than=kept)
                if _count_lists(table) is not None:
                    # LanceDB removes first and renews the lists then, which leaves the former ones.
                    table.optimize(cleanup_older_than=kept)
            except (OSError, RuntimeError, ValueError) as error:
                # Two commands at once: the other one does it.
                if not _is_passing(error):
                    raise
                logger.debug("Not joined: %s", error)
                self._tables.clear()

    def _keep_lists(self) -> None:
        """Sort the vectors of a large index into lists of neighbours, again where it has grown to four times."""
        num_rows = self.count_rows()
        if num_rows <= self.flat_rows:
            return
        from lancedb.index import IvfSq

        wanted = max(round(num_rows**0.5), 2)
        have = self._retry(lambda: _count_lists(self._open_existing(VIDEOS_TABLE)))
        if have is not None and wanted < 2 * have:
            # Rows outside the lists are found by looking at all of them.
            if self._retry(lambda: _count_unlisted(self._open_existing(VIDEOS_TABLE))) > self.flat_rows // 10:
                self._optimize()
            return
        # With a byte for each number; candidates are compared by the vectors themselves.
        config = IvfSq(distance_type="cosine", num_partitions=wanted)
        self._retry(
            lambda: self._open_existing(VIDEOS_TABLE).create_index(
                VECTOR_COLUMN, config=config, name=f"{_LISTS_PREFIX}{wanted}", replace=True
            ),
            "written",
        )

        def drop_former() -> None:
            table = self._open_existing(VIDEOS_TABLE)
            for index in table.list_indices():
                if index.name.startswith(_LISTS_PREFIX) and index.name != f"{_LISTS_PREFIX}{wanted}":
                    table.drop_index(index.name)

        self._retry(drop_former, "written")
        self._optimize()


class RowWriter:
    """Gathers rows and puts them into an index, a thousand or half a minute's at a time, with what is stored of them.

    Args:
        index: Where they go.
        rows_per_commit: So many are put in at once; a killed command loses fewer.
        seconds_per_commit: Seconds after which fewer are put in.
    """

    def __init__(
        self, index: VideoIndex, rows_per_commit: int = ROWS_PER_COMMIT, seconds_per_commit: float = SECONDS_PER_COMMIT
    ):
        self.index, self.rows_per_commit, self.seconds_per_commit = index, rows_per_commit, seconds_per_commit
        self._rows: list[dict[str, Any]] = []
        self._stored: list[dict[str, Any]] = []
        self._stored_bytes = 0
        self._last = time.monotonic()

    def write(self, rows: Sequence[dict[str, Any]], stored: Sequence[dict[str, Any]] = ()) -> None:
        """Take rows, all of each video, and what is stored of these, or of later rows, for re-ranking."""
        self._rows += rows
        self._stored += stored
        self._stored_bytes += sum(row[STATES_COLUMN].nbytes for row in stored)
        is_full = len(self._rows) >= self.rows_per_commit or self._stored_bytes >= STORED_BYTES_PER_COMMIT
        if is_full or time.monotonic() - self._last >= self.seconds_per_commit:
            self.flush()

    def flush(self) -> None:
        """Put in what is there: what is stored of rows before the rows, so that a kill leaves none without it."""
        self.index.add_stored(self._stored)
        self.index.add(self._rows)
        self._rows, self._stored, self._stored_bytes, self._last = [], [], 0, time.monotonic()


class VectorTable:
    """The rows of an index, to be searched.

    Up to the index's `flat_rows`, all vectors are held and compared with the query: the first search reads them.
    Above, those of some lists of neighbours are read from where the index is.

    Args:
        index: One with rows.
    """

    def __init__(self, index: VideoIndex):
        self.index = index
        self.num_rows = index.count_rows()
        self.is_flat = self.num_rows <= index.flat_rows or not index.has_lists()
        self._held: list[pa.RecordBatch] | None = None

    def __len__(self) -> int:
        return self.num_rows

    def list_paths(self) -> list[str]:
        """All videos, in order."""
        return self.index.list_paths()

    def find_nearest(
        self, vector: np.ndarray, count: int, exact: bool = False, filters: SearchFilter | None = None
    ) -> list[dict[str, Any]]:
        """Look up the rows with the largest inner products.

        Args:
            vector: The query's, float32 `(D,)` or `(1, D)`.
            count: Rows wanted.
            exact: Whether to compare it with all vectors of a large index too.
            filters: Which rows are searched; default: all.

        Returns:
            Rows without their vectors, but with their `similarity`, best first; fewer if there are fewer.
        """
        vector = np.ascontiguousarray(vector, dtype=np.float32).reshape(-1)
        where = None if filters is None else filters.to_sql()
        if self.is_flat and where is None:
            if self._held is None:
                self._held = self.index.read([*FACTS, VECTOR_COLUMN])
            found, scores = compare_all(self._held, vector, count)
        elif self.is_flat or exact:
            found, scores = self.index.find_exactly(vector, count, where)
        else:
            found, scores = self.index.find_by_lists(vector, count, where)
        rows = found.select(FACTS).to_pylist()
        return [row | {"similarity": float(score)} for row, score in zip(rows, scores, strict=True)]


def compare_all(batches: Iterable[pa.RecordBatch], vector: np.ndarray, count: int) -> tuple[pa.Table, np.ndarray]:
    """The rows with the largest inner products with a vector `(D,)`, best first, and these products."""
    best: list[pa.RecordBatch] = []
    scores: list[np.ndarray] = []
    worst = -np.inf  # of the best so far
    for batch in batches:
        own = batch.column(VECTOR_COLUMN).flatten().to_numpy(zero_copy_only=True).reshape(-1, len(vector)) @ vector
        chosen = np.flatnonzero(own > worst) if np.isfinite(worst) else np.arange(len(own))
        if len(chosen) > count:
            chosen = chosen[np.argpartition(-own[chosen], count - 1)[:count]]
        if not len(chosen):
            continue
        best.append(batch.select(FACTS).take(pa.array(chosen)))
        scores.append(own[chosen])
        if sum(map(len, scores)) >= count:
            worst = np.partition(np.concatenate(scores), -count)[-count]
    if not best:
        return pa.table({name: [] for name in FACTS}), np.zeros(0, np.float32)
    joined = np.concatenate(scores)
    order = np.argsort(-joined, kind="stable")[:count]
    return pa.Table.from_batches(best).take(pa.array(order)), joined[order]


def describe_moments(moments: dict[str, float] | None) -> str:
    """What the rows of an index are, in words."""
    if moments is None:
        return "complete videos"
    return f"moments of {moments['window_seconds']:g} s every {moments['stride_seconds']:g} s"


def describe_stored(stored: dict[str, str] | None) -> str:
    """What an index stores for re-ranking, in words."""
    return "vectors alone" if stored is None else f"{stored['what']} in {stored['dtype']}"


def require_lancedb() -> None:
    """Say how to install LanceDB where it is missing.

    Raises:
        ImportError: If it is not installed.
    """
    if find_spec("lancedb") is None:
        raise ImportError("Searching videos needs LanceDB. Install it with `pip install 'umt_hf[search]'`.")


def _write_kept_tokens(kept: dict[str, Any] | None) -> str:
    flags = {
        "keep_ratio": "--keep-ratio",
        "token_selector": "--token-selector",
        "teacher_name_or_path": "--teacher-name-or-path",
    }
    # Of all tokens nothing is recorded.
    return " ".join(f"{flags.get(name, name)} {value}" for name, value in (kept or {"keep_ratio": 1.0}).items())


def _is_passing(error: Exception) -> bool:
    """Whether an error may come from another command, so that it is worth to try again.

    Where a storage is not reached, LanceDB has tried several times.
    """
    text = str(error)
    return not isinstance(error, UserError) and not _UNREACHABLE.search(text) and bool(_MEANWHILE.search(text))


def _shorten_reason(text: str) -> str:
    """What LanceDB says, without the places in its source and what its layers put around it."""
    inner = re.findall(r'(?:message|error): "([^"]+)"|(status: \d+)|<Message>([^<]+)', text)
    if inner:
        return "; ".join(dict.fromkeys("".join(found) for found in inner))
    text = re.sub(r",? ?/[^ ,]*\.rs:\d+:\d+", "", text)
    text = re.sub(r"(lance |Generic [\w/ ]*|Wrapped )error: |LanceError\(\w+\): |Invalid input, ", "", text)
    return " ".join(text.split())[:300].rstrip(" .,") or "LanceDB does not say why"


def _list_keys(found: pa.Table) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Rows of a table, by number, with their keys."""
    return enumerate(zip(*(found[name].to_pylist() for name in STORED_KEY), strict=True))


def _build_column(values: list[Any], kind: pa.DataType) -> pa.Array:
    if pa.types.is_fixed_size_list(kind):
        vectors = np.stack(values).astype(np.float32, copy=False)
        return pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), type=kind)
    return pa.array(values, kind)


def _count_fragments(table: Any) -> int:
    return table.stats()["fragment_stats"]["num_fragments"]


def _count_lists(table: Any) -> int | None:
    """Lists of neighbours that the vectors are sorted into; `None` = they are not."""
    names = [index.name for index in table.list_indices() if index.name.startswith(_LISTS_PREFIX)]
    return max((int(name.removeprefix(_LISTS_PREFIX)) for name in names), default=None)


def _count_unlisted(table: Any) -> int:
    """Rows that came after the lists of neighbours were made and kept up."""
    names = [index.name for index in table.list_indices() if index.name.startswith(_LISTS_PREFIX)]
    return max(((table.index_stats(name).num_unindexed_rows or 0) for name in names), default=0)


def _count_nanoseconds(moment: datetime) -> int:
    """Nanoseconds from 1970 to a moment, in local time where it has no time zone; at most what a column holds."""
    second = moment.replace(microsecond=0)
    try:
        seconds = second.timestamp()
    except (OverflowError, OSError, ValueError):  # of the years 1 and 9999, and before 1970 on Windows
        seconds = second.replace(tzinfo=second.tzinfo or timezone.utc).timestamp()
    exact = int(seconds) * 10**9 + moment.microsecond * 1000
    return min(max(exact, -MAX_INTEGER), MAX_INTEGER)


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _group_names(paths: Iterable[str]) -> Iterator[str]:
    """Paths for conditions of bounded length."""
    names = [_quote(path) for path in paths]
    for start in range(0, len(names), _PATHS_AT_A_TIME):
        yield ", ".join(names[start : start + _PATHS_AT_A_TIME])
