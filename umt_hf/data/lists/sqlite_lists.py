"""Lists of videos as SQLite bases, as they are published for large corpora, read a chunk at a time."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa

from .columns import VIDEO, describe_mixed, join_paths, split_chunks

SQLITE_SUFFIXES = {".db", ".sqlite", ".sqlite3"}


def read_sqlite(path: Path, root: str) -> Iterator[pa.Table]:
    """Read the table `annos` (id, file name, caption) of an SQLite base.

    Args:
        path: The base.
        root: Folder that relative paths start from.

    Yields:
        Chunks with `video` and `caption`, in order of the ids.

    Raises:
        ValueError: If there is no such table, or a row has no file name.
    """
    number = 0
    try:
        with closing(sqlite3.connect(_name_read_only(path), uri=True)) as base:
            # Sorted: without it the order of rows, and so the order of training, is up to SQLite.
            rows = base.execute("SELECT * FROM annos ORDER BY 1")
            if len(rows.description) != 3:
                raise sqlite3.DatabaseError(f"it has {len(rows.description)} columns")
            for chunk in split_chunks(rows):
                _, names, captions = zip(*chunk, strict=True)
                for row, name in enumerate(names, start=number):
                    if not isinstance(name, str) or not name:
                        raise ValueError(
                            f"{path}, row {row}: expected a file name in the second column, got {name!r}."
                        )
                number += len(chunk)
                yield pa.table({VIDEO: join_paths(root, pa.array(names)), "caption": pa.array(captions)})
    except sqlite3.Error as error:
        raise ValueError(
            f"{path}: not an SQLite base with a table `annos` (id, file name, caption): {error}"
        ) from error
    except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
        raise ValueError(describe_mixed(str(path), error)) from error


def _name_read_only(path: Path) -> str:
    """The URI that opens a base for reading; in it `#`, `?` and `%` would mean something else than in a path."""
    name = path.absolute().as_posix()
    return f"file://{'' if name.startswith('/') else '/'}{quote(os.fsencode(name), safe='/:')}?mode=ro"
