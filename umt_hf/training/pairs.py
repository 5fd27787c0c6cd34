"""Videos and images with captions to training batches, in which every process has the same kind of media.

As in `clips`, every random choice for a row depends only on a key, so the number of workers does not change batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..data.annotations import CaptionMode, compute_pair_id, identify_video, name_video
from ..processing.images import read_image
from ..processing.media_files import VideoDecodingError, VideoSource
from ..processing.processing_umt_video_text import UMTVideoTextProcessor
from ..processing.train_transforms import ResizedCropTransform
from .clips import Clip, ClipCollator, ClipDataset, ClipRequest
from .corpora import TrainingTable, build_generator

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
        captions: What a list of captions in a row of a shard is (see `choose_caption`).
        **options: As for `ClipDataset`.
    """

    def __init__(
        self,
        table: TrainingTable,
        media_type: MediaType,
        pair_by: Literal["media", "caption"] = "media",
        captions: CaptionMode = "single",
        **options: Any,
    ):
        # The published strategy for training on videos with text.
        super().__init__(table, sampling_strategy="middle", **options)
        self.media_type, self.pair_by, self.captions = media_type, pair_by, captions

    def _read_clips(self, row: dict[str, Any], key: tuple[int, ...]) -> list[Clip]:
        text = choose_caption(row["caption"], self.captions, key, name_video(row["video"], key[-1]))
        # The corpus is a part of the id: equal captions in two corpora are not known to mean the same.
        name = text if self.pair_by == "caption" else identify_video(row["video"], key[-1])
        pair_id = compute_pair_id(row["corpus"], name)
        return [PairedClip(**vars(clip), caption=text, pair_id=pair_id) for clip in super()._read_clips(row, key)]

    def _read_frames(self, source: VideoSource, generator: torch.Generator) -> torch.Tensor:
        return read_image(source) if self.media_type == "image" else super()._read_frames(source, generator)


def choose_caption(caption: str | list[str] | None, captions: CaptionMode, key: tuple[int, ...], name: str) -> str:
    """The text of a row.

    Args:
        caption: As stored; tables have a text in every row, shards may have a list.
        captions: What a list is: an error unless it has one text ("single"), texts of which one is drawn each time
            ("each"), or the sentences of one text ("paragraph").
        key: Of the row's random choices.
        name: What an error calls the row.

    Raises:
        VideoDecodingError: If there is no text, or a list where a single one is expected.
    """
    texts = [caption] if isinstance(caption, str) else caption
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise VideoDecodingError(f"{name}: has no caption. Fill it in.")
    if len(texts) == 1:
        return texts[0]
    if captions == "paragraph":
        return " ".join(texts)
    if captions == "single":
        raise VideoDecodingError(
            f"{name}: has {len(texts)} captions. Say what they are: captions=each draws one each time, "
            "captions=paragraph joins them."
        )
    # A source apart from that of the clip, whose draws are those of a row with one caption.
    return texts[int(torch.randint(len(texts), (), generator=build_generator(*key, -2)))]


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
