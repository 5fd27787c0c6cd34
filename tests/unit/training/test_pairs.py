"""Videos and images with captions: which kind comes when, whole rows, ids, and what a batch holds."""

import io
import json
import random
from itertools import islice
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from PIL import Image

from umt_hf.data.annotations import compute_pair_id
from umt_hf.finetuning.retrieval import CaptionCollator
from umt_hf.moving_shapes.render import write_moving_shapes
from umt_hf.processing.decoding import VideoDecodingError
from umt_hf.processing.train_transforms import ResizedCropTransform
from umt_hf.training.clips import ClipRequest
from umt_hf.training.order import StepShape, count_steps, plan_mixed_batches, shuffle_tables
from umt_hf.training.pairs import (
    MixedCorpora,
    PairCollator,
    PairDataset,
    read_image,
)
from umt_hf.training.stage2 import warn_of_single_ids

ORDERS = json.loads((Path(__file__).parents[2] / "fixtures/multi_modality/meta_loader.json").read_text())["rows"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    write_moving_shapes(folder, num_train_clips=6, num_validation_clips=1, num_test_clips=1)
    return folder


def build_table(rows: list[tuple[str, str]], corpus: int = 0) -> Dataset:
    return Dataset.from_list([{"video": v, "caption": c, "corpus": corpus} for v, c in rows])


def build_dataset(table: Dataset, media_type: str = "video", **options) -> PairDataset:
    num_frames = 1 if media_type == "image" else 4
    return PairDataset(
        table,
        media_type,
        transform=ResizedCropTransform(32),
        num_frames=num_frames,
        num_tokens=4 * num_frames,
        **options,
    )


@pytest.mark.parametrize("case", ORDERS, ids=lambda case: str(case["python_random_seed"]))
def test_media_are_interleaved_as_published(case):
    names = list(case["lengths"])
    order = shuffle_tables(list(case["lengths"].values()), random.Random(case["python_random_seed"]))
    assert [names[number] for number in order] == case["order"]


def list_requests(plan, count: int) -> list[list[ClipRequest]]:
    return [batch.requests for batch in islice(plan, count)]


def test_all_processes_take_the_same_kind_of_media():
    tables = [Dataset.from_dict({"row": list(range(n))}) for n in (23, 41)]
    sizes = [4, 3]
    counts = [count_steps(table, size, StepShape(2)) for table, size in zip(tables, sizes, strict=True)]
    plans = [list_requests(plan_mixed_batches(tables, sizes, 7, StepShape(2, i)), 3 * sum(counts)) for i in (0, 1)]
    for one, other in zip(*plans, strict=True):
        assert {request.corpus for request in one} == {request.corpus for request in other}
        assert len({request.corpus for request in one}) == 1
        assert len(one) == len(other) == sizes[one[0].corpus]
    for epoch in range(3):
        batches = [batch for plan in plans for batch in plan[epoch * sum(counts) : (epoch + 1) * sum(counts)]]
        for number, table in enumerate(tables):
            rows = [request.row for batch in batches for request in batch if request.corpus == number]
            assert len(rows) == len(set(rows)) == 2 * counts[number] * sizes[number] <= len(table)
    orders = [[batch[0].corpus for batch in plans[0][e * sum(counts) : (e + 1) * sum(counts)]] for e in range(3)]
    assert orders[0] != orders[1] or orders[1] != orders[2]


@pytest.mark.parametrize("start", [1, 5, 8, 19])
def test_resumed_plan_goes_on_where_it_was(start):
    tables = [Dataset.from_dict({"row": list(range(n))}) for n in (10, 12)]
    whole = list(islice(plan_mixed_batches(tables, [2, 4], 0), start + 12))
    position = whole[start - 1].position
    assert list(islice(plan_mixed_batches(tables, [2, 4], 0, position=position), 12)) == whole[start:]


def test_rows_of_two_tables_are_drawn_apart():
    tables = [Dataset.from_dict({"row": list(range(8))}) for _ in range(2)]
    keys = {request.key for batch in list_requests(plan_mixed_batches(tables, [2, 2], 0), 8) for request in batch}
    assert len(keys) == 16


def test_an_unreadable_video_takes_its_caption_along(shapes, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    good = sorted(str(path) for path in (shapes / "videos/train").iterdir())
    captions = {name: f"caption of {name}" for name in [*good, str(broken)]}
    dataset = build_dataset(build_table(list(captions.items())))
    index = len(good)
    clips, failures = dataset[ClipRequest(index, (0, 0, index))]
    assert len(failures) >= 1 and "broken.mp4" in failures[0]
    (clip,) = clips
    (name,) = [name for name, caption in captions.items() if caption == clip.caption]
    assert name != str(broken) and clip.pair_id == compute_pair_id(0, name)
    (again,) = dataset._read_clips({"video": name, "caption": clip.caption, "corpus": 0}, (0, 0, index))
    assert torch.equal(again.frames, clip.frames)  # the frames are that row's too


def test_pair_ids_by_media_and_by_caption(shapes):
    names = sorted(str(path) for path in (shapes / "videos/train").iterdir())[:2]
    table = build_table([(names[0], "x"), (names[0], "y"), (names[1], "x")], corpus=3)
    ids = [build_dataset(table)[ClipRequest(i, (0, i))][0][0].pair_id for i in range(3)]
    assert ids[0] == ids[1] != ids[2] and ids[0] == compute_pair_id(3, names[0])
    ids = [build_dataset(table, pair_by="caption")[ClipRequest(i, (0, i))][0][0].pair_id for i in range(3)]
    assert ids[0] == ids[2] != ids[1]


def test_captions_of_one_image_in_bytes_are_true_pairs(tmp_path):
    """Five captions of an image whose rows hold bytes: none is a negative of another, in either wing of training."""
    content = []
    for grey in (10, 200):
        file = io.BytesIO()
        Image.new("RGB", (40, 24), (grey, grey, grey)).save(file, "PNG")
        content.append(file.getvalue())
    rows = [
        {"video": {"path": None, "bytes": content[number // 5]}, "caption": f"text {number}", "corpus": 2}
        for number in range(10)
    ]
    images = build_dataset(Dataset.from_list(rows), "image")
    ids = [images[ClipRequest(number, (0, 0, number))][0][0].pair_id for number in range(10)]
    assert len(set(ids[:5])) == len(set(ids[5:])) == 1 and ids[0] != ids[5]
    # A streamed row carries itself, and its number is that of the stream.
    assert images[ClipRequest(rows[7], (0, 0, 3, 1))][0][0].pair_id == ids[5]
    collator = CaptionCollator(processor=None, pair_by_caption=False)
    ids = [collator.identify({"row": row, "number": number}) for number, row in enumerate(rows)]
    assert len(set(ids[:5])) == len(set(ids[5:])) == 1 and ids[0] != ids[5]


def test_images_are_clips_of_one_frame(tmp_path):
    """Grey, transparent, turned by EXIF, from a path or from bytes."""
    pixels = Image.new("RGB", (40, 24), (200, 10, 10))
    pixels.save(tmp_path / "a.png")
    pixels.convert("L").save(tmp_path / "grey.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(str(tmp_path / "a.png")).shape == (1, 3, 24, 40)
    assert read_image(str(tmp_path / "a.png"))[0, :, 3, 3].tolist() == [200, 10, 10]
    assert read_image((tmp_path / "grey.jpg").read_bytes()).shape == (1, 3, 24, 40)
    assert read_image(str(tmp_path / "turned.jpg")).shape == (1, 3, 40, 24)
    content = io.BytesIO()
    pixels.save(content, format="jpeg")
    (tmp_path / "short.jpg").write_bytes(content.getvalue()[:300])
    for bad in ("short.jpg", "missing.jpg"):
        with pytest.raises(VideoDecodingError, match=bad):
            read_image(str(tmp_path / bad))


def test_batches_hold_one_kind_of_media(shapes, tmp_path):
    Image.new("RGB", (40, 24)).save(tmp_path / "a.png")
    videos = build_table([(str(p), "video") for p in (shapes / "videos/train").iterdir()])
    images = build_table([(str(tmp_path / "a.png"), f"image {i}") for i in range(4)], corpus=1)
    corpora = MixedCorpora([build_dataset(images, "image"), build_dataset(videos)])

    def tokenize(text: list[str], return_tensors: str) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[len(each)] for each in text])}

    collate = PairCollator(ResizedCropTransform(32), True, tokenize)
    shapes_of_kinds = {0: (2, 1, 3, 32, 32), 1: (3, 4, 3, 32, 32)}
    seen = set()
    for requests in list_requests(plan_mixed_batches([images, videos], [2, 3], 0), 4):
        batch = collate([corpora[request] for request in requests])
        assert tuple(batch["pixel_values"].shape) == shapes_of_kinds[requests[0].corpus]
        assert batch["num_videos"] == len(requests) == len(batch["input_ids"]) == len(batch["pair_ids"])
        assert batch["mask_noise"].shape == (len(requests), 4 * batch["pixel_values"].shape[1])
        seen.add(requests[0].corpus)
    assert seen == {0, 1}


def test_a_batch_of_one_id_is_said_once_where_the_model_does_not_look(caplog):
    batches = [{"pair_ids": torch.tensor(ids)} for ids in ([1, 2], [3, 3], [4, 4])]
    assert list(warn_of_single_ids(batches)) == batches
    assert caplog.text.count("A batch of a single pair id has no negatives: its matching loss is 0.") == 1
