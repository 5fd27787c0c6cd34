"""Folders of videos: classes, frames, links, and what is left out and said."""

import logging
import os
import unicodedata

import pytest
from PIL import Image

from umt_hf.data.lists.folders import VIDEO_SUFFIXES, list_folder
from umt_hf.data.sources import load_videos
from umt_hf.data.video_files import list_videos


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def write_frames(folder, names):
    folder.mkdir(parents=True)
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / name)


def read(folder, **options):
    """Path below the folder -> name of the class, or `None`."""
    table = load_videos(str(folder), **options)
    names = table.features["label"].names if "label" in table.features else None
    return {os.path.relpath(row["video"], folder): names and names[row["label"]] for row in table}


def test_every_suffix_that_is_read_is_listed(tmp_path):
    assert {".gif", ".3gp", ".ogv", ".mts", ".mp4", ".ts"} <= VIDEO_SUFFIXES
    names = [f"a/clip{suffix}" for suffix in VIDEO_SUFFIXES] + [f"b/CLIP{suffix.upper()}" for suffix in VIDEO_SUFFIXES]
    assert len(read(touch(tmp_path, *names))) == 2 * len(VIDEO_SUFFIXES)


def test_hidden_and_system_files_are_left_out_and_said(tmp_path, caplog):
    touch(tmp_path, "run/a.mp4", "run/._a.mp4", "jump/b.mp4", "jump/.cache.mp4", "jump/notes.txt", "._jump")
    for folder in (".Trash", ".ipynb_checkpoints", "run/@eaDir", "__MACOSX", "jump/.git"):
        touch(tmp_path, f"{folder}/c.mp4")
    assert read(tmp_path) == {"jump/b.mp4": "jump", "run/a.mp4": "run"}
    [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "2 videos; left out: 2 hidden files, 5 hidden or system folders, 2 other files" in record.getMessage()
    found, _ = list_videos([str(tmp_path)])
    assert [os.path.basename(file.path) for file in found] == ["b.mp4", "a.mp4"]
    # A file that is named by itself is meant.
    assert len(list_videos([str(tmp_path / "run" / "._a.mp4")])[0]) == 1


def test_links_to_class_folders_are_followed_and_circles_end(tmp_path, caplog):
    source = touch(tmp_path / "all", "run/a.mp4", "run/deep/b.mp4", "jump/c.mp4")
    subset = tmp_path / "subset"
    subset.mkdir()
    (subset / "run").symlink_to(source / "run")
    (subset / "jump").symlink_to(source / "jump")
    (source / "run" / "deep" / "up").symlink_to(source / "run")
    (subset / "broken").symlink_to(tmp_path / "nowhere")
    (subset / "jump" / "d.mp4").symlink_to(source / "run" / "a.mp4")
    (subset / "top").symlink_to(subset)
    (subset / "itself").symlink_to("itself")
    (subset / "run.mp4").symlink_to("run.mp4")
    assert read(subset) == {
        "jump/c.mp4": "jump",
        "jump/d.mp4": "jump",
        "run/a.mp4": "run",
        "run/deep/b.mp4": "run",
    }
    assert "2 links back to a folder above" in caplog.text
    assert "1 videos have several labels" in caplog.text  # a.mp4 and the link to it
    assert len(list_videos([str(subset)])[0]) == 4


def test_a_stray_video_beside_class_folders(tmp_path, caplog):
    touch(tmp_path, "run/a.mp4", "jump/b.mp4", "preview.mp4")
    assert read(tmp_path) == {"jump/b.mp4": "jump", "run/a.mp4": "run"}
    assert "2 videos; left out: 1 videos beside the class folders" in caplog.text
    # Where labels play no part, it is a video like the others.
    assert set(read(tmp_path, needs_labels=False)) == {"jump/b.mp4", "preview.mp4", "run/a.mp4"}
    assert len(list_videos([str(tmp_path)])[0]) == 3
    # A collection with a few sub-folders does not have classes.
    touch(tmp_path, *(f"{number}.mp4" for number in range(5)))
    assert read(tmp_path)["0.mp4"] is None


def test_folders_of_frames_are_videos(tmp_path, caplog):
    write_frames(tmp_path / "run" / "clip_a", ["1.jpg", "2.jpg", "10.jpg"])
    write_frames(tmp_path / "jump" / "deep" / "clip_b", ["img_01.png", "img_02.png"])
    write_frames(tmp_path / "jump" / "unordered", ["x.png", "y.png"])
    assert read(tmp_path) == {"jump/deep/clip_b": "jump", "run/clip_a": "run"}
    found, _ = list_videos([str(tmp_path), str(tmp_path / "run" / "clip_a")])
    assert [os.path.basename(file.path) for file in found] == ["clip_b", "clip_a"]
    sizes = [(tmp_path / "run" / "clip_a" / f"{n}.jpg").stat().st_size for n in (1, 2, 10)]
    assert found[1].size_bytes == sum(sizes)
    # One folder of frames is a video by itself.
    assert list(read(tmp_path / "run" / "clip_a")) == ["."]
    # Beside files, pictures are previews.
    touch(tmp_path, "run/c.mp4")
    assert read(tmp_path) == {"run/c.mp4": "run"}
    assert "2 folders of pictures beside videos" in caplog.text


def test_doubtful_class_folders_are_warned_of(tmp_path, caplog):
    touch(tmp_path / "splits", "train/run/a.mp4", "val/run/b.mp4")
    assert set(read(tmp_path / "splits").values()) == {"train", "val"}
    assert "are taken for classes, but are named like splits" in caplog.text
    touch(tmp_path / "gaps", "run/a.mp4", "jump/b.mp4")
    (tmp_path / "gaps" / "swim").mkdir()
    assert set(read(tmp_path / "gaps").values()) == {"run", "jump"}
    assert "the sub-folders ['swim'] have no videos and are not classes" in caplog.text


def test_names_of_classes_may_be_digits_or_decomposed(tmp_path):
    touch(tmp_path / "digits", "0/a.mp4", "10/b.mp4", "2/c.mp4")
    assert read(tmp_path / "digits") == {"0/a.mp4": "0", "10/b.mp4": "10", "2/c.mp4": "2"}
    with pytest.raises(ValueError, match=r"the sub-folders \['0', '10', '2'\] are not classes"):
        read(tmp_path / "digits", class_names=["a", "b", "c"])
    decomposed = unicodedata.normalize("NFD", "été")
    touch(tmp_path / "accents", f"{decomposed}/a.mp4", "my class/b c.mp4")
    assert set(read(tmp_path / "accents", class_names=["été", "my class"]).values()) == {"été", "my class"}
    assert set(read(tmp_path / "accents").values()) == {"été", "my class"}


def test_an_empty_tree_says_what_was_there(tmp_path, caplog):
    touch(tmp_path, "run/a.doc", ".hidden/b.mp4")
    with pytest.raises(ValueError, match="no videos found; known suffixes are"):
        load_videos(str(tmp_path))
    with pytest.raises(ValueError, match="no videos found"):
        list_videos([str(tmp_path)])
    assert "0 videos; left out: 1 hidden or system folders, 1 other files" in caplog.text
    assert list_folder(tmp_path).videos == []


def test_urls_are_listed_as_they_are(tmp_path):
    touch(tmp_path, "a.mp4")
    found, missing = list_videos(["https://host/b.mp4?x=1", str(tmp_path)])
    assert [(file.path, file.size_bytes) for file in found] == [
        (str(tmp_path / "a.mp4"), 0),
        ("https://host/b.mp4?x=1", 0),
    ]
    assert not missing


def test_a_name_that_is_not_text_is_left_out(tmp_path, caplog):
    touch(tmp_path, "run/a.mp4", "run/名前 é.mp4", "jump/b.mp4")
    try:
        touch(tmp_path, "run/" + os.fsdecode(b"\xff.mp4"), os.fsdecode(b"\xfe") + "/c.mp4")
    except OSError:
        pytest.skip("this file system has UTF-8 names alone")
    assert set(read(tmp_path)) == {"run/a.mp4", "run/名前 é.mp4", "jump/b.mp4"}
    assert "2 names that are not UTF-8" in caplog.text


@pytest.mark.parametrize("name", ["vidéos mine/trian", "my videos", "a/b/c"])
def test_a_missing_folder_is_never_taken_for_a_name_on_the_hub(name):
    with pytest.raises(FileNotFoundError, match="no such file or folder.$"):
        load_videos(name)
