"""`umt-hf embed` and `umt-hf search` as a user runs them."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.processes import run_and_kill, run_ranks
from tests.unit.inference.test_search import QUERY, save_model
from umt_hf import cli
from umt_hf.inference.search import embed_videos
from umt_hf.inference.video_index import VideoIndex

pytest.importorskip("lancedb")

runner = CliRunner()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def videos(shapes, tmp_path) -> Path:
    """Eight clips, two of them in a sub-folder."""
    folder = tmp_path / "videos"
    (folder / "more").mkdir(parents=True)
    for i, video in enumerate(sorted((shapes / "videos" / "train").iterdir())[:8]):
        shutil.copy(video, (folder / "more" if i > 5 else folder) / video.name)
    return folder


def run(*arguments, exit_code: int = 0, **options):
    result = runner.invoke(cli.app, [str(argument) for argument in arguments], **options)
    assert result.exit_code == exit_code, result.output
    return result


def call(arguments: list[str]) -> None:
    """What a process of its own does."""
    cli.app(arguments)


def embed(*arguments, **options) -> dict:
    return json.loads(run("embed", "--num-workers", "0", "--json", *arguments, **options).stdout.splitlines()[-1])


def read_vectors(index: Path) -> dict[str, list[float]]:
    rows = [row for batch in VideoIndex(index).read(["path", "start_seconds", "vector"]) for row in batch.to_pylist()]
    rows.sort(key=lambda row: (row["path"], row["start_seconds"] or 0))
    moments = any(row["start_seconds"] is not None for row in rows)
    return {f"{row['path']} {row['start_seconds']}" if moments else row["path"]: row["vector"] for row in rows}


def test_append_encodes_what_is_new_or_changed(model, videos, tmp_path):
    index, flags = tmp_path / "index", ("--model", model, "--out", tmp_path / "index")
    first = embed(videos / "more", *flags)
    assert (first["num_encoded"], first["num_unchanged"], first["num_in_index"]) == (2, 0, 2)
    old = read_vectors(index)
    assert embed(videos, *flags)["num_encoded"] == 6
    again = embed(videos, *flags)
    assert (again["num_encoded"], again["num_unchanged"], again["num_in_index"]) == (0, 8, 8)
    new = read_vectors(index)
    assert len(new) == 8 and all(new[path] == old[path] for path in old)

    changed, other = sorted(videos.glob("*.mp4"))[:2]
    changed.write_bytes(other.read_bytes())
    assert embed(videos, *flags)["num_encoded"] == 1
    after = read_vectors(index)
    assert after[str(changed)] != new[str(changed)]
    np.testing.assert_allclose(after[str(changed)], new[str(other)], atol=1e-6)
    hits = VideoIndex(index).load().find_nearest(np.array(after[str(changed)], np.float32), 2)
    assert hits[1]["similarity"] == pytest.approx(np.square(after[str(changed)]).sum(), rel=1e-5)


def test_bad_videos_are_listed_and_their_rows_go(model, videos, tmp_path):
    flags = ("--model", model, "--out", tmp_path / "index")
    embed(videos, *flags)
    broken, empty = sorted(videos.glob("*.mp4"))[0], videos / "empty.mp4"
    broken.write_bytes(broken.read_bytes()[:700])
    empty.touch()
    result = run("embed", videos, tmp_path / "gone.mp4", *flags, "--num-workers", "0")
    assert "0 encoded, 7 unchanged, 3 skipped; 7 in the index" in result.output
    skipped = VideoIndex(tmp_path / "index").read_skipped()
    assert [entry.path for entry in skipped] == [str(tmp_path / "gone.mp4"), str(broken), str(empty)]
    for entry in skipped:
        assert len(entry.reason) > 10 and f"skipped {entry.path}: {entry.reason}" in result.output
    assert str(broken) not in read_vectors(tmp_path / "index")
    shutil.copy(sorted(videos.glob("*.mp4"))[1], broken)
    assert embed(broken, *flags)["num_in_index"] == 8
    assert len(VideoIndex(tmp_path / "index").read_skipped()) == 2


def test_exit_code_says_whether_any_video_could_be_read(model, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    result = run("embed", tmp_path / "bad.mp4", "--model", model, "--out", tmp_path / "index", exit_code=1)
    assert "0 encoded, 0 unchanged, 1 skipped; 0 in the index" in result.output
    assert "holds no videos" in clean(run("search", tmp_path / "index", QUERY, exit_code=2).output)


def test_list_from_standard_input(model, videos, tmp_path):
    paths = sorted(videos.rglob("*.mp4"))[:2]
    flags = ("--model", model, "--out", tmp_path / "index", "--num-workers", "1")
    report = embed("-", *flags, input="\n".join(map(str, paths)) + "\n")
    assert report["num_encoded"] == 2
    assert list(read_vectors(tmp_path / "index")) == [str(path) for path in paths]


def test_search_prints_a_table_or_json(model, videos, tmp_path):
    index = tmp_path / "index"
    embed(videos, "--model", model, "--out", index)
    hits = json.loads(run("search", index, QUERY, "--json", "--top-k", 3).stdout)
    assert len(hits) == 3 and hits[0].keys() >= {"path", "similarity", "matching_score"}
    assert [hit["similarity"] for hit in hits] == sorted((hit["similarity"] for hit in hits), reverse=True)
    lines = run("search", index, QUERY, "--top-k", 3).stdout.splitlines()
    assert [line.split()[-1] for line in lines] == ["video", *(hit["path"] for hit in hits)]
    reranked = json.loads(run("search", index, QUERY, "--json", "--rerank").stdout)
    matching = [hit["matching_score"] for hit in reranked]
    assert matching == sorted(matching, reverse=True) and len(matching) == 8
    assert {hit["path"]: hit["similarity"] for hit in reranked}.items() >= {
        hit["path"]: hit["similarity"] for hit in hits
    }.items()
    assert "matching" in run("search", index, QUERY, "--rerank").stdout


def test_a_search_whose_filters_nothing_passes_says_so(model, videos, tmp_path):
    run("embed", videos, "--model", model, "--out", tmp_path / "index", "--num-workers", 0)
    said = run("search", tmp_path / "index", "a red circle", "--after", "2045-01-01", "--json")
    assert "No video passes the filters." in said.stderr


def test_another_model_is_refused(model, videos, tmp_path):
    index = tmp_path / "index"
    embed(videos / "more", "--model", model, "--out", index)
    other = save_model(tmp_path / "other", seed=1)
    refused = run("embed", videos, "--model", other, "--out", index, exit_code=2)
    assert "built by another model" in clean(refused.output)
    assert "built by another model" in clean(run("search", index, QUERY, "--model", other, exit_code=2).output)
    assert len(read_vectors(index)) == 2
    moved = shutil.copytree(model, tmp_path / "moved")
    assert embed(videos, "--model", moved, "--out", index)["num_in_index"] == 8
    assert "is not an index" in clean(run("search", videos, QUERY, exit_code=2).output)
    assert "not empty" in clean(run("embed", videos, "--model", model, "--out", videos, exit_code=2).output)


def clean(output: str) -> str:
    """Undo the box and the line breaks of a usage error."""
    return re.sub(r"[\s│]+", " ", output)


@pytest.mark.parametrize("windows", [[], ["--window", "2", "--stride", "1", "--store", "keys"]])
def test_killed_run_goes_on_from_its_last_commit(model, videos, tmp_path, windows):
    """SIGKILL once a few are there; the processor reads slowly enough for that."""
    index = tmp_path / "index"
    flags = ["--model", str(model), "--out", str(index), "--shard-size", "1", "--batch-size", "1", *windows]
    for copy in range(15):  # seconds of work
        shutil.copytree(videos / "more", videos / f"copy{copy}")
    command = ["embed", str(videos), *flags, "--num-workers", "0"]
    run_and_kill(lambda: len(list((index / "videos.lance" / "data").glob("*"))) >= 4, call, command)
    kept = VideoIndex(index).list_paths()
    assert 3 <= len(kept) < 38
    report = embed(videos, *flags)
    assert (report["num_unchanged"], report["num_encoded"]) == (len(kept), 38 - len(kept))
    embed(videos, "--model", model, "--out", tmp_path / "whole", *windows)
    assert_same_vectors(index, tmp_path / "whole")
    if "--store" in windows:
        assert_same_states(index, tmp_path / "whole")


def assert_same_vectors(first: Path, second: Path) -> None:
    ours, expected = read_vectors(first), read_vectors(second)
    assert list(ours) == list(expected)  # in the same order, too
    np.testing.assert_allclose(list(ours.values()), list(expected.values()), atol=1e-6)


def assert_same_states(first: Path, second: Path) -> None:
    """What is stored for re-ranking is there once for each row, and the same in half precision."""
    found = []
    for index in (first, second):
        rows = {(row["path"], row["start_seconds"]): row for row in read_rows(index, "stored")}
        assert len(rows) == VideoIndex(index).measure_stored()[0] == len(read_vectors(index))
        assert rows.keys() == {(row["path"], row["start_seconds"]) for row in read_rows(index, "videos")}
        found.append(np.stack([np.frombuffer(rows[key]["states"], np.float16) for key in sorted(rows)]))
    np.testing.assert_allclose(*found, atol=2e-2, rtol=2e-3)


def read_rows(index: Path, table: str) -> list[dict]:
    import lancedb

    return lancedb.connect(index).open_table(table).to_arrow().to_pylist()


@pytest.mark.parametrize("windows", [["--store", "tokens"], ["--window", "2", "--stride", "1"]])
def test_two_processes_equal_one(model, videos, tmp_path, windows):
    (videos / "bad.mp4").write_bytes(b"no video")
    (videos / "worse.mp4").write_bytes(b"")
    one = embed(videos, "--model", model, "--out", tmp_path / "one", *windows)
    command = ["embed", "-", "--num-workers", "0", "--model", str(model), *windows]
    command += ["--out", str(tmp_path / "two"), "--shard-size", "2", "--json"]
    result = run_ranks(call, command, stdin=f"{videos}\n")
    assert json.loads(result.stdout) == one
    assert [len(one["skipped"]), one["num_encoded"]] == [2, 8]
    assert_same_vectors(tmp_path / "one", tmp_path / "two")
    if "--store" in windows:
        assert_same_states(tmp_path / "one", tmp_path / "two")
    skipped = [VideoIndex(tmp_path / name).read_skipped() for name in ("one", "two")]
    assert skipped[0] == skipped[1] and len(skipped[0]) == 2


def test_workers_that_are_not_forked(model, videos, forkserver, tmp_path):
    embed_videos([str(videos)], model, tmp_path / "workers", num_workers=1)
    embed_videos([str(videos)], model, tmp_path / "none", num_workers=0)
    assert_same_vectors(tmp_path / "workers", tmp_path / "none")


def test_moments_are_found_and_shown(model, videos, tmp_path):
    """From the command line: times in the table and in JSON, strips of pictures, filters, re-ranking, refusals."""
    index = tmp_path / "index"
    report = embed(videos, "--model", model, "--out", index, "--window", "1", "--stride", "0.5")
    assert (report["num_in_index"], report["num_moments"]) == (8, 8 * 5)
    hits = json.loads(run("search", index, QUERY, "--json", "--top-k", 3, "--save-frames", tmp_path / "strips").stdout)
    assert len({hit["path"] for hit in hits}) == 3
    for hit in hits:
        best = hit["moments"][0]
        assert (hit["start_seconds"], hit["end_seconds"]) == (best["start_seconds"], best["end_seconds"])
        assert 0 <= hit["start_seconds"] <= 2 and hit["end_seconds"] == hit["start_seconds"] + 1
        ends = sorted((moment["start_seconds"], moment["end_seconds"]) for moment in hit["moments"])
        assert all(first[1] <= second[0] for first, second in zip(ends, ends[1:], strict=False))  # none overlap
    strips = sorted((tmp_path / "strips").iterdir())
    assert [strip.name for strip in strips] == [
        f"{rank:02d}-{Path(hit['path']).stem}-{hit['start_seconds']:.1f}s.jpg" for rank, hit in enumerate(hits, 1)
    ]
    assert all(strip.stat().st_size > 1000 for strip in strips)
    lines = run("search", index, QUERY, "--top-k", 2).stdout.splitlines()
    assert "seconds" in lines[0] and f"{hits[0]['start_seconds']:.1f}" in lines[1]
    reranked = json.loads(run("search", index, QUERY, "--json", "--rerank").stdout)
    assert sorted(hit["path"] for hit in reranked) == sorted(map(str, videos.rglob("*.mp4")))
    assert [hit["matching_score"] for hit in reranked] == sorted(hit["matching_score"] for hit in reranked)[::-1]
    only = json.loads(run("search", index, QUERY, "--json", "--path", "*/more/*", "--exact").stdout)
    assert {Path(hit["path"]).parent.name for hit in only} == {"more"} and len(only) == 2
    assert json.loads(run("search", index, QUERY, "--json", "--max-duration", "1").stdout) == []
    assert json.loads(run("search", index, QUERY, "--json", "--before", "2000-01-01").stdout) == []
    refused = run("embed", videos, "--model", model, "--out", index, exit_code=2)
    assert "holds moments of 1 s every 0.5 s and these would be complete videos" in clean(refused.output)
    assert "leaves parts" in clean(
        run("embed", videos, "--model", model, "--out", index, "--window", 1, "--stride", 2, exit_code=2).output
    )


def test_no_strip_is_drawn_of_a_file_that_has_changed(model, videos, tmp_path):
    files = [tmp_path / name for name in ("one.mp4", "two.mp4")]
    for file, video in zip(files, sorted(videos.rglob("*.mp4")), strict=False):
        shutil.copy(video, file)
    embed(*files, "--model", model, "--out", tmp_path / "index")
    shutil.copy(files[1], files[0])
    os.utime(files[0], (1, 1))
    result = run("search", tmp_path / "index", QUERY, "--save-frames", tmp_path / "strips")
    assert [strip.name.split("-")[1] for strip in (tmp_path / "strips").iterdir()] == ["two.jpg"]
    assert f"no strip of {files[0]}: it was changed since it was embedded; embed it again" in clean(result.output)


def test_an_index_of_an_earlier_version_is_refused(model, videos, tmp_path):
    (tmp_path / "index" / "table").mkdir(parents=True)
    (tmp_path / "index" / "index.json").write_text("{}")
    for command in (
        ["embed", videos, "--model", model, "--out", tmp_path / "index"],
        ["search", tmp_path / "index", QUERY],
    ):
        assert "with --out naming a new folder" in clean(run(*command, exit_code=2).output)
