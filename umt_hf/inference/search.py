"""Search videos by text: a UMT dual encoder fills an index folder and answers queries from it.

    umt-hf embed videos/ --model outputs/retrieval --out index
    umt-hf search index "a red circle moving left" --rerank

Legend: B videos, T frames, D projection width.

Source: Li et al., "Unmasked Teacher", ICCV 2023, section 3.2: contrast finds, the matching head re-ranks.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from tqdm import tqdm
from transformers.video_utils import VideoInput, VideoMetadata

from ..data.video_files import SkippedVideo, VideoFile, list_videos
from ..modeling.losses_umt import normalize_features
from ..modeling.modeling_umt_video_text import UMTVideoTextForRetrieval
from ..processing.decoding import VideoDecodingError
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
from .starts import require_start
from .video_index import VECTOR_COLUMN, VideoIndex, require_faiss

RERANKED_VIDEOS = 32
RERANK_BATCH_SIZE = 8
MATCHING_HEAD = ("matching_head.",)


@dataclass(frozen=True)
class EmbedReport:
    """What a run of `embed_videos` did.

    Attributes:
        num_encoded: Videos that were new or had changed.
        num_unchanged: Videos that were in the index already.
        num_in_index: Videos in it now.
        skipped: Videos that could not be read in this run.
    """

    num_encoded: int
    num_unchanged: int
    num_in_index: int
    skipped: tuple[SkippedVideo, ...]

    def format(self) -> str:
        """Write it as lines for people, each skipped video with its reason."""
        lines = [
            f"{self.num_encoded} encoded, {self.num_unchanged} unchanged, {len(self.skipped)} skipped; "
            f"{self.num_in_index} in the index"
        ]
        return "\n".join(lines + [f"skipped {video.path}: {video.reason}" for video in self.skipped])


@dataclass(frozen=True)
class SearchHit:
    """A video that was found.

    Attributes:
        path: Its file.
        similarity: Cosine of video and query, averaged over the video's vectors: the dual encoder's score.
        matching_score: Raw logit of the matching head, by which re-ranked hits are sorted; `None` if not re-ranked.
        duration_seconds: Length of the video; `None` where its file does not say.
        unread_reason: Why a video to be re-ranked could not be read again; such hits come last.
    """

    path: str
    similarity: float
    matching_score: float | None = None
    duration_seconds: float | None = None
    unread_reason: str | None = None


@dataclass(frozen=True)
class VideoBatch:
    """Videos as read together: those that could be, in order, and those that could not."""

    files: list[VideoFile]
    metadata: list[VideoMetadata]
    pixel_values: torch.Tensor | None
    skipped: list[SkippedVideo]


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
        name = find_released(model)
        self.name = os.path.abspath(name) if Path(name).is_dir() else name
        require_start(self.name, UMTVideoTextForRetrieval.__name__, DUAL_ENCODERS)
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
        self, files: Sequence[VideoFile], batch_size: int, num_workers: int | None = 0
    ) -> Iterable[VideoBatch]:
        """Read videos in order, one view each.

        Args:
            files: What to read.
            batch_size: Videos of a batch; those that cannot be read leave it smaller.
            num_workers: Processes that read ahead; 0: this one reads.
        """
        reader = _VideoReads(files, self.processor, self.num_frames)
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
    shard_size: int = 256,
    announce: Callable[[str], object] | None = None,
    tokens: KeptTokenArguments | None = None,
    *,
    dtype: DType | None = None,
    torch_compile: bool = False,
    dataloader_timeout_seconds: int = TIMEOUT_SECONDS,
) -> EmbedReport:
    """Put videos into an index folder, which is made or added to; only new and changed files are encoded.

    Every process that `accelerate launch` starts encodes a share; the main one lists the videos and finishes the
    index. A killed run loses less than a shard of each process, and the next one goes on from there.

    Args:
        sources: Video files, and folders with videos at any depth. The main process's list counts.
        model: Folder or Hub id of a stage-2 or retrieval model with its processor.
        folder: The index.
        num_frames: Frames read of each video; default: the processor's.
        batch_size: Videos encoded at a time, in each process.
        num_workers: Processes that read ahead, for each process.
        shard_size: Videos that are written at a time.
        announce: Gets lines on what was found and where the time went, in the main process.
        tokens: Which tokens of a video the encoder sees; default: as the model's configuration says. The index
            records it, and searches in it keep the same.
        dtype: What the model is computed in; default: bfloat16 on a GPU that has it, float32 elsewhere.
        torch_compile: Whether the video tower is compiled by `torch.compile`.
        dataloader_timeout_seconds: For which reading processes may give nothing; 0: for ever.

    Returns:
        What was done, the same in all processes.

    Raises:
        ImportError: If FAISS is not installed.
        FileExistsError: If the folder holds something other than an index.
        BlockingIOError: If another command is writing the index.
        ValueError: If a source folder has no videos, the model is not a dual encoder, or another one built the index.

    Examples:
        >>> from umt_hf import embed_videos
        >>> report = embed_videos(["videos"], "umt-vit-b16-25m", "index")
        >>> print(report.format())
        4 encoded, 0 unchanged, 0 skipped; 4 in the index
    """
    require_faiss()
    for name, count in {"num_frames": num_frames, "batch_size": batch_size, "shard_size": shard_size}.items():
        require_count(name, count)
    # One process may get the long videos; the others wait.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
    chosen = choose_dtype(dtype, accelerator.device, accelerator.mixed_precision)
    encoder = VideoTextEncoder(model, num_frames, accelerator.device, tokens=tokens, dtype=chosen)
    index = VideoIndex(folder)
    description = encoder.describe() | {"mixed_precision": accelerator.mixed_precision}
    if torch_compile:
        compile_model(encoder.model)
    # Vectors of two encoders cannot be compared, and nothing in a vector shows whose it is.
    index.check_encoder(description)
    accelerator.wait_for_everyone()  # before the main process writes what the others check

    with index.write(description) if accelerator.is_main_process else nullcontext():
        plan: list[Any] = [None]
        if accelerator.is_main_process:
            files, missing = list_videos(sources)
            plan = [(index.select_new(files), len(files), missing)]
            if announce is not None:
                announce(f"{len(files):,} videos found, {len(plan[0][0]):,} of them new or changed.")
        new, num_files, missing = broadcast_object_list(plan)[0]
        share = new[accelerator.process_index :: accelerator.num_processes]
        batches = encoder.read_batches(share, batch_size, num_workers)
        run = inference_run(announce if accelerator.is_main_process else None, dataloader_timeout_seconds)
        with run, tqdm(total=len(share), unit="video", disable=not accelerator.is_main_process) as progress:
            skipped = _encode_share(encoder, batches, index, shard_size, accelerator, progress)
        skipped = sorted(missing + gather_object(skipped), key=lambda video: video.path)
        total = [index.merge(skipped) if accelerator.is_main_process else 0]
        total = broadcast_object_list(total)
    num_encoded = len(new) - (len(skipped) - len(missing))
    return EmbedReport(num_encoded, num_files - len(new), total[0], tuple(skipped))


class VideoSearcher:
    """Answers queries from an index folder.

    Args:
        folder: The index.
        model: Where the model that built it is now; default: where it was then.
        device: Where the model runs; default: the process's accelerator, or CPU.
        attn_implementation: "sdpa", "eager", ...; default: Transformers' choice.

    Raises:
        ImportError: If FAISS is not installed.
        FileNotFoundError: If the folder is not an index.
        ValueError: If the index holds no videos, or was built by another model.

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
    ):
        index = VideoIndex(folder)
        built = index.read_encoder()
        self.table = index.load()
        tokens = read_kept_tokens(built)
        self.encoder = VideoTextEncoder(
            model or built["model"], built["num_frames"], device, attn_implementation, tokens
        )
        # A query may be computed in another precision than the videos were.
        index.check_encoder({name: value for name, value in self.encoder.describe().items() if name != "dtype"})

    @torch.inference_mode()
    def search(self, query: str, top_k: int = 10, rerank: bool = False) -> list[SearchHit]:
        """Find the videos that fit a text best.

        Args:
            query: What they show.
            top_k: Videos wanted.
            rerank: Whether the matching head looks at the frames of the 32 most similar videos (of `top_k`, if that is
                more) and sorts them.

        Returns:
            Up to `top_k` videos, best first.

        Raises:
            ValueError: If the query is empty, `top_k` is below 1, or `rerank` is asked of a model without a matching
                head.
        """
        require_count("top_k", top_k)
        if rerank and not self.encoder.has_matching_head:
            raise ValueError(f"{self.encoder.name} has no matching head, which re-ranking needs.")
        vector, tokens = self.encoder.encode_text(query)
        # Re-ranking needs more candidates than it returns.
        rows = find_nearest(self.table, vector.cpu().numpy(), max(top_k, RERANKED_VIDEOS) if rerank else top_k)
        hits = [SearchHit(row["path"], row["similarity"], duration_seconds=row["duration_seconds"]) for row in rows]
        return self._rerank(hits, tokens)[:top_k] if rerank else hits

    def _rerank(self, hits: list[SearchHit], text_tokens: torch.Tensor) -> list[SearchHit]:
        """Sort hits by the matching head's opinion of frames read now."""
        # Frames are read anew, since an index of all tokens would be about a thousand times as large.
        files = [VideoFile(hit.path, 0, 0) for hit in hits]
        matching: dict[str, float] = {}
        reasons: dict[str, str] = {}
        for batch in self.encoder.read_batches(files, RERANK_BATCH_SIZE):
            reasons.update({video.path: video.reason for video in batch.skipped})
            if batch.pixel_values is not None:
                _, video_tokens = self.encoder.encode_videos(batch.pixel_values)
                logits = self.encoder.model.match(video_tokens, text_tokens.expand(len(batch.files), -1, -1))[:, 1]
                matching.update(zip([file.path for file in batch.files], logits.tolist(), strict=True))
        judged = [
            SearchHit(hit.path, hit.similarity, matching.get(hit.path), hit.duration_seconds, reasons.get(hit.path))
            for hit in hits
        ]
        return sorted(judged, key=lambda hit: -matching.get(hit.path, -float("inf")))


def read_kept_tokens(built: dict[str, Any]) -> KeptTokenArguments:
    """Which tokens the encoder of an index saw, from its description; all where it says nothing."""
    kept = built.get("kept_tokens") or {"keep_ratio": 1.0}
    return KeptTokenArguments(**{name: value for name, value in kept.items() if name != "token_selector_seed"})


def find_nearest(table: Dataset, vector: np.ndarray, count: int) -> list[dict[str, Any]]:
    """Look up the rows with the largest inner products.

    Args:
        table: What `VideoIndex.load` gives.
        vector: The query's, float32 array `(1, D)`.
        count: Rows wanted.

    Returns:
        Rows without their vectors, but with their `similarity`, best first; fewer if the table has fewer.
    """
    scores, rows = table.search(VECTOR_COLUMN, vector, k=min(count, len(table)))
    found = []
    for score, row in zip(scores, rows, strict=True):
        columns = table[int(row)]  # a view without the vectors would copy all of the FAISS index
        del columns[VECTOR_COLUMN]
        found.append({**columns, "similarity": float(score)})
    return found


def format_hits(hits: Sequence[SearchHit]) -> str:
    """Write hits as lines for people: place, similarity, matching score if there is one, path."""
    is_reranked = any(hit.matching_score is not None or hit.unread_reason is not None for hit in hits)
    lines = ["rank  similarity  " + ("matching  " if is_reranked else "") + "video"]
    for rank, hit in enumerate(hits, start=1):
        matching = "       -" if hit.matching_score is None else f"{hit.matching_score:8.3f}"
        line = f"{rank:4d}  {hit.similarity:10.4f}  " + (f"{matching}  " if is_reranked else "") + hit.path
        lines.append(line if hit.unread_reason is None else f"{line} (not read again: {hit.unread_reason})")
    return "\n".join(lines)


def _encode_share(
    encoder: VideoTextEncoder,
    batches: Iterable[VideoBatch],
    index: VideoIndex,
    shard_size: int,
    accelerator: Accelerator,
    progress: tqdm,
) -> list[SkippedVideo]:
    """Encode this process's videos, write them shard by shard, and give those that have no place in the index."""
    rows: list[dict[str, Any]] = []
    skipped: list[SkippedVideo] = []
    for batch in batches:
        with in_model(), without_gradients(encoder.device, is_standalone=True), accelerator.autocast():
            added, unusable = _encode_batch(encoder, batch)
        rows += added
        skipped += unusable
        progress.update(len(added) + len(unusable))
        # Written as soon as a shard is full: a killed run loses less than that.
        while len(rows) >= shard_size:
            index.write_shard(rows[:shard_size])
            rows = rows[shard_size:]
    if rows:
        index.write_shard(rows)
    return skipped


def _encode_batch(encoder: VideoTextEncoder, batch: VideoBatch) -> tuple[list[dict[str, Any]], list[SkippedVideo]]:
    """Rows for the index, and videos that have no place in it."""
    if batch.pixel_values is None:
        return [], batch.skipped
    vectors = encoder.encode_videos(batch.pixel_values)[0].cpu()
    rows, skipped = [], list(batch.skipped)
    for file, metadata, vector in zip(batch.files, batch.metadata, vectors, strict=True):
        # NaN compares as false with everything, so that no query could find the video.
        if not vector.isfinite().all():
            skipped.append(SkippedVideo(file.path, "Its vector is not finite; the model cannot encode it."))
            continue
        facts = {"num_frames": metadata.total_num_frames, "duration_seconds": metadata.duration}
        rows.append({**asdict(file), **facts, VECTOR_COLUMN: vector.numpy()})
    return rows, skipped


class _VideoReads(torch.utils.data.Dataset):
    """Reads one view of each file, or says why it cannot."""

    def __init__(self, files: Sequence[VideoFile], processor: UMTVideoTextProcessor, num_frames: int):
        self.files, self.processor, self.num_frames = files, processor, num_frames

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[VideoFile, VideoMetadata, torch.Tensor] | SkippedVideo:
        file = self.files[index]
        options = {"num_frames": self.num_frames, "num_clips": 1, "num_crops": 1, "return_metadata": True}
        try:
            inputs = self.processor(videos=cast("VideoInput", [file.path]), return_tensors="pt", **options)
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


__all__ = ["EmbedReport", "SearchHit", "VideoSearcher", "VideoTextEncoder", "embed_videos", "format_hits"]
