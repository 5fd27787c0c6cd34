"""`umt-hf classify` gives results as they come, and its file outlives kills, changes and second commands."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.processes import build_environment, read_output, run_and_kill, run_ranks, start_process
from tests.unit.finetuning.test_classification import tiny_config
from umt_hf import UMTVideoForVideoClassification, UMTVideoProcessor, VideoClassifier
from umt_hf.cli import app
from umt_hf.inference.classification import LabelOptions, load_classifier, merge_views
from umt_hf.inference.labels.scored import rank_labels
from umt_hf.moving_shapes.render import write_video
from umt_hf.runs.disk import hold_lock

runner = CliRunner()
NUM_VIDEOS = 60


def save_classifier(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = UMTVideoForVideoClassification(tiny_config(id2label={0: "run", 1: "jump", 2: "stand"}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    UMTVideoProcessor.from_model_config(model.config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Many short videos of three kinds, and two that cannot be read."""
    folder, noise = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    for number in range(NUM_VIDEOS):
        path = folder / f"{number:03d}.mp4"
        if number < 3:
            write_video(path, noise.integers(0, 255, (12, 48, 80, 3), dtype=np.uint8))
        else:
            os.link(folder / f"{number % 3:03d}.mp4", path)
    for name in ("001b.mp4", "damaged.mp4"):
        (folder / name).write_bytes(b"no video")
    return folder


def build_words(classifier, videos, *others) -> list[str]:
    words = ["classify", videos, "--model", classifier, "--num-workers", 0, "--batch-size", 4, "--top-k", 2, *others]
    return [str(word) for word in words]


def run_command(words: list[str]) -> None:
    """What the installed command does, for a process of its own."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["umt-hf", *words]
    app()


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def complete(classifier, videos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("complete") / "results.jsonl"
    result = runner.invoke(app, build_words(classifier, videos, "--out", out))
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("60 classified, 0 unchanged, 2 skipped\nskipped ")
    assert "62 videos found, 62 of them new or changed." in result.stderr
    return out


def test_a_killed_command_resumes_to_the_same_bytes(classifier, videos, complete, tmp_path):
    """Also where the kill has cut a line off, and a batch in two."""
    out = tmp_path / "results.jsonl"
    words = build_words(classifier, videos, "--out", out)
    run_and_kill(lambda: out.exists() and out.stat().st_size > 2000, run_command, words)
    assert 2000 < out.stat().st_size < complete.stat().st_size
    with out.open("r+b") as file:
        file.truncate(out.stat().st_size - 20)
    result = runner.invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["num_classified"] + report["num_unchanged"] == NUM_VIDEOS and report["num_unchanged"] > 0
    assert out.read_bytes() == complete.read_bytes()
    manifests = [path.with_name("results.jsonl.manifest.json").read_bytes() for path in (out, complete)]
    assert manifests[0] == manifests[1]
    skipped = json.loads(manifests[0])["skipped"]
    assert (
        [Path(video["path"]).name for video in skipped]
        == ["001b.mp4", "damaged.mp4"]
        == [Path(video["path"]).name for video in report["skipped"]]
    )


def test_the_file_has_what_the_printed_document_has(classifier, videos, complete):
    result = runner.invoke(app, build_words(classifier, videos, "--json"))
    document = json.loads(result.stdout)
    keys = ("path", "labels")
    assert [{key: line[key] for key in keys} for line in read_lines(complete)] == document["videos"]
    assert [video["path"] for video in document["videos"]] == sorted(str(path) for path in videos.glob("[0-9]??.mp4"))
    assert [Path(video["path"]).name for video in document["skipped"]] == ["001b.mp4", "damaged.mp4"]


def test_new_and_changed_videos_alone_are_classified(classifier, videos, tmp_path):
    own, out = tmp_path / "videos", tmp_path / "new" / "results.jsonl"
    own.mkdir()
    for name in ("000", "001"):
        (own / f"{name}.mp4").write_bytes((videos / f"{name}.mp4").read_bytes())
    words = build_words(classifier, own, "--out", out, "--json")
    assert runner.invoke(app, words).exit_code == 0
    first = read_lines(out)
    (own / "000.mp4").write_bytes((videos / "002.mp4").read_bytes())
    (own / "added.mp4").write_bytes((videos / "001.mp4").read_bytes())
    report = json.loads(runner.invoke(app, words).stdout)
    assert (report["num_classified"], report["num_unchanged"]) == (2, 1)
    lines = read_lines(out)
    assert [Path(line["path"]).name for line in lines] == ["001.mp4", "000.mp4", "added.mp4"]
    assert lines[0] == first[1] and lines[1]["labels"] != first[0]["labels"]
    # One that can no longer be read loses its line.
    (own / "001.mp4").write_bytes(b"no video")
    assert len(json.loads(runner.invoke(app, words).stdout)["skipped"]) == 1
    assert [Path(line["path"]).name for line in read_lines(out)] == ["000.mp4", "added.mp4"]


def test_other_models_settings_and_files_are_refused_by_name(classifier, videos, complete, tmp_path):
    before = complete.read_bytes()
    other = save_classifier(tmp_path / "other", seed=1)
    foreign = tmp_path / "notes.txt"
    foreign.write_text("mine")
    for words, reason in (
        (build_words(other, videos, "--out", complete), "holds results made with weights="),
        (build_words(classifier, videos, "--out", complete, "--top-k", 3), "holds results made with top_k=2, not 3."),
        (build_words(classifier, videos, "--out", complete, "--num-clips", 3), "made with num_clips=1, not 3."),
        (build_words(classifier, videos, "--out", foreign), "holds something other than results of this command"),
    ):
        result = runner.invoke(app, words)
        message = " ".join(result.stderr.replace("│", " ").split())
        assert result.exit_code == 2 and reason in message, result.output
    assert complete.read_bytes() == before and foreign.read_text() == "mine"
    with hold_lock(complete.with_name(".results.jsonl.lock"), "file"):
        result = runner.invoke(app, build_words(classifier, videos, "--out", complete))
    assert result.exit_code == 2 and "another run" in result.stderr


@pytest.mark.parametrize("has_out", [False, True])
def test_results_come_before_the_end_and_ctrl_c_says_how_to_go_on(classifier, videos, tmp_path, has_out):
    out, output = tmp_path / "results.jsonl", tmp_path / "output"
    words = build_words(classifier, *[videos] * 1, *(["--out", out] if has_out else []), "--num-clips", 4)
    process = start_process(run_command, words, environment=build_environment(0, 1, 0), output=output)
    written = out if has_out else Path(f"{output}.stdout")
    deadline = time.monotonic() + 60
    while not (written.exists() and written.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.002)
    assert process.is_alive() and written.read_text()
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    error = read_output(output).stderr
    assert process.exitcode == 130 and "Traceback" not in error, error
    last = error.splitlines()[-1]
    if has_out:
        assert last.startswith("Interrupted. ") and last.endswith(
            f" of 62 videos are done; the same command goes on with {out}."
        )
    else:
        assert last.endswith("videos were done; with --out FILE the same command would go on from there next time.")


@pytest.mark.slow
def test_two_processes_write_the_file_of_one(classifier, videos, complete, tmp_path):
    out = tmp_path / "results.jsonl"
    output = run_ranks(run_command, build_words(classifier, videos, "--out", out, "--json"))
    assert out.read_bytes() == complete.read_bytes()
    assert json.loads(output.stdout)["num_classified"] == NUM_VIDEOS and output.stderr.count("videos found") == 1


def test_the_taker_of_results_keeps_its_gradients(classifier, videos):
    found = VideoClassifier(classifier).iterate_files([str(videos)], LabelOptions(show_progress=False))
    next(found)
    assert torch.is_grad_enabled()
    found.close()


def test_workers_change_nothing_and_the_time_is_said(classifier, videos, complete, tmp_path):
    out = tmp_path / "results.jsonl"
    words = build_words(classifier, videos, "--out", out)
    words[words.index("--num-workers") + 1] = "2"
    result = runner.invoke(app, words)
    assert out.read_bytes() == complete.read_bytes()
    assert "% waiting for data" in result.stderr and "2 worker processes." in result.stderr
    printed = runner.invoke(app, build_words(classifier, videos, "--json"))
    assert printed.stderr.count("% waiting for data") == 1 and len(json.loads(printed.stdout)["videos"]) == NUM_VIDEOS


def test_classes_are_those_of_the_plain_loop_bit_by_bit(classifier, videos):
    """A batch at a time, read and computed in turn."""
    own, batches = VideoClassifier(classifier), []
    paths = [str(videos / f"{number:03d}.mp4") for number in range(7)]
    for start in range(0, 7, 2):
        views = own.processor(paths[start : start + 2], num_clips=1, num_crops=2, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            batches.append(merge_views(own.model(views).logits, 2))
    expected = [rank_labels(row, own.labels, 3) for row in torch.cat(batches).numpy()]
    for num_workers in (0, 2):
        found = own.classify_files(
            paths, top_k=3, num_clips=1, num_crops=2, batch_size=4, num_workers=num_workers, show_progress=False
        )
        assert [video.labels for video in found.videos] == expected


def test_the_precision_is_asked_for_and_recorded(classifier, videos, tmp_path):
    own, out = str(videos / "000.mp4"), tmp_path / "results.jsonl"
    words = build_words(classifier, own, "--out", out)
    assert runner.invoke(app, [*words, "--dtype", "bfloat16"]).exit_code == 0
    assert json.loads(Path(f"{out}.manifest.json").read_text())["settings"]["dtype"] == "bfloat16"
    refused = " ".join(runner.invoke(app, words).stderr.replace("│", " ").split())
    assert "holds results made with dtype='bfloat16', not 'float32'" in refused
    half = save_classifier(tmp_path / "half")
    UMTVideoForVideoClassification.from_pretrained(half).to(torch.bfloat16).save_pretrained(half)
    assert load_classifier(half).model.dtype == torch.float32  # on a CPU, whatever the weights are stored in
    assert load_classifier(half, "float16").model.dtype == torch.float16
    assert load_classifier(half, torch_compile=True).model.vision_model._compiled_call_impl is not None
