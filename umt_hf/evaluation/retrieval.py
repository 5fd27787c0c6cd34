r"""Measure text-to-video and video-to-text retrieval, zero-shot or after fine-tuning.

    umt-hf evaluate retrieval --model_name_or_path umt-vit-b16-25m \
        --data msrvtt_ret_test1k.json --data_root videos \
        --output_dir outputs/msrvtt

Source: Li et al., "Unmasked Teacher", ICCV 2023, section 4.
"""

import dataclasses
import logging
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator

from ..data.annotations import RetrievalSet, load_retrieval_set, name_video
from ..inference.engine import in_model
from ..inference.held_out import (
    build_bar,
    evaluation_mode,
    load_video_batches,
    plan_shard,
    require_finite,
    share_rows,
)
from ..modeling.losses_umt import normalize_features
from ..modeling.modeling_umt_video_text import UMTVideoTextForRetrieval, UMTVideoTextModel
from ..processing.processing_umt_video_text import UMTVideoTextProcessor
from ..runs.arguments import (
    CaptionArguments,
    EvaluatedModelArguments,
    EvaluationDataArguments,
    ReportArguments,
    RerankingArguments,
)
from ..runs.config import describe, script, set_defaults
from .found import count_texts
from .metrics.ranks import RECALL_AT, RetrievalRecall, compute_ranks, mark_right_items
from .report import describe_run, write_report
from .setup import load_model_and_processor, measured_run, require_names, say_tested

BLOCK_SCORES = 2**24  # similarities computed at a time

logger = logging.getLogger(__name__)


@dataclass
class RetrievalFeatures:
    """What searching and matching need of a set.

    Args:
        video_embeds: Mean of each video's projected unit vectors, `(videos, D)`, float32, on the host.
        text_embeds: Projected unit vectors, `(texts, D)`, float32, on the host.
        batches: Indices of the videos that this process encoded, batch by batch.
        video_tokens: Tokens of this process's videos in that order, `(own videos, V, width)`; `None` if not kept.
        text_tokens: States of all texts, `(texts, L, H)`, on the host; `None` if not kept.
        attention_mask: 1 at the texts' tokens and 0 at padding, `(texts, L)`.
    """

    video_embeds: torch.Tensor
    text_embeds: torch.Tensor
    batches: list[range]
    video_tokens: torch.Tensor | None
    text_tokens: torch.Tensor | None
    attention_mask: torch.Tensor


def evaluate_retrieval(
    model: UMTVideoTextModel,
    processor: UMTVideoTextProcessor,
    retrieval_set: RetrievalSet,
    accelerator: Accelerator,
    *,
    batch_size: int = 32,
    top_k: int = 128,
    rerank: bool = True,
    dual_softmax: bool = False,
    num_workers: int | None = None,
    cache_dir: str | Path | None = None,
    show_progress: bool = False,
) -> dict[str, float]:
    """Measure how well videos and texts find each other; called in all processes, each gets the same numbers.

    Args:
        model: With a matching head ([`UMTVideoTextForRetrieval`] or a subclass) if `rerank`. It runs as in `eval()`.
        processor: Gives number of frames, size, decoder, `first_seconds` and text length.
        retrieval_set: Videos, texts, and which belong together.
        accelerator: Of the run; gives the precision.
        batch_size: Videos, texts or pairs that a process takes at a time.
        top_k: Items of each query that the matching head judges; the remaining ones are ranked after these.
        rerank: Whether the matching head judges.
        dual_softmax: Whether to report as well what dual softmax gives.
        num_workers: Processes that decode, for each process; default: its share of the cores, from 1 to 4.
        cache_dir: Folder for the videos' tokens; default: the system's for temporary files.
        show_progress: Whether the main process draws a bar of its share.

    Returns:
        `<scores>_<direction>_<figure>` with scores "dual", "reranked" or "dual_softmax", direction "text_to_video" or
        "video_to_text" and figure "r1", "r5", "r10", "mean_recall" (shares in [0, 1]) or "median_rank"; and
        `<scores>_mean_recall` over both directions.

    Raises:
        VideoDecodingError: If a video cannot be read; it names the file.
        ValueError: If a score is NaN or infinite, `top_k` is below 1, or `rerank` is asked of a model without
            matching head.

    Source: Li et al., "Unmasked Teacher", ICCV 2023, section 4; Li et al., "Align before Fuse", 2021, section 5.
    """
    _check_request(model, top_k, rerank)
    features = encode_retrieval_set(
        model,
        processor,
        retrieval_set,
        accelerator,
        batch_size=batch_size,
        num_workers=num_workers,
        keep_tokens=rerank,
        cache_dir=cache_dir,
        show_progress=show_progress,
    )
    texts, videos = features.text_embeds, features.video_embeds
    by_text, by_video = retrieval_set.videos_of_text, retrieval_set.texts_of_video
    text_ranks, text_candidates = rank_by_similarity(texts, videos, by_text, accelerator, top_k)
    video_ranks, video_candidates = rank_by_similarity(videos, texts, by_video, accelerator, top_k)
    metrics = _summarize("dual", text_ranks, video_ranks)
    if dual_softmax:
        # It sees all queries of the test at once, as no search engine can: its figures bear its name and are not
        # comparable with others.
        metrics |= _summarize("dual_softmax", *_rank_by_dual_softmax(model, features, retrieval_set, accelerator))
    if rerank:
        matching = cast("UMTVideoTextForRetrieval", model)
        text_logits, video_logits = match_candidates(
            matching,
            features,
            text_candidates,
            video_candidates,
            accelerator,
            batch_size=batch_size,
            show_progress=show_progress,
        )
        text_ranks = rerank_candidates(text_ranks, text_candidates, text_logits, by_text)
        video_ranks = rerank_candidates(video_ranks, video_candidates, video_logits, by_video)
        metrics |= _summarize("reranked", text_ranks, video_ranks)
    return metrics


def _check_request(model: UMTVideoTextModel, top_k: int, rerank: bool) -> None:
    """Refuse what cannot be measured, before anything is encoded."""
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}.")
    if rerank and not hasattr(model, "match"):  # no `isinstance`: PEFT wraps models
        raise ValueError(
            f"{type(model).__name__} has no matching head: set rerank=False, or load a model for retrieval."
        )


def encode_retrieval_set(
    model: UMTVideoTextModel,
    processor: UMTVideoTextProcessor,
    retrieval_set: RetrievalSet,
    accelerator: Accelerator,
    *,
    batch_size: int = 32,
    num_workers: int | None = None,
    keep_tokens: bool = True,
    cache_dir: str | Path | None = None,
    show_progress: bool = False,
) -> RetrievalFeatures:
    """Encode every video and every text once, each in one of the processes.

    Args:
        model: Any with both towers.
        processor: See `evaluate_retrieval`.
        retrieval_set: What to encode.
        accelerator: Of the run.
        batch_size: Videos or texts that a process takes at a time.
        num_workers: Processes that decode, for each process; default: its share of the cores, from 1 to 4.
        keep_tokens: Whether to keep what the matching head needs, in the precision it computes with.
        cache_dir: Folder for the videos' tokens; default: the system's for temporary files. The file vanishes with
            the features.
        show_progress: Whether the main process draws bars of its share.

    Raises:
        VideoDecodingError: If a video cannot be read; it names the file.
        ValueError: If a vector is NaN or infinite.
        OSError: If the folder has too little room.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, model.dtype)
    texts, videos = retrieval_set.texts, retrieval_set.videos
    width = model.config.projection_dim
    encoded = processor(text=texts, padding=True, return_tensors="pt")
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    text: Any = model.config.text_config
    text_embeds = torch.zeros(len(texts), width)
    text_tokens = torch.zeros(*ids.shape, text.hidden_size, dtype=dtype) if keep_tokens else None
    video_embeds, video_tokens = torch.zeros(len(videos), width), None
    batches = plan_shard(len(videos), batch_size, accelerator)
    text_batches = plan_shard(len(texts), batch_size, accelerator)

    with evaluation_mode(model, accelerator):
        with build_bar(sum(map(len, text_batches)), "text", accelerator, show_progress) as progress:
            for batch in text_batches:
                rows = slice(batch.start, batch.stop)
                with in_model():
                    states = model.get_text_features(
                        ids[rows].to(accelerator.device), mask[rows].to(accelerator.device)
                    )
                    text_embeds[rows] = normalize_features(states.pooler_output).cpu()
                if text_tokens is not None:
                    text_tokens[rows] = states.last_hidden_state.to(dtype).cpu()
                progress.update(len(batch))
        num_read = 0
        for batch, pixels in load_video_batches(
            videos, batches, processor.video_processor, accelerator, num_workers, show_progress
        ):
            states = model.get_video_features(pixels)
            video_embeds[batch.start : batch.stop] = states.pooler_output.cpu()
            if keep_tokens:
                tokens = states.last_hidden_state.to(dtype)
                if video_tokens is None:
                    video_tokens = map_tensor((sum(map(len, batches)), *tokens.shape[1:]), dtype, cache_dir)
                video_tokens[num_read : num_read + len(batch)] = tokens.cpu()
            num_read += len(batch)
    for shared in (text_embeds, video_embeds, text_tokens):
        if shared is not None:
            share_rows(shared, accelerator)
    require_finite(model, video_embeds, "videos", lambda row: name_video(videos[row], row))
    require_finite(model, text_embeds, "texts", lambda row: repr(texts[row]))
    return RetrievalFeatures(video_embeds, text_embeds, batches, video_tokens, text_tokens, mask)


def map_tensor(shape: tuple[int, ...], dtype: torch.dtype, folder: str | Path | None = None) -> torch.Tensor:
    """A tensor in a file without a name, which the system reads and writes as needed and removes with the tensor.

    Raises:
        OSError: If the folder has too little room.
    """
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    folder = Path(folder or tempfile.gettempdir())
    if num_bytes > shutil.disk_usage(folder).free:
        raise OSError(
            f"{folder} has no room for the videos' tokens, {num_bytes / 1e9:.1f} GB: set cache_dir to another folder, "
            "or rerank=False."
        )
    with tempfile.TemporaryFile(dir=folder) as file:
        array = np.memmap(file, dtype=np.uint8, mode="w+", shape=(num_bytes,))
    return torch.from_numpy(array).view(dtype).view(shape)


def rank_by_similarity(
    queries: torch.Tensor,
    items: torch.Tensor,
    right_items: list[list[int]],
    accelerator: Accelerator,
    top_k: int = 1,
    temperature: float | None = None,
    log_normalizers: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank items for each query by the product of their vectors, block by block.

    Args:
        queries: `(queries, D)`.
        items: `(items, D)`.
        right_items: For each query, the indices of its right items.
        accelerator: Of the run; each process ranks its own blocks.
        top_k: Candidates wanted for each query, or as many as there are items.
        temperature: For dual softmax.
        log_normalizers: For dual softmax: of each item, the logarithm of the sum over all queries of
            `exp(product / temperature)`.

    Returns:
        Rank of each query's best right item, counted from 1, `(queries,)`, and indices of its best items, rising,
        `(queries, k)`. Of items that tie for the last places the first ones are taken.

    Raises:
        ValueError: If a score is NaN or infinite, or a query has no right item.
    """
    k = min(top_k, len(items))
    ranks = torch.zeros(len(queries), dtype=torch.long)
    candidates = torch.zeros(len(queries), k, dtype=torch.long)
    for rows, scores in _multiply_in_blocks(queries, items, accelerator):
        if temperature is not None and log_normalizers is not None:
            scores = 2 * scores / temperature - log_normalizers.to(scores.device)
        is_right = mark_right_items(right_items[rows], len(items)).to(scores.device)
        ranks[rows] = compute_ranks(scores, is_right).cpu()
        candidates[rows] = select_candidates(scores, k).cpu()
    return share_rows(ranks, accelerator), share_rows(candidates, accelerator)


def select_candidates(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the k best items of each row, rising; of those that tie for the last places, the first ones."""
    last = scores.topk(k, dim=1).values[:, -1:]
    above, tied = scores > last, scores == last
    room = k - above.sum(dim=1, keepdim=True)
    chosen = above | (tied & (tied.cumsum(dim=1) <= room))
    return chosen.nonzero()[:, 1].view(-1, k)


def match_candidates(
    model: UMTVideoTextForRetrieval,
    features: RetrievalFeatures,
    text_candidates: torch.Tensor,
    video_candidates: torch.Tensor,
    accelerator: Accelerator,
    *,
    batch_size: int = 32,
    show_progress: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Judge candidates by the matching head; a pair that is one in both directions is judged once.

    Args:
        model: With a matching head.
        features: Of the set, with tokens.
        text_candidates: Indices of videos for each text, `(texts, k)`.
        video_candidates: Indices of texts for each video, `(videos, k)`.
        accelerator: Of the run; each process judges the pairs of the videos that it encoded.
        batch_size: Pairs at a time.
        show_progress: Whether the main process draws a bar of its videos.

    Returns:
        Raw logits of class "match", in the candidates' shapes, float32.

    Raises:
        ValueError: If a logit is NaN or infinite.
    """
    if features.text_tokens is None:
        raise ValueError("The matching head needs the tokens of videos and texts: encode them with keep_tokens=True.")
    # None in a process that encoded no video, which has no batches either.
    video_tokens = cast("torch.Tensor", features.video_tokens)
    num_texts = len(features.text_embeds)
    text_keys = text_candidates * num_texts + torch.arange(num_texts)[:, None]
    video_keys = torch.arange(len(features.video_embeds))[:, None] * num_texts + video_candidates
    keys = torch.cat([text_keys.flatten(), video_keys.flatten()]).unique()  # sorted: by video, then by text
    logits = torch.zeros(len(keys))
    device, num_seen = accelerator.device, 0
    total = sum(map(len, features.batches))
    with (
        evaluation_mode(model, accelerator),
        build_bar(total, "matched video", accelerator, show_progress) as progress,
    ):
        for batch in features.batches:
            tokens = video_tokens[num_seen : num_seen + len(batch)].to(device)
            num_seen += len(batch)
            first, last = torch.searchsorted(keys, torch.tensor([batch.start, batch.stop]) * num_texts).tolist()
            videos = keys[first:last] // num_texts
            for group in group_pairs(videos, batch_size):
                # Once for all pairs of a video, which are next to each other.
                own, places = videos[group].unique(return_inverse=True)
                with in_model():
                    key_values = model.get_video_key_values(tokens[(own - batch.start).to(device)])
                for start in range(0, len(places), batch_size):
                    part = places[start : start + batch_size]
                    rows = slice(first + group.start + start, first + group.start + start + len(part))
                    texts = keys[rows] % num_texts
                    with in_model():
                        pair_logits = model.match(
                            text_tokens=features.text_tokens[texts].to(device),
                            attention_mask=features.attention_mask[texts].to(device),
                            video_key_values=key_values,
                            encoder_rows=None if len(own) == 1 else part.to(device),
                        )
                    logits[rows] = pair_logits[:, 1].float().cpu()
            progress.update(len(batch))
    share_rows(logits, accelerator)
    require_finite(
        model,
        logits,
        "pairs",
        lambda row: f"that of video {keys[row] // num_texts} and text {keys[row] % num_texts}, counted from 0,",
    )
    return logits[torch.searchsorted(keys, text_keys)], logits[torch.searchsorted(keys, video_keys)]


def group_pairs(videos: torch.Tensor, batch_size: int) -> Iterator[slice]:
    """Cut pairs into runs of at least a batch that no video is divided between, but for the last run.

    Args:
        videos: Of each pair its video, rising, `(pairs,)`.
        batch_size: Pairs at a time.
    """
    start = 0
    while start < len(videos):
        last = videos[min(start + batch_size, len(videos)) - 1]
        end = int(torch.searchsorted(videos, last, right=True))
        yield slice(start, end)
        start = end


def rerank_candidates(
    ranks: torch.Tensor, candidates: torch.Tensor, logits: torch.Tensor, right_items: list[list[int]]
) -> torch.Tensor:
    """Ranks once the candidates are ordered by new scores, and all else stays behind them in its old order.

    A right item that is not a candidate therefore keeps its rank.

    Args:
        ranks: Of each query's best right item among all items, `(queries,)`.
        candidates: Indices of the best items, `(queries, k)`.
        logits: Their new scores.
        right_items: For each query, the indices of its right items.

    Returns:
        Integers `(queries,)`.
    """
    # The published code leaves the order of the other items to the sorting algorithm. None of its figures depends on
    # that for a top_k of 10 or more, since it reports no median.
    num_items = max(int(candidates.max()), max(map(max, right_items))) + 1
    query = torch.arange(len(ranks))
    right_keys = [row * num_items + item for row, items in enumerate(right_items) for item in items]
    is_right = torch.isin(candidates + query[:, None] * num_items, torch.tensor(right_keys))
    is_found = is_right.any(dim=1)
    ranks = ranks.clone()
    ranks[is_found] = compute_ranks(logits[is_found], is_right[is_found])
    return ranks


def _rank_by_dual_softmax(
    model: UMTVideoTextModel, features: RetrievalFeatures, retrieval_set: RetrievalSet, accelerator: Accelerator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranks by softmax over items times softmax over queries (Cheng et al., 2021), for texts and for videos.

    In logarithms; the softmax over items is divided by a number that is the same for all items of a query.
    """
    temperature = model.temperature.float().item()
    texts, videos = features.text_embeds, features.video_embeds
    over_texts = _compute_log_normalizers(videos, texts, temperature, accelerator)
    over_videos = _compute_log_normalizers(texts, videos, temperature, accelerator)
    return (
        rank_by_similarity(texts, videos, retrieval_set.videos_of_text, accelerator, 1, temperature, over_texts)[0],
        rank_by_similarity(videos, texts, retrieval_set.texts_of_video, accelerator, 1, temperature, over_videos)[0],
    )


def _compute_log_normalizers(
    items: torch.Tensor, queries: torch.Tensor, temperature: float, accelerator: Accelerator
) -> torch.Tensor:
    sums = torch.zeros(len(items))
    for rows, products in _multiply_in_blocks(items, queries, accelerator):
        sums[rows] = (products / temperature).logsumexp(dim=1).cpu()
    return share_rows(sums, accelerator)


def _multiply_in_blocks(
    rows: torch.Tensor, columns: torch.Tensor, accelerator: Accelerator
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Products of all rows `(n, D)` with all columns `(m, D)`, `(rows of a block, m)`; this process's blocks."""
    # Summed in float64: in float32 the last bit of a sum depends on the column's place, so that equal columns would
    # not tie.
    device = torch.device("cpu") if accelerator.device.type == "mps" else accelerator.device  # no float64 there
    columns = columns.to(device).double().T
    for block in plan_shard(len(rows), max(1, BLOCK_SCORES // columns.shape[1]), accelerator):
        place = slice(block.start, block.stop)
        yield place, (rows[place].to(device).double() @ columns).float()


def list_figure_names(rerank: bool) -> list[str]:
    """Names of the figures that `evaluate_retrieval` gives without dual softmax."""
    figures = [*(f"r{k}" for k in RECALL_AT), "mean_recall", "median_rank"]
    own = [*(f"{way}_{figure}" for way in ("text_to_video", "video_to_text") for figure in figures), "mean_recall"]
    return [f"{scores}_{name}" for scores in ("dual", *["reranked"] * rerank) for name in own]


def _summarize(scores: str, text_ranks: torch.Tensor, video_ranks: torch.Tensor) -> dict[str, float]:
    metrics: dict[str, float] = {}
    directions = {"text_to_video": text_ranks, "video_to_text": video_ranks}
    for direction, ranks in directions.items():
        figures = RetrievalRecall(keep_in_memory=True).compute(predictions=ranks.tolist()) or {}
        metrics |= {f"{scores}_{direction}_{name}": value for name, value in figures.items()}
    recalls = [metrics[f"{scores}_{direction}_mean_recall"] for direction in directions]
    return metrics | {f"{scores}_mean_recall": sum(recalls) / len(recalls)}


@dataclass(kw_only=True)
@set_defaults(captions="each")
class RetrievalReportArguments(ReportArguments, CaptionArguments, RerankingArguments):
    """What is asked of the set, and the report."""

    rerank: bool = describe(True, "Let the matching head rank the best candidates again.")
    dual_softmax: bool = describe(
        False, "Report dual softmax too, which needs all queries at once; comparable with nothing else."
    )
    cache_dir: str | None = describe(
        None, "Folder for the videos' tokens; default: the system's folder for temporary files."
    )


SECTIONS = {"model": EvaluatedModelArguments, "data": EvaluationDataArguments, "evaluation": RetrievalReportArguments}


def warn_of_equal_texts(retrieval_set: RetrievalSet) -> None:
    """Say that some texts are the same, of which only one counts as right for a video."""
    num_distinct = len(set(retrieval_set.texts))
    if num_distinct < len(retrieval_set.texts):
        logger.warning(
            "%d texts are %d different ones, and each counts as right for its own video alone; with "
            "--multiple_videos_per_text true equal texts are one text with several videos.",
            len(retrieval_set.texts),
            num_distinct,
        )


@script(SECTIONS)
def main(
    model_args: EvaluatedModelArguments, data: EvaluationDataArguments, args: RetrievalReportArguments
) -> dict[str, float]:
    """Load, measure, report.

    Returns:
        Metrics; see `evaluate_retrieval`.
    """
    accelerator = Accelerator(mixed_precision=model_args.mixed_precision)
    rerank = args.rerank and args.rerank_top_k > 0
    model_class = UMTVideoTextForRetrieval if rerank else UMTVideoTextModel
    _, source = require_names(model_args, data)
    retrieval_set = load_retrieval_set(source, args.captions, args.multiple_videos_per_text, **data.source_options())
    model, processor = load_model_and_processor(model_class, model_args, data)
    say_tested(model_args, data, count_texts(len(retrieval_set.videos), len(retrieval_set.texts)))
    warn_of_equal_texts(retrieval_set)
    with measured_run(accelerator, data):
        metrics = evaluate_retrieval(
            model.to(accelerator.device),
            processor,
            retrieval_set,
            accelerator,
            batch_size=args.per_device_eval_batch_size,
            top_k=args.rerank_top_k or 1,
            rerank=rerank,
            dual_softmax=args.dual_softmax,
            num_workers=data.dataloader_num_workers,
            cache_dir=args.cache_dir,
            show_progress=not args.disable_tqdm,
        )
    report = {
        "task": "retrieval",
        "metrics": metrics,
        "num_videos": len(retrieval_set.videos),
        "num_texts": len(retrieval_set.texts),
        **describe_run(model, processor, accelerator, model_args, data),
        **dataclasses.asdict(args),
    }
    write_report(accelerator, args.report_folder, report)
    return metrics


if __name__ == "__main__":
    main()
