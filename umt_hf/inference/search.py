"""Search videos by text: a UMT dual encoder fills an index folder and answers queries from it.

    umt-hf embed videos/ --model outputs/retrieval --out index
    umt-hf search index "a red circle moving left" --rerank

With `--window 4 --stride 2` the index has a row per moment of 4 seconds, and a search says when in a video. With
`--store tokens`, or keys, it has what re-ranking needs, which otherwise reads and encodes videos again.

Legend: B videos, T frames, D projection width.

Source: Li et al., "Unmasked Teacher", ICCV 2023, section 3.2: contrast finds, the matching head re-ranks.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm
from transformers.video_utils import VideoInput, VideoMetadata

from ..data.lists.folders import format_name
from ..data.video_files import SkippedVideo, VideoFile, describe_file, list_videos
from ..modeling.losses_umt import normalize_features
from ..modeling.modeling_umt_video_text import UMTVideoTextForRetrieval
from ..processing.decoding import VideoDecodingError, VideoSource
from ..processing.processing_umt_video_text import UMTVideoTextProcessor
from ..runs.arguments import KeptTokenArguments
from ..runs.model_names import find_released
from ..runs.models import DUAL_ENCODERS
from .arguments import require_count, require_string
from .engine import (
    TIMEOUT_SECONDS,
    DType,
    choose_dtype,
    compile_model,
    in_model,
    inference_run,
    name_dtype,
    read_ahead,
    without_gradients,
)
from .loading import (
    PIXEL_SETTINGS,
    compute_fingerprint,
    keep_tokens,
    load_video_text_processor,
    load_with_report,
    place_model,
    require_weights,
    resolve_device,
)
from .moments import (
    MomentClips,
    MomentCollector,
    MomentRows,
    WindowSettings,
    choose_apart,
    read_files_moments,
    read_moments,
    resolve_moments,
)
from .reranking import (
    TOO_LARGE,
    StoredDType,
    StoredKind,
    StoreSettings,
    build_stored_row,
    explain_encoding,
    format_bytes,
    match_stored,
    read_store,
    resolve_store,
)
from .starts import require_start
from .video_index import (
    ROWS_PER_COMMIT,
    STATES_COLUMN,
    VECTOR_COLUMN,
    RowWriter,
    SearchFilter,
    VideoIndex,
    require_lancedb,
)

RERANKED_VIDEOS = 32
RERANK_BATCH_SIZE = 8
MATCHING_HEAD = ("matching_head.",)
MOMENTS_PER_VIDEO = 5
ENOUGH_ROWS = 5_000  # to find a video's moments among, once all videos are there
CHANGED_SINCE = "changed since it was embedded"
NOT_FINITE = "Its vector is not finite; the model cannot encode it."


@dataclass(frozen=True)
class EmbedReport:
    """What a run of `embed_videos` did.

    Attributes:
        num_encoded: Videos that were new or had changed.
        num_unchanged: Videos that were in the index already.
        num_in_index: Videos in it now.
        skipped: Videos that could not be read in this run.
        num_moments: Moments of them in it; `None` if its rows are complete videos.
        stored_bytes: What it stores for re-ranking, in all; `None` if that is nothing.
    """

    num_encoded: int
    num_unchanged: int
    num_in_index: int
    skipped: tuple[SkippedVideo, ...]
    num_moments: int | None = None
    stored_bytes: int | None = None

    def format(self) -> str:
        """Write it as lines for people, each skipped video with its reason."""
        moments = "" if self.num_moments is None else f" ({self.num_moments} moments)"
        lines = [
            f"{self.num_encoded} encoded, {self.num_unchanged} unchanged, {len(self.skipped)} skipped; "
            f"{self.num_in_index} in the index{moments}"
        ]
        if self.stored_bytes:
            lines.append(f"{self.stored_bytes:,} bytes ({format_bytes(self.stored_bytes)}) stored for re-ranking")
        return "\n".join(lines + [video.format() for video in self.skipped])


@dataclass(frozen=True)
class FoundMoment:
    """A part of a video that was found.

    Attributes:
        start_seconds: From the first frame of the video.
        end_seconds: Likewise.
        similarity: Cosine of moment and query.
    """

    start_seconds: float
    end_seconds: float
    similarity: float


@dataclass(frozen=True)
class SearchHit:
    """A video that was found.

    Attributes:
        path: Its file.
        similarity: Cosine of video and query, averaged over the video's vectors: the dual encoder's score.
        matching_score: Raw logit of the matching head, by which re-ranked hits are sorted; `None` if not re-ranked.
        duration_seconds: Length of the video; `None` where its file does not say.
        unread_reason: Why a video to be re-ranked could not be read again; such hits come last.
        has_changed: Whether its file is another one than that which was embedded, by size and time. A file that is
            gone has not changed.
        start_seconds: Start of its best moment; `None` if the index holds complete videos.
        end_seconds: End of it.
        moments: The moments of the video that were found, best first, none of which overlap.
    """

    path: str
    similarity: float
    matching_score: float | None = None
    duration_seconds: float | None = None
    unread_reason: str | None = None
    has_changed: bool = False
    start_seconds: float | None = None
    end_seconds: float | None = None
    moments: tuple[FoundMoment, ...] = ()


@dataclass(frozen=True)
class VideoBatch:
    """Videos as read together: those that could be, in order, and those that could not."""

    files: list[VideoFile]
    metadata: list[VideoMetadata]
    pixel_values: torch.Tensor | None
    skipped: list[SkippedVideo]


def find_dual_encoder(model: str | os.PathLike) -> str:
    """Full path, or Hub id, of a model that encodes videos and texts.

    Args:
        model: Folder, Hub id, or the name of a released checkpoint.

    Raises:
        OSError: If there is no such folder or repository.
        ValueError: If it is another kind of model.
    """
    name = find_released(model)
    name = os.path.abspath(name) if Path(name).is_dir() else name
    require_start(name, UMTVideoTextForRetrieval.__name__, DUAL_ENCODERS)
    return name


class VideoTextEncoder:
    """A UMT video-text model and its processor, ready to encode.

    Args:
        model: Folder or Hub id of a stage-2 or retrieval model with its processor.
        num_frames: Frames read of each video; default: the processor's.
        device: Where it runs; default: the process's accelerator, or CPU.
        attn_implementation: "sdpa", "eager", ...; default: Transformers' choice.
        tokens: Which tokens of a video the encoder sees; default: as the model's configuration says.
        dtype: What it is computed in; default: float32.

    Raises:
        ValueError: If the model lacks weights of the dual encoder, or has no processor for videos and texts.
    """

    def __init__(
        self,
        model: str | os.PathLike,
        num_frames: int | None = None,
        device: str | torch.device | None = None,
        attn_implementation: str | None = None,
        tokens: KeptTokenArguments | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        self.name = find_dual_encoder(model)
        self.processor = load_video_text_processor(self.name)
        loaded = load_with_report(
            UMTVideoTextForRetrieval,
            self.name,
            DUAL_ENCODERS,
            dtype=torch.float32,
            attn_implementation=attn_implementation,
        )
        # Encoding does without the matching head, which only re-ranking needs.
        require_weights(loaded, model, MATCHING_HEAD, "Use a stage-2 or retrieval model.")
        self.kept_tokens = keep_tokens(loaded.model, tokens)
        self.fresh = tuple(loaded.fresh)  # weights that are random, and are not used
        self.has_matching_head = not any(name.startswith(MATCHING_HEAD) for name in loaded.fresh)
        self.device = resolve_device(device)
        # That of the weights as they are stored: another precision is another entry of the description.
        self._fingerprint = compute_fingerprint(loaded.model, loaded.fresh)
        self.model = place_model(loaded.model, self.device, dtype)
        self.num_frames = num_frames or self.processor.video_processor.num_frames

    def describe(self) -> dict[str, Any]:
        """What makes its vectors comparable: fingerprint of the weights, precision, width, frames, pixel settings."""
        settings = json.loads(self.processor.video_processor.to_json_string())
        return {
            "model": self.name,
            "weights": self._fingerprint,
            "dtype": name_dtype(self.model.dtype),
            "projection_dim": self.model.config.projection_dim,
            "num_frames": self.num_frames,
            "video_processor": {name: settings.get(name) for name in PIXEL_SETTINGS},
            "kept_tokens": self.kept_tokens,
        }

    def read_batches(
        self,
        files: Sequence[VideoFile],
        batch_size: int,
        num_workers: int | None = 0,
        sources: Mapping[str, VideoSource] | None = None,
    ) -> Iterable[VideoBatch]:
        """Read videos in order, one view each.

        Args:
            files: What to read.
            batch_size: Videos of a batch; those that cannot be read leave it smaller.
            num_workers: Processes that read ahead; 0: this one reads.
            sources: What is read in place of a path, such as the bytes of a video.
        """
        reader = _VideoReads(files, self.processor, self.num_frames, sources)
        batches = [range(start, min(start + batch_size, len(files))) for start in range(0, len(files), batch_size)]
        paths = [file.path for file in files]
        return read_ahead(reader, batches, num_workers, videos=paths, collate_fn=_collate)

    def encode_videos(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode videos `(B, T, C, H, W)`.

        Returns:
            Float32 vectors `(B, D)`, whose inner product with a text's is the dual encoder's score, and the tokens
            `(B, V, width)` that the matching head looks at.
        """
        outputs = self.model.get_video_features(pixel_values.to(self.device, self.model.dtype))
        return outputs.pooler_output.float(), outputs.last_hidden_state

    def encode_text(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode a text.

        Returns:
            Its unit vector, float32 `(1, D)`, and its tokens' states `(1, L, H)`.

        Raises:
            ValueError: If the text is empty.
        """
        require_string("query", text, "describe what the video shows.")
        inputs = self.processor(text=[text], padding=True, return_tensors="pt").to(self.device)
        outputs = self.model.get_text_features(**inputs)
        return normalize_features(outputs.pooler_output).float(), outputs.last_hidden_state


@torch.inference_mode()
def embed_videos(
    sources: Iterable[str],
    model: str | os.PathLike,
    folder: str | os.PathLike,
    num_frames: int | None = None,
    batch_size: int = 8,
    num_workers: int | None = 0,
    shard_size: int = ROWS_PER_COMMIT,
    announce: Callable[[str], object] | None = None,
    *,
    window: float | None = None,
    stride: float | None = None,
    tokens: KeptTokenArguments | None = None,
    dtype: DType | None = None,
    torch_compile: bool = False,
    dataloader_timeout_seconds: int = TIMEOUT_SECONDS,
    store: StoredKind | None = None,
    store_dtype: StoredDType | None = None,
) -> EmbedReport:
    """Put videos into an index, which is made or added to; only new and changed files are encoded.

    Every process that `accelerate launch` starts encodes a share; the main one lists the videos and finishes the
    index. A killed run loses what half a minute gives, and the next one goes on from there. Several commands may add
    to one index at the same time.

    Args:
        sources: Video files, and folders with videos at any depth. The main process's list counts.
        model: Folder or Hub id of a stage-2 or retrieval model with its processor.
        folder: The index: a folder, or an address in object storage such as `s3://bucket/index`.
        num_frames: Frames read of each video, or of each moment; default: the processor's.
        batch_size: Videos or moments encoded at a time, in each process.
        num_workers: Processes that read ahead, for each process.
        shard_size: Rows that are written at a time; fewer where they take longer than half a minute.
        announce: Gets lines on what was found and where the time went, in the main process.
        window: Seconds of a moment; default: a row is a complete video.
        stride: Seconds from the start of a moment to that of the next; default: `window`.
        tokens: Which tokens of a video the encoder sees; default: as the model's configuration says. The index
            records it, and searches in it keep the same.
        dtype: What the model is computed in; default: bfloat16 on a GPU that has it, float32 elsewhere.
        torch_compile: Whether the video tower is compiled by `torch.compile`.
        dataloader_timeout_seconds: For which reading processes may give nothing; 0: for ever.
        store: What is stored of each row for re-ranking: "tokens" of the encoder, or the "keys" and values that the
            fusion layers make of them, which are larger and quicker; default: nothing.
        store_dtype: Precision in which it is stored, "float16" or "float32"; default: "float16".

    Returns:
        What was done, the same in all processes.

    Raises:
        ImportError: If LanceDB is not installed.
        FileExistsError: If the folder holds something other than an index.
        ValueError: If a source folder has no videos, the model is not a dual encoder, or another one or another
            version built the index.

    Examples:
        >>> from umt_hf import embed_videos
        >>> report = embed_videos(["videos"], "umt-vit-b16-25m", "index")
        >>> print(report.format())
        4 encoded, 0 unchanged, 0 skipped; 4 in the index
    """
    require_lancedb()
    windows, stored = resolve_moments(window, stride), resolve_store(store, store_dtype)
    for name, count in {"num_frames": num_frames, "batch_size": batch_size, "shard_size": shard_size}.items():
        require_count(name, count)
    # One process may get the long videos; the others wait.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
    chosen = choose_dtype(dtype, accelerator.device, accelerator.mixed_precision)
    encoder = VideoTextEncoder(model, num_frames, accelerator.device, tokens=tokens, dtype=chosen)
    index = VideoIndex(folder)
    description = describe_index(encoder, windows, stored, accelerator.mixed_precision)
    if torch_compile:
        compile_model(encoder.model)
    # Vectors of two encoders cannot be compared, and nothing in a vector shows whose it is.
    index.check_encoder(description)
    accelerator.wait_for_everyone()  # before the main process writes what the others check

    plan: list[Any] = [None]
    if accelerator.is_main_process:
        files, missing = list_videos(sources)
        index.create(description)
        plan = [(index.select_new(files), len(files), missing)]
        if announce is not None:
            announce(f"{len(files):,} videos found, {len(plan[0][0]):,} of them new or changed.")
    new, num_files, missing = broadcast_object_list(plan)[0]
    share = new[accelerator.process_index :: accelerator.num_processes]
    say = announce if accelerator.is_main_process else None
    work = RowEncoder(encoder, stored, accelerator.autocast)
    with inference_run(say, dataloader_timeout_seconds):
        encoded = announce_size(work.encode(share, windows, batch_size, num_workers), len(new), windows, say)
        with tqdm(total=len(share), unit="video", disable=not accelerator.is_main_process) as progress:
            skipped = _write_share(encoded, RowWriter(index, shard_size), progress)
    skipped = sorted(missing + gather_object(skipped), key=lambda video: video.path)
    total: list[Any] = [None]
    if accelerator.is_main_process:
        total = [_finish_index(index, skipped, windows is not None, stored is not None)]
    num_encoded = len(new) - (len(skipped) - len(missing))
    num_videos, num_moments, stored_bytes = broadcast_object_list(total)[0]
    return EmbedReport(num_encoded, num_files - len(new), num_videos, tuple(skipped), num_moments, stored_bytes)


def _finish_index(
    index: VideoIndex, skipped: Sequence[SkippedVideo], has_moments: bool, has_stored: bool
) -> tuple[int, int | None, int | None]:
    """Bring the index up to date, and count its videos, moments, and bytes stored for re-ranking."""
    num_videos = index.finish(skipped)
    num_moments = index.count_rows() if has_moments else None
    return num_videos, num_moments, index.measure_stored()[1] if has_stored else None


def describe_index(
    encoder: VideoTextEncoder,
    windows: WindowSettings | None,
    store: StoreSettings | None = None,
    mixed_precision: str = "no",
) -> dict[str, Any]:
    """What an index is made with, all of which must stay.

    Args:
        encoder: Of its vectors.
        windows: Of moments; `None` where a row is a complete video.
        store: What is stored for re-ranking; `None` = nothing.
        mixed_precision: Accelerate's.

    Raises:
        ValueError: If something is to be stored that the model has no use for.
    """
    if store is not None and not encoder.has_matching_head:
        raise ValueError(
            f"{encoder.name} has no matching head, which alone would use what is stored; leave out store, or use a "
            "retrieval model."
        )
    return encoder.describe() | {
        "mixed_precision": mixed_precision,
        "moments": None if windows is None else asdict(windows),
        "stored": None if store is None else asdict(store),
    }


class VideoSearcher:
    """Answers queries from an index folder.

    Args:
        folder: The index.
        model: Where the model that built it is now; default: where it was then.
        device: Where the model runs; default: the process's accelerator, or CPU.
        attn_implementation: "sdpa", "eager", ...; default: Transformers' choice.
        announce: Gets a line where re-ranking encodes videos, since the index does not store what it needs.

    Raises:
        ImportError: If LanceDB is not installed.
        FileNotFoundError: If the folder is not an index.
        ValueError: If the index holds no videos, or was built by another model or an earlier version.

    Examples:
        >>> from umt_hf import VideoSearcher, embed_videos
        >>> report = embed_videos(["videos"], "umt-vit-b16-25m", "index")
        >>> searcher = VideoSearcher("index")
        >>> hits = searcher.search("a dog running", top_k=2, rerank=True)
        >>> [hit.path for hit in hits]
        ['...mp4', '...mp4']
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        model: str | os.PathLike | None = None,
        device: str | torch.device | None = None,
        attn_implementation: str | None = None,
        announce: Callable[[str], object] | None = None,
    ):
        index = VideoIndex(folder)
        built = index.read_encoder()
        self.table = index.load()
        self.stored, self.announce = read_store(built), announce
        self.has_moments = built.get("moments") is not None
        tokens = read_kept_tokens(built)
        self.encoder = VideoTextEncoder(
            model or built["model"], built["num_frames"], device, attn_implementation, tokens
        )
        # A query may be computed in another precision than the videos were.
        index.check_encoder({name: value for name, value in self.encoder.describe().items() if name != "dtype"})

    @torch.inference_mode()
    def search(
        self,
        query: str,
        top_k: int = 10,
        rerank: bool = False,
        exact: bool = False,
        filters: SearchFilter | None = None,
    ) -> list[SearchHit]:
        """Find the videos that fit a text best.

        Args:
            query: What they show.
            top_k: Videos wanted.
            rerank: Whether the matching head looks at the 32 most similar videos (of `top_k`, if that is more), or at
                the best moment of each, and sorts them: at what the index stores of them, or at their frames, which
                are read and encoded again.
            exact: Whether the query is compared with all vectors of a large index too; see docs/search.md.
            filters: Which videos are searched; default: all.

        Returns:
            Up to `top_k` videos, best first, each with its moments if the index has them.

        Raises:
            ValueError: If the query is empty, `top_k` is below 1, or `rerank` is asked of a model without a matching
                head.
        """
        require_count("top_k", top_k)
        if rerank and not self.encoder.has_matching_head:
            raise ValueError(f"{self.encoder.name} has no matching head, which re-ranking needs.")
        vector, tokens = self.encoder.encode_text(query)
        # Re-ranking needs more candidates than it returns.
        count = max(top_k, RERANKED_VIDEOS) if rerank else top_k
        found = self._find_videos(vector.cpu().numpy(), count, exact, filters)
        hits = [build_hit(rows) for rows in found]
        return self._rerank(hits, [rows[0] for rows in found], tokens)[:top_k] if rerank else hits

    def _find_videos(
        self, vector: np.ndarray, count: int, exact: bool, filters: SearchFilter | None
    ) -> list[list[dict[str, Any]]]:
        """The videos with the best rows, each with those of its rows that were found, best first."""
        num_rows = count * (2 * MOMENTS_PER_VIDEO if self.has_moments else 1)
        while True:
            rows = self.table.find_nearest(vector, num_rows, exact, filters)
            found: dict[str, list[dict[str, Any]]] = {}
            for row in rows:
                found.setdefault(row["path"], []).append(row)
            # All moments of a video may come before the best one of the next.
            if len(found) >= count or len(rows) < num_rows:
                break
            # An index may have fewer videos than are wanted.
            if num_rows >= ENOUGH_ROWS and len(found) >= self._num_videos:
                break
            num_rows *= 4
        return list(found.values())[:count]

    @cached_property
    def _num_videos(self) -> int:
        return len(self.table.list_paths())

    def _rerank(self, hits: list[SearchHit], rows: list[dict[str, Any]], text_tokens: torch.Tensor) -> list[SearchHit]:
        """Sort hits by the matching head's opinion of their best rows, from what is stored or from frames read now."""
        matching: dict[str, float] = {}
        reasons: dict[str, str] = {}
        if self.stored is not None:
            for start in range(0, len(rows), RERANK_BATCH_SIZE):
                part = rows[start : start + RERANK_BATCH_SIZE]
                matching |= match_stored(self.table.index, self.stored, self.encoder.model, part, text_tokens)
        rest = [hit for hit in hits if hit.path not in matching]
        if rest and self.announce is not None:
            self.announce(explain_encoding(len(rest), self.stored))
        for batch in self._read_again(rest):
            reasons.update({video.path: video.reason for video in batch.skipped})
            if batch.pixel_values is not None:
                _, video_tokens = self.encoder.encode_videos(batch.pixel_values)
                logits = self.encoder.model.match(video_tokens, text_tokens.expand(len(batch.files), -1, -1))[:, 1]
                matching.update(zip([file.path for file in batch.files], logits.tolist(), strict=True))
        judged = [
            replace(hit, matching_score=matching.get(hit.path), unread_reason=reasons.get(hit.path)) for hit in hits
        ]
        return sorted(judged, key=lambda hit: -matching.get(hit.path, -float("inf")))

    def _read_again(self, hits: list[SearchHit]) -> Iterable[VideoBatch]:
        """Frames of the videos that were found, or of the best moment of each."""
        files = [VideoFile(hit.path, 0, 0) for hit in hits]
        if not hits or hits[0].start_seconds is None:
            yield from self.encoder.read_batches(files, RERANK_BATCH_SIZE)
            return
        processor = self.encoder.processor.video_processor
        for start in range(0, len(hits), RERANK_BATCH_SIZE):
            part = slice(start, start + RERANK_BATCH_SIZE)
            times = [(cast("float", hit.start_seconds), cast("float", hit.end_seconds)) for hit in hits[part]]
            clips, skipped = read_files_moments(
                [hit.path for hit in hits[part]], times, processor, self.encoder.num_frames
            )
            read = [(file, clip) for file, clip in zip(files[part], clips, strict=True) if clip is not None]
            pixels = torch.stack([clip for _, clip in read]) if read else None
            yield VideoBatch([file for file, _ in read], [], pixels, skipped)


def read_kept_tokens(built: dict[str, Any]) -> KeptTokenArguments:
    """Which tokens the encoder of an index saw, from its description; all where it says nothing."""
    kept = built.get("kept_tokens") or {"keep_ratio": 1.0}
    return KeptTokenArguments(**{name: value for name, value in kept.items() if name != "token_selector_seed"})


def read_embed_options(index: VideoIndex) -> dict[str, Any]:
    """What `embed_videos` was asked for when an index was begun, so that another call may add to it."""
    built = index.read_encoder()
    moments, stored = built.get("moments") or {}, built.get("stored") or {}
    return {
        "num_frames": built["num_frames"],
        "window": moments.get("window_seconds"),
        "stride": moments.get("stride_seconds"),
        "tokens": read_kept_tokens(built),
        "dtype": built.get("dtype"),
        "store": stored.get("what"),
        "store_dtype": stored.get("dtype"),
    }


def build_hit(rows: Sequence[dict[str, Any]]) -> SearchHit:
    """A video from its rows that were found, best first.

    Args:
        rows: As `VectorTable.find_nearest` gives them, all of one video.
    """
    best = rows[0]
    hit = SearchHit(
        best["path"], best["similarity"], duration_seconds=best["duration_seconds"], has_changed=_has_changed(best)
    )
    if best["start_seconds"] is None:
        return hit
    apart = choose_apart([(row["start_seconds"], row["end_seconds"]) for row in rows], count=MOMENTS_PER_VIDEO)
    moments = [
        FoundMoment(*(rows[place][name] for name in ("start_seconds", "end_seconds", "similarity"))) for place in apart
    ]
    return replace(hit, start_seconds=best["start_seconds"], end_seconds=best["end_seconds"], moments=tuple(moments))


def _has_changed(row: dict[str, Any]) -> bool:
    """Whether the file of a row is another one now; where this machine has none, it has not changed."""
    try:
        now = describe_file(row["path"])
    except OSError:
        return False
    return (now.size_bytes, now.modified_ns) != (row["size_bytes"], row["modified_ns"])


def format_hits(hits: Sequence[SearchHit]) -> str:
    """Write hits as lines for people: place, similarity, matching score and seconds if there are any, path.

    Further moments of a video follow it, a line each.
    """
    is_reranked = any(hit.matching_score is not None or hit.unread_reason is not None for hit in hits)
    has_moments = any(hit.moments for hit in hits)
    header = "rank  similarity  " + ("matching  " if is_reranked else "")
    lines = [header + ("          seconds  " if has_moments else "") + "video"]
    for rank, hit in enumerate(hits, start=1):
        matching = "       -" if hit.matching_score is None else f"{hit.matching_score:8.3f}"
        seconds = f"{_format_seconds(hit)}  " if has_moments else ""
        line = f"{rank:4d}  {hit.similarity:10.4f}  " + (f"{matching}  " if is_reranked else "") + seconds
        line += format_name(hit.path) + (f" ({CHANGED_SINCE})" if hit.has_changed else "")
        lines.append(line if hit.unread_reason is None else f"{line} (not read again: {hit.unread_reason})")
        empty = " " * 10 if is_reranked else ""
        lines += [
            f"{'':4}  {m.similarity:10.4f}  {empty}{_format_seconds(m)}" for m in hit.moments if not _is_best(m, hit)
        ]
    return "\n".join(lines)


def _is_best(moment: FoundMoment, hit: SearchHit) -> bool:
    return (moment.start_seconds, moment.end_seconds) == (hit.start_seconds, hit.end_seconds)


def _format_seconds(moment: SearchHit | FoundMoment) -> str:
    return f"{moment.start_seconds:8.1f}-{moment.end_seconds:8.1f}"


@dataclass
class EncodedRows:
    """What a batch gives.

    Attributes:
        rows: Of the index, all of each video.
        skipped: Videos that have no place in it.
        stored: What is stored for re-ranking, of these rows or of rows that come later.
        num_videos: Videos that are done.
    """

    rows: list[dict[str, Any]]
    skipped: list[SkippedVideo]
    stored: list[dict[str, Any]]
    num_videos: int


def announce_size(
    encoded: Iterable[EncodedRows],
    num_videos: int,
    windows: WindowSettings | None,
    announce: Callable[[str], object] | None,
) -> Iterator[EncodedRows]:
    """Say how large what is stored will be, once the first of it is there, and hand everything on."""
    for batch in encoded:
        if announce is not None and batch.stored:
            num_bytes = batch.stored[0][STATES_COLUMN].nbytes
            if windows is None:
                announce(
                    f"{num_bytes:,} bytes are stored per video for re-ranking, about "
                    f"{format_bytes(num_bytes * num_videos)} for {num_videos:,} videos."
                )
            else:
                announce(f"{num_bytes:,} bytes are stored per moment for re-ranking.")
            announce = None
        yield batch


def _write_share(encoded: Iterable[EncodedRows], writer: RowWriter, progress: tqdm) -> list[SkippedVideo]:
    """Write this process's rows as they come, and give those videos that have no place in the index."""
    skipped: list[SkippedVideo] = []
    for batch in encoded:
        writer.write(batch.rows, batch.stored)
        skipped += batch.skipped
        progress.update(batch.num_videos)
    writer.flush()
    return skipped


class RowEncoder:
    """Makes rows of what was read, with what is stored of them.

    Args:
        encoder: The model.
        store: What is stored; `None` = nothing.
        autocast: Within which the model runs.
        sources: What is read in place of a path, such as the bytes of a video.
    """

    def __init__(
        self,
        encoder: VideoTextEncoder,
        store: StoreSettings | None = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        sources: Mapping[str, VideoSource] | None = None,
    ):
        self.encoder, self.store, self.autocast, self.sources = encoder, store, autocast, sources

    def encode(
        self, files: Sequence[VideoFile], windows: WindowSettings | None, batch_size: int, num_workers: int | None = 0
    ) -> Iterator[EncodedRows]:
        """Rows of videos, or of moments of them where there are windows, batch by batch; each video once."""
        if windows is not None:
            return self._encode_moments(files, windows, batch_size, num_workers)
        return self._encode_videos(self.encoder.read_batches(files, batch_size, num_workers, self.sources))

    def _encode_videos(self, batches: Iterable[VideoBatch]) -> Iterator[EncodedRows]:
        """Rows of complete videos."""
        for batch in batches:
            encoded = EncodedRows([], list(batch.skipped), [], len(batch.files) + len(batch.skipped))
            if batch.pixel_values is not None:
                vectors, states = self._encode(batch.pixel_values)
                for i, (file, metadata) in enumerate(zip(batch.files, batch.metadata, strict=True)):
                    own = None if states is None else states[i]
                    if (reason := self._refuse(vectors[i], own)) is not None:
                        encoded.skipped.append(SkippedVideo(file.path, reason))
                        continue
                    facts = {"num_frames": metadata.total_num_frames, "duration_seconds": metadata.duration}
                    encoded.rows.append({**asdict(file), **facts, VECTOR_COLUMN: vectors[i]})
                    encoded.stored += [] if own is None else [build_stored_row(file, None, own)]
            yield encoded

    def _encode_moments(
        self, files: Sequence[VideoFile], windows: WindowSettings, batch_size: int, num_workers: int | None
    ) -> Iterator[EncodedRows]:
        """The same of moments: rows of a video come when all of them are there, what is stored of them before."""
        collector = MomentCollector()
        processor, num_frames = self.encoder.processor.video_processor, self.encoder.num_frames
        batches = read_moments(files, processor, windows, batch_size, num_workers, num_frames, sources=self.sources)
        for reads in batches:
            encoded = EncodedRows([], [], [], 0)
            for read in reads:
                if isinstance(read, SkippedVideo):
                    encoded.skipped += collector.skip(read)
            clips = [read for read in reads if isinstance(read, MomentClips)]
            done = self._collect(clips, collector, encoded) if clips else []
            for video in done:
                encoded.rows += build_moment_rows(video)
            encoded.num_videos = len(done) + len(encoded.skipped)
            yield encoded

    def _collect(
        self, clips: Sequence[MomentClips], collector: MomentCollector, encoded: EncodedRows
    ) -> list[MomentRows]:
        """Encode what was read together, and give the videos that are complete with it."""
        vectors, states = self._encode(torch.cat([read.pixel_values for read in clips]))
        done, first = [], 0
        for read in clips:
            own = range(first, first + len(read.moments))
            first = own.stop
            reasons = [self._refuse(vectors[i], None if states is None else states[i]) for i in own]
            if (reason := next(filter(None, reasons), None)) is not None:
                encoded.skipped += collector.skip(SkippedVideo(read.part.file.path, reason))
                continue
            video = collector.add(read, vectors[own.start : own.stop])
            if isinstance(video, SkippedVideo):
                encoded.skipped.append(video)
                continue
            done += [] if video is None else [video]
            if states is not None:
                encoded.stored += [
                    build_stored_row(read.part.file, moment.start_seconds, states[i])
                    for i, moment in zip(own, read.moments, strict=True)
                ]
        return done

    def _encode(self, pixel_values: torch.Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        """Vectors `(B, D)`, and what is stored of each."""
        with in_model(), without_gradients(self.encoder.device, is_standalone=True), self.autocast():
            vectors, tokens = self.encoder.encode_videos(pixel_values)
            states = None if self.store is None else self.store.compute_states(self.encoder.model, tokens)
            return vectors.float().cpu().numpy(), states

    def _refuse(self, vector: np.ndarray, states: np.ndarray | None) -> str | None:
        """Why a video or a moment has no place in the index; `None` if it has one."""
        # NaN compares as false with everything, so that no query could find the video.
        if not np.isfinite(vector).all():
            return NOT_FINITE
        if states is not None and self.store is not None and not np.isfinite(states).all():
            return TOO_LARGE.format(dtype=self.store.dtype)
        return None


def build_moment_rows(video: MomentRows) -> list[dict[str, Any]]:
    """Rows of the index for a video whose moments have been encoded."""
    facts = {**asdict(video.file), "num_frames": video.num_frames, "duration_seconds": video.duration_seconds}
    return [
        {**facts, "start_seconds": moment.start_seconds, "end_seconds": moment.end_seconds, VECTOR_COLUMN: vector}
        for moment, vector in zip(video.moments, video.values, strict=True)
    ]


class _VideoReads(torch.utils.data.Dataset):
    """Reads one view of each file, or says why it cannot."""

    def __init__(
        self,
        files: Sequence[VideoFile],
        processor: UMTVideoTextProcessor,
        num_frames: int,
        sources: Mapping[str, VideoSource] | None = None,
    ):
        self.files, self.processor, self.num_frames = files, processor, num_frames
        self.sources = sources or {}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[VideoFile, VideoMetadata, torch.Tensor] | SkippedVideo:
        file = self.files[index]
        options = {"num_frames": self.num_frames, "num_clips": 1, "num_crops": 1, "return_metadata": True}
        try:
            source = cast("VideoInput", [self.sources.get(file.path, file.path)])
            inputs = self.processor(videos=source, return_tensors="pt", **options)
        except (VideoDecodingError, OSError) as error:
            return SkippedVideo(file.path, str(error).removeprefix(f"{file.path}: "))
        return file, inputs["video_metadata"][0], inputs["pixel_values"][0]


def _collate(reads: Sequence[tuple[VideoFile, VideoMetadata, torch.Tensor] | SkippedVideo]) -> VideoBatch:
    skipped = [read for read in reads if isinstance(read, SkippedVideo)]
    good = [read for read in reads if not isinstance(read, SkippedVideo)]
    if not good:
        return VideoBatch([], [], None, skipped)
    files, metadata, clips = zip(*good, strict=True)
    return VideoBatch(list(files), list(metadata), torch.stack(clips), skipped)


__all__ = [
    "EmbedReport",
    "FoundMoment",
    "SearchFilter",
    "SearchHit",
    "VideoSearcher",
    "VideoTextEncoder",
    "embed_videos",
    "format_hits",
]
