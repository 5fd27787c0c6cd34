"""Tars as a list: the rows are those of the shards, labels and captions come along, and nothing is guessed."""

import json
import logging
import pickle

import numpy as np
import pytest
from datasets import ClassLabel, List

from tests.unit.shard_files import write_tar, write_tars
from tests.unit.video_files import write_video
from umt_hf.data import arrow_cache
from umt_hf.data.annotations import load_pairs
from umt_hf.data.labels import get_label_names
from umt_hf.data.prepare import ShardSettings, prepare_shards
from umt_hf.data.sources import load_videos
from umt_hf.data.streams import check_stored_frames, load_shards
from umt_hf.processing.clips import read_clip
from umt_hf.processing.decoding import open_video
from umt_hf.processing.media_files import VideoDecodingError, find_holder, name_tar_place, open_source
from umt_hf.processing.video_processing_umt_video import UMTVideoProcessor

CLASSES = ("run", "jump")
SETTINGS = ShardSettings(num_frames=8, videos_per_shard=2)


def read_bytes(video: str) -> bytes:
    media = open_source(video)
    media.file.seek(0)
    return media.file.read()


@pytest.fixture
def folder(tmp_path):
    """Six videos in two class folders."""
    for number in range(6):
        path = tmp_path / "videos" / CLASSES[number % 2] / f"{number}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, num_frames=6 + number)
    return tmp_path


def test_rows_are_those_of_the_shards(tmp_path):
    rows = [
        {"mp4": b"first video", "json": {"caption": "a", "label": 2}},
        {"webm": b"second", "json": {"label": 0}},
        {"mp4": b"third", "json": {"caption": ["b", "c"], "label": 1}},
        {"mp4": b"fourth", "txt": "of text", "json": {"label": 3}},
    ]
    names = ["one", "sub.tar/two", "n" * 150, "four:1:2"]
    write_tar(tmp_path / "tars" / "a.tar", rows[:2], names[:2])
    write_tar(tmp_path / "tars" / "b.tar", rows[2:], names[2:])
    shards, table = load_shards(str(tmp_path / "tars")), load_videos(str(tmp_path / "tars"), needs_labels=False)
    assert [read_bytes(video) for video in table["video"]] == [shards[i]["video"]["bytes"] for i in range(4)]
    assert table["caption"][:] == [["a"], None, ["b", "c"], ["of text"]] and "label" not in table.column_names
    assert open_source(table[1]["video"]).name == f"{tmp_path}/tars/a.tar/sub.tar/two.webm"
    with pytest.raises(ValueError, match=r"four:1:2.mp4:\d+:6 is None; expected a number"):
        load_videos(str(tmp_path / "tars"))  # the text of the last one is that of .txt, without its label
    labelled = load_videos(str(tmp_path / "tars" / "a.tar"))
    assert labelled["label"][:] == [2, 0]


def test_a_tar_that_changes_is_named(tmp_path):
    tar = write_tar(tmp_path / "a.tar", [{"mp4": b"first"}, {"mp4": b"second"}], ["one", "two"])
    (first, second) = load_videos(str(tar))["video"]
    content = tar.read_bytes()
    for changed in (content[: content.index(b"second") + 2], content.replace(b"00000000006", b"00000000005")):
        tar.write_bytes(changed)
        assert read_bytes(first) == b"first"
        with pytest.raises(VideoDecodingError, match=r"a.tar/two.mp4: the tar has changed since it was listed"):
            open_source(second)
    tar.write_bytes(b"no tar at all" * 200)
    with pytest.raises(VideoDecodingError, match="the tar has changed"):
        open_source(second)
    tar.unlink()
    with pytest.raises(VideoDecodingError, match="no such file"):
        open_source(second)
    assert name_tar_place("a.tar", "b.mp4", 3, 4) == "a.tar/b.mp4:3:4"
    write_tar(tar, [{"mp4": b"first"}])
    assert [find_holder(path) for path in (first, str(tar), "b.mp4")] == [str(tar), str(tar), "b.mp4"]


def test_a_file_named_like_a_place_is_still_a_file(tmp_path):
    path = tmp_path / "x.tar" / "a.mp4:1:2"
    path.parent.mkdir()
    path.write_bytes(b"content of it")
    assert read_bytes(str(path)) == b"content of it"


def test_labels_of_prepared_folders_keep_their_names_and_order(folder):
    prepare_shards([str(folder / "videos")], folder / "shards", SETTINGS, num_workers=0)
    notes = json.loads((folder / "shards" / "train.prepare.json").read_text())
    assert notes["label_names"] == [["jump", "run"]]
    plain, kept = load_videos(str(folder / "videos")), load_videos(str(folder / "shards"))
    assert get_label_names(kept.features) == get_label_names(plain.features) == ["jump", "run"]
    assert kept["label"][:] == plain["label"][:]
    renamed = load_videos(str(folder / "shards"), class_names=["walk", "run", "jump"])
    assert renamed["label"][:] == [2, 2, 2, 1, 1, 1]
    with pytest.raises(ValueError, match=r"the labels \['run'\] are not classes"):
        load_videos(str(folder / "shards"), class_names=["walk", "jump"])
    # The order of a list that names more classes than have videos holds.
    notes["label_names"] = [["walk", "run", "jump"]]
    (folder / "shards" / "train.prepare.json").write_text(json.dumps(notes))
    assert load_videos(str(folder / "shards"))["label"][:] == [2, 2, 2, 1, 1, 1]
    # Two lists that number their classes each in its own way are told apart by the names.
    (folder / "shards" / "train.prepare.json").unlink()
    assert isinstance(load_videos(str(folder / "shards")).features["label"], ClassLabel)


def test_sources_that_number_classes_differently_keep_their_names(folder):
    (folder / "other" / "run").mkdir(parents=True)
    write_video(folder / "other" / "run" / "a.mp4")
    write_video(folder / "other" / "b.mp4")
    (folder / "other" / "sit").mkdir()
    write_video(folder / "other" / "sit" / "c.mp4")
    sources = [str(folder / "videos"), str(folder / "other")]
    prepare_shards(sources, folder / "shards", SETTINGS, num_workers=0)
    table = load_videos(str(folder / "shards"))
    names = get_label_names(table.features)
    assert names == ["jump", "run", "sit"]
    assert [names[label] for label in table["label"]] == ["jump"] * 3 + ["run"] * 3 + ["run", "sit"]


def test_lists_of_labels_and_captions(folder):
    rows = [
        {"video": f"videos/{CLASSES[i % 2]}/{i}.mp4", "label": [i % 2, 2], "caption": f"text {i}"} for i in range(6)
    ]
    (folder / "list.json").write_text(json.dumps(rows))
    prepare_shards([str(folder / "list.json")], folder / "shards", SETTINGS, num_workers=0)
    table = load_videos(str(folder / "shards"))
    assert table["label"][:] == [[0, 2], [1, 2]] * 3 and isinstance(table.features["label"], List)
    pairs = load_pairs(str(folder / "shards"))
    assert pairs["caption"][:] == [f"text {i}" for i in range(6)]
    with open_video(pairs[2]["video"]) as kept:
        assert (kept.num_frames, kept.has_gaps) == (8, True)


def test_a_long_set_of_tars_is_a_table_on_disk(folder, monkeypatch):
    prepare_shards([str(folder / "videos")], folder / "shards", SETTINGS, num_workers=0)
    rows = load_videos(str(folder / "shards")).to_list()
    monkeypatch.setattr(arrow_cache, "SHORTEST_CACHED_BYTES", 0)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder / "cache"))
    first, second = (load_videos(str(folder / "shards")) for _ in range(2))
    assert first.to_list() == second.to_list() == rows and first.cache_files == second.cache_files != []
    assert len(pickle.dumps(second)) < 5000
    notes = folder / "shards" / "train.prepare.json"
    notes.write_text(json.dumps(json.loads(notes.read_text()) | {"label_names": [["run", "jump"]]}))
    assert load_videos(str(folder / "shards"))["label"][:] == [1, 1, 1, 0, 0, 0]


def test_tars_beside_videos_are_left_alone(folder, caplog):
    """An archive that class folders were unpacked from."""
    caplog.set_level(logging.INFO)
    write_tar(folder / "videos" / "all.tar", [{"mp4": b"x"}])
    assert len(load_videos(str(folder / "videos"))) == 6
    for options, said in (
        ({"data_root": "x"}, "data_root=x has no effect on .*, which is tars of videos"),
        ({"streaming": True}, "streaming=True has no effect"),
        ({"split": "test"}, "has no split 'test'"),
    ):
        with pytest.raises(ValueError, match=said):
            load_videos(str(write_tars(folder / "tars", [{"mp4": b"x"}], 1)), **options)


def test_samplings_that_kept_frames_cannot_give_are_refused(folder):
    prepare_shards([str(folder / "videos")], folder / "shards", SETTINGS, num_workers=0)
    kept = load_videos(str(folder / "shards"))
    check_stored_frames(kept, 8, "uniform")
    check_stored_frames(load_videos(str(folder / "videos")), 80, "dense", 3.0)
    for arguments, said in (
        ((8, "dense"), "sampling_strategy=dense takes frames at distances that the 8 frames kept"),
        ((9, "uniform"), "num_frames=9 is more than the 8 frames kept of each video"),
        ((8, "middle", 3.0), "first_seconds=3.0 needs the times of frames"),
    ):
        with pytest.raises(ValueError, match=said):
            check_stored_frames(kept, *arguments)
    # The same where nothing was checked before: a reader and the processor.
    video, processor = kept[0]["video"], UMTVideoProcessor(num_frames=4)
    said = r"mjpeg: holds 7 frames of a video, which sampling_strategy=dense cannot choose from. Set it to segments"
    with pytest.raises(ValueError, match=said) as found:
        read_clip(video, 2, "dense")
    assert not isinstance(found.value, VideoDecodingError)  # not a damaged video, which would be passed over
    with pytest.raises(ValueError, match=said):
        processor(video, sampling_strategy="dense")
    with pytest.raises(ValueError, match="fps"):
        processor(video, fps=2)
    assert np.asarray(processor(video)["pixel_values"]).shape[1] == 4
