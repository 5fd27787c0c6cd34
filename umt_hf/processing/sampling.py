# Copyright 2026 The umt_hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Which frames of a video a clip takes, and which parts of a frame the test views show: pure functions.

Legend: N frames in the video, n frames wanted, C clips, c the clip's number.
"""

import math
from functools import partial
from typing import Literal, TypeGuard, get_args

import numpy as np
import torch

from .media_files import LIMITS

MANY = 10**18  # stands for any number of frames that is too large for an integer

SamplingStrategy = Literal["uniform", "segments", "middle", "dense", "fps"]


def sample_frame_indices(
    num_video_frames: int,
    num_frames: int,
    strategy: SamplingStrategy = "uniform",
    num_clips: int = 1,
    clip_index: int = 0,
    generator: torch.Generator | None = None,
    *,
    frame_stride: int = 4,
    fps: float | None = None,
    video_fps: float | None = None,
) -> list[int]:
    """Choose the frames of one clip of a video.

    Without `generator` the choice is fixed, and `num_clips` clips taken with `clip_index` 0, 1, ... complement each
    other; with one it is a random training clip. The strategies are

    - `uniform`: around n points spread over the complete video (Kinetics, Moments in Time).
    - `segments`: one frame of each of n equal parts (Something-Something, and stage-1 pre-training).
    - `middle`: the middle frame of each of n parts with integer borders (video with text). At random: any frame
      of a part but its last.
    - `dense`: n neighbouring frames, `frame_stride` apart. One fixed clip is in the middle of the video, several are
      spread from its start to its end.
    - `fps`: `fps` frames per second over the complete video, however many that gives; `num_frames` is not used, and
      there is one fixed clip only.

    A video shorter than n repeats frames: `uniform` and fixed `segments` spread the repeats, random `segments` repeat
    frame 0, `middle` repeats the last frame, `dense` the last one that its stride reaches.

    Args:
        num_video_frames: N, at least 1.
        num_frames: n, at least 1.
        strategy: Name of the strategy.
        num_clips: C, the number of fixed clips that share the video.
        clip_index: c, from 0 to `num_clips - 1`.
        generator: CPU random source of a training clip.
        frame_stride: Distance between the frames of a `dense` clip, in frames.
        fps: Frames per second that `fps` takes.
        video_fps: Frames per second of the video; `fps` needs it.

    Returns:
        Frame numbers from 0 to `num_video_frames - 1`, rising (repeats allowed).

    Raises:
        ValueError: If an argument is out of range or missing for the strategy, or `fps` asks for more frames than
            `LIMITS` allows.

    Source: the published data sets of UMT (Kinetics, Something-Something, stage 1) and of VindLU (video with text).

    Examples:
        >>> from umt_hf.processing.sampling import sample_frame_indices
        >>> sample_frame_indices(300, 8)
        [18, 55, 93, 130, 168, 205, 242, 280]
        >>> sample_frame_indices(300, 8, "dense", frame_stride=4)
        [135, 139, 143, 147, 151, 155, 159, 163]
    """
    _check_at_least_1(num_video_frames=num_video_frames, num_frames=num_frames)
    _check_at_least_1(frame_stride=frame_stride, num_clips=num_clips)
    _check_clip(strategy, num_clips, clip_index, is_random=generator is not None)
    if strategy == "fps":
        return _fps_fixed(num_video_frames, fps, video_fps)
    if strategy == "dense":
        choose, draw = partial(_dense_fixed, stride=frame_stride), partial(_dense_random, stride=frame_stride)
    else:
        choose, draw = STRATEGIES[strategy]
    if generator is None:
        return choose(num_video_frames, num_frames, num_clips, clip_index)
    return draw(num_video_frames, num_frames, generator)


def compute_key_frame_offsets(
    num_frames: int, strategy: Literal["dense", "segments"], *, frame_stride: int = 8, frame_span: int = 300
) -> list[int]:
    """Choose the frames of a clip around a key frame, as action detection takes them.

    - `dense`: n neighbouring frames, `frame_stride` apart, with the key frame in their middle. With stride 8 this is
      what the published code does with its option for sparse sampling, which its recipes set.
    - `segments`: the middle frame of each of n equal parts of the `frame_span` frames around the key frame. With 64 it
      is what the published code does by default, with 300 what its authors describe as sparse.

    Args:
        num_frames: n, at least 1.
        strategy: Name of the strategy.
        frame_stride: Distance between the frames of a `dense` clip, in frames.
        frame_span: Frames that `segments` spreads over.

    Returns:
        Distances from the key frame in frames, rising.

    Raises:
        ValueError: If the strategy has no clips around a key frame, or a number is below 1.

    Source: the published data set for AVA, where the names of the two strategies are swapped.

    Examples:
        >>> from umt_hf.processing.sampling import compute_key_frame_offsets
        >>> compute_key_frame_offsets(4, "dense", frame_stride=8)
        [-13, -5, 3, 11]
    """
    if strategy not in ("dense", "segments"):
        raise ValueError(f"Clips around a key frame are sampled by 'dense' or 'segments', got {strategy!r}.")
    _check_at_least_1(num_frames=num_frames, frame_stride=frame_stride, frame_span=frame_span)
    if strategy == "dense":
        length = (num_frames - 1) * frame_stride + 1
        return [frame_stride * i - (length + 1) // 2 for i in range(num_frames)]
    return [i - frame_span // 2 for i in _segments_fixed(frame_span, num_frames, 1, 0)]


def trim_num_frames(num_video_frames: int, video_fps: float | None, first_seconds: float) -> int:
    """Count the frames of a video's first seconds, to sample from these alone (DiDeMo: 30).

    Args:
        num_video_frames: Frames of the complete video.
        video_fps: Its average frames per second.
        first_seconds: Length to keep, in seconds.

    Returns:
        A number from 1 to `num_video_frames`.

    Raises:
        ValueError: If the rate is not known, or one of the two is not positive and finite.
    """
    if not _is_positive(video_fps) or not _is_positive(first_seconds):
        raise ValueError(
            f"first_seconds must be positive and needs the video's frame rate, got {first_seconds} and {video_fps}."
        )
    return max(1, int(min(num_video_frames, first_seconds * video_fps)))


def compute_resized_size(height: int, width: int, size: int) -> tuple[int, int]:
    """Give the height and width of a frame once its shorter side measures `size` (the longer side rounds down)."""
    short, long = min(height, width), max(height, width)
    if short == size:
        return height, width
    resized_long = long * size // short
    return (size, resized_long) if height <= width else (resized_long, size)


def compute_spatial_crops(
    height: int, width: int, size: int, num_crops: int = 1, crop_size: int | None = None
) -> list[tuple[int, int, int, int]]:
    """Place the square crops of the published test views, or the single crop of its validation.

    Args:
        height: Height of the frame in pixels, before or after resizing.
        width: Width of the frame.
        size: What the shorter side is resized to; also the side of the test crops, which are spread evenly along the
            longer side (a single one in its middle).
        num_crops: Number of test crops.
        crop_size: Side of the validation crop in the middle of the frame; `None` for test crops. It differs from a
            single test crop in that half pixels are rounded to even instead of down.

    Returns:
        Boxes `(top, left, bottom, right)` in the resized frame (see `compute_resized_size`), bottom and right
        excluded, from the top or left end to the other.

    Raises:
        ValueError: If `num_crops` is below 1, or above 1 with `crop_size`, or a crop does not fit the frame.

    Examples:
        >>> from umt_hf.processing.sampling import compute_spatial_crops
        >>> compute_spatial_crops(720, 1280, size=224, num_crops=3)
        [(0, 0, 224, 224), (0, 87, 224, 311), (0, 174, 224, 398)]
    """
    height, width = compute_resized_size(height, width, size)
    if crop_size is None:
        return place_crops(height, width, size, size, num_crops)
    if num_crops != 1 or crop_size > size:
        raise ValueError(f"crop_size is for one crop of at most {size} pixels, got {crop_size} and {num_crops} crops.")
    top, left = round((height - crop_size) / 2), round((width - crop_size) / 2)
    return [(top, left, top + crop_size, left + crop_size)]


def place_crops(
    height: int, width: int, crop_height: int, crop_width: int, num_crops: int
) -> list[tuple[int, int, int, int]]:
    """Place crops evenly along the longer side, in the middle of the shorter one (a single crop: of both).

    Args:
        height: Height of the frame in pixels, as it is cropped.
        width: Width of the frame.
        crop_height: Height of each crop.
        crop_width: Width of each crop.
        num_crops: Number of crops.

    Returns:
        Boxes `(top, left, bottom, right)`, bottom and right excluded.

    Raises:
        ValueError: If `num_crops` is below 1 or the crops do not fit the frame.
    """
    if num_crops < 1:
        raise ValueError(f"num_crops must be at least 1, got {num_crops}.")
    room_y, room_x = height - crop_height, width - crop_width
    if room_y < 0 or room_x < 0:
        raise ValueError(f"A {crop_height} x {crop_width} crop does not fit a frame of {height} x {width} pixels.")
    boxes = []
    for crop in range(num_crops):
        top, left = room_y // 2, room_x // 2
        if num_crops > 1 and height > width:
            top = room_y * crop // (num_crops - 1)
        elif num_crops > 1:
            left = room_x * crop // (num_crops - 1)
        boxes.append((top, left, top + crop_height, left + crop_width))
    return boxes


def _check_clip(strategy: str, num_clips: int, clip_index: int, is_random: bool) -> None:
    if strategy not in get_args(SamplingStrategy):
        raise ValueError(f"strategy must be one of {list(get_args(SamplingStrategy))}, got {strategy!r}.")
    if not 0 <= clip_index < num_clips:
        raise ValueError(f"clip_index must be in 0..{num_clips - 1} (num_clips is {num_clips}), got {clip_index}.")
    if is_random and num_clips > 1:
        raise ValueError("A random clip (generator given) is drawn by itself; num_clips must be 1.")
    if strategy == "fps" and (is_random or num_clips > 1):
        raise ValueError("The 'fps' strategy has a single fixed clip: leave out generator and num_clips.")


def _is_positive(rate: float | None) -> TypeGuard[float]:
    """Whether a number is given, above 0 and finite (`nan` is not)."""
    return rate is not None and 0 < rate < math.inf


def _check_at_least_1(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}.")


def _uniform_fixed(total: int, n: int, num_clips: int, clip: int) -> list[int]:
    segment = (total - 1) / n
    shift = int(segment / (num_clips + 1) * (clip + 1))
    return [min(round(segment * i) + shift, total - 1) for i in range(n)]  # round: half to even


def _uniform_random(total: int, n: int, generator: torch.Generator) -> list[int]:
    borders = [round((total - 1) / n * i) for i in range(n + 1)]
    return _draw_between(borders[:-1], borders[1:], generator)


def _segments_fixed(total: int, n: int, num_clips: int, clip: int) -> list[int]:
    tick = total / n
    shift = tick / 2 if num_clips == 1 else tick / num_clips * clip
    return [int(shift + tick * i) for i in range(n)]


def _segments_random(total: int, n: int, generator: torch.Generator) -> list[int]:
    length = total // n
    if length == 0:
        return [0] * n
    return _draw_between([length * i for i in range(n)], [length * (i + 1) - 1 for i in range(n)], generator)


def _middle_borders(total: int, n: int) -> tuple[list[int], int]:
    """Borders of the parts, of which there are no more than frames, and how often the last frame is repeated."""
    num_parts = min(n, total)
    return np.linspace(0, total, num_parts + 1).astype(int).tolist(), n - num_parts


def _middle_fixed(total: int, n: int, num_clips: int, clip: int) -> list[int]:
    borders, num_repeats = _middle_borders(total, n)
    indices = [
        first + (end - 1 - first) * (clip + 1) // (num_clips + 1)
        for first, end in zip(borders[:-1], borders[1:], strict=True)
    ]
    return indices + indices[-1:] * num_repeats


def _middle_random(total: int, n: int, generator: torch.Generator) -> list[int]:
    borders, num_repeats = _middle_borders(total, n)
    first, last = borders[:-1], [end - 2 for end in borders[1:]]  # never the last frame of a part, as published
    if all(low <= high for low, high in zip(first, last, strict=True)):
        indices = _draw_between(first, last, generator)
    else:
        indices = torch.randperm(total, generator=generator)[: len(first)].sort().values.tolist()
    return indices + indices[-1:] * num_repeats


def _dense_fixed(total: int, n: int, num_clips: int, clip: int, stride: int) -> list[int]:
    room = max(total - ((n - 1) * stride + 1), 0)
    return _dense_from(room // 2 if num_clips == 1 else room * clip // (num_clips - 1), total, n, stride)


def _dense_random(total: int, n: int, generator: torch.Generator, stride: int) -> list[int]:
    last_start = max(total - n * stride, 0)
    return _dense_from(_draw_between([0], [last_start], generator)[0], total, n, stride)


def _dense_from(start: int, total: int, n: int, stride: int) -> list[int]:
    last_step = n - 1
    if start + last_step * stride >= total:
        last_step = max(total - 2 - start, 0) // stride  # as published: the very last frame is never reached
    return [start + stride * min(i, last_step) for i in range(n)]


def _fps_fixed(total: int, fps: float | None, video_fps: float | None) -> list[int]:
    if not _is_positive(fps) or not _is_positive(video_fps):
        raise ValueError(
            f"The 'fps' strategy needs fps and the video's own frame rate, both positive, got {fps} and {video_fps}."
        )
    num_steps = total * fps / video_fps
    LIMITS.check_num_frames(f"<video of {total} frames at {video_fps:g} per second>", int(min(num_steps, MANY)))
    if num_steps < 0.4:  # the middle of the first step is past the end
        return [(total - 1) // 2]
    step = 1 / fps
    duration = total / video_fps
    indices = np.round(np.arange(step / 2, duration + step / 2, step) * video_fps).astype(int)
    indices = indices[indices < total].tolist()
    return indices or [(total - 1) // 2]  # published: no frame at all of a video shorter than half a step


def _draw_between(low: list[int], high: list[int], generator: torch.Generator) -> list[int]:
    """Draw one integer from each closed interval."""
    lowest, highest = torch.tensor(low), torch.tensor(high)
    draws = torch.rand(len(low), generator=generator, dtype=torch.float64)
    return (lowest + (draws * (highest - lowest + 1)).long()).tolist()


STRATEGIES = {
    "uniform": (_uniform_fixed, _uniform_random),
    "segments": (_segments_fixed, _segments_random),
    "middle": (_middle_fixed, _middle_random),
}
