"""Time the search in an index of synthetic vectors, against brute force with torch and NumPy.

python -m benchmarks.search.run
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import faiss
import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from transformers import HfArgumentParser

from benchmarks.common import (
    ReportArguments,
    describe_machine,
    format_spread,
    format_table,
    run_interleaved,
    summarize,
    write_results,
)
from umt_hf import UMTTextConfig, UMTTextModel
from umt_hf.inference.search import find_nearest
from umt_hf.inference.video_index import VideoIndex

TOP_K = 10
QUERY_TOKENS = 8
UMT, TORCH, NUMPY = "umt_hf, FAISS", "torch matmul, topk", "NumPy matmul, argpartition"
ENCODER = {"model": "synthetic"}

Search = Callable[[np.ndarray], list[str]]


@dataclass(kw_only=True)
class Arguments(ReportArguments):
    """What to search in."""

    num_videos: list[int] = field(default_factory=lambda: [10_000, 100_000], metadata={"help": "Sizes of the index."})
    width: int = field(default=512, metadata={"help": "Width of a vector; that of the published models."})
    queries: int = field(default=20, metadata={"help": "Queries of a round."})
    repeats: int = field(default=5, metadata={"help": "Rounds; each loads and searches in every way."})
    threads: int = field(default=1, metadata={"help": "Threads of torch and FAISS."})


@dataclass(frozen=True)
class SearchTime:
    """Wall-clock seconds of loading the index, and of a query's answer, the mean over the queries of a round."""

    load: float
    search: float


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark and give the path of its JSON file."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    datasets.disable_progress_bars()
    rows = []
    for num_videos in args.num_videos:
        print(f"Searching {num_videos} videos ...", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            rows += time_searches(Path(folder), num_videos, args)
    report = {
        "question": "How long does a search among 100 000 videos take?",
        "machine": describe_machine(torch.device("cpu")) | {"faiss": faiss.__version__},
        "settings": {name: value for name, value in asdict(args).items() if name not in ("output_dir", "name")},
        "text_encoding_seconds": time_text_encoding(args.repeats),
        "rows": rows,
    }
    table = format_rows(rows)
    table += f"\n\nEncoding the query: {format_milliseconds(report['text_encoding_seconds'])} ms."
    print(table)
    return write_results("search", report, table, args.output_dir, args.name)


def time_searches(folder: Path, num_videos: int, args: Arguments) -> list[dict[str, Any]]:
    """Build an index of a size, search it in all ways in turn and give a row for each."""
    rng = np.random.default_rng(0)
    vectors, queries = (draw_unit_vectors(rng, count, args.width) for count in (num_videos, args.queries))
    np.save(folder / "vectors.npy", vectors)
    build_seconds = build_index(folder / "index", vectors)
    loaders = {UMT: load_index, TORCH: load_torch, NUMPY: load_numpy}
    check_agreement({name: load(folder) for name, load in loaders.items()}, queries)
    cases = {name: partial(time_search, load, folder, queries) for name, load in loaders.items()}
    times = run_interleaved(cases, args.repeats)
    described = {"num_videos": num_videos, "width": args.width}
    return [
        described
        | {
            "way": name,
            "build_seconds": build_seconds if name == UMT else None,
            "load_seconds": summarize(time.load for time in times[name]),
            "search_seconds": summarize(time.search for time in times[name]),
            "load_and_search_seconds": summarize(time.load + time.search for time in times[name]),
            "search_relative_to_torch": summarize(
                own.search / torch_.search for own, torch_ in zip(times[name], times[TORCH], strict=True)
            ),
        }
        for name in loaders
    ]


def draw_unit_vectors(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    """Draw float32 `(count, width)` in directions that are spread evenly."""
    vectors = rng.standard_normal((count, width), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def build_index(folder: Path, vectors: np.ndarray) -> float:
    """Leave the vectors as a shard and let the index take it in, as `umt-hf embed` ends.

    Returns:
        Seconds that the second part takes.
    """
    shard = pa.table(
        {
            "path": [name_video(i) for i in range(len(vectors))],
            "duration_seconds": np.full(len(vectors), 10.0),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]),
        }
    )
    Dataset(shard).save_to_disk(folder / "shards" / "synthetic")
    start = time.perf_counter()
    with VideoIndex(folder).write(ENCODER):
        return time.perf_counter() - start


def name_video(row: int) -> str:
    """Path of a video that does not exist, in the order of rows."""
    return f"/videos/{row:07d}.mp4"


def load_index(folder: Path) -> Search:
    """Load the index as `umt-hf search` does; it looks up the paths, too."""
    table = VideoIndex(folder / "index").load()
    return lambda query: [row["path"] for row in find_nearest(table, query[None], TOP_K)]


def load_torch(folder: Path) -> Search:
    """Load the vectors into a tensor."""
    vectors = torch.from_numpy(np.load(folder / "vectors.npy"))

    def search(query: np.ndarray) -> list[str]:
        return [name_video(row) for row in (vectors @ torch.from_numpy(query)).topk(TOP_K).indices.tolist()]

    return search


def load_numpy(folder: Path) -> Search:
    """Load the vectors into an array."""
    vectors = np.load(folder / "vectors.npy")

    def search(query: np.ndarray) -> list[str]:
        scores = vectors @ query
        best = np.argpartition(scores, -TOP_K)[-TOP_K:]
        return [name_video(row) for row in best[np.argsort(-scores[best])]]

    return search


def check_agreement(searches: dict[str, Search], queries: np.ndarray) -> None:
    """Compare the answers of all ways.

    Raises:
        RuntimeError: If one differs.
    """
    for query in queries:
        answers = {name: search(query) for name, search in searches.items()}
        for name, answer in answers.items():
            if answer != answers[TORCH]:
                raise RuntimeError(f"{name} finds {answer}, {TORCH} {answers[TORCH]}: not the same search.")


def time_search(load: Callable[[Path], Search], folder: Path, queries: np.ndarray) -> SearchTime:
    """Load once, then answer all queries one by one."""
    start = time.perf_counter()
    search = load(folder)
    loaded = time.perf_counter()
    for query in queries:
        search(query)
    return SearchTime(loaded - start, (time.perf_counter() - loaded) / len(queries))


@torch.inference_mode()
def time_text_encoding(repeats: int) -> dict[str, Any]:
    """Seconds for one query through an untrained text tower of the base size."""
    model = UMTTextModel(UMTTextConfig()).eval()
    tokens = torch.randint(1000, 2000, (1, QUERY_TOKENS))
    model(tokens)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        model(tokens)
        seconds.append(time.perf_counter() - start)
    return summarize(seconds)


def format_milliseconds(summary: dict[str, Any]) -> str:
    """Write a summary of seconds in milliseconds."""
    return format_spread({name: 1000 * summary[name] for name in ("median", "min", "max")})


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Write the rows as a Markdown table."""
    header = ["videos", "way", "build, s", "load, ms", "search, ms", "x torch", "load and first answer, ms"]
    lines = [
        [
            str(row["num_videos"]),
            row["way"],
            "-" if row["build_seconds"] is None else f"{row['build_seconds']:.2f}",
            format_milliseconds(row["load_seconds"]),
            format_milliseconds(row["search_seconds"]),
            format_spread(row["search_relative_to_torch"], ".2f"),
            format_milliseconds(row["load_and_search_seconds"]),
        ]
        for row in rows
    ]
    return format_table(header, lines)


if __name__ == "__main__":
    main()
