"""Features of sliding windows are the model's own, carry the right times and are written whole or not at all."""

import json

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from safetensors.numpy import load_file
from typer.testing import CliRunner

from tests.unit.video_files import write_kind, write_video
from umt_hf import UMTVideoConfig, UMTVideoModel, cli
from umt_hf.processing.decoding import open_video
from umt_hf.processing.video_processing_umt_video import UMTVideoProcessor
from umt_hf.training.features import choose_frames, extract_features, load_encoder, name_features, plan_windows

TINY = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "patch_size": 16,
    "image_size": 32, "num_frames": 4, "position_embedding_frames": 4, "position_embedding_image_size": 32,
    "num_aligned_layers": 1,
}  # fmt: skip


def save_model(folder, **changes):
    torch.manual_seed(0)
    config = UMTVideoConfig(**TINY | changes)
    model = UMTVideoModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    UMTVideoProcessor.from_model_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def encoder(folder):
    return load_encoder(folder)


@pytest.fixture
def video(tmp_path):
    return write_video(tmp_path / "ten.mp4", num_frames=10)


def run_model(encoder, video, indices):
    model, processor = encoder
    with open_video(video) as reader, torch.no_grad():
        frames = reader.get_frames(indices)
        pixels = processor(frames, do_sample_frames=False, return_tensors="pt")["pixel_values"]
        return model(pixels).last_hidden_state[0].unflatten(0, (-1, 2, 2)).numpy()


def test_one_window_is_the_model_on_the_whole_video(encoder, video):
    whole = run_model(encoder, video, range(10))
    for level, expected in {
        "tubelet": whole,
        "frame": whole.mean((1, 2)),
        "clip": whole.mean((0, 1, 2))[None],
    }.items():
        found = extract_features(video, *encoder, level, window=10, stride=10)
        np.testing.assert_allclose(found.features, expected, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_overlapping_windows_are_averaged_and_the_last_ends_with_the_video(encoder, video, batch_size):
    starts = [0, 3, 6]
    windows = {start: run_model(encoder, video, range(start, start + 4)) for start in starts}
    found = extract_features(video, *encoder, "frame", 4, 3, batch_size)
    for i in range(10):
        seen = [windows[s][i - s].mean((0, 1)) for s in starts if s <= i < s + 4]
        np.testing.assert_allclose(found.features[i], np.mean(seen, 0), atol=1e-5)
    clips = extract_features(video, *encoder, "clip", 4, 4, batch_size)
    assert clips.first_frame.tolist() == [0, 4, 6] and clips.last_frame.tolist() == [3, 7, 9]
    np.testing.assert_allclose(clips.features[2], windows[6].mean((0, 1, 2)), atol=1e-5)


def test_short_video_is_filled_with_its_last_frame(encoder, tmp_path):
    video = write_video(tmp_path / "three.mp4", num_frames=3)
    found = extract_features(video, *encoder, "frame", window=4)
    expected = run_model(encoder, video, [0, 1, 2, 2])[:3].mean((1, 2))
    np.testing.assert_allclose(found.features, expected, atol=1e-5)
    assert found.num_padded_frames == 1 and found.last_frame.tolist() == [0, 1, 2]


def test_tubelets_of_several_frames(tmp_path, video):
    encoder = load_encoder(save_model(tmp_path / "model", tubelet_size=2))
    found = extract_features(video, *encoder, "tubelet", 4, 2)
    assert found.features.shape == (5, 2, 2, 16) and found.first_frame.tolist() == [0, 2, 4, 6, 8]
    assert extract_features(video, *encoder, "frame").features.shape == (10, 16)
    with pytest.raises(ValueError, match="tubelet_size"):
        extract_features(video, *encoder, "clip", 3)


@pytest.mark.parametrize("kind", ["plain", "variable_rate", "late_start", "matroska", "mpeg4_avi", "transport_stream"])
def test_streamed_frames_and_their_times(kind, tmp_path):
    video = write_kind(kind, tmp_path)
    with open_video(video) as reader:
        indices = [0, 5, 6, 20, 47]
        np.testing.assert_array_equal(np.stack(list(reader.iterate_frames(indices))), reader.get_frames(indices))
        ticks = [10 * i + 7 * (i // 5) ** 2 if kind == "variable_rate" else 10 * i for i in range(48)]
        np.testing.assert_allclose(reader.compute_timestamps(), np.array(ticks) / 240, atol=2e-3)


def test_frames_are_chosen_by_time():
    seconds = np.array([0, 0.1, 0.2, 1.0, 1.9, 2.0])
    assert choose_frames(seconds, 1).tolist() == [0, 3, 5]
    assert choose_frames(seconds, 100).tolist() == [0, 1, 2, 3, 4, 5]
    plan = plan_windows(np.arange(50) / 25, 4, 2, 1, 5)
    assert plan.frames.tolist() == list(range(0, 50, 5)) and plan.starts == [0, 2, 4, 6]


def run(*arguments, exit_code=0):
    result = CliRunner().invoke(cli.app, ["features", *map(str, arguments)])
    assert result.exit_code == exit_code, result.output
    return result


def test_command_resumes_and_lists_bad_videos(folder, video, tmp_path):
    bad, out = tmp_path / "bad.mp4", tmp_path / "out"
    bad.write_bytes(b"no video")
    flags = ("--model", folder, "--out", out, "--level", "frame", "--format", "dataset")
    assert "1 extracted, 0 unchanged, 1 skipped" in run(video, bad, *flags).output
    stored = load_file(name_features(out, str(video)))
    assert stored["features"].shape == (10, 16)
    np.testing.assert_allclose(stored["start_seconds"], np.arange(10) / 24, atol=1e-3)
    table = load_from_disk(out / "dataset")
    np.testing.assert_array_equal(np.array(table["features"][:], np.float32), stored["features"])
    assert [entry["path"] for entry in json.loads((out / "skipped.json").read_text())] == [str(bad)]
    assert "0 extracted, 1 unchanged" in run(video, *flags).output
    assert "window" in run(video, *flags, "--window", "2", exit_code=2).output
    run(bad, "--model", folder, "--out", tmp_path / "other", exit_code=1)
