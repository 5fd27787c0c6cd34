"""Folders of numbered pictures, and what a `Video` column of `datasets` gives, as videos."""

import importlib
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Video
from PIL import Image

from umt_hf.inference.features import extract_features
from umt_hf.moving_shapes.render import write_moving_shapes
from umt_hf.processing.clips import read_clip
from umt_hf.processing.decoding import VideoDecodingError, open_video
from umt_hf.processing.frame_folders import holds_frames, list_frames
from umt_hf.processing.images import read_image
from umt_hf.processing.key_clips import read_key_clip
from umt_hf.processing.video_processing_umt_video import UMTVideoProcessor


def write_frames(folder, names, size=(20, 12)):
    folder.mkdir(parents=True, exist_ok=True)
    for level, name in enumerate(names):
        Image.new("RGB", size, (level * 10, level * 10, level * 10)).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    write_moving_shapes(folder, num_train_clips=1, num_validation_clips=1, num_test_clips=1)
    return next(folder.rglob("*.mp4"))


class StandInDecoder:
    """The public interface of torchcodec's `VideoDecoder` that the processor uses."""

    def __init__(self, path, layout="NCHW", encoded=None):
        with open_video(path) as reader:
            frames = torch.from_numpy(reader.get_frames(range(reader.num_frames)))
            self.metadata = SimpleNamespace(average_fps=reader.fps, duration_seconds=reader.duration_seconds)
        self._frames = frames.permute(0, 3, 1, 2) if layout == "NCHW" else frames
        if encoded is not None:
            self._hf_encoded = encoded

    def __len__(self):
        return len(self._frames)

    def get_frames_at(self, indices):
        if getattr(self, "is_damaged", False):
            raise RuntimeError("Could not push packet to decoder")
        return SimpleNamespace(data=self._frames[indices])


def test_frames_come_in_the_order_of_their_numbers(tmp_path):
    folder = write_frames(tmp_path / "clip", [f"frame_{number}.png" for number in range(12)])
    (folder / "._frame_3.png").write_bytes(b"twin")
    (folder / "notes.txt").touch()
    assert holds_frames(folder) and [path.rsplit("_", 1)[1] for path in list_frames(folder)][9:] == [
        "9.png",
        "10.png",
        "11.png",
    ]
    with open_video(folder) as reader:
        assert (reader.num_frames, reader.fps, reader.height, reader.width) == (12, None, 12, 20)
        assert reader.get_frames([11, 0, 2])[:, 0, 0, 0].tolist() == [110, 0, 20]
        with pytest.raises(VideoDecodingError, match="clip: has no frame rate"):
            reader.compute_timestamps()
    assert read_clip(str(folder), 4).shape == (4, 3, 12, 20)


def test_what_is_not_a_folder_of_frames_is_refused_by_name(tmp_path):
    other = write_frames(tmp_path / "sizes", ["1.png", "2.png"])
    Image.new("RGB", (8, 8)).save(other / "3.png")
    with (
        open_video(other) as reader,
        pytest.raises(VideoDecodingError, match="sizes: has pictures of different sizes"),
    ):
        reader.get_frames([0, 2])
    for names in (["cover.png", "1.png", "2.png"], ["1.png", "2.jpg"], ["a1_b1.png", "a2_b1.png"]):
        unordered = write_frames(tmp_path / "-".join(names), names)
        assert not holds_frames(unordered)
        with pytest.raises(VideoDecodingError, match="names differ in more than one number"):
            open_video(unordered)
    (tmp_path / "empty").mkdir()
    with pytest.raises(VideoDecodingError, match="empty: is not a file, nor a folder of numbered pictures"):
        open_video(tmp_path / "empty")
    (other / "3.png").write_bytes(b"no picture")
    with open_video(other) as reader, pytest.raises(VideoDecodingError, match=r"3\.png"):
        reader.get_frames([2])
    # One picture is a video of one frame.
    assert not holds_frames(write_frames(tmp_path / "one", ["x.png"]))
    assert open_video(tmp_path / "one").num_frames == 1


def test_the_processor_takes_folders_of_frames(tmp_path):
    folder = write_frames(tmp_path / "clip", [f"{number:03d}.jpg" for number in range(5)])
    processor = UMTVideoProcessor(num_frames=5, size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12})
    pictures = torch.cat([read_image(path) for path in list_frames(folder)])
    expected = processor(pictures, return_tensors="pt")["pixel_values"]
    for source in (folder, str(folder), [str(folder)], {"path": str(folder), "bytes": None}):
        assert torch.equal(processor(source, return_tensors="pt")["pixel_values"], expected)


def test_features_of_frames_have_no_times(tmp_path):
    from umt_hf import UMTVideoConfig, UMTVideoModel

    folder = write_frames(tmp_path / "clip", [f"{number}.png" for number in range(6)], (16, 16))
    config = UMTVideoConfig(
        image_size=16, patch_size=8, num_frames=2, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, position_embedding_frames=2, position_embedding_image_size=16,
    )  # fmt: skip
    model, processor = UMTVideoModel(config).eval(), UMTVideoProcessor.from_model_config(config)
    found = extract_features(folder, model, processor)
    assert found.first_frame.tolist() == [0, 2, 4] and np.isnan(found.start_seconds).all()
    np.save(tmp_path / "clip.npy", np.zeros((6, 16, 16, 3), np.uint8))
    assert np.isnan(extract_features(tmp_path / "clip.npy", model, processor).end_seconds).all()
    with pytest.raises(VideoDecodingError, match="has no frame rate"):
        extract_features(folder, model, processor, fps=2)


def test_rows_of_a_video_column_are_read_as_their_path_or_bytes_are(video):
    processor = UMTVideoProcessor(num_frames=4)
    expected = processor(str(video), return_tensors="pt")["pixel_values"]
    content = video.read_bytes()
    rows = [
        {"path": str(video), "bytes": None},
        {"path": None, "bytes": content},
        {"path": "gone.mp4", "bytes": content},
        {"bytes": content},
    ]
    for row in rows:
        assert torch.equal(processor(row, return_tensors="pt")["pixel_values"], expected)
    assert torch.equal(processor(rows, return_tensors="pt")["pixel_values"], expected.expand(4, -1, -1, -1, -1))
    for row in ({"path": None, "bytes": None}, {"path": "", "bytes": b""}):
        with pytest.raises(VideoDecodingError, match="neither a path nor bytes"):
            processor(row)
    with pytest.raises(VideoDecodingError, match=r"clip\.mp4: "):
        processor({"path": "clip.mp4", "bytes": b"no video"})
    with pytest.raises(ValueError, match="got dict"):
        processor({"frames": [1]})


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_decoder_objects_give_the_frames_of_their_file(video, layout):
    processor = UMTVideoProcessor(num_frames=4)
    expected = processor(str(video), return_tensors="pt", return_metadata=True)
    found = processor(StandInDecoder(video, layout), return_tensors="pt", return_metadata=True)
    assert torch.equal(found["pixel_values"], expected["pixel_values"])
    for name in ("fps", "total_num_frames", "height", "width"):
        assert getattr(found["video_metadata"][0], name) == getattr(expected["video_metadata"][0], name)
    many = processor([StandInDecoder(video, layout), str(video)], num_clips=2, return_tensors="pt")["pixel_values"]
    assert torch.equal(many[:2], many[2:])
    by_time = [
        processor(source, fps=4, return_tensors="pt")["pixel_values"] for source in (str(video), StandInDecoder(video))
    ]
    assert torch.equal(*by_time)
    damaged = StandInDecoder(video, layout)
    damaged.is_damaged = True
    with pytest.raises(VideoDecodingError, match="<video decoder>: cannot be decoded"):
        processor(damaged)


def test_a_decoder_of_datasets_is_read_from_its_file(video, tmp_path):
    processor = UMTVideoProcessor(num_frames=4)
    expected = processor(str(video), return_tensors="pt")["pixel_values"]
    for encoded in ({"path": str(video), "bytes": None}, {"path": None, "bytes": video.read_bytes()}):
        decoder = StandInDecoder(video, encoded=encoded)
        decoder.is_damaged = True  # it is not asked
        assert torch.equal(processor(decoder, return_tensors="pt")["pixel_values"], expected)
    # A file that is not on this machine is left to the decoder.
    decoder = StandInDecoder(video, encoded={"path": "hf://datasets/x/a.mp4", "bytes": None})
    assert torch.equal(processor(decoder, return_tensors="pt")["pixel_values"], expected)


def test_torchcodec_gives_the_same_frames(video):
    try:
        open_video(video, "torchcodec").close()
    except ImportError as error:
        pytest.skip(str(error))
    decoders = importlib.import_module("torchcodec.decoders")
    processor = UMTVideoProcessor(num_frames=4)
    expected = processor(str(video), return_tensors="pt")["pixel_values"]
    found = processor(decoders.VideoDecoder(str(video)), return_tensors="pt")["pixel_values"]
    assert (found - expected).abs().mean() < 0.05
    # The decoder of a `Video` column knows its file, which is read as the path is.
    for row in (str(video), {"path": None, "bytes": video.read_bytes()}):
        table = Dataset.from_dict({"video": [row]}, features=Features({"video": Video()}))
        for decode in (True, False):
            found = processor(table.cast_column("video", Video(decode=decode))[0]["video"], return_tensors="pt")
            assert torch.equal(found["pixel_values"], expected)


def test_accents_may_be_composed_or_not(video, tmp_path):
    decomposed = tmp_path / unicodedata.normalize("NFD", "é.mp4")
    decomposed.write_bytes(video.read_bytes())
    with open_video(str(tmp_path / unicodedata.normalize("NFC", "é.mp4"))) as reader:
        assert reader.num_frames > 1


def test_a_key_frame_in_a_folder_of_frames(tmp_path):
    """AVA's frames are often on disk; a folder of files of one second each stays what it was."""
    folder = write_frames(tmp_path / "movie", [f"movie_{number:06d}.jpg" for number in range(1, 7)])
    frames = read_key_clip(str(folder), [-2, 0, 9], key_frame=3)
    assert frames[:, 0, 0, 0].tolist() == [10, 30, 50]
    with pytest.raises(VideoDecodingError, match="movie: has no frame rate"):
        read_key_clip(str(folder), [0], key_seconds=1)
    (tmp_path / "seconds").mkdir()
    with pytest.raises(VideoDecodingError, match=r"seconds: has no file 1\.mp4"):
        read_key_clip(str(tmp_path / "seconds"), [0], key_seconds=1)
