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
"""Where the bytes of a video or picture come from, how much of them is read, and whether the file is complete.

A source is opened as a binary file here, and only that file reaches a decoder: FFmpeg never sees a name, which it
would take as a protocol (`data:clip.mp4`), a pattern (`%03d.png`) or a hint at a format.
"""

import contextlib
import functools
import http.client
import io
import os
import re
import socket
import struct
import tarfile
import threading
import time
import unicodedata
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO
from urllib.parse import urlparse

# A dictionary is a row of a `datasets` column: its `bytes`, or else its `path`.
VideoSource = str | os.PathLike | bytes | BinaryIO | dict[str, Any]

DOWNLOAD_TIMEOUT_SECONDS = 60  # without a byte
WAIT_SECONDS = 10.0  # without a new byte of a stream
POLL_SECONDS = 0.05
DOWNLOAD_BLOCK = 1 << 20
URL_START = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)  # more than one letter: `C://` is a drive
# Object stores that are read through fsspec, and the package that knows each. Others of its protocols are not: some of
# them (`reference`, `dir`, `github`) lead on to other files, and an address may come from a stranger's list.
STORES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs",
    "oss": "ossfs", "hf": "huggingface_hub", "memory": "fsspec",
}  # fmt: skip
TAR_PLACE = re.compile(r"(.+\.tar/.+):(\d+):(\d+)", re.IGNORECASE | re.DOTALL)
TAR_END = re.compile(r"\.tar(?=/)", re.IGNORECASE)
TAR_BLOCK = 512
TAR_CHANGED = "the tar has changed since it was listed. Leave tars as they are, or start again."
LIMIT_VARIABLE = "UMT_HF_"

MP4_TOP_LEVEL_BOXES = b"ftyp styp moov moof mdat free skip wide sidx mfra uuid".split()
MATROSKA_EBML, MATROSKA_SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
AVI_UNKNOWN_SIZES = (0, 0xFFFFFFFF)  # written to a pipe, or never finished: the size says nothing
RIFF_HEADER_SIZE = 8


class VideoDecodingError(ValueError):
    """A video or picture cannot be read. The message names the file, the reason and what to do."""


@dataclass
class ReadingLimits:
    """How much one file may ask for, so that a small file cannot eat a machine; `LIMITS` holds those in force.

    Set its fields (`media_files.LIMITS.max_frames = None` switches one off), or, for commands and their workers, the
    environment variables `UMT_HF_MAX_FRAME_PIXELS` and so on (`none` switches one off).

    Attributes:
        max_frame_pixels: Pixels per frame or picture, before and after resizing; twice an 8K frame by default.
        max_frames: Frames decoded from one video at a time.
        max_download_bytes: Size of a download, from a web server or an object store.
        max_download_seconds: Time that a download may take, from the connection to the last byte.
    """

    max_frame_pixels: int | None = 2**26
    max_frames: int | None = 10_000
    max_download_bytes: int | None = 2**31
    max_download_seconds: float | None = 600

    @classmethod
    def from_environment(cls) -> "ReadingLimits":
        """The defaults, overruled by environment variables.

        Raises:
            ValueError: If a variable is neither a number nor `none`.
        """
        limits = cls()
        for field in vars(limits):
            variable = LIMIT_VARIABLE + field.upper()
            text = os.environ.get(variable, "").strip().lower()
            if text == "none":
                setattr(limits, field, None)
            elif text:
                try:
                    setattr(limits, field, float(text) if field.endswith("seconds") else int(text))
                except ValueError as error:
                    raise ValueError(f"{variable} must be a number or `none`, got {text!r}.") from error
        return limits

    def check_frame_size(self, name: str, height: int, width: int) -> None:
        """Refuse a frame of too many pixels.

        Raises:
            VideoDecodingError: If it has more than `max_frame_pixels`.
        """
        if self.max_frame_pixels is not None and height * width > self.max_frame_pixels:
            raise VideoDecodingError(
                f"{name}: has frames of {width} x {height} pixels, more than the limit of {self.max_frame_pixels}. "
                f"Leave it out, or raise {LIMIT_VARIABLE}MAX_FRAME_PIXELS if you trust it."
            )

    def check_num_frames(self, name: str, num_frames: int) -> None:
        """Refuse to read too many frames of one video at a time.

        Raises:
            VideoDecodingError: If there are more than `max_frames`.
        """
        if self.max_frames is not None and num_frames > self.max_frames:
            raise VideoDecodingError(
                f"{name}: {num_frames} frames are asked of it at a time, more than the limit of {self.max_frames}. "
                f"Ask for fewer (a lower fps), or raise {LIMIT_VARIABLE}MAX_FRAMES."
            )


LIMITS = ReadingLimits.from_environment()


@dataclass
class MediaFile:
    """An open file with the name that errors use.

    Args:
        name: Path, URL, or a description of the bytes given.
        file: Its bytes; seekable.
        path: Where it is on the disk, absolute; `None` for bytes, URLs and file objects.
    """

    name: str
    file: BinaryIO
    path: str | None = None

    def close(self) -> None:
        """Close the file, unless it was handed in open."""
        if self.path is not None:
            self.file.close()


class GrowingFile:
    """A file that another program is still writing: at its end, reading waits for more.

    Args:
        path: Of the file.
        wait_seconds: It is complete when no byte has come for that long.

    Raises:
        VideoDecodingError: If there is no such file.
    """

    def __init__(self, path: str, wait_seconds: float):
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115  until `close`
        except OSError as error:
            raise VideoDecodingError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error
        self._wait_seconds = wait_seconds

    def read(self, size: int) -> bytes:
        """At most `size` bytes, as soon as there are some; none at the end."""
        deadline = time.monotonic() + self._wait_seconds
        while not (content := self._file.read(size)) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return content or b""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def open_source(source: VideoSource, kind: str = "video") -> MediaFile:
    """Open a path, a URL, bytes or a file object, and make sure that it is complete.

    Args:
        source: What to open.
        kind: What errors call bytes.

    Raises:
        VideoDecodingError: If there is no such file, or it is empty, cut short or too large a download.
        TypeError: If the source is of no known kind.
    """
    media = _resolve_source(source, kind)
    try:
        check_complete(media)
    except BaseException:
        media.close()
        raise
    return media


def unwrap_row(source: Any) -> Any:
    """The path of a row of a `datasets` column, `{"path", "bytes"}`, that holds no bytes; anything else as it is.

    Raises:
        VideoDecodingError: If the row has neither.
    """
    if not isinstance(source, dict) or source.get("bytes"):
        return source
    if not source.get("path"):
        raise VideoDecodingError("<row without a video>: has neither a path nor bytes. Fill it in or leave it out.")
    return source["path"]


def find_file(path: str) -> str:
    """The path under which a file exists: macOS may have decomposed the accents of its name, and a list may not."""
    if os.path.exists(path):
        return path
    others = (unicodedata.normalize(form, path) for form in ("NFC", "NFD"))
    return next((other for other in others if os.path.exists(other)), path)


def _resolve_source(source: VideoSource, kind: str) -> MediaFile:
    source = unwrap_row(source)
    if isinstance(source, dict):
        return MediaFile(
            str(source.get("path") or f"<{kind} of {len(source['bytes'])} bytes>"), io.BytesIO(source["bytes"])
        )
    if isinstance(source, bytes | bytearray | memoryview):
        return MediaFile(f"<{kind} of {len(source)} bytes>", io.BytesIO(source))
    if hasattr(source, "read"):
        file: Any = source
        name = str(getattr(file, "name", "<file object>"))
        return MediaFile(name, file if file.seekable() else io.BytesIO(file.read()))
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"A {kind} is a path, a URL, bytes, a row with one of them, or a binary file object, got "
            f"{type(source).__name__}."
        )
    name = path = os.fsdecode(source)
    if (media := _open_in_tar(name)) is not None:
        return media
    if (protocol := find_protocol(name)) is not None:
        if protocol != "file":
            return MediaFile(name, io.BytesIO(download(name)))
        try:
            path = urllib.request.url2pathname(urlparse(name).path)
        except ValueError as error:
            raise VideoDecodingError(f"{name}: is not a valid URL ({error}). Check it.") from error
    path = find_file(path)
    if not os.path.isfile(path):
        raise VideoDecodingError(
            f"{name}: {'is not a file' if os.path.exists(path) else 'no such file'}. Check the path."
        )
    try:
        return MediaFile(name, open(path, "rb"), os.path.abspath(path))
    except OSError as error:
        raise VideoDecodingError(f"{name}: cannot be read ({error.strerror}). Check the path.") from error


def find_protocol(path: str) -> str | None:
    """Protocol of an address, such as `https` or `s3`, in lower case; `None` for a path of this machine."""
    start = URL_START.match(path) if "://" in path else None
    return None if start is None else start[1].lower()


def name_tar_place(tar: str, member: str, offset: int, size: int) -> str:
    """The path under which a file in a tar is opened without a look at the files before it.

    Args:
        tar: Path of the tar, which is not compressed.
        member: Name of the file in it.
        offset: Where its first byte is.
        size: Its bytes.
    """
    return f"{tar}/{member}:{offset}:{size}"


def find_holder(path: str) -> str:
    """The file on the disk that holds a video: its tar, where a path is a place in one, else the path itself."""
    if not (place := TAR_PLACE.fullmatch(path)):
        return path
    tars = [place[1][: end.end()] for end in TAR_END.finditer(place[1])]
    return next((tar for tar in tars if os.path.isfile(tar)), path)


def _open_in_tar(path: str) -> MediaFile | None:
    """A file in a tar, by its place; `None` for any other path.

    Raises:
        VideoDecodingError: If the tar has changed or cannot be read.
    """
    if not (place := TAR_PLACE.fullmatch(path)) or (tar := find_holder(path)) == path:
        return None
    name, offset, size = place[1], int(place[2]), int(place[3])
    try:
        with open(tar, "rb") as file:
            file.seek(max(offset - TAR_BLOCK, 0))
            header = tarfile.TarInfo.frombuf(file.read(TAR_BLOCK), "utf-8", "surrogateescape")
            content = file.read(size) if header.size == size else b""
    except OSError as error:
        raise VideoDecodingError(f"{name}: cannot be read ({error.strerror}). Check the tar.") from error
    except tarfile.TarError as error:
        raise VideoDecodingError(f"{name}: {TAR_CHANGED}") from error
    if len(content) != size:
        raise VideoDecodingError(f"{name}: {TAR_CHANGED}")
    return MediaFile(name, io.BytesIO(content))


def download(url: str) -> bytes:
    """Fetch a file over http or https, or from an object store, within `LIMITS`.

    Raises:
        VideoDecodingError: If it cannot be fetched, is cut short or exceeds a limit, or the protocol is unknown.
        ImportError: If the library of an object store is missing.
    """
    return _download_from_web(url) if find_protocol(url) in ("http", "https") else _download_from_store(url)


def open_store(url: str) -> tuple[Any, str]:
    """The file system of fsspec for an address in an object store, and the path there.

    How a store is reached, and with which keys, stands in its own variables and in the settings of fsspec.

    Raises:
        VideoDecodingError: If the protocol is unknown.
        ImportError: If the store's library is missing.
    """
    protocol = find_protocol(url)
    if protocol not in STORES:
        known = ", ".join(["http", "https", "file", *STORES])
        raise VideoDecodingError(f"{url}: the protocol {protocol} is not read; known are {known}. Check the address.")
    try:
        import fsspec

        # Not by the address, of which fsspec would also follow chains (`zip://a::file:///b`).
        store = fsspec.filesystem(protocol)
    except ImportError as error:
        package = STORES[protocol]
        raise ImportError(f"{url}: reading {protocol}:// needs {package}, run `pip install {package}`.") from error
    except Exception as error:  # whatever a store's library raises, without keys for example
        raise VideoDecodingError(_describe_store_error(url, error)) from error
    return store, store._strip_protocol(url)


def ask_store(url: str, question: Callable[[threading.Event], Any]) -> Any:
    """Give what a call to a store returns, if it comes within the time of a download.

    Args:
        url: What the call is about, for errors.
        question: Makes the call, and gives up once its argument is set.

    Raises:
        VideoDecodingError: If the store fails or does not answer in time.
    """
    answers: list[Any] = []
    errors: list[Exception] = []
    is_late = threading.Event()

    def ask() -> None:
        try:
            answers.append(question(is_late))
        except Exception as error:
            errors.append(error)

    # In a thread that may be left behind: libraries of stores have no time-out for all of a file.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(LIMITS.max_download_seconds)
    is_late.set()
    if answers:
        return answers[0]
    if not errors:
        reason = f"it took longer than {LIMITS.max_download_seconds} seconds"
        raise VideoDecodingError(f"{url}: cannot be read ({reason}). Check the address and the connection.")
    if isinstance(errors[0], VideoDecodingError):
        raise errors[0]
    raise VideoDecodingError(_describe_store_error(url, errors[0])) from errors[0]


def _describe_store_error(url: str, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{url}: no such file. Check the address."
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return f"{url}: cannot be read ({reason}). Check the address, and the settings and keys of the store."


def _download_from_store(url: str) -> bytes:
    store, path = open_store(url)

    def fetch(is_late: threading.Event) -> bytes:
        limit, body = LIMITS.max_download_bytes, io.BytesIO()
        facts = store.info(path)
        if facts.get("type") == "directory":
            raise VideoDecodingError(f"{url}: is a folder, not a file. Check the address.")
        promised = facts.get("size")
        _check_download_size(url, promised or 0, limit)
        with store.open(path, mode="rb") as file:
            while not is_late.is_set() and (block := file.read(DOWNLOAD_BLOCK)):
                body.write(block)
                _check_download_size(url, body.tell(), limit)
        if promised is not None and body.tell() < promised:
            raise OSError(f"it ended after {body.tell()} of {promised} bytes")
        return body.getvalue()

    return ask_store(url, fetch)


def _download_from_web(url: str) -> bytes:
    """Fetch a file over http or https; redirections lead to these two protocols alone."""
    sockets: list[socket.socket] = []
    is_late = threading.Event()

    def stop() -> None:
        is_late.set()
        for connection in sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    seconds = LIMITS.max_download_seconds
    # A time-out of a socket counts from its last byte, so that a server that sends one a minute would never end.
    timer = threading.Timer(seconds, stop) if seconds is not None else None
    try:
        if timer is not None:
            timer.daemon = True
            timer.start()
        content = _fetch(url, sockets)
        if is_late.is_set():  # a body without a length ends where the connection does
            raise OSError("the connection was shut down")
        return content
    except VideoDecodingError:
        raise
    except (OSError, ValueError, AttributeError, http.client.HTTPException) as error:
        # AttributeError: what `ssl` raises where a connection is shut down while it is read.
        if isinstance(error, AttributeError) and not is_late.is_set():
            raise
        reason = f"it took longer than {seconds} seconds" if is_late.is_set() else error
        raise VideoDecodingError(
            f"{url}: cannot be downloaded ({reason}). Check the URL and the connection."
        ) from error
    finally:
        if timer is not None:
            timer.cancel()


def _fetch(url: str, sockets: list[socket.socket]) -> bytes:
    """Read the body of a response; each connection is noted in `sockets`."""
    request = urllib.request.Request(url, headers={"User-Agent": "umt_hf"})
    limit = LIMITS.max_download_bytes
    body = io.BytesIO()
    with _build_opener(sockets).open(request, timeout=DOWNLOAD_TIMEOUT_SECONDS) as response:
        promised = response.length
        _check_download_size(url, promised or 0, limit)
        while block := response.read1(DOWNLOAD_BLOCK):
            body.write(block)
            _check_download_size(url, body.tell(), limit)
    if promised is not None and body.tell() < promised:
        raise OSError(f"it ended after {body.tell()} of {promised} bytes")
    return body.getvalue()


def _check_download_size(url: str, size: int, limit: int | None) -> None:
    if limit is not None and size > limit:
        raise VideoDecodingError(
            f"{url}: cannot be downloaded: {size} bytes are more than the limit of {limit}. Leave it out, or raise "
            f"{LIMIT_VARIABLE}MAX_DOWNLOAD_BYTES."
        )


def _build_opener(sockets: list[socket.socket]) -> urllib.request.OpenerDirector:
    """An opener for http and https alone; urllib's default one also follows redirections to ftp."""

    class HTTPHandler(urllib.request.HTTPHandler):
        def http_open(self, req: urllib.request.Request) -> Any:
            return self.do_open(_noting(http.client.HTTPConnection, sockets), req)

    class HTTPSHandler(urllib.request.HTTPSHandler):
        def https_open(self, req: urllib.request.Request) -> Any:
            return self.do_open(_noting(http.client.HTTPSConnection, sockets), req)

    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler, HTTPHandler, HTTPSHandler, urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler, urllib.request.HTTPErrorProcessor, urllib.request.UnknownHandler,
    ):  # fmt: skip
        opener.add_handler(handler())
    return opener


def _noting(kind: type[http.client.HTTPConnection], sockets: list[socket.socket]) -> Callable:
    """A maker of connections of a kind, which notes the socket of each."""

    class Connection(kind):
        def connect(self) -> None:
            super().connect()
            sockets.append(self.sock)

    return functools.partial(Connection)


def check_complete(media: MediaFile) -> None:
    """Refuse an empty file, and one that ends before the place that its own headers promise.

    Raises:
        VideoDecodingError: If it is empty, cut short or cannot be read.
    """
    try:
        size = media.file.seek(0, os.SEEK_END)
        media.file.seek(0)
        promised = _promised_size(media.file, size)
    except (OSError, ValueError) as error:  # ValueError: a file object that was closed
        raise VideoDecodingError(f"{media.name}: cannot be read ({error}). Check the path.") from error
    if size == 0:
        raise VideoDecodingError(f"{media.name}: is empty (0 bytes). Fetch it again or leave it out.")
    if promised > size:
        raise VideoDecodingError(
            f"{media.name}: is cut short: it holds {size} of {promised} bytes. Fetch it again or leave it out."
        )


def _promised_size(content: BinaryIO, size: int) -> int:
    """Give the size in bytes that an MP4, Matroska or AVI file claims for itself; 0 for any other."""
    head = content.read(12)
    if head[:4] == b"RIFF" and head[8:] == b"AVI ":
        length = int.from_bytes(head[4:8], "little")
        # Some writers count the eight bytes in front of the length, too.
        return 0 if length in AVI_UNKNOWN_SIZES or length - RIFF_HEADER_SIZE <= size - RIFF_HEADER_SIZE else 8 + length
    if head[:4] == MATROSKA_EBML:
        content.seek(4)
        content.seek(_read_matroska_size(content) or 0, os.SEEK_CUR)
        if content.read(4) != MATROSKA_SEGMENT:
            return 0
        segment_size = _read_matroska_size(content)
        return content.tell() + segment_size if segment_size is not None else 0
    if head[4:8] in MP4_TOP_LEVEL_BOXES:
        return _end_of_mp4_boxes(content, size)
    return 0


def _read_matroska_size(content: BinaryIO) -> int | None:
    """Read a variable-length integer; `None` is Matroska's "unknown"."""
    first = content.read(1)
    if not first or not first[0]:
        return None
    num_bits = 7 * (9 - first[0].bit_length())
    value = int.from_bytes(first + content.read(num_bits // 7 - 1), "big") & ((1 << num_bits) - 1)
    return None if value == (1 << num_bits) - 1 else value


def _end_of_mp4_boxes(content: BinaryIO, size: int) -> int:
    """Follow the top-level boxes to the end of the last known one."""
    end = 0
    while end + 8 <= size:
        content.seek(end)
        length, kind = struct.unpack(">I4s", content.read(8))
        if length == 1:  # the real length follows in 64 bits
            length = int.from_bytes(content.read(8), "big")
        if kind not in MP4_TOP_LEVEL_BOXES or length < 8:  # junk after the video, or a last box of open length
            break
        end += length
    return end
