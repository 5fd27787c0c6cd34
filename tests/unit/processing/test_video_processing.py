import inspect
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoVideoProcessor, pipeline
from transformers.video_utils import VideoMetadata

from tests.unit.video_files import decode_in_order, rotate, write_kind, write_video
from umt_hf import UMTVideoConfig, UMTVideoForVideoClassification
from umt_hf.processing.decoding import VideoDecodingError
from umt_hf.processing.sampling import compute_spatial_crops, sample_frame_indices
from umt_hf.processing.video_processing_umt_video import UMTVideoProcessor

CROPS = json.loads((Path(__file__).parents[2] / "fixtures" / "single_modality" / "spatial_crops.json").read_text())[
    "test"
]["rows"]
MEAN, STD = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def path(folder):
    return write_video(folder / "clip.mp4")


@pytest.fixture(scope="module")
def frames(path):
    return np.stack(decode_in_order(path))


@pytest.fixture
def processor():
    return UMTVideoProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def process(processor, videos, **options) -> torch.Tensor:
    return processor(videos, return_tensors="pt", **options)["pixel_values"]


def counting_video(num_frames: int, height: int = 32, width: int = 32) -> np.ndarray:
    """Frame `i` is of grey level `i`."""
    return np.broadcast_to(np.arange(num_frames, dtype=np.uint8)[:, None, None, None], (num_frames, height, width, 3))


def read_levels(pixel_values: torch.Tensor) -> list[list[int]]:
    """Undo the normalisation of `counting_video`: the frame numbers of each view."""
    levels = ((pixel_values * STD + MEAN) * 255).round().long()
    assert (levels == levels[:, :, :1, :1, :1]).all()
    return levels[:, :, 0, 0, 0].tolist()


def test_every_kind_of_input_gives_the_same_pixels(processor, path, frames):
    expected = process(processor, str(path))
    assert expected.shape == (1, 8, 3, 32, 32) and expected.dtype == torch.float32
    content = path.read_bytes()
    channels_first = np.ascontiguousarray(frames.transpose(0, 3, 1, 2))
    pictures = [Image.fromarray(frame) for frame in frames]
    singles = [path, path.as_uri(), content, io.BytesIO(content), frames, channels_first, torch.from_numpy(frames)]
    singles += [torch.from_numpy(channels_first), pictures, list(frames), list(torch.from_numpy(frames))]
    singles += [tuple(pictures), frames.astype(np.int64)]
    for video in singles:
        assert torch.equal(process(processor, video), expected), type(video)
    for video in (frames.astype(np.float64), torch.from_numpy(frames).half()):  # resized without rounding to levels
        assert (process(processor, video) - expected).abs().max() < 1.01 / 255 / 0.224
    assert torch.equal(process(processor, singles), expected.expand(len(singles), -1, -1, -1, -1))
    assert torch.equal(process(processor, np.stack([frames, frames])), expected.expand(2, -1, -1, -1, -1))
    assert torch.equal(process(processor, [[str(path)], [str(path)]]), expected.expand(2, -1, -1, -1, -1))


def test_pixels_follow_the_published_steps(processor, frames):
    """Resize the short side without antialiasing, cut the middle, scale, normalise."""
    indices = sample_frame_indices(48, 8)
    clip = torch.from_numpy(frames[indices]).permute(0, 3, 1, 2).float()
    resized = torch.nn.functional.interpolate(clip, (32, 48), mode="bilinear", align_corners=False)
    expected = (resized[..., 8:40] / 255 - MEAN) / STD
    difference = (process(processor, frames)[0] - expected).abs().max()
    assert difference < 1.01 / 255 / 0.224  # pixels are rounded to integer levels after resizing


@pytest.mark.parametrize("strategy", ["uniform", "segments", "middle", "dense"])
@pytest.mark.parametrize("num_clips", [1, 2, 3])
@pytest.mark.parametrize("total", [3, 40])
def test_frames_follow_the_strategy(strategy, num_clips, total, processor):
    options = {"sampling_strategy": strategy, "num_clips": num_clips, "frame_stride": 3}
    views = read_levels(process(processor, counting_video(total), **options))
    assert views == [
        sample_frame_indices(total, 8, strategy, num_clips, clip, frame_stride=3) for clip in range(num_clips)
    ]


@pytest.mark.parametrize("strategy", ["uniform", "segments", "middle", "dense"])
def test_a_clip_of_just_the_right_length_is_kept(strategy, processor):
    assert read_levels(process(processor, counting_video(8), sampling_strategy=strategy)) == [list(range(8))]


def test_fps_chooses_by_time(processor, path, frames):
    metadata = {"fps": 24.0, "total_num_frames": 48}
    indices = sample_frame_indices(48, 8, "fps", fps=5, video_fps=24)
    assert len(indices) == 10
    expected = process(processor, frames[indices], do_sample_frames=False)
    assert torch.equal(process(processor, path, fps=5), expected)
    assert torch.equal(process(processor, frames, fps=5, video_metadata=metadata), expected)
    configured = UMTVideoProcessor(**{**processor.to_dict(), "fps": 5})
    assert torch.equal(process(configured, path), expected)
    assert process(configured, path, num_frames=4).shape[1] == 4
    with pytest.raises(ValueError, match="video_metadata"):
        process(processor, frames, fps=5)
    with pytest.raises(ValueError, match="mutually exclusive"):
        process(processor, path, fps=5, num_frames=4)
    with pytest.raises(ValueError, match="needs `fps`"):
        process(processor, path, sampling_strategy="fps")


def test_sampling_can_be_left_out(processor, path):
    assert process(processor, path, do_sample_frames=False).shape[1] == 48
    assert process(processor, counting_video(5), do_sample_frames=False, num_frames=3).shape[1] == 5
    with pytest.raises(ValueError, match="do_sample_frames"):
        process(processor, path, do_sample_frames=False, num_clips=2)


def test_short_videos_repeat_frames_unless_the_call_asks_for_too_many(processor):
    assert read_levels(process(processor, counting_video(3))) == [sample_frame_indices(3, 8)]
    with pytest.raises(ValueError, match=r"videos\[1\] has 3 frames .* num_frames=5"):
        process(processor, [counting_video(9), counting_video(3)], num_frames=5)


def test_views_are_clips_of_crops():
    """Position says where a pixel comes from: green its column, blue its row, red its frame."""
    height, width = 64, 100
    video = np.zeros((30, height, width, 3), np.uint8)
    video[..., 0] = np.arange(30)[:, None, None]
    video[..., 1] = np.arange(width)
    video[..., 2] = np.arange(height)[:, None]
    processor = UMTVideoProcessor(
        size=64, crop_size=64, num_clips=4, num_crops=3, image_mean=[0] * 3, image_std=[1] * 3
    )
    views = (process(processor, [video, video[:, :, ::-1].copy()]) * 255).round().long()
    assert views.shape == (2 * 4 * 3, 8, 3, 64, 64)
    boxes = compute_spatial_crops(height, width, 64, 3)
    for view, values in enumerate(views[:12]):
        clip, crop = divmod(view, 3)
        assert values[:, 0, 0, 0].tolist() == sample_frame_indices(30, 8, "uniform", 4, clip)
        top, left, _, right = boxes[crop]
        assert values[0, 1, 0].tolist() == list(range(left, right)) and values[0, 2, 0, 0] == top
    assert views[12, 0, 1, 0, 0] == width - 1  # the second, mirrored video begins here


@pytest.mark.parametrize("row", CROPS[::7], ids=lambda row: "-".join(map(str, row[:5])))
def test_crops_equal_the_published_ones(row):
    height, width, short_side, num_crops, crop, resized, box = row
    frame = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    processor = UMTVideoProcessor(size=short_side, crop_size=short_side, do_normalize=False, do_rescale=False)
    full = process(processor, frame, do_center_crop=False, num_frames=1)
    assert list(full.shape[-2:]) == resized
    top, left, bottom, right = box
    views = process(processor, frame, num_crops=num_crops, num_frames=1)
    assert torch.equal(views[crop], full[0, :, :, top:bottom, left:right])


def test_videos_of_different_sizes_share_a_batch(processor, path, frames):
    videos = [counting_video(10, 40, 90), str(path), counting_video(5, 33, 32).transpose(0, 3, 1, 2)]
    batch = process(processor, videos)
    assert batch.shape == (3, 8, 3, 32, 32)
    for video, result in zip(videos, batch, strict=True):
        assert torch.equal(process(processor, video)[0], result)
    with pytest.raises(ValueError, match="different shapes"):
        process(processor, videos, do_center_crop=False)
    apart = processor(videos, do_center_crop=False)["pixel_values"]
    assert [tuple(video.shape[-2:]) for video in apart] == [(32, 72), (32, 48), (33, 32)]


def test_grey_and_transparent_frames_become_rgb(processor):
    grey = np.random.default_rng(0).integers(0, 256, (12, 40, 50), dtype=np.uint8)
    expected = process(processor, np.repeat(grey[..., None], 3, -1))
    for video in (grey, grey[..., None], grey[:, None], list(grey), [Image.fromarray(frame) for frame in grey]):
        assert torch.equal(process(processor, video), expected)
    clear = np.zeros((8, 32, 32, 4), np.uint8)
    clear[:, :16, :, 3] = 255
    for video in (clear, [Image.fromarray(frame) for frame in clear]):
        pixels = process(processor, video, do_normalize=False)
        assert (pixels[..., :16, :] == 0).all() and (pixels[..., 16:, :] == 1).all()


def test_one_picture_is_a_video(processor):
    picture = counting_video(200)[99]
    for video in (picture, Image.fromarray(picture), picture[..., 0]):
        assert read_levels(process(processor, video)) == [[99] * 8]


def test_awkward_files(processor, folder, path):
    upright = rotate(path, folder / "turned.mp4", 1)
    assert torch.equal(process(processor, upright), process(processor, np.stack(decode_in_order(upright))))
    for kind in ("variable_rate", "one_frame", "grey", "odd_size", "vp9", "mpeg4_avi"):
        video = write_kind(kind, folder)
        assert torch.equal(process(processor, video), process(processor, np.stack(decode_in_order(video))))


def test_decoders_by_name(processor, path):
    pytest.importorskip("decord", reason="decord has no wheel here")
    assert torch.equal(process(processor, path, decoder="decord"), process(processor, path))
    with pytest.raises(ValueError, match="'opencv'"):
        process(processor, path, decoder="opencv")


def test_broken_files_are_named(processor, path, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(path.read_bytes()[:-200])
    for video in (broken, [path, str(broken)]):
        with pytest.raises(VideoDecodingError, match="broken.mp4: is cut short"):
            process(processor, video)


def spoiled(value: float) -> np.ndarray:
    video = counting_video(8).astype(np.float32)
    video[3, 2, 1, 0] = value
    return video


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (spoiled(np.nan), r"videos\[1\] holds NaN"),
        (torch.from_numpy(spoiled(-np.inf)), r"videos\[1\] holds NaN or infinite"),
        (np.full((8, 32, 32, 3), 300), r"videos\[1\] has pixels from 300 to 300"),
        (np.zeros((8, 32, 32, 3), bool), r"videos\[1\] has pixels of type bool"),
        (np.zeros((8, 32, 32, 5), np.uint8), r"videos\[1\] has shape \(8, 32, 32, 5\)"),
        (np.zeros((0, 32, 32, 3), np.uint8), r"videos\[1\] is empty: it has no frames"),
        (np.zeros((8, 0, 32, 3), np.uint8), r"videos\[1\] is empty"),
        ([np.zeros((32, 32, 3), np.uint8), np.zeros((32, 30, 3), np.uint8)], r"videos\[1\] has frames of different"),
        (np.zeros((8, 32, 32, 4), np.float32), r"videos\[1\] has 4 floating-point channels"),
        (3.5, "got float"),
        ([], "empty list"),
    ],
)
def test_malformed_videos_are_named_and_explained(video, message, processor):
    with pytest.raises(ValueError, match=message):
        process(processor, [counting_video(8), video])


def test_more_wrong_shapes(processor):
    with pytest.raises(ValueError, match="2 to 5 dimensions"):
        process(processor, np.zeros(5, np.uint8))
    with pytest.raises(ValueError, match="nested too deep"):
        process(processor, [[["a.jpg", "b.jpg"]]])
    with pytest.raises(ValueError, match="2 videos but 1 video_metadata"):
        process(processor, [counting_video(8)] * 2, video_metadata=[{"fps": 1.0}])
    with pytest.raises(ValueError, match=r"videos\[0\] has 8 frames and its metadata says 9"):
        process(processor, counting_video(8), video_metadata={"total_num_frames": 9})
    with pytest.raises(ValueError, match="does not fit"):
        process(processor, counting_video(8), num_crops=3, crop_size={"height": 64, "width": 64})


def test_frames_scaled_twice_are_warned_of(processor, frames, monkeypatch):
    warnings = []
    logger = inspect.getmodule(UMTVideoProcessor).logger
    monkeypatch.setattr(type(logger), "warning_once", lambda self, message: warnings.append(message), raising=False)
    scaled = process(processor, frames.astype(np.float32) / 255, do_rescale=False)
    assert not warnings
    assert (scaled - process(processor, frames)).abs().max() < 1.01 / 255 / 0.224
    process(processor, frames.astype(np.float32) / 255)
    assert "do_rescale=False" in warnings[0]


def test_metadata_is_returned_on_request(processor, path, frames):
    batch = processor([path, frames], return_metadata=True, return_tensors="pt")
    of_file, of_array = batch["video_metadata"]
    assert (of_file.total_num_frames, of_file.fps, of_file.duration, of_file.video_backend) == (48, 24.0, 2.0, "pyav")
    for metadata in (of_file, of_array):
        assert (metadata.height, metadata.width) == (64, 96)
        assert list(metadata.frames_indices) == sample_frame_indices(48, 8)
    assert "video_metadata" not in processor(path)


def test_fetch_videos_needs_no_torchcodec(processor, path, frames):
    video, metadata = processor.fetch_videos(str(path))
    assert isinstance(metadata, VideoMetadata)
    np.testing.assert_array_equal(video, frames)
    videos, _ = processor.fetch_videos([str(path)] * 2, sample_indices_fn=lambda metadata: [0, 47])
    np.testing.assert_array_equal(videos[1], frames[[0, 47]])


def test_settings_survive_saving(path, tmp_path):
    settings = {
        "num_frames": 4,
        "sampling_strategy": "dense",
        "frame_stride": 2,
        "num_clips": 2,
        "num_crops": 3,
        "decoder": "decord",
    }
    processor = UMTVideoProcessor(size=40, crop_size=40, **settings)
    processor.save_pretrained(tmp_path)
    loaded = AutoVideoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is UMTVideoProcessor and loaded.to_dict() == processor.to_dict()
    assert {name: getattr(loaded, name) for name in settings} == settings
    changed = AutoVideoProcessor.from_pretrained(tmp_path, decoder="pyav", num_clips=1)
    assert process(changed, path).shape == (3, 4, 3, 40, 40)


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    config = UMTVideoConfig(
        image_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_frames=4,
        id2label={0: "left", 1: "right", 2: "still"},
        label2id={"left": 0, "right": 1, "still": 2},
    )
    torch.manual_seed(0)
    model = UMTVideoForVideoClassification(config)
    model.classifier.weight.data.normal_()  # as initialised, all classes are about equally likely
    model.save_pretrained(folder)
    UMTVideoProcessor(num_frames=4, size=32, crop_size=32).save_pretrained(folder)
    return folder


def expected_scores(folder, video) -> dict[str, float]:
    processor = AutoVideoProcessor.from_pretrained(folder)
    model = UMTVideoForVideoClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        scores = model(**processor(video, return_tensors="pt")).logits[0].softmax(-1)
    return {model.config.id2label[i]: score for i, score in enumerate(scores.tolist())}


@pytest.mark.skipif(
    "video_processor" not in inspect.signature(pipeline).parameters,
    reason="the pipeline of this Transformers reads videos by itself and knows image processors only",
)
def test_pipeline_answers_for_files(classifier_folder, path, folder, tmp_path):
    classify = pipeline("video-classification", model=str(classifier_folder))
    other = write_kind("variable_rate", folder)
    answers = classify([str(path), str(other)], top_k=3)
    for video, answer in zip((path, other), answers, strict=True):
        scores = expected_scores(classifier_folder, video)
        assert {entry["label"]: entry["score"] for entry in answer} == pytest.approx(scores, abs=1e-5)
    assert classify(str(path), top_k=1)[0]["label"] == max(
        scores := expected_scores(classifier_folder, path), key=scores.get
    )
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(VideoDecodingError, match="broken.mp4"):
        classify(str(broken))


@pytest.mark.skipif(
    "video_processor" in inspect.signature(pipeline).parameters, reason="the pipeline takes the video processor itself"
)
def test_older_pipeline_takes_the_processor_for_its_frames(classifier_folder, path, frames):
    processor = AutoVideoProcessor.from_pretrained(classifier_folder)
    classify = pipeline("video-classification", model=str(classifier_folder), image_processor=processor)
    answer = classify(str(path), frame_sampling_rate=10, top_k=3)
    scores = expected_scores(classifier_folder, frames[np.linspace(0, 39, 4).astype(int)])
    assert {entry["label"]: entry["score"] for entry in answer} == pytest.approx(scores, abs=1e-5)


def test_a_file_whose_rate_asks_for_too_many_frames_is_named(tmp_path):
    path = write_video(tmp_path / "slow.mp4", num_frames=3)
    with pytest.raises(VideoDecodingError, match=r"slow\.mp4: <video of 3 frames at 24 per second>: 125000 frames"):
        UMTVideoProcessor(fps=1e6)(str(path))


@pytest.mark.parametrize("shape", [(0, 8, 8, 3), (0, 0, 0), (0, 8, 8), (0, 2, 8, 8, 3)])
def test_videos_without_frames_are_named(shape):
    """Found by properties: a list index out of range, and the name of an argument that nobody gave."""
    with pytest.raises(ValueError, match="is empty|Got an empty batch"):
        UMTVideoProcessor()(np.zeros(shape, np.uint8), return_tensors="pt")


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64", "int8", "int64"])
def test_every_type_of_integers_is_read_or_named(dtype):
    """Found by properties: PyTorch has no minimum of 16 unsigned bits, and said so."""
    processor = UMTVideoProcessor(num_frames=2, size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    video = np.full((2, 8, 8, 3), 100)
    expected = processor(video.astype(np.uint8), return_tensors="pt")["pixel_values"]
    for form in (video.astype(dtype), torch.from_numpy(video.astype(dtype)), list(video.astype(dtype))):
        torch.testing.assert_close(processor(form, return_tensors="pt")["pixel_values"], expected)
    if dtype != "int8":
        with pytest.raises(ValueError, match="has pixels from 300 to 300; integers are in 0..255"):
            processor((3 * video).astype(dtype), return_tensors="pt")


def test_a_number_that_float32_does_not_hold_is_not_a_pixel():
    """Found by properties: 1e300 passed as finite and became infinite afterwards."""
    with pytest.raises(ValueError, match="holds NaN or infinite pixels"):
        UMTVideoProcessor(num_frames=2)(np.full((2, 8, 8, 3), 1e300), return_tensors="pt")
