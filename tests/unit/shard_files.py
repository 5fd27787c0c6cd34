"""Shards with the bytes of videos, as people have them."""

import io
import json
import tarfile
from pathlib import Path


def write_tar(path: Path, rows: list[dict[str, bytes | str | dict]], names: list[str] | None = None) -> Path:
    """A WebDataset tar; a row has the content of each member by its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, row in enumerate(rows):
            for suffix, content in row.items():
                if isinstance(content, dict):
                    content = json.dumps(content)
                content = content.encode() if isinstance(content, str) else content
                member = tarfile.TarInfo(f"{names[number] if names else f'{path.stem}_{number:04d}'}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def write_tars(folder: Path, rows: list[dict], rows_per_tar: int, split: str = "train") -> Path:
    """A folder of tars, named as `datasets` knows splits."""
    for number, first in enumerate(range(0, len(rows), rows_per_tar)):
        write_tar(folder / f"{split}-{number:05d}.tar", rows[first : first + rows_per_tar])
    return folder


def write_parquets(folder: Path, rows: list[dict], rows_per_file: int, rows_per_group: int = 3) -> Path:
    """A folder of Parquet files with several row groups each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    for number, first in enumerate(range(0, len(rows), rows_per_file)):
        table = pa.Table.from_pylist(rows[first : first + rows_per_file])
        pq.write_table(table, folder / f"train-{number:05d}.parquet", row_group_size=rows_per_group)
    return folder
