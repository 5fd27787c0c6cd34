"""Figures of moments: by hand, on rendered videos, and the same in two processes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from tests.unit.inference.test_search import save_model
from umt_hf import UMTVideoTextModel
from umt_hf.data.annotations import load_moments
from umt_hf.evaluation import moments
from umt_hf.evaluation.metrics.moments import compute_moment_figures, score_query
from umt_hf.inference.loading import load_video_text_processor
from umt_hf.inference.moments import MomentReads, WindowSettings
from umt_hf.moving_shapes.render import read_settings, render_clip, write_moving_shapes, write_video
from umt_hf.moving_shapes.variants import draw_actions, write_moments
from umt_hf.processing.decoding import VideoDecodingError, open_video


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    write_moving_shapes(folder, num_train_clips=1, num_validation_clips=1, num_test_clips=1)
    return write_moments(folder, num_videos=3)


def test_figures_by_hand():
    figures = compute_moment_figures(
        [[(0, 4), (4, 8)], [(2, 6), (0, 4)], []], [[(0, 4)], [(0, 4), (10, 14)], [(1, 2)]]
    )
    # Second query: (2, 6) overlaps (0, 4) by 2 of 6 seconds, then (0, 4) is right at place 2, one of two.
    assert figures["r1_iou_0.5"] == figures["r1_iou_0.7"] == pytest.approx(1 / 3)
    assert figures["map"] == figures["map_iou_0.5"] == figures["map_iou_0.75"] == pytest.approx((1 + 0.25 + 0) / 3)
    near = compute_moment_figures([[(0, 6)]], [[(0, 10)]])
    assert (near["r1_iou_0.5"], near["r1_iou_0.7"]) == (1, 0)
    assert near["map_iou_0.5"] == 1 and near["map_iou_0.75"] == 0 and near["map"] == pytest.approx(0.3)
    with pytest.raises(ValueError, match="Every query needs a right moment"):
        compute_moment_figures([[(0, 1)]], [[]])


def test_a_right_moment_is_found_once():
    assert score_query([(0, 4), (0, 4), (5, 9)], [(0, 4), (5, 9)], 0.5) == pytest.approx((1 + 2 / 3) / 2)


def test_several_actions_in_a_video(shapes):
    rows = json.loads((shapes / "test_moments.json").read_text())
    assert len(rows) == 9 and [row["start_seconds"] for row in rows[:3]] == [0, 3, 6]
    seed = read_settings(shapes)["seed"]
    for index in range(3):
        clips = draw_actions(seed, "test", 1, index, 3)
        assert [row["caption"] for row in rows[3 * index : 3 * index + 3]] == [clip.caption for clip in clips]
        assert len({clip.appearance for clip in clips}) == 3
        with open_video(str(shapes / rows[3 * index]["video"])) as reader:
            assert reader.num_frames == 72 and reader.duration_seconds == 9
            for action, clip in enumerate(clips):
                drawn = render_clip(clip)[0][5].astype(int)
                shown = reader.get_frames([24 * action + 5])[0].astype(int)
                assert abs(drawn - shown).mean() < 8  # what the codec loses
    again = write_moments(shapes, num_videos=3)
    assert json.loads((again / "test_moments.json").read_text()) == rows
    with pytest.raises(ValueError, match="1 to 36 actions"):
        write_moments(shapes, num_videos=1, num_actions=37)


def test_queries_of_the_annotation(shapes, tmp_path):
    videos, queries = load_moments(str(shapes / "test_moments.json"))
    assert len(videos) == 3 and len(queries) == 9 and queries[4].video == 1 and queries[4].spans == ((3.0, 6.0),)
    row = {"video": "a.mp4", "caption": "a red circle", "start_seconds": 1, "end_seconds": 2.5}
    rows = [row, row | {"start_seconds": 5, "end_seconds": 6}, row | {"caption": "a ring"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    _, queries = load_moments(str(tmp_path / "rows.json"))
    assert [(query.text, query.spans) for query in queries] == [
        ("a red circle", ((1.0, 2.5), (5.0, 6.0))),
        ("a ring", ((1.0, 2.5),)),
    ]
    for wrong, message in (
        ({"end_seconds": 0.5}, "row 0: start_seconds 1 and end_seconds 0.5 are not a span"),
        ({"caption": None}, "no row has a caption"),
    ):
        (tmp_path / "wrong.json").write_text(json.dumps([row | wrong]))
        with pytest.raises(ValueError, match=message):
            load_moments(str(tmp_path / "wrong.json"))
    (tmp_path / "short.json").write_text(json.dumps([{"video": "a.mp4", "caption": "b"}]))
    with pytest.raises(ValueError, match="rows have no start_seconds"):
        load_moments(str(tmp_path / "short.json"))


def test_a_model_that_knows_the_answers_gets_full_marks(shapes, model, monkeypatch):
    """Texts get the vector that fits their own moment alone: what remains is reading, ranking and counting."""
    videos, queries = load_moments(str(shapes / "test_moments.json"))
    loaded, processor = UMTVideoTextModel.from_pretrained(model), load_video_text_processor(str(model))
    accelerator, windows = Accelerator(cpu=True), WindowSettings(3, 3)
    encoded = moments.encode_moments(loaded, processor, videos, windows, accelerator, batch_size=2, num_workers=0)
    assert [video.spans for video in encoded] == [[(0, 3), (3, 6), (6, 9)]] * 3
    answers = np.linalg.pinv(np.concatenate([video.vectors for video in encoded])).T
    options = {"batch_size": 4, "num_workers": 0}
    before, _ = moments.evaluate_moments(loaded, processor, videos, queries, windows, accelerator, **options)
    assert set(before) == {"r1_iou_0.5", "r1_iou_0.7", "map", "map_iou_0.5", "map_iou_0.75"}
    monkeypatch.setattr(moments, "encode_queries", lambda *_: answers.astype(np.float32))
    figures, found = moments.evaluate_moments(loaded, processor, videos, queries, windows, accelerator, **options)
    assert set(figures.values()) == {1.0}
    assert [spans[0] for spans in found] == [query.spans[0] for query in queries]
    shifted = WindowSettings(3, 1)
    figures, found = moments.evaluate_moments(loaded, processor, videos, queries, shifted, accelerator, **options)
    assert all(len(spans) <= 7 for spans in found)


def test_videos_that_cannot_be_read_are_named(shapes, model, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    loaded, processor = UMTVideoTextModel.from_pretrained(model), load_video_text_processor(str(model))
    with pytest.raises(VideoDecodingError, match=r"bad\.mp4: "):
        moments.encode_moments(
            loaded, processor, [str(tmp_path / "bad.mp4")], WindowSettings(3, 3), Accelerator(cpu=True), num_workers=0
        )


def test_a_video_that_is_replaced_meanwhile_is_named(shapes, model, tmp_path, monkeypatch):
    videos, _ = load_moments(str(shapes / "test_moments.json"))
    (tmp_path / "a.mp4").write_bytes(Path(videos[0]).read_bytes())
    write_video(tmp_path / "other.mp4", np.zeros((30, 48, 64, 3), np.uint8))
    loaded, processor = UMTVideoTextModel.from_pretrained(model), load_video_text_processor(str(model))
    # Files are called by their rows there.
    count = MomentReads.count

    def count_and_replace(self, file):
        total = count(self, file)
        self.close()
        (tmp_path / "other.mp4").replace(tmp_path / "a.mp4")
        return total

    monkeypatch.setattr(MomentReads, "count", count_and_replace)
    with pytest.raises(VideoDecodingError, match=r"a\.mp4: It changed while it was read"):
        moments.encode_moments(
            loaded, processor, [str(tmp_path / "a.mp4")], WindowSettings(3, 3), Accelerator(cpu=True), num_workers=0
        )


def test_videos_of_bytes_are_read_too(shapes, model):
    videos, _ = load_moments(str(shapes / "test_moments.json"))
    rows = [{"path": "same.mp4", "bytes": Path(video).read_bytes()} for video in videos]
    loaded, processor = UMTVideoTextModel.from_pretrained(model), load_video_text_processor(str(model))
    options = {"windows": WindowSettings(3, 3), "accelerator": Accelerator(cpu=True), "num_workers": 0}
    of_paths = moments.encode_moments(loaded, processor, videos, **options)
    of_bytes = moments.encode_moments(loaded, processor, rows, **options)
    for one, other in zip(of_paths, of_bytes, strict=True):
        assert one.spans == other.spans and torch.equal(torch.tensor(one.vectors), torch.tensor(other.vectors))
