"""What stands for the rows of a training table, so that a run that goes on can say that they are others."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from ..streams import Shards

NAMED_COLUMNS = ("video", "caption", "label")

Fingerprint = dict[str, int | str]  # `rows` and `names`


def fingerprint_rows(table: Any) -> Fingerprint:
    """Number of rows, and sixteen digits for their names, captions and order; without reading a video.

    Rows of bytes count by the lengths of the bytes, shards by the names and sizes of the files and their rows. Ten
    million names take about a second.

    Args:
        table: A `datasets.Dataset`, or `Shards`.
    """
    digest = hashlib.blake2b(digest_size=8)
    if isinstance(table, Dataset):
        _add_table(digest, table)
    elif isinstance(table, Shards):
        digest.update(np.ascontiguousarray(table.starts).tobytes())
        for path in getattr(table, "paths", ()):
            size = os.path.getsize(path) if os.path.exists(path) else -1  # addresses of the Hub have none here
            digest.update(f"{os.path.basename(path)} {size}\n".encode(errors="replace"))
    return {"rows": len(table), "names": digest.hexdigest()}


def _add_table(digest: Any, table: Dataset) -> None:
    for name in NAMED_COLUMNS:
        if name in table.column_names:
            lengths, content = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=8)
            for chunk in table.data.column(name).chunks:
                _add_array(lengths, content, chunk)
            # Apart from each other, so that it does not matter where a table is cut into chunks.
            digest.update(f"{name} {lengths.hexdigest()} {content.hexdigest()}".encode())
    if table._indices is not None:
        for chunk in table._indices.column(0).chunks:
            digest.update(chunk.to_numpy(zero_copy_only=False).tobytes())


def _add_array(lengths: Any, content: Any, array: pa.Array) -> None:
    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        _add_array(lengths, content, array.storage)
    elif pa.types.is_struct(kind):
        for field, child in zip(kind, array.flatten(), strict=True):
            _add_array(lengths, None if field.name == "bytes" else content, child)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        lengths.update(np.diff(array.offsets.to_numpy()).astype("<i8").tobytes())
        _add_array(lengths, content, array.flatten())
    elif _has_offsets(kind):
        wide = pa.types.is_large_string(kind) or pa.types.is_large_binary(kind)
        _, offsets, data = array.buffers()
        if len(array) and offsets is not None:
            places = np.frombuffer(offsets, "<i8" if wide else "<i4")[array.offset : array.offset + len(array) + 1]
            lengths.update(np.diff(places).astype("<i8").tobytes())
            if data is not None and content is not None and not pa.types.is_binary(kind):
                content.update(memoryview(data)[int(places[0]) : int(places[-1])])
    elif pa.types.is_integer(kind) and content is not None:
        content.update(array.fill_null(-1).to_numpy(zero_copy_only=False).astype("<i8").tobytes())


def _has_offsets(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind)


def describe_changes(former: Sequence[Mapping[str, Any]], present: Mapping[str, Fingerprint]) -> str | None:
    """What has changed in the training data since a checkpoint was written; `None` if nothing has.

    Args:
        former: Of each corpus, as the checkpoint has it.
        present: Name of each corpus of this run -> its rows.
    """
    if len(former) != len(present):
        return f"{len(former)} corpora then and {len(present)} now"
    changed = [
        f"{name} had {then['rows']:,} rows then and has {now['rows']:,} now"
        if then["rows"] != now["rows"]
        else f"{name} has its {now['rows']:,} rows under other names, with other captions, or in another order"
        for then, (name, now) in zip(former, present.items(), strict=True)
        if dict(then) != now
    ]
    return "; ".join(changed) or None
