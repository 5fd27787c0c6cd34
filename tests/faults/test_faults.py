"""The fast part of `make faults`: some files of every kind, and proof that the checks see what is wrong."""

import collections
import gc
import tempfile
from pathlib import Path

import av
import numpy as np
import pytest

from tests.faults import run, second
from tests.faults.check import (
    FAULTS,
    Watch,
    _is_equal_where_written,
    _is_right,
    check_file,
    decode_reference,
)
from tests.faults.files import MEDIA, HostileFile, encode, make_files
from umt_hf.processing import decoding

FILES_PER_KIND = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults").resolve()


@pytest.fixture(scope="module")
def files(folder):
    return make_files(folder)


WATCH = Watch().install()


def test_there_are_hundreds_of_files_and_they_are_the_same_each_time(files, folder):
    assert len(files) >= 200
    kinds = collections.Counter(file.kind for file in files)
    assert len(kinds) >= 14 and min(kinds.values()) >= 5
    again = make_files(folder)
    assert [(file.kind, file.name) for file in files] == [(file.kind, file.name) for file in again]
    # x264 itself is a few bytes off now and then, more often on a busy machine.
    num_equal = sum(file.content == other.content for file, other in zip(files, again, strict=True))
    assert num_equal > 0.5 * len(files)


def test_hostile_files_are_read_right_or_refused_by_name(files, folder, monkeypatch):
    monkeypatch.chdir(folder / "secret")
    taken = collections.Counter()
    for file in files:
        taken[file.kind] += 1
        if taken[file.kind] > FILES_PER_KIND and file.kind != "playlists and scripts":
            continue
        verdict = check_file(file, folder, WATCH)
        assert verdict.outcome in ("right", "refused"), (file.kind, file.name, verdict)


def test_memory_and_descriptors_stay(files, folder):
    measured = run.measure_memory(files, folder, opens=400, seed=0)
    assert measured["growth_bytes"] < run.MAX_GROWTH and measured["descriptors"] == 0


class OpenEverything(decoding.PyAVReader):
    """A reader without whitelists, as it would be after a careless change."""

    def _open(self):
        self._container = av.open(self._media.path or self._media.file)
        self._stream_index = 0
        self._stream = self._container.streams.video[0]
        self._codec = self._stream.codec_context


class OffByOne(decoding.PyAVReader):
    def _decode(self, indices):
        return super()._decode([min(index + 1, self.num_frames - 1) for index in indices])


class Unnamed(decoding.PyAVReader):
    def _decode(self, indices):
        raise KeyError("frame")


def test_the_checks_see_what_is_wrong(files, folder, monkeypatch):
    monkeypatch.chdir(folder / "secret")
    playlist = next(
        f for f in files if f.kind == "playlists and scripts" and f.name == "hls.m3u8" or f.name == "hls.mp4"
    )
    plain = HostileFile("codecs and containers", "plain.mp4", encode())
    monkeypatch.setitem(decoding.READERS, "pyav", OpenEverything)
    playlist.name = "hls.m3u8"
    assert check_file(playlist, folder, WATCH).outcome == "secret"
    monkeypatch.setitem(decoding.READERS, "pyav", OffByOne)
    assert check_file(plain, folder, WATCH).outcome == "wrong frame"
    monkeypatch.setitem(decoding.READERS, "pyav", Unnamed)
    assert check_file(plain, folder, WATCH).outcome == "unnamed"
    monkeypatch.setitem(decoding.READERS, "pyav", decoding.PyAVReader)
    assert check_file(HostileFile("x", "plain.mp4", encode(), "refused"), folder, WATCH).outcome == "accepted"
    assert check_file(HostileFile("x", "text.mp4", b"text"), folder, WATCH).outcome == "rejected"
    assert check_file(plain, folder, WATCH).outcome == "right" and "right" not in FAULTS


def test_what_another_test_left_behind_is_not_blamed_on_the_reader(folder, tmp_path, monkeypatch):
    class Leftover:
        def __init__(self):
            self.folder = tempfile.TemporaryDirectory(dir=tmp_path)
            (Path(self.folder.name) / "index" / "shards").mkdir(parents=True)
            self.itself = self

    class CollectedMeanwhile(decoding.PyAVReader):
        def _decode(self, indices):
            if gc.isenabled():
                gc.collect()  # as an allocation may
            return super()._decode(indices)

    monkeypatch.setitem(decoding.READERS, "pyav", CollectedMeanwhile)
    plain = HostileFile("codecs and containers", "plain.mp4", encode())
    thresholds = gc.get_threshold()
    gc.set_threshold(0)
    try:
        Leftover()
        verdict = check_file(plain, folder, WATCH)
    finally:
        gc.set_threshold(*thresholds)
    assert verdict.outcome == "right", verdict
    assert gc.isenabled()


def test_a_trace_shows_other_files_and_sockets(tmp_path):
    lines = [
        f'1 openat(AT_FDCWD, "{tmp_path}/names/x.mp4", O_RDONLY) = 3',
        f'1 openat(AT_FDCWD, "{tmp_path}/secret/secret.ts", O_RDONLY) = 4',
        '1 openat(AT_FDCWD, "/home/someone/video.mp4", O_RDONLY) = 4',
        '1 openat(AT_FDCWD, "/nowhere", O_RDONLY) = -1 ENOENT (No such file or directory)',
        "1 socket(AF_INET, SOCK_DGRAM, IPPROTO_IP) = 5",
        "1 socket(AF_UNIX, SOCK_STREAM, 0) = 5",
    ]
    assert run.find_foreign_calls("\n".join(lines), tmp_path) == [lines[1], lines[2], lines[4]]


def test_a_hang_and_a_crash_are_findings(folder, monkeypatch):
    import os
    import signal
    import time

    def fail(file, *_):
        if file.name == "hang":
            time.sleep(60)
        if file.name == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        return run.Verdict("right")

    monkeypatch.setattr(run, "check_file", fail)
    monkeypatch.setattr(run, "HANG_SECONDS", 1)
    files = [HostileFile("x", name, b"") for name in ("a", "hang", "b", "crash", "c")]
    outcomes = [verdict.outcome for verdict in run.check_apart(files, folder, "pyav", 0)]
    assert outcomes == ["right", "hang", "right", "crash", "right"]


def test_the_secret_is_known_by_its_colour(files, folder):
    with decoding.open_video(folder / "secret" / "secret.ts") as reader:
        assert run.MARK and np.abs(reader.get_frames([3]).astype(int) - (200, 30, 160)).mean() < 20


def test_of_a_damaged_vp8_picture_what_the_decoder_wrote_is_compared():
    """Where it wrote nothing there is an earlier picture, or zeros: by how many pictures its caller holds on to.

    Measured on this file: 1152 of the 4608 values of the last picture are those of the picture 12 before it, whose
    buffer it took over, or all 0 where the caller holds on to every picture.
    """
    file = HostileFile("flipped bits", "k.webm", (MEDIA / "k_vp8_unwritten.webm").read_bytes(), "either")
    plain, held = decode_reference(file), decode_reference(file, holds=True)
    differ = [number for number, (a, b) in enumerate(zip(plain, held, strict=True)) if (a != b).any()]
    assert differ == [29] and len(plain) == 30
    unwritten = (plain[29] != held[29]).any(-1)
    assert 0.2 < unwritten.mean() < 0.7 and unwritten[:28].sum() == 0
    assert _is_equal_where_written(held[29], plain[29], held[29])
    changed = held[29].copy()
    changed[5, 5] += 1
    assert not _is_equal_where_written(changed, plain[29], held[29])
    with decoding.open_video(MEDIA / "k_vp8_unwritten.webm") as reader:
        for request in ([29], [0, 29], list(range(30))):
            for frame, index in zip(reader.get_frames(request), request, strict=True):
                assert _is_right(file, frame, index, plain, tolerance=0), (index, request)


@pytest.mark.skipif(second.find_command() is None, reason="the ffmpeg command is not installed")
def test_the_ffmpeg_command_shows_the_same_frames(files, folder, monkeypatch):
    """A second reference, which shares neither build nor caller; see docs/reliability.md for all files."""
    undamaged = [file for file in files if file.expected == "right" and file.source is None][::12]
    found = [second.compare_with_command(file, folder, second.find_command()) for file in undamaged]
    outcomes = [comparison.outcome for comparison in found if comparison is not None]
    assert len(outcomes) >= 10 and set(outcomes) <= {"equal", "close"}, list(zip(undamaged, found, strict=True))
    plain = HostileFile("codecs and containers", "plain.mp4", encode())
    monkeypatch.setitem(decoding.READERS, "pyav", OffByOne)
    assert second.compare_with_command(plain, folder, second.find_command()).outcome == "pixels"


def test_without_the_ffmpeg_command_the_reason_is_printed(files, folder, monkeypatch, capsys):
    monkeypatch.setattr(second.shutil, "which", lambda _: None)
    assert second.print_comparison(files, folder) == 0
    assert "ffmpeg command: not installed" in capsys.readouterr().out
