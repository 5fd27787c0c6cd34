"""Tables of videos, the order of clips, and the keys of their random choices."""

import itertools
import json
import sqlite3
from contextlib import closing

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset

from tests.unit.shard_files import write_tar
from umt_hf.data.sources import load_videos
from umt_hf.moving_shapes.render import write_moving_shapes
from umt_hf.training.clips import ClipCollator, ClipDataset, ClipRequest, build_generator
from umt_hf.training.order import StepShape, count_steps, plan_batches


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    write_moving_shapes(folder, num_train_clips=6, num_validation_clips=1, num_test_clips=1)
    return folder


@pytest.mark.parametrize(
    "separator,line,name,label",
    [
        (",", "a/b.mp4,3", "a/b.mp4", 3),
        (",", "a, with comma.mp4,3", "a, with comma.mp4", 3),
        (",", '"a,1,b.mp4",3', "a,1,b.mp4", 3),
        (" ", "clip.webm 17", "clip.webm", 17),
        (" ", "my clip.webm 17", "my clip.webm", 17),
        (",", "name_without_suffix,0", "name_without_suffix.mp4", 0),
    ],
)
def test_csv_lines(tmp_path, separator, line, name, label):
    (tmp_path / "list.csv").write_text(line + "\n\n")
    rows = load_videos(str(tmp_path / "list.csv"), csv_separator=separator)
    assert rows[0] == {"video": str(tmp_path / name), "label": label} and len(rows) == 1
    rows = load_videos(str(tmp_path / "list.csv"), data_root="/videos", csv_separator=separator)
    assert rows[0]["video"] == f"/videos/{name}"


def test_absolute_paths_win(tmp_path):
    (tmp_path / "list.csv").write_text("/elsewhere/a.mp4,1\n")
    assert load_videos(str(tmp_path / "list.csv"), data_root="/videos")[0]["video"] == "/elsewhere/a.mp4"


@pytest.mark.parametrize("line", ["only_a_path.mp4", "a.mp4,label", ",3", "a.mp4,3,120,extra", "a.mp4,3,120"])
def test_csv_errors_name_file_and_line(tmp_path, line):
    (tmp_path / "list.csv").write_text(f"fine.mp4,0\n{line}\n")
    with pytest.raises(ValueError, match=r"list\.csv, line 2"):
        load_videos(str(tmp_path / "list.csv"))


def test_csv_of_a_spreadsheet_and_an_empty_one(tmp_path):
    (tmp_path / "list.csv").write_text("a.mp4,1\n", encoding="utf-8-sig")
    assert load_videos(str(tmp_path / "list.csv"))[0]["video"] == str(tmp_path / "a.mp4")
    (tmp_path / "list.csv").write_text("")
    with pytest.raises(ValueError, match=r"list\.csv lists no videos"):
        load_videos(str(tmp_path / "list.csv"))


def test_json_keeps_captions(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps([{"video": "a.mp4", "caption": "a cat"}]))
    rows = load_videos(str(tmp_path / "list.json"))
    assert rows[0] == {"video": str(tmp_path / "a.mp4"), "caption": "a cat"}
    (tmp_path / "list.json").write_text(json.dumps([{"video": "a.mp4"}, {"image": "b.jpg"}]))
    with pytest.raises(ValueError, match="object 1"):
        load_videos(str(tmp_path / "list.json"))
    (tmp_path / "list.json").write_text("[")
    with pytest.raises(ValueError, match=r"list\.json is not valid JSON"):
        load_videos(str(tmp_path / "list.json"))
    (tmp_path / "list.json").write_text("{}")
    with pytest.raises(ValueError, match="JSON list"):
        load_videos(str(tmp_path / "list.json"))


def test_folders(tmp_path):
    for name in ("jump/a.mp4", "jump/b.MKV", "run/c.webm", "run/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    rows = load_videos(str(tmp_path))
    assert [(row["video"].rsplit("/", 1)[1], row["label"]) for row in rows] == [
        ("a.mp4", 0),
        ("b.MKV", 0),
        ("c.webm", 1),
    ]
    assert "label" not in load_videos(str(tmp_path / "jump"))[0]
    named = load_videos(str(tmp_path), class_names=["swim", "run", "jump"])
    assert [row["label"] for row in named] == [2, 2, 1]
    with pytest.raises(ValueError, match=r"\['run'\] are not classes"):
        load_videos(str(tmp_path), class_names=["jump"])
    (tmp_path / "stray.mp4").touch()
    assert [row["label"] for row in load_videos(str(tmp_path))] == [0, 0, 1]
    everything = load_videos(str(tmp_path), needs_labels=False)
    assert len(everything) == 4 and "label" not in everything[0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no videos"):
        load_videos(str(tmp_path / "empty"))
    for missing in (str(tmp_path / "missing"), "my_videos/", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            load_videos(missing)
    with pytest.raises(FileNotFoundError, match="my videos: no such file or folder.$"):
        load_videos("my videos")
    (tmp_path / "run" / "notes.doc").touch()
    with pytest.raises(ValueError, match=r"notes\.doc: expected a \.csv"):
        load_videos(str(tmp_path / "run" / "notes.doc"))
    with pytest.raises(ValueError, match=r"notes\.txt lists no videos"):
        load_videos(str(tmp_path / "run" / "notes.txt"))


def test_saved_datasets_and_columns(tmp_path):
    Dataset.from_dict({"clip": ["a.mp4"], "label": [1]}).save_to_disk(tmp_path / "saved")
    rows = load_videos(str(tmp_path / "saved"), video_column="clip")
    assert rows[0] == {"video": "a.mp4", "label": 1}
    with pytest.raises(ValueError, match="no column 'film'"):
        load_videos(str(tmp_path / "saved"), video_column="film")


def list_rows(plan, count: int) -> list[list[int]]:
    return [[request.row for request in batch.requests] for batch in itertools.islice(plan, count)]


def test_batches_cover_each_epoch_once_and_differ_between_epochs():
    table = Dataset.from_dict({"video": list(map(str, range(10)))})
    batches = list_rows(plan_batches(table, 3, seed=0), 6)
    first, second = sum(batches[:3], []), sum(batches[3:], [])
    assert len(set(first)) == 9 and len(set(second)) == 9 and first != second
    assert count_steps(table, 3) == 3
    with pytest.raises(ValueError, match="10 videos do not fill .* of 6 in 2 .* --per_device_train_batch_size to 5 "):
        count_steps(table, 6, StepShape(2))
    with pytest.raises(ValueError, match="10 images do not fill one batch of 16 .* set --batch_sizes to 10 or less"):
        count_steps(table, 16, None, "image", "batch_sizes")
    with pytest.raises(ValueError, match="10 videos do not fill .* in 12 process.* use fewer processes"):
        count_steps(table, 1, StepShape(12))


def test_batches_do_not_depend_on_the_number_of_processes_or_on_resuming():
    table = Dataset.from_dict({"video": list(map(str, range(20)))})
    one = list_rows(plan_batches(table, 4, seed=1), 7)
    two = [list_rows(plan_batches(table, 2, 1, StepShape(2, process)), 7) for process in range(2)]
    assert [a + b for a, b in zip(*two, strict=True)] == one
    position = list(itertools.islice(plan_batches(table, 4, seed=1), 3))[-1].position
    assert list_rows(plan_batches(table, 4, seed=1, position=position), 4) == one[3:]
    assert list_rows(plan_batches(table, 4, seed=2), 7) != one


def test_generators_are_fixed_by_their_key():
    def draw(*key):
        return torch.rand(4, generator=build_generator(*key)).tolist()

    assert draw(0, 1, 2) == draw(0, 1, 2)
    assert len({tuple(draw(*key)) for key in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (0, 1), (0, 12))}) == 5


def build_dataset(table, is_training=True, copies=1) -> ClipDataset:
    from umt_hf.processing.train_transforms import PretrainingTransform

    return ClipDataset(table, PretrainingTransform(32), 4, 16, repeated_augmentation=copies, is_training=is_training)


def test_clips_are_drawn_once_a_clip_and_fixed_by_their_key(shapes):
    dataset = build_dataset(load_videos(str(shapes / "train.csv")), copies=2)
    (one, copy), failures = dataset[ClipRequest(0, (0, 0, 0))]
    (again, _), _ = dataset[ClipRequest(0, (0, 0, 0))]
    (other, _), _ = dataset[ClipRequest(0, (0, 1, 0))]
    assert not failures and one.frames.shape[:2] == (4, 3)
    assert torch.equal(one.frames, again.frames) and torch.equal(one.mask_noise, again.mask_noise)
    assert not torch.equal(one.mask_noise, copy.mask_noise) and not torch.equal(one.mask_noise, other.mask_noise)


def test_worker_and_device_paths_give_the_same_batch(shapes):
    from umt_hf.training.clips import finish_batch

    dataset = build_dataset(load_videos(str(shapes / "train.csv")))
    samples = [dataset[ClipRequest(row, (0, 0, row))] for row in range(3)]
    in_worker = ClipCollator(dataset.transform, use_worker=True)(samples)
    later = finish_batch(
        ClipCollator(dataset.transform, use_worker=False)(samples), dataset.transform, torch.device("cpu")
    )
    assert torch.equal(in_worker["pixel_values"], later["pixel_values"])
    assert in_worker["pixel_values"].shape == (3, 4, 3, 32, 32)


def test_unreadable_rows_are_replaced_in_training_and_left_out_in_evaluation(shapes, tmp_path):
    rows = [dict(row) for row in load_videos(str(shapes / "train.csv"))]
    rows[0]["video"] = str(tmp_path / "gone.mp4")
    table = Dataset.from_list(rows)
    clips, failures = build_dataset(table)[ClipRequest(0, (0, 0, 0))]
    assert len(clips) == 1 and "gone.mp4" in failures[0]

    held_out = build_dataset(table, is_training=False)
    samples = [held_out[ClipRequest(row, (row,))] for row in range(2)]
    assert samples[0][0] == [] and "gone.mp4" in samples[0][1][0]
    transform = held_out.transform
    assert len(ClipCollator(transform, True, keep_size=False)(samples)["mask_noise"]) == 1
    assert list(ClipCollator(transform, True, keep_size=False)(samples[:1])) == ["num_videos", "failures"]
    assert len(ClipCollator(transform, True, keep_size=True)(samples)["mask_noise"]) == 2
    with pytest.raises(RuntimeError, match="gone.mp4"):
        ClipCollator(transform, True)(samples[:1])


@pytest.mark.parametrize("name", ["a#b", "a?b", "a%25b", "a b", "é", "a[1]"])
@pytest.mark.parametrize("form", ["list.sqlite", "list.csv", "list.json", "list.parquet", "shard.tar", "videos"])
def test_lists_under_odd_paths_are_read(form, name, tmp_path):
    """Of some characters a URI or a pattern of files makes something else than a path does."""
    folder = tmp_path / name
    folder.mkdir()
    row = {"video": "/v/a.mp4", "caption": "x"}
    if form == "list.sqlite":
        with closing(sqlite3.connect(folder / form)) as base, base:
            base.execute("CREATE TABLE annos (id, name, caption)")
            base.execute("INSERT INTO annos VALUES (0, '/v/a.mp4', 'x')")
    elif form == "list.parquet":
        pq.write_table(pa.Table.from_pylist([row]), folder / form)
    elif form == "shard.tar":
        write_tar(folder / form, [{"mp4": b"x", "txt": "x"}])
    elif form == "videos":
        (folder / form).mkdir()
        (folder / form / "a.mp4").touch()
    else:
        (folder / form).write_text("video,caption\n/v/a.mp4,x\n" if form == "list.csv" else json.dumps([row]))
    assert len(load_videos(str(folder / form), needs_labels=False)) == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("form", ["list.sqlite", "list.csv", "list.json"])
def test_the_home_folder_in_a_list_is_ones_own(form, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    paths = ["~/a.mp4", "b.mp4", "/c.mp4", "~d.mp4"]
    if form == "list.sqlite":
        with closing(sqlite3.connect(tmp_path / form)) as base, base:
            base.execute("CREATE TABLE annos (id, name, caption)")
            base.executemany("INSERT INTO annos VALUES (?, ?, 'x')", enumerate(paths))
    elif form == "list.csv":
        (tmp_path / form).write_text("\n".join(paths))
    else:
        (tmp_path / form).write_text(json.dumps([{"video": path} for path in paths]))
    found = load_videos(str(tmp_path / form), needs_labels=False)["video"][:]
    assert found == ["/home/me/a.mp4", f"{tmp_path}/b.mp4", "/c.mp4", f"{tmp_path}/~d.mp4"]
