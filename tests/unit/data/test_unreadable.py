"""Replacements of unreadable videos, and the share of them that is accepted."""

import pytest

from umt_hf.data.unreadable import MAX_REPLACEMENTS, UnreadableVideos, read_first_readable, sample_replacements
from umt_hf.processing.decoding import VideoDecodingError
from umt_hf.training.clips import build_generator


def read(row: int) -> str:
    if row < 3:
        raise VideoDecodingError(f"{row}.mp4: cut short")
    return f"clip {row}"


def test_the_first_readable_row_is_read_and_the_others_are_named():
    rows = iter((1, 2, 5, 4))
    assert read_first_readable(rows, read) == ("clip 5", ["1.mp4: cut short", "2.mp4: cut short"])
    assert next(rows) == 4  # rows behind it are not looked at
    assert read_first_readable((4,), read) == ("clip 4", [])
    assert read_first_readable((0, 1), read) == (None, ["0.mp4: cut short", "1.mp4: cut short"])
    assert read_first_readable((), read) == (None, [])


def test_other_errors_are_not_taken_for_unreadable_videos():
    with pytest.raises(ZeroDivisionError):
        read_first_readable((0, 1), lambda row: 1 // row)


def test_replacements_depend_on_the_source_alone():
    first = sample_replacements(100, build_generator(0, 1))
    assert len(first) == MAX_REPLACEMENTS and all(0 <= row < 100 for row in first)
    assert first == sample_replacements(100, build_generator(0, 1)) != sample_replacements(100, build_generator(0, 2))


def test_the_accepted_share_may_be_reached_and_not_exceeded(caplog):
    tally = UnreadableVideos()
    tally.count(10, ["a.mp4: cut short"], 0.1)
    assert "a.mp4: cut short" in caplog.text and (tally.videos, tally.skipped_videos) == (10, 1)
    with pytest.raises(RuntimeError, match=r"2 of 11 videos .* max_skipped_ratio=0\.1 .*b\.mp4: empty"):
        tally.count(1, ["b.mp4: empty"], 0.1)
    with pytest.raises(ValueError, match="1 of 2 key frames"):
        UnreadableVideos().count(2, ["b.mp4: empty"], 0.1, kind="key frames", error=ValueError)
    UnreadableVideos().count(0, [], 0.0)


def test_a_handful_is_accepted_whatever_its_share():
    tally = UnreadableVideos()
    for _ in range(4):
        tally.count(1, ["a.mp4: cut short"], 0.1, min_skipped=5)
    with pytest.raises(RuntimeError, match="5 of 5"):
        tally.count(1, ["a.mp4: cut short"], 0.1, min_skipped=5)
    with pytest.raises(RuntimeError, match="see the log"):  # as after resuming with a lower share
        tally.count(1, [], 0.1, min_skipped=5)
