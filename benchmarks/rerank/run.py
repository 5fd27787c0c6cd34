"""Time re-ranking: the matching head on candidates that are encoded anew, and on what was kept of them.

Both in memory and by `umt-hf search --rerank` in an index, from the query to the sorted videos.

python -m benchmarks.rerank.run
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser

from benchmarks.common import (
    ReportArguments,
    describe_machine,
    format_spread,
    format_table,
    run_interleaved,
    summarize,
    synchronize,
    write_results,
)
from benchmarks.rerank.through_index import (
    CHECKED_VIDEOS,
    SEARCH,
    STORES,
    Search,
    build_searches,
    check_searches,
    save_model,
    write_videos,
)
from benchmarks.stage2.workload import SIZES_OF_PAIRS, build_config, sample_pairs
from umt_hf import UMTVideoTextForRetrieval
from umt_hf.inference.video_index import VideoIndex

QUESTION = "What does re-ranking cost, from videos, from their tokens, from their keys and values?"
VIDEOS, TOKENS, HALF_TOKENS = "encode and match", "tokens kept, float32", "tokens kept, float16"
KEYS, HALF_KEYS = "keys and values kept, float32", "keys and values kept, float16"
TOLERANCE = 1e-5
TF32_TOLERANCE = 0.05  # through an index on a GPU, where `umt-hf embed` computes float32 products in TF32
STRETCH_SECONDS = 0.5
WORDS = 12  # of a query


@dataclass(kw_only=True)
class Arguments(ReportArguments):
    """What to time, and on what."""

    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    sizes: list[str] = field(default_factory=lambda: ["b16"], metadata={"help": f"Of {list(SIZES_OF_PAIRS)}."})
    num_videos: int = field(default=32, metadata={"help": "Candidates of a query."})
    num_queries: int = field(default=4, metadata={"help": "Queries whose order is compared."})
    batch_size: int = field(default=8, metadata={"help": "Videos encoded at a time, as `umt-hf search` does."})
    repeats: int = field(default=3, metadata={"help": "Rounds; each times every way once."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; by default PyTorch's choice."})

    def __post_init__(self) -> None:
        if unknown := set(self.sizes) - SIZES_OF_PAIRS.keys():
            raise ValueError(f"sizes must be among {list(SIZES_OF_PAIRS)}, got {sorted(unknown)}.")


@dataclass
class Candidates:
    """The videos of a query, and what may be kept of them.

    Args:
        pixels: `(videos, T, 3, side, side)`.
        kept: By way, tokens or keys and values.
    """

    pixels: torch.Tensor
    kept: dict[str, torch.Tensor]


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark and give the path of its JSON file."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    device, rows = torch.device(args.device), []
    for name in args.sizes:
        print(f"Re-ranking {args.num_videos} videos with {name} on {device} ...", flush=True)
        rows += [row | {"size": name} for row in measure_size(name, args, device)]
    settings = {name: value for name, value in asdict(args).items() if name not in ("output_dir", "name")}
    report = {"question": QUESTION, "machine": describe_machine(device), "settings": settings, "rows": rows}
    table = format_rows(rows)
    print(table)
    return write_results("rerank", report, table, args.output_dir, args.name)


@torch.inference_mode()
def measure_size(name: str, args: Arguments, device: torch.device) -> list[dict[str, Any]]:
    """A row for each way to re-rank with a model of a size at random weights."""
    torch.manual_seed(0)
    size = SIZES_OF_PAIRS[name]
    model = UMTVideoTextForRetrieval(build_config(size)).eval().to(device)
    pixels = sample_pairs(size, args.num_videos, device)["pixel_values"]
    words = torch.randint(110, size.vocabulary, (args.num_queries, WORDS), device=device)
    words[:, 0] = 101
    texts = model.get_text_features(words).last_hidden_state
    candidates = Candidates(pixels, keep(model, pixels, args.batch_size))
    ways = build_ways(model, candidates, args.batch_size)
    agreement = check_agreement(ways, texts)
    sizes = {way: states[0].nbytes for way, states in candidates.kept.items()}
    cases = {}
    for way, match in ways.items():
        seconds = time_calls(match, texts[:1], 1)
        cases[way] = partial(time_calls, match, texts[:1], max(1, round(STRETCH_SECONDS / seconds)))
    with tempfile.TemporaryDirectory() as folder:
        searches, queries = prepare_searches(model, name, args, Path(folder))
        agreement |= check_searches(searches, queries, None)
        for way, search in searches.items():
            seconds = time_search(search, queries[0], 1, device)
            count = max(1, round(STRETCH_SECONDS / seconds))
            cases[way] = partial(time_search, search, queries[0], count, device)
            sizes[way] = VideoIndex(Path(folder) / "indexes" / STORES[way]).measure_stored()[1] // args.num_videos
        found = run_interleaved(cases, args.repeats)
    baselines = {way: SEARCH if way in STORES else VIDEOS for way in cases}
    return [
        {
            "way": way,
            "num_videos": args.num_videos,
            "bytes_per_video": sizes.get(way, 0),
            "seconds": summarize(found[way]),
            "speed": summarize(first / own for first, own in zip(found[baselines[way]], found[way], strict=True)),
            "agreement": agreement[way],
        }
        for way in cases
    ]


def prepare_searches(
    model: UMTVideoTextForRetrieval, name: str, args: Arguments, folder: Path
) -> tuple[dict[str, Search], list[str]]:
    """Write model, videos and indexes, make sure that they agree, and give searches by way, and queries."""
    words = save_model(model, SIZES_OF_PAIRS[name], folder / "model")
    videos = write_videos(folder / "videos", args.num_videos)
    starts = range(0, args.num_queries * WORDS, WORDS)
    queries = [" ".join(words[(start + i) % len(words)] for i in range(WORDS - 1)) for start in starts]
    few = build_searches(videos[:CHECKED_VIDEOS], folder / "model", folder / "checked", args.device, "float32")
    check_searches(few, queries, TOLERANCE if args.device == "cpu" else TF32_TOLERANCE)
    searches = build_searches(videos, folder / "model", folder / "indexes", args.device)
    return searches, queries[:1]


def keep(model: UMTVideoTextForRetrieval, pixels: torch.Tensor, batch_size: int) -> dict[str, torch.Tensor]:
    """What an index could keep of videos, by way."""
    tokens = torch.cat([model.get_video_features(part).last_hidden_state for part in pixels.split(batch_size)])
    keys = torch.cat([model.get_video_key_values(part) for part in tokens.split(batch_size)])
    return {TOKENS: tokens, HALF_TOKENS: tokens.half(), KEYS: keys, HALF_KEYS: keys.half()}


def build_ways(
    model: UMTVideoTextForRetrieval, candidates: Candidates, batch_size: int
) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """By way, a function that gives all candidates' logits `(videos,)` for the states of a text `(1, L, H)`."""

    def match_videos(text: torch.Tensor) -> torch.Tensor:
        parts = candidates.pixels.split(batch_size)
        return torch.cat([model.match(model.get_video_features(part).last_hidden_state, text)[:, 1] for part in parts])

    def match_tokens(text: torch.Tensor, way: str) -> torch.Tensor:
        return torch.cat([model.match(part, text)[:, 1] for part in candidates.kept[way].split(batch_size)])

    def match_keys(text: torch.Tensor, way: str) -> torch.Tensor:
        parts = candidates.kept[way].split(batch_size)
        return torch.cat([model.match(None, text, video_key_values=part)[:, 1] for part in parts])

    ways = {VIDEOS: match_videos}
    ways |= {way: partial(match_tokens, way=way) for way in (TOKENS, HALF_TOKENS)}
    return ways | {way: partial(match_keys, way=way) for way in (KEYS, HALF_KEYS)}


def check_agreement(
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]], texts: torch.Tensor
) -> dict[str, dict[str, Any]]:
    """Compare logits and order with those of videos encoded anew.

    Returns:
        By way the largest difference of a logit, and whether each query has the same order.

    Raises:
        RuntimeError: If what was kept in full precision gives other logits.
    """
    expected = torch.stack([ways[VIDEOS](text[None]) for text in texts])
    found = {}
    for way, match in ways.items():
        logits = torch.stack([match(text[None]) for text in texts])
        difference = float((logits - expected).abs().max())
        if way in (TOKENS, KEYS) and not difference < TOLERANCE:
            raise RuntimeError(f"{way}: logits differ by {difference}, so it is not the same work.")
        found[way] = {
            "largest_difference": difference,
            "same_order": torch.equal(logits.argsort(dim=1), expected.argsort(dim=1)),
        }
    return found


@torch.inference_mode()
def time_calls(match: Callable[[torch.Tensor], torch.Tensor], text: torch.Tensor, count: int) -> float:
    """Seconds to judge all candidates, the mean over some times."""
    synchronize(text.device)
    start = time.perf_counter()
    for _ in range(count):
        match(text)
    synchronize(text.device)
    return (time.perf_counter() - start) / count


def time_search(search: Search, query: str, count: int, device: torch.device) -> float:
    """Seconds of a search with its re-ranking, the mean over some times."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        search(query)
    synchronize(device)
    return (time.perf_counter() - start) / count


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Write the rows as a Markdown table."""
    header = ["size", "videos", "way", "kept per video, MB", "s a query", "times as fast"]
    header += ["largest difference of a logit", "same order"]
    lines = [
        [
            row["size"],
            str(row["num_videos"]),
            row["way"],
            f"{row['bytes_per_video'] / 1e6:.3g}" if row["bytes_per_video"] else "-",
            format_spread(row["seconds"]),
            format_spread(row["speed"], ".3g"),
            f"{row['agreement']['largest_difference']:.1e}",
            "yes" if row["agreement"]["same_order"] else "no",
        ]
        for row in rows
    ]
    return format_table(header, lines)


if __name__ == "__main__":
    main()
