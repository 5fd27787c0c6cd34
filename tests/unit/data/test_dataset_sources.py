"""`datasets` datasets as lists of videos: saved, Parquet, streamed; names of classes, and labels by name."""

import json
from pathlib import Path

import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, IterableDataset, List, Value, Video

from tests.unit.video_files import write_video
from umt_hf.data.labels import get_label_names
from umt_hf.data.sources import get_source, load_videos
from umt_hf.data.targets import fit_labels, has_label_lists

pytestmark = pytest.mark.usefixtures("list_store")

NAMES = ["run", "jump"]
LABELS = [0, 1, 1, 0]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return [str(write_video(folder / f"{name}.mp4", num_frames=4 + i)) for i, name in enumerate("abcd")]


@pytest.fixture(scope="module")
def sources(files, tmp_path_factory):
    """One data set in each form, by name; `video` and `label` have other names in one of them."""
    folder = tmp_path_factory.mktemp("sources")
    features = Features({"video": Video(), "label": ClassLabel(names=NAMES)})
    by_path = Dataset.from_dict({"video": files, "label": LABELS}, features=features)
    rows = [{"path": None, "bytes": Path(file).read_bytes()} for file in files]
    by_bytes = Dataset.from_dict({"video": rows, "label": LABELS}, features=features)
    by_path.save_to_disk(folder / "saved")
    splits = {"train": by_path, "validation": by_path.select([1])}
    DatasetDict(splits).save_to_disk(folder / "splits")
    (folder / "parquet").mkdir()
    by_bytes.to_parquet(folder / "parquet" / "train-00000.parquet")
    by_bytes.rename_columns({"video": "clip", "label": "action"}).save_to_disk(folder / "renamed")
    return {name: str(folder / name) for name in ("saved", "splits", "parquet", "renamed")} | {
        "file": str(folder / "parquet" / "train-00000.parquet")
    }


@pytest.mark.parametrize("form", ["saved", "splits", "parquet", "renamed", "file"])
def test_every_form_has_videos_and_names(sources, files, form):
    table = load_videos(sources[form])
    assert get_label_names(table.features) == NAMES and table["label"][:] == LABELS
    contents = [get_source(video) for video in table["video"]]
    assert [source if isinstance(source, bytes) else Path(source).read_bytes() for source in contents] == [
        Path(file).read_bytes() for file in files
    ]
    assert fit_labels(sources[form], table, NAMES, False)["label"][:] == LABELS and not has_label_lists(table)


def test_splits(sources):
    assert load_videos(sources["splits"], split="validation")["label"][:] == [1]
    with pytest.raises(ValueError, match=r"splits: has no split 'test'; it has \['train', 'validation'\]"):
        load_videos(sources["splits"], split="test")


def test_images_are_found_by_type_and_mistakes_are_named(sources, tmp_path):
    rows = {"picture": [{"path": None, "bytes": b"png"}], "caption": ["a cat"]}
    Dataset.from_dict(rows, features=Features({"picture": Image(), "caption": Value("string")})).save_to_disk(
        tmp_path / "images"
    )
    assert load_videos(str(tmp_path / "images"), video_column="image")["video"][:][0]["bytes"] == b"png"
    with pytest.raises(
        ValueError, match=r"images: the dataset has no column 'video'; it has \['caption', 'picture'\]"
    ):
        load_videos(str(tmp_path / "images"))
    with pytest.raises(ValueError, match="parquet: .*test"):
        load_videos(sources["parquet"], split="test")


def test_streamed_rows_are_the_same(sources):
    for names in (None, ["swim", "jump", "run"]):
        streamed = load_videos(sources["parquet"], streaming=True, class_names=names)
        assert isinstance(streamed, IterableDataset)
        table = load_videos(sources["parquet"], class_names=names)
        assert [row["label"] for row in streamed] == table["label"][:]
        assert [row["video"] for row in streamed] == table["video"][:]
        assert get_label_names(streamed.features) == get_label_names(table.features)


def test_names_decide_and_not_numbers(sources):
    for form in ("saved", "parquet", "renamed"):
        table = load_videos(sources[form], class_names=["swim", "jump", "run"])
        assert table["label"][:] == [2, 1, 1, 2] and get_label_names(table.features) == ["swim", "jump", "run"]
        with pytest.raises(ValueError, match=r"the labels \['run'\] are not classes"):
            load_videos(sources[form], class_names=["jump", "swim"])
        # A model without names of its classes was trained on these numbers.
        assert load_videos(sources[form], class_names=["LABEL_0", "LABEL_1"])["label"][:] == LABELS


def test_labels_that_are_texts_lists_or_missing(tmp_path):
    Dataset.from_dict({"video": ["a.mp4", "b.mp4"], "label": ["run", "jump"]}).save_to_disk(tmp_path / "texts")
    table = load_videos(str(tmp_path / "texts"))
    assert get_label_names(table.features) == ["jump", "run"] and table["label"][:] == [1, 0]
    features = Features({"video": Value("string"), "label": List(ClassLabel(names=NAMES))})
    lists = Dataset.from_dict({"video": ["a.mp4", "b.mp4"], "label": [[0, 1], []]}, features=features)
    lists.save_to_disk(tmp_path / "lists")
    table = load_videos(str(tmp_path / "lists"), class_names=["jump", "run"])
    assert table["label"][:] == [[1, 0], []] and get_label_names(table.features) == ["jump", "run"]
    assert has_label_lists(table) and fit_labels("lists", table, NAMES, True)["label"][:] == [[0, 1], []]
    with pytest.raises(ValueError, match="lists, row 0: a video has 2 labels"):
        fit_labels("lists", table, NAMES, False)
    with pytest.raises(ValueError, match="lists: label 1 is too high for 1 classes"):
        fit_labels("lists", table, NAMES[:1], True)
    for label in (-1, None):
        hidden = Dataset.from_dict({"video": ["a.mp4", "b.mp4"], "label": [0, label]})
        with pytest.raises(ValueError, match=f"hidden, row 1: its label is {label}"):
            fit_labels("hidden", hidden, NAMES, False)


def test_paths_of_a_dataset_start_at_the_root(tmp_path, sources, caplog):
    load_videos(sources["parquet"], data_root="/videos")
    assert "data_root=/videos is not used" in caplog.text
    Dataset.from_dict({"video": ["a.mp4", "/b.mp4", "https://host/c.mp4"]}).save_to_disk(tmp_path / "saved")
    table = load_videos(str(tmp_path / "saved"), data_root="/videos")
    assert table["video"][:] == ["/videos/a.mp4", "/b.mp4", "https://host/c.mp4"]
    assert load_videos(str(tmp_path / "saved"))["video"][:][0] == "a.mp4"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", [Value("string"), Value("large_string"), Video(), Image(), Video(decode=False)])
def test_a_root_holds_for_parquet_of_paths(tmp_path, kind, streaming):
    """Paths as texts and in columns of videos, in a file, a folder and a stream of them."""
    names = ["a.mp4", "/b.mp4", None, "https://host/c.mp4"]
    features = Features({"video": kind, "n": Value("int64")})
    rows = Dataset.from_dict({"video": names, "n": [*range(4)]}, features=features).data.table
    (tmp_path / "shards").mkdir()
    # `Dataset.to_parquet` would read the files.
    rows = rows.replace_schema_metadata(features.arrow_schema.metadata)
    pyarrow.parquet.write_table(rows, tmp_path / "shards" / "train-0.parquet")
    for source in (tmp_path / "shards", tmp_path / "shards" / "train-0.parquet"):
        table = load_videos(str(source), data_root="/videos", streaming=streaming)
        found = [row["video"]["path"] if isinstance(row["video"], dict) else row["video"] for row in table]
        assert found == ["/videos/a.mp4", "/b.mp4", None, "https://host/c.mp4"]
        assert [row["n"] for row in table] == [0, 1, 2, 3]


def write_json(folder, rows, name="list.json"):
    text = "\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows)
    (folder / name).write_text(text, encoding="utf-8-sig")
    return str(folder / name)


@pytest.mark.parametrize("name", ["list.json", "list.jsonl"])
@pytest.mark.parametrize(
    "labels,expected,names",
    [
        (["run", "jump"], [1, 0], ["jump", "run"]),
        ([1, 0], [1, 0], None),
        (["1", "0"], [1, 0], None),
        ([["run", "jump"], ["jump"]], [[1, 0], [0]], ["jump", "run"]),
        ([["run", "jump"], "jump"], [[1, 0], [0]], ["jump", "run"]),
        ([[], [2, 0]], [[], [2, 0]], None),
    ],
)
def test_labels_of_json(tmp_path, name, labels, expected, names):
    rows = [
        {"video": address, "label": label} for address, label in zip(["a.mp4", "https://h/b"], labels, strict=True)
    ]
    table = load_videos(write_json(tmp_path, rows, name))
    assert table["label"][:] == expected and get_label_names(table.features) == names
    assert table["video"][:] == [str(tmp_path / "a.mp4"), "https://h/b"]
    if names:
        turned = load_videos(write_json(tmp_path, rows, name), class_names=["run", "x", "jump"])
        places = {0: 2, 1: 0}
        assert turned["label"][:] == [
            [places[i] for i in item] if isinstance(item, list) else places[item] for item in expected
        ]


@pytest.mark.parametrize(
    "rows,message",
    [
        (
            [{"path": "a.mp4", "label": 1}],
            r"object 0: expected a string under 'video'; its keys are \['label', 'path'\]",
        ),
        (["a.mp4"], "object 0: expected an object with 'video'"),
        ([{"video": ""}], "object 0: expected a string under 'video'"),
        ([{"video": "a.mp4", "label": {"name": "run"}}], r"the label of .*a\.mp4 is \{'name': 'run'\}"),
        ([{"video": "a.mp4", "label": True}], r"the label of .*a\.mp4 is True"),
        ([{"video": "a.mp4", "label": 1.5}], r"the label of .*a\.mp4 is 1\.5"),
        ([{"video": "a.mp4", "label": 1}, {"video": "b.mp4"}], r"the label of .*b\.mp4 is None"),
        ([{"video": "a.mp4", "label": 1}, {"video": "b.mp4", "label": "run"}], "some labels are numbers"),
        ([{"video": "a.mp4", "answer": "x"}, {"video": "b.mp4", "answer": 3}], "has values of several kinds"),
    ],
)
def test_other_objects_are_refused_by_name(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        load_videos(write_json(tmp_path, rows))


@pytest.mark.parametrize("name", ["list.csv", "list.txt", "list.json", "list.jsonl"])
def test_a_list_that_is_missing_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=rf"{name}: no such file; a list of videos is expected there"):
        load_videos(str(tmp_path / name))
    (tmp_path / name).mkdir()
    with pytest.raises(FileNotFoundError, match=rf"{name}: is a folder"):
        load_videos(str(tmp_path / name))


def test_broken_lines_are_named(tmp_path):
    (tmp_path / "list.jsonl").write_text('{"video": "a.mp4"}\n\n{"video"\n')
    with pytest.raises(ValueError, match=r"list\.jsonl, line 3 is not valid JSON"):
        load_videos(str(tmp_path / "list.jsonl"))


def test_a_column_that_holds_no_videos_is_named(tmp_path):
    Dataset.from_dict({"video": [[1, 2]]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="the column 'video' holds List"):
        load_videos(str(tmp_path / "saved"))
