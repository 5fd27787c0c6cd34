"""A folder of videos is looked through once per machine and start, and never remembered for the next start."""

import json
import os
from pathlib import Path

import pytest
from torch import distributed

from tests.processes import run_ranks
from umt_hf.data import sources
from umt_hf.data.lists import contents, sharing
from umt_hf.data.lists.sharing import find_once, shared_folders
from umt_hf.data.sources import load_videos
from umt_hf.data.splits import has_splits, name_kind


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    for name in ("jump/a.mp4", "jump/b.mp4", "run/c.mp4"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def describe(table) -> list:
    return [table["video"][:], table["label"][:], table.features["label"].names, len(table.cache_files)]


def say(**found) -> None:
    print(json.dumps({"rank": os.environ["RANK"], **found}))


def read_all(folder: Path, shortest: int, temporary: str | None = None) -> None:
    """What a rank finds, and how often it looks."""
    looks: list[str] = []
    original_read, original_look = sources.read_folder, contents._look
    sources.read_folder = lambda *given: looks.append("list") or original_read(*given)
    contents._look = lambda folder: looks.append("look") or original_look(folder)
    sources.SHORTEST_CACHED_BYTES = shortest
    distributed.init_process_group("gloo")
    if temporary is not None:
        sharing.tempfile.tempdir = f"{temporary}/{os.environ['RANK']}"
        os.mkdir(sharing.tempfile.tempdir)
    with shared_folders():
        first = describe(load_videos(str(folder)))
        kind = [name_kind(str(folder)), has_splits(str(folder)), has_splits(str(folder))]
    say(table=first, kind=kind, looks=looks)
    distributed.barrier()
    if os.environ["RANK"] == "0":
        (folder / "run" / "new.mp4").touch()
    distributed.barrier()
    looks.clear()
    with shared_folders():
        second = load_videos(str(folder))
    say(rows=len(second), looks=looks)
    looks.clear()
    load_videos(str(folder))
    say(alone=looks)
    distributed.barrier()


def read_lines(output) -> list[list[dict]]:
    lines = [json.loads(line) for line in output.stdout.splitlines() if line.startswith("{")]
    return [[line for line in lines if line["rank"] == rank] for rank in "01"]


@pytest.mark.parametrize("shortest", [0, 1 << 20], ids=["mapped", "in memory"])
def test_the_first_process_looks_and_the_other_reads(videos, tmp_path, shortest):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    output = run_ranks(read_all, videos, shortest, environment={"TMPDIR": str(temporary)})
    first, other = read_lines(output)
    assert first[0]["table"] == other[0]["table"]
    paths, labels, names, num_files = first[0]["table"]
    assert [os.path.relpath(path, videos) for path in paths] == ["jump/a.mp4", "jump/b.mp4", "run/c.mp4"]
    assert labels == [0, 0, 1] and names == ["jump", "run"] and num_files == (shortest == 0)
    assert first[0]["kind"] == other[0]["kind"] == ["a folder of videos", False, False]
    assert sorted(first[0]["looks"]) == ["list", "look"] and other[0]["looks"] == []
    # A file that came between two starts is there in the second one.
    assert first[1]["rows"] == other[1]["rows"] == 4 and "list" in first[1]["looks"] and other[1]["looks"] == []
    assert "list" in first[2]["alone"] and "list" in other[2]["alone"]
    assert not [path for path in temporary.iterdir() if path.name.startswith("umt_hf_folders_")]


def test_processes_that_do_not_see_each_others_folders_look_for_themselves(videos, tmp_path):
    """As on two machines of one name."""
    output = run_ranks(see_nothing_of_others, videos, tmp_path)
    for own in read_lines(output):
        assert own[0]["table"][1] == [0, 0, 1] and "list" in own[0]["looks"]


def see_nothing_of_others(folder: Path, temporary: Path) -> None:
    original, mine = sharing.os.path.isdir, f"{temporary}/{os.environ['RANK']}"

    def isdir(path) -> bool:
        place, name = os.path.split(path)
        return place == mine if name.startswith("umt_hf_folders_") else original(path)

    sharing.os.path.isdir = isdir
    read_all(folder, 0, str(temporary))


def lack_room(folder: Path) -> None:
    def write(*_) -> None:
        raise OSError("No space left on device")

    sources.pa.OSFile = write
    distributed.init_process_group("gloo")
    with shared_folders():
        say(rows=len(load_videos(str(folder))))


def test_without_room_each_process_looks_by_itself(videos):
    output = run_ranks(lack_room, videos)
    assert [own[0]["rows"] for own in read_lines(output)] == [3, 3]
    assert "No space left on device" in output.stderr


def fail_together(folder: Path) -> None:
    distributed.init_process_group("gloo")
    with shared_folders(), pytest.raises(ValueError, match="no videos found"):
        load_videos(str(folder))
    say(current=sharing._current is None)


def test_a_folder_without_videos_is_the_error_of_each(tmp_path):
    (tmp_path / "empty").mkdir()
    assert [own[0]["current"] for own in read_lines(run_ranks(fail_together, tmp_path / "empty"))] == [True, True]


def die_while_others_wait(folder: Path) -> None:
    distributed.init_process_group("gloo")
    with shared_folders():
        if os.environ["RANK"] == "0":
            os.kill(os.getpid(), 9)
        say(rows=len(load_videos(str(folder))))
    os._exit(-9 + 256)


def test_a_dead_owner_is_not_waited_for(videos):
    with pytest.raises(AssertionError, match=r'"rows": 3'):
        run_ranks(die_while_others_wait, videos, timeout=60)


def test_a_single_process_shares_nothing(videos):
    with shared_folders():
        assert find_once("key", lambda path: pytest.fail(f"{path} was written")) is None
        table = load_videos(str(videos))
    assert len(table) == 3 and not table.cache_files
