"""Which frames and which replacements training clips draw, against what they drew before they shared one reader."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from packaging.version import Version

from umt_hf import UMTVideoProcessor
from umt_hf.data.key_frames import KeyFrame, build_key_frame_table
from umt_hf.finetuning.classification import LabeledClips
from umt_hf.finetuning.detection import BoxedClips
from umt_hf.finetuning.retrieval import RetrievalDataArguments
from umt_hf.finetuning.trainer import VideoTextClips
from umt_hf.moving_shapes.render import write_video
from umt_hf.processing.classification_transforms import ClassificationTransform
from umt_hf.processing.decoding import PyAVReader
from umt_hf.processing.detection_transforms import DetectionTransform
from umt_hf.processing.train_transforms import PretrainingTransform, ResizedCropTransform
from umt_hf.runs.arguments import CropArguments
from umt_hf.training.clips import Clip, ClipCollator, ClipDataset, ClipRequest, finish_batch
from umt_hf.training.pairs import PairDataset

GOLDEN = Path(__file__).parents[2] / "fixtures" / "loops" / "clips.json"
NUM_VIDEOS = 12
UNREADABLE = (0, 1, 4, 5, 7, 8, 9, 11)
# The mask noise of a clip is exponential, which older versions of PyTorch draw otherwise from the same seed.
HAS_SAME_NOISE = Version(torch.__version__) >= Version("2.14")


def write_videos(folder: Path, unreadable: tuple[int, ...] = ()) -> Dataset:
    """Videos of 40 frames, each of one grey level, by which it is recognised."""
    rows = []
    for number in range(NUM_VIDEOS):
        path = folder / f"{number}.mp4"
        if number in unreadable:
            path.write_bytes(b"not a video")
        else:
            write_video(path, np.full((40, 32, 48, 3), 20 * number, dtype=np.uint8))
        rows.append({"video": str(path), "label": number, "caption": f"video {number}", "corpus": 0})
    return Dataset.from_list(rows)


def build_clips(table: Dataset) -> dict:
    """Every data set of training clips, by name: what to call it with for a row and an epoch."""
    transform, crop = PretrainingTransform(32), ResizedCropTransform(32)
    clips = {
        f"stage 1, {strategy}": ClipDataset(
            table, transform, 4, 16, sampling_strategy=strategy, frame_stride=3, repeated_augmentation=2
        )
        for strategy in ("segments", "uniform", "middle", "dense")
    }
    clips["stage 1, held out"] = ClipDataset(table, transform, 4, 16, is_training=False)
    clips["stage 2"] = PairDataset(table, "video", transform=crop, num_frames=4, num_tokens=16)
    for seconds in (None, 1.5):
        data = RetrievalDataArguments(num_frames=3, first_seconds=seconds)
        clips[f"video-text, {seconds}"] = VideoTextClips(table, data, CropArguments(), image_size=32, seed=3)
    for strategy in ("uniform", "segments"):
        processor = UMTVideoProcessor(num_frames=4, sampling_strategy=strategy)
        clips[f"classification, {strategy}"] = LabeledClips(table, processor, ClassificationTransform(32), seed=3)
    frames = [
        KeyFrame(row["video"], str(i), "0", key_frame=9 + i, boxes=[[0, 0, 1, 1]], labels=[[0]], width=1, height=1)
        for i, row in enumerate(table)
    ]
    processor = UMTVideoProcessor(num_frames=4, sampling_strategy="dense", frame_stride=2, frame_span=20)
    transform = DetectionTransform(32, 36, processor.image_mean, processor.image_std)
    clips["detection"] = BoxedClips(build_key_frame_table(frames), processor, transform, 1, seed=3)
    return clips


def read_clip(clips, row: int, epoch: int) -> dict:
    """A sample as numbers: the video that it shows, how many could not be read before it, and what was drawn."""
    if isinstance(clips, ClipDataset):
        found, failures = clips[ClipRequest(row, (3, epoch, row))]
        if not found:
            return {"video": None, "failures": len(failures)}
        draws = [[*clip.frames.shape[-2:], clip.is_flipped, *clip.mask_noise[:2].tolist()] for clip in found]
        video = round(found[0].frames.float().mean().item() / 20)
        return {"video": video, "failures": len(failures), "draws": draws}
    clips.epoch = epoch
    sample = clips[row]
    mean = sample["pixel_values"].double().mean().item()
    return {"video": sample["number"], "failures": len(sample["failures"]), "mean": mean}


def compute_draws(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list]:
    read, indices = PyAVReader.get_frames, []
    monkeypatch.setattr(
        PyAVReader, "get_frames", lambda reader, wanted: indices.append(list(wanted)) or read(reader, wanted)
    )
    draws = {}
    for unreadable in ((), UNREADABLE):
        for name, clips in build_clips(write_videos(folder, unreadable)).items():
            found = []
            for row, epoch in ((0, 0), (4, 0), (7, 0), (3, 2), (0, 5)):
                indices.clear()
                found.append({**read_clip(clips, row, epoch), "frames": [[int(i) for i in own] for own in indices]})
            draws[f"{name}, {len(unreadable)} unreadable"] = found
    return draws


def test_draws(tmp_path, monkeypatch):
    draws, golden = compute_draws(tmp_path, monkeypatch), json.loads(GOLDEN.read_text())
    assert draws.keys() == golden.keys()
    for name, samples in golden.items():
        for found, before in zip(draws[name], samples, strict=True):
            assert found.keys() == before.keys(), name
            for key, value in before.items():
                if key == "draws" and not HAS_SAME_NOISE:  # what comes before the first noise is the same
                    found[key], value = ([own[:3] for own in draws[:1]] for draws in (found[key], value))
                if key == "draws":
                    torch.testing.assert_close(torch.tensor(found[key]), torch.tensor(value), msg=name)
                else:
                    assert found[key] == (pytest.approx(value, abs=1e-4) if key == "mean" else value), (name, key)


@pytest.mark.parametrize("transform", [PretrainingTransform(32), ResizedCropTransform(32)])
def test_large_crops_are_resized_before_they_travel(transform):
    """What the device then gets is what a worker finishes where there is no device; small crops stay as they are."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(48, 48), (49, 48), (90, 60), (20, 32), (32, 300)]
    frames = [torch.randint(256, (2, 3, *size), dtype=torch.uint8, generator=generator) for size in sizes]

    def collate(use_worker: bool):
        samples = [([Clip(clip, number % 2 == 1, torch.ones(4))], []) for number, clip in enumerate(frames)]
        return ClipCollator(transform, use_worker)(samples)

    travelling = collate(use_worker=False)
    assert [tuple(clip.shape[-2:]) for clip in travelling["frames"]] == [
        (48, 48), (32, 32), (32, 32), (20, 32), (32, 32),
    ]  # fmt: skip
    assert all(clip.dtype == torch.uint8 for clip in travelling["frames"])
    finished = finish_batch(travelling, transform, torch.device("cpu"))["pixel_values"]
    assert torch.equal(finished, collate(use_worker=True)["pixel_values"])
