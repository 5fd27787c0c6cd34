"""Frames of a clip and crops of a frame, against exact fractions. Legend: N frames in the video, n of the clip."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from umt_hf.processing.sampling import (
    compute_resized_size,
    compute_spatial_crops,
    place_crops,
    sample_frame_indices,
    trim_num_frames,
)

MOST_FRAMES = 10_000  # more than any clip takes, and as many as are read of one video at a time
STRATEGIES = ("uniform", "segments", "middle", "dense")
totals = st.integers(1, 3000) | st.integers(1, 40)
counts = st.integers(1, 40)
fixed_clips = st.integers(1, 6).flatmap(lambda clips: st.tuples(st.just(clips), st.integers(0, clips - 1)))


def is_near_step(value: Fraction) -> bool:
    """Whether a fraction is so near to where rounding or cutting changes that floating point may go the other way."""
    return abs(value * 2 - round(value * 2)) < Fraction(1, 10**9)


def agrees(found: int, value: Fraction, expected: int) -> bool:
    return found == expected or (is_near_step(value) and abs(found - expected) <= 1)


@given(totals, counts, fixed_clips)
def test_uniform_clips_are_the_rounded_places_plus_a_shift(total, n, clip):
    num_clips, number = clip
    segment = Fraction(total - 1, n)
    shift = segment / (num_clips + 1) * (number + 1)
    found = sample_frame_indices(total, n, "uniform", num_clips, number)
    for i, index in enumerate(found):
        place = segment * i
        starts, cuts = {round(place)}, {math.floor(shift)}
        if is_near_step(place):
            starts |= {math.floor(place), math.ceil(place)}
        if is_near_step(shift):
            cuts |= {round(shift), round(shift) - 1}
        expected = {min(start + cut, total - 1) for start in starts for cut in cuts}
        assert index in expected
    assert len(found) == n and found == sorted(found)


@given(totals, counts, fixed_clips)
def test_segments_clips_are_evenly_spaced_cuts(total, n, clip):
    num_clips, number = clip
    share = Fraction(1, 2) if num_clips == 1 else Fraction(number, num_clips)
    found = sample_frame_indices(total, n, "segments", num_clips, number)
    places = [Fraction(total, n) * (i + share) for i in range(n)]
    assert all(
        agrees(index, place, math.floor(place)) and 0 <= index < total
        for index, place in zip(found, places, strict=True)
    )
    assert found == sorted(found)


@given(totals, counts, fixed_clips)
def test_middle_clips_are_within_their_parts(total, n, clip):
    num_clips, number = clip
    parts = min(n, total)
    found = sample_frame_indices(total, n, "middle", num_clips, number)
    for j, index in enumerate(found[:parts]):
        first, end = Fraction(total * j, parts), Fraction(total * (j + 1), parts)
        # The share of the way to the part's last frame; borders in floating point may be one frame lower.
        expected = {
            low + (high - 1 - low) * (number + 1) // (num_clips + 1)
            for low in ({math.floor(first)} | ({round(first) - 1} if is_near_step(first) else set()))
            for high in ({math.floor(end)} | ({round(end) - 1} if is_near_step(end) else set()))
        }
        assert index in expected and 0 <= index < total
    assert found[parts:] == found[parts - 1 : parts] * (n - parts)
    assert found == sorted(found)


@given(totals, counts, fixed_clips, st.integers(1, 64))
def test_dense_clips_are_one_stride_apart(total, n, clip, stride):
    num_clips, number = clip
    found = sample_frame_indices(total, n, "dense", num_clips, number, frame_stride=stride)
    span = (n - 1) * stride + 1
    if span <= total:
        start = (total - span) // 2 if num_clips == 1 else (total - span) * number // (num_clips - 1)
        assert found == [start + i * stride for i in range(n)]
    else:  # as published, a clip that is too long repeats the last frame that it reaches, and never the very last
        reached = list(range(0, max(total - 1, 1), stride))
        assert found == (reached + reached[-1:] * n)[:n]


@given(totals, st.floats(0.05, 240), st.floats(0.5, 240))
def test_fps_takes_the_frame_nearest_to_the_middle_of_each_step(total, fps, video_fps):
    assume(total / video_fps * fps <= MOST_FRAMES)
    found = sample_frame_indices(total, 4, "fps", fps=fps, video_fps=video_fps)
    step = Fraction(video_fps) / Fraction(fps)  # in frames
    # As many steps as begin before the end, and the middle of the last may be past it.
    places = [(Fraction(1, 2) + k) * step for k in range(math.ceil(total / step))]
    inside = [place for place in places if round(place) < total]
    if not inside:
        assert found in ([(total - 1) // 2], [total - 1])
        return
    assert len(inside) - 1 <= len(found) <= len(inside) + 1
    tolerance = Fraction(1, 2) + Fraction(1, 10**6)
    assert all(abs(index - place) <= tolerance for index, place in zip(found, inside, strict=False))
    assert found == sorted(found) and found[0] >= 0 and found[-1] < total


@given(
    totals,
    st.sampled_from([1.0, 30.0, 1e9, 1e300, math.inf, math.nan, -1.0, 0.0, 1e-9, 1e-300]) | st.floats(),
    st.sampled_from([25.0, 1e-9, 1e-300, 1e300, math.inf, math.nan, -1.0, 0.0]) | st.floats(),
)
@example(total=100, fps=1e9, video_fps=25.0)
@example(total=100, fps=1.0, video_fps=1e-9)
def test_absurd_rates_are_refused_or_give_a_bounded_clip(total, fps, video_fps):
    """Rates come from flags and from files: none may ask for a clip larger than memory."""
    try:
        found = sample_frame_indices(total, 4, "fps", fps=fps, video_fps=video_fps)
    except ValueError as error:
        assert "fps" in str(error)
        return
    assert 0 < len(found) <= max(MOST_FRAMES, total) and all(0 <= index < total for index in found)


@given(st.sampled_from(STRATEGIES), totals, counts, st.integers(1, 64), st.integers(0, 2**31))
def test_random_clips_are_rising_repeatable_and_within_their_parts(strategy, total, n, stride, seed):
    def draw() -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return sample_frame_indices(total, n, strategy, generator=generator, frame_stride=stride)

    found = draw()
    assert found == draw() and len(found) == n and found == sorted(found)
    assert all(0 <= index < total for index in found)
    for i, index in enumerate(found):
        if strategy == "segments" and total >= n:
            assert index // (total // n) == i
        if strategy == "segments" and total < n:
            assert index == 0
        if strategy == "uniform":
            low, high = Fraction(total - 1, n) * i, Fraction(total - 1, n) * (i + 1)
            assert low - 1 < index < high + 1
        if strategy == "middle" and total >= 2 * n:
            assert math.floor(Fraction(total * i, n)) - 1 <= index < Fraction(total * (i + 1), n)
        if strategy == "dense" and i and index != found[i - 1]:
            assert index == found[i - 1] + stride
    if strategy == "middle" and total <= n:
        assert found == [*range(total), *[total - 1] * (n - total)]


@given(
    st.sampled_from([*STRATEGIES, "fps", "random", ""]),
    st.integers(-3, 50),
    st.integers(-3, 10),
    st.integers(-3, 5),
    st.integers(-3, 5),
    st.integers(-3, 5),
    st.booleans(),
    st.none() | st.floats(-2, 60),
    st.none() | st.floats(-2, 60),
)
def test_arguments_out_of_range_are_named(strategy, total, n, num_clips, clip, stride, is_random, fps, video_fps):
    wrong = {
        "num_video_frames": total < 1,
        "num_frames": n < 1,
        "num_clips": num_clips < 1 or (num_clips > 1 and (is_random or strategy == "fps")),
        "frame_stride": stride < 1,
        "clip_index": not 0 <= clip < num_clips,
        "strategy": strategy not in (*STRATEGIES, "fps"),
        "fps": strategy == "fps" and (is_random or not (fps and fps > 0 and video_fps and video_fps > 0)),
    }
    options = {"generator": torch.Generator() if is_random else None, "frame_stride": stride}
    options |= {"fps": fps, "video_fps": video_fps}
    if not any(wrong.values()):
        try:
            found = sample_frame_indices(total, n, strategy, num_clips, clip, **options)
        except ValueError as error:  # a rate next to zero
            assert strategy == "fps" and "fps" in str(error)
            return
        assert found and all(type(index) is int and 0 <= index < total for index in found)
        return
    with pytest.raises(ValueError) as caught:
        sample_frame_indices(total, n, strategy, num_clips, clip, **options)
    assert any(name in str(caught.value) for name, is_wrong in wrong.items() if is_wrong)


@given(st.integers(1, 5000), st.none() | st.floats(), st.floats())
def test_first_seconds_count_frames_or_are_refused(total, video_fps, seconds):
    is_usable = video_fps is not None and 0 < video_fps < math.inf and 0 < seconds < math.inf
    try:
        found = trim_num_frames(total, video_fps, seconds)
    except ValueError as error:
        assert "first_seconds" in str(error)
        assert not is_usable
        return
    assert is_usable and found == max(1, min(total, math.floor(min(seconds * video_fps, total))))


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 512))
def test_the_shorter_side_gets_the_size(height, width, size):
    new_height, new_width = compute_resized_size(height, width, size)
    assert min(new_height, new_width) == size
    exact = Fraction(max(height, width) * size, min(height, width))
    assert max(new_height, new_width) == math.floor(exact)
    assert (new_height <= new_width) == (height <= width) or new_height == new_width


@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.integers(1, 400),
    st.integers(-2, 7),
    st.none() | st.integers(1, 450),
)
def test_crops_are_inside_even_and_central(height, width, size, num_crops, crop_size):
    rows, columns = compute_resized_size(height, width, size)
    try:
        boxes = compute_spatial_crops(height, width, size, num_crops, crop_size)
    except ValueError as error:
        assert num_crops < 1 or (crop_size is not None and (num_crops != 1 or crop_size > size))
        assert "num_crops" in str(error) or "crop_size" in str(error)
        return
    side = size if crop_size is None else crop_size
    assert num_crops >= 1 and len(boxes) == num_crops
    for top, left, bottom, right in boxes:
        assert (bottom - top, right - left) == (side, side)
        assert top >= 0 and left >= 0 and bottom <= rows and right <= columns
    if num_crops == 1:
        ((top, left, _, _),) = boxes
        assert abs(top - Fraction(rows - side, 2)) <= Fraction(1, 2)
        assert abs(left - Fraction(columns - side, 2)) <= Fraction(1, 2)
    else:
        long, starts = max(rows, columns) - side, [box[0] if rows > columns else box[1] for box in boxes]
        assert starts == [math.floor(Fraction(long * i, num_crops - 1)) for i in range(num_crops)]
        assert {box[1] if rows > columns else box[0] for box in boxes} == {(min(rows, columns) - side) // 2}


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60), st.integers(1, 60), st.integers(0, 5))
def test_a_crop_that_does_not_fit_is_refused(height, width, crop_height, crop_width, num_crops):
    fits = crop_height <= height and crop_width <= width and num_crops >= 1
    if not fits:
        with pytest.raises(ValueError, match="num_crops must be|does not fit a frame"):
            place_crops(height, width, crop_height, crop_width, num_crops)
        return
    boxes = place_crops(height, width, crop_height, crop_width, num_crops)
    assert len(boxes) == num_crops
    for top, left, bottom, right in boxes:
        assert 0 <= top <= height - crop_height == top + height - bottom
        assert 0 <= left <= width - crop_width == left + width - right
