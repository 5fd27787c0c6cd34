"""Long lists as tables on disk: made once, complete or absent, read anew when the list or an option changes."""

import json
import logging
import os
import pickle
import time
from pathlib import Path

import datasets
import pytest

from tests.processes import read_output, start_process, wait_for
from umt_hf.data import arrow_cache, sources
from umt_hf.data.annotations import load_pairs
from umt_hf.data.lists import csv_lists, json_lists
from umt_hf.data.sources import load_videos


def load_aloud(cache: str, source: str, seconds: float) -> None:
    """Load a list as a rank does, and say how often it was read; pauses give time to kill it."""
    datasets.config.HF_DATASETS_CACHE = cache
    arrow_cache.SHORTEST_CACHED_BYTES, csv_lists.CHUNK_ROWS, arrow_cache.BATCH_ROWS = 0, 10, 10
    read = sources.read_csv

    def read_aloud(*arguments):
        print("reads", flush=True)
        for number, chunk in enumerate(read(*arguments)):
            time.sleep(seconds)
            yield chunk
            if number == 1:
                print("begun", flush=True)

    sources.read_csv = read_aloud
    table = load_videos(source)
    print("rows", len(table), table[0]["video"], sum(table["label"]), table.cache_files, flush=True)


def start_rank(output, cache, source, seconds=0.0):
    return start_process(load_aloud, str(cache), str(source), seconds, environment={}, output=output)


def write_csv(folder, num_rows=100):
    (folder / "list.csv").write_text("".join(f"{number}.mp4,{number % 3}\n" for number in range(num_rows)))
    return folder / "list.csv"


def list_entries(table_cache):
    return sorted(path.name for path in table_cache.iterdir() if path.is_dir())


def test_a_table_is_made_once_and_mapped(tmp_path, table_cache, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    source = str(write_csv(tmp_path))
    (tmp_path / "list.csv").write_text("a.mp4,0\nb.mp4,3\na.mp4,3\n")
    first = load_videos(source)
    said = [record.getMessage() for record in caplog.records]
    assert "once for all processes of this machine" in caplog.text and "labels go up to 3" in caplog.text
    monkeypatch.setattr(sources, "read_csv", None)  # nothing is read again
    caplog.clear()
    second = load_videos(source)
    assert (
        second[:]
        == first[:]
        == {"video": [str(tmp_path / name) for name in ("a.mp4", "b.mp4", "a.mp4")], "label": [0, 3, 3]}
    )
    assert second.features == first.features and [record.getMessage() for record in caplog.records] == said[1:]
    (file,) = second.cache_files
    assert Path(file["filename"]).parent.parent == table_cache and second.data.nbytes > 0
    assert len(pickle.dumps(second)) < 5000 and pickle.loads(pickle.dumps(second))[:] == first[:]


def test_another_list_or_option_gives_another_table(tmp_path, table_cache, monkeypatch):
    path = write_csv(tmp_path, 3)
    rows = load_videos(str(path))
    assert load_videos(str(path), data_root="/root")["video"][:][0] == "/root/0.mp4"
    assert "label" not in load_videos(str(path), needs_labels=False).features
    load_videos(str(path), class_names=["a", "b", "c"])
    load_videos(str(path), csv_separator=",")
    assert len(list_entries(table_cache)) == 5
    status = path.stat()
    path.write_text("0.mp4,2\n1.mp4,1\n2.mp4,2\n")  # of the same size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert load_videos(str(path))["label"][:] == [2, 1, 2] != rows["label"][:]
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    path.write_text("0.mp4,2\n")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert len(load_videos(str(path))) == 1
    monkeypatch.setattr(arrow_cache, "FORMAT", arrow_cache.FORMAT + 1)
    before = list_entries(table_cache)
    assert len(load_videos(str(path))) == 1 and len(list_entries(table_cache)) == len(before) + 1
    # Tables that nobody has opened for a month go when one of the list is made.
    for name in before:
        os.utime(table_cache / name / arrow_cache.ENTRY_FILE, (time.time() - 31 * 86_400,) * 2)
    load_videos(str(path), data_root="/another")
    assert len(list_entries(table_cache)) == 2


def test_processes_make_one_table_together(tmp_path):
    source = write_csv(tmp_path)
    ranks = [start_rank(tmp_path / f"rank{rank}", tmp_path / "cache", source, 0.02) for rank in range(2)]
    wait_for(ranks, 0, timeout=120)
    found = [read_output(tmp_path / f"rank{rank}") for rank in range(2)]
    assert [rank.exitcode for rank in ranks] == [0, 0], found
    lines = [line for output in found for line in output.stdout.splitlines()]
    assert lines.count("reads") == 1
    rows = {line for line in lines if line.startswith("rows")}
    assert len(rows) == 1 and rows.pop().startswith(f"rows 100 {tmp_path}/0.mp4 99 ")


def test_a_killed_conversion_leaves_nothing_that_is_taken_for_a_table(tmp_path, table_cache):
    source, cache = write_csv(tmp_path), table_cache.parent
    rank = start_rank(tmp_path / "rank", cache, source, 0.05)
    while "begun" not in read_output(tmp_path / "rank").stdout:
        assert rank.is_alive(), read_output(tmp_path / "rank")
        time.sleep(0.01)
    rank.kill()
    rank.join(60)
    (left,) = list_entries(table_cache)
    assert left.endswith(arrow_cache.UNFINISHED_SUFFIX)
    assert len(load_videos(str(source))) == 100
    (entry,) = list_entries(table_cache)
    assert not entry.endswith(arrow_cache.UNFINISHED_SUFFIX)
    files = {path.name for path in (table_cache / entry).iterdir()}
    assert files == {arrow_cache.ROWS_FILE, arrow_cache.ENTRY_FILE}


def test_a_mistake_in_a_list_leaves_no_table(tmp_path, table_cache):
    (tmp_path / "list.csv").write_text("a.mp4,1\nb.mp4,1\nc.mp4,1\nd.mp4\n")
    with pytest.raises(ValueError, match=r"list\.csv, line 4: does not have a label"):
        load_videos(str(tmp_path / "list.csv"))
    assert not table_cache.exists() or not list_entries(table_cache)


@pytest.mark.heavy
def test_a_cache_that_cannot_be_written_is_said(tmp_path, table_cache, monkeypatch, caplog):
    (tmp_path / "file").touch()
    source = write_csv(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    table = load_videos(str(source))
    assert len(table) == 100 and "every process and every start reads the list anew" in caplog.text
    assert "HF_DATASETS_CACHE" in caplog.text
    place = Path(table.cache_files[0]["filename"]).parent
    assert place.is_dir()
    rank = start_rank(tmp_path / "rank", tmp_path / "file", source)
    rank.join(120)
    output = read_output(tmp_path / "rank").stdout
    folder = output.split("'filename': '")[1].split("'")[0]
    assert "rows 100" in output and not Path(folder).parent.exists()  # it goes with its process

    def fill(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(arrow_cache, "_Writer", fill)
    with pytest.raises(OSError, match=r"list\.csv: its table can be written neither to .* No space left") as error:
        load_videos(str(source))
    assert "\n" not in str(error.value)


def test_a_list_that_changes_meanwhile_is_refused(tmp_path, table_cache, monkeypatch):
    source, read = write_csv(tmp_path), sources.read_csv

    def read_and_change(path, *arguments):
        yield from read(path, *arguments)
        with path.open("a") as file:
            file.write("late.mp4,1\n")

    monkeypatch.setattr(sources, "read_csv", read_and_change)
    with pytest.raises(ValueError, match=r"list\.csv: changed while it was read"):
        load_videos(str(source))
    monkeypatch.undo()
    assert len(load_videos(str(source))) == 101


def test_names_that_are_looked_up_are_looked_up_at_each_start(tmp_path, table_cache, caplog):
    (tmp_path / "list.csv").write_text("clip,1\nother,1\nb.mp4,0\n")
    assert load_videos(str(tmp_path / "list.csv"))["video"][:][0] == str(tmp_path / "clip.mp4")
    assert "names without a suffix, which are looked up on disk at every start" in caplog.text
    (tmp_path / "clip").mkdir()
    assert load_videos(str(tmp_path / "list.csv"))["video"][:][0] == str(tmp_path / "clip")


def test_columns_may_change_along_a_list(tmp_path, table_cache):
    """Keys that come late, numbers that become fractions, and lists beside single values, over many chunks."""
    rows = [
        {"video": "a.mp4"},
        {"video": "b.mp4", "n": None},
        {"video": "c.mp4", "n": 1, "caption": "x"},
        {"video": "d.mp4", "n": 2, "caption": "x"},
        {"video": "e.mp4", "n": 1.5, "caption": ["y", "z"]},
        {"video": ["f.mp4", "g.mp4"], "caption": None},
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = load_videos(str(tmp_path / "list.jsonl"), data_root="")
    assert table["video"][:] == [f"{name}.mp4" for name in "abcdefg"]
    assert table["n"][:] == [None, None, 1, 2, 1.5, None, None]
    assert table["caption"][:] == [None, None, ["x"], ["x"], ["y", "z"], None, None]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, [*rows, rows[0], {"video": "h", "n": "text"}])))
    with pytest.raises(ValueError, match=r"list\.jsonl: a key has values of several kinds.*n: "):
        load_videos(str(tmp_path / "list.jsonl"))


def test_captions_are_expanded_once(tmp_path, table_cache, monkeypatch):
    rows = [{"video": f"{number}.mp4", "caption": ["x", f"y{number}"]} for number in range(5)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = load_pairs(str(tmp_path / "list.jsonl"), "each")
    assert pairs["caption"][:][:4] == ["x", "y0", "x", "y1"] and len(pairs) == 10
    monkeypatch.setattr("umt_hf.data.annotations._list_captions", None)  # the result is found on disk
    assert load_pairs(str(tmp_path / "list.jsonl"), "each")[:] == pairs[:]


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_json_lists_are_read_piece_by_piece(tmp_path, monkeypatch, size):
    """What is read does not depend on where a piece of the file ends; mistakes are named with line and column."""
    monkeypatch.setattr(json_lists, "READ_CHARACTERS", size)
    values = [
        {"a": [1, -2.5e10, 'é"\\\u2028'], "b": {}},
        12345,
        -1.5,
        "x,]",
        True,
        None,
        [],
        float("inf"),
        {"z": "\u00e9"},
    ]
    for text in (json.dumps(values), json.dumps(values, indent=2), f" \n{json.dumps(values, ensure_ascii=False)}\n "):
        (tmp_path / "list.json").write_text(text, encoding="utf-8")
        assert list(json_lists._stream_list(tmp_path / "list.json")) == values
    (tmp_path / "list.json").write_text("[ ]")
    assert list(json_lists._stream_list(tmp_path / "list.json")) == []
    for text in ('[{"a": 1},\n {"b" 2}]', "[1\n 2]", '[{"a": "x]', "[1, 2", "[1] 2", "[1,\n\n nul]", "[", "[1,"):
        (tmp_path / "list.json").write_text(text)
        with pytest.raises(json.JSONDecodeError) as expected:
            json.loads(text)
        with pytest.raises(ValueError, match=r"list\.json is not valid JSON: ") as found:
            list(json_lists._stream_list(tmp_path / "list.json"))
        assert str(found.value).endswith(str(expected.value)), text


def test_a_long_json_list_is_never_held(tmp_path, monkeypatch):
    """The piece of the file in memory stays as long as what is read at once, and the longest object."""
    monkeypatch.setattr(json_lists, "READ_CHARACTERS", 1000)
    (tmp_path / "list.json").write_text(json.dumps([{"video": f"{number}.mp4"} for number in range(20_000)]))
    longest, read_more = [0], json_lists._Window.read_more

    def watch(window):
        more = read_more(window)
        longest[0] = max(longest[0], len(window.text))
        return more

    monkeypatch.setattr(json_lists._Window, "read_more", watch)
    assert len(list(json_lists._stream_list(tmp_path / "list.json"))) == 20_000 and longest[0] <= 1100
