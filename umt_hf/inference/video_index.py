"""A searchable folder of video vectors, which grows by complete shards and is never half written.

INDEX/
  index.json       which encoder made the vectors, and with which versions
  table/           a `datasets` dataset, one row per video, with its FAISS index in `vector.faiss`
  skipped.json     videos that could not be read, and why
  shards/          what a run has encoded so far; merged into the table when it ends
"""

import json
import os
import shutil
import uuid
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, Features, List, Value, concatenate_datasets
from filelock import FileLock, Timeout

from ..data.video_files import SkippedVideo, VideoFile
from ..runs.disk import put_folder, write_text
from ..runs.folder import UNFINISHED_SUFFIX, collect_versions

VECTOR_COLUMN = "vector"
FAISS_FILE = "vector.faiss"


class VideoIndex:
    """An index folder: reading it needs nothing else, writing it is for one command at a time.

    Args:
        folder: Where it is or will be.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._table, self._shards = self.folder / "table", self.folder / "shards"
        self._previous = self.folder / "table.previous"
        self._info, self._skipped = self.folder / "index.json", self.folder / "skipped.json"

    def read_encoder(self) -> dict[str, Any]:
        """What is known of the encoder that made the vectors.

        Raises:
            FileNotFoundError: If the folder is not an index.
        """
        if not self._info.is_file():
            raise FileNotFoundError(
                f"{self.folder} is not an index: it has no {self._info.name}. `umt-hf embed` makes one."
            )
        return json.loads(self._info.read_text(encoding="utf-8"))["encoder"]

    def check_encoder(self, encoder: dict[str, Any]) -> None:
        """Make sure that vectors of an encoder may be compared with those of the index, if there are any.

        Args:
            encoder: Its description; all but the name it is loaded by must agree.

        Raises:
            FileExistsError: If the folder holds something other than an index.
            ValueError: If the index was built by another encoder.
        """
        if not self._info.is_file():
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise FileExistsError(f"{self.folder} is not an index and not empty; choose another folder.")
            return
        built = {"dtype": "float32", "mixed_precision": "no"} | self.read_encoder()  # of one that does not say
        for name in encoder.keys() - {"model"}:
            # The name may differ: a folder that has moved is the same model.
            if encoder[name] != built.get(name):
                raise ValueError(
                    f"{self.folder} was built by another model: its {name} is {built.get(name)!r} (from "
                    f"{built['model']}), that of {encoder['model']} is {encoder[name]!r}. Use the model that it was "
                    "built with, or a new index folder."
                )

    @contextmanager
    def write(self, encoder: dict[str, Any]) -> Generator[None]:
        """Reserve the folder for this command, and take in what a killed one has left.

        Args:
            encoder: Description of the encoder whose vectors will be added.

        Raises:
            BlockingIOError: If another command is writing.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise BlockingIOError(f"{self.folder} is being written by another `umt-hf embed`; wait for it.") from error
        try:
            # Written under the lock, so that two commands cannot start one index with two encoders.
            _write_json(self._info, {"encoder": encoder, "versions": collect_versions()})
            self._shards.mkdir(exist_ok=True)
            self._remove_leftovers()
            self.merge([])
            yield
        finally:
            lock.release()

    def select_new(self, files: Sequence[VideoFile]) -> list[VideoFile]:
        """Files that are not in the table, or have changed since."""
        known: set[tuple[str, int, int]] = set()
        if (folder := self._find_table()) is not None:
            table = Dataset.load_from_disk(folder)
            known.update(zip(*(table[name][:] for name in ("path", "size_bytes", "modified_ns")), strict=True))
        return [file for file in files if (file.path, file.size_bytes, file.modified_ns) not in known]

    def write_shard(self, rows: list[dict[str, Any]]) -> None:
        """Keep rows, all or none of them, until `merge` puts them into the table.

        Args:
            rows: Fields of `VideoFile`, `num_frames`, `duration_seconds` (or `None`) and `vector`, a float32 array
                `(D,)`.
        """
        features = Features(
            {
                "path": Value("string"),
                "size_bytes": Value("int64"),
                "modified_ns": Value("int64"),
                "num_frames": Value("int64"),
                "duration_seconds": Value("float64"),
                VECTOR_COLUMN: List(Value("float32"), length=len(rows[0][VECTOR_COLUMN])),
            }
        )
        final = self._shards / uuid.uuid4().hex
        unfinished = _name_unfinished(final)
        Dataset.from_list(rows, features=features).save_to_disk(unfinished)
        put_folder(unfinished, final)

    def merge(self, skipped: Sequence[SkippedVideo]) -> int:
        """Put all shards into the table and index it anew.

        Args:
            skipped: Videos that could not be read now. Rows of their earlier contents go.

        Returns:
            Videos in the index.
        """
        folder = self._find_table()
        shards = sorted(self._shards.iterdir())
        parts = [Dataset.load_from_disk(part) for part in ([] if folder is None else [folder]) + shards]
        reasons = {video.path: video.reason for video in self.read_skipped()} | {v.path: v.reason for v in skipped}
        dropped = {video.path for video in skipped}
        rows: dict[str, int] = {}
        if parts:
            joined = concatenate_datasets(parts)
            # A later row of the same path replaces an earlier one.
            newest = {path: row for row, path in enumerate(joined["path"][:])}  # shards come behind the table
            rows = {path: newest[path] for path in sorted(newest.keys() - dropped)}
            if shards or len(rows) < len(joined):
                self._replace_table(cast("Dataset", joined.select(list(rows.values()), keep_in_memory=True)))
        kept = [SkippedVideo(path, reason) for path, reason in sorted(reasons.items()) if path not in rows]
        _write_json(self._skipped, [asdict(video) for video in kept])
        for shard in shards:
            _remove(shard)
        return len(rows)

    def read_skipped(self) -> list[SkippedVideo]:
        """Videos that could not be read, in order of their paths."""
        if not self._skipped.is_file():
            return []
        return [SkippedVideo(**entry) for entry in json.loads(self._skipped.read_text(encoding="utf-8"))]

    def load(self) -> Dataset:
        """The videos, with their FAISS index attached to the column `vector`.

        Raises:
            FileNotFoundError: If the folder is not an index.
            ImportError: If FAISS is not installed.
            ValueError: If there are no videos in it.
        """
        require_faiss()
        self.read_encoder()
        folder = self._find_table()
        if folder is None:
            raise ValueError(f"{self.folder} holds no videos yet; `umt-hf embed` adds them.")
        table = Dataset.load_from_disk(folder)
        table.load_faiss_index(VECTOR_COLUMN, folder / FAISS_FILE)
        return table

    def _find_table(self) -> Path | None:
        """The complete table: the former one where a command was killed while it exchanged the two."""
        return next((folder for folder in (self._table, self._previous) if folder.is_dir()), None)

    def _remove_leftovers(self) -> None:
        for pattern in (f"table*{UNFINISHED_SUFFIX}", f"shards/*{UNFINISHED_SUFFIX}"):
            for unfinished in self.folder.glob(pattern):
                shutil.rmtree(unfinished)
        if self._table.is_dir() and self._previous.is_dir():
            _remove(self._previous)

    def _replace_table(self, rows: Dataset) -> None:
        unfinished = _name_unfinished(self._table)
        if len(rows):
            rows.save_to_disk(unfinished)
            table = Dataset.load_from_disk(unfinished)
            add_faiss_index(table)
            table.save_faiss_index(VECTOR_COLUMN, unfinished / FAISS_FILE)
        if self._table.is_dir():
            # A kill between the two renames leaves the former table, which `_find_table` falls back to.
            os.replace(self._table, self._previous)
        if len(rows):
            put_folder(unfinished, self._table)
        if self._previous.is_dir():
            _remove(self._previous)


def add_faiss_index(table: Dataset) -> None:
    """Index a table's column `vector` for exact search by inner product.

    Raises:
        ImportError: If FAISS is not installed.
    """
    require_faiss()
    import faiss

    table.add_faiss_index(VECTOR_COLUMN, metric_type=faiss.METRIC_INNER_PRODUCT)


def require_faiss() -> None:
    """Say how to install FAISS where it is missing.

    Raises:
        ImportError: If it is not installed.
    """
    if find_spec("faiss") is None:
        raise ImportError("Searching videos needs FAISS. Install it with `pip install 'umt_hf[search]'`.")


def _name_unfinished(path: Path) -> Path:
    return path.with_name(path.name + UNFINISHED_SUFFIX)


def _remove(folder: Path) -> None:
    """Delete a folder."""
    # Renamed first, so that an interrupted deletion leaves no partial folder under that name.
    unfinished = _name_unfinished(folder)
    os.replace(folder, unfinished)
    shutil.rmtree(unfinished)


def _write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
