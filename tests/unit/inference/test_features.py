"""Features of sliding windows are the model's own, carry the right times and are written whole or not at all."""

import json
import logging
from itertools import islice
from pathlib import Path

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
from umt_hf.inference.features import (
    choose_frames,
    extract_features,
    load_encoder,
    name_features,
    plan_windows,
    save_features,
    windows,
)
from umt_hf.processing.decoding import PyAVReader, VideoDecodingError, open_video
from umt_hf.processing.processing_umt_video_text import build_tokenizer
from umt_hf.runs.disk import LOCK_FILE, hold_lock

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


@pytest.mark.parametrize("is_cut_off", [False, True])
@pytest.mark.parametrize("kind", [*sorted(KINDS.keys() - {"av1"}), "cut"])
def test_sparse_frames_are_streamed_as_they_are_read_by_index(kind, is_cut_off, tmp_path, monkeypatch):
    """Pictures in between that no other refers to are left out; where one does not come, all are decoded again."""
    video = cut_start(write_kind("plain", tmp_path), tmp_path / "cut.mp4", 5) if kind == "cut" else None
    if is_cut_off:
        read = PyAVReader._decode_sparse
        monkeypatch.setattr(PyAVReader, "_decode_sparse", lambda own, wanted: islice(read(own, wanted), 2))
    with open_video(video or write_kind(kind, tmp_path)) as reader:
        last = reader.num_frames - 1
        for chosen in (range(0, last, 3), {1, last}, {0, 2, 3, 4, last - 1}):
            indices = sorted(index for index in chosen if 0 <= index <= last) or [last]
            frames = np.stack(list(reader.iterate_frames(indices)))
            np.testing.assert_array_equal(frames, reader.get_frames(indices))


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
    monkeypatch.setattr(windows, "open_video", lambda *arguments: asked.append(arguments) or open_video(*arguments))
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
    assert {path.name for path in out.iterdir()} == {"settings.json", "skipped.json", LOCK_FILE}


def test_features_of_a_url_have_a_file_name():
    names = [
        name_features("out", url).name
        for url in ("https://h/a/clip.mp4?key=x/y", "https://h/b/clip.mp4", "https://h/")
    ]
    assert len(set(names)) == 3 and all(name.startswith("clip-") for name in names[:2])
    assert not any(set("?/:") & set(name) for name in names)


# ------------------------------------------------------------------------------------------------- many videos at once
@pytest.fixture
def several(tmp_path):
    """Videos of 3 to 17 frames, one of them in a sub-folder and with the name of another."""
    folder = tmp_path / "several"
    (folder / "more").mkdir(parents=True)
    lengths = {"a.mp4": 10, "b.mp4": 17, "c.mp4": 3, "more/a.mp4": 9}
    return [write_video(folder / name, num_frames=length, gop=5) for name, length in lengths.items()]


def cut_plainly(encoder, video, window, stride):
    """Windows of a video, decoded at once."""
    _, processor = encoder
    with open_video(video) as reader:
        frames = reader.get_frames(range(reader.num_frames))
    pixels = processor(frames, do_sample_frames=False, return_tensors="pt")["pixel_values"][0]
    pixels = torch.cat([pixels, pixels[-1:].expand(max(window - len(pixels), 0), -1, -1, -1)])
    last = len(pixels) - window
    starts = [*range(0, last, stride), last]
    return starts, [pixels[start : start + window] for start in starts], len(frames)


@torch.no_grad()
def encode_plainly(model, windows, batch_size):
    parts = [torch.stack(windows[start : start + batch_size]) for start in range(0, len(windows), batch_size)]
    return torch.cat([model(part).last_hidden_state for part in parts])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("level", ["clip", "frame", "tubelet"])
def test_files_are_those_of_the_plain_loop_bit_by_bit(folder, encoder, several, tmp_path, level, num_workers):
    """One video after the other, decoded at once, windows in the same batches."""
    save_features(map(str, several), folder, tmp_path / "out", level, 4, 3, batch_size=2, num_workers=num_workers)
    for video in several:
        starts, windows, num_frames = cut_plainly(encoder, video, 4, 3)
        tokens = encode_plainly(encoder[0], windows, 2).unflatten(1, (4, 2, 2))
        if level == "clip":
            batches = [torch.stack(windows[start : start + 2]) for start in range(0, len(windows), 2)]
            with torch.no_grad():
                expected = torch.cat([encoder[0](batch).pooler_output for batch in batches]).numpy()
        else:
            tokens = tokens.mean((2, 3)) if level == "frame" else tokens
            sums = np.zeros((max(num_frames, 4), *tokens.shape[2:]), np.float32)
            counts = np.zeros(max(num_frames, 4), np.float32)
            for start, own in zip(starts, tokens.numpy(), strict=True):
                sums[start : start + 4] += own
                counts[start : start + 4] += 1
            expected = (sums / counts.reshape(-1, *[1] * (sums.ndim - 1)))[:num_frames]
        stored = load_file(name_features(tmp_path / "out", str(video)))["features"]
        np.testing.assert_array_equal(stored, expected)
        found = extract_features(video, *encoder, level, 4, 3, 2).features
        np.testing.assert_array_equal(stored, found)


def slide_together(encoder, videos, batch_size):
    """Features of videos whose windows share batches, as on a GPU."""
    model, processor = encoder
    settings = windows.resolve_windows(model, "clip", 4, 3, None)
    blocks = [
        list(windows.read_blocks(number, video, processor, settings, model.dtype))
        for number, video in enumerate(videos)
    ]
    # In turn, as several workers give them.
    mixed = [own[turn] for turn in range(max(map(len, blocks))) for own in blocks if turn < len(own)]
    found = dict(windows.slide(mixed, model, settings, batch_size, shares_batches=True))
    return [found[number].features for number in range(len(videos))], mixed


def test_windows_of_several_videos_share_batches_of_one_size(encoder, several):
    """A window's features are those of the plain loop over such batches, whichever windows came with it."""
    model, sizes = encoder[0], []
    hook = model.register_forward_pre_hook(
        lambda _, __, inputs: sizes.append(len(inputs["pixel_values"])), with_kwargs=True
    )
    together, _ = slide_together(encoder, several, 4)
    hook.remove()
    windows = [cut_plainly(encoder, video, 4, 3)[1] for video in several]
    assert sizes == [4] * -(-sum(map(len, windows)) // 4)
    for video, own, cut in zip(several, together, windows, strict=True):
        filled = [torch.stack([window, *[cut[0]] * 3]) for window in cut]
        with torch.no_grad():
            expected = torch.stack([model(batch).pooler_output[0] for batch in filled]).numpy()
        np.testing.assert_array_equal(own, expected)
        np.testing.assert_allclose(own, extract_features(video, *encoder, "clip", 4, 3).features, atol=1e-6)
    fewer, _ = slide_together(encoder, several[2:], 4)
    for own, expected in zip(fewer, together[2:], strict=True):
        np.testing.assert_array_equal(own, expected)


def test_a_video_that_breaks_midway_leaves_its_neighbours_alone(encoder, several):
    expected, mixed = slide_together(encoder, several, 4)
    place = [block.number for block in mixed].index(1)
    broken = [block for at, block in enumerate(mixed) if block.number != 1 or at == place]
    broken.insert(place + 2, windows.FrameBlock(1, None, None, True, "cannot be decoded."))
    model = encoder[0]
    settings = windows.resolve_windows(model, "clip", 4, 3, None)
    found = dict(windows.slide(broken, model, settings, 4, shares_batches=True))
    assert found[1] == "cannot be decoded." and len(found) == 4
    for number in (0, 2, 3):
        np.testing.assert_array_equal(found[number].features, expected[number])


def test_a_stride_above_the_window_leaves_frames_unread(encoder, tmp_path, monkeypatch):
    video, asked = write_video(tmp_path / "long.mp4", num_frames=30), []
    read = PyAVReader.iterate_frames
    monkeypatch.setattr(PyAVReader, "iterate_frames", lambda own, places: asked.append(places) or read(own, places))
    found = extract_features(video, *encoder, "clip", window=4, stride=8)
    assert found.first_frame.tolist() == [0, 8, 16, 24, 26] and found.num_even_rows == 4
    assert asked == [[place for place in range(30) if place % 8 < 4 or place >= 26]]
    for start, own in zip(found.first_frame, found.features, strict=True):
        np.testing.assert_allclose(own, run_model(encoder, video, range(start, start + 4)).mean((0, 1, 2)), atol=1e-5)
    for level in ("frame", "tubelet"):
        with pytest.raises(ValueError, match=f"stride 8 is longer than window 4 .* level={level}"):
            extract_features(video, *encoder, level, window=4, stride=8)


def test_a_stride_in_seconds_follows_the_times_of_the_video(encoder, tmp_path):
    ticks = [10 * i + 7 * (i // 5) ** 2 for i in range(48)]
    video = write_video(tmp_path / "uneven.mp4", ticks=ticks)
    found = extract_features(video, *encoder, "clip", window=4, stride_seconds=0.5)
    seconds = np.array(ticks) / 240
    nearest = [int(np.abs(seconds - tick).argmin()) for tick in np.arange(0, seconds[-1], 0.5)]
    assert found.first_frame.tolist() == sorted({*[start for start in nearest if start <= 44], 44})
    with pytest.raises(ValueError, match="stride=4 or stride_seconds=0.5, not both"):
        extract_features(video, *encoder, "clip", window=4, stride=4, stride_seconds=0.5)
    with pytest.raises(ValueError, match="stride_seconds must be positive, got -1"):
        extract_features(video, *encoder, "clip", window=4, stride_seconds=-1)
    with pytest.raises(ValueError, match="stride_seconds may leave frames out.* level=frame"):
        extract_features(video, *encoder, "frame", window=4, stride_seconds=1)


def test_every_frame_is_seen_once_unless_overlap_is_asked_for(folder, encoder, video, tmp_path):
    assert extract_features(video, *encoder, window=4).first_frame.tolist() == [0, 4, 6]
    said = run(video, "--model", folder, "--out", tmp_path / "once", "--window", 4).stderr
    assert "overlap" not in said
    said = run(video, "--model", folder, "--out", tmp_path / "twice", "--window", 4, "--stride", 2).stderr
    assert "Windows overlap: each frame goes through the model 2 times." in said


def test_names_of_arrays_are_those_of_videos_that_have_one(folder, several, tmp_path):
    bad = tmp_path / "a.mp4"
    bad.write_text("not a video")
    run(bad, *several[:1], "--model", folder, "--out", tmp_path / "out", "--window", 4, "--format", "npy")
    names = json.loads((tmp_path / "out" / "npy" / "names.json").read_text())
    assert list(names.values()) == [str(several[0])]
    assert {path.stem for path in (tmp_path / "out" / "npy").glob("*.npy")} == names.keys()


def test_one_command_at_a_time_writes_into_a_folder(folder, several, tmp_path):
    out = tmp_path / "out"
    with hold_lock(out / LOCK_FILE, str(out)):
        result = run(several[0], "--model", folder, "--out", out, exit_code=2)
    assert "out is being written by another run" in result.output
    run(several[0], "--model", folder, "--out", out)


def test_arrays_have_the_names_of_their_videos_and_rows_at_even_distances(folder, several, tmp_path):
    """The form that OpenTAD and ActionFormer read; beside the other files, and kept up to date by later runs."""
    out = tmp_path / "out"
    flags = ("--model", folder, "--out", out, "--window", 4, "--stride", 3, "--num-workers", 0)
    run(*several[:2], *flags)  # a folder that has none yet
    run(*several[:3], *flags, "--format", "npy")
    names = json.loads((out / "npy" / "names.json").read_text())
    assert names == {Path(video).stem: str(video) for video in several[:3]}
    written = {path: path.stat().st_mtime_ns for path in (out / "npy").glob("*.npy")}
    run(*several, *flags)  # its name is taken
    (second,) = {path.stem for path in (out / "npy").glob("*.npy")} - names.keys()
    assert second.startswith("a-") and second == name_features(out, str(several[3])).stem
    assert all(path.stat().st_mtime_ns == then for path, then in written.items())
    for name, starts in {"a": [0, 3, 6], "b": [0, 3, 6, 9, 12], "c": [0], second: [0, 3]}.items():
        array = np.load(out / "npy" / f"{name}.npy")
        video = several[3] if name == second else several["abc".index(name)]
        stored = load_file(name_features(out, str(video)))
        assert array.dtype == np.float32 and stored["first_frame"][: len(array)].tolist() == starts
        np.testing.assert_array_equal(array, stored["features"][: len(starts)])
    several[0].write_bytes(b"no video")
    run(*several, *flags)
    assert not (out / "npy" / "a.npy").exists()


def test_precision_is_part_of_what_a_folder_was_made_with(folder, several, tmp_path):
    flags = ("--model", folder, "--num-workers", 0)
    for name in ("float32", "bfloat16"):
        run(several[0], *flags, "--out", tmp_path / name, *(() if name == "float32" else ("--dtype", name)))
        settings = json.loads((tmp_path / name / "settings.json").read_text())["settings"]
        assert settings["dtype"] == name
    weights = [
        json.loads((tmp_path / name / "settings.json").read_text())["settings"]["weights"]
        for name in ("float32", "bfloat16")
    ]
    assert weights[0] == weights[1]  # it is the same model
    full, half = (
        load_file(name_features(tmp_path / name, str(several[0])))["features"] for name in ("float32", "bfloat16")
    )
    assert 0 < np.abs(full - half).max() < 0.05 * np.abs(full).max()
    result = run(several[1], *flags, "--out", tmp_path / "bfloat16", exit_code=2)
    assert "made with dtype='bfloat16', not 'float32'" in " ".join(result.output.replace("│", " ").split())
    # Folders of before say nothing of it.
    path = tmp_path / "float32" / "settings.json"
    content = json.loads(path.read_text())
    del content["settings"]["dtype"], content["settings"]["stride_seconds"]
    path.write_text(json.dumps(content))
    run(several[1], *flags, "--out", tmp_path / "float32")


def test_a_run_says_where_its_time_went(folder, video, tmp_path):
    result = run(video, "--model", folder, "--out", tmp_path / "out", "--num-workers", 1, "--json")
    assert "% waiting for data" in result.stderr and "in one worker process." in result.stderr
    assert json.loads(result.stdout)["num_extracted"] == 1
