"""Reading hostile files with `open_video` and by an independent decode, and what is wrong between the two."""

import dataclasses
import gc
import io
import os
import random
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np

from tests.faults.files import SECRET_COLOUR, HostileFile
from tests.unit.video_files import read_number
from umt_hf.processing.decoding import VideoDecodingError, VideoReader, open_video

FORMS = ("path", "bytes", "url", "file object")
HANG_SECONDS = 20
SLOW_SECONDS = 5
SECRET_TOLERANCE = 20
OWN_FOLDER = "/umt_hf_"
SPREAD = 2  # pixels that colours reach when they are converted
COLOUR_TOLERANCE = 3.0  # mean grey levels: other libraries convert the colours of 10 bits and odd sizes otherwise
WATCHED_EVENTS = (
    "open",
    "socket.connect",
    "socket.bind",
    "socket.getaddrinfo",
    "subprocess.Popen",
    "os.exec",
    "os.system",
)


@dataclass
class Verdict:
    """What became of a file.

    Args:
        outcome: "right", "refused" (a named error), or what is wrong: "wrong frame", "unnamed", "accepted" (what had
            to be refused), "rejected" (what had to be read), "secret", "opened", "slow".
        detail: The reason, or where.
    """

    outcome: str
    detail: str = ""


FAULTS = ("wrong frame", "unnamed", "accepted", "rejected", "secret", "opened", "slow")


@dataclass
class Watch:
    """Notes what Python itself opens, connects to and starts."""

    allowed: tuple[str, ...] = ()
    is_on: bool = False
    events: list[str] = field(default_factory=list)

    def install(self) -> "Watch":
        """Begin; an audit hook cannot be taken away again."""
        sys.addaudithook(self._note)
        return self

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on or event not in WATCHED_EVENTS:
            return
        target = str(arguments[0])
        is_own = target in self.allowed or target.isdigit() or OWN_FOLDER in target  # decord reads bytes from there
        if event == "open" and (is_own or target.startswith(tuple(sys.path[1:]))):
            return
        self.events.append(f"{event} {target[:200]}")


def decode_reference(file: HostileFile, is_strict: bool = False, holds: bool = False) -> list[np.ndarray]:
    """Every frame in order, by plain decoding, with what is damaged left out.

    Args:
        file: What to decode.
        is_strict: Whether a picture in which the decoder notices damage is left out rather than patched up.
        holds: Whether all decoded pictures are held on to, so that the decoder fills new buffers instead of old ones.
    """
    frames: list[np.ndarray] = []
    held: list[av.VideoFrame] = []
    try:
        with av.open(io.BytesIO(file.content), metadata_errors="ignore") as container:
            stream = container.streams.video[file.stream]
            stream.codec_context.thread_count = 1  # several leave other pictures behind in place of damaged ones
            if is_strict:
                stream.codec_context.options = {"err_detect": "explode"}
            for packet in container.demux(stream):
                try:
                    decoded = packet.decode()
                except av.FFmpegError:
                    continue
                held += decoded if holds else []
                frames += [np.ascontiguousarray(file.show(frame.to_ndarray(format="rgb24"))) for frame in decoded]
    except (av.FFmpegError, IndexError, ValueError, AttributeError):
        return frames
    return frames


def decode_from_key_frames(file: HostileFile, holds: bool = False) -> list[np.ndarray]:
    """The frames that decoding gives when it begins at each key frame in turn: damage in front of it is forgotten."""
    frames: list[np.ndarray] = []
    held: list[av.VideoFrame] = []
    try:
        with av.open(io.BytesIO(file.content), metadata_errors="ignore") as container:
            flags = [packet.is_keyframe for packet in container.demux(container.streams.video[file.stream])]
        for start in [number for number, is_key in enumerate(flags) if is_key]:
            # Afresh, since a decoder keeps a part of its state when it is emptied.
            with av.open(io.BytesIO(file.content), metadata_errors="ignore") as container:
                stream = container.streams.video[file.stream]
                stream.codec_context.thread_count = 1
                for number, packet in enumerate(container.demux(stream)):
                    try:
                        decoded = packet.decode() if number >= start else []
                    except av.FFmpegError:
                        continue
                    held += decoded if holds else []
                    frames += [file.show(frame.to_ndarray(format="rgb24")) for frame in decoded]
    except (av.FFmpegError, IndexError, ValueError, AttributeError):
        return frames
    return frames


def list_requests(num_frames: int, generator: random.Random) -> list[list[int]]:
    """What clips ask for: spread, neighbouring, first, last, unordered, repeated, all."""
    last = num_frames - 1
    spread = [round(i * last / 7) for i in range(8)]
    start = generator.randint(0, last)
    window = [min(start + i, last) for i in range(8)]
    scattered = [generator.randint(0, last) for _ in range(6)]
    return [[last], [0], spread, window, scattered, *([list(range(num_frames))] if num_frames <= 60 else [])]


def is_secret(frames: np.ndarray) -> bool:
    """Whether a frame shows the planted video."""
    return bool((np.abs(frames.astype(int) - SECRET_COLOUR).mean((1, 2, 3)) < SECRET_TOLERANCE).any())


def write_file(file: HostileFile, folder: Path) -> Path:
    """Put a file into a folder of its kind, so that equal names do not meet."""
    place = folder / file.kind.replace(" ", "_")
    place.mkdir(exist_ok=True)
    path = place / file.name
    path.write_bytes(file.content)
    return path


def check_file(file: HostileFile, folder: Path, watch: Watch, decoder: str = "pyav", seed: int = 0) -> Verdict:
    """Read a file in every form, and compare."""
    if file.source is not None:
        return _check_form(file, file.source(folder), [], watch, decoder, seed)
    path = write_file(file, folder)
    reference: list[np.ndarray] = []
    if file.expected != "refused":
        reference = decode_reference(file) + (decode_reference(file, True) if file.expected == "either" else [])
    sources: dict[str, Any] = {"path": str(path), "url": path.as_uri()}
    if not file.name.endswith(".npy"):
        sources |= {"bytes": file.content, "file object": io.BytesIO(file.content)}
    verdict = Verdict("right")
    watch.allowed = (str(path),)
    for form in (form for form in FORMS if form in sources):
        verdict = _check_form(file, sources[form], reference, watch, decoder, seed)
        if verdict.outcome in FAULTS:
            return Verdict(verdict.outcome, f"as {form}: {verdict.detail}")
    return verdict


def _check_form(
    file: HostileFile, source: Any, reference: list[np.ndarray], watch: Watch, decoder: str, seed: int
) -> Verdict:
    started = time.monotonic()
    is_collecting = gc.isenabled()
    gc.disable()  # a finalizer of something left behind by another test opens folders while it deletes them
    watch.events.clear()
    watch.is_on = True
    try:
        with open_video(source, decoder) as reader:
            tolerance = 0.0 if decoder == "pyav" else COLOUR_TOLERANCE
            verdict = _compare(file, reader, reference, random.Random(seed), tolerance)
    except VideoDecodingError as error:
        name = file.name.split("\n")[0]
        is_named = (
            name in str(error) or "<video of" in str(error) or "file object" in str(error) or file.source is not None
        )
        is_named = is_named or name in str(error).replace("%20", " ") or "%" in str(error)
        verdict = Verdict("refused" if is_named else "unnamed", str(error))
    except Exception as error:
        verdict = Verdict("unnamed", repr(error)[:300])
    finally:
        watch.is_on = False
        if is_collecting:
            gc.enable()
    if watch.events:
        return Verdict("opened", "; ".join(watch.events[:3]))
    if verdict.outcome == "refused" and file.expected == "right" and decoder == "pyav":
        return Verdict("rejected", verdict.detail)
    if time.monotonic() - started > SLOW_SECONDS:
        return Verdict("slow", f"{time.monotonic() - started:.1f} s")
    return verdict


def _compare(
    file: HostileFile, reader: VideoReader, reference: list[np.ndarray], generator: random.Random, tolerance: float
) -> Verdict:
    if file.expected == "refused":
        frames = reader.get_frames([0])
        return Verdict("secret" if is_secret(frames) else "accepted", f"{reader.num_frames} frames")
    if file.expected == "right" and reader.num_frames != len(reference):
        return Verdict("wrong frame", f"{reader.num_frames} frames, {len(reference)} in the reference")
    is_read = False
    reasons = []
    for request in list_requests(reader.num_frames, generator):
        try:
            frames = reader.get_frames(request)
        except VideoDecodingError as error:
            if file.expected == "right":
                return Verdict("rejected", str(error))
            reasons.append(str(error))
            continue
        is_read = True
        for frame, index in zip(frames, request, strict=True):
            if not _is_right(file, frame, index, reference, tolerance):
                return Verdict("wrong frame", f"frame {index} of {request[:10]}")
    return Verdict("right" if is_read else "refused", "; ".join(reasons[:1]))


def _is_right(file: HostileFile, frame: np.ndarray, index: int, reference: list[np.ndarray], tolerance: float) -> bool:
    if index < len(reference) and _is_equal(frame, reference[index], tolerance):
        return True
    if file.expected != "either":
        return False
    # Damage that leaves out pictures moves the numbers of later ones in plain decoding; the picture is a true one.
    if any(_is_equal(frame, other, tolerance) for other in reference):
        return True
    # What a damaged picture shows depends on where decoding began. It is picture `index`, by the number drawn on it
    # or by what it resembles.
    if read_number(frame) == index or any(
        _is_equal(frame, other, tolerance) for other in decode_from_key_frames(file)
    ):
        return True
    intact = decode_reference(dataclasses.replace(file, content=file.intact)) if file.intact else []
    distances = [np.abs(frame.astype(int) - other).mean() for other in intact if other.shape == frame.shape]
    if bool(distances) and int(np.argmin(distances)) == index:
        return True
    return any(
        _is_equal_where_written(frame, plain, held)
        for decode in (decode_reference, decode_from_key_frames)
        for plain, held in zip(decode(file), decode(file, holds=True), strict=True)
    )


def _is_equal_where_written(frame: np.ndarray, plain: np.ndarray, held: np.ndarray) -> bool:
    """Whether a frame equals a reference in all that the decoder wrote.

    FFmpeg's decoder of VP8 leaves the rest of a damaged picture unwritten and says nothing. What is there then is an
    earlier picture of the video, whose buffer it took over, or zeros where the buffer is new: it depends on how many
    pictures the caller holds. So the two references differ there, and only there.
    """
    if not frame.shape == plain.shape == held.shape:
        return False
    unwritten = (plain != held).any(-1)
    for axis in (0, 1):
        unwritten = np.any([np.roll(unwritten, step, axis) for step in range(-SPREAD, SPREAD + 1)], axis=0)
    return not unwritten.all() and np.array_equal(frame[~unwritten], plain[~unwritten])


def _is_equal(frame: np.ndarray, other: np.ndarray, tolerance: float) -> bool:
    if tolerance == 0 or frame.shape != other.shape:
        return np.array_equal(frame, other)
    return bool(np.abs(frame.astype(int) - other).mean() <= tolerance)


def count_descriptors() -> int:
    """Open files of this process."""
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def read_memory() -> int:
    """Resident bytes of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def is_port_free(port: int) -> bool:
    """Whether nothing listens on a UDP port."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
