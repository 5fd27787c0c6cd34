"""Files and folders as they are given to commands and objects."""

import json
import os
from pathlib import Path

import pytest

from umt_hf.data.video_files import list_videos, split_name


def test_a_single_path_is_one_source(tmp_path, monkeypatch):
    """Its letters would be sources too, and `/` the disk."""
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    expected = ([str(tmp_path / name) for name in ("a.mp4", "b.mp4")], [])
    for source in (str(tmp_path), tmp_path, [tmp_path], ["a.mp4", Path("b.mp4")]):
        found, missing = list_videos(source)
        assert ([video.path for video in found], missing) == expected
    found, missing = list_videos(["a.mp4", "c.mp4"])
    assert len(found) == 1 and missing[0].path == str(tmp_path / "c.mp4")
    assert missing[0].reason == "No such file or directory."


def test_missing_sources_alone_and_an_empty_list_are_mistakes(tmp_path, monkeypatch):
    (tmp_path / "video_1.mp4").touch()
    monkeypatch.chdir(tmp_path)
    for sources in ("vidoe_1.mp4", ["vidoe_1.mp4"], ["vidoe_1.mp4", "other/x"]):
        with pytest.raises(FileNotFoundError) as error:
            list_videos(sources)
        assert str(error.value) == "vidoe_1.mp4: no such file or folder. Near it: video_1.mp4."
    with pytest.raises(ValueError, match="Give at least one video: a file, a folder or a URL"):
        list_videos([])


def test_a_folder_without_videos_is_refused(tmp_path):
    with pytest.raises(ValueError):
        list_videos(tmp_path)


def test_a_name_that_is_not_utf8_is_skipped_by_its_reason(tmp_path, caplog):
    """As in a folder: given by name, one would stop a run for all. The folder above may have such a name too."""
    (tmp_path / "a.mp4").touch()
    wrong = os.fsencode(tmp_path) + b"/b\xe9"
    try:
        os.mkdir(wrong)
    except OSError:
        pytest.skip("this file system has UTF-8 names alone")
    for name in (b"/b.mp4", b"/\xff.mp4"):
        with open(wrong + name, "wb"):
            pass
    sources = [str(tmp_path / "a.mp4"), os.fsdecode(wrong + b"/\xff.mp4"), os.fsdecode(wrong)]
    found, skipped = list_videos(sources)
    assert [video.path for video in found] == [str(tmp_path / "a.mp4")]
    assert [video.path for video in skipped] == [f"{tmp_path}/b\\udce9/{n}.mp4" for n in ("b", "\\udcff")]
    assert all(video.reason == "Its name is not UTF-8, which tables and results need; rename it." for video in skipped)
    json.dumps([video.path for video in skipped], ensure_ascii=False).encode()
    caplog.text.encode()  # as a log file would be written


def test_names_of_videos_at_addresses_are_those_of_files():
    names = {"https://h/x/clip.mp4?key=s.e/c": "clip", "s3://bucket/x/a #1.mp4": "a #1", "memory://a.mp4": "a"}
    assert {address: split_name(address)[0] for address in names} == names
