"""The embedded data set: what its labels can and cannot be told from, and that its files are what they claim."""

import collections
import csv
import dataclasses
import itertools
import json

import av
import numpy as np
import pytest

from umt_hf.moving_shapes import render as moving_shapes
from umt_hf.moving_shapes.render import (
    APPEARANCES,
    COLORS,
    FRAME_SIZE,
    MOTIONS,
    NUM_FRAMES,
    SHAPES,
    compute_centers,
    render_clip,
    sample_clip,
    write_moving_shapes,
)
from umt_hf.processing.sampling import sample_frame_indices

HALF = NUM_FRAMES // 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("shapes")
    return write_moving_shapes(directory / "data", num_train_clips=6, num_validation_clips=2, num_test_clips=3, seed=5)


def decode(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        return frames, stream.codec_context.name, stream.codec_context.pix_fmt, float(stream.average_rate)


def test_motions_differ_by_the_order_of_identical_frames():
    """Turning the sense of a revolution plays its half backwards, so all motions share one set of frames."""
    clip = sample_clip(0, "train", 0)
    halves = {}
    for motion, senses in MOTIONS.items():
        frames, _ = render_clip(dataclasses.replace(clip, motion=motion))
        halves[senses] = frames[:HALF], frames[HALF:]
    for (first, second), (start, end) in halves.items():
        np.testing.assert_array_equal(start, halves[(1, 1)][0][::first])
        np.testing.assert_array_equal(end, halves[(1, 1)][1][::second])
    videos = {np.concatenate(parts).tobytes() for parts in halves.values()}
    assert len(videos) == len(MOTIONS)


def test_a_finer_drawing_shows_the_same():
    clip = sample_clip(0, "test", 3)
    (frames, boxes), (fine, fine_boxes) = render_clip(clip), render_clip(clip, scale=4)
    assert fine.shape == (NUM_FRAMES, 4 * FRAME_SIZE, 4 * FRAME_SIZE, 3)
    means = fine.reshape(NUM_FRAMES, FRAME_SIZE, 4, FRAME_SIZE, 4, 3).mean((2, 4))
    assert abs(means - frames).mean() < 1
    assert abs(fine_boxes - 4 * boxes).max() <= 4


def test_encoding_adds_no_trace_of_the_order(tmp_path):
    """A decoded frame depends on that frame alone: files of two motions hold equal frames, in another order."""
    clip = sample_clip(0, "train", 0)
    decoded = {}
    for motion, senses in MOTIONS.items():
        path = tmp_path / "clip.mp4"
        moving_shapes.write_video(path, render_clip(dataclasses.replace(clip, motion=motion))[0])
        decoded[senses] = decode(path)[0]
    for (first, second), frames in decoded.items():
        np.testing.assert_array_equal(frames[:HALF], decoded[(1, 1)][:HALF][::first])
        np.testing.assert_array_equal(frames[HALF:], decoded[(1, 1)][HALF:][::second])


@pytest.mark.parametrize("num_sampled", [2, 4, 8, 24])
def test_sampled_frames_of_all_motions_are_the_same_set(num_sampled):
    """Also what a sampler of equal segments picks: each choice under one motion has its mirror image under another."""
    clip = sample_clip(0, "train", 1)
    length = NUM_FRAMES // num_sampled
    rng = np.random.default_rng(0)
    for _ in range(20):
        offsets = rng.integers(length, size=num_sampled)
        for motion, senses in MOTIONS.items():
            mirrored = [
                half[::sense] if sense == 1 else length - 1 - half[::sense]
                for half, sense in zip(np.split(offsets, 2), senses, strict=True)
            ]
            chosen = np.arange(num_sampled) * length + np.concatenate(mirrored)
            centers = compute_centers(dataclasses.replace(clip, motion=motion))[chosen]
            if motion == "clockwise":
                expected = sorted(map(tuple, centers))
            assert sorted(map(tuple, centers)) == expected


def test_start_and_motion_are_independent_and_even():
    """No frame at a known time tells the motion: the angle is uniform under every label."""
    clips = [sample_clip(3, "train", index) for index in range(4000)]
    count = collections.Counter((clip.motion, int(clip.start_angle / (2 * np.pi) * 4)) for clip in clips)
    assert len(count) == 16
    chi_square = sum((observed - 250) ** 2 / 250 for observed in count.values())
    assert chi_square < 37.7  # 15 degrees of freedom, p = 0.001


def test_order_free_classifier_is_at_chance_and_ordered_one_is_not():
    """Nearest neighbours on true positions: sorted by place they know nothing, in time order they know the motion."""
    clips = [sample_clip(4, "train", index) for index in range(3000)]
    labels = np.array([list(MOTIONS).index(clip.motion) for clip in clips])
    chosen = sample_frame_indices(NUM_FRAMES, 8, "segments")
    centers = np.stack([compute_centers(clip)[chosen] - FRAME_SIZE / 2 for clip in clips])
    unordered = np.stack([sorted(map(tuple, c)) for c in centers.round(6)]).reshape(len(clips), -1)
    first_frame = centers[:, 0]
    ordered = centers.reshape(len(clips), -1)
    accuracy = [_compute_neighbour_accuracy(x, labels) for x in (first_frame, unordered, ordered)]
    assert abs(accuracy[0] - 0.25) < 0.045  # three standard errors for 1,000 clips
    assert abs(accuracy[1] - 0.25) < 0.045
    assert accuracy[2] > 0.95


def _compute_neighbour_accuracy(features, labels, num_test=1000, k=5):
    train, test = features[num_test:], features[:num_test]
    distances = ((test[:, None] - train[None]) ** 2).sum(axis=-1)
    votes = labels[num_test:][np.argpartition(distances, k, axis=1)[:, :k]]
    predicted = np.array([np.bincount(row).argmax() for row in votes])
    return (predicted == labels[:num_test]).mean()


def test_clockwise_is_clockwise_on_the_screen():
    clip = dataclasses.replace(sample_clip(0, "train", 0), motion="clockwise")
    x, y = (compute_centers(clip) - np.array(clip.orbit_center)).T
    turn = x[:-1] * y[1:] - y[:-1] * x[1:]  # y points down, so a positive turn is clockwise to the viewer
    assert (turn > 0).all()


def test_shape_stays_in_the_frame_and_the_box_is_tight():
    for index, shape in itertools.product(range(8), SHAPES):
        clip = dataclasses.replace(sample_clip(1, "test", index), shape=shape)
        _, boxes = render_clip(clip)
        assert boxes.shape == (NUM_FRAMES, 4)
        assert boxes.min() >= 0 and boxes.max() <= FRAME_SIZE
        sides = boxes[:, 2:] - boxes[:, :2]
        assert (sides >= 1.2 * clip.radius).all() and (sides <= 2.6 * clip.radius).all()
        middle = (boxes[:, 2:] + boxes[:, :2]) / 2
        assert np.abs(middle - compute_centers(clip)).max() < 0.35 * clip.radius


def test_shape_has_its_color():
    for index, (color, shape) in enumerate(itertools.product(COLORS, ("circle", "square"))):
        clip = dataclasses.replace(sample_clip(2, "train", index), color=color, shape=shape)
        frames, _ = render_clip(clip)
        x, y = compute_centers(clip).astype(int)[0]
        assert tuple(frames[0, y, x]) == COLORS[color]


def test_files_decode_to_what_was_rendered(folder):
    frames, codec, pixel_format, rate = decode(folder / "videos/train/00002.mp4")
    assert (codec, pixel_format, rate) == ("h264", "yuv420p", 8.0)
    rendered, _ = render_clip(sample_clip(5, "train", 2))
    assert frames.shape == rendered.shape
    assert np.abs(frames.astype(int) - rendered).mean() < 5


def test_content_depends_on_seed_split_and_index_alone(folder, tmp_path):
    other = write_moving_shapes(tmp_path / "other", 3, 1, 1, seed=5, num_workers=1)
    for name in ("train/00000", "train/00002", "validation/00000", "test/00000"):
        assert (other / f"videos/{name}.mp4").read_bytes() == (folder / f"videos/{name}.mp4").read_bytes()
    assert sample_clip(5, "train", 0) != sample_clip(5, "test", 0) != sample_clip(6, "test", 0)


def test_annotations_agree_with_each_other(folder):
    motions = json.loads((folder / "motion_labels.json").read_text())
    appearances = json.loads((folder / "appearance_labels.json").read_text())
    answers = set(json.loads((folder / "answers.json").read_text()))
    assert list(motions.values()) == list(MOTIONS) and list(appearances.values()) == list(APPEARANCES)
    for split, count in (("train", 6), ("validation", 2), ("test", 3)):
        plain, motion_rows, appearance_rows = (
            list(csv.reader((folder / f"{split}{suffix}.csv").open())) for suffix in ("", "_motion", "_appearance")
        )
        captions, boxes, questions = (
            json.loads((folder / f"{split}_{name}.json").read_text()) for name in ("captions", "boxes", "questions")
        )
        assert plain == motion_rows and len(plain) == len(captions) == len(boxes) == count
        for motion_row, appearance_row, caption, box in zip(
            motion_rows, appearance_rows, captions, boxes, strict=True
        ):
            name = motion_row[0]
            assert (folder / name).is_file()
            assert name == appearance_row[0] == caption["video"] == box["video"]
            motion, appearance = motions[motion_row[1]], appearances[appearance_row[1]]
            assert caption["caption"] == f"a {appearance} moving {motion}"
            (shape,) = box["objects"]
            assert (shape["motion"], f"{shape['color']} {shape['shape']}") == (motion, appearance)
            assert len(shape["boxes"]) == NUM_FRAMES
            asked = [row for row in questions if row["video"] == name]
            assert [row["answer"] for row in asked] == [shape["color"], shape["shape"], motion]
        assert len({row["question_id"] for row in questions}) == len(questions)
        assert {row["answer"] for row in questions} <= answers


def test_finished_folder_is_kept_and_other_settings_are_refused(folder, caplog):
    video = folder / "videos/train/00000.mp4"
    before = video.stat().st_mtime_ns
    write_moving_shapes(folder, 6, 2, 3, seed=5)
    assert video.stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="other settings"):
        write_moving_shapes(folder, 6, 2, 3, seed=6)


def test_unfinished_folder_is_written_again(folder, tmp_path, monkeypatch):
    target = tmp_path / "data"
    monkeypatch.setattr(moving_shapes, "write_annotations", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_moving_shapes(target, 6, 2, 3, seed=5)
    monkeypatch.undo()
    write_moving_shapes(target, 6, 2, 3, seed=5)
    for path in folder.rglob("*.*"):
        assert (target / path.relative_to(folder)).read_bytes() == path.read_bytes()


def test_segments_are_chosen_alike_forwards_and_backwards():
    first, second = np.split(np.array(sample_frame_indices(NUM_FRAMES, 8, "segments")), 2)
    np.testing.assert_array_equal(first, HALF - 1 - first[::-1])
    np.testing.assert_array_equal(second - HALF, first)


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split"):
        sample_clip(0, "val", 0)
