"""`umt-hf search --rerank` end to end, in indexes that store vectors alone, tokens, or keys and values."""

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.decoding.videos import encode, iterate_pan
from benchmarks.stage2.workload import Pair
from umt_hf import (
    UMTVideoProcessor,
    UMTVideoTextForRetrieval,
    UMTVideoTextProcessor,
    VideoSearcher,
    embed_videos,
)
from umt_hf.processing.processing_umt_video_text import build_tokenizer

SEARCH = "search --rerank, vectors alone"
SEARCH_TOKENS, SEARCH_KEYS = "search --rerank, tokens stored, float16", "search --rerank, keys stored, float16"
STORES = {SEARCH: "none", SEARCH_TOKENS: "tokens", SEARCH_KEYS: "keys"}
CHECKED_VIDEOS = 4  # whose scores from an index in float32 must be those of encoding anew
WIDTH, HEIGHT = 340, 256
NUM_FRAMES = 60
SHIFT = 10  # frames by which each video begins later than the one before

Search = Callable[[str], dict[str, float]]


def save_model(model: UMTVideoTextForRetrieval, size: Pair, folder: Path) -> list[str]:
    """Write a model with its processor, and give its words, made up ones."""
    special = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [f"word{i}" for i in range(size.vocabulary - len(special))]
    processor = UMTVideoProcessor.from_model_config(model.config)
    UMTVideoTextProcessor(processor, build_tokenizer(special + words)).save_pretrained(folder)
    model.save_pretrained(folder)
    return words


def write_videos(folder: Path, count: int) -> list[str]:
    """Render videos, no two alike."""
    folder.mkdir()
    paths = [folder / f"video_{number:03d}.mp4" for number in range(count)]
    for number, path in enumerate(paths):
        first = number * SHIFT
        encode(path, itertools.islice(iterate_pan(first + NUM_FRAMES, HEIGHT, WIDTH), first, None))
    return [str(path) for path in paths]


def rerank(searcher: VideoSearcher, query: str) -> dict[str, float]:
    """Scores of the matching head by path, best first.

    Raises:
        RuntimeError: If a video has none.
    """
    hits = searcher.search(query, top_k=searcher.table.num_rows, rerank=True)
    scores = {hit.path: hit.matching_score for hit in hits if hit.matching_score is not None}
    if len(scores) != searcher.table.num_rows:
        raise RuntimeError(f"{len(scores)} of {searcher.table.num_rows} videos were re-ranked.")
    return scores


def build_searches(
    videos: list[str], model: Path, folder: Path, device: str, dtype: str = "float16"
) -> dict[str, Search]:
    """By way, a function that re-ranks all videos for a query; the model is loaded and the index opened already."""
    searches: dict[str, Search] = {}
    shared: VideoSearcher | None = None
    for way, store in STORES.items():
        index = folder / store
        precision = None if store == "none" else dtype
        embed_videos(videos, model, index, num_workers=0, store=store, store_dtype=precision, dtype="float32")
        searcher = VideoSearcher(index, device=device)
        shared = shared or searcher
        searcher.encoder = shared.encoder  # one model in memory
        searches[way] = partial(rerank, searcher)
    return searches


def check_searches(searches: dict[str, Search], queries: list[str], tolerance: float | None) -> dict[str, dict]:
    """Compare scores and order with those of videos encoded anew.

    Returns:
        By way the largest difference of a score, and whether each query has the same order.

    Raises:
        RuntimeError: If a difference is not below the tolerance.
    """
    expected = [searches[SEARCH](query) for query in queries]
    found = {}
    for way, search in searches.items():
        scores = expected if way == SEARCH else [search(query) for query in queries]
        pairs = list(zip(scores, expected, strict=True))
        difference = max(abs(own[path] - right[path]) for own, right in pairs for path in right)
        if tolerance is not None and not difference < tolerance:
            raise RuntimeError(f"{way}: scores differ by {difference}, so it is not the same work.")
        same_order = all(list(own) == list(right) for own, right in pairs)
        found[way] = {"largest_difference": difference, "same_order": same_order}
    return found
