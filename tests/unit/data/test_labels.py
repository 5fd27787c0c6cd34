"""Labels that no list of videos should have."""

import json
from pathlib import Path

import pytest

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
