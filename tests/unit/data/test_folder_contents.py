"""A folder is read as one kind of data by every script, and what else is in it is refused or said."""

import gzip
import logging
import os

import pytest

from tests.unit.shard_files import write_parquets, write_tar
from tests.unit.video_files import write_video
from umt_hf.data.prepare import list_rows
from umt_hf.data.sources import load_videos
from umt_hf.data.splits import has_splits, name_kind
from umt_hf.data.streams import TarShards, choose_shards, holds_tars, load_shards
from umt_hf.data.video_files import list_videos
from umt_hf.runs.mistakes import UserError
from umt_hf.training.arguments import CorpusArguments, DataArguments
from umt_hf.training.stage1 import load_tables, say_found_videos
from umt_hf.training.stage2 import load_corpus

PACKED = ("c.tar.gz", "c.tgz", "sub/c.tar.zst", "c.tar.xz", "C.TAR.BZ2")


@pytest.fixture
def tars(tmp_path):
    """Two tars of two videos each."""
    for name in "ab":
        write_tar(tmp_path / "tars" / f"{name}.tar", [{"mp4": b"x", "txt": "text"}, {"mp4": b"y", "txt": "text"}])
    return tmp_path / "tars"


def pack(folder, name):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(b"a tar"))
    return path


def read_in_every_script(source) -> list:
    """Number of rows, or the error, of all that reads a folder."""
    readers = [
        lambda: load_videos(str(source), needs_labels=False),
        lambda: load_tables(DataArguments(train_data=str(source)))[0],
        lambda: load_tables(DataArguments(train_corpora=[str(source)]))[0],
        lambda: load_corpus(CorpusArguments(train_corpora=[str(source)]), 0, holds_tars(str(source))),
        lambda: list_rows([str(source)]),
    ]
    found = []
    for read in readers:
        try:
            found.append(len(read()))
        except (ValueError, UserError) as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("name", PACKED)
def test_tars_with_compression_are_refused_by_name(tars, name):
    pack(tars, name)
    for found in read_in_every_script(tars):
        assert str(tars) in str(found) and f"1 tar(s) with compression ({name})" in found and "`" in found
    with pytest.raises(ValueError, match="with compression"):
        has_splits(str(tars))


@pytest.mark.parametrize("name", PACKED)
def test_tars_with_compression_alone_are_refused_too(tmp_path, name):
    file = pack(tmp_path / "packed", name)
    for source in (tmp_path / "packed", file):
        for found in read_in_every_script(source)[: 4 if source == file else None]:
            assert f"{source}: 1 tar(s) with compression" in str(found), found
    with pytest.raises(ValueError, match=r"with compression"):
        load_shards(str(tmp_path / "packed"))


def test_a_tar_beside_videos_is_left_out_and_said(tmp_path, caplog):
    """In pre-training as in fine-tuning, wherever in the folder it is; frames count as videos."""
    (tmp_path / "videos" / "deep").mkdir(parents=True)
    for number in range(3):
        write_video(tmp_path / "videos" / f"{number}.mp4")
    write_tar(tmp_path / "videos" / "deep" / "stray.tar", [{"mp4": b"x", "txt": "a"}])
    pack(tmp_path / "videos", "all.tar.gz")
    found = read_in_every_script(tmp_path / "videos")
    assert [found[i] for i in (0, 1, 2, 4)] == [3] * 4 and "rows have no caption" in found[3]
    assert caplog.text.count("videos: 3 videos; left out: 2 tars.") == 5
    assert choose_shards([str(tmp_path / "videos")], False) == [False]
    assert len(list_videos([str(tmp_path / "videos")])[0]) == 3
    for number in range(4):
        (tmp_path / "frames" / "clip").mkdir(parents=True, exist_ok=True)
        (tmp_path / "frames" / "clip" / f"{number}.jpg").touch()
    write_tar(tmp_path / "frames" / "frames.tar", [{"mp4": b"x"}])
    assert name_kind(str(tmp_path / "frames")) == name_kind(str(tmp_path / "videos")) == "a folder of videos"


def test_parquet_and_tars_of_no_split_are_left_out_and_said(tars, caplog):
    """As tools that make tars write a table beside each."""
    write_parquets(tars, [{"key": "a"}], 1)
    assert read_in_every_script(tars) == [4] * 5
    assert caplog.text.count("tars: 2 tar(s) of the split 'train' are read; left out: 1 Parquet files.") >= 4
    caplog.clear()
    (tars / "a.tar").rename(tars / "train-0.tar")
    assert len(load_shards(str(tars))) == 2
    assert (
        "1 tar(s) of the split 'train' are read; left out: 1 Parquet files, 1 tars that name no split." in caplog.text
    )
    with pytest.raises(ValueError, match=r"has no split 'test'; it has \['train'\]"):
        load_videos(str(tars), split="test")


def test_hidden_tars_are_left_out_and_links_are_followed_once(tars, tmp_path):
    (tars / "._a.tar").write_bytes(b"of a file system")
    (tars / ".cache").mkdir()
    (tars / ".cache" / "c.tar").write_bytes(b"of a tool")
    os.symlink(tars, tars / "up")
    (tars / "b.tar").rename(tars / "B.TAR")
    linked = tmp_path / "linked"
    linked.mkdir()
    os.symlink(tars, linked / "tars")
    for folder in (tars, linked):
        assert read_in_every_script(folder) == [4] * 5
    assert isinstance(load_tables(DataArguments(train_data=str(linked)))[0], TarShards)


def test_a_folder_of_tars_is_no_folder_of_videos_and_says_so(tars, caplog):
    caplog.set_level(logging.WARNING)
    with pytest.raises(ValueError, match=r"no videos found.* The videos in tars are read by `umt-hf prepare`"):
        list_videos([str(tars)])
    assert "left out: 2 tars." in caplog.text


def test_held_out_videos_in_tars_that_are_trained_on_are_warned_of(tars, tmp_path, caplog):
    """As of lists: alone, through a link, and among several corpora."""
    os.symlink(tars / "b.tar", tmp_path / "link.tar")
    (tmp_path / "list.csv").write_text("c.mp4\n")
    for training in ({"train_data": str(tars)}, {"train_corpora": [str(tmp_path / "list.csv"), str(tars)]}):
        caplog.clear()
        limit = {"max_eval_samples": 1} if "train_data" in training else {}
        data = DataArguments(**training, validation_data=str(tmp_path / "link.tar"), **limit)
        say_found_videos(load_tables(data))
        count = 1 if limit else 2
        assert f"{count} of {count} validation videos are training videos" in caplog.text
        assert "b.tar at byte" in caplog.text
    caplog.clear()
    other = write_tar(tmp_path / "other.tar", [{"mp4": b"z"}])
    say_found_videos(load_tables(DataArguments(train_data=str(tars), validation_data=str(other))))
    assert "are training videos" not in caplog.text
