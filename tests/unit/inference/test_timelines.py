"""`umt-hf classify --window`: classes from moment to moment, as lines, as a file that outlives kills, as pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.processes import run_and_kill, run_ranks
from tests.unit.inference.replaced_files import replace_after_counting
from tests.unit.inference.test_label_files import read_lines, run_command, save_classifier
from umt_hf import VideoClassifier
from umt_hf.cli import app
from umt_hf.moving_shapes.render import write_video
from umt_hf.plots import TimelineSpan, plot_timeline
from umt_hf.processing.decoding import open_video

runner = CliRunner()
NUM_VIDEOS = 16


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder, noise = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    for number in range(NUM_VIDEOS):
        write_video(folder / f"{number:02d}.mp4", noise.integers(0, 255, (20, 48, 80, 3), dtype=np.uint8))
    (folder / "damaged.mp4").write_bytes(b"no video")
    return folder


def build_words(classifier, videos, *others) -> list[str]:
    words = ["classify", videos, "--model", classifier, "--num-workers", 0, "--batch-size", 3, "--top-k", 2]
    return [str(word) for word in [*words, "--window", 1, "--stride", 0.5, *others]]


@pytest.fixture(scope="module")
def complete(classifier, videos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("complete") / "results.jsonl"
    result = runner.invoke(app, build_words(classifier, videos, "--out", out, "--plot", out.parent / "plots"))
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{NUM_VIDEOS} classified, 0 unchanged, 1 skipped\nskipped ")
    return out


def test_each_moment_has_the_classes_of_its_frames(classifier, videos, complete):
    lines = read_lines(complete)
    assert [line["path"] for line in lines] == sorted(str(path) for path in videos.glob("[0-9]*.mp4"))
    reference = VideoClassifier(classifier)
    for line in lines[:3]:
        times = [(moment["start_seconds"], moment["end_seconds"]) for moment in line["moments"]]
        assert times == [(0, 1), (0.5, 1.5), (1, 2), (1.5, 2.5)]
        with open_video(line["path"]) as reader:
            frames = reader.get_frames(range(20))
        for moment in line["moments"]:
            first = round(moment["start_seconds"] * 8)
            expected = reference.classify(frames[first : first + 8], top_k=2)
            assert [label["label"] for label in moment["labels"]] == [label.label for label in expected]
            np.testing.assert_allclose(
                [label["probability"] for label in moment["labels"]], [e.probability for e in expected], atol=1e-5
            )


def test_lines_and_a_document_are_printed(classifier, videos, complete, tmp_path):
    result = runner.invoke(app, build_words(classifier, videos, "--json", "--plot", tmp_path / "plots"))
    document = json.loads(result.stdout)
    assert document["videos"] == [{key: line[key] for key in ("path", "moments")} for line in read_lines(complete)]
    assert [Path(video["path"]).name for video in document["skipped"]] == ["damaged.mp4"]
    printed = runner.invoke(app, build_words(classifier, videos / "00.mp4")).stdout.splitlines()
    assert printed[0].endswith("00.mp4") and printed[1].split()[0] == "0.0-" and len(printed) == 6
    pictures = [
        sorted(path.name for path in folder.iterdir()) for folder in (tmp_path / "plots", complete.parent / "plots")
    ]
    assert pictures[0] == pictures[1] and len(pictures[0]) == NUM_VIDEOS and pictures[0][0].startswith("00-")


@pytest.mark.heavy
def test_a_killed_command_resumes_to_the_same_bytes(classifier, videos, complete, tmp_path):
    out = tmp_path / "results.jsonl"
    words = build_words(classifier, videos, "--out", out)
    run_and_kill(lambda: out.exists() and out.stat().st_size > 1000, run_command, words)
    assert 1000 < out.stat().st_size < complete.stat().st_size
    with out.open("r+b") as file:
        file.truncate(out.stat().st_size - 20)
    report = json.loads(runner.invoke(app, [*words, "--json"]).stdout)
    assert report["num_classified"] + report["num_unchanged"] == NUM_VIDEOS and report["num_unchanged"] > 0
    assert out.read_bytes() == complete.read_bytes()


@pytest.mark.slow
def test_two_processes_write_the_file_of_one(classifier, videos, complete, tmp_path):
    out = tmp_path / "results.jsonl"
    output = run_ranks(run_command, build_words(classifier, videos, "--out", out, "--json"))
    assert out.read_bytes() == complete.read_bytes()
    assert json.loads(output.stdout)["num_classified"] == NUM_VIDEOS


def test_other_windows_and_mistakes_are_refused(classifier, videos, complete):
    plain = ["classify", str(videos), "--model", str(classifier), "--top-k", "2", "--num-workers", "0"]
    for words, reason in (
        ([*plain, "--window", "2", "--out", complete], "made with window_seconds=1.0, not 2.0"),
        ([*plain, "--out", complete], "made with window_seconds=1.0, not None"),
        ([*plain, "--stride", "1"], "A stride needs a window"),
        ([*plain, "--plot", "plots"], "give --window"),
        ([*plain, "--window", "1", "--stride", "2"], "leaves parts of the videos out"),
    ):
        result = runner.invoke(app, list(map(str, words)))
        message = " ".join(result.stderr.replace("│", " ").split())
        assert result.exit_code == 2 and reason in message, result.output


def test_a_timeline_is_drawn(tmp_path):
    spans = [TimelineSpan(i, i + 2, {"run": 0.1 * i, f"other {i}": 0.5}) for i in range(10)]
    plot_timeline(spans, tmp_path / "picture.png", "a video")
    picture = np.asarray(Image.open(tmp_path / "picture.png").convert("RGB"))
    assert picture.shape[1] > 800 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 50


def list_probabilities(line: dict) -> dict[tuple[float, str], float]:
    return {
        (moment["start_seconds"], label["label"]): label["probability"]
        for moment in line["moments"]
        for label in moment["labels"]
    }


@pytest.mark.parametrize("num_frames", [12, 28])
@pytest.mark.parametrize("batch_size", [2, 8])
def test_classes_of_a_video_that_is_replaced_meanwhile_go_to_no_other(
    classifier, videos, complete, tmp_path, monkeypatch, num_frames, batch_size
):
    """Also where fewer windows come than were counted: the others keep their own, and the next run has all."""
    folder, out = tmp_path / "videos", tmp_path / "results.jsonl"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.mp4").write_bytes((videos / f"{number:02d}.mp4").read_bytes())
    write_video(tmp_path / "other.mp4", np.zeros((num_frames, 48, 80, 3), np.uint8))
    words = build_words(classifier, folder, "--out", out, "--num-workers", 1, "--batch-size", batch_size)
    with monkeypatch.context() as patch:
        replace_after_counting(patch, folder / "0.mp4", (tmp_path / "other.mp4").read_bytes())
        result = runner.invoke(app, words)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "2 classified, 0 unchanged, 1 skipped"
    assert lines[1].startswith(f"skipped {folder / '0.mp4'}: It changed while it was read")
    expected = {Path(line["path"]).stem: list_probabilities(line) for line in read_lines(complete)}
    for line in read_lines(out):
        assert list_probabilities(line) == pytest.approx(expected[f"0{Path(line['path']).stem}"], abs=1e-5)
    assert [Path(line["path"]).name for line in read_lines(out)] == ["1.mp4", "2.mp4"]
    result = runner.invoke(app, words)
    assert result.stdout.splitlines() == ["1 classified, 2 unchanged, 0 skipped"], result.output
    assert {Path(line["path"]).name: len(line["moments"]) for line in read_lines(out)} == {
        "1.mp4": 4,
        "2.mp4": 4,
        "0.mp4": 2 if num_frames == 12 else 6,
    }


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_folder_that_is_still_being_copied_does_not_stop_a_run(
    classifier, videos, tmp_path, monkeypatch, num_workers
):
    """A file that is cut short when its windows are counted, and complete when it is read."""
    folder, out = tmp_path / "videos", tmp_path / "results.jsonl"
    folder.mkdir()
    for number in range(2):
        (folder / f"{number}.mp4").write_bytes((videos / f"{number:02d}.mp4").read_bytes())
    complete = (folder / "0.mp4").read_bytes()
    (folder / "0.mp4").write_bytes(complete[:500])
    words = build_words(classifier, folder, "--out", out, "--num-workers", num_workers)
    with monkeypatch.context() as patch:
        replace_after_counting(patch, folder / "0.mp4", complete)
        result = runner.invoke(app, words)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "1 classified, 0 unchanged, 1 skipped" and "0.mp4: It changed while it was read" in lines[1]
    assert runner.invoke(app, words).stdout.splitlines() == ["1 classified, 1 unchanged, 0 skipped"]


def test_timelines_of_files_and_classes_with_dollars_are_drawn(videos, tmp_path):
    model = save_classifier(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    names = {"0": "$\\foo$", "1": "_hidden", "2": "cost $5 and $6"}
    config |= {"id2label": names, "label2id": {name: int(place) for place, name in names.items()}}
    (model / "config.json").write_text(json.dumps(config))
    (tmp_path / "cost_$5_and_$6_.mp4").write_bytes((videos / "00.mp4").read_bytes())
    words = build_words(model, tmp_path / "cost_$5_and_$6_.mp4", "--plot", tmp_path / "plots")
    result = runner.invoke(app, words)
    assert result.exit_code == 0, result.output
    (picture,) = (tmp_path / "plots").iterdir()
    assert picture.suffix == ".png" and Image.open(picture).size[0] > 800


def test_pictures_of_videos_whose_lines_are_there_are_drawn_too(classifier, videos, tmp_path):
    """Where an earlier run drew none, was killed before it drew, or drew what a file showed before."""
    folder, out, plots = tmp_path / "videos", tmp_path / "results.jsonl", tmp_path / "plots"
    folder.mkdir()
    for number in range(2):
        (folder / f"{number}.mp4").write_bytes((videos / f"{number:02d}.mp4").read_bytes())
    words = build_words(classifier, folder, "--out", out)
    assert runner.invoke(app, words).stdout.startswith("2 classified")
    result = runner.invoke(app, [*words, "--plot", str(plots)])
    assert result.stdout.splitlines() == ["0 classified, 2 unchanged, 0 skipped"], result.output
    first, second = sorted(plots.iterdir())
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (first, second)}
    second.unlink()
    assert runner.invoke(app, [*words, "--plot", str(plots)]).exit_code == 0
    assert second.read_bytes() == before[second][0] and first.stat().st_mtime_ns == before[first][1]
    (folder / "0.mp4").write_bytes((videos / "02.mp4").read_bytes())
    assert runner.invoke(app, words).stdout.startswith("1 classified, 1 unchanged")
    second.write_bytes(b"no picture")
    assert runner.invoke(app, [*words, "--plot", str(plots)]).exit_code == 0
    assert first.read_bytes() != before[first][0] and second.read_bytes() == before[second][0]
