"""Time the search in an index, against FAISS and brute force with NumPy, and how the index grows.

python -m benchmarks.search.run
python -m benchmarks.search.run --num_videos 1000000 --vectors vectors.npz --threads 2 --memory true
"""

import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import HfArgumentParser

from benchmarks.common import (
    ReportArguments,
    describe_machine,
    format_spread,
    format_table,
    run_in_new_process,
    run_interleaved,
    summarize,
    write_results,
)
from benchmarks.search.vectors import draw_unit_vectors, grow
from umt_hf import UMTTextConfig, UMTTextModel
from umt_hf.inference.video_index import VECTOR_COLUMN, VideoIndex

TOP_K = 10
QUERY_TOKENS = 8
ROWS_AT_A_TIME = 50_000
UMT, EXACT, SCAN = "umt_hf", "umt_hf, exact", "LanceDB scan"
FAISS, NUMPY = "FAISS flat", "NumPy matmul, argpartition"
EXACT_WAYS = (EXACT, SCAN, FAISS, NUMPY)
# Index of LanceDB -> further arguments of a query.
KINDS = {"ivf_sq": {"refine_factor": 4}, "ivf_hnsw_sq": {"refine_factor": 4, "ef": 100}}

Search = Callable[[np.ndarray], list[str]]


@dataclass(kw_only=True)
class Arguments(ReportArguments):
    """What to search in."""

    num_videos: list[int] = field(default_factory=lambda: [10_000, 100_000], metadata={"help": "Sizes of the index."})
    vectors: str | None = field(
        default=None,
        metadata={"help": "File of benchmarks.search.vectors, whose vectors are grown; random ones come beside them."},
    )
    width: int = field(default=512, metadata={"help": "Width of a random vector; that of the published models."})
    kinds: list[str] = field(default_factory=list, metadata={"help": f"Also try these indexes: {', '.join(KINDS)}."})
    flat_rows: int | None = field(default=None, metadata={"help": "Rows that are searched flat; default: umt_hf's."})
    queries: int = field(default=20, metadata={"help": "Queries of a round."})
    repeats: int = field(default=3, metadata={"help": "Rounds; each loads and searches in every way."})
    num_appended: int = field(default=50, metadata={"help": "Videos added one by one to the index in the end."})
    memory: bool = field(default=False, metadata={"help": "Measure the memory of each way in a new process."})
    threads: int = field(default=1, metadata={"help": "Threads of NumPy, FAISS and LanceDB."})


@dataclass(frozen=True)
class SearchTime:
    """Wall-clock seconds of loading the index with the first answer, and of a query's answer after it, the mean."""

    first: float
    search: float


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark and give the path of its JSON file."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    torch.set_num_threads(args.threads)
    limit_threads(args.threads)
    rows = []
    for num_videos in args.num_videos:
        for source in ("random", *([args.vectors] if args.vectors else [])):
            print(f"Searching {num_videos} videos ...", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                rows += time_searches(Path(folder), num_videos, source, args)
    report = {
        "question": "How long does a search among a million videos take?",
        "machine": describe_machine(torch.device("cpu")) | describe_libraries(),
        "settings": {name: value for name, value in asdict(args).items() if name not in ("output_dir", "name")},
        "text_encoding_seconds": time_text_encoding(args.repeats),
        "rows": rows,
    }
    table = f"{format_rows(rows)}\n\n{format_appends(rows)}"
    table += f"\n\nEncoding the query: {format_milliseconds(report['text_encoding_seconds'])} ms."
    print(table)
    return write_results("search", report, table, args.output_dir, args.name)


def limit_threads(threads: int) -> None:
    """Set the threads of all libraries before their pools are made; NumPy's own follow `OMP_NUM_THREADS`."""
    for name in ("LANCE_CPU_THREADS", "TOKIO_WORKER_THREADS"):
        os.environ.setdefault(name, str(threads))
    if has_faiss():
        import faiss

        faiss.omp_set_num_threads(threads)


def has_faiss() -> bool:
    """Whether there is FAISS to compare with."""
    return importlib.util.find_spec("faiss") is not None


def describe_libraries() -> dict[str, str | None]:
    """Versions of what is compared."""
    import lancedb

    found: dict[str, str | None] = {"lancedb": lancedb.__version__, "numpy": np.__version__, "faiss": None}
    if has_faiss():
        import faiss

        found["faiss"] = faiss.__version__
    return found


def load_vectors(source: str, count: int, args: Arguments) -> tuple[np.ndarray, np.ndarray]:
    """Vectors `(count, D)` and queries `(queries, D)`."""
    if source == "random":
        rng = np.random.default_rng(0)
        return draw_unit_vectors(rng, count, args.width), draw_unit_vectors(rng, args.queries, args.width)
    stored = np.load(source)
    return grow(stored["vectors"], count), stored["queries"][: args.queries]


def time_searches(folder: Path, num_videos: int, source: str, args: Arguments) -> list[dict[str, Any]]:
    """Build an index of a size, search it in all ways in turn and give a row for each."""
    vectors, queries = load_vectors(source, num_videos, args)
    np.save(folder / "vectors.npy", vectors)
    options = {} if args.flat_rows is None else {"flat_rows": args.flat_rows}
    build = {UMT: build_index(folder / "index", vectors, options)}
    loaders: dict[str, Callable[[Path], Search]] = {UMT: partial(load_index, options=options)}
    if not VideoIndex(folder / "index", **options).load().is_flat:
        loaders[EXACT] = partial(load_index, options=options, exact=True)
    loaders |= {SCAN: load_scan, NUMPY: load_numpy}
    if has_faiss():
        build[FAISS] = build_faiss(folder, vectors)
        loaders[FAISS] = load_faiss
    for kind in args.kinds:
        build[kind] = build_kind(folder, kind, len(vectors))
        loaders[kind] = partial(load_kind, kind=kind)
    truth = vectors @ queries.T
    recall = check_answers({name: load(folder) for name, load in loaders.items()}, queries, truth)
    times = run_interleaved(
        {n: partial(time_search, load, folder, queries) for n, load in loaders.items()}, args.repeats
    )
    described = {"num_videos": num_videos, "vectors": Path(source).stem, "width": vectors.shape[1]}
    rows = [
        described
        | {
            "way": name,
            "build_seconds": build.get(name),
            "first_seconds": summarize(time.first for time in times[name]),
            "search_seconds": summarize(time.search for time in times[name]),
            "search_relative_to_numpy": summarize(
                own.search / other.search for own, other in zip(times[name], times[NUMPY], strict=True)
            ),
            "recall": recall[name],
            "memory_bytes": measure_memory(folder, name, queries, options) if args.memory else None,
        }
        for name in loaders
    ]
    rows[0] |= measure_growth(folder / "index", vectors, args.num_appended, options)
    return rows


def name_video(row: int) -> str:
    """Path of a video that does not exist, in the order of rows."""
    return f"/videos/{row:07d}.mp4"


def build_row(number: int, vector: np.ndarray) -> dict[str, Any]:
    """What the index holds of a video."""
    facts = {"size_bytes": 1, "modified_ns": 1, "num_frames": 100, "duration_seconds": 10.0}
    return {"path": name_video(number), **facts, VECTOR_COLUMN: vector}


def build_index(folder: Path, vectors: np.ndarray, options: dict[str, int]) -> float:
    """Put the vectors into an index as `umt-hf embed` does, in larger commits.

    Returns:
        Seconds that it takes.
    """
    start = time.perf_counter()
    index = VideoIndex(folder, **options)
    index.create({"model": "synthetic", "projection_dim": vectors.shape[1]})
    for first in range(0, len(vectors), ROWS_AT_A_TIME):
        index.add([build_row(first + i, vector) for i, vector in enumerate(vectors[first : first + ROWS_AT_A_TIME])])
    index.finish([])
    return time.perf_counter() - start


def build_faiss(folder: Path, vectors: np.ndarray) -> float:
    """Write a flat FAISS index of the vectors, and give the seconds that it takes."""
    import faiss

    start = time.perf_counter()
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    faiss.write_index(index, str(folder / "vectors.faiss"))
    return time.perf_counter() - start


def build_kind(folder: Path, kind: str, num_videos: int) -> float:
    """Copy the table and index it in another way of LanceDB; gives the seconds of the second part."""
    import lancedb
    from lancedb.index import HnswSq, IvfSq

    rows = lancedb.connect(folder / "index").open_table("videos").to_arrow()
    table = lancedb.connect(folder / kind).create_table("videos", rows)
    start = time.perf_counter()
    partitions = max(round(num_videos**0.5), 2)
    config = IvfSq(distance_type="dot", num_partitions=partitions) if kind == "ivf_sq" else HnswSq(distance_type="dot")
    table.create_index(VECTOR_COLUMN, config=config)
    return time.perf_counter() - start


def load_index(folder: Path, options: dict[str, int], exact: bool = False) -> Search:
    """Open the index as `umt-hf search` does."""
    table = VideoIndex(folder / "index", **options).load()
    return lambda query: [row["path"] for row in table.find_nearest(query, TOP_K, exact)]


def load_scan(folder: Path) -> Search:
    """Let LanceDB compare the query with all vectors."""
    import lancedb

    table = lancedb.connect(folder / "index").open_table("videos")

    def search(query: np.ndarray) -> list[str]:
        found = table.search(query).distance_type("dot").bypass_vector_index().select(["path"]).limit(TOP_K)
        return found.to_arrow()["path"].to_pylist()

    return search


def load_kind(folder: Path, kind: str) -> Search:
    """Search by another index of LanceDB, with as many probes as umt_hf takes."""
    import lancedb

    from umt_hf.inference.video_index import MIN_PROBES, PROBED_SHARE

    table = lancedb.connect(folder / kind).open_table("videos")
    probes = max(round(table.count_rows() ** 0.5) // PROBED_SHARE, MIN_PROBES)

    def search(query: np.ndarray) -> list[str]:
        found = table.search(query).distance_type("dot").nprobes(probes).select(["path"]).limit(TOP_K)
        for name, value in KINDS[kind].items():
            found = getattr(found, name)(value)
        return found.to_arrow()["path"].to_pylist()

    return search


def load_faiss(folder: Path) -> Search:
    """Load the index of FAISS into memory."""
    import faiss

    index = faiss.read_index(str(folder / "vectors.faiss"))
    return lambda query: [name_video(row) for row in index.search(query[None], TOP_K)[1][0].tolist()]


def load_numpy(folder: Path) -> Search:
    """Load the vectors into an array."""
    vectors = np.load(folder / "vectors.npy")

    def search(query: np.ndarray) -> list[str]:
        scores = vectors @ query
        best = np.argpartition(scores, -TOP_K)[-TOP_K:]
        return [name_video(row) for row in best[np.argsort(-scores[best])]]

    return search


def check_answers(searches: dict[str, Search], queries: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Compare the answers of all ways with the largest inner products.

    Args:
        searches: By name.
        queries: `(queries, D)`.
        truth: Inner products `(videos, queries)`.

    Returns:
        Share of the ten best that each way finds; videos that tie with the tenth count.

    Raises:
        RuntimeError: If a way that compares all vectors finds less than all.
    """
    recall = {}
    for name, search in searches.items():
        shares = []
        for number, query in enumerate(queries):
            scores = truth[:, number]
            tenth = np.partition(scores, -min(TOP_K, len(scores)))[-min(TOP_K, len(scores))]
            found = {int(Path(path).stem) for path in search(query)}
            shares.append(sum(scores[row] >= tenth - 1e-5 for row in found) / min(TOP_K, len(scores)))
        recall[name] = float(np.mean(shares))
        if name in EXACT_WAYS and recall[name] < 1:
            raise RuntimeError(f"{name} finds {recall[name]:.3f} of the ten best: not the same search.")
    return recall


def time_search(load: Callable[[Path], Search], folder: Path, queries: np.ndarray) -> SearchTime:
    """Load and answer once, then answer all queries one by one."""
    start = time.perf_counter()
    search = load(folder)
    search(queries[0])
    loaded = time.perf_counter()
    for query in queries:
        search(query)
    return SearchTime(loaded - start, (time.perf_counter() - loaded) / len(queries))


def measure_memory(folder: Path, way: str, queries: np.ndarray, options: dict[str, int]) -> int | None:
    """Peak memory of a new process that loads and searches, beyond its imports; kinds are not measured."""
    if way not in (UMT, EXACT, SCAN, NUMPY, FAISS):
        return None
    job = {"folder": str(folder), "way": way, "query": queries[0].tolist(), "options": options}
    return run_in_new_process("benchmarks.search.memory", job, {"OMP_NUM_THREADS": "1"})


def measure_growth(folder: Path, vectors: np.ndarray, num_appended: int, options: dict[str, int]) -> dict[str, Any]:
    """Add videos one by one, and say how long each takes and how large the folder is beside its vectors."""
    index = VideoIndex(folder, **options)
    before = measure_disk(folder)
    seconds = []
    for number in range(num_appended):
        row = build_row(len(vectors) + number, vectors[number % len(vectors)])
        start = time.perf_counter()
        index.add([row])
        seconds.append(time.perf_counter() - start)
    index.finish([])
    tenth = max(num_appended // 10, 1)
    return {
        "disk_bytes": before,
        "disk_relative_to_vectors": before / vectors.nbytes,
        "disk_relative_after_appends": measure_disk(folder)
        / (vectors.nbytes + num_appended * vectors.itemsize * vectors.shape[1]),
        "first_append_seconds": summarize(seconds[:tenth]) if seconds else None,
        "last_append_seconds": summarize(seconds[-tenth:]) if seconds else None,
    }


def measure_disk(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


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


def format_milliseconds(summary: dict[str, Any] | None) -> str:
    """Write a summary of seconds in milliseconds."""
    return "-" if summary is None else format_spread({name: 1000 * summary[name] for name in ("median", "min", "max")})


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Write the rows as a Markdown table."""
    header = ["videos", "vectors", "way", "build, s", "first answer, ms", "search, ms", "x NumPy", "recall@10"]
    header += ["memory, MiB"]
    lines = [
        [
            str(row["num_videos"]),
            row["vectors"],
            row["way"],
            "-" if row["build_seconds"] is None else f"{row['build_seconds']:.2f}",
            format_milliseconds(row["first_seconds"]),
            format_milliseconds(row["search_seconds"]),
            format_spread(row["search_relative_to_numpy"], ".2f"),
            f"{row['recall']:.3f}",
            "-" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 2**20:.0f}",
        ]
        for row in rows
    ]
    return format_table(header, lines)


def format_appends(rows: Sequence[dict[str, Any]]) -> str:
    """Write how each index grows as a Markdown table."""
    header = ["videos", "vectors", "on disk, MiB", "x vectors", "x vectors after appends"]
    header += ["first appends, ms", "last appends, ms"]
    lines = [
        [
            str(row["num_videos"]),
            row["vectors"],
            f"{row['disk_bytes'] / 2**20:.1f}",
            f"{row['disk_relative_to_vectors']:.2f}",
            f"{row['disk_relative_after_appends']:.2f}",
            format_milliseconds(row["first_append_seconds"]),
            format_milliseconds(row["last_append_seconds"]),
        ]
        for row in rows
        if row["way"] == UMT
    ]
    return format_table(header, lines)


if __name__ == "__main__":
    main()
