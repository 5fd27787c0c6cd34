"""Low-data and corrupted variants of the embedded data set: balanced, deterministic, labels left alone."""

import collections
import csv
import json
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from umt_hf.cli import app
from umt_hf.data.sources import load_videos
from umt_hf.moving_shapes import variants as moving_shapes_variants
from umt_hf.moving_shapes.render import render_clip, sample_clip, write_moving_shapes
from umt_hf.moving_shapes.variants import (
    CORRUPTIONS,
    SEVERITIES,
    corrupt_clip,
    draw_shown_frames,
    write_corrupted_test,
    write_low_data,
)
from umt_hf.processing.decoding import open_video

FORMATS = (".csv", "_motion.csv", "_appearance.csv", "_captions.json", "_questions.json", "_boxes.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_moving_shapes(tmp_path_factory.mktemp("shapes") / "data", 2, 1, 3, seed=5)


@pytest.fixture
def large_folder(folder, tmp_path, monkeypatch):
    """As if 3,000 training clips had been rendered: the split reads no video, and here draws none for its boxes."""
    monkeypatch.setattr(moving_shapes_variants, "render_clip", lambda clip: (None, np.zeros((24, 4), int)))
    copy = shutil.copytree(folder, tmp_path / "large")
    settings = json.loads((copy / "moving_shapes.json").read_text())
    settings["num_clips"]["train"] = 3000
    (copy / "moving_shapes.json").write_text(json.dumps(settings))
    return copy


def corrupt(corruption, severity="medium", seed=0):
    frames, boxes = render_clip(sample_clip(0, "test", 0))
    return frames, boxes, *corrupt_clip(frames, boxes, corruption, severity, np.random.default_rng(seed))


def test_low_data_split_is_balanced_and_takes_the_first_clips(large_folder):
    before = {path: path.read_bytes() for path in large_folder.rglob("*.*")}
    write_low_data(large_folder, 0.1)
    labels = {
        task: list(csv.reader((large_folder / f"train_low_data_{task}.csv").open()))
        for task in ("motion", "appearance")
    }
    for rows, num_classes in ((labels["motion"], 4), (labels["appearance"], 36)):
        counts = collections.Counter(label for _, label in rows)
        assert len(counts) == num_classes and set(counts.values()) == {288 // num_classes}
    pairs = collections.Counter(
        (motion, appearance) for (_, motion), (_, appearance) in zip(*labels.values(), strict=True)
    )
    assert len(pairs) == 144 and set(pairs.values()) == {2}
    indices = [int(name[-9:-4]) for name, _ in labels["motion"]]
    assert indices == sorted(set(indices)) and indices[:10] == list(range(10))
    assert all((large_folder / f"train_low_data{suffix}").is_file() for suffix in FORMATS)
    captions = json.loads((large_folder / "train_low_data_captions.json").read_text())
    assert captions[0]["caption"] == sample_clip(5, "train", 0).caption
    assert all(path.read_bytes() == content for path, content in before.items())


def test_low_data_split_is_refused_where_it_cannot_be_balanced(folder, large_folder, tmp_path):
    with pytest.raises(ValueError, match="render more training clips or lower the ratio"):
        write_low_data(folder, 0.5)
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        write_low_data(large_folder, 0.0)
    with pytest.raises(FileNotFoundError, match="no moving shapes there"):
        write_low_data(tmp_path, 0.1)


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_corruption_changes_pixels_the_more_the_more_severe_and_hangs_on_its_seed(corruption):
    changes = []
    for severity in SEVERITIES:
        frames, boxes, changed, changed_boxes = corrupt(corruption, severity)
        assert changed.shape == frames.shape and changed.dtype == np.uint8 and changed_boxes.shape == boxes.shape
        changes.append(np.abs(changed.astype(float) - frames).mean())
    assert 0 < changes[0] < changes[1] < changes[2]
    np.testing.assert_array_equal(corrupt(corruption)[2], corrupt(corruption)[2])
    if corruption != "blur":  # nothing of it is drawn
        assert any((corrupt(corruption, seed=seed)[2] != corrupt(corruption)[2]).any() for seed in (1, 2, 3, 4))


def test_dropped_frames_keep_their_order_and_the_boxes_follow():
    for seed in range(20):
        shown = draw_shown_frames(24, 0.4, np.random.default_rng(seed))
        assert shown[0] == 0 and (np.diff(shown) >= 0).all() and (shown <= np.arange(24)).all()
        assert len(set(shown)) == 24 - round(0.4 * 24)
    frames, boxes, changed, changed_boxes = corrupt("frame_drops")
    for frame, box in zip(changed, changed_boxes, strict=True):
        assert any((frames[i] == frame).all() and (boxes[i] == box).all() for i in range(24))


def test_occluder_stays_where_it_is():
    frames, _, changed, _ = corrupt("occlusion", "strong")
    touched = (changed == 128).all(axis=(0, 3))
    assert touched.sum() >= 32 * 32
    np.testing.assert_array_equal(changed[:, ~touched], frames[:, ~touched])


def test_corrupted_split_has_the_intact_clips_labels(folder, tmp_path):
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    write_corrupted_test(folder, "noise", "strong", num_clips=2)
    for suffix in FORMATS[:3]:
        intact = list(csv.reader((folder / f"test{suffix}").open()))[:2]
        corrupted = list(csv.reader((folder / f"test_noise_strong{suffix}").open()))
        assert [label for _, label in corrupted] == [label for _, label in intact]
    for suffix in FORMATS[3:]:
        intact, corrupted = (
            json.loads((folder / f"{split}{suffix}").read_text()) for split in ("test", "test_noise_strong")
        )
        for one, other in zip(intact, corrupted, strict=False):
            assert one.pop("video").replace("test/", "test_noise_strong/") == other.pop("video")
            assert one == other
    table = load_videos(str(folder / "test_noise_strong_motion.csv"))
    with open_video(table[0]["video"]) as noisy, open_video(folder / "videos/test/00000.mp4") as intact:
        difference = noisy.get_frames([0, 23]).astype(float) - intact.get_frames([0, 23])
    assert np.abs(difference).mean() > 10
    assert all(path.read_bytes() == content for path, content in before.items())

    video = folder / "videos/test_noise_strong/00001.mp4"
    content, written = video.read_bytes(), video.stat().st_mtime_ns
    write_corrupted_test(folder, "noise", "strong", num_clips=2)
    assert video.stat().st_mtime_ns == written
    other = write_moving_shapes(tmp_path / "other", 1, 1, 3, seed=5)
    write_corrupted_test(other, "noise", "strong", num_workers=1)
    assert (other / "videos/test_noise_strong/00001.mp4").read_bytes() == content


def test_unknown_corruptions_are_refused(folder):
    with pytest.raises(ValueError, match="corruption must be one of"):
        write_corrupted_test(folder, "fog")
    with pytest.raises(ValueError, match="severity must be one of"):
        write_corrupted_test(folder, "noise", "7")
    with pytest.raises(ValueError, match="3 test clips, 4"):
        write_corrupted_test(folder, "noise", num_clips=4)


def test_command_adds_variants(folder):
    arguments = ["data", "moving-shapes", str(folder), "--seed", "5", "--num-train-clips", "2"]
    arguments += ["--num-validation-clips", "1", "--num-test-clips", "3", "--num-corrupted-clips", "1"]
    arguments += ["--corruption", "blur", "--corruption", "frame_drops", "--severity", "mild"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for split in ("test_blur_mild", "test_frame_drops_mild"):
        assert len((folder / f"{split}_motion.csv").read_text().splitlines()) == 1
    refused = CliRunner().invoke(app, [*arguments, "--low-data-ratio", "0.5"])
    message = " ".join(refused.output.replace("│", " ").split())
    assert refused.exit_code == 2 and "render more training clips or lower the ratio" in message
