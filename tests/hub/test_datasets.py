"""Datasets of the Hub as lists of videos, through the loopback Hub: loaded and streamed."""

import json
import subprocess
import sys

from datasets import ClassLabel, Dataset, Features, Video

from tests.unit.shard_files import write_parquets, write_tar
from tests.unit.video_files import write_video
from umt_hf.data.annotations import identify_video
from umt_hf.data.prepare import ShardSettings, prepare_shards

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


def run(hub, tmp_path, script=SCRIPT):
    result = subprocess.run(
        [sys.executable, "-c", script],
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


SHARDS = """
import json
from umt_hf.data.annotations import identify_video
from umt_hf.data.streams import load_shards
shards = load_shards("me/shapes", "validation")
print(json.dumps([[identify_video(shards[i]["video"], i) for i in (2, 0, 1)], shards.paths]))
"""

TARS = """
import json
from umt_hf.data.labels import get_label_names
from umt_hf.data.sources import load_videos
from umt_hf.data.streams import load_shards
from umt_hf.processing.decoding import open_video
shards = load_shards("me/tars", "validation")
frames = []
for video in (*(shards[i]["video"] for i in range(3)), *load_videos("me/tars", split="validation")["video"]):
    with open_video(video) as reader:
        frames.append(int(reader.get_frames([0, reader.num_frames - 1]).sum()))
table = load_videos("me/tars", split="validation", class_names=["swim", "run", "jump"])
try:
    load_videos("me/tars", split="other")
except ValueError as error:
    refusal = str(error)
print(json.dumps([frames, table["label"][:], get_label_names(table.features), shards.paths, refusal]))
"""


def test_parquet_on_the_hub_is_read_where_it_is(hub, tmp_path):
    """By row and group, with no file of it kept on this machine."""
    videos = [write_video(tmp_path / f"{i}.mp4", num_frames=4 + i).read_bytes() for i in range(3)]
    rows = [{"video": {"path": None, "bytes": content}} for content in videos]
    write_parquets(tmp_path / "parquet", rows, 3, rows_per_group=2)
    content = (tmp_path / "parquet" / "train-00000.parquet").read_bytes()
    hub.add_repo("me/shapes", {"data/validation-00000-of-00001.parquet": content}, repo_type="dataset")
    found, paths = run(hub, tmp_path, SHARDS)
    assert found == [identify_video(videos[i], i) for i in (2, 0, 1)]
    assert paths[0].startswith("hf://datasets/me/shapes@") and not list((tmp_path / "home").rglob("*.parquet"))


def test_tars_on_the_hub_are_fetched_once(hub, tmp_path):
    """Those of the split alone; as a stream for pre-training, and as a table with labels by name."""
    videos = [tmp_path / "videos" / name / f"{i}.mp4" for i, name in enumerate(("run", "jump", "run"))]
    for i, path in enumerate(videos):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, num_frames=4 + i)
    settings = ShardSettings(videos_per_shard=2, split="validation")
    prepare_shards([str(tmp_path / "videos")], tmp_path / "shards", settings, num_workers=0)
    written = [file for file in (tmp_path / "shards").iterdir() if file.suffix in (".tar", ".json")]
    files = {file.name: file.read_bytes() for file in written}
    train = write_tar(tmp_path / "train-000000.tar", [{"mp4": videos[0].read_bytes()}])
    hub.add_repo("me/tars", {**files, train.name: train.read_bytes()}, repo_type="dataset")
    frames, labels, names, paths, refusal = run(hub, tmp_path, TARS)
    assert frames[:3] == frames[3:] and len(set(frames)) == 3
    assert (labels, names) == ([2, 1, 1], ["swim", "run", "jump"])
    expected = ["validation-000000.tar", "validation-000001.tar"]
    assert sorted(path.rpartition("/")[2] for path in paths) == expected
    assert sorted({path.name for path in (tmp_path / "home").rglob("*.tar")}) == expected
    assert "has no split 'other'" in refusal
    assert hub.count_requests(r"^GET .*validation-000000\.tar") == 1


FILES = """
import json
from umt_hf.data.sources import load_videos
from umt_hf.data.video_files import list_videos
from umt_hf.processing.decoding import VideoDecodingError, open_video

found, _ = list_videos(["hf://datasets/me/files/videos"])
rows = load_videos("hf://datasets/me/files/list.csv")
with open_video(rows[0]["video"]) as reader:
    size = [reader.num_frames, reader.height]
try:
    open_video("hf://datasets/me/files/none.mp4")
except VideoDecodingError as error:
    print(json.dumps([[video.path for video in found], rows["video"][:], rows["label"][:], size, str(error)]))
"""


def test_files_of_a_dataset_are_addresses(hub, tmp_path):
    content = write_video(tmp_path / "clip.mp4", num_frames=5).read_bytes()
    files = {"videos/run/a.mp4": content, "videos/jump/b.mp4": content, "list.csv": b"videos/run/a.mp4,1\n"}
    hub.add_repo("me/files", files, repo_type="dataset")
    videos, listed, labels, size, error = run(hub, tmp_path, FILES)
    start = "hf://datasets/me/files"
    assert videos == [f"{start}/videos/jump/b.mp4", f"{start}/videos/run/a.mp4"]
    assert (listed, labels, size) == ([f"{start}/videos/run/a.mp4"], [1], [5, 64])
    assert error == f"{start}/none.mp4: no such file. Check the address."
