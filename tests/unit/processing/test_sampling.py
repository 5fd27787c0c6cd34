import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from umt_hf.processing.sampling import (
    compute_resized_size,
    compute_spatial_crops,
    place_crops,
    sample_frame_indices,
    trim_num_frames,
)

FIXTURES = Path(__file__).parents[2] / "fixtures"


def load_rows(file: str, table: str) -> list[list]:
    return json.loads((FIXTURES / file).read_text())[table]["rows"]


PUBLISHED = "single_modality/frame_sampling.json"
VINDLU = "multi_modality/frame_indices.json"
CROPS = "single_modality/spatial_crops.json"


def test_uniform_test_clips_equal_the_published_ones():
    for total, n, num_clips, clip, indices in load_rows(PUBLISHED, "kinetics_sparse_test"):
        assert sample_frame_indices(total, n, "uniform", num_clips, clip) == indices


def test_uniform_single_clip_equals_the_published_validation():
    for total, n, indices in load_rows(PUBLISHED, "kinetics_sparse_validation"):
        assert sample_frame_indices(total, n) == indices


def test_segments_single_clip_equals_the_published_validation():
    for total, n, indices in load_rows(PUBLISHED, "ssv2_video_validation"):
        assert sample_frame_indices(total, n, "segments") == indices


def test_segments_test_clips_equal_the_published_ones():
    """The published reader of videos always makes two clips, whatever is asked: only its rows of two are right.

    Its reader of image folders interleaves any number. There a single test clip takes the start of each segment; ours
    is the validation clip, the middle.
    """
    videos = [row for row in load_rows(PUBLISHED, "ssv2_video_test") if row[2] == 2]
    folders = [row for row in load_rows(PUBLISHED, "ssv2_rawframes_test") if row[2] > 1]
    assert len(videos) == 42 and {row[2] for row in folders} == {2, 4}
    for total, n, num_clips, _, clips in videos + folders:
        for clip, indices in enumerate(clips):
            assert sample_frame_indices(total, n, "segments", num_clips, clip) == indices


def test_middle_equals_the_published_rule_for_video_with_text():
    for n, total, indices in load_rows(VINDLU, "middle"):
        assert sample_frame_indices(total, n, "middle") == indices


def test_middle_clips_spread_within_their_parts():
    clips = [sample_frame_indices(100, 8, "middle", 3, clip) for clip in range(3)]
    assert clips[1] == sample_frame_indices(100, 8, "middle")
    assert clips == [[2, 15, 27, 40, 52, 65, 77, 90], [5, 18, 30, 43, 55, 68, 80, 93], [8, 21, 33, 46, 58, 71, 83, 96]]


def test_fps_equals_the_published_rule():
    """Where that gives no frame at all, of videos shorter than half a step, ours gives the middle one."""
    num_empty = 0
    for name, video_fps, total, limit, indices in load_rows(VINDLU, "fps"):
        ours = sample_frame_indices(total, 4, "fps", fps=float(name[3:]), video_fps=video_fps)
        num_empty += not indices
        assert (ours[:limit] if limit > 0 else ours) == (indices or [(total - 1) // 2])
    assert 0 < num_empty < 80


def test_dense_single_clip_is_central_and_several_span_the_video():
    central = sample_frame_indices(300, 8, "dense", frame_stride=8)
    assert central == [121, 129, 137, 145, 153, 161, 169, 177]  # the published detection clip
    clips = [sample_frame_indices(300, 8, "dense", 5, clip, frame_stride=8) for clip in range(5)]
    assert clips[0][0] == 0 and clips[-1][-1] == 299 and clips[2] == central
    assert sample_frame_indices(10, 8, "dense", frame_stride=4) == [0, 4, 8, 8, 8, 8, 8, 8]


def draw(count: int, total: int, n: int, strategy: str, **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(total * 100 + n)
    draws = [sample_frame_indices(total, n, strategy, generator=generator, **options) for _ in range(count)]
    return torch.tensor(draws)


@pytest.mark.parametrize(
    ("strategy", "table"),
    [
        ("uniform", "kinetics_sparse_train_bounds"),
        ("segments", "ssv2_video_train_bounds"),
        ("segments", "pretrain_sparse_bounds"),
    ],
)
def test_random_clips_fill_the_published_bounds(strategy, table):
    for row in load_rows(PUBLISHED, table):
        total, n, low, high = row[0], row[1], torch.tensor(row[-2]), torch.tensor(row[-1])
        draws = draw(60, total, n, strategy)
        assert (draws >= low).all() and (draws <= high).all(), row[:2]
        narrow = high - low < 4
        assert (draws.amin(0)[narrow] == low[narrow]).all() and (draws.amax(0)[narrow] == high[narrow]).all()
        assert ((draws.amax(0) - draws.amin(0)).float() >= 0.7 * (high - low)).all()


def test_random_frames_are_equally_likely():
    draws = draw(4000, 80, 8, "segments")
    for segment in range(8):
        counts = Counter(draws[:, segment].tolist())
        assert sorted(counts) == list(range(segment * 10, segment * 10 + 10))
        chi_square = sum((count - 400) ** 2 / 400 for count in counts.values())
        assert chi_square < 34  # 9 degrees of freedom: one draw in 10,000 is above


def test_random_dense_clips_start_between_the_published_ends():
    for total, n, stride, first, last in load_rows(PUBLISHED, "pretrain_dense_bounds"):
        draws = draw(300, total, n, "dense", frame_stride=stride)
        starts = draws[:, 0]
        assert starts.min() >= first[0] and starts.max() <= last[0]
        if last[0] < 40:
            assert first in draws.tolist() and last in draws.tolist()
        assert ((draws - starts[:, None]).remainder(stride) == 0).all()


def test_random_middle_clips_follow_the_published_rule():
    for n, total, mode, bounds in load_rows(VINDLU, "rand"):
        draws = draw(20, total, n, "middle")
        if mode == "permutation":
            distinct = draws[:, :bounds]
            assert (distinct.diff(dim=1) > 0).all() and distinct.max() < total
            assert (draws[:, bounds:] == distinct[:, -1:]).all()
        else:
            low, high = torch.tensor(bounds).T
            assert (draws >= low).all() and (draws <= high).all()


@pytest.mark.parametrize("strategy", ["uniform", "segments", "middle", "dense"])
def test_a_generator_fixes_the_draw(strategy):
    def clip(seed):
        return sample_frame_indices(250, 8, strategy, generator=torch.Generator().manual_seed(seed))

    assert clip(1) == clip(1)
    assert len({tuple(clip(seed)) for seed in range(5)}) == 5


@pytest.mark.parametrize("strategy", ["uniform", "segments", "middle", "dense"])
@pytest.mark.parametrize("total", [1, 2, 5, 8, 9])
def test_short_videos_give_full_rising_clips(strategy, total):
    for generator in (None, torch.Generator().manual_seed(0)):
        indices = sample_frame_indices(total, 8, strategy, generator=generator)
        assert len(indices) == 8 and indices == sorted(indices)
        assert indices[0] >= 0 and indices[-1] < total
        assert all(type(index) is int for index in indices)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 8), {}, "num_video_frames must be at least 1"),
        ((10, 0), {}, "num_frames must be at least 1"),
        ((10, 8, "random"), {}, "'random'"),
        ((10, 8, "uniform", 2, 2), {}, r"clip_index must be in 0..1 .*got 2"),
        ((10, 8, "uniform", 0), {}, "num_clips must be at least 1"),
        ((10, 8, "dense"), {"frame_stride": 0}, "frame_stride must be at least 1"),
        ((10, 8, "uniform", 2), {"generator": torch.Generator()}, "num_clips must be 1"),
        ((10, 8, "fps"), {"fps": 1.0}, "needs fps and the video's own frame rate"),
        ((10, 8, "fps", 2), {"fps": 1.0, "video_fps": 2.0}, "a single fixed clip"),
    ],
)
def test_impossible_requests_are_explained(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        sample_frame_indices(*arguments, **options)


def test_test_crops_equal_the_published_ones():
    for height, width, short_side, num_crops, crop, resized, box in load_rows(CROPS, "test"):
        assert compute_resized_size(height, width, short_side) == tuple(resized)
        assert compute_spatial_crops(height, width, short_side, num_crops)[crop] == tuple(box)
        assert compute_spatial_crops(*resized, short_side, num_crops)[crop] == tuple(box)


def test_validation_crops_equal_the_published_ones():
    for height, width, short_side, crop_size, resized, box in load_rows(CROPS, "validation"):
        assert compute_resized_size(height, width, short_side) == tuple(resized)
        assert compute_spatial_crops(height, width, short_side, crop_size=crop_size) == [tuple(box)]


def test_crops_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="224 x 224 crop does not fit a frame of 200 x 300"):
        place_crops(200, 300, 224, 224, 3)
    with pytest.raises(ValueError, match="num_crops must be at least 1"):
        compute_spatial_crops(240, 320, 224, 0)
    with pytest.raises(ValueError, match="got 256 and 1 crops"):
        compute_spatial_crops(240, 320, 224, crop_size=256)


@pytest.mark.parametrize(("fps", "video_fps"), [(1.0, 1e-9), (1e9, 25.0), (1.0, 1e-300)])
def test_a_rate_that_asks_for_too_many_frames_is_refused_before_they_are_listed(fps, video_fps):
    """Found by properties: 745 GiB were asked for, and a file states its rate itself."""
    with pytest.raises(ValueError, match=r"100 frames at .* per second>: \d+ frames are asked .* the limit of 10000"):
        sample_frame_indices(100, 4, "fps", fps=fps, video_fps=video_fps)


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), 0.0, -1.0])
def test_rates_that_are_no_rates_are_named(rate):
    for fps, video_fps in ((rate, 25.0), (1.0, rate)):
        with pytest.raises(ValueError, match="the video's own frame rate, both positive"):
            sample_frame_indices(100, 4, "fps", fps=fps, video_fps=video_fps)
        with pytest.raises(ValueError, match="first_seconds must be positive and needs the video's frame rate"):
            trim_num_frames(100, video_fps, fps)
