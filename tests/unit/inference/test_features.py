"""Features of sliding windows are the model's own, carry the right times and are written whole or not at all."""

import json
import logging

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from tests.unit.modeling.test_modeling_video_text import TINY as TINY_VIDEO_TEXT
from tests.unit.modeling.test_modeling_video_text import TINY_TEXT
from tests.unit.processing.test_decoding import damage
from tests.unit.video_files import KINDS, cut_start, write_kind, write_video
from umt_hf import (
    UMTVideoConfig,
    UMTVideoForPreTraining,
    UMTVideoForVideoClassification,
    UMTVideoModel,
    UMTVideoProcessor,
    UMTVideoTextConfig,
    UMTVideoTextForPreTraining,
    UMTVideoTextForQuestionAnswering,
    UMTVideoTextForRetrieval,
    UMTVideoTextModel,
    UMTVideoTextProcessor,
    cli,
)
from umt_hf.inference import features
from umt_hf.inference.features import choose_frames, extract_features, load_encoder, name_features, plan_windows
from umt_hf.processing.decoding import PyAVReader, VideoDecodingError, open_video
from umt_hf.processing.processing_umt_video_text import build_tokenizer

TINY = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "patch_size": 16,
    "image_size": 32, "num_frames": 4, "position_embedding_frames": 4, "position_embedding_image_size": 32,
    "num_aligned_layers": 1,
}  # fmt: skip
SPECIAL_TOKENS = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


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


@pytest.mark.parametrize("kind", [*sorted(KINDS.keys() - {"av1"}), "cut"])
def test_streamed_frames_are_those_read_by_index(kind, tmp_path):
    video = cut_start(write_kind("plain", tmp_path), tmp_path / "cut.mp4", 5) if kind == "cut" else None
    with open_video(video or write_kind(kind, tmp_path)) as reader:
        frames = list(reader.iterate_frames(range(reader.num_frames)))
        np.testing.assert_array_equal(np.stack(frames), reader.get_frames(range(reader.num_frames)))
        seconds = reader.compute_timestamps()
    assert len(seconds) == len(frames) and seconds[0] == 0 and (np.diff(seconds) > 0).all()


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


@pytest.mark.parametrize(
    ("kind", "pooling"),
    [
        (UMTVideoForPreTraining, "mean"),
        (UMTVideoForVideoClassification, "mean"),
        (UMTVideoForVideoClassification, "attentive"),
    ],
)
def test_folders_of_stage_1_and_of_classifiers(kind, pooling, tmp_path, video, caplog):
    model = kind(UMTVideoConfig(**TINY, pooling_type=pooling)).eval()
    model.save_pretrained(tmp_path)
    UMTVideoProcessor.from_model_config(model.config).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        check_encoder(load_encoder(tmp_path), model, video)
    assert "UNEXPECTED" not in caplog.text


@pytest.mark.parametrize(
    "kind",
    [UMTVideoTextModel, UMTVideoTextForPreTraining, UMTVideoTextForRetrieval, UMTVideoTextForQuestionAnswering],
)
def test_folders_of_models_with_text(kind, tmp_path, video, caplog):
    """Their `UMTVideoTextProcessor` holds the video processor."""
    text = TINY_TEXT | {"vocab_size": len(SPECIAL_TOKENS)}
    model = kind(UMTVideoTextConfig(**TINY_VIDEO_TEXT | {"text_config": text})).eval()
    model.save_pretrained(tmp_path)
    processor = UMTVideoTextProcessor(
        UMTVideoProcessor.from_model_config(model.config), build_tokenizer(SPECIAL_TOKENS)
    )
    processor.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        check_encoder(load_encoder(tmp_path), model, video)
    assert "UNEXPECTED" not in caplog.text


def check_encoder(encoder, model, video):
    loaded, processor = encoder
    expected = model.vision_model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    side = loaded.config.image_size
    assert (processor.crop_size["height"], processor.num_frames) == (side, loaded.config.num_frames)
    assert processor.do_center_crop is not hasattr(model, "text_model")  # as saved, not a default
    features = extract_features(video, loaded, processor, window=10).features
    with open_video(video) as reader, torch.no_grad():
        pixels = processor(reader.get_frames(range(10)), do_sample_frames=False, return_tensors="pt")["pixel_values"]
        np.testing.assert_allclose(features, model.vision_model(pixels).pooler_output, atol=1e-5)


def test_folders_without_encoder_or_processor_are_refused(folder, tmp_path):
    UMTVideoConfig(**TINY).save_pretrained(tmp_path)
    save_file({"something": np.zeros(1, np.float32)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(OSError):
        load_encoder(tmp_path)
    UMTVideoProcessor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a complete VideoEncoder: it lacks .* and .* more weights"):
        load_encoder(tmp_path)


def test_no_more_frames_are_read_than_the_next_windows_need(encoder, tmp_path, monkeypatch):
    video = write_video(tmp_path / "long.mp4", num_frames=120)
    model, processor = encoder
    num_read, read = 0, PyAVReader.iterate_frames

    def count(*arguments):
        nonlocal num_read
        for frame in read(*arguments):
            num_read += 1
            yield frame

    seen = []
    monkeypatch.setattr(PyAVReader, "iterate_frames", count)
    hook = model.register_forward_pre_hook(lambda *_: seen.append(num_read))
    extract_features(video, model, processor, "frame", window=4, stride=2, batch_size=3)
    hook.remove()
    needed = [min(4 + 2 * (3 * batch + 2), 120) for batch in range(len(seen))]
    assert len(seen) == 20 and all(n <= frames <= n + 4 for n, frames in zip(needed, seen, strict=True))


def test_processor_says_which_library_reads(encoder, video, monkeypatch):
    asked = []
    monkeypatch.setattr(features, "open_video", lambda *arguments: asked.append(arguments) or open_video(*arguments))
    extract_features(video, *encoder)
    assert asked == [(video, "pyav")]
    pytest.importorskip("decord")
    model, processor = encoder
    decord = UMTVideoProcessor.from_dict(processor.to_dict() | {"decoder": "decord"})
    found = extract_features(video, model, decord, "frame")
    assert asked[1] == (video, "decord")
    np.testing.assert_allclose(found.start_seconds, np.arange(10) / 24, atol=1e-3)
    np.testing.assert_allclose(found.features, extract_features(video, *encoder, "frame").features, atol=0.05)


def test_names_of_files_fit_the_file_system_and_differ(tmp_path):
    first, second = (name_features(tmp_path, f"/videos/{folder}/{'é' * 125}.mp4") for folder in "ab")
    assert first != second and max(len(path.name.encode()) for path in (first, second)) < 240
    first.touch()  # the file system agrees


def test_video_damaged_midway_leaves_nothing(folder, encoder, tmp_path):
    """It opens, and its first windows are fine."""
    video = write_video(tmp_path / "damaged.mp4", num_frames=200, gop=10)
    video.write_bytes(damage(video.read_bytes()))
    with open_video(video) as reader:
        assert len(reader.get_frames([0, 1, 2, 3])) == 4
    with pytest.raises(VideoDecodingError, match="damaged.mp4: cannot be decoded"):
        extract_features(video, *encoder, window=4)
    out = tmp_path / "out"
    assert "cannot be decoded" in run(video, "--model", folder, "--out", out, exit_code=1).output
    assert sorted(path.name for path in out.iterdir()) == ["settings.json", "skipped.json"]


def test_features_of_a_url_have_a_file_name():
    names = [
        name_features("out", url).name
        for url in ("https://h/a/clip.mp4?key=x/y", "https://h/b/clip.mp4", "https://h/")
    ]
    assert len(set(names)) == 3 and all(name.startswith("clip-") for name in names[:2])
    assert not any(set("?/:") & set(name) for name in names)
