"""Time the loading of long lists of videos: the first time, and when their table is there.

python -m benchmarks.annotations.run
"""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from transformers import HfArgumentParser

from benchmarks.common import (
    ReportArguments,
    describe_machine,
    format_table,
    run_in_new_process,
    write_results,
)

from .lists import FORMS, TARS, iterate_rows, write_list

MIB = 1 << 20


@dataclass(kw_only=True)
class Arguments(ReportArguments):
    """Which lists to load."""

    num_rows: list[int] = field(default_factory=lambda: [1_000_000, 10_000_000], metadata={"help": "Lengths."})
    forms: list[str] = field(default_factory=lambda: [*FORMS], metadata={"help": "Forms of the lists."})
    num_tar_rows: int = field(
        default=200_000, metadata={"help": "Videos of 4 KiB in tars, whose headers are read; 0 = none."}
    )
    folder: Path | None = field(
        default=None, metadata={"help": "Where lists and tables are written; 4 GB for 10 million rows. Default: /tmp."}
    )
    threads: int = field(default=1, metadata={"help": "Threads of a process, named in the table."})


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark and give the path of its JSON file."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    torch.set_num_threads(args.threads)
    rows = []
    lists = [(num_rows, form) for num_rows in args.num_rows for form in args.forms]
    for num_rows, form in [*lists, *([(args.num_tar_rows, TARS)] if args.num_tar_rows else [])]:
        print(f"Loading {num_rows:,} rows of {form} ...", flush=True)
        if args.folder is not None:
            args.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            rows.append(measure_list(Path(folder), form, num_rows))
    report = {
        "question": "How long does a list of 10 million videos take to load, and how much memory?",
        "machine": describe_machine(torch.device("cpu"))
        | {"pyarrow": pa.__version__, "datasets": datasets.__version__},
        "settings": {name: asdict(args)[name] for name in ("num_rows", "forms", "num_tar_rows", "threads")},
        "rows": rows,
    }
    table = format_rows(rows)
    print(table)
    return write_results("annotations", report, table, args.output_dir, args.name)


def measure_list(folder: Path, form: str, num_rows: int) -> dict[str, Any]:
    """Write a list, load it in two processes one after the other, and check what they found.

    Raises:
        RuntimeError: If rows are lost or differ.
    """
    path = write_list(folder, form, num_rows)
    job = {"source": str(path), "has_captions": form not in ("csv", "txt")}
    environment = {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    first, second = (run_in_new_process("benchmarks.annotations.loading", job, environment) for _ in range(2))
    ends = [next(iterate_rows(number + 1, number))[0] for number in (0, num_rows - 1)]
    for found in (first, second):
        if found["num_rows"] != num_rows or not all(map(str.endswith, found["ends"], ends)):
            raise RuntimeError(f"{path.name}: {found} is not what was written.")
    return {
        "num_rows": num_rows,
        "form": form,
        "list_bytes": sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir())),
        "table_bytes": sum(file.stat().st_size for file in (folder / "cache").rglob("*") if file.is_file()),
        "first": first,
        "second": second,
    }


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Write the rows as a Markdown table."""
    header = ["rows", "form", "list, MiB", "table, MiB", "first, s", "µs a row", "again, s"]
    header += ["own memory first, MiB", "again, MiB"]
    lines = [
        [
            f"{row['num_rows']:,}",
            row["form"],
            f"{row['list_bytes'] / MIB:.0f}",
            f"{row['table_bytes'] / MIB:.0f}",
            f"{row['first']['seconds']:.1f}",
            f"{1e6 * row['first']['seconds'] / row['num_rows']:.2g}",
            f"{row['second']['seconds']:.2f}",
            f"{row['first']['own_bytes'] / MIB:.0f}",
            f"{row['second']['own_bytes'] / MIB:.0f}",
        ]
        for row in rows
    ]
    return format_table(header, lines)


if __name__ == "__main__":
    main()
