"""Synthetic lists of videos that do not exist, in every form."""

import io
import json
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

FORMS = ("csv", "txt", "jsonl", "json", "parquet")
TARS = "tars"
ROWS_OF_TAR, VIDEO_BYTES = 5000, 4096
WORDS = [
    "a",
    "man",
    "woman",
    "dog",
    "plays",
    "guitar",
    "runs",
    "along",
    "the",
    "beach",
    "with",
    "red",
    "ball",
    "street",
]
WORDS_OF_CAPTION, NUM_CAPTIONS, NUM_CLASSES = 12, 5000, 400
ROWS_AT_ONCE = 100_000


def write_list(folder: Path, form: str, num_rows: int) -> Path:
    """Write a list: paths with labels (CSV), paths alone (TXT), paths with captions, or a folder of tars."""
    path = folder / f"list.{form}"
    if form == TARS:
        path.mkdir()
        _write_tars(path, num_rows)
        return path
    if form == "parquet":
        _write_parquet(path, num_rows)
        return path
    with path.open("w", encoding="utf-8") as file:
        if form == "json":
            file.write("[")
        for number, (video, caption) in enumerate(iterate_rows(num_rows)):
            if form == "csv":
                file.write(f"{video},{number % NUM_CLASSES}\n")
            elif form == "txt":
                file.write(f"{video}\n")
            else:
                comma = ",\n" if number and form == "json" else ""
                file.write(comma + json.dumps({"video": video, "caption": caption}) + "\n" * (form == "jsonl"))
        if form == "json":
            file.write("]")
    return path


def iterate_rows(num_rows: int, first: int = 0) -> Iterator[tuple[str, str]]:
    """Path and caption of each video."""
    draw = random.Random(0)
    captions = [" ".join(draw.choices(WORDS, k=WORDS_OF_CAPTION)) for _ in range(NUM_CAPTIONS)]
    for number in range(first, num_rows):
        yield f"{number % 1000:03d}/video_{number:09d}.mp4", captions[number % NUM_CAPTIONS]


def _write_parquet(path: Path, num_rows: int) -> None:
    schema = pa.schema([("video", pa.string()), ("caption", pa.string())])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for first in range(0, num_rows, ROWS_AT_ONCE):
            rows = list(iterate_rows(min(first + ROWS_AT_ONCE, num_rows), first))
            writer.write_table(pa.table(list(zip(*rows, strict=True)), schema=schema))


def _write_tars(folder: Path, num_rows: int) -> None:
    for first in range(0, num_rows, ROWS_OF_TAR):
        with tarfile.open(folder / f"train-{first // ROWS_OF_TAR:06d}.tar", "w", encoding="utf-8") as tar:
            for video, caption in iterate_rows(min(first + ROWS_OF_TAR, num_rows), first):
                notes = json.dumps({"caption": caption}).encode()
                for name, content in ((video, bytes(VIDEO_BYTES)), (f"{video.removesuffix('.mp4')}.json", notes)):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
