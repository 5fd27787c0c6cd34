"""Re-ranking from what an index stores: as good as encoding anew, of a stated size, and never without its row."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.processes import run_and_kill
from tests.unit.inference.test_search import QUERY, WORDS, save_model
from tests.unit.inference.test_video_index import ENCODER, build_rows
from umt_hf import UMTVideoTextModel, VideoSearcher, embed_videos
from umt_hf.cli import app
from umt_hf.data.video_files import SkippedVideo, list_videos
from umt_hf.inference import reranking, search, video_index
from umt_hf.inference.reranking import StoreSettings, format_bytes, resolve_store
from umt_hf.inference.video_index import RowWriter, VideoIndex
from umt_hf.moving_shapes.render import write_moving_shapes
from umt_hf.runs.arguments import KeptTokenArguments

pytest.importorskip("lancedb")

runner = CliRunner()
QUERIES = [QUERY, *(f"a {color} {shape} moving {WORDS[6 + i % 3]}" for i, color in enumerate(("red", "green"))
                    for shape in ("circle", "square"))]  # fmt: skip
MOMENTS = {"window": 1, "stride": 0.5}
WAYS = [("tokens", "float32"), ("tokens", "float16"), ("keys", "float32"), ("keys", "float16")]
# Of a score, over 5 queries and 6 videos; neighbours in the order are at least 0.05 apart.
LARGEST_HALF_DIFFERENCE = 5e-4


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_moving_shapes(folder, num_train_clips=6, num_validation_clips=1, num_test_clips=1)
    return folder / "videos" / "train"


@pytest.fixture(scope="module")
def anew(model, videos, tmp_path_factory) -> dict[bool, VideoSearcher]:
    """Searchers that encode videos again: of complete videos, and of moments."""
    folder = tmp_path_factory.mktemp("anew")
    for name, windows in (("videos", {}), ("moments", MOMENTS)):
        embed_videos([str(videos)], model, folder / name, **windows)
    return {False: VideoSearcher(folder / "videos"), True: VideoSearcher(folder / "moments")}


def rank(searcher: VideoSearcher, query: str = QUERY) -> dict[str, float]:
    """Matching scores by path, best first."""
    return {hit.path: hit.matching_score for hit in searcher.search(query, rerank=True)}


def read_table(index: Path, name: str = "stored") -> list[dict]:
    import lancedb

    return lancedb.connect(index).open_table(name).to_arrow().to_pylist()


def list_keys(rows: list[dict]) -> list[tuple]:
    return sorted((row["path"], row["modified_ns"], row["start_seconds"] or 0.0) for row in rows)


def require_stored(index: Path) -> None:
    """Every row of the index has what is stored of it, once."""
    assert list_keys(read_table(index)) == list_keys(read_table(index, "videos"))


@pytest.mark.parametrize("windows", [{}, MOMENTS], ids=["videos", "moments"])
@pytest.mark.parametrize(("store", "dtype"), WAYS)
def test_scores_are_those_of_encoding_anew(model, videos, anew, tmp_path, store, dtype, windows):
    said = []
    embed_videos([str(videos)], model, tmp_path, store=store, store_dtype=dtype, batch_size=4, **windows)
    require_stored(tmp_path)
    searcher = VideoSearcher(tmp_path, announce=said.append)
    differences = []
    for query in QUERIES:
        found, expected = rank(searcher, query), rank(anew[bool(windows)], query)
        assert len(found) == 6 and list(found) == list(expected)
        differences += [abs(found[path] - expected[path]) for path in expected]
    assert said == [] and max(differences) < (1e-5 if dtype == "float32" else LARGEST_HALF_DIFFERENCE)
    assert dtype == "float32" or max(differences) > 0
    np.testing.assert_array_less(0.01, np.ptp(list(expected.values())))


def test_the_default_precision_is_float16(model, videos, tmp_path):
    embed_videos([str(videos)], model, tmp_path, store="tokens")
    assert VideoSearcher(tmp_path).stored == StoreSettings("tokens", "float16")


@pytest.mark.parametrize("store", ["tokens", "keys"])
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_sizes_that_are_said_are_those_that_are_stored(model, videos, tmp_path, store, ratio):
    said = []
    options = {"store": store, "tokens": KeptTokenArguments(keep_ratio=ratio), "announce": said.append}
    report = embed_videos([str(videos)], model, tmp_path, **options)
    rows = read_table(tmp_path)
    config = UMTVideoTextModel.from_pretrained(model).config
    vision, text = config.vision_config, config.text_config
    num_tokens = int(ratio * 2 // vision.tubelet_size * (32 // vision.patch_size) ** 2)
    num_fusion = text.num_hidden_layers - text.fusion_layer
    expected = [num_tokens, vision.hidden_size] if store == "tokens" else [num_fusion, 2, num_tokens, text.hidden_size]
    assert [row["shape"] for row in rows] == [expected] * 6
    num_bytes = 2 * int(np.prod(expected))
    assert {len(row["states"]) for row in rows} == {num_bytes} == {row["num_bytes"] for row in rows}
    assert f"{num_bytes:,} bytes are stored per video for re-ranking, about" in said[1]
    assert f"{format_bytes(6 * num_bytes)} for 6 videos" in said[1]
    assert report.stored_bytes == 6 * num_bytes == VideoIndex(tmp_path).measure_stored()[1]
    assert f"{6 * num_bytes:,} bytes" in report.format()
    again = embed_videos([str(videos)], model, tmp_path, **options)
    assert (again.num_encoded, again.stored_bytes) == (0, 6 * num_bytes)


def test_bytes_are_written_in_units_that_people_read():
    written = [format_bytes(count) for count in (0, 999, 1204224, 120.4e9, 7.2e15)]
    assert written == ["0 bytes", "999 bytes", "1.2 MB", "120 GB", "7.2 PB"]


def copy_videos(videos: Path, folder: Path, count: int = 4) -> list[Path]:
    folder.mkdir()
    return [Path(shutil.copy(video, folder)) for video in sorted(videos.iterdir())[:count]]


@pytest.mark.parametrize("windows", [{}, MOMENTS], ids=["videos", "moments"])
def test_videos_that_are_gone_or_changed_are_re_ranked_as_they_were_embedded(model, videos, tmp_path, windows):
    """As their vectors are; embedding the changed one again renews both."""
    gone, changed, *_ = copy_videos(videos, tmp_path / "copies")
    index, options = tmp_path / "index", {"store": "keys", **windows}
    embed_videos([str(tmp_path / "copies")], model, index, **options)
    before = rank(VideoSearcher(index))
    gone.unlink()
    shutil.copy(sorted(videos.iterdir())[4], changed)
    searcher = VideoSearcher(index)
    hits = searcher.search(QUERY, rerank=True)
    assert {hit.path: hit.matching_score for hit in hits} == before and all(hit.unread_reason is None for hit in hits)
    report = embed_videos([str(changed)], model, index, **options)
    assert report.num_encoded == 1
    require_stored(index)
    after = rank(VideoSearcher(index))
    embed_videos([str(changed)], model, tmp_path / "plain", **windows)
    assert after[str(changed)] == pytest.approx(rank(VideoSearcher(tmp_path / "plain"))[str(changed)], abs=5e-3)
    assert after[str(changed)] != before[str(changed)]
    # A searcher that was loaded before still knows the former row, of which nothing is stored any more.
    said = []
    searcher.announce = said.append
    assert rank(searcher)[str(changed)] is not None
    assert said == ["Re-ranking reads and encodes 1 video again, of which the index has no keys."]
    report = embed_videos([str(gone), str(changed)], model, index, **options)
    assert len(report.skipped) == 1 and report.num_in_index == 3
    require_stored(index)


def test_an_index_that_stores_nothing_is_re_ranked_and_says_how_to_be_quicker(anew):
    said = []
    anew[False].announce = said.append
    hits = anew[False].search(QUERY, rerank=True)
    anew[False].announce = None
    assert all(hit.matching_score is not None for hit in hits) and len(said) == 1
    assert said[0].startswith("Re-ranking reads and encodes 6 videos again, since the index stores only vectors")
    assert "`umt-hf embed --store tokens`" in said[0]
    anew[False].announce = said.append
    anew[False].search(QUERY)
    anew[False].announce = None
    assert len(said) == 1


def test_an_index_from_before_there_was_a_choice_goes_on(model, videos, tmp_path, monkeypatch):
    describe = search.describe_index

    def describe_as_before(*arguments):
        description = describe(*arguments)
        assert description.pop("stored") is None
        return description

    monkeypatch.setattr(search, "describe_index", describe_as_before)
    first, *rest = sorted(map(str, videos.iterdir()))
    embed_videos([first], model, tmp_path)
    monkeypatch.undo()
    assert "stored" not in VideoIndex(tmp_path).read_encoder()
    assert embed_videos(rest, model, tmp_path).num_in_index == 6
    assert None not in rank(VideoSearcher(tmp_path)).values()
    assert {path.name for path in tmp_path.iterdir()} == {"videos.lance", "skipped.lance", ".lock"}
    with pytest.raises(ValueError, match="stores vectors alone and this would store tokens in float16"):
        embed_videos(rest, model, tmp_path, store="tokens")


def test_other_settings_are_refused_with_the_cure(model, videos, tmp_path):
    embed_videos([str(videos)], model, tmp_path, store="tokens")
    for other, words in (
        ({}, "vectors alone"),
        ({"store": "none"}, "vectors alone"),
        ({"store": "keys"}, "keys in float16"),
        ({"store": "tokens", "store_dtype": "float32"}, "tokens in float32"),
    ):
        message = (
            f"stores tokens in float16 and this would store {words}. Use the same store and store_dtype, or a new"
        )
        with pytest.raises(ValueError, match=message):
            embed_videos([str(videos)], model, tmp_path, **other)
    assert len(read_table(tmp_path)) == 6


@pytest.mark.parametrize(
    ("store", "dtype", "message"),
    [
        (None, "float16", "A store_dtype needs something to store"),
        ("none", "float16", "A store_dtype needs something to store"),
        ("frames", None, "store must be one of .'tokens', 'keys'., got 'frames'"),
        ("tokens", "bfloat16", "store_dtype must be one of .'float16', 'float32'., got 'bfloat16'"),
    ],
)
def test_settings_that_make_no_sense(store, dtype, message):
    with pytest.raises(ValueError, match=message):
        resolve_store(store, dtype)


def test_a_model_without_a_matching_head_stores_nothing(videos, tmp_path):
    save_model(tmp_path / "model", UMTVideoTextModel)
    with pytest.raises(ValueError, match="has no matching head, which alone would use what is stored"):
        embed_videos([str(videos)], tmp_path / "model", tmp_path / "index", store="tokens")
    assert not (tmp_path / "index").exists()


def test_a_plain_search_never_opens_what_is_stored(model, videos, tmp_path, monkeypatch):
    embed_videos([str(videos)], model, tmp_path, store="tokens")
    opened = []
    open_table = VideoIndex._open
    monkeypatch.setattr(VideoIndex, "_open", lambda self, name: (opened.append(name), open_table(self, name))[1])
    searcher = VideoSearcher(tmp_path)
    searcher.search(QUERY)
    searcher.search(QUERY, exact=True, filters=search.SearchFilter(min_duration=0))
    assert set(opened) == {"videos"}
    searcher.search(QUERY, rerank=True)
    assert set(opened) == {"videos", "stored"}


def count_bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


@pytest.mark.skipif(sys.platform != "linux", reason="bytes that a process reads are counted on Linux")
def test_re_ranking_reads_only_its_candidates(tmp_path):
    """3 of 120 rows of 200 kB, moments of 12 videos, in several commits; a plain search reads none of them."""
    index = VideoIndex(tmp_path)
    index.create(ENCODER | {"stored": {"what": "tokens", "dtype": "float16"}})
    writer = RowWriter(index, rows_per_commit=50)
    for i in range(120):
        rows = build_rows(f"v{i // 10}", start_seconds=float(i % 10), end_seconds=i % 10 + 1.0)
        states = np.full((100, 1000), i, np.float16)
        writer.write(rows, [{**row, "states": states} for row in rows])
    writer.flush()
    wanted = [build_rows(f"v{i}", start_seconds=3.0)[0] for i in (0, 5, 11)]
    index = VideoIndex(tmp_path)
    began = count_bytes_read()
    assert len(index.load().find_nearest(np.array([1, 0], np.float32), 20)) == 20
    searched = count_bytes_read()
    found = index.read_stored([*wanted, build_rows("gone", start_seconds=3.0)[0]], "float16")
    ranked = count_bytes_read()
    assert {path: float(states[99, 999]) for path, states in found.items()} == {"v0": 3, "v5": 53, "v11": 113}
    assert all(states.shape == (100, 1000) for states in found.values())
    assert searched - began < 500_000
    assert 3 * 200_000 <= ranked - searched < 3 * 200_000 + 500_000


def test_a_command_that_ends_between_the_two_tables_leaves_no_row_without_what_is_stored(
    model, videos, tmp_path, monkeypatch
):
    def end(self, rows):
        raise KeyboardInterrupt

    monkeypatch.setattr(VideoIndex, "add", end)
    with pytest.raises(KeyboardInterrupt):
        embed_videos([str(videos)], model, tmp_path, store="tokens")
    monkeypatch.undo()
    assert len(read_table(tmp_path)) == 6 and not read_table(tmp_path, "videos")
    report = embed_videos([str(videos)], model, tmp_path, store="tokens")
    assert report.num_encoded == 6
    require_stored(tmp_path)
    assert report.stored_bytes == sum(len(row["states"]) for row in read_table(tmp_path))


def write_one_by_one(folder: str, count: int) -> None:
    writer = RowWriter(VideoIndex(folder, max_fragments=5), rows_per_commit=1)
    for i in range(count):
        rows = build_rows(f"v{i:04d}", vector=(i, 1))
        writer.write(rows, [{**row, "start_seconds": None, "states": np.full(1000, i, np.float16)} for row in rows])
        if i % 7 == 6:
            writer.index.finish([])


@pytest.mark.parametrize("seed", [pytest.param(0, marks=pytest.mark.heavy), pytest.param(1, marks=pytest.mark.heavy)])
def test_a_kill_at_any_moment_leaves_no_row_without_what_is_stored(tmp_path, seed):
    index = VideoIndex(tmp_path)
    index.create(ENCODER | {"stored": {"what": "tokens", "dtype": "float16"}})
    least = int(np.random.default_rng(seed).integers(3, 20))
    run_and_kill(lambda: VideoIndex(tmp_path).count_rows() > least, write_one_by_one, str(tmp_path), 5000)
    rows = [row | {"start_seconds": None} for row in read_table(tmp_path, "videos")]
    found = VideoIndex(tmp_path).read_stored(rows, "float16")
    assert len(rows) > least and {path: float(states[0]) for path, states in found.items()} == {
        f"v{i:04d}": i for i in range(len(rows))
    }
    index = VideoIndex(tmp_path)
    index.finish([])
    assert set(list_keys(read_table(tmp_path, "videos"))) <= set(list_keys(read_table(tmp_path)))


def test_what_is_stored_goes_with_its_rows(tmp_path):
    """Of videos that have changed, that cannot be read any more, and that two commands have encoded."""
    index = VideoIndex(tmp_path)
    index.create(ENCODER | {"stored": {"what": "tokens", "dtype": "float32"}})

    def write(*paths: str, **facts) -> None:
        rows = build_rows(*paths, **facts)
        index.add_stored([{**row, "start_seconds": None, "states": np.zeros((2, 3), np.float32)} for row in rows])
        index.add(rows)

    write("a", "b", "c's")
    write("b")
    write("a", modified_ns=2)
    assert index.finish([SkippedVideo("c's", "gone")]) == 2
    assert [key[:2] for key in list_keys(read_table(tmp_path))] == [("a", 2), ("b", 1)]
    assert index.measure_stored() == (2, 2 * 24)


def test_commits_of_a_large_table_are_not_joined(tmp_path, monkeypatch):
    index = VideoIndex(tmp_path, max_fragments=5)
    index.create(ENCODER | {"stored": {"what": "tokens", "dtype": "float32"}})
    table = index._open_existing("stored")

    def grow() -> int:
        for row in build_rows("a", "b", "c", "d", "e", "f"):
            index.add_stored([{**row, "start_seconds": None, "states": np.zeros(3, np.float32)}])
            index.add([row])
        index.finish([])
        return video_index._count_fragments(table)

    monkeypatch.setattr(video_index, "JOINED_STORED_BYTES", 6 * 12 - 1)
    assert grow() == 6
    monkeypatch.setattr(video_index, "JOINED_STORED_BYTES", 2**30)
    index.finish([])
    assert video_index._count_fragments(table) == 1 and index.measure_stored()[0] == 6


def test_a_writer_commits_by_bytes_too(tmp_path, monkeypatch):
    monkeypatch.setattr(video_index, "STORED_BYTES_PER_COMMIT", 100)
    index = VideoIndex(tmp_path)
    index.create(ENCODER | {"stored": {"what": "tokens", "dtype": "float32"}})
    writer = RowWriter(index, rows_per_commit=1000, seconds_per_commit=1000)
    row = build_rows("a")[0] | {"start_seconds": None, "states": np.zeros(20, np.float32)}
    writer.write([], [row])
    assert index.measure_stored() == (0, 0)
    writer.write([row], [row | {"path": "b"}])  # rows of a long video come later than what is stored of it
    assert index.measure_stored() == (2, 160) and index.count_rows() == 1


def test_numbers_that_do_not_fit_are_skipped_with_the_cure(model, videos, tmp_path, monkeypatch):
    encode = search.VideoTextEncoder.encode_videos

    def encode_large(self, pixel_values):
        vectors, tokens = encode(self, pixel_values)
        tokens[0] = 1e5
        return vectors, tokens

    monkeypatch.setattr(search.VideoTextEncoder, "encode_videos", encode_large)
    for name, windows in (("videos", {}), ("moments", MOMENTS)):
        options = {"batch_size": 64, "store": "tokens", **windows}
        report = embed_videos([str(videos)], model, tmp_path / name, **options)
        assert report.num_in_index == 5 and len(report.skipped) == 1
        assert report.skipped[0].reason.endswith("does not fit into float16; give --store-dtype float32.")
        require_stored(tmp_path / name)
        assert (
            embed_videos([str(videos)], model, tmp_path / f"{name}32", store_dtype="float32", **options).skipped == ()
        )


@pytest.mark.parametrize("store", ["tokens", "keys"])
def test_fewer_tokens_and_other_precisions(model, videos, tmp_path, store):
    half = KeptTokenArguments(keep_ratio=0.5, token_selector="random")
    embed_videos([str(videos)], model, tmp_path / "plain", tokens=half)
    embed_videos([str(videos)], model, tmp_path / "stored", tokens=half, store=store, store_dtype="float32")
    found, expected = (rank(VideoSearcher(tmp_path / name)) for name in ("stored", "plain"))
    assert list(found) == list(expected) and found == pytest.approx(expected, abs=1e-5)
    embed_videos([str(videos)], model, tmp_path / "bfloat16", dtype="bfloat16", store=store)
    embed_videos([str(videos)], model, tmp_path / "full", store=store)
    found, expected = (rank(VideoSearcher(tmp_path / name)) for name in ("bfloat16", "full"))
    assert found == pytest.approx(expected, abs=0.3) and found != expected


def test_the_commands_say_sizes_and_what_is_encoded(model, videos, tmp_path):
    words = ["embed", str(videos), "--model", str(model), "--num-workers", "0", "--out", str(tmp_path / "index")]
    result = runner.invoke(app, [*words, "--store", "tokens", "--store-dtype", "float32"])
    assert result.exit_code == 0, result.output
    assert "bytes are stored per video for re-ranking" in result.stderr and "stored for re-ranking" in result.stdout
    result = runner.invoke(app, ["search", str(tmp_path / "index"), QUERY, "--rerank"])
    assert result.exit_code == 0 and "encodes" not in result.output
    words[-1] = str(tmp_path / "plain")
    assert runner.invoke(app, words).exit_code == 0
    result = runner.invoke(app, ["search", str(tmp_path / "plain"), QUERY, "--rerank"])
    assert result.exit_code == 0 and result.stderr.count("Re-ranking reads and encodes 6 videos again") == 1
    assert "encodes" not in runner.invoke(app, ["search", str(tmp_path / "plain"), QUERY]).output
    result = runner.invoke(app, [*words, "--store-dtype", "float32"])
    assert result.exit_code == 2 and "needs something to store" in result.output.replace("\n", " ")


def test_videos_of_several_shapes_are_judged_each_in_its_own(model, videos, tmp_path, monkeypatch):
    """Where videos are not cut to one size, tokens of one are more than of another."""
    encoder = search.VideoTextEncoder(model)
    text = encoder.encode_text(QUERY)[1].detach()
    index = VideoIndex(tmp_path)
    store = StoreSettings("tokens", "float32")
    index.create(ENCODER | {"stored": {"what": "tokens", "dtype": "float32"}})
    rows, expected = build_rows("a", "b", "c"), {}
    for row, side in zip(rows, (32, 64, 32), strict=True):
        torch.manual_seed(side)
        with torch.no_grad():
            tokens = encoder.encode_videos(torch.randn(1, 2, 3, side, side))[1]
            expected[row["path"]] = float(encoder.model.match(tokens, text)[0, 1])
        row |= {"start_seconds": None}
        index.add_stored([row | {"states": store.compute_states(encoder.model, tokens)[0]}])
    with torch.no_grad():
        found = reranking.match_stored(index, store, encoder.model, rows, text)
    assert found == pytest.approx(expected, abs=1e-5)


def test_listed_files_are_the_keys(videos):
    """A row and what is stored of it agree in path, size, time and start."""
    (file,) = list_videos([str(sorted(videos.iterdir())[0])])[0]
    row = reranking.build_stored_row(file, 1.5, np.zeros(1))
    assert [row[name] for name in video_index.STORED_KEY] == [
        file.path, os.path.getsize(file.path), file.modified_ns, 1.5
    ]  # fmt: skip
