"""Windows over videos: where they are, what is read, and that a search finds the right second."""

import errno
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.inference.replaced_files import replace_after_counting
from tests.unit.inference.test_search import save_model
from umt_hf import UMTVideoProcessor
from umt_hf.data.video_files import SkippedVideo, list_videos
from umt_hf.inference.moments import (
    MomentCollector,
    MomentReads,
    WindowSettings,
    choose_apart,
    compute_overlap,
    cut_moment,
    plan_moments,
    read_moments,
    resolve_moments,
    save_strips,
)
from umt_hf.inference.search import VideoSearcher, VideoTextEncoder, build_hit, embed_videos
from umt_hf.moving_shapes.render import FRAMES_PER_SECOND, write_moving_shapes, write_video
from umt_hf.moving_shapes.variants import write_moments
from umt_hf.processing.decoding import open_video
from umt_hf.runs.mistakes import MachineError

SECONDS_PER_ACTION = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    write_moving_shapes(folder, num_train_clips=1, num_validation_clips=1, num_test_clips=1)
    return write_moments(folder, num_videos=4)


@pytest.fixture(scope="module")
def videos(shapes) -> Path:
    return shapes / "videos" / "test_moments"


@pytest.fixture
def processor() -> UMTVideoProcessor:
    return UMTVideoProcessor(num_frames=4, size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


@pytest.mark.parametrize(
    ("num_frames", "windows", "starts"),
    [
        (72, (3, 3), [0, 3, 6]),
        (72, (3, 1.5), [0, 1.5, 3, 4.5, 6]),
        (76, (3, 3), [0, 3, 6, 6.5]),  # the last one is moved back to end with the video
        (24, (3, 1), [0]),
        (8, (3, 3), [0]),
        (1, (3, 3), [0]),
        (72, (0.1, 0.1), [round(0.1 * i, 6) for i in range(90)]),
    ],
)
def test_windows_cover_a_video(num_frames, windows, starts):
    moments = plan_moments(np.arange(num_frames) / 8, WindowSettings(*windows))
    assert [moment.start_seconds for moment in moments] == starts
    assert all(moment.num_frames >= 1 for moment in moments)
    assert moments[-1].first_frame + moments[-1].num_frames == num_frames


@given(st.integers(1, 60), st.floats(0.5, 30), st.floats(0.5, 10), st.floats(0.2, 1))
def test_every_frame_is_in_a_window(num_frames, fps, window, share):
    seconds = np.arange(num_frames) / fps
    moments = plan_moments(seconds, WindowSettings(window, window * share))
    starts = [moment.start_seconds for moment in moments]
    assert starts == sorted(starts)
    shown = {frame for m in moments for frame in range(m.first_frame, m.first_frame + m.num_frames)}
    assert shown == set(range(num_frames))


@pytest.mark.parametrize(
    ("window", "stride", "message"),
    [
        (None, 1, "A stride needs a window"),
        (0, None, "window must be a positive number of seconds, got 0"),
        (float("nan"), None, "window must be a positive"),
        (2, -1, "stride must be a positive number of seconds"),
        (2, 3, "leaves parts of the videos out"),
        (0.001, None, "stride 0.001 would make over 100 moments of each second; it is in seconds, 0.01 or more"),
    ],
)
def test_windows_that_make_no_sense(window, stride, message):
    with pytest.raises(ValueError, match=message):
        resolve_moments(window, stride)


def test_windows_of_no_overlap_are_the_default():
    assert resolve_moments(None, None) is None
    assert resolve_moments(4, None) == WindowSettings(4.0, 4.0)


def test_times_between_frames_show_the_frame_that_is_on_the_screen():
    seconds = np.array([0.0, 1.0, 5.0, 5.1])
    assert cut_moment(seconds, 2.0, 4.0).first_frame == 1
    assert cut_moment(seconds, 6.0, 7.0).first_frame == 3
    moment = cut_moment(seconds, 0.5, 5.05)
    assert (moment.first_frame, moment.num_frames) == (1, 2)


def read_all(files, processor, windows, **options) -> dict[str, torch.Tensor]:
    collector, found = MomentCollector(), {}
    for batch in read_moments(files, processor, windows, **options):
        for read in batch:
            video = collector.add(read, read.pixel_values.numpy())
            if video is not None:
                found[video.file.path] = torch.from_numpy(np.stack(video.values))
    return found


def test_a_window_is_read_as_a_video_of_its_frames(videos, processor):
    files, _ = list_videos([str(videos)])
    windows = WindowSettings(3, 1.5)
    found = read_all(files, processor, windows, batch_size=7)
    assert list(found) == [file.path for file in files]
    for file in files[:2]:
        with open_video(file.path) as reader:
            frames = reader.get_frames(range(72))
        for place, start in enumerate(range(0, 49, 12)):
            expected = processor(frames[start : start + 24], return_tensors="pt")["pixel_values"][0]
            assert torch.equal(found[file.path][place], expected)
        complete = processor(file.path, return_tensors="pt")["pixel_values"]
        assert torch.equal(read_all([file], processor, WindowSettings(9, 9), batch_size=1)[file.path], complete)


def test_parts_batches_and_workers_change_nothing(videos, processor):
    files, _ = list_videos([str(videos)])
    windows = WindowSettings(1, 0.5)
    expected = read_all(files, processor, windows, batch_size=1000)
    for options in ({"batch_size": 1}, {"batch_size": 5, "num_workers": 2}, {"batch_size": 8, "is_joined": False}):
        found = read_all(files, processor, windows, **options)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[path], expected[path]) for path in expected)
    sizes = [
        sum(len(read.moments) for read in batch) for batch in read_moments(files, processor, windows, batch_size=8)
    ]
    assert max(sizes) == 8 and sum(sizes) == sum(map(len, expected.values()))


def test_unreadable_videos_come_once_with_their_reason(videos, processor, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    good = sorted(videos.iterdir())[0]
    (tmp_path / "cut.mp4").write_bytes(good.read_bytes()[:-3000])
    (tmp_path / "good.mp4").write_bytes(good.read_bytes())
    files, _ = list_videos([str(tmp_path)])
    collector, skipped, complete = MomentCollector(), [], []
    for batch in read_moments(files, processor, WindowSettings(1, 1), batch_size=2):
        for read in batch:
            if isinstance(read, SkippedVideo):
                skipped += collector.skip(read)
            elif (video := collector.add(read, np.zeros(len(read.moments)))) is not None:
                complete.append(video.file.path)
    assert [Path(video.path).name for video in skipped] == ["bad.mp4", "cut.mp4"]
    assert all(video.reason and video.path not in video.reason for video in skipped)
    assert [Path(path).name for path in complete] == ["good.mp4"]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("num_frames", [9, 40])
@pytest.mark.parametrize("batch_size", [2, 16])
def test_a_video_that_is_replaced_meanwhile_is_skipped_by_embed(
    model, videos, tmp_path, monkeypatch, num_workers, num_frames, batch_size
):
    """It counts as skipped, the rows of the others are theirs, and the next run encodes it."""
    originals, folder, index = sorted(videos.iterdir()), tmp_path / "videos", tmp_path / "index"
    folder.mkdir()
    for number in range(2):
        (folder / f"{number}.mp4").write_bytes(originals[number].read_bytes())
    write_video(tmp_path / "other.mp4", np.zeros((num_frames, 48, 64, 3), np.uint8))
    options = {"window": 3, "num_workers": num_workers, "batch_size": batch_size}
    with monkeypatch.context() as patch:
        replace_after_counting(patch, folder / "0.mp4", (tmp_path / "other.mp4").read_bytes())
        report = embed_videos([str(folder)], model, index, **options)
    assert (report.num_encoded, report.num_in_index, report.num_moments) == (1, 1, 3)
    (skipped,) = report.skipped
    assert skipped.path == str(folder / "0.mp4") and skipped.reason.startswith("It changed while it was read")
    report = embed_videos([str(folder)], model, index, **options)
    assert (report.num_encoded, report.num_unchanged, report.num_in_index, report.skipped) == (1, 1, 2, ())
    assert report.num_moments == 3 + (1 if num_frames == 9 else 2)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_video_that_is_still_being_copied_does_not_stop_embed(model, videos, tmp_path, monkeypatch, num_workers):
    folder, complete = tmp_path / "videos", sorted(videos.iterdir())[0].read_bytes()
    folder.mkdir()
    (folder / "0.mp4").write_bytes(complete[:500])
    (folder / "1.mp4").write_bytes(complete)
    options = {"window": 3, "num_workers": num_workers}
    with monkeypatch.context() as patch:
        replace_after_counting(patch, folder / "0.mp4", complete)
        report = embed_videos([str(folder)], model, tmp_path / "index", **options)
    assert (report.num_encoded, report.num_in_index) == (1, 1)
    assert [video.reason[:28] for video in report.skipped] == ["It changed while it was read"]
    report = embed_videos([str(folder)], model, tmp_path / "index", **options)
    assert (report.num_encoded, report.num_unchanged, report.num_moments) == (1, 1, 6)


def test_a_video_without_its_last_windows_is_skipped_by_the_collector(videos, processor):
    """Whatever a reader gives: the last part of a video ends it."""
    (file,), _ = list_videos([str(sorted(videos.iterdir())[0])])
    collector = MomentCollector()
    (first,), (second,), (third,) = read_moments([file], processor, WindowSettings(3, 3), batch_size=1)
    assert collector.add(first, np.zeros(1)) is None
    skipped = collector.add(third, np.zeros(1))
    assert isinstance(skipped, SkippedVideo) and skipped.path == file.path
    assert collector.add(second, np.zeros(1)) is None  # it has come out already


def test_an_open_video_does_not_go_to_another_process(videos, processor):
    files, _ = list_videos([str(videos)])
    reads = MomentReads(processor, WindowSettings(1, 1))
    assert reads.count(files[0]) == 9
    copy = pickle.loads(pickle.dumps(reads))
    assert copy._reader is None and copy.count(files[0]) == 9


def test_the_right_second_is_found(model, videos, tmp_path, monkeypatch):
    """A query that fits one action of one video, whose frames were read in another way, finds it and says when."""
    embed_videos([str(videos)], model, tmp_path / "index", window=SECONDS_PER_ACTION, batch_size=5)
    searcher = VideoSearcher(tmp_path / "index")
    actions = [(str(path), start) for path in sorted(videos.iterdir()) for start in (0, 3, 6)]
    clips = []
    for path, start in actions:
        with open_video(path) as reader:
            frames = reader.get_frames(range(start * FRAMES_PER_SECOND, (start + 3) * FRAMES_PER_SECOND))
        clips.append(searcher.encoder.processor.video_processor(frames, return_tensors="pt")["pixel_values"])
    with torch.no_grad():
        vectors = searcher.encoder.encode_videos(torch.cat(clips))[0]
    queries = torch.linalg.pinv(vectors)  # each has the inner product 1 with one action and 0 with the others
    for number, (path, start) in enumerate(actions):
        query = queries[:, number][None]
        monkeypatch.setattr(VideoTextEncoder, "encode_text", lambda *_, query=query: (query, None))
        hits = searcher.search("anything", top_k=4)
        assert (hits[0].path, hits[0].start_seconds, hits[0].end_seconds) == (path, start, start + 3)
        assert hits[0].similarity == pytest.approx(1, abs=1e-2)
        assert len({hit.path for hit in hits}) == 4 and len(hits[0].moments) == 3


def test_moments_that_overlap_better_ones_are_left_out():
    spans = [(2.0, 5.0), (3.0, 6.0), (5.0, 8.0), (0.0, 2.0), (2.0, 5.0)]
    assert choose_apart(spans) == [0, 2, 3]
    assert choose_apart(spans, 0.5) == [0, 1, 2, 3]
    assert compute_overlap((0, 4), (2, 6)) == pytest.approx(1 / 3) and compute_overlap((0, 1), (2, 3)) == 0
    assert compute_overlap((1, 1), (1, 1)) == 1


def choose_apart_plainly(moments, limit) -> list[int]:
    kept: list[int] = []
    for place, moment in enumerate(moments):
        if all(compute_overlap(moment, moments[other]) <= limit for other in kept):
            kept.append(place)
    return kept


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), max_size=40),
    st.sampled_from([0.0, 0.1, 1 / 3, 0.5, 0.9, 1.0]),
    st.sampled_from([1.0, 0.1]),
    st.sampled_from([None, 1, 5]),
)
def test_moments_apart_are_those_of_the_plain_loop(moments, limit, unit, count):
    spans = [(start * unit, (start + length) * unit) for start, length in moments]
    assert choose_apart(spans, limit, count) == choose_apart_plainly(spans, limit)[:count]


class CountedTable:
    """Rows of an index, and how many of them were asked for."""

    def __init__(self, rows):
        self.rows, self.asked = rows, []

    def list_paths(self):
        return sorted({row["path"] for row in self.rows})

    def find_nearest(self, vector, count, exact=False, filters=None):
        self.asked.append(count)
        return self.rows[:count]


@pytest.mark.parametrize("num_videos", [1, 3])
def test_a_long_film_costs_a_search_little(model, num_videos):
    """Pairs of moments that are compared stay few, where an index has fewer videos than are wanted."""
    rows = [
        {
            "path": f"{i % num_videos}.mp4",
            "start_seconds": float(i),
            "end_seconds": i + 1.0,
            "similarity": 1 - i / 1e5,
            "duration_seconds": None,
        }
        for i in range(40_000)
    ]
    searcher = VideoSearcher.__new__(VideoSearcher)
    searcher.has_moments, searcher.table = True, CountedTable(rows)
    began = time.process_time()
    hits = [build_hit(own) for own in searcher._find_videos(np.zeros(8, np.float32), 10, False, None)]
    taken = time.process_time() - began
    assert [hit.path for hit in hits] == [f"{i}.mp4" for i in range(num_videos)]
    assert all(len(hit.moments) == 5 for hit in hits) and taken < 2, taken
    assert max(searcher.table.asked) < 10_000


def test_ranking_all_windows_of_a_long_film_takes_seconds_at_most():
    """`evaluate moments` ranks all of them for each text."""
    spans = [(float(i), i + 4.0) for i in np.random.default_rng(0).permutation(7200)]
    began = time.process_time()
    kept = choose_apart(spans, 0.5)
    assert time.process_time() - began < 3
    assert kept[:50] == choose_apart_plainly(spans[:200], 0.5)[:50]


def test_strips_show_the_frames_of_a_moment(tmp_path, processor):
    from PIL import Image

    frames = np.zeros((48, 64, 96, 3), np.uint8)
    frames[24:, ..., 0] = 255  # red from second 3 on
    write_video(tmp_path / "video.mp4", frames)
    found = [
        (str(tmp_path / "video.mp4"), 0.0, 3.0),
        (str(tmp_path / "video.mp4"), 3.0, 6.0),
        ("gone.mp4", None, None),
    ]
    (first, second), skipped = save_strips(found, tmp_path / "strips")
    assert [video.path for video in skipped] == ["gone.mp4"] and skipped[0].reason
    assert (first.name, second.name) == ("01-video-0.0s.jpg", "02-video-3.0s.jpg")
    red = [np.asarray(Image.open(strip))[..., 0].mean() for strip in (first, second)]
    assert red[0] < 30 and red[1] > 180 and Image.open(first).size == (6 * 240, 160)
    (complete,), _ = save_strips([(str(tmp_path / "video.mp4"), None, None)], tmp_path / "complete")
    assert complete.name == "01-video.jpg" and 80 < np.asarray(Image.open(complete))[..., 0].mean() < 180


def test_strips_of_an_earlier_search_go_and_other_files_stay(tmp_path):
    from PIL import Image

    write_video(tmp_path / "a.mp4", np.zeros((8, 64, 96, 3), np.uint8))
    strips, path = tmp_path / "strips", str(tmp_path / "a.mp4")
    save_strips([(path, 0.0, 1.0), (path, None, None)], strips)
    Image.new("RGB", (8, 8)).save(strips / "01-mine.jpg")
    (strips / "02-other.jpg").write_bytes(b"no picture")
    save_strips([(path, None, None)], strips)
    assert sorted(file.name for file in strips.iterdir()) == ["01-a.jpg", "01-mine.jpg", "02-other.jpg"]


def test_strips_of_videos_with_long_names_are_written(tmp_path):
    """80 letters of Chinese are 240 bytes."""
    path = tmp_path / ("\u7535" * 80 + ".mp4")
    write_video(path, np.zeros((8, 64, 96, 3), np.uint8))
    (strip,), skipped = save_strips([(str(path), 0.0, 1.0)], tmp_path / "strips")
    assert strip.is_file() and strip.name.startswith("01-\u7535") and len(strip.name.encode()) < 255 and not skipped


def test_a_full_disk_is_named_where_strips_are_written(tmp_path, monkeypatch):
    from PIL import Image

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_video(tmp_path / "a.mp4", np.zeros((8, 64, 96, 3), np.uint8))
    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(MachineError, match=r"01-a\.jpg could not be written: no space left on device"):
        save_strips([(str(tmp_path / "a.mp4"), None, None)], tmp_path / "strips")


def test_strips_of_very_wide_videos_are_as_wide_as_a_picture_can_be(tmp_path):
    write_video(tmp_path / "wide.mp4", np.zeros((8, 16, 2048, 3), np.uint8))
    (strip,), skipped = save_strips([(str(tmp_path / "wide.mp4"), None, None)], tmp_path / "strips")
    assert strip.stat().st_size > 1000 and not skipped
