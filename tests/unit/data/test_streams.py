"""Shards: every row is found where it is, in tars and in Parquet, and what is wrong with one is named."""

import io
import pickle
import tarfile

import numpy as np
import pytest
from datasets import Dataset, Features, Value, Video

from tests.unit.shard_files import write_parquets, write_tar, write_tars
from tests.unit.video_files import write_video
from umt_hf.data import streams
from umt_hf.data.sources import load_videos
from umt_hf.data.streams import choose_shards, holds_shards, load_shards
from umt_hf.processing.media_files import VideoDecodingError

CONTENTS = [f"video {number} ".encode() * (40 + 17 * number) for number in range(11)]


def list_rows(shards) -> list[tuple]:
    rows = [shards[number] for number in range(len(shards))]
    return [(row["video"]["bytes"], row.get("caption")) for row in rows]


@pytest.fixture
def tars(tmp_path):
    rows = [{"mp4": content, "txt": f"text {number}\n"} for number, content in enumerate(CONTENTS)]
    return write_tars(tmp_path / "tars", rows, 4)


def test_rows_of_tars_are_read_where_they_are(tars):
    shards = load_shards(str(tars), extra={"corpus": 3})
    assert list_rows(shards) == [(content, f"text {number}") for number, content in enumerate(CONTENTS)]
    assert shards.starts.tolist() == [0, 4, 8, 11] and shards[5]["corpus"] == 3
    assert shards[5]["video"]["path"] == f"{tars}/train-00001.tar/train-00001_0001.mp4"
    assert list_rows(pickle.loads(pickle.dumps(shards))) == list_rows(shards)
    assert list_rows(load_shards(str(tars / "train-00002.tar"))) == list_rows(shards)[8:]
    with pytest.raises(IndexError):
        shards[11]


def test_members_of_a_row_in_any_order_and_form(tmp_path):
    long = "folder/" + "n" * 150
    rows = [
        {"json": {"caption": ["a", "b"], "label": 2}, "mp4": b"first"},
        {"webm": b"second", "json": {"label": 1}},
        {"jpg": b"third", "txt": "picture"},
        {"left.MP4": b"fourth", "json": {"caption": "of JSON"}, "txt": "of TXT"},
    ]
    tar = write_tar(tmp_path / "a.tar", rows, ["one", "sub.d/two", "three", long])
    assert list_rows(load_shards(str(tar))) == [
        (b"first", ["a", "b"]),
        (b"second", None),
        (b"fourth", "of TXT"),
    ]
    assert load_shards(str(tar))[2]["video"]["path"].startswith(f"{tar}/")
    assert list_rows(load_shards(str(tar), video_column="image")) == [(b"third", "picture")]
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "copy.tar", "w", format=form) as copy, tarfile.open(tar) as original:
            for member in original:
                if form != tarfile.USTAR_FORMAT or len(member.name) < 100:
                    copy.addfile(member, original.extractfile(member))
        found = list_rows(load_shards(str(tmp_path / "copy.tar")))
        assert found == list_rows(load_shards(str(tar)))[: 2 if form == tarfile.USTAR_FORMAT else 3]


def test_the_index_of_large_tars_is_kept_and_follows_the_files(tars, tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "SHORTEST_CACHED_BYTES", 0)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = list_rows(load_shards(str(tars)))
    (kept,) = (tmp_path / "cache" / streams.CACHE_FOLDER).glob("*.npy")
    built = []
    monkeypatch.setattr(streams, "_build_tar_index", lambda *arguments: built.append(arguments))
    shards = load_shards(str(tars))
    assert list_rows(shards) == rows and not built and isinstance(shards.index, np.memmap)
    assert len(pickle.dumps(shards)) < 2000 and list_rows(pickle.loads(pickle.dumps(shards))) == rows
    monkeypatch.undo()
    monkeypatch.setattr(streams, "SHORTEST_CACHED_BYTES", 0)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_tar(tars / "train-00002.tar", [{"mp4": b"new"}])
    assert list_rows(load_shards(str(tars)))[8:] == [(b"new", None)]
    # Where nothing can be kept, each process reads the headers.
    (tmp_path / "cache" / "file").write_text("")
    monkeypatch.setattr(streams, "CACHE_FOLDER", "file")
    assert len(load_shards(str(tars))) == 9


@pytest.mark.parametrize("kind", ["struct", "binary", "Video"])
def test_rows_of_parquet_files(tmp_path, kind):
    if kind == "Video":
        (tmp_path / "shards").mkdir()
        features = Features({"clip": Video(), "caption": Value("string")})
        rows = {
            "clip": [{"path": None, "bytes": content} for content in CONTENTS],
            "caption": [f"text {number}" for number in range(len(CONTENTS))],
        }
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "shards" / "train-0.parquet", batch_size=3)
    else:
        rows = [
            {
                "video": content if kind == "binary" else {"bytes": content, "path": "a.mp4"},
                "caption": f"text {number}",
            }
            for number, content in enumerate(CONTENTS)
        ]
        write_parquets(tmp_path / "shards", rows, 6)
    shards = load_shards(str(tmp_path / "shards"), needs_captions=True)
    assert list_rows(shards) == [(content, f"text {number}") for number, content in enumerate(CONTENTS)]
    assert shards.starts.tolist()[:3] == [0, 3, 6]
    assert len(shards._tables) <= streams.OPEN_GROUPS
    copy = pickle.loads(pickle.dumps(shards))
    assert not copy._tables and copy[7] == shards[7]


def test_paths_in_parquet_start_at_the_root(tmp_path):
    video = write_video(tmp_path / "videos" / "a.mp4") if (tmp_path / "videos").mkdir() is None else None
    write_parquets(tmp_path / "shards", [{"video": "a.mp4"}, {"video": str(video)}], 2)
    shards = load_shards(str(tmp_path / "shards"), data_root=str(tmp_path / "videos"))
    assert shards[0]["video"] == shards[1]["video"] == str(video)


def test_splits_are_those_of_the_names(tars):
    write_tar(tars / "validation-00000.tar", [{"mp4": b"held out"}])
    assert len(load_shards(str(tars))) == 11
    assert list_rows(load_shards(str(tars), "validation")) == [(b"held out", None)]
    with pytest.raises(ValueError, match="has no split 'test'; it has"):
        load_shards(str(tars), "test")


def test_what_is_wrong_with_shards_is_named(tars, tmp_path):
    with pytest.raises(ValueError, match=r"names.tar: several videos are named a; give each another name"):
        load_shards(str(write_tar(tmp_path / "names.tar", [{"mp4": b"1", "avi": b"2"}], ["a"])))
    with pytest.raises(ValueError, match=r"none.tar: no videos in 1 tar.*known suffixes"):
        load_shards(str(write_tar(tmp_path / "none.tar", [{"txt": b"1"}])))
    with pytest.raises(ValueError, match="no video has a caption; give each a .txt, or a .json"):
        load_shards(str(write_tar(tmp_path / "mute.tar", [{"mp4": b"1"}])), needs_captions=True)
    shards = load_shards(str(tars))
    content = (tars / "train-00001.tar").read_bytes()
    (tars / "train-00001.tar").write_bytes(content[:900])
    with pytest.raises(ValueError, match=r"train-00001.tar: not a complete tar without compression"):
        load_shards(str(tars))
    # Changed while the run goes on: counted as a video that cannot be read.
    with pytest.raises(VideoDecodingError, match=r"train-00001.tar, row 5: the shard has changed since the run began"):
        shards[5]
    (tars / "train-00001.tar").unlink()
    with pytest.raises(VideoDecodingError, match=r"train-00001.tar, row 5: No such file"):
        shards[5]
    write_parquets(tmp_path / "parquet", [{"video": b"1", "caption": "a"}], 1)
    with pytest.raises(ValueError, match="rows have no caption; they have video"):
        load_shards(str(write_parquets(tmp_path / "mute", [{"video": b"1"}], 1)), needs_captions=True)
    (tmp_path / "parquet" / "train-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="train-00000.parquet: not a complete Parquet file"):
        load_shards(str(tmp_path / "parquet"))
    with pytest.raises(FileNotFoundError, match=r"absent.tar: no such file or folder"):
        load_shards(str(tmp_path / "absent.tar"))


def test_lists_and_tables_are_not_streamed(tmp_path, tars):
    (tmp_path / "list.csv").write_text("a.mp4,0\n")
    (tmp_path / "videos").mkdir()
    Dataset.from_dict({"video": ["a.mp4"]}).save_to_disk(tmp_path / "saved")
    for name, reason in (("list.csv", "is a list"), ("videos", "has neither tars"), ("saved", "is a saved table")):
        with pytest.raises(ValueError, match=f"{name}: {reason}.*Leave out streaming"):
            load_shards(str(tmp_path / name))
    listed, folder = str(tmp_path / "list.csv"), str(tmp_path / "videos")
    assert [holds_shards(source) for source in (listed, folder, str(tars), "me/shapes")] == [False, False, True, True]
    assert choose_shards([listed, str(tars), "me/shapes"], False) == [False, True, False]
    assert choose_shards([listed, str(tars), "me/shapes"], True) == [False, True, True]
    assert choose_shards([listed, folder], True) == [True, False]  # which says why not


def test_texts_are_not_read_where_none_are_needed(tmp_path):
    rows = [{"mp4": b"first", "json": b'{"caption": '}, {"mp4": b"second", "txt": b"\xff\xfe"}]
    tar = write_tar(tmp_path / "a.tar", rows, ["one", "two"])
    mute = load_shards(str(tar), reads_captions=False)
    assert [mute[number]["video"]["bytes"] for number in range(2)] == [b"first", b"second"]
    shards = load_shards(str(tar), needs_captions=True)
    for number, name in enumerate(("one.mp4", "two.mp4")):
        with pytest.raises(
            VideoDecodingError, match=f"a.tar/{name}: the text beside it is not UTF-8 or JSON .*Write it again"
        ):
            shards[number]


def write_apart(path, names):
    """As `tar cf x.tar *.mp4 *.txt` does."""
    with tarfile.open(path, "w") as tar:
        for suffix in ("mp4", "txt"):
            for name in names:
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = 5
                tar.addfile(member, io.BytesIO(b"a dog"))
    return str(path)


def test_texts_apart_from_their_videos_are_explained(tmp_path, caplog):
    path = write_apart(tmp_path / "a.tar", [f"v{number}" for number in range(16)])
    with pytest.raises(ValueError, match=r"a\.tar: no video has a caption.*next to each other.*tar --sort=name -cf"):
        load_shards(path, needs_captions=True)
    for load in (load_shards, load_videos):  # without need of a caption, a warning says it
        caplog.clear()
        load(path)
        assert "16 names" not in caplog.text
        assert "16 texts are apart from their videos and are left out" in caplog.text
        assert "tar --sort=name -cf" in caplog.text


def test_a_video_between_its_texts_or_split_in_the_tar_is_not_read_twice(tmp_path, caplog):
    """Only names that come back are meant: texts without a video are left out as before."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("a.mp4", "a.txt", "b.txt", "c.mp4"):
            member = tarfile.TarInfo(name)
            member.size = 5
            tar.addfile(member, io.BytesIO(b"a dog"))
    assert len(load_shards(str(tmp_path / "a.tar"), needs_captions=True)) == 2
    assert "1 names in the tars have no video" in caplog.text and "next to each other" not in caplog.text
