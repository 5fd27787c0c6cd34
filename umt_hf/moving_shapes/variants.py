"""Harder halves of moving shapes: few labels to learn from, damaged test clips, and several actions in one video.

All add files to a finished folder of `write_moving_shapes` and change none that is there. A variant is one more split
in the same annotation formats: `train_low_data_motion.csv`, `test_blur_strong_boxes.json` and so on. That of several
actions has one file, `test_moments.json`, which says when each of them happens.
"""

import json
import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms.v2 import functional as F

from .render import (
    APPEARANCES,
    FRAME_SIZE,
    FRAMES_PER_SECOND,
    MOTIONS,
    ClipDescription,
    read_settings,
    render_clip,
    sample_clip,
    write_annotations,
    write_video,
)

logger = logging.getLogger(__name__)

LOW_DATA_SPLIT = "train_low_data"
MOMENTS = "moments"
SEVERITIES = ("mild", "medium", "strong")
# How much of it at each severity.
LEVELS = {
    "noise": (12.0, 25.0, 50.0),  # standard deviation, of 255
    "blur": (1.0, 2.0, 3.5),  # standard deviation in pixels
    "brightness": (0.75, 0.5, 0.3),  # share of the contrast that is left
    "occlusion": (16, 24, 32),  # side in pixels
    "frame_drops": (0.2, 0.4, 0.6),  # share of the frames
}
CORRUPTIONS = tuple(LEVELS)
OCCLUDER_COLOR = 128


def write_low_data(directory: str | Path, ratio: float = 0.1) -> Path:
    """Annotate a small part of the training clips as one more split, `train_low_data`.

    Each pair of an appearance and a motion has the same number of clips in it, the first ones of the training split,
    so that both tasks are balanced. No video is copied.

    Args:
        directory: Folder of `write_moving_shapes`.
        ratio: Share of the training clips, in (0, 1]; the nearest share above 0 that is balanced is taken.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: If there are no moving shapes in the folder.
        ValueError: If `ratio` is outside (0, 1], or the training split has too few clips of a pair.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"low-data ratio must be in (0, 1], got {ratio}.")
    directory = Path(directory)
    settings = read_settings(directory)
    num_clips = settings["num_clips"]["train"]
    num_pairs = len(APPEARANCES) * len(MOTIONS)
    per_pair = max(round(ratio * num_clips / num_pairs), 1)
    chosen: dict[tuple[str, str], list[tuple[int, ClipDescription]]] = {
        (appearance, motion): [] for appearance in APPEARANCES for motion in MOTIONS
    }
    for index in range(num_clips):
        clip = sample_clip(settings["seed"], "train", index)
        found = chosen[clip.appearance, clip.motion]
        if len(found) < per_pair:
            found.append((index, clip))
    if short := [" ".join(pair) for pair, found in chosen.items() if len(found) < per_pair]:
        raise ValueError(
            f"{directory}: {per_pair} training clip(s) of each appearance and motion are wanted, and {len(short)} of "
            f"{num_pairs} pairs have fewer ({short[0]}, ...): render more training clips or lower the ratio."
        )
    picked = sorted((item for found in chosen.values() for item in found), key=lambda item: item[0])
    rows = [(f"videos/train/{index:05d}.mp4", clip, render_clip(clip)[1]) for index, clip in picked]
    write_annotations(directory, LOW_DATA_SPLIT, rows)
    return directory


def write_corrupted_test(
    directory: str | Path,
    corruption: str,
    severity: str = "medium",
    num_clips: int | None = None,
    num_workers: int = 2,
) -> Path:
    """Render damaged copies of test clips as one more split, `test_<corruption>_<severity>`.

    Labels, captions and questions are those of the intact clips. The content depends on the folder's seed, the
    corruption, the severity and the clip's index alone. A finished split of as many clips is kept.

    Args:
        directory: Folder of `write_moving_shapes`.
        corruption: One of `CORRUPTIONS`.
        severity: One of `SEVERITIES`.
        num_clips: The first so many test clips; `None` = all.
        num_workers: Threads that render; it does not change the result.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: If there are no moving shapes in the folder.
        ValueError: If corruption or severity has no such name, or the test split has not as many clips.
    """
    directory = Path(directory)
    settings = read_settings(directory)
    split = name_corrupted_split(corruption, severity)
    available = settings["num_clips"]["test"]
    num_clips = available if num_clips is None else num_clips
    if not 0 < num_clips <= available:
        raise ValueError(f"{directory} has {available} test clips, {num_clips} corrupted ones were asked for.")
    last = directory / f"{split}_boxes.json"  # the last file written
    annotation = directory / f"{split}.csv"
    if last.exists() and len(annotation.read_text(encoding="utf-8").splitlines()) == num_clips:
        logger.info("%s already holds %s.", directory, split)
        return directory
    (directory / "videos" / split).mkdir(parents=True, exist_ok=True)

    def write(index: int) -> tuple[str, ClipDescription, np.ndarray]:
        clip = sample_clip(settings["seed"], "test", index)
        rng = np.random.default_rng([settings["seed"], index, *corruption.encode()])
        frames, boxes = corrupt_clip(*render_clip(clip), corruption, severity, rng)
        name = f"videos/{split}/{index:05d}.mp4"
        write_video(directory / name, frames)
        return name, clip, boxes

    with ThreadPoolExecutor(num_workers) as pool:
        write_annotations(directory, split, list(pool.map(write, range(num_clips))))
    return directory


def write_moments(
    directory: str | Path, num_videos: int, num_actions: int = 3, num_workers: int = 2, split: str = "test"
) -> Path:
    """Render videos that show one clip after the other, and write down when each of them is shown.

    `videos/<split>_moments/` has the videos and `<split>_moments.json` a row per action: `video, caption,
    start_seconds, end_seconds`. No two actions of a video have the same colour and shape. The content depends on the
    folder's seed and the video's index alone.

    Args:
        directory: Folder of `write_moving_shapes`.
        num_videos: Videos to render.
        num_actions: Clips in each, up to the number of colours and shapes.
        num_workers: Threads that render; it does not change the result.
        split: Whose descriptions of clips are drawn from, beyond those of the split itself.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: If there are no moving shapes in the folder.
        ValueError: If a number is below 1, or there are more actions than appearances.
    """
    directory = Path(directory)
    settings = read_settings(directory)
    if num_videos < 1 or not 1 <= num_actions <= len(APPEARANCES):
        raise ValueError(
            f"At least one video with 1 to {len(APPEARANCES)} actions, got {num_videos} with {num_actions} each."
        )
    name = f"{split}_{MOMENTS}"
    (directory / "videos" / name).mkdir(parents=True, exist_ok=True)

    def write(index: int) -> list[dict[str, str | float]]:
        clips = draw_actions(settings["seed"], split, settings["num_clips"][split], index, num_actions)
        rendered = [render_clip(clip)[0] for clip in clips]
        path = f"videos/{name}/{index:05d}.mp4"
        write_video(directory / path, np.concatenate(rendered))
        edges = np.cumsum([0, *map(len, rendered)]) / FRAMES_PER_SECOND
        return [
            {"video": path, "caption": clip.caption, "start_seconds": float(start), "end_seconds": float(end)}
            for clip, start, end in zip(clips, edges, edges[1:], strict=False)
        ]

    with ThreadPoolExecutor(num_workers) as pool:
        rows = [row for found in pool.map(write, range(num_videos)) for row in found]
    (directory / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    return directory


def draw_actions(seed: int, split: str, first: int, index: int, num_actions: int) -> list[ClipDescription]:
    """Descriptions of the clips that a video of several actions shows, in order, of different appearances.

    Args:
        seed: Of the data set.
        split: Of the data set.
        first: Number of the first clip that is not in the split.
        index: Of the video.
        num_actions: How many.
    """
    rng = np.random.default_rng([seed, index, *MOMENTS.encode()])
    chosen: dict[str, ClipDescription] = {}
    while len(chosen) < num_actions:
        clip = sample_clip(seed, split, first + int(rng.integers(2**31)))
        chosen.setdefault(clip.appearance, clip)
    return list(chosen.values())


def name_corrupted_split(corruption: str, severity: str) -> str:
    """Name of the split, which its annotation files start with.

    Raises:
        ValueError: If corruption or severity has no such name.
    """
    if corruption not in CORRUPTIONS:
        raise ValueError(f"corruption must be one of {CORRUPTIONS}, got {corruption!r}.")
    if severity not in SEVERITIES:
        raise ValueError(f"severity must be one of {SEVERITIES}, got {severity!r}.")
    return f"test_{corruption}_{severity}"


def corrupt_clip(
    frames: np.ndarray, boxes: np.ndarray, corruption: str, severity: str, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Damage a clip.

    Args:
        frames: RGB `(T, H, W, 3)`, uint8.
        boxes: Box of the shape in every frame `(T, 4)`.
        corruption: One of `CORRUPTIONS`.
        severity: One of `SEVERITIES`.
        rng: Decides what is drawn.

    Returns:
        Frames and boxes of the same shapes. Boxes are those of the frames shown, hidden or not.

    Raises:
        ValueError: If corruption or severity has no such name.
    """
    name_corrupted_split(corruption, severity)
    level = LEVELS[corruption][SEVERITIES.index(severity)]
    if corruption == "frame_drops":
        shown = draw_shown_frames(len(frames), level, rng)
        return frames[shown], boxes[shown]
    changed = CHANGES[corruption](frames.astype(np.float32), level, rng)
    return (np.clip(changed, 0, 255) + 0.5).astype(np.uint8), boxes


def draw_shown_frames(num_frames: int, drop_ratio: float, rng: np.random.Generator) -> np.ndarray:
    """Index of the frame shown at each time where some were lost and the one before stays on the screen, `(T,)`.

    The first frame is never lost, and the order of those left does not change.
    """
    lost = 1 + rng.permutation(num_frames - 1)[: round(drop_ratio * num_frames)]
    shown = np.arange(num_frames)
    shown[lost] = 0
    return np.maximum.accumulate(shown)


def _add_noise(frames: np.ndarray, std: float, rng: np.random.Generator) -> np.ndarray:
    return frames + std * rng.standard_normal(frames.shape, dtype=np.float32)


def _blur(frames: np.ndarray, sigma: float, _rng: np.random.Generator) -> np.ndarray:
    size = 2 * math.ceil(3 * sigma) + 1
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
    return F.gaussian_blur(pixels, [size, size], [sigma, sigma]).permute(0, 2, 3, 1).numpy()


def _change_brightness(frames: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    """Nearer to black or, as often, to white."""
    return frames * factor if rng.random() < 0.5 else 255 - (255 - frames) * factor


def _occlude(frames: np.ndarray, level: float, rng: np.random.Generator) -> np.ndarray:
    """A grey square that stays where it is."""
    side = int(level)
    top, left = rng.integers(FRAME_SIZE - side + 1, size=2)
    frames[:, top : top + side, left : left + side] = OCCLUDER_COLOR
    return frames


CHANGES: dict[str, Callable[[np.ndarray, float, np.random.Generator], np.ndarray]] = {
    "noise": _add_noise,
    "blur": _blur,
    "brightness": _change_brightness,
    "occlusion": _occlude,
}
