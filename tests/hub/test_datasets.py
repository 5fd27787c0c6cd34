"""Datasets of the Hub as lists of videos, through the loopback Hub: loaded and streamed."""

import json
import subprocess
import sys

from datasets import ClassLabel, Dataset, Features, Video

from tests.unit.video_files import write_video

# In another process: `datasets` reads the address of the Hub when it is imported.
SCRIPT = """
import json
from umt_hf.data.annotations import identify_video
from umt_hf.data.labels import get_label_names
from umt_hf.data.sources import load_videos
found = []
for names in (None, ["jump", "swim", "run"]):
    for streaming in (False, True):
        table = load_videos("me/shapes", split="validation", streaming=streaming, class_names=names)
        rows = list(table)
        videos = [identify_video(row["video"], 0) for row in rows]
        found.append([[row["label"] for row in rows], get_label_names(table.features), videos])
print(json.dumps(found))
"""


def run(hub, tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=hub.environment(home=tmp_path / "home"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_a_dataset_with_video_and_class_label_columns(hub, tmp_path):
    videos = [write_video(tmp_path / f"{i}.mp4", num_frames=4 + i).read_bytes() for i in range(3)]
    features = Features({"video": Video(), "label": ClassLabel(names=["run", "jump"])})
    rows = {"video": [{"path": None, "bytes": content} for content in videos], "label": [1, 0, 1]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "validation.parquet")
    files = {"data/validation-00000-of-00001.parquet": (tmp_path / "validation.parquet").read_bytes()}
    hub.add_repo("me/shapes", files, repo_type="dataset")
    loaded, streamed, renumbered, renumbered_stream = run(hub, tmp_path)
    assert loaded == streamed and loaded[:2] == [[1, 0, 1], ["run", "jump"]] and len(set(loaded[2])) == 3
    assert renumbered == renumbered_stream and renumbered[:2] == [[0, 2, 0], ["jump", "swim", "run"]]
