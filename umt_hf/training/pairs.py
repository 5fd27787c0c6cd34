"""Videos and images with captions to training batches, in which every process has the same kind of media.

As in `clips`, every random choice for a row depends only on a key, so the number of workers does not change batches.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from datasets import Dataset

from ..data.annotations import compute_pair_id, identify_video, name_video
from ..processing.images import read_image
from ..processing.media_files import VideoDecodingError
from ..processing.processing_umt_video_text import UMTVideoTextProcessor
from ..processing.train_transforms import ResizedCropTransform
from .clips import Clip, ClipCollator, ClipDataset, ClipRequest, build_generator, count_batches, plan_batches

MediaType = Literal["video", "image"]


@dataclass
class PairedClip(Clip):
    """A clip, or an image as a clip of one frame, with its text.

    Args:
        caption: Text as annotated.
        pair_id: Equal for rows that are true pairs of each other; see `compute_pair_id`.
    """

    caption: str
    pair_id: int


class PairDataset(ClipDataset):
    """Reads rows of videos or images together with their captions; a replacement has its own caption.

    Args:
        table: Rows with `video`, `caption` and `corpus`, the number of the corpus that the row is from.
        media_type: "video" or "image".
        pair_by: What makes rows of a corpus true pairs: the same "media", or equal text ("caption").
        **options: As for `ClipDataset`.
    """

    def __init__(
        self,
        table: Dataset,
        media_type: MediaType,
        pair_by: Literal["media", "caption"] = "media",
        **options: Any,
    ):
        # The published strategy for training on videos with text.
        super().__init__(table, sampling_strategy="middle", **options)
        self.media_type, self.pair_by = media_type, pair_by

    def _read_clips(self, row: dict[str, Any], key: tuple[int, ...]) -> list[Clip]:
        if not isinstance(row["caption"], str):
            raise VideoDecodingError(f"{name_video(row['video'], key[-1])}: has no caption. Fill it in.")
        # The corpus is a part of the id: equal captions in two corpora are not known to mean the same.
        name = row["caption"] if self.pair_by == "caption" else identify_video(row["video"], key[-1])
        pair_id = compute_pair_id(row["corpus"], name)
        return [
            PairedClip(**vars(clip), caption=row["caption"], pair_id=pair_id) for clip in super()._read_clips(row, key)
        ]

    def _read_frames(self, source: str | bytes, generator: torch.Generator) -> torch.Tensor:
        return read_image(source) if self.media_type == "image" else super()._read_frames(source, generator)


class PairCollator(ClipCollator[PairedClip]):
    """Clips with captions to a batch with `input_ids`, `attention_mask` and `pair_ids`.

    Args:
        transform: As for `ClipCollator`.
        use_worker: As for `ClipCollator`.
        processor: Makes `input_ids` and `attention_mask` of texts. Not a method of the stage: workers that are not
            forked get a copy of all that it belongs to.
    """

    def __init__(self, transform: ResizedCropTransform, use_worker: bool, processor: UMTVideoTextProcessor):
        super().__init__(transform, use_worker)
        self.processor = processor

    def build_batch(self, clips: list[PairedClip]) -> dict[str, Any]:
        """What a batch holds of its clips, before pixels are finished."""
        texts = self.processor(text=[clip.caption for clip in clips], return_tensors="pt")
        pair_ids = torch.tensor([clip.pair_id for clip in clips])
        return {**super().build_batch(clips), **texts, "pair_ids": pair_ids}


class MixedCorpora(torch.utils.data.Dataset):
    """Several data sets read through one loader; a request says which.

    Args:
        parts: One data set for each kind of batch.
    """

    def __init__(self, parts: Sequence[PairDataset]):
        self.parts = parts

    # pyrefly: ignore[bad-override-param-name]  what it is asked for is more than an index
    def __getitem__(self, request: ClipRequest) -> tuple[list[Clip], list[str]]:
        return self.parts[request.corpus][request]


def plan_mixed_batches(
    tables: Sequence[Dataset],
    batch_sizes: Sequence[int],
    seed: int,
    process_index: int = 0,
    num_processes: int = 1,
    start: int = 0,
) -> Iterator[list[ClipRequest]]:
    """Endless batches of one process, each from one table; at each step all processes take the same table.

    An epoch goes through every table once, in an order of batches that is drawn anew.

    Args:
        tables: Rows; no batch mixes two tables.
        batch_sizes: Rows per batch of a process, for each table.
        seed: Seed of the run.
        process_index: This process.
        num_processes: Processes.
        start: Batches to pass over, for a resumed run.

    Raises:
        ValueError: If a table is smaller than one batch of all processes.

    Source: the published loader of several media.
    """
    counts = [count_batches(table, size, num_processes) for table, size in zip(tables, batch_sizes, strict=True)]
    epoch, position = divmod(start, sum(counts))
    # All processes draw the same order: they gather vectors of one shape at every step.
    order = sample_table_order(counts, seed, epoch)
    # A resumed run starts each table where the batches before it left off.
    passed = Counter(order[:position])
    plans = [
        plan_batches(
            table,
            size,
            build_generator(seed, number).initial_seed(),  # else row i of all tables would be drawn alike
            process_index,
            num_processes,
            epoch * counts[number] + passed[number],
        )
        for number, (table, size) in enumerate(zip(tables, batch_sizes, strict=True))
    ]
    while True:
        for number in order[position:]:
            yield [ClipRequest(request.row, request.key, number) for request in next(plans[number])]
        epoch, position = epoch + 1, 0
        order = sample_table_order(counts, seed, epoch)


def sample_table_order(counts: Sequence[int], seed: int, epoch: int) -> list[int]:
    """Which table each batch of an epoch is from: all batches of all tables, shuffled.

    Args:
        counts: Batches of each table.
        seed: Seed of the run.
        epoch: Number of the epoch.
    """
    return shuffle_tables(counts, random.Random(build_generator(seed, epoch).initial_seed()))


def shuffle_tables(counts: Sequence[int], source: random.Random) -> list[int]:
    """The numbers 0, 1, ... of the tables, each as often as `counts` says, shuffled by `source`."""
    order = [number for number, count in enumerate(counts) for _ in range(count)]
    source.shuffle(order)
    return order
