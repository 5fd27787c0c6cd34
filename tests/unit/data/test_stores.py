"""Videos and lists at addresses of object stores, in the one that fsspec keeps in memory; errors are one sentence."""

import json
import sys
import threading
import uuid

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit.video_files import write_video
from umt_hf import UMTVideoProcessor
from umt_hf.data.key_frames import load_key_frames
from umt_hf.data.lists.paths import join_root
from umt_hf.data.lists.stores import fetch_list
from umt_hf.data.prepare import list_rows
from umt_hf.data.sources import load_videos
from umt_hf.data.splits import has_splits
from umt_hf.data.streams import load_shards
from umt_hf.data.video_files import list_videos
from umt_hf.evaluation.report import fingerprint_data
from umt_hf.processing.decoding import VideoDecodingError, open_video
from umt_hf.processing.media_files import LIMITS, open_source


@pytest.fixture
def store(monkeypatch, tmp_path):
    """Address of an empty folder in memory; lists are fetched to a cache of the test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    address = f"memory://{uuid.uuid4().hex}"
    yield address
    memory = fsspec.filesystem("memory")
    if memory.exists(address):
        memory.rm(address, recursive=True)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", num_frames=12)


def put(address: str, content: bytes | str) -> str:
    fsspec.filesystem("memory").pipe_file(address, content if isinstance(content, bytes) else content.encode())
    return address


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_a_video_in_a_store_is_the_same_video(decoder, store, clip):
    if decoder == "decord":
        pytest.importorskip("decord", reason="decord is not installed")
    address = put(f"{store}/a b#1.mp4", clip.read_bytes())
    with open_video(address, decoder) as remote, open_video(clip, decoder) as local:
        assert remote.name == address
        np.testing.assert_array_equal(remote.get_frames([0, 7, 11]), local.get_frames([0, 7, 11]))
    processor = UMTVideoProcessor(num_frames=4, decoder=decoder)
    for source in (address, {"path": address, "bytes": None}):
        found = processor(source, return_tensors="pt")["pixel_values"]
        assert found.equal(processor(str(clip), return_tensors="pt")["pixel_values"])


def test_errors_of_stores_are_one_sentence(store, clip, monkeypatch):
    put(f"{store}/empty.mp4", b"")
    put(f"{store}/cut.mp4", clip.read_bytes()[:-500])
    for name, words in {
        "missing.mp4": "no such file. Check the address.",
        "empty.mp4": "is empty (0 bytes). Fetch it again or leave it out.",
        "cut.mp4": "is cut short",
    }.items():
        with pytest.raises(VideoDecodingError) as error:
            open_source(f"{store}/{name}")
        assert str(error.value).startswith(f"{store}/{name}: {words}")
    with pytest.raises(VideoDecodingError, match="is a folder, not a file"):
        open_source(store)
    address = put(f"{store}/large.mp4", clip.read_bytes())
    monkeypatch.setattr(LIMITS, "max_download_bytes", 1000)
    with pytest.raises(
        VideoDecodingError, match=r"bytes are more than the limit of 1000\..*UMT_HF_MAX_DOWNLOAD_BYTES"
    ):
        open_source(address)


@pytest.mark.parametrize("address", ["ftp://host/a.mp4", "reference://a.mp4", "zip://a::file:///etc/passwd", "x1://a"])
def test_other_protocols_are_refused(address):
    """Some that fsspec knows lead on to other files."""
    for refuse in (open_source, list_videos):
        with pytest.raises(VideoDecodingError, match=r"the protocol \w+ is not read; known are http, .*memory"):
            refuse(address)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    for refuse in (open_source, list_videos, load_videos):
        for address in ("s3://bucket/a.mp4", "S3://bucket/b"):
            with pytest.raises(ImportError, match=r"needs s3fs, run `pip install s3fs`\.$"):
                refuse(address)


def test_a_store_that_does_not_answer_is_not_waited_for(store, clip, monkeypatch):
    address, released = put(f"{store}/a.mp4", clip.read_bytes()), threading.Event()
    memory = fsspec.filesystem("memory")
    monkeypatch.setattr(type(memory), "info", lambda self, path, **options: released.wait(60))
    monkeypatch.setattr(LIMITS, "max_download_seconds", 0.2)
    with pytest.raises(VideoDecodingError, match=r"a\.mp4: cannot be read \(it took longer than 0\.2 seconds\)"):
        open_source(address)
    released.set()
    monkeypatch.undo()  # what tidies up asks the store


def test_what_a_store_raises_is_said(store, monkeypatch):
    def refuse(self, path, **options):
        raise RuntimeError("Unable to locate credentials.\nand more")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "info", refuse)
    with pytest.raises(VideoDecodingError) as error:
        open_source(f"{store}/a.mp4")
    assert str(error.value) == (
        f"{store}/a.mp4: cannot be read (Unable to locate credentials). Check the address, and the settings and keys "
        "of the store."
    )


def test_folders_in_a_store_are_listed(store, clip, tmp_path):
    for name in ("run/b.mp4", "run/deep/a.MKV", "jump/1.webm", "jump/.hidden.mp4", ".cache/x.mp4", "notes.txt"):
        put(f"{store}/{name}", clip.read_bytes())
    expected = [f"{store}/{name}" for name in ("jump/1.webm", "run/b.mp4", "run/deep/a.MKV")]
    for source in (store, f"{store}/"):
        found, missing = list_videos([source, f"{store}/run/b.mp4"])
        assert ([video.path for video in found], missing) == (expected, [])
    table = load_videos(store)
    assert table["video"][:] == expected and table["label"][:] == [0, 1, 1]
    assert table.features["label"].names == ["jump", "run"]
    assert len(list_rows([store, f"{store}/run/b.mp4"])) == 4
    first = fingerprint_data(store)
    put(f"{store}/run/c.mp4", b"x")
    assert fingerprint_data(store) != first
    assert len(list_videos([store])[0]) == 4
    found, missing = list_videos([f"{store}/none", clip])
    assert [video.path for video in missing] == [f"{store}/none"] and len(found) == 1
    for call in (lambda: list_videos([f"{store}/none"]), lambda: load_videos(f"{store}/none")):
        with pytest.raises((OSError, ValueError), match="no such file or folder|no videos found"):
            call()


ROWS = [{"video": "a.mp4", "label": "run"}, {"video": "memory://other/b.mp4", "label": "jump"}]


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet"])
def test_lists_in_a_store_name_videos_beside_them(suffix, store, tmp_path):
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "list.parquet")
        content = (tmp_path / "list.parquet").read_bytes()
    elif suffix == "csv":
        content = "video,label\n" + "".join(f"{row['video']},{row['label']}\n" for row in ROWS)
    else:
        content = json.dumps(ROWS) if suffix == "json" else "".join(json.dumps(row) + "\n" for row in ROWS)
    address = put(f"{store}/lists/train.{suffix}", content)
    for root, start in ((None, f"{store}/lists/"), ("memory://root", "memory://root/"), ("/videos", "/videos/")):
        table = load_videos(address, root, needs_labels=suffix != "parquet")
        assert table["video"][:] == [f"{start}a.mp4", "memory://other/b.mp4"]
    if suffix != "parquet":
        assert [table.features["label"].int2str(label) for label in table["label"]] == ["run", "jump"]
    assert fetch_list(address) == fetch_list(address) and fetch_list(address).name == f"train.{suffix}"
    assert fingerprint_data(address) and not has_splits(address)
    if suffix == "csv":
        former = fetch_list(address)
        put(address, "c.mp4,0\n")
        assert load_videos(address)["video"][:] == [f"{store}/lists/c.mp4"] and fetch_list(address) != former


@pytest.mark.parametrize("name", ["/etc/passwd", "~/a.mp4", "file:///etc/passwd", "FILE:///a.mp4", "../../etc/a.mp4"])
@pytest.mark.parametrize("suffix", ["csv", "parquet", "json"])
def test_a_list_in_a_store_cannot_name_files_of_this_machine(name, suffix, store, tmp_path):
    rows = [{"video": "good.mp4"}, {"video": name}]
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "list.parquet")
        content = (tmp_path / "list.parquet").read_bytes()
    else:
        content = json.dumps(rows) if suffix == "json" else f"good.mp4\n{name}\n"
    address = put(f"{store}/list.{suffix}", content)
    for root in (None, str(tmp_path)):
        if root is None and name.startswith(".."):  # leads to another address, and not to this machine
            assert load_videos(address, needs_labels=False)["video"][1] == f"{store}/{name}"
            continue
        with pytest.raises(ValueError, match="1 row.s. name files of this machine .*Copy the list"):
            load_videos(address, root, needs_labels=False)


def test_rows_with_bytes_may_have_any_name(store, tmp_path):
    rows = [{"video": {"bytes": b"x", "path": "/home/me/a.mp4"}}, {"video": {"bytes": b"y", "path": None}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "list.parquet")
    address = put(f"{store}/list.parquet", (tmp_path / "list.parquet").read_bytes())
    assert load_videos(address, needs_labels=False)[0]["video"]["bytes"] == b"x"
    for nothing in (None, b""):
        rows[1]["video"] = {"bytes": nothing, "path": "/etc/passwd"}
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "list.parquet")
        put(address, (tmp_path / "list.parquet").read_bytes())
        with pytest.raises(ValueError, match=r"1 row.s. name files of this machine \(/etc/passwd\)"):
            load_videos(address, needs_labels=False)
    pq.write_table(pa.table({"video": [["/etc/passwd"]]}), tmp_path / "list.parquet")
    put(address, (tmp_path / "list.parquet").read_bytes())
    with pytest.raises(ValueError, match="holds List"):
        load_videos(address, needs_labels=False)


def test_a_list_of_this_machine_names_videos_in_stores(store, tmp_path):
    (tmp_path / "list.csv").write_text("a.mp4,0\ns3://bucket/b.mp4,1\n/c.mp4,0\n")
    expected = [f"{store}/a.mp4", "s3://bucket/b.mp4", "/c.mp4"]
    assert load_videos(str(tmp_path / "list.csv"), store)["video"][:] == expected
    assert [join_root(store, name) for name in ("a.mp4", "s3://bucket/b.mp4", "/c.mp4")] == expected


def test_names_without_a_suffix_get_one(store):
    """As on this machine, where it may be a folder of frames instead."""
    address = put(f"{store}/list.csv", "clip_a,0\nclip_b,1\nclip_c.webm,1\nhttps://host/watch,0\n")
    expected = [f"{store}/clip_a.mp4", f"{store}/clip_b.mp4", f"{store}/clip_c.webm", "https://host/watch"]
    assert load_videos(address)["video"][:] == expected


def test_key_frames_in_a_store(store):
    row = {"video": "a.mp4", "key_seconds": 1, "objects": [{"box": [1, 2, 3, 4], "labels": "walk"}]}
    address = put(f"{store}/boxes.json", json.dumps([row]))
    assert load_key_frames(address)[0][0].video == f"{store}/a.mp4"
    put(address, json.dumps([row | {"video": "/etc/a.mp4"}]))
    with pytest.raises(ValueError, match="name files of this machine"):
        load_key_frames(address)


def test_mistakes_name_the_address(store):
    address = put(f"{store}/list.json", "{")
    for call in (lambda: load_videos(address), lambda: load_videos(f"{store}/none.csv")):
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value).startswith(store) and "umt_hf_fetched" not in str(error.value)
    with pytest.raises(ValueError, match="tars are not read from an address"):
        load_videos(f"{store}/a.tar")
    with pytest.raises(ValueError, match="Leave out streaming"):
        load_shards(f"{store}/a.parquet")
    with pytest.raises(ValueError, match="folders of web servers are not listed"):
        load_videos("https://host/videos")
    with pytest.raises(ValueError, match="streaming=True has no effect"):
        load_videos(address, streaming=True)
