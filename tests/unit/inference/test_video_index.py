"""The index on the disk: commits, kills, several writers, growth, filters, and search in it."""

import os
import threading
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest

from tests.processes import build_environment, find_free_port, read_output, run_and_kill, start_process, wait_for
from umt_hf.data.video_files import SkippedVideo, VideoFile
from umt_hf.inference import video_index
from umt_hf.inference.video_index import RowWriter, SearchFilter, VideoIndex
from umt_hf.runs.mistakes import MachineError, UserError

pytest.importorskip("lancedb")

ENCODER = {"model": "tiny", "weights": "0", "projection_dim": 2, "moments": None}


def build_rows(*paths: str, vector=(1.0, 0.0), modified_ns: int = 1, **facts) -> list[dict]:
    row = {"size_bytes": 1, "modified_ns": modified_ns, "num_frames": 4, "vector": np.array(vector, np.float32)}
    return [{"path": path, **row, **facts} for path in paths]


def make_index(folder: Path, width: int = 2, **options) -> VideoIndex:
    index = VideoIndex(folder, **options)
    index.create(ENCODER | {"projection_dim": width})
    return index


def find(index: VideoIndex, vector, count: int = 10, **options) -> list[str]:
    return [row["path"] for row in index.load().find_nearest(np.array(vector, np.float32), count, **options)]


def test_rows_replace_older_ones_and_unreadable_videos_lose_theirs(tmp_path):
    index = make_index(tmp_path / "index")
    index.add(build_rows("b", "a"))
    assert index.finish([SkippedVideo("z", "broken")]) == 2
    changed = [VideoFile("a", 1, 1), VideoFile("b", 1, 2), VideoFile("c", 1, 1)]
    index = make_index(tmp_path / "index")
    assert index.select_new(changed) == changed[1:]
    index.add(build_rows("b", "c", vector=(0.0, 1.0), modified_ns=2))
    assert index.finish([SkippedVideo("a", "now broken")]) == 2
    rows = index.load().find_nearest(np.array([0, 1], np.float32), 5)
    assert [(row["path"], row["modified_ns"], row["similarity"]) for row in rows] == [("b", 2, 1.0), ("c", 2, 1.0)]
    assert index.list_paths() == ["b", "c"]
    assert index.read_skipped() == [SkippedVideo("a", "now broken"), SkippedVideo("z", "broken")]
    index.add(build_rows("z"))
    assert index.finish([SkippedVideo("a", "gone")]) == 3
    assert index.read_skipped() == [SkippedVideo("a", "gone")]
    assert index.finish([SkippedVideo(path, "it's gone") for path in "bcz"]) == 0
    with pytest.raises(ValueError, match="holds no videos"):
        index.load()


def test_names_of_all_kinds(tmp_path):
    """Quotes, signs that patterns know, and letters of other alphabets."""
    names = ["/a/it's.mp4", '/a/"b".mp4', "/a/100%.mp4", "/a/100x.mp4", "/a/a_b.mp4", "/a/aXb.mp4", "/ä/видео.mp4"]
    names += ["/a/back\\slash.mp4", "/a/star*.mp4"]
    index = make_index(tmp_path)
    index.add(build_rows(*names))
    index.add(build_rows(*names, modified_ns=2))
    assert index.finish([]) == len(names) == index.count_rows()
    assert set(find(index, (1, 0), 20)) == set(names)
    for pattern, expected in {
        "*%*": ["/a/100%.mp4"],
        "*a_b*": ["/a/a_b.mp4"],
        "/ä/*": ["/ä/видео.mp4"],
        "*it's*": ["/a/it's.mp4"],
        "*back\\slash*": ["/a/back\\slash.mp4"],
        "*/100?.mp4": ["/a/100%.mp4", "/a/100x.mp4"],
        "/a/100": [],
    }.items():
        assert sorted(find(index, (1, 0), 20, filters=SearchFilter(path=pattern))) == expected, pattern
    index.finish([SkippedVideo(name, "gone") for name in names[:3]])
    assert set(index.list_paths()) == set(names[3:])


def test_filters(tmp_path):
    index = make_index(tmp_path)
    day = 86_400
    for i, duration in enumerate((1.0, 10.0, 100.0, None)):
        index.add(build_rows(f"{i}.mp4", modified_ns=i * day * 10**9, duration_seconds=duration))
    cases = {
        SearchFilter(min_duration=10): "12",
        SearchFilter(max_duration=10): "01",
        SearchFilter(min_duration=2, max_duration=50): "1",
        SearchFilter(after=datetime.fromtimestamp(day)): "123",
        SearchFilter(before=datetime.fromtimestamp(day)): "0",
        SearchFilter(path="?.mp4", after=datetime.fromtimestamp(day), before=datetime.fromtimestamp(2 * day)): "1",
        SearchFilter(): "0123",
    }
    for filters, expected in cases.items():
        assert sorted(path[0] for path in find(index, (1, 0), filters=filters)) == list(expected), filters
    for wrong, message in (
        ({"min_duration": -1}, "min_duration must be a number of seconds"),
        ({"max_duration": float("nan")}, "max_duration must be a number of seconds"),
        ({"min_duration": 2, "max_duration": 1}, "is above max_duration"),
        ({"after": datetime(2026, 1, 2), "before": datetime(2026, 1, 1)}, "must be earlier than before"),
    ):
        with pytest.raises(ValueError, match=message):
            SearchFilter(**wrong)


@pytest.mark.parametrize("flat_rows", [10_000, 300])
def test_search_is_sorting_by_inner_product(tmp_path, flat_rows):
    """Flat, and with lists of neighbours; rows that came after the lists were made are found too."""
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((20, 16))
    vectors = (centers[rng.integers(20, size=1200)] + 0.3 * rng.standard_normal((1200, 16))).astype(np.float32)
    index = make_index(tmp_path, 16, flat_rows=flat_rows)
    names = [f"{i:04d}" for i in range(len(vectors))]
    for part in (range(1000), range(1000, 1200)):
        index.add([row for i in part for row in build_rows(names[i], vector=vectors[i])])
        assert index.finish([]) == part.stop
    table = index.load()
    assert table.is_flat == (flat_rows > 1200) and len(table) == 1200
    queries = vectors[::60] + 0.1 * rng.standard_normal((20, 16)).astype(np.float32)
    recall = []
    for query in queries:
        order = np.argsort(-(vectors @ query), kind="stable")
        exact = table.find_nearest(query, 10, exact=True)
        assert [row["path"] for row in exact] == [names[i] for i in order[:10]]
        np.testing.assert_allclose([row["similarity"] for row in exact], (vectors @ query)[order[:10]], rtol=1e-5)
        found = table.find_nearest(query, 10)
        recall.append(len({row["path"] for row in found} & {names[i] for i in order[:10]}) / 10)
        assert all(a["similarity"] >= b["similarity"] - 1e-6 for a, b in zip(found, found[1:], strict=False))
    assert np.mean(recall) == 1.0 if table.is_flat else np.mean(recall) > 0.6
    only = SearchFilter(path="11*")
    expected = sorted(range(1100, 1200), key=lambda i: -vectors[i] @ queries[0])[:5]
    assert [row["path"] for row in table.find_nearest(queries[0], 5, filters=only)] == [names[i] for i in expected]


def test_lists_are_made_again_when_an_index_has_grown(tmp_path):
    index = make_index(tmp_path, 4, flat_rows=100)
    rng = np.random.default_rng(0)

    def grow(count: int) -> list[str]:
        index.add([row for i in range(count) for row in build_rows(f"{time.time_ns()}{i}", vector=rng.random(4))])
        index.finish([])
        return [found.name for found in index._open_existing("videos").list_indices()]

    assert grow(90) == [] and index.load().is_flat
    first = grow(160)
    assert len(first) == 1 and grow(50) == first
    assert grow(1200) != first and not index.load().is_flat


def measure_files(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_a_large_index_takes_little_more_than_its_vectors(tmp_path):
    """Also after rows that were added one by one, and lists that were made and renewed: copies of former ones go."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((4000, 256)).astype(np.float32)
    index = make_index(tmp_path, 256, flat_rows=1000, max_fragments=50)
    names = [f"{i:04d}" for i in range(len(vectors))]
    for part in ([range(1500)], [range(1500, 3900)], ([i] for i in range(3900, 4000))):
        for numbers in part:
            index.add([row for i in numbers for row in build_rows(names[i], vector=vectors[i])])
        index.finish([])
        assert index.has_lists()
        assert measure_files(tmp_path) <= 1.5 * index.count_rows() * vectors[0].nbytes
    for number in (0, 1700, 3999):
        assert find(index, vectors[number], 1) == [names[number]]


def test_commits_are_joined_and_old_versions_go(tmp_path):
    index = make_index(tmp_path, 64, max_fragments=20)
    for i in range(90):
        index.add(build_rows(f"{i:03d}", vector=np.full(64, i)))
        assert video_index._count_fragments(index._open_existing("videos")) <= 21
    index.finish([])
    assert index.count_rows() == 90 and len(index._open_existing("videos").list_versions()) <= 22
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) < 120 and measure_files(tmp_path) < 10 * 90 * 64 * 4
    for i in range(21):  # deletions are commits too
        index.finish([SkippedVideo(f"{i:03d}", "gone")])
    assert index.count_rows() == 69 and len(index._open_existing("videos").list_versions()) <= 22


def test_a_writer_commits_by_rows_and_by_time(tmp_path):
    index = make_index(tmp_path)
    writer = RowWriter(index, rows_per_commit=3, seconds_per_commit=1000)
    writer.write(build_rows("a"))
    writer.write(build_rows("b"))
    assert index.count_rows() == 0
    writer.write(build_rows("c"))
    assert index.count_rows() == 3
    writer.write(build_rows("d"))
    writer.seconds_per_commit = 0
    writer.write([])
    assert index.count_rows() == 4
    writer.flush()
    assert index.count_rows() == 4


def add_one_by_one(folder: str, prefix: str, count: int, max_fragments: int = 8) -> None:
    index = VideoIndex(folder, max_fragments=max_fragments)
    for i in range(count):
        index.add(build_rows(f"{prefix}{i:04d}", vector=(i, 1)))
    index.finish([])


def test_four_writers_at_once(tmp_path):
    """All rows of all are there, though each joins commits of the others meanwhile, and while a fifth searches."""
    index = make_index(tmp_path / "index")
    index.add(build_rows("first"))
    processes = [
        start_process(
            add_one_by_one,
            str(tmp_path / "index"),
            prefix,
            15,
            environment=build_environment(0, 1, 0),
            output=tmp_path / prefix,
        )
        for prefix in "abcd"
    ]
    while any(process.is_alive() for process in processes):
        assert "first" in find(index, (0, 1), 200)
    wait_for(processes, 0, 100)
    assert [process.exitcode for process in processes] == [0] * 4, [read_output(tmp_path / p) for p in "abcd"]
    assert index.list_paths() == sorted(["first", *(f"{prefix}{i:04d}" for prefix in "abcd" for i in range(15))])
    assert index.count_rows() == 61


def test_two_commands_may_encode_one_video(tmp_path):
    """Its row is there once in the end, and a search names it once before."""
    one, two = make_index(tmp_path), make_index(tmp_path)
    one.add(build_rows("a", start_seconds=0.0, end_seconds=1.0) + build_rows("a", start_seconds=1.0, end_seconds=2.0))
    two.add(build_rows("a", start_seconds=0.0, end_seconds=1.0) + build_rows("a", start_seconds=1.0, end_seconds=2.0))
    assert one.count_rows() == 4
    assert one.finish([]) == 1 and two.finish([]) == 1 and two.count_rows() == 2


@pytest.mark.parametrize("seed", range(4))
def test_a_kill_at_any_moment_loses_nothing_that_was_committed(tmp_path, seed):
    folder = tmp_path / "index"
    make_index(folder)
    delay = np.random.default_rng(seed).uniform(0.02, 0.3)
    began: list[float] = []

    def is_time() -> bool:
        if not began and VideoIndex(folder).count_rows() > 2:
            began.append(time.monotonic())
        return bool(began) and time.monotonic() - began[0] > delay

    run_and_kill(is_time, add_one_by_one, str(folder), "v", 5000, 5)
    index = VideoIndex(folder)
    kept = index.list_paths()
    assert kept == [f"v{i:04d}" for i in range(len(kept))] and len(kept) > 2
    index.add(build_rows("after"))
    assert index.finish([]) == len(kept) + 1 == index.count_rows()
    assert len(find(index, (0, 1), 10_000)) == len(kept) + 1


def test_what_a_command_left_that_was_killed_while_it_made_the_index(tmp_path):
    for name in ("videos", "skipped"):
        (tmp_path / f"{name}.lance" / "_versions").mkdir(parents=True)
    index = VideoIndex(tmp_path)
    index.check_encoder(ENCODER)
    index.create(ENCODER)
    index.add(build_rows("a"))
    assert index.finish([]) == 1


def test_folders_that_are_not_an_index_or_another_models(tmp_path):
    index = VideoIndex(tmp_path / "index")
    index.check_encoder(ENCODER)
    with pytest.raises(FileNotFoundError, match="is not an index: there is no such folder. `umt-hf embed` makes one"):
        index.load()
    assert not (tmp_path / "index").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="is not an index: it has no videos. `umt-hf embed` makes one"):
        VideoIndex(tmp_path / "empty").load()
    index.create(ENCODER)
    index.check_encoder(ENCODER | {"model": "moved/elsewhere"})
    with pytest.raises(ValueError, match="built by another model: its weights is '0'"):
        index.check_encoder(ENCODER | {"weights": "1"})
    windows = {"window_seconds": 4.0, "stride_seconds": 2.0}
    with pytest.raises(ValueError, match="holds complete videos and these would be moments of 4 s every 2 s"):
        index.check_encoder(ENCODER | {"moments": windows})
    with pytest.raises(ValueError, match="built by another model"):  # of two commands that come at once
        VideoIndex(tmp_path / "index").create(ENCODER | {"weights": "1"})
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        VideoIndex(tmp_path).check_encoder(ENCODER)
    assert index._read_settings()["versions"].keys() >= {"umt_hf", "torch"}


def test_an_index_of_an_earlier_version_is_refused_with_the_cure(tmp_path):
    (tmp_path / "table").mkdir()
    (tmp_path / "index.json").write_text('{"encoder": {"model": "tiny"}}')
    index = VideoIndex(tmp_path)
    for use in (index.load, index.read_encoder, lambda: index.check_encoder(ENCODER)):
        with pytest.raises(ValueError, match=r"earlier version, which is not read any more\. Embed its videos again"):
            use()


def test_a_database_of_something_else_is_refused(tmp_path):
    import lancedb

    lancedb.connect(tmp_path).create_table("videos", [{"path": "a", "vector": [1.0, 2.0]}])
    with pytest.raises(ValueError, match="is a LanceDB database of something else"):
        VideoIndex(tmp_path).load()


def search_in_a_fork(folder: str) -> None:
    """What a forked worker of a loader would do."""
    index = VideoIndex(folder)
    index.load().find_nearest(np.array([1, 0], np.float32), 1)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        for opened in (VideoIndex(folder), index):  # by the child, by its parent
            try:
                opened.load()
                answer = "searched"
            except RuntimeError as error:
                answer = str(error)
            os.write(write, f"{answer}\n".encode())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert os.read(read, 2000).decode().count("'forkserver' or 'spawn'") == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
def test_a_forked_process_is_refused_and_does_not_crash(tmp_path):
    make_index(tmp_path / "index").add(build_rows("a"))
    output = tmp_path / "output"
    process = start_process(
        search_in_a_fork, str(tmp_path / "index"), environment=build_environment(0, 1, 0), output=output
    )
    wait_for([process], 0, 60)
    assert process.exitcode == 0, read_output(output)


def test_commands_that_end_at_once_delete_copies_in_turn(tmp_path, monkeypatch):
    """Each could take another copy for the first one, and none would be left."""
    index, other = make_index(tmp_path), VideoIndex(tmp_path)
    for _ in range(2):
        index.add(build_rows("a"))
    delete, seen = index._delete, []

    def end_other_too(name, conditions):
        thread = threading.Thread(target=lambda: (other._delete_superseded("videos"), seen.append("other")))
        thread.start()
        thread.join(0.5)
        assert not seen  # it waits
        delete(name, conditions)
        seen.append("index")
        waiting.append(thread)

    waiting: list[threading.Thread] = []
    monkeypatch.setattr(index, "_delete", end_other_too)
    index._delete_superseded("videos")
    waiting[0].join(60)
    assert seen == ["index", "other"] and index.count_rows() == 1


def test_rows_are_put_in_once_though_an_attempt_fails_after_it_has_done_so(tmp_path, monkeypatch):
    index = make_index(tmp_path)
    index.add(build_rows("first"))
    table = index._open_existing("videos")
    add, failures = type(table).add, []

    def add_and_fail(self, data, *arguments, **options):
        add(self, data, *arguments, **options)
        if not failures:
            failures.append(1)
            raise RuntimeError("lance error: Not found: a version that another command has dropped")

    monkeypatch.setattr(type(table), "add", add_and_fail)
    index.add(build_rows("a"))
    assert failures and index.count_rows() == 2
    index.add(build_rows("a"))  # another command's copy is one
    assert index.count_rows() == 3


def test_rows_that_others_replace_go_though_commits_are_joined_meanwhile(tmp_path, monkeypatch):
    """Joining numbers rows anew, so that those that were found before match nothing."""
    index, other = make_index(tmp_path), VideoIndex(tmp_path)
    index.add(build_rows("a"))
    index.add(build_rows("b"))
    index.add(build_rows("a", vector=(0.0, 1.0), modified_ns=2))  # its contents have changed
    index.add(build_rows("b"))  # another command's copy
    delete = index._delete
    done = []

    def join_and_delete(name, conditions):
        conditions = list(conditions)
        if any("_rowid" in condition for condition in conditions) and not done:
            done.append(name)
            other._is_writing = True  # without the lock, as in object storage
            other._optimize()
        delete(name, conditions)

    monkeypatch.setattr(index, "_delete", join_and_delete)
    assert index.finish([]) == 2 and done == ["videos"]
    assert index.count_rows() == 2
    rows = index.load().find_nearest(np.array([0, 1], np.float32), 5)
    assert [(row["path"], row["modified_ns"]) for row in rows] == [("a", 2), ("b", 1)]


READS = {
    "select_new": lambda index: [v.path for v in index.select_new([VideoFile("000", 1, 1), VideoFile("new", 1, 1)])],
    "list_paths": lambda index: len(index.list_paths()),
    "read": lambda index: sum(batch.num_rows for batch in index.read(["path"])),
    "find_exactly": lambda index: len(index.find_exactly(np.array([1, 0], np.float32), 200, None)[0]),
    "finish": lambda index: index.finish([SkippedVideo("000", "gone")]),
}


@pytest.mark.parametrize("name", READS)
def test_what_is_read_while_another_command_joins_commits_is_read_again(tmp_path, monkeypatch, name):
    index, other = make_index(tmp_path), VideoIndex(tmp_path)
    for i in range(60):
        index.add(build_rows(f"{i:03d}"))
    scan, done = index._scan, []

    def join_meanwhile(*args):
        for i, batch in enumerate(scan(*args)):
            yield batch
            if i == 0 and not done:
                done.append(1)
                other._optimize()  # the files of the other batches go

    monkeypatch.setattr(index, "_scan", join_meanwhile)
    expected = {"select_new": ["new"], "finish": 59}
    assert READS[name](index) == expected.get(name, 60) and done


@pytest.mark.parametrize("which", range(4))
def test_lists_are_kept_up_while_another_command_does_the_same(tmp_path, monkeypatch, which):
    """Wherever a look at the table fails once; the lists that are to go may be gone already."""
    index, other = make_index(tmp_path, 4, flat_rows=100), VideoIndex(tmp_path, flat_rows=100)
    rng = np.random.default_rng(0)
    index.add([row for i in range(160) for row in build_rows(f"{i}", vector=rng.random(4))])
    index.finish([])
    index.add([row for i in range(1200) for row in build_rows(f"more {i}", vector=rng.random(4))])
    open_existing, calls = index._open_existing, []

    def fail_once(name):
        calls.append(name)
        if len(calls) == which + 1:
            if which == 3:  # just before the former lists are dropped
                other._open_existing("videos").drop_index("vector_lists_13")
            raise RuntimeError("lance error: Not found: /videos.lance/_versions/1.manifest")
        return open_existing(name)

    monkeypatch.setattr(index, "_open_existing", fail_once)
    index._keep_lists()
    assert [found.name for found in open_existing("videos").list_indices()] == ["vector_lists_37"]
    calls.clear()
    index._record_skipped([SkippedVideo("z", "broken")], set())
    assert index.read_skipped() == [SkippedVideo("z", "broken")] and len(calls) > 3


def test_object_storage_that_is_not_reached_is_named_and_is_not_an_empty_index():
    options = {"aws_endpoint": f"http://127.0.0.1:{find_free_port()}", "aws_allow_http": "true", "aws_region": "x"}
    keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "client_max_retries": "0"}
    index = VideoIndex("s3://bucket/index", options | keys)
    for use in (index.exists, index.load):
        with pytest.raises(MachineError, match=r"^s3://bucket/index cannot be reached: Connection refused\. Check"):
            use()
    with pytest.raises(UserError, match=r"^foo://bucket/index could not be written: No object store provider found"):
        VideoIndex("foo://bucket/index").create(ENCODER)


@pytest.mark.parametrize("which", ["create_table", "add"])
def test_an_index_that_cannot_be_written_is_named_in_one_sentence(tmp_path, which):
    """A file in place of a folder stands for one that may not be written: tests of `root` may write everywhere."""
    index = VideoIndex(tmp_path / "index")
    if which == "add":
        index.create(ENCODER)
        (tmp_path / "index" / "videos.lance" / "data").write_text("")
    else:
        (tmp_path / "index" / "videos.lance" / "_versions").mkdir(parents=True)
        (tmp_path / "index" / "videos.lance" / "_transactions").write_text("")
    with pytest.raises(UserError) as error:
        index.create(ENCODER)
        index.add(build_rows("a"))
    message = str(error.value)
    assert message.startswith(f"{index.folder} could not be written: ") and "choose another one" in message
    assert ".rs:" not in message and "lance error" not in message and message.count("\n") == 0


def test_files_of_an_index_that_cannot_be_read_are_named_in_one_sentence(tmp_path):
    index = make_index(tmp_path)
    index.add(build_rows("a"))
    data = tmp_path / "videos.lance" / "data"
    data.rename(tmp_path / "elsewhere")
    data.write_text("")
    for use in (VideoIndex(tmp_path).list_paths, lambda: find(VideoIndex(tmp_path), (1, 0))):
        with pytest.raises(UserError, match=f"^{tmp_path} could not be read: ") as error:
            use()
        assert ".rs:" not in str(error.value)


def write_on_a_full_disk(folder: str) -> None:
    import resource

    index = make_index(Path(folder))
    index.add(build_rows("a"))
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    for write in (lambda: index.add(build_rows("b")), lambda: index.finish([SkippedVideo("a", "gone")])):
        with pytest.raises(MachineError, match="could not be written: file too large. Make room on its disk"):
            write()


def test_a_full_disk_is_named(tmp_path):
    pytest.importorskip("resource", reason="Windows limits no sizes of files")
    output = tmp_path / "output"
    process = start_process(
        write_on_a_full_disk, str(tmp_path / "index"), environment=build_environment(0, 1, 0), output=output
    )
    wait_for([process], 0, 60)
    assert process.exitcode == 0, read_output(output)


@pytest.mark.parametrize("name", ["my:index", "a%20b", "a?b#c", "ä ö", "s3:index"])
def test_folders_of_all_names(tmp_path, monkeypatch, name):
    """A colon makes no address of a folder; relative, as on a command line."""
    if os.name == "nt" and set(name) & set(":?"):
        pytest.skip("Windows has no such names")
    monkeypatch.chdir(tmp_path)
    make_index(Path(name)).add(build_rows("a"))
    assert VideoIndex(name).list_paths() == ["a"] and (tmp_path / name / "videos.lance").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_bounds_of_all_times_and_kinds(tmp_path):
    """Also those that the nanoseconds of a column do not reach."""
    index = make_index(tmp_path)
    moment = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=timezone.utc)
    index.add(build_rows("a", modified_ns=1_767_323_045_678_901_000, duration_seconds=2.5))
    cases = {
        SearchFilter(after=moment): True,
        SearchFilter(before=moment): False,
        SearchFilter(after=moment + timedelta(microseconds=1)): False,
        SearchFilter(after=moment.astimezone(timezone(timedelta(hours=9)))): True,
        SearchFilter(after=datetime.max): False,
        SearchFilter(before=datetime.max.replace(tzinfo=timezone.utc)): True,
        SearchFilter(before=datetime(2263, 1, 1)): True,
        SearchFilter(after=datetime(1, 1, 1)): True,
        SearchFilter(before=datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=14)))): False,
        SearchFilter(after=moment - timedelta(days=2), before=datetime(9999, 12, 31)): True,
        SearchFilter(min_duration=np.float64(2.5)): True,
        SearchFilter(max_duration=np.float32(2.25)): False,
        SearchFilter(min_duration=True, max_duration=3): True,
    }
    for filters, is_found in cases.items():
        assert find(index, (1, 0), filters=filters) == ["a"] * is_found, filters
    with pytest.raises(ValueError, match="must be earlier than before"):
        SearchFilter(after=moment, before=datetime(2025, 1, 1))


def test_a_pattern_that_is_not_utf8_is_refused():
    with pytest.raises(ValueError, match="path must be text that can be written as UTF-8"):
        SearchFilter(path="*/b\udce9.mp4")


def test_settings_that_a_flag_changes_are_named_by_it(tmp_path):
    """The same one each time, and a model's own differences first."""
    few = {"keep_ratio": 0.25, "token_selector": "tube", "token_selector_seed": 0}
    built = ENCODER | {"dtype": "bfloat16", "mixed_precision": "no", "num_frames": 4, "kept_tokens": few}
    index = VideoIndex(tmp_path)
    index.create(built)
    for changed, message in (
        ({"dtype": "float32"}, "was built with --dtype bfloat16, and these vectors would be of --dtype float32"),
        ({"num_frames": 8}, "--num-frames 4, and these vectors would be of --num-frames 8. Use the same"),
        ({"kept_tokens": None}, "--keep-ratio 0.25 --token-selector tube .*would be of --keep-ratio 1.0"),
        ({"mixed_precision": "bf16"}, "--mixed_precision no`.*--mixed_precision bf16`"),
        ({"dtype": "float32", "num_frames": 8, "mixed_precision": "bf16"}, "--dtype bfloat16"),
        ({"dtype": "float32", "num_frames": 8, "weights": "1"}, "built by another model: its weights is '0'"),
    ):
        with pytest.raises(ValueError, match=message):
            index.check_encoder(built | changed)
