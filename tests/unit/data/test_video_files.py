"""Files and folders as they are given to commands and objects."""

from pathlib import Path

import pytest

from umt_hf.data.video_files import list_videos


def test_a_single_path_is_one_source(tmp_path, monkeypatch):
    """Its letters would be sources too, and `/` the disk."""
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    expected = ([str(tmp_path / name) for name in ("a.mp4", "b.mp4")], [])
    for source in (str(tmp_path), tmp_path, [tmp_path], ["a.mp4", Path("b.mp4")]):
        found, missing = list_videos(source)
        assert ([video.path for video in found], missing) == expected
    found, missing = list_videos("c.mp4")
    assert not found and missing[0].path == str(tmp_path / "c.mp4")


def test_a_folder_without_videos_is_refused(tmp_path):
    with pytest.raises(ValueError):
        list_videos(tmp_path)
