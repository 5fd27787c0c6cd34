"""What stands for the rows of a training table, so that a run that goes on can say that they are others."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from ..streams import ParquetShards, Shards, TarShards

# What the tasks read of a row: any of them, of question answering, of retrieval by choice, of detection.
NAMED_COLUMNS = (
    "video", "caption", "label",
    "question", "answers", "answer_weights",
    "answer",
    "key_seconds", "key_frame", "width", "height", "boxes", "labels",
)  # fmt: skip
READ_BYTES = 1 << 20

Fingerprint = dict[str, int | str]  # `rows` and `names`


def fingerprint_rows(table: Any) -> Fingerprint:
    """Number of rows, and sixteen digits for what the tasks read of them and their order; without reading a video.

    Videos that are bytes count by their lengths. Shards count by the names and sizes of the files, and by their texts
    where these are read: of tars by the checksums in the index, of Parquet files on this machine as they are stored.
    Ten million names take about a second.

    Args:
        table: A `datasets.Dataset`, or `Shards`.
    """
    digest = hashlib.blake2b(digest_size=8)
    if isinstance(table, Dataset):
        _add_columns(digest, table, NAMED_COLUMNS)
        if table._indices is not None:
            for chunk in table._indices.column(0).chunks:
                digest.update(chunk.to_numpy(zero_copy_only=False).tobytes())
    elif isinstance(table, Shards):
        digest.update(np.ascontiguousarray(table.starts).tobytes())
        for path in getattr(table, "paths", ()):
            size = os.path.getsize(path) if os.path.exists(path) else -1  # addresses of the Hub have none here
            digest.update(f"{os.path.basename(path)} {size}\n".encode(errors="replace"))
        if isinstance(table, TarShards):
            for name in ("size", "text_size", "text_sum") if table.reads_captions else ("size",):
                digest.update(np.ascontiguousarray(table.index[name]).tobytes())
        elif isinstance(table, ParquetShards):
            for content in _read_stored_texts(table):
                digest.update(content)
    return {"rows": len(table), "names": digest.hexdigest()}


def digest_columns(table: Dataset, names: Sequence[str]) -> str:
    """Sixteen digits for the values of some columns, as far as the table has them.

    Args:
        table: Its rows as they are stored, without the order of a selection.
        names: Of the columns.
    """
    digest = hashlib.blake2b(digest_size=8)
    _add_columns(digest, table, names)
    return digest.hexdigest()


def _add_columns(digest: Any, table: Dataset, names: Sequence[str]) -> None:
    for name in names:
        if name in table.column_names:
            column = table.data.column(name)
            lengths, content = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=8)
            for chunk in column.chunks:
                _add_array(lengths, content, chunk)
                if column.null_count:  # which is not an empty text
                    lengths.update(chunk.is_null().to_numpy(zero_copy_only=False).tobytes())
            # Apart from each other, so that it does not matter where a table is cut into chunks.
            digest.update(f"{name} {lengths.hexdigest()} {content.hexdigest()}".encode())


def _read_stored_texts(shards: ParquetShards) -> Iterator[bytes]:
    """The texts in the columns that are read, as they are stored, of files on this machine."""
    columns = set(shards.columns.values())
    for path in shards.paths:
        if not os.path.exists(path):
            continue
        content = pq.read_metadata(path)
        places = [
            number
            for number in range(content.num_columns)
            if (leaf := content.schema.column(number)).path.split(".")[0] in columns
            and leaf.logical_type.type == "STRING"
        ]
        with open(path, "rb") as file:
            for group in range(content.num_row_groups):
                for number in places:
                    chunk = content.row_group(group).column(number)
                    file.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
                    left = chunk.total_compressed_size
                    while left > 0 and (piece := file.read(min(left, READ_BYTES))):
                        left -= len(piece)
                        yield piece


def _add_array(lengths: Any, content: Any, array: pa.Array) -> None:
    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        _add_array(lengths, content, array.storage)
    elif pa.types.is_struct(kind):
        for field, child in zip(kind, array.flatten(), strict=True):
            _add_array(lengths, None if field.name == "bytes" else content, child)
    elif pa.types.is_fixed_size_list(kind):
        _add_array(lengths, content, array.flatten())
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
    elif pa.types.is_floating(kind) and content is not None:
        content.update(array.fill_null(float("nan")).to_numpy(zero_copy_only=False).astype("<f8").tobytes())


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
        else f"{name} has its {now['rows']:,} rows under other names, with other captions, labels, questions "
        "or boxes, or in another order"
        for then, (name, now) in zip(former, present.items(), strict=True)
        if dict(then) != now
    ]
    return "; ".join(changed) or None
