"""Labels that no list of videos should have."""

import json

import pytest

from umt_hf.data.sources import load_videos


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
