"""The `ffmpeg` command as a second reference for undamaged files: another build, another version, another caller."""

import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.faults.check import write_file
from tests.faults.files import HostileFile
from umt_hf.processing.decoding import VideoDecodingError, open_video

# Mean grey levels of a frame. The command converts the colours of interlaced frames field by field, and older versions
# round those of 10 bits and of DV otherwise.
TOLERANCE = 2.0
SECONDS = 60


@dataclass
class Comparison:
    """What the command and `open_video` say about a file.

    Args:
        outcome: "equal", "close" (within `TOLERANCE`), "count", "pixels", or "unread" where the command shows nothing.
        detail: The numbers.
        difference: Largest mean difference of a frame, in grey levels.
    """

    outcome: str
    detail: str = ""
    difference: float = 0.0


def find_command() -> str | None:
    """The command, where it is installed."""
    return shutil.which("ffmpeg")


def decode_by_command(command: str, path: Path, stream: int) -> bytes:
    """All frames as the command shows them, turned upright, one behind the other."""
    options = ["-v", "error", "-nostdin", "-threads", "1"]
    output = ["-fps_mode", "passthrough", "-sws_flags", "bilinear", "-pix_fmt", "rgb24", "-f", "rawvideo", "-"]
    arguments = [command, *options, "-i", f"file:{path}", "-map", f"0:v:{stream}", *output]
    return subprocess.run(arguments, capture_output=True, timeout=SECONDS).stdout


def compare_with_command(file: HostileFile, folder: Path, command: str) -> Comparison | None:
    """Compare every frame of an undamaged file; `None` for other files."""
    if file.expected != "right" or file.source is not None or file.name.endswith(".npy") or "\x00" in file.name:
        return None
    path = write_file(file, folder)
    with open_video(path) as reader:
        try:
            frames = reader.get_frames(range(reader.num_frames))
        except VideoDecodingError as error:  # a test of the limits
            return Comparison("unread", str(error))
    content = decode_by_command(command, path, file.stream)
    count, rest = divmod(len(content), frames[0].size)
    if not content:
        return Comparison("unread", "no frame from the command")
    if rest or count != len(frames):
        return Comparison("count", f"{len(content) / frames[0].size:g} frames from the command, {len(frames)} from us")
    theirs = np.frombuffer(content, np.uint8).reshape(frames.shape)
    means = np.abs(theirs.astype(np.int16) - frames).reshape(count, -1).mean(1)
    if not means.any():
        return Comparison("equal")
    outcome = "close" if means.max() <= TOLERANCE else "pixels"
    return Comparison(outcome, f"mean difference up to {means.max():.2f} grey levels", float(means.max()))


def print_comparison(files: list[HostileFile], folder: Path) -> int:
    """Compare all undamaged files; returns the number of those that disagree."""
    command = find_command()
    if command is None:
        print("ffmpeg command: not installed, so that there is no second reference")
        return 0
    counts: Counter[str] = Counter()
    lines, largest = [], 0.0
    for file in files:
        found = compare_with_command(file, folder, command)
        if found is None:
            continue
        counts[found.outcome] += 1
        if found.outcome == "close":
            largest = max(largest, found.difference)
        if found.outcome != "equal":
            lines.append(f"  {file.kind}: {file.name!r}: {found.outcome}: {found.detail}")
    version = subprocess.run([command, "-version"], capture_output=True, text=True).stdout.split()[2]
    print(
        f"ffmpeg command {version}: {counts.total()} undamaged files: {counts['equal']} equal in every pixel, "
        f"{counts['close']} in all but the conversion of colours (mean difference up to {largest:.2f} grey levels), "
        f"{counts['unread']} not read by the command, {counts['count'] + counts['pixels']} disagree"
    )
    for line in lines:
        print(line)
    return counts["count"] + counts["pixels"]
