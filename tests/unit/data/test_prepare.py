"""Videos to shards: the frames kept, what goes with them, kills, several processes, mistakes."""

import json
import os
import signal
import tarfile
import time

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.faults.kill import list_orphans
from tests.processes import run_ranks, run_until, start_process
from tests.unit.shard_files import write_parquets, write_tar
from tests.unit.video_files import write_video
from umt_hf.cli import app
from umt_hf.data.labels import get_label_names
from umt_hf.data.prepare import ShardSettings, prepare_shards
from umt_hf.data.sources import load_videos
from umt_hf.data.streams import count_stored_frames, load_shards
from umt_hf.processing.clips import read_clip
from umt_hf.processing.decoding import VideoDecodingError, open_video

SETTINGS = ShardSettings(num_frames=8, short_side=32, videos_per_shard=2)


@pytest.fixture
def videos(tmp_path):
    """Seven videos of 5 to 23 frames, one of them cut, and a list with captions and labels."""
    (tmp_path / "videos").mkdir()
    for number in range(7):
        write_video(tmp_path / "videos" / f"{number}.mp4", num_frames=5 + 3 * number, width=96, height=64)
    cut = tmp_path / "videos" / "3.mp4"
    cut.write_bytes(cut.read_bytes()[:300])
    rows = [{"video": f"videos/{i}.mp4", "caption": f"text {i}", "label": i % 3} for i in range(7)]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    return tmp_path


def list_contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def test_frames_captions_and_labels_are_kept(videos):
    report = prepare_shards([str(videos / "list.json")], videos / "out", SETTINGS, num_workers=0)
    assert (report.num_videos, report.num_shards, report.num_written, report.num_unreadable) == (7, 4, 4, 1)
    assert sorted(list_contents(videos / "out")) == [f"train-{number:06d}.tar" for number in range(4)]
    assert (videos / "out" / "unreadable.txt").read_text().startswith(f"{videos}/videos/3.mp4: ")
    shards = load_shards(str(videos / "out"), needs_captions=True)
    assert [shards[i]["caption"] for i in range(6)] == [f"text {i}" for i in (0, 1, 2, 4, 5, 6)]
    assert count_stored_frames(shards) == 8
    with open_video(shards[5]["video"]) as kept, open_video(videos / "videos" / "6.mp4") as video:
        assert (kept.num_frames, kept.height, kept.width, kept.fps) == (8, 32, 48, None)
        assert kept.name.endswith("train-000003.tar/000000006.frames.mjpeg")
        chosen = video.get_frames([1, 4, 7, 10, 12, 15, 18, 21])[:, ::2, ::2].astype(float)
        assert np.abs(kept.get_frames(range(8)) - chosen).mean() < 12
    with open_video(shards[0]["video"]) as kept:
        assert kept.num_frames == 5  # all of a short one
    assert json.loads((videos / "out" / "train.prepare.json").read_text())["num_frames"] == 8


def test_a_clip_of_kept_frames_is_the_clip_of_the_video(tmp_path):
    """Where all frames are kept, training draws the same ones; they differ by what JPEG loses."""
    video = write_video(tmp_path / "a.mp4", num_frames=20, width=96, height=64)
    prepare_shards([str(video)], tmp_path / "out", ShardSettings(short_side=64), num_workers=0)
    kept = load_shards(str(tmp_path / "out"))[0]["video"]
    for seed in range(3):
        clips = [
            read_clip(source, 4, "segments", generator=torch.Generator().manual_seed(seed)).float()
            for source in (kept, str(video))
        ]
        assert clips[0].shape == clips[1].shape == (4, 3, 64, 96)
        assert (clips[0] - clips[1]).abs().mean() < 6


def test_folders_files_and_parquet(videos):
    content = (videos / "videos" / "0.mp4").read_bytes()
    write_parquets(videos / "parquet", [{"video": {"bytes": content, "path": None}, "caption": "of bytes"}], 1)
    sources = [str(videos / "videos"), str(videos / "videos" / "1.mp4"), str(videos / "parquet")]
    report = prepare_shards(sources, videos / "out", SETTINGS, num_workers=0)
    assert report.num_videos == 9
    shards = load_shards(str(videos / "out"))
    assert len(shards) == 8 and shards[7]["caption"] == "of bytes"


@pytest.mark.heavy
def test_a_killed_run_goes_on_to_the_same_shards(videos):
    sources, whole = [str(videos / "list.json")], videos / "whole"
    prepare_shards(sources, whole, SETTINGS, num_workers=0)
    out = videos / "out"
    run_until(out, "*.tar", prepare_shards, sources, out, SETTINGS, None, 0)
    left = list_contents(out)
    assert left.items() <= list_contents(whole).items()  # complete or absent
    # As of a kill between a shard and the note that it is there, and in the middle of a shard.
    first = out / "done" / "train-000000.json"
    first.unlink(missing_ok=True)
    (out / "train-000002.tar.unfinished").write_bytes(b"half")
    report = prepare_shards(sources, out, SETTINGS, num_workers=0)
    assert list_contents(out) == list_contents(whole) and report.num_missing == 0
    assert (out / "unreadable.txt").read_text() == (whole / "unreadable.txt").read_text()
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert prepare_shards(sources, out, SETTINGS, num_workers=0).num_written == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.tar")} == times
    assert not list(out.glob("*.unfinished"))


def prepare_in_a_group(*arguments) -> None:
    os.setsid()
    prepare_shards(*arguments)


@pytest.mark.heavy
def test_workers_end_with_a_killed_command(videos):
    output = videos / "output"
    arguments = ([str(videos / "list.json")], videos / "out", SETTINGS, None, 1)
    process = start_process(prepare_in_a_group, *arguments, environment={}, output=output)
    deadline = time.monotonic() + 120
    while not list((videos / "out").glob("*.tar*")) and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and list_orphans([process.pid]) == []


def test_a_process_waits_for_no_other_one(videos, monkeypatch):
    """One of two that never started, or was killed."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, value)
    words = ["prepare", str(videos / "list.json"), "--out", str(videos / "out"), "--videos-per-shard", "2"]
    done = CliRunner().invoke(app, [*words, "--num-workers", "0"])
    assert done.exit_code == 0, done.output
    assert sorted(list_contents(videos / "out")) == ["train-000001.tar", "train-000003.tar"]


def test_processes_share_the_shards(videos, monkeypatch):
    """By their number, as any launcher sets it, on one machine or several."""
    sources = [str(videos / "list.json")]
    prepare_shards(sources, videos / "one", SETTINGS, num_workers=0)
    monkeypatch.setenv("WORLD_SIZE", "3")
    reports = []
    for rank in (2, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        reports.append(prepare_shards(sources, videos / "three", SETTINGS, num_workers=0))
    assert [report.num_written for report in reports] == [1, 2, 1]
    assert [report.num_missing for report in reports] == [3, 1, 0]
    assert list_contents(videos / "three") == list_contents(videos / "one")
    assert (videos / "three" / "unreadable.txt").read_text() == (videos / "one" / "unreadable.txt").read_text()


def test_two_processes_at_once_write_the_bytes_of_one(videos):
    """As `torchrun` starts them; one that is killed leaves what the same command, in one process, completes."""
    sources = [str(videos / "list.json")]
    prepare_shards(sources, videos / "one", SETTINGS, num_workers=0)
    run_ranks(prepare_shards, sources, videos / "two", SETTINGS, None, 0)
    assert list_contents(videos / "two") == list_contents(videos / "one")
    assert (videos / "two" / "unreadable.txt").read_text() == (videos / "one" / "unreadable.txt").read_text()
    (videos / "two" / "train-000001.tar").unlink()  # that of the second process, which died
    assert prepare_shards(sources, videos / "two", SETTINGS, num_workers=0).num_written == 1
    assert list_contents(videos / "two") == list_contents(videos / "one")


def test_other_settings_and_lists_are_refused(videos):
    sources, out = [str(videos / "list.json")], videos / "out"
    prepare_shards(sources, out, SETTINGS, num_workers=0)
    with pytest.raises(ValueError, match=r"holds shards with other settings or videos \(quality\). Choose another"):
        prepare_shards(sources, out, ShardSettings(8, 32, 70, 2), num_workers=0)
    (videos / "list.json").write_text(json.dumps([{"video": "videos/0.mp4"}]))
    with pytest.raises(ValueError, match=r"other settings or videos \(list, num_videos\)"):
        prepare_shards(sources, out, SETTINGS, num_workers=0)
    prepare_shards(sources, out, ShardSettings(8, 32, 70, 2, "validation"), num_workers=0)  # beside it
    for changes in ({"num_frames": 0}, {"quality": 101}):
        with pytest.raises(ValueError, match=f"{next(iter(changes))} must be at"):
            ShardSettings(**changes)


@pytest.mark.parametrize("name", ["caption", "label"])
def test_an_edited_list_is_refused_as_another_one(videos, name):
    """Captions and labels go into the shards: those of before must not stay, nor mix with those of now."""
    sources, out = [str(videos / "list.json")], videos / "out"
    prepare_shards(sources, out, SETTINGS, num_workers=0)
    (out / "train-000003.tar").unlink()  # as of a kill
    rows = json.loads((videos / "list.json").read_text())
    rows[0][name] = "text 9" if name == "caption" else 2
    (videos / "list.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"with other settings or videos \(captions_and_labels\)"):
        prepare_shards(sources, out, SETTINGS, num_workers=0)
    assert not (out / "train-000003.tar").exists()


def test_unreadable_videos_of_all_splits_stay_listed(videos):
    """The guide's own two commands, one after the other."""
    (videos / "videos" / "2.mp4").write_bytes(b"no video")
    for split, numbers in (("train", (0, 3)), ("validation", (1, 2))):
        (videos / f"{split}.json").write_text(json.dumps([{"video": f"videos/{number}.mp4"} for number in numbers]))
        settings = ShardSettings(8, 32, 85, 2, split)
        report = prepare_shards([str(videos / f"{split}.json")], videos / "out", settings, num_workers=0)
        assert report.num_unreadable == 1
    listed = (videos / "out" / "unreadable.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in listed] == [f"{videos}/videos/{number}.mp4" for number in (3, 2)]


def test_an_unreadable_video_is_tried_again_once_its_file_changes(videos):
    """And what the shard holds already stays, also where those videos have gone since."""
    source, out = str(videos / "list.json"), videos / "out"
    prepare_shards([source], out, SETTINGS, num_workers=0)
    assert prepare_shards([source], out, SETTINGS, num_workers=0).num_written == 0
    (videos / "videos" / "2.mp4").rename(videos / "2.mp4")
    content = (videos / "videos" / "3.mp4").read_bytes()
    (videos / "videos" / "3.mp4").write_bytes(content[:200])  # as bad as before
    again = prepare_shards([source], out, SETTINGS, num_workers=0)
    assert (again.num_written, again.num_unreadable) == (1, 1)
    (videos / "videos" / "3.mp4").unlink()  # nothing to be tried
    assert prepare_shards([source], out, SETTINGS, num_workers=0).num_written == 0
    write_video(videos / "videos" / "3.mp4", num_frames=14, width=96, height=64)
    report = prepare_shards([source], out, SETTINGS, num_workers=0)
    assert (report.num_written, report.num_unreadable) == (1, 0) and not (out / "unreadable.txt").exists()
    (videos / "2.mp4").rename(videos / "videos" / "2.mp4")
    prepare_shards([source], videos / "anew", SETTINGS, num_workers=0)
    assert list_contents(out) == list_contents(videos / "anew")


def test_a_note_without_files_has_its_unreadable_videos_tried_again(videos):
    """As earlier versions wrote them."""
    source, out = str(videos / "list.json"), videos / "out"
    prepare_shards([source], out, SETTINGS, num_workers=0)
    note = out / "done" / "train-000001.json"
    content = json.loads(note.read_text())
    note.write_text(json.dumps({name: content[name] for name in ("videos", "unreadable")}))
    found = [prepare_shards([source], out, SETTINGS, num_workers=0) for _ in range(2)]
    assert [(report.num_written, report.num_unreadable) for report in found] == [(1, 1), (0, 1)]


def test_shards_of_a_former_version_go_on(videos):
    """Their note does not say what captions they had."""
    sources, out = [str(videos / "list.json")], videos / "out"
    prepare_shards(sources, out, SETTINGS, num_workers=0)
    note = json.loads((out / "train.prepare.json").read_text())
    del note["captions_and_labels"]
    (out / "train.prepare.json").write_text(json.dumps(note))
    assert prepare_shards(sources, out, SETTINGS, num_workers=0).num_written == 0


def test_damaged_pictures_are_named(tmp_path):
    video = write_video(tmp_path / "a.mp4", num_frames=4)
    prepare_shards([str(video)], tmp_path / "out", num_workers=0)
    content = load_shards(str(tmp_path / "out"))[0]["video"]["bytes"]
    for number, bad in enumerate((content[:-2], b"", content[4:], b"\xff\xd8junk\xff\xd9")):
        (tmp_path / f"{number}.frames.mjpeg").write_bytes(bad)
        with pytest.raises(
            VideoDecodingError, match=f"{number}.frames.mjpeg: (is not a complete row|is empty|cannot be decoded)"
        ):
            read_clip(str(tmp_path / f"{number}.frames.mjpeg"), 2)


def test_the_command(videos):
    runner = CliRunner()
    common = ["--out", str(videos / "out"), "--videos-per-shard", "3", "--num-workers", "0"]
    done = runner.invoke(app, ["prepare", str(videos / "list.json"), *common, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["num_written"] == 3
    again = runner.invoke(app, ["prepare", str(videos / "list.json"), *common])
    assert "3 of 3 shards, 0 of them written now" in again.stdout and "1 videos could not be read" in again.stdout
    failed = runner.invoke(app, ["prepare", str(videos / "absent.json"), *common])
    assert failed.exit_code == 2 and "absent.json: no such file" in failed.stderr


def test_tars_are_read_as_lists_with_captions_and_labels(videos):
    """A tar, a folder of them, and what this command wrote; each gives the shards that the videos give."""
    names = [f"{number}.mp4" for number in (0, 1, 2, 4, 5, 6)]
    rows = [
        {"mp4": (videos / "videos" / name).read_bytes(), "json": {"caption": f"text {name}", "label": "run"}}
        for name in names
    ]
    write_tar(videos / "tars" / "a.tar", rows[:4])
    write_tar(videos / "tars" / "b.tar", rows[4:])
    report = prepare_shards([str(videos / "tars")], videos / "out", SETTINGS, num_workers=0)
    assert (report.num_videos, report.num_unreadable) == (6, 0)
    single = prepare_shards([str(videos / "tars" / "a.tar")], videos / "single", SETTINGS, num_workers=0)
    assert (single.num_videos, single.num_unreadable) == (4, 0)
    table = load_videos(str(videos / "out"))
    assert table["caption"][:] == [f"text {name}" for name in names] and get_label_names(table.features) == ["run"]
    shards = load_shards(str(videos / "out"))
    with tarfile.open(videos / "out" / "train-000000.tar") as tar:
        notes = json.load(tar.extractfile("000000000.json"))
    assert notes["source"] == f"{videos}/tars/a.tar/a_0000.mp4"
    # Its own shards again: fewer and smaller frames, with captions and labels.
    smaller = ShardSettings(num_frames=4, short_side=16, videos_per_shard=3)
    again = prepare_shards([str(videos / "out")], videos / "again", smaller, num_workers=0)
    assert (again.num_videos, again.num_unreadable) == (6, 0)
    kept = load_shards(str(videos / "again"))
    with open_video(kept[5]["video"]) as few, open_video(shards[5]["video"]) as many:
        assert (few.num_frames, few.height, few.width) == (4, 16, 24) and many.num_frames == 8
        middle = many.get_frames([1, 3, 5, 7])[:, ::2, ::2].astype(float)
        assert np.abs(few.get_frames(range(4)) - middle).mean() < 20
    assert load_videos(str(videos / "again"))["caption"][:] == table["caption"][:]


def test_more_or_larger_frames_than_are_kept_are_refused(videos):
    prepare_shards([str(videos / "list.json")], videos / "out", SETTINGS, num_workers=0)
    for source in (videos / "out", videos / "out" / "train-000000.tar"):
        for settings, said in (
            (ShardSettings(num_frames=9, short_side=32), r"--num-frames 9 is more than the 8 that are kept"),
            (ShardSettings(num_frames=8, short_side=33), r"--short-side 33 is more than the 32 that are kept"),
            (ShardSettings(), r"--num-frames 32 is more than the 8 that are kept"),
        ):
            with pytest.raises(ValueError, match=rf"{source}: {said}.*prepare the videos themselves"):
                prepare_shards([str(source)], videos / "again", settings, num_workers=0)
            assert not list((videos / "again").glob("*.prepare.json"))
    # Without the notes, the frames of some videos say it.
    (videos / "out" / "train.prepare.json").unlink()
    with pytest.raises(ValueError, match="--num-frames 32 is more than the 8 that are kept"):
        prepare_shards([str(videos / "out")], videos / "again", ShardSettings(), num_workers=0)


def test_shards_of_a_split_are_prepared_by_its_name(videos):
    for split in ("train", "validation"):
        settings = ShardSettings(num_frames=8, short_side=32, videos_per_shard=4, split=split)
        prepare_shards([str(videos / "list.json")], videos / "out", settings, num_workers=0)
    smaller = ShardSettings(num_frames=4, short_side=32, split="validation")
    prepare_shards([str(videos / "out")], videos / "again", smaller, num_workers=0)
    with tarfile.open(videos / "again" / "validation-000000.tar") as tar:
        assert "validation-000000.tar" in json.load(tar.extractfile("000000000.json"))["source"]
