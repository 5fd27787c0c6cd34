"""Moving shapes: a small video data set rendered from a seed, so that everything runs with no download.

Each clip shows one coloured shape that goes round twice on a textured background, one revolution per half of the clip.
A single frame shows the *appearance* (6 colours x 6 shapes). Only time shows the *motion*: the sense of each of the
two revolutions. Changing a sense plays that half backwards and does nothing else, and the start angle is uniform. So
all motions have the same frames in another order: neither a frame, at whatever known time, nor an unordered set of
frames says anything about the motion, and an order-free observer cannot beat 1 / 4. That also holds for a sample of
frames that is chosen alike forwards and backwards, such as one frame of each of 8 equal segments.
"""

import json
import logging
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from tqdm import tqdm

logger = logging.getLogger(__name__)

FRAME_SIZE = 64
NUM_FRAMES = 24
FRAMES_PER_SECOND = 8
SPLITS = ("train", "validation", "test")
COLORS = {
    "red": (222, 48, 44),
    "green": (44, 168, 64),
    "blue": (48, 84, 226),
    "yellow": (240, 212, 48),
    "purple": (158, 56, 204),
    "cyan": (56, 204, 212),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
# Sense of the first and of the second revolution, 1 = clockwise on the screen.
MOTIONS = {
    "clockwise": (1, 1),
    "counterclockwise": (-1, -1),
    "clockwise then counterclockwise": (1, -1),
    "counterclockwise then clockwise": (-1, 1),
}
APPEARANCES = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)

_SETTINGS_FILE = "moving_shapes.json"
_LAST_FILE = "answers.json"  # the last one written
_FRAMES_PER_REVOLUTION = NUM_FRAMES // 2


@dataclass(frozen=True)
class ClipDescription:
    """All that determines the pixels of one clip. Lengths in pixels, angles in radians, y downwards."""

    color: str
    shape: str
    motion: str
    radius: float
    tilt: float
    orbit_radius: float
    orbit_center: tuple[float, float]
    start_angle: float
    background_seed: int

    @property
    def appearance(self) -> str:
        """Colour and shape, such as `"red circle"`: what one frame shows."""
        return f"{self.color} {self.shape}"

    @property
    def caption(self) -> str:
        """One sentence that names colour, shape and motion."""
        return f"a {self.appearance} moving {self.motion}"


def sample_clip(seed: int, split: str, index: int) -> ClipDescription:
    """Draw the description of one clip; a pure function of its arguments.

    Args:
        seed: Seed of the data set, not negative.
        split: One of `SPLITS`.
        index: Position of the clip in its split.

    Examples:
        >>> from umt_hf.moving_shapes.render import sample_clip
        >>> clip = sample_clip(seed=0, split="train", index=0)
        >>> clip == sample_clip(seed=0, split="train", index=0)
        True
        >>> clip.color, clip.shape
        ('green', 'circle')
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}.")
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    radius = rng.uniform(10.0, 11.5)
    orbit_radius = rng.uniform(13.0, 17.0)
    shift = FRAME_SIZE / 2 - 1 - orbit_radius - radius  # keeps all of the shape inside the frame
    return ClipDescription(
        color=str(rng.choice(list(COLORS))),
        shape=str(rng.choice(SHAPES)),
        motion=str(rng.choice(list(MOTIONS))),
        radius=radius,
        tilt=rng.uniform(-0.15, 0.15),
        orbit_radius=orbit_radius,
        orbit_center=tuple(FRAME_SIZE / 2 + rng.uniform(-shift, shift, size=2)),
        start_angle=rng.uniform(0.0, 2 * math.pi),
        background_seed=int(rng.integers(2**31)),
    )


def compute_centers(clip: ClipDescription) -> np.ndarray:
    """Centre of the shape in every frame, `(NUM_FRAMES, 2)` as x, y in pixels.

    Both senses visit the same angles of a revolution, half a step away from its ends, in opposite order.
    """
    steps = np.arange(_FRAMES_PER_REVOLUTION)
    steps = np.concatenate([steps if sense > 0 else steps[::-1] for sense in MOTIONS[clip.motion]])
    angles = clip.start_angle + 2 * math.pi * (steps + 0.5) / _FRAMES_PER_REVOLUTION
    return np.array(clip.orbit_center) + clip.orbit_radius * np.stack([np.cos(angles), np.sin(angles)], axis=-1)


def render_clip(clip: ClipDescription) -> tuple[np.ndarray, np.ndarray]:
    """Draw a clip.

    Returns:
        Frames `(NUM_FRAMES, FRAME_SIZE, FRAME_SIZE, 3)` as uint8 RGB, and the tight box of the shape in every frame,
        `(NUM_FRAMES, 4)` as x1, y1, x2, y2 in pixels from the top left corner, x2 and y2 exclusive.

    Examples:
        >>> from umt_hf.moving_shapes.render import render_clip, sample_clip
        >>> frames, boxes = render_clip(sample_clip(0, "train", 0))
        >>> frames.shape, boxes.shape
        ((24, 64, 64, 3), (24, 4))
    """
    centers = compute_centers(clip).astype(np.float32)[:, :, None, None]
    grid = np.arange(FRAME_SIZE, dtype=np.float32) + 0.5
    x, y = grid[None, None, :] - centers[:, 0], grid[None, :, None] - centers[:, 1]
    cosine, sine = math.cos(clip.tilt), math.sin(clip.tilt)
    distance = _compute_distance(clip.shape, cosine * x + sine * y, cosine * y - sine * x, clip.radius)
    coverage = np.clip(0.5 - distance, 0.0, 1.0)[..., None]
    background = _render_background(clip.background_seed)
    frames = background + coverage * (np.array(COLORS[clip.color], dtype=np.float32) - background)
    boxes = [_compute_box(frame_coverage[..., 0] > 0.5) for frame_coverage in coverage]
    return (frames + 0.5).astype(np.uint8), np.array(boxes)


def write_moving_shapes(
    directory: str | Path,
    num_train_clips: int = 3000,
    num_validation_clips: int = 600,
    num_test_clips: int = 900,
    seed: int = 0,
    num_workers: int = 2,
) -> Path:
    """Render the data set as .mp4 files (H.264, yuv420p) with annotations in the published file formats.

    For each split, with media paths relative to `directory`: `<split>.csv` (`path,motion label`; pre-training reads it
    and ignores the label), `<split>_motion.csv` and `<split>_appearance.csv` (`path,label`), `<split>_captions.json`
    (`video, caption`), `<split>_questions.json` (`video, question, answer, question_id`) and `<split>_boxes.json`
    (`video, width, height, objects`, each object with its attributes and a box per frame). Once: `motion_labels.json`
    and `appearance_labels.json` (id to name) and `answers.json` (the closed answer list).

    The content of a clip depends on `(seed, split, index)` alone. A finished folder of the same settings is kept.

    Args:
        directory: Folder to write, made if needed.
        num_train_clips: Clips of the training split.
        num_validation_clips: Clips of the validation split.
        num_test_clips: Clips of the test split.
        seed: Seed of the data set.
        num_workers: Threads that render; it does not change the result.

    Returns:
        The folder.

    Raises:
        FileExistsError: If the folder holds a moving-shapes data set of other settings.

    Examples:
        >>> from umt_hf.moving_shapes.render import write_moving_shapes
        >>> folder = write_moving_shapes("shapes", 8, 2, 2)
        >>> sorted(path.name for path in folder.glob("train*.csv"))
        ['train.csv', 'train_appearance.csv', 'train_motion.csv']
    """
    directory = Path(directory)
    counts = dict(zip(SPLITS, (num_train_clips, num_validation_clips, num_test_clips), strict=True))
    if _claim_directory(directory, {"seed": seed, "num_clips": counts}):
        logger.info("%s already holds these moving shapes.", directory)
        return directory
    with (
        ThreadPoolExecutor(num_workers) as pool,
        tqdm(total=sum(counts.values()), desc="rendering clips", unit="clip") as progress,
    ):
        for split, num_clips in counts.items():
            (directory / "videos" / split).mkdir(parents=True, exist_ok=True)
            rows = []
            for row in pool.map(partial(_write_clip, directory, seed, split), range(num_clips)):
                rows.append(row)
                progress.update()
            write_annotations(directory, split, rows)
    _write_json(directory / "motion_labels.json", dict(enumerate(MOTIONS)))
    _write_json(directory / "appearance_labels.json", dict(enumerate(APPEARANCES)))
    _write_json(directory / _LAST_FILE, [*COLORS, *SHAPES, *MOTIONS])
    return directory


def write_video(path: str | Path, frames: np.ndarray) -> None:
    """Encode RGB frames `(frames, height, width, 3)`, uint8, as H.264 in mp4; the same frames give the same bytes."""
    with av.open(str(path), "w") as container:
        # Every frame is a key frame of fixed quality: predicted ones keep traces of where the shape was before, and a
        # single frame would give away the motion. One thread: x264 cuts frames into as many slices as it has threads.
        options = {"preset": "faster", "qp": "32", "g": "1", "threads": "1"}
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def read_settings(directory: Path) -> dict[str, Any]:
    """Seed and numbers of clips of a finished folder.

    Raises:
        FileNotFoundError: If there is none.
    """
    if not (directory / _LAST_FILE).is_file():
        raise FileNotFoundError(
            f"{directory}: no moving shapes there; `umt-hf data moving-shapes {directory}` makes them."
        )
    return json.loads((directory / _SETTINGS_FILE).read_text(encoding="utf-8"))


def _claim_directory(directory: Path, settings: dict[str, Any]) -> bool:
    """Write the settings into the folder.

    Returns:
        Whether a data set of the same settings is already complete there.
    """
    settings = {**settings, "frame_size": FRAME_SIZE, "num_frames": NUM_FRAMES}
    settings_path = directory / _SETTINGS_FILE
    if settings_path.exists() and (found := json.loads(settings_path.read_text(encoding="utf-8"))) != settings:
        raise FileExistsError(
            f"{directory} holds moving shapes of other settings ({found}, wanted {settings}): "
            "delete it or choose another folder."
        )
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(settings_path, settings)
    return (directory / _LAST_FILE).exists()


def _write_clip(directory: Path, seed: int, split: str, index: int) -> tuple[str, ClipDescription, np.ndarray]:
    clip = sample_clip(seed, split, index)
    frames, boxes = render_clip(clip)
    name = f"videos/{split}/{index:05d}.mp4"
    write_video(directory / name, frames)
    return name, clip, boxes


def write_annotations(directory: Path, split: str, rows: list[tuple[str, ClipDescription, np.ndarray]]) -> None:
    """Write all annotation files of a split.

    Args:
        directory: Folder of the data set.
        split: What the files' names start with.
        rows: Path of each clip relative to the folder, its description, and its boxes `(T, 4)`.
    """
    motions = [(name, list(MOTIONS).index(clip.motion)) for name, clip, _ in rows]
    appearances = [(name, APPEARANCES.index(clip.appearance)) for name, clip, _ in rows]
    for suffix, labels in (("", motions), ("_motion", motions), ("_appearance", appearances)):
        lines = "".join(f"{name},{label}\n" for name, label in labels)
        (directory / f"{split}{suffix}.csv").write_text(lines, encoding="utf-8")
    _write_json(
        directory / f"{split}_captions.json", [{"video": name, "caption": clip.caption} for name, clip, _ in rows]
    )
    questions = [
        {"video": name, "question": question, "answer": answer}
        for name, clip, _ in rows
        for question, answer in _ask_questions(clip)
    ]
    _write_json(directory / f"{split}_questions.json", [{**row, "question_id": i} for i, row in enumerate(questions)])
    _write_json(directory / f"{split}_boxes.json", [_describe_boxes(*row) for row in rows])


def _ask_questions(clip: ClipDescription) -> list[tuple[str, str]]:
    return [
        (f"what color is the {clip.shape}?", clip.color),
        (f"what shape is the {clip.color} object?", clip.shape),
        (f"how does the {clip.appearance} move?", clip.motion),
    ]


def _describe_boxes(name: str, clip: ClipDescription, boxes: np.ndarray) -> dict[str, Any]:
    attributes = {"color": clip.color, "shape": clip.shape, "motion": clip.motion}
    return {
        "video": name,
        "width": FRAME_SIZE,
        "height": FRAME_SIZE,
        "objects": [{**attributes, "boxes": boxes.tolist()}],
    }


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def _compute_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance in pixels from the outline, negative inside (near it, which is all that anti-aliasing needs)."""
    if shape == "circle":
        return np.hypot(x, y) - 0.9 * radius
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.8 * radius
    if shape == "triangle":
        return _project_on_normals(3, x, y).max(axis=0) - 0.55 * radius
    if shape == "star":  # inside at least four of the five half-planes of a pentagram
        return np.partition(_project_on_normals(5, x, y), 3, axis=0)[3] - 0.36 * radius
    if shape == "cross":
        near, far = np.minimum(abs(x), abs(y)), np.maximum(abs(x), abs(y))
        return np.maximum(near - 0.3 * radius, far - radius)
    if shape == "ring":
        return abs(np.hypot(x, y) - 0.72 * radius) - 0.26 * radius
    raise ValueError(f"shape must be one of {SHAPES}, got {shape!r}.")


def _project_on_normals(num_sides: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Position along the outward normals of a regular polygon whose first side is the lower one."""
    angles = 2 * math.pi * np.arange(num_sides) / num_sides
    return np.stack([math.sin(angle) * x + math.cos(angle) * y for angle in angles])


def _render_background(seed: int) -> np.ndarray:
    """A muted colour with three crossing waves of brightness, `(FRAME_SIZE, FRAME_SIZE, 3)` in 0-255."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:FRAME_SIZE, :FRAME_SIZE]
    brightness = np.zeros((FRAME_SIZE, FRAME_SIZE))
    for _ in range(3):
        frequency, angle, phase = rng.uniform(0.01, 0.12), rng.uniform(0, math.pi), rng.uniform(0, 2 * math.pi)
        wave = math.cos(angle) * x + math.sin(angle) * y
        brightness += rng.uniform(4, 14) * np.sin(2 * math.pi * frequency * wave + phase)
    tint = rng.uniform(60, 170) + rng.uniform(-18, 18, size=3)
    return np.clip(tint + brightness[..., None], 0, 255).astype(np.float32)


def _compute_box(mask: np.ndarray) -> list[int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
