"""Videos by an engine that others wrote: rows of `datasets` and of Ray make the index that `umt-hf embed` makes."""

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from typer.testing import CliRunner

from tests.processes import ROOT, build_environment, read_output, run_and_kill, start_process, wait_for
from tests.unit.inference.engine_jobs import (
    map_and_write,
    map_part_by_part,
    run_text,
    work_in_a_fork,
    write_in_worker,
    write_one_by_one,
)
from tests.unit.inference.test_search import QUERY, save_model
from umt_hf import UMTVideoTextForQuestionAnswering, VideoEmbedder, embed_videos
from umt_hf.cli import app
from umt_hf.data.video_files import list_videos
from umt_hf.inference.batches import choose_device, list_new_videos, write_rows
from umt_hf.inference.batches import embedder as embedding
from umt_hf.inference.search import VideoTextEncoder
from umt_hf.inference.video_index import FACTS, VideoIndex
from umt_hf.moving_shapes.render import write_moving_shapes
from umt_hf.runs.arguments import KeptTokenArguments

pytest.importorskip("lancedb")

SETTINGS = [{}, {"window": 1.0, "stride": 0.5}]
by_settings = pytest.mark.parametrize("settings", SETTINGS, ids=["videos", "moments"])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Six clips, a file that is none and an empty one among them."""
    folder = tmp_path_factory.mktemp("videos")
    write_moving_shapes(folder, num_train_clips=6, num_validation_clips=1, num_test_clips=1)
    folder = folder / "videos" / "train"
    (folder / "00001b.mp4").write_bytes(b"no video")
    (folder / "00003b.mp4").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def embedded(model, videos, tmp_path_factory) -> dict[str, Path]:
    """What `umt-hf embed` makes of them, four at a time: of complete videos, and of moments."""
    folder = tmp_path_factory.mktemp("embedded")
    for settings in SETTINGS:
        embed_videos([str(videos)], model, folder / name(settings), batch_size=4, **settings)
    return {name(settings): folder / name(settings) for settings in SETTINGS}


def name(settings: dict) -> str:
    return "moments" if settings else "videos"


def list_paths(videos: Path) -> list[str]:
    return [file.path for file in list_videos([str(videos)])[0]]


def read_index(folder: Path) -> list[dict]:
    rows = [row for batch in VideoIndex(folder).read([*FACTS, "vector"]) for row in batch.to_pylist()]
    return sorted(rows, key=lambda row: (row["path"], row["start_seconds"] or 0))


def assert_same_index(found: Path, expected: Path, atol: float = 0.0) -> None:
    """The same rows, the same skipped videos with the same reasons, and the same record of what made them."""
    rows = [read_index(folder) for folder in (found, expected)]
    assert [{key: row[key] for key in FACTS} for row in rows[0]] == [{k: row[k] for k in FACTS} for row in rows[1]]
    np.testing.assert_allclose(*([row["vector"] for row in own] for own in rows), rtol=0, atol=atol)
    indexes = [VideoIndex(folder) for folder in (found, expected)]
    assert indexes[0].read_skipped() == indexes[1].read_skipped()
    assert indexes[0].read_encoder() == indexes[1].read_encoder()


def run_in_process(output: Path, function, *arguments) -> None:
    """In a process that has not loaded LanceDB, and may be forked."""
    process = start_process(function, *arguments, environment=build_environment(0, 1, 0), output=output)
    wait_for([process], 0, 120)
    assert process.exitcode == 0, read_output(output)


@by_settings
def test_vectors_are_those_of_embed_videos_bit_by_bit(settings, model, videos, embedded, tmp_path):
    paths = list_paths(videos)
    embedder = VideoEmbedder(model, batch_size=4, **settings)
    rows = embedder({"path": paths})
    assert list(dict.fromkeys(rows["path"])) == paths
    assert {column.shape[0] for column in rows.values()} == {len(rows["path"])}
    assert rows["vector"].dtype == np.float32 and rows["vector"].shape[1] == 16
    bad = [bool(reason) for reason in rows["reason"]]
    assert sum(bad) == 2 and np.isnan(rows["vector"][bad]).all() and np.isfinite(rows["vector"][np.invert(bad)]).all()
    assert np.isnan(rows["start_seconds"]).tolist() == (bad if settings else [True] * 8)
    report = write_rows(rows, tmp_path / "index")
    assert (report.num_encoded, report.num_in_index, len(report.skipped)) == (6, 6, 2)
    assert report.num_moments == (6 * 5 if settings else None)
    assert_same_index(tmp_path / "index", embedded[name(settings)])
    # NumPy's batches, as Ray has them, relative paths, and rows in parts that are not those of the batches.
    relative = np.array([os.path.relpath(path) for path in paths])
    parts = [embedder({"path": relative[i : i + 3]}) for i in range(0, 8, 3)]
    cut = [{key: part[key][i : i + 4] for key in part} for part in parts for i in range(0, len(part["path"]), 4)]
    write_rows(iter(cut), tmp_path / "parts")
    assert_same_index(tmp_path / "parts", embedded[name(settings)], atol=1e-6)


@by_settings
def test_two_workers_of_datasets_make_the_index_of_embed(settings, model, videos, embedded, tmp_path):
    """Which `umt-hf search` searches, and `umt-hf embed` finds complete."""
    index = tmp_path / "index"
    run_in_process(tmp_path / "output", map_and_write, str(model), str(videos), str(index), settings)
    assert_same_index(index, embedded[name(settings)])
    found = [CliRunner().invoke(app, ["search", str(f), QUERY, "--json"]) for f in (index, embedded[name(settings)])]
    assert [result.exit_code for result in found] == [0, 0] and found[0].stdout == found[1].stdout
    assert len(json.loads(found[0].stdout)) == 6
    words = ["embed", str(videos), "--model", str(model), "--out", str(index), "--num-workers", "0", "--json"]
    words += [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    again = CliRunner().invoke(app, words)
    report = json.loads(again.stdout.splitlines()[-1])
    assert (report["num_encoded"], report["num_unchanged"], report["num_in_index"]) == (0, 6, 6), again.output


@pytest.mark.heavy
def test_the_page_on_datasets_runs_as_written(model, videos, tmp_path):
    """With workers that are not forked, beside LanceDB."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/search.md").read_text(), re.MULTILINE | re.DOTALL)
    (text,) = [block for block in blocks if block.startswith("import multiprocess")]
    shutil.copytree(model, tmp_path / "outputs" / "retrieval")
    shutil.copytree(videos, tmp_path / "videos")
    (tmp_path / "videos" / "00001b.mp4").unlink()
    run_in_process(tmp_path / "output", run_text, text, str(tmp_path))
    index = VideoIndex(tmp_path / "large")
    assert index.count_rows() == 6 * 2 and index.read_encoder()["moments"]["stride_seconds"] == 1
    assert [Path(video.path).name for video in index.read_skipped()] == ["00003b.mp4"]
    assert read_output(tmp_path / "output").stdout.startswith("6 encoded, 0 unchanged, 1 skipped; 6 in the index")


@by_settings
def test_two_workers_of_ray_make_the_index_of_embed(settings, model, videos, embedded, tmp_path):
    ray = pytest.importorskip("ray", reason="`make test-extras` installs ray and runs it")
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}
    )
    try:
        paths = list_new_videos([str(videos)], tmp_path / "index")
        rows = ray.data.from_items([{"path": path} for path in paths], override_num_blocks=2).map_batches(
            VideoEmbedder,
            fn_constructor_kwargs={"model": str(model), "batch_size": 4, "device": "cpu", **settings},
            compute=ray.data.ActorPoolStrategy(size=2),
            batch_size=4,
        )
        report = write_rows(rows, tmp_path / "index")
        assert (report.num_encoded, len(report.skipped)) == (6, 2)
        assert_same_index(tmp_path / "index", embedded[name(settings)], atol=1e-6)
        rows = rows.materialize()
        # From the workers of Ray, which write at the same time.
        written = rows.map_batches(write_in_worker, fn_kwargs={"folder": str(tmp_path / "workers")}, batch_size=None)
        assert sum(row["num_encoded"] for row in written.take_all()) == 6
        assert_same_index(tmp_path / "workers", embedded[name(settings)], atol=1e-6)
    finally:
        ray.shutdown()


@by_settings
def test_killed_and_run_again(settings, model, videos, embedded, tmp_path):
    index = tmp_path / "index"

    def is_begun() -> bool:
        return VideoIndex(index).exists() and VideoIndex(index).count_rows() > 0

    arguments = (str(model), str(videos), str(index), settings)
    run_and_kill(is_begun, map_part_by_part, *arguments)
    new = list_new_videos([str(videos)], index)
    assert 2 <= len(new) < 8 and {Path(path).name for path in new} > {"00001b.mp4", "00003b.mp4"}
    map_part_by_part(*arguments)
    assert_same_index(index, embedded[name(settings)], atol=1e-6)
    # What is left are the unreadable ones, which are tried again, as `umt-hf embed` does.
    assert {Path(path).name for path in list_new_videos([str(videos)], index)} == {"00001b.mp4", "00003b.mp4"}


def test_two_writers_at_once(model, videos, embedded, tmp_path):
    rows = VideoEmbedder(model, batch_size=4)({"path": list_paths(videos)})
    parts = [{key: values[i::2] for key, values in rows.items()} for i in range(2)]
    environment = build_environment(0, 1, 0)
    processes = [
        start_process(
            write_one_by_one, part, str(tmp_path / "index"), environment=environment, output=tmp_path / f"output_{i}"
        )
        for i, part in enumerate(parts)
    ]
    wait_for(processes, 0, 120)
    assert [process.exitcode for process in processes] == [0, 0], [
        read_output(tmp_path / f"output_{i}") for i in (0, 1)
    ]
    assert_same_index(tmp_path / "index", embedded["videos"])


@by_settings
def test_bytes_repeats_and_rows_without_a_video(settings, model, videos):
    """One bad row never ends a job, each row has its own answer, and bytes are never looked for as a file."""
    good, other = sorted(videos.glob("0000?.mp4"))[:2]
    data = [path.read_bytes() for path in (good, other)]
    (videos.parent / "folder").mkdir(exist_ok=True)
    batch = {
        "path": [str(good), "name.mp4", "name.mp4", str(good), str(other), None, "", "a\0b", 3, str(good), str(good)],
        "bytes": [None, data[0], data[1], None, None, data[0], None, None, None, b"", "text"],
    }
    batch = {
        "path": [*batch["path"], str(videos.parent / "folder"), "gone.mp4", "https://127.0.0.1:9/x.mp4"],
        "bytes": [*batch["bytes"], None, None, None],
    }
    rows = VideoEmbedder(model, **settings)(batch)
    count = 5 if settings else 1
    assert len(rows["path"]) == 5 * count + 9
    own = np.split(rows["vector"][: 5 * count], 5)
    for i, j in ((0, 1), (0, 3), (2, 4)):
        np.testing.assert_allclose(own[i], own[j], rtol=0, atol=1e-6)
    assert np.abs(own[0] - own[2]).max() > 1e-3
    assert rows["path"][::count][:5].tolist() == [str(good), "name.mp4", "name.mp4", str(good), str(other)]
    assert not any(rows["reason"][: 5 * count]) and all(rows["reason"][5 * count :])
    reasons = rows["reason"][5 * count :].tolist()
    assert reasons[0] == "The path of its row is None, which names no video."
    assert reasons[4:6] == ["It is empty.", "Its bytes are a str."]
    assert reasons[7] == "No such file or directory." and rows["path"][-2] == os.path.abspath("gone.mp4")
    assert rows["size_bytes"][count] == len(data[0]) and rows["modified_ns"][count] == 0
    assert rows["num_rows"].tolist() == [count] * 5 * count + [0] * 9
    bad, none = (VideoEmbedder(model, **settings)({"path": paths}) for paths in ([None, None], []))
    kinds = {key: (values.dtype, *values.shape[1:]) for key, values in rows.items()}
    for other, length in ((bad, 2), (none, 0)):  # parts of a dataset are joined
        assert {key: (values.dtype, *values.shape[1:]) for key, values in other.items()} == kinds
        assert {len(values) for values in other.values()} == {length}


def test_a_dataset_of_bytes(model, videos, embedded, tmp_path):
    """Whose vectors are those of the files; `umt-hf embed` on the files cannot know that, and encodes them again."""
    paths = [str(videos / f"{i:05d}.mp4") for i in range(3)]
    contents = [None, *(Path(path).read_bytes() for path in paths[1:])]
    table = Dataset.from_dict({"path": paths, "bytes": contents, "label": [1, 2, 3]})
    rows = table.map(VideoEmbedder(model), batched=True, remove_columns=table.column_names)
    assert rows["path"][:] == paths and rows["size_bytes"][:] == [Path(path).stat().st_size for path in paths]
    expected = [row["vector"] for row in read_index(embedded["videos"])[:3]]
    np.testing.assert_allclose(rows["vector"][:], expected, rtol=0, atol=1e-6)
    assert write_rows(rows, tmp_path / "index").num_encoded == 3
    assert list_new_videos(paths, tmp_path / "index") == paths[1:]


def test_vectors_that_are_not_finite_are_reported(model, videos, monkeypatch):
    def encode(self, pixel_values):
        return torch.full((len(pixel_values), 16), torch.nan), None

    monkeypatch.setattr(VideoTextEncoder, "encode_videos", encode)
    good = str(sorted(videos.iterdir())[0])
    for settings in SETTINGS:
        (reason,) = VideoEmbedder(model, **settings)({"path": [good]})["reason"]
        assert "not finite" in reason


def test_a_video_is_written_once_all_of_its_moments_are_there(model, videos, tmp_path):
    paths = [str(videos / f"{i:05d}.mp4") for i in (0, 2, 4)]
    rows = VideoEmbedder(model, window=1, stride=0.5)({"path": paths})
    order = np.random.default_rng(0).permutation(15)
    mixed = [{key: values[i] for key, values in rows.items()} for i in order]  # rows, one by one
    assert write_rows(mixed, tmp_path / "mixed").num_moments == 15
    lost = [row for row in mixed if (row["path"], row["start_seconds"]) != (paths[1], 1.0)]
    report = write_rows(lost, tmp_path / "lost")
    assert (report.num_encoded, report.num_moments) == (2, 10)
    assert [video.path for video in report.skipped] == [paths[1]]
    assert "Only 4 of its 5 rows were there" in report.skipped[0].reason
    assert VideoIndex(tmp_path / "lost").list_paths() == [paths[0], paths[2]]
    assert list_new_videos(paths, tmp_path / "lost") == [paths[1]]


def test_rows_that_an_index_does_not_take(model, videos, tmp_path):
    path = list_paths(videos)[0]
    index = tmp_path / "index"
    with pytest.raises(ValueError, match=r"no rows to write, and .*index is not an index"):
        write_rows([], index)
    rows = VideoEmbedder(model)({"path": [path]})
    assert write_rows(rows, index).num_in_index == 1
    assert write_rows([], index).num_in_index == 1
    other = save_model(tmp_path / "other", seed=1)
    for embedder, message in (
        (VideoEmbedder(other), "was built by another model: its weights is"),
        (
            VideoEmbedder(model, num_frames=4),
            "was built with --num-frames 2, and these vectors would be of --num-frames 4",
        ),
        (VideoEmbedder(model, dtype="bfloat16"), "was built with --dtype float32, and .* of --dtype bfloat16"),
        (
            VideoEmbedder(model, tokens=KeptTokenArguments(keep_ratio=0.5)),
            "was built with --keep-ratio 1.0, and .* of --keep-ratio 0.5",
        ),
        (VideoEmbedder(model, window=1), "holds complete videos and these would be moments of 1 s every 1 s"),
    ):
        with pytest.raises(ValueError, match=message):
            write_rows(embedder({"path": [path]}), index)
    with pytest.raises(ValueError, match="another model"):  # of each other
        write_rows([rows, VideoEmbedder(other)({"path": [path]})], tmp_path / "new")
    embed_videos([path], model, tmp_path / "stored", store="tokens")  # rows of engines have no tokens
    with pytest.raises(ValueError, match="stores tokens in float16 and this would store vectors alone"):
        write_rows(rows, tmp_path / "stored")
    moved = VideoEmbedder(shutil.copytree(model, tmp_path / "moved"))({"path": [path]})
    assert write_rows(moved, index).num_in_index == 1  # the same model elsewhere
    del rows["num_rows"]
    with pytest.raises(ValueError, match=r"Rows for an index lack \['num_rows'\]"):
        write_rows(rows, index)
    with pytest.raises(ValueError, match=r"needs a column 'path'; these are \['video'\]"):
        VideoEmbedder(model)({"video": [path]})


def test_settings_are_refused_before_a_worker_starts(model, tmp_path):
    save_model(tmp_path / "answers", UMTVideoTextForQuestionAnswering)
    for arguments, settings, error, message in (
        ([tmp_path / "answers"], {}, ValueError, "is a video question answering folder"),
        ([tmp_path / "gone"], {}, OSError, "gone"),
        ([model], {"stride": 1.0}, ValueError, "A stride needs a window"),
        ([model], {"num_frames": 0}, ValueError, "num_frames must be at least 1"),
        ([model], {"batch_size": "3"}, TypeError, "batch_size must be an integer"),
        ([model], {"dtype": "int8"}, ValueError, "dtype must be one of"),
    ):
        with pytest.raises(error, match=message):
            VideoEmbedder(*arguments, **settings)


def test_what_goes_to_a_worker(model, videos, tmp_path):
    """Settings alone; and `datasets` finds what it computed by them, unless the model was written again."""
    folder = shutil.copytree(model, tmp_path / "model")
    embedder = VideoEmbedder(folder, window=1.0)
    before = Hasher.hash(embedder)
    embedder({"path": list_paths(videos)[:1]})
    assert Hasher.hash(embedder) == before == Hasher.hash(VideoEmbedder(folder, window=1.0))
    assert Hasher.hash(VideoEmbedder(folder, window=2.0)) != before
    assert len(pickle.dumps(embedder)) < 4000
    copy = pickle.loads(pickle.dumps(embedder))
    assert copy.describe() == embedder.describe() and copy.describe()["moments"]["window_seconds"] == 1
    save_model(folder, seed=1)
    assert Hasher.hash(VideoEmbedder(folder, window=1.0)) != before


def test_the_rank_chooses_the_accelerator(monkeypatch):
    assert choose_device("cpu", 3) == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert choose_device(None) == choose_device(None, 1) == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    assert choose_device(None) == torch.device("cuda")
    assert [choose_device(None, rank).index for rank in range(6)] == [0, 1, 2, 3, 0, 1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
def test_a_worker_that_was_forked_beside_lancedb_encodes_and_writes_nothing(model, videos, tmp_path):
    run_in_process(tmp_path / "output", work_in_a_fork, str(model), list_paths(videos)[0])


def test_a_worker_computes_on_one_thread_and_ends_with_its_starter(monkeypatch, model):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    VideoEmbedder(model).describe()
    assert threads == []
    monkeypatch.setattr(embedding, "_is_worker", lambda: True)
    embedder = VideoEmbedder(model)
    embedder.describe()
    assert threads == [1]
    assert embedder({"path": []}).keys() and pickle.loads(pickle.dumps(embedder))({"path": []}).keys()
    monkeypatch.setattr(os, "getppid", lambda: 1)  # who adopts it
    with pytest.raises(SystemExit, match="is gone"):
        embedder({"path": []})
