"""Clips around a key frame, and what augmentation and the test view do to boxes."""

import numpy as np
import pytest
import torch

from umt_hf import UMTVideoConfig, UMTVideoProcessor
from umt_hf.moving_shapes.render import write_video
from umt_hf.processing.decoding import VideoDecodingError
from umt_hf.processing.detection_transforms import DetectionTransform, clamp_boxes, flip_boxes, prepare_test_clip
from umt_hf.processing.key_clips import read_key_clip
from umt_hf.processing.sampling import compute_key_frame_offsets
from umt_hf.training.clips import build_generator

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.2, 0.2]


def test_sampling_laws_are_the_published_ones():
    """Frames of a span whose key frame is in its middle."""
    assert [150 + i for i in compute_key_frame_offsets(8, "dense", frame_stride=8)] == list(range(121, 178, 8))
    spread = compute_key_frame_offsets(8, "segments", frame_span=300)
    assert [150 + i for i in spread] == [18, 56, 93, 131, 168, 206, 243, 281]
    assert [32 + i for i in compute_key_frame_offsets(8, "segments", frame_span=64)] == list(range(4, 61, 8))
    assert compute_key_frame_offsets(4, "dense", frame_stride=1) == [-2, -1, 0, 1]
    with pytest.raises(ValueError, match="'uniform'"):
        compute_key_frame_offsets(8, "uniform")


def write_grey_levels(path, levels):
    write_video(path, np.stack([np.full((32, 48, 3), level, dtype=np.uint8) for level in levels]))


def read_levels(source, offsets, **key) -> list[int]:
    """Number of each frame, which its grey level gives in steps of 8."""
    return np.round(read_key_clip(source, offsets, **key).mean(axis=(1, 2, 3)) / 8).astype(int).tolist()


@pytest.fixture(scope="module")
def movie(tmp_path_factory):
    """Frames 0 to 23 at 8 a second, as one file and as files of the seconds 7, 8 and 9."""
    folder = tmp_path_factory.mktemp("movie")
    levels = [8 * i for i in range(24)]
    write_grey_levels(folder / "movie.mp4", levels)
    (folder / "seconds").mkdir()
    for second, name in enumerate(("0007.mp4", "8.mp4", "0009.mp4")):
        write_grey_levels(folder / "seconds" / name, levels[8 * second : 8 * second + 8])
    return folder


def test_clips_of_a_whole_video(movie):
    video = str(movie / "movie.mp4")
    assert read_levels(video, [-5, 0, 3], key_seconds=1.25) == [5, 10, 13]
    assert read_levels(video, [-5, 0, 3], key_frame=10) == [5, 10, 13]
    assert read_levels(video, [0], key_seconds=1.26) == [11]  # the first frame that is not earlier
    assert read_levels(video, [-300, -1, 0, 300], key_seconds=0) == [0, 0, 0, 23]  # clamped at both ends
    assert read_levels(video, [-1, 0], key_seconds=2.99) == [22, 23]
    for key in ({"key_seconds": 3.1}, {"key_frame": 24}):
        with pytest.raises(VideoDecodingError, match="24 frames"):
            read_key_clip(video, [0], **key)
    with pytest.raises(ValueError, match="one of them"):
        read_key_clip(video, [0])


def test_clips_of_one_second_files(movie):
    folder = str(movie / "seconds")
    assert read_levels(folder, [-5, 0, 3, 7], key_seconds=8) == [3, 8, 11, 15]
    assert read_levels(folder, [-3, 12], key_seconds=8) == [5, 20]
    assert read_levels(folder, [-40, -9, -8, 40], key_seconds=8) == [0, 0, 0, 23]
    assert read_levels(folder, [-2, -1, 0], key_seconds=7) == [0, 0, 0]
    with pytest.raises(VideoDecodingError, match=r"no file 10\.mp4"):
        read_key_clip(folder, [0], key_seconds=10)
    with pytest.raises(ValueError, match="an integer"):
        read_key_clip(folder, [0], key_frame=3)
    (movie / "broken").mkdir()
    (movie / "broken" / "3.mp4").write_bytes(b"no video")
    with pytest.raises(VideoDecodingError, match=r"3\.mp4"):
        read_key_clip(str(movie / "broken"), [0], key_seconds=3)


def build_transform(**changes) -> DetectionTransform:
    still = {"hue_degrees": 0, "saturation": 0, "value": 0, "flip_probability": 0, "box_jitter": (0, 0, 0, 0)}
    return DetectionTransform(32, 40, MEAN, STD, **{**still, **changes})


def mark_box(box: list[int], height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames that are white in a box, and the box as shares."""
    frames = torch.zeros(2, 3, height, width, dtype=torch.uint8)
    frames[..., box[1] : box[3], box[0] : box[2]] = 255
    return frames, torch.tensor([box]) / torch.tensor([width, height, width, height])


def find_box(clip: torch.Tensor) -> list[int]:
    """First and last column and row of what is white in a normalised clip."""
    white = (clip * 0.2 + torch.tensor(MEAN).view(3, 1, 1) > 0.5)[0, 0]
    rows, columns = white.any(1).nonzero(), white.any(0).nonzero()
    return [int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])]


@pytest.mark.parametrize("flip", [0, 1])
def test_boxes_follow_resize_crop_and_flip(flip):
    frames, boxes = mark_box([24, 32, 64, 56], height=80, width=120)
    transform = build_transform(flip_probability=flip)
    for seed in range(8):
        clip, found, kept = transform(frames, boxes, build_generator(seed))
        assert clip.shape == (2, 3, 32, 32) and kept.tolist() == [0]
        torch.testing.assert_close(found[0], torch.tensor(find_box(clip), dtype=torch.float32), atol=1.01, rtol=0)
        assert found[0, 0] == 0 or find_box(clip)[0] == found[0, 0].round()


def test_boxes_out_of_the_crop_are_dropped():
    """In a 40 x 160 frame a crop of 32 columns never shows both ends."""
    frames = torch.zeros(1, 3, 40, 160, dtype=torch.uint8)
    boxes = torch.tensor([[0, 0.2, 0.05, 0.5], [0.95, 0.2, 1, 0.5]])
    seen = set()
    for seed in range(40):
        _, found, kept = build_transform()(frames, boxes, build_generator(seed))
        assert len(found) == len(kept) <= 1
        seen |= set(kept.tolist())
    assert seen == {0, 1}
    half = torch.tensor([[-8.0, 0, 8, 10], [0, 0, 8, 10], [100, 0, 110, 10]])
    shown = build_transform(min_visible_ratio=0.5).sample_crop(32, 32, half, build_generator(0))[2]
    assert shown.tolist() == [0, 1]
    assert build_transform(min_visible_ratio=0.6).sample_crop(32, 32, half, build_generator(0))[2].tolist() == [1]


def test_many_boxes_are_sampled_with_their_numbers():
    frames = torch.zeros(1, 3, 40, 40, dtype=torch.uint8)
    x = torch.linspace(0.3, 0.5, 30)
    boxes = torch.stack([x, torch.full_like(x, 0.3), x + 0.2, torch.full_like(x, 0.6)], dim=1)
    transform = build_transform(max_boxes=10)
    _, found, kept = transform(frames, boxes, build_generator(1))
    assert len(found) == len(kept) == len(set(kept.tolist())) == 10
    widths = boxes[kept, 0] * 40
    torch.testing.assert_close(found[:, 0] - found[0, 0], widths - widths[0])


def test_jitter_has_the_published_ranges():
    transform = DetectionTransform(224, 256, MEAN, STD)
    box = torch.tensor([[100.0, 80, 140, 160]]).repeat(5000, 1)
    moved = (transform.jitter(box, torch.rand(5000, 4, generator=build_generator(0))) - box) / torch.tensor(
        [40, 80, 40, 80]
    )
    low, high = moved.min(0).values, moved.max(0).values
    torch.testing.assert_close(low, torch.tensor([-0.2, -0.1, -0.1, -0.05]), atol=2e-3, rtol=0)
    torch.testing.assert_close(high, torch.tensor([0.1, 0.05, 0.2, 0.1]), atol=2e-3, rtol=0)


def test_colours_change_once_a_clip_and_within_their_range():
    transform = build_transform(hue_degrees=20, saturation=0.1, value=0.1)
    frames = torch.tensor([180, 60, 60], dtype=torch.uint8).view(1, 3, 1, 1).expand(3, 3, 4, 4).contiguous()
    assert torch.equal(transform.shift_colors(frames, 0, 0, 0), frames)
    brighter = transform.shift_colors(frames, 0, 0, 1).int()
    assert (brighter[:, 0] - 180 - 26).abs().max() <= 1
    hue = transform.shift_colors(frames, 1, 0, 0).int()
    # 20 degrees from red to yellow: a third of the way that green has to go.
    assert (
        (hue[:, 0] - 180).abs().max() <= 1 and (hue[:, 1] - 100).abs().max() <= 3 and (hue[:, 2] - 60).abs().max() <= 1
    )
    assert torch.equal(hue[0], hue[2])
    paler = transform.shift_colors(frames, 0, -1, 0).int()
    assert (paler[:, 0] - 180).abs().max() <= 1 and (paler[:, 1] - 78).abs().max() <= 2


def test_augmentation_hangs_on_its_key():
    frames = torch.randint(256, (2, 3, 50, 70), generator=build_generator(0), dtype=torch.uint8)
    transform, boxes = DetectionTransform(32, 40, MEAN, STD), torch.tensor([[0.2, 0.2, 0.8, 0.9]])
    first, again, other = (transform(frames, boxes, build_generator(key)) for key in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])
    with pytest.raises(ValueError, match="does not fit"):
        DetectionTransform(32, 31, MEAN, STD)


def test_published_test_view():
    """Short side 256, nothing cropped, zeros up to a multiple of the patch, boxes wider by 10 and 5 %."""
    processor = UMTVideoProcessor.from_model_config(UMTVideoConfig(), "detection")
    frames = torch.full((8, 3, 96, 128), 100, dtype=torch.uint8)
    clip, boxes = prepare_test_clip(frames, torch.tensor([[0.25, 0.25, 0.5, 0.75], [0, 0, 1, 1.0]]), processor, 16)
    assert clip.shape == (8, 3, 256, 352)
    assert clip[..., 341:].eq(0).all()
    expected = (torch.tensor([100.0] * 3) - torch.tensor([122.7717, 115.9465, 102.9801])) / 57.375
    torch.testing.assert_close(clip[0, :, 5, 5], expected, atol=1e-5, rtol=0)
    width = 341 / 4
    wanted = [width * (1 - 0.05), 64 - 128 * 0.025, width * 2.05 - 1, 192 + 128 * 0.025 - 1]
    torch.testing.assert_close(boxes[0], torch.tensor(wanted))
    torch.testing.assert_close(boxes[1], torch.tensor([0.0, 0, 340, 255]))


def test_small_helpers():
    assert flip_boxes(torch.tensor([[2.0, 3, 5, 7]]), 10).tolist() == [[5, 3, 8, 7]]
    cut = clamp_boxes(torch.tensor([[-3.0, 2, 4, 20], [12, 12, 15, 15], [4, 4, 4, 4]]), 10, 8)
    assert cut.tolist() == [[0, 2, 4, 10], [7, 9, 8, 10], [4, 4, 5, 5]]
