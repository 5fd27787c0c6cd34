"""Rows that cannot be read, in every data set of training clips: a counted, named skip, never the end of a run."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from tests.unit.processing.test_untrusted_files import MALFORMED_ADDRESSES, NUMPY_KINDS, write_numpy
from tests.unit.shard_files import write_tar
from tests.unit.video_files import write_video
from umt_hf import UMTVideoProcessor
from umt_hf.data.annotations import load_pairs, load_retrieval_set
from umt_hf.data.key_frames import KeyFrame, build_key_frame_table
from umt_hf.data.sources import get_source
from umt_hf.data.streams import load_shards
from umt_hf.finetuning.classification import LabeledClips
from umt_hf.finetuning.detection import BoxedClips
from umt_hf.finetuning.retrieval import RetrievalDataArguments
from umt_hf.finetuning.trainer import VideoTextClips
from umt_hf.processing.classification_transforms import ClassificationTransform
from umt_hf.processing.decoding import VideoDecodingError
from umt_hf.processing.detection_transforms import DetectionTransform
from umt_hf.processing.train_transforms import PretrainingTransform, ResizedCropTransform
from umt_hf.runs.arguments import CropArguments
from umt_hf.training.arguments import CorpusArguments, DataArguments
from umt_hf.training.clips import ClipCollator, ClipDataset, ClipRequest
from umt_hf.training.pairs import PairDataset
from umt_hf.training.stage1 import load_corpus_rows
from umt_hf.training.stage2 import load_corpus

MEDIA = Path(__file__).parents[2] / "fixtures" / "media"
PLAYLIST = b"#EXTM3U\n#EXTINF:1,\n/nowhere.ts\n#EXT-X-ENDLIST\n"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    return write_video(tmp_path_factory.mktemp("good") / "good.mp4").read_bytes()


def list_bad_rows(folder: Path) -> list[dict | None]:
    """Values of a `video` column that hold no readable video."""
    rows: list[dict | None] = [
        None,
        {"bytes": None, "path": None},
        {"bytes": b"", "path": None},
        {"bytes": b"", "path": ""},
    ]
    rows += [{"bytes": content, "path": None} for content in (b"text", PLAYLIST, (MEDIA / "i_sdp.mp4").read_bytes())]
    rows += [
        {"bytes": None, "path": address} for address in [*MALFORMED_ADDRESSES, "nowhere.mp4", str(folder), "a\x00b"]
    ]
    for kind in NUMPY_KINDS:
        (folder / kind).mkdir(exist_ok=True)
        rows.append({"bytes": None, "path": str(write_numpy(folder / kind / "clip.npy", kind))})
    return rows


def build_data_sets(rows: list[dict | None], media_type: str = "video") -> dict:
    """Every data set of training clips, by name."""
    table = Dataset.from_list([{"video": row, "label": 0, "caption": "a", "corpus": 0} for row in rows])
    processor = UMTVideoProcessor(num_frames=4)
    detector = UMTVideoProcessor(num_frames=4, sampling_strategy="dense", frame_stride=2, frame_span=20)
    frames = [
        KeyFrame(row, str(i), "0", key_frame=0, boxes=[[0, 0, 1, 1]], labels=[[0]], width=1, height=1)
        for i, row in enumerate(rows)
        if isinstance(row, str)
    ]
    sets = {
        "stage 1": ClipDataset(table, PretrainingTransform(32), 4, 16),
        "stage 2": PairDataset(table, media_type, transform=ResizedCropTransform(32), num_frames=4, num_tokens=16),
        "classification": LabeledClips(table, processor, ClassificationTransform(32), seed=3),
        "video-text": VideoTextClips(
            table, RetrievalDataArguments(num_frames=4), CropArguments(), image_size=32, seed=3
        ),
    }
    if len(frames) == len(rows):
        transform = DetectionTransform(32, 36, processor.image_mean, processor.image_std)
        sets["detection"] = BoxedClips(build_key_frame_table(frames), detector, transform, 1, seed=3)
    return sets


def read_sample(data_set, row: int) -> tuple[bool, list[str]]:
    """Whether a clip came back, and the reasons of rows that could not be read."""
    if isinstance(data_set, ClipDataset):
        clips, failures = data_set[ClipRequest(row, (0, 0, row))]
        return bool(clips), failures
    sample = data_set[row]
    return "pixel_values" in sample, sample["failures"]


def test_rows_that_cannot_be_read_are_counted_skips(good, tmp_path):
    bad = list_bad_rows(tmp_path)
    for number, row in enumerate(bad):
        # Enough good rows that a replacement is found.
        for name, data_set in build_data_sets([row, *[{"bytes": good, "path": None}] * 9]).items():
            is_read, failures = read_sample(data_set, 0)
            assert is_read, (number, row, name)
            assert failures and all(": " in failure for failure in failures), (row, name)


def test_a_stage_2_row_without_caption_is_a_skip(good):
    rows = [{"video": {"bytes": good, "path": None}, "caption": text, "corpus": 0} for text in (None, *"abcdefghi")]
    clips = PairDataset(
        Dataset.from_list(rows), "video", transform=ResizedCropTransform(32), num_frames=4, num_tokens=16
    )
    assert read_sample(clips, 0)[0] and "has no caption" in read_sample(clips, 0)[1][0]


BAD_TEXTS = [
    {"txt": b"\xff\xfe\xfa"}, {"json": b"\xff"}, {"json": b'{"caption": '}, {"json": b""}, {"json": b"[1, 2]"},
    {"json": b'{"caption": null}'}, {"json": b'{"caption": 5}'}, {"json": b'{"caption": ["a", 5]}'},
    {"json": b'{"caption": []}'}, {"json": b'{"label": 1}'}, {"json": b"[" * 100_000},
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_TEXTS, ids=lambda text: str(text)[:24])
def test_a_text_in_a_tar_that_cannot_be_read_is_a_skip_of_stage_2_and_nothing_to_stage_1(good, tmp_path, text):
    tar = write_tar(tmp_path / "a.tar", [{"mp4": good, **text}, *[{"mp4": good, "txt": "fine"}] * 9])
    shards = load_shards(str(tar), needs_captions=True, extra={"corpus": 0})
    options = {"num_frames": 4, "num_tokens": 16}
    is_read, failures = read_sample(PairDataset(shards, "video", transform=ResizedCropTransform(32), **options), 0)
    assert is_read and failures and all("a.tar/a_0000.mp4: " in line for line in failures)
    mute = load_corpus_rows(str(tar), "train", DataArguments(train_data=str(tar)), is_sharded=True)
    assert read_sample(ClipDataset(mute, PretrainingTransform(32), **options), 0) == (True, [])


def test_a_shard_that_has_changed_is_a_skip(good, tmp_path):
    tar = write_tar(tmp_path / "a.tar", [{"mp4": good}] * 9)
    shards = load_shards(str(tar))
    last, content = int(shards.index[-1]["offset"]), tar.read_bytes()
    tar.write_bytes(content[: last + 9])
    clips = ClipDataset(shards, PretrainingTransform(32), 4, 16)
    is_read, failures = read_sample(clips, 8)
    assert is_read and "a.tar, row 8: the shard has changed" in failures[0]
    clips.is_training = False
    assert read_sample(clips, 8)[0] is False


@pytest.mark.parametrize("form", ["json", "jsonl", "parquet", "streamed", "saved"])
def test_rows_of_tables_without_a_caption_are_counted_skips(good, tmp_path, form):
    (tmp_path / "good.mp4").write_bytes(good)
    rows = [{"video": str(tmp_path / "good.mp4"), "caption": text} for text in (None, *"abcdefghi")]
    source = str(tmp_path / f"list.{'parquet' if form == 'streamed' else form}")
    if form == "json":
        Path(source).write_text(json.dumps(rows))
    elif form == "jsonl":
        Path(source).write_text("\n".join(map(json.dumps, rows)))
    elif form == "saved":
        Dataset.from_list(rows).save_to_disk(source)
    else:
        Dataset.from_list(rows).to_parquet(source)
    for captions in ("single", "each", "paragraph"):
        data = CorpusArguments(train_corpora=[source], captions=captions)
        table = load_corpus(data, 0, is_sharded=form == "streamed")
        clips = PairDataset(
            table, "video", captions=captions, transform=ResizedCropTransform(32), num_frames=4, num_tokens=16
        )
        assert len(clips) == 10
        tuned = VideoTextClips(table, RetrievalDataArguments(num_frames=4), CropArguments(), image_size=32, seed=3)
        for data_set in (clips, tuned):
            is_read, failures = read_sample(data_set, 0)
            assert is_read and "has no caption. Fill it in." in failures[0], (form, captions)


@pytest.mark.parametrize("captions", [[5, 6], [[5], [6]], [{"text": "a"}] * 2, [None, None], [True, False]])
def test_a_column_of_captions_of_another_type_is_refused_at_the_start(tmp_path, captions):
    (tmp_path / "list.json").write_text(json.dumps([{"video": "a.mp4", "caption": text} for text in captions]))
    with pytest.raises(ValueError, match=r"list\.json: .*caption"):
        load_pairs(str(tmp_path / "list.json"))
    with pytest.raises(ValueError, match=r"list\.json: .*caption"):
        load_retrieval_set(str(tmp_path / "list.json"))


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (2, 4096)])
def test_tiny_videos_and_strips_are_trained_on(size, tmp_path):
    np.save(tmp_path / "tiny.npy", np.full((12, *size, 3), 90, np.uint8))
    rows = [str(tmp_path / "tiny.npy")] * 2
    if size == (1, 1):
        rows[1] = str(MEDIA / "b_vp9_1x1.webm")
    for name, data_set in build_data_sets(rows).items():
        for row in range(2):
            assert read_sample(data_set, row) == (True, []), name
    stage_1 = build_data_sets(rows)["stage 1"]
    samples = [stage_1[ClipRequest(row, (0, 0, row))] for row in (0, 1)]
    batch = ClipCollator(PretrainingTransform(32), use_worker=True)(samples)
    assert batch["pixel_values"].shape == (2, 4, 3, 32, 32) and batch["pixel_values"].isfinite().all()


def test_images_that_cannot_be_read_are_counted_skips(tmp_path):
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(content, "PNG")
    bad = [None, {"bytes": b"", "path": None}, {"bytes": b"x", "path": None}]
    bad += [{"bytes": None, "path": str(MEDIA / name)} for name in ("eps.jpg", "float.tiff", "c_hflip.mp4")]
    bad += [{"bytes": None, "path": address} for address in MALFORMED_ADDRESSES]
    for row in bad:
        clips = build_data_sets([row, *[{"bytes": content.getvalue(), "path": None}] * 9], "image")["stage 2"]
        is_read, failures = read_sample(clips, 0)
        assert is_read and failures, row


def test_a_row_without_a_video_is_named():
    for row in (None, {}, {"bytes": b"", "path": None}, ""):
        with pytest.raises(VideoDecodingError, match="has neither a path nor bytes"):
            get_source(row)
    assert get_source({"bytes": b"x", "path": "y"}) == b"x" and get_source({"bytes": b"", "path": "y"}) == "y"


def test_a_strip_is_read_by_the_processor_of_held_out_videos(tmp_path):
    np.save(tmp_path / "tiny.npy", np.full((12, 1, 1, 3), 90, np.uint8))
    clips = UMTVideoProcessor()(tmp_path / "tiny.npy", return_tensors="pt")["pixel_values"]
    assert clips.shape == (1, 8, 3, 224, 224) and torch.unique(clips[0, 0, 0]).numel() == 1
