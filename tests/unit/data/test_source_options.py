"""Options that change nothing for the data that they are given with are refused; others hold in every form."""

import json
import logging
import sqlite3

import pytest
from datasets import Dataset

from tests.unit.shard_files import write_tar
from umt_hf.data.annotations import load_pairs
from umt_hf.data.sources import load_videos
from umt_hf.data.splits import share_options
from umt_hf.training.arguments import CorpusArguments, DataArguments, PretrainingArguments
from umt_hf.training.stage1 import load_tables
from umt_hf.training.stage2 import load_corpora


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """One data set in every form, by the end of its name."""
    folder = tmp_path_factory.mktemp("sources")
    rows = [{"video": "a.mp4", "caption": "one"}, {"video": "b.mp4", "caption": "two"}]
    (folder / "list.csv").write_text("video,caption\na.mp4,one\nb.mp4,two\n")
    (folder / "list.txt").write_text("a.mp4\nb.mp4\n")
    (folder / "list.json").write_text(json.dumps(rows))
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with sqlite3.connect(folder / "list.sqlite") as base:
        base.execute("CREATE TABLE annos (id INTEGER, video TEXT, caption TEXT)")
        base.executemany("INSERT INTO annos VALUES (?, ?, ?)", [(0, "a.mp4", "one"), (1, "b.mp4", "two")])
    base.close()
    Dataset.from_list(rows).save_to_disk(folder / "saved")
    Dataset.from_list(rows).to_parquet(folder / "shards" / "train-0.parquet")
    (folder / "videos").mkdir()
    for name in ("a.mp4", "b.mp4"):
        (folder / "videos" / name).touch()
    forms = ("list.csv", "list.txt", "list.json", "list.jsonl", "list.sqlite", "saved", "shards", "videos")
    return {name: str(folder / name) for name in forms} | {"parquet": str(folder / "shards" / "train-0.parquet")}


IDLE = {
    "csv_separator": (";", ["list.json", "list.jsonl", "list.sqlite", "saved", "shards", "parquet", "videos"]),
    "streaming": (True, ["list.csv", "list.txt", "list.json", "list.jsonl", "list.sqlite", "saved", "videos"]),
    "config_name": ("tiny", ["list.csv", "list.txt", "list.json", "list.sqlite", "saved", "parquet", "videos"]),
    "video_column": ("film", ["list.txt", "list.sqlite", "videos"]),
    "data_root": ("/root", ["videos"]),
}


@pytest.mark.parametrize("option,form", [(name, form) for name, (_, forms) in IDLE.items() for form in forms])
def test_an_option_without_effect_is_refused(sources, option, form):
    flag = "dataset_config_name" if option == "config_name" else option
    with pytest.raises(ValueError, match=rf"{flag}=\S+ has no effect") as error:
        load_videos(sources[form], **{option: IDLE[option][0]})
    assert "\n" not in str(error.value) and sources[form] in str(error.value)


@pytest.mark.parametrize("form", ["list.csv", "list.json", "list.jsonl", "list.sqlite", "saved", "shards", "parquet"])
def test_a_root_and_captions_hold_in_every_form(sources, form):
    assert load_videos(sources[form], data_root="/root")["video"][:] == ["/root/a.mp4", "/root/b.mp4"]
    pairs = load_pairs(sources[form], data_root="/root")
    assert pairs["video"][:] == ["/root/a.mp4", "/root/b.mp4"] and pairs["caption"][:] == ["one", "two"]


def test_paths_alone_are_a_list(sources):
    assert load_videos(sources["list.txt"], data_root="/root", needs_labels=False)["video"][:][1] == "/root/b.mp4"
    with pytest.raises(ValueError, match=r"list\.txt: rows have no caption; they have video"):
        load_pairs(sources["list.txt"])


def test_a_flag_of_a_run_holds_for_those_of_its_data_that_have_a_use_for_it(sources):
    """Training and held-out data share their flags; one that means nothing to any of them is refused."""
    options = {"data_root": "/root", "csv_separator": ";"}
    both = (sources["list.txt"], sources["videos"])
    assert share_options(both[0], both, options) == options
    assert share_options(both[1], both, options) == {"data_root": None, "csv_separator": None}
    assert share_options(both[1], (both[1], None), options) == options
    shared = DataArguments(train_data=both[0], validation_data=both[1], data_root="/root")
    training, held_out = load_tables(shared)
    assert training["video"][:][0] == "/root/a.mp4" and held_out["video"][:][0] == f"{both[1]}/a.mp4"
    with pytest.raises(ValueError, match=r"list\.txt: is a list, not shards of videos, so it cannot be streamed"):
        load_tables(DataArguments(train_data=both[0], streaming=True))
    with pytest.raises(ValueError, match="data_root=/root has no effect on .*videos, which is a folder of videos"):
        load_tables(DataArguments(train_data=both[1], data_root="/root"))


@pytest.mark.parametrize("form", ["list.csv", "list.json", "list.sqlite", "saved", "shards", "parquet", "videos"])
def test_shuffling_of_shards_is_refused_where_there_are_none(sources, tmp_path, form):
    tar = str(write_tar(tmp_path / "a.tar", [{"mp4": b"x", "txt": "a"}]))
    said = "shuffle_buffer_size=10 has no effect, since no corpus is read as shards"
    with pytest.raises(ValueError, match=said):
        load_tables(DataArguments(train_data=sources[form], shuffle_buffer_size=10))
    with pytest.raises(ValueError, match=said):  # held-out rows are never shuffled
        load_tables(DataArguments(train_data=sources[form], validation_data=tar, shuffle_buffer_size=10))
    training = PretrainingArguments(per_device_train_batch_size=1)
    with pytest.raises(ValueError, match=said):
        load_corpora(CorpusArguments(train_corpora=[sources[form]], shuffle_buffer_size=10), training)
    both = load_tables(DataArguments(train_corpora=[sources[form], tar], shuffle_buffer_size=10))[0]
    assert both.parts[1].shuffle_rows == 10
    for kind in (DataArguments, CorpusArguments):
        for number in (0, -3):
            with pytest.raises(ValueError, match=f"shuffle_buffer_size must be at least 1, got {number}"):
                kind(train_corpora=[tar], shuffle_buffer_size=number)


@pytest.mark.parametrize("option", ["streaming", "data_root", "csv_separator", "dataset_config_name"])
def test_options_that_mean_nothing_to_tars_are_refused_in_pretraining(sources, tmp_path, option):
    tars = str(write_tar(tmp_path / "tars" / "a.tar", [{"mp4": b"x", "txt": "a"}]).parent)
    flags = {option: True if option == "streaming" else ";"}
    with pytest.raises(ValueError, match=rf"{option}=\S+ has no effect on {tars}, which is tars of videos"):
        load_tables(DataArguments(train_data=tars, **flags))
    training = PretrainingArguments(per_device_train_batch_size=1)
    if option in ("streaming", "data_root"):
        others = {"data_roots": [";"]} if option == "data_root" else flags
        with pytest.raises(ValueError, match=rf"{option}s?=\S+ has no effect on {tars}, which is tars of videos"):
            load_corpora(CorpusArguments(train_corpora=[tars], **others), training)
    # Beside a corpus that has a use for it, it is no mistake.
    other = sources["list.csv" if option in ("csv_separator", "data_root") else "shards"]
    if option == "csv_separator":
        other = str(tmp_path / "list.csv")
        (tmp_path / "list.csv").write_text("video;label\na.mp4;1\n")
    if option != "dataset_config_name":
        assert len(load_tables(DataArguments(train_corpora=[tars, other], **flags))[0]) > 1
        if option != "csv_separator":
            others = {"data_roots": [";"]} if option == "data_root" else flags
            assert load_corpora(CorpusArguments(train_corpora=[tars, other], **others), training)


def test_labels_are_optional_where_none_are_read(tmp_path, caplog):
    """Lines with and without one, a header's empty cells, and names beside numbers; but not where they are needed."""
    caplog.set_level(logging.WARNING)
    for text in ("a.mp4,1\nb.mp4\nc.mp4,run\nd.mp4,-1\n", "video,label\na.mp4,1\nb.mp4,\nc.mp4,run\nd.mp4,-1\n"):
        (tmp_path / "list.csv").write_text(text)
        rows = load_videos(str(tmp_path / "list.csv"), data_root="", needs_labels=False)
        assert rows[:] == {"video": ["a.mp4", "b.mp4", "c.mp4", "d.mp4"]}
        with pytest.raises(ValueError, match=r"list\.csv, line [234]"):
            load_videos(str(tmp_path / "list.csv"))
    assert not caplog.records
