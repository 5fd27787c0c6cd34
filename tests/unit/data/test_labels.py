"""Labels that no list of videos should have."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit.shard_files import write_tar
from umt_hf.data.key_frames import load_key_frames
from umt_hf.data.sources import load_videos

pytestmark = pytest.mark.usefixtures("list_store")


@pytest.mark.parametrize("name", ["list.csv", "list.json"])
def test_a_label_of_a_trillion_is_warned_of_at_once(name, tmp_path, caplog):
    """Found by properties: every number below it was put into a set, which ended the process."""
    rows = [{"video": "a.mp4", "label": 10**12}, {"video": "b.mp4", "label": 1}]
    lines = [f"{row['video']},{row['label']}" for row in rows]
    (tmp_path / name).write_text("\n".join(lines) if name.endswith("csv") else json.dumps(rows), encoding="utf-8")
    assert load_videos(str(tmp_path / name))["label"][:] == [10**12, 1]
    assert "999999999999 numbers have no video: ['0', '2', '3', '4', '5'] and 999999999994 more" in caplog.text


@pytest.mark.parametrize(("key", "value"), [("label", 10**30), ("caption", 10**30), ("caption", "\ud800")])
def test_values_that_no_table_holds_are_named_with_their_file(key, value, tmp_path):
    path = tmp_path / "list.json"
    path.write_text(json.dumps([{"video": "a.mp4", key: value}]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"list\.json: "):
        load_videos(str(path))


def write_classes(folder: Path, names: list[str], kind: str) -> Path:
    """Videos of these classes as folders, a CSV list, a JSON list or key frames."""
    if kind == "folder":
        for name in names:
            (folder / name).mkdir()
            (folder / name / "a.mp4").touch()
        return folder
    if kind == "csv":
        (folder / "list.csv").write_text("".join(f"{i}.mp4,{name}\n" for i, name in enumerate(names)))
        return folder / "list.csv"
    rows = [{"video": f"{i}.mp4", "label": name} for i, name in enumerate(names)]
    if kind == "key frames":
        objects = [[{"box": [1, 2, 3, 4], "labels": [name]}] for name in names]
        rows = [
            {"video": row["video"], "key_seconds": 1, "objects": found}
            for row, found in zip(rows, objects, strict=True)
        ]
    (folder / "list.json").write_text(json.dumps(rows))
    return folder / "list.json"


@pytest.mark.parametrize("kind", ["folder", "csv", "json", "key frames"])
def test_classes_that_differ_in_case_alone_are_warned_of(kind, tmp_path, caplog):
    load = load_key_frames if kind == "key frames" else load_videos
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    path = write_classes(tmp_path / "one", ["Cat", "cat", "dog"], kind)
    load(str(path))
    assert f"{path}: the classes Cat and cat differ in upper and lower case alone" in caplog.text
    caplog.clear()
    load(str(write_classes(tmp_path / "two", ["Cat", "dog"], kind)))
    assert "upper and lower case" not in caplog.text


@pytest.mark.parametrize("label", ["9" * 20, "9" * 400, "9" * 5000, "-" + "9" * 20, "99999999999999999999.0"])
@pytest.mark.parametrize("form", ["path,label", "folder,count,label", "header"])
def test_a_number_of_more_than_64_bits_is_named_with_its_line(form, label, tmp_path):
    lines = {
        "path,label": ["a.mp4,1", f"b.mp4,{label}"],
        "folder,count,label": ["a,3,1", f"b,3,{label}"],
        "header": ["video,label", f"b.mp4,{label}"],
    }[form]
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"list\.csv, line 2: (the label .* has more than 64 bits|expected `path)"):
        load_videos(str(tmp_path / "list.csv"))


@pytest.mark.parametrize("label", [10**20, str(10**20), [10**20], [str(10**20)]], ids=repr)
@pytest.mark.parametrize("form", ["list.json", "list.jsonl", "list.parquet", "list.tar"])
def test_a_number_of_more_than_64_bits_is_named_with_its_file(form, label, tmp_path):
    rows = [{"video": "a.mp4", "label": label}]
    if form == "list.parquet":
        if not isinstance(label, str):
            pytest.skip("No Parquet file holds it.")
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / form)
    elif form == "list.tar":
        write_tar(tmp_path / form, [{"mp4": b"x", "json": {"label": label}}])
    else:
        (tmp_path / form).write_text(json.dumps(rows if form == "list.json" else rows[0]))
    with pytest.raises(ValueError, match=rf"{form}: the label .* has more than 64 bits"):
        load_videos(str(tmp_path / form))


def test_digits_beyond_those_of_a_float_are_kept(tmp_path):
    (tmp_path / "list.csv").write_text("a.mp4,9007199254740993\nb.mp4,007\nc.mp4,3.0\n")
    assert load_videos(str(tmp_path / "list.csv"))["label"][:] == [9007199254740993, 7, 3]


@pytest.mark.parametrize("label", ['"1,0"', "1e3", '"[1, 2]"', "0.5", "1|2"])
def test_names_of_classes_that_look_like_numbers_are_warned_of(label, tmp_path, caplog):
    (tmp_path / "list.csv").write_text(f"a.mp4,{label}\nb.mp4,{label}\n")
    load_videos(str(tmp_path / "list.csv"))
    said = [record.getMessage() for record in caplog.records if "look like numbers" in record.getMessage()]
    assert len(said) == 1 and f"{tmp_path}/list.csv: the labels ['{label.strip(chr(34))}']" in said[0]


def test_names_of_classes_with_digits_in_them_are_not_warned_of(tmp_path, caplog):
    (tmp_path / "list.csv").write_text("a.mp4,3-point shot\nb.mp4,class 1\nc.mp4,-\n")
    load_videos(str(tmp_path / "list.csv"))
    assert "look like numbers" not in caplog.text
