"""What opening a file costs before the first frame, by library."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import av

from benchmarks.common import run_interleaved, summarize
from umt_hf.processing.decoding import open_video

from .peers import PEERS, DecordBatchReader

OPENINGS_AT_A_TIME = 5
BARE, UNPROBED = "PyAV", "PyAV, first picture not decoded"


def time_opening(path: Path, repeats: int, unusable: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Processor milliseconds of opening a file and closing it.

    Args:
        path: The file; it is in the page cache.
        repeats: Rounds; every way takes its turn in each.
        unusable: Readers that do not work here.

    Returns:
        By way: median, smallest and largest.
    """
    ways: dict[str, Callable[[], Any]] = {
        "umt_hf, with the index of its frames": lambda: open_video(path).close(),
        BARE: lambda: av.open(str(path)).close(),
        UNPROBED: lambda: av.open(str(path), stream_options=[{"skip_frame": "all"}]).close(),
    }
    if DecordBatchReader.name not in unusable:
        import decord  # a peer, not a part of the package

        ways["decord"] = lambda: decord.VideoReader(str(path), num_threads=1)
    for mode in ("exact", "approximate"):
        if (name := f"torchcodec, {mode} + torchvision") in PEERS and name not in unusable:
            ways[f"torchcodec, {mode}"] = partial(_open_torchcodec, path, mode)
    for way in ways.values():
        way()
    times = run_interleaved({name: partial(_time, way) for name, way in ways.items()}, repeats)
    return {name: summarize(samples) for name, samples in times.items()}


def _open_torchcodec(path: Path, mode: Any) -> Any:
    from torchcodec.decoders import VideoDecoder

    return VideoDecoder(str(path), seek_mode=mode, num_ffmpeg_threads=1)


def _time(way: Callable[[], Any]) -> float:
    start = time.process_time()
    for _ in range(OPENINGS_AT_A_TIME):
        way()
    return 1000 * (time.process_time() - start) / OPENINGS_AT_A_TIME
