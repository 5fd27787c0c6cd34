"""What evaluations read and compute is that of plain loops over the same batches, in float32."""

import logging

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from tests.unit.finetuning.test_classification import tiny_config
from tests.unit.inference.test_search import save_model
from tests.unit.modeling.test_detection_model import build_model
from tests.unit.video_files import write_video
from umt_hf import UMTVideoForVideoClassification, UMTVideoProcessor, UMTVideoTextForRetrieval
from umt_hf.data.key_frames import KeyFrame
from umt_hf.evaluation.classification import classify_videos
from umt_hf.evaluation.detection import KeyFrameClips, detect_actions
from umt_hf.evaluation.setup import load_model_and_processor, measured_run
from umt_hf.inference.classification import merge_views
from umt_hf.inference.held_out import evaluation_mode, load_video_batches, plan_shard, read_middle_frames
from umt_hf.runs.arguments import EvaluatedModelArguments, EvaluationDataArguments


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("videos")
    return [str(write_video(folder / f"{number}.mp4", 12 + 5 * number)) for number in range(5)]


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_scores_are_those_of_the_plain_loop_bit_by_bit(videos, accelerator, num_workers):
    torch.manual_seed(0)
    model = UMTVideoForVideoClassification(tiny_config()).eval()
    torch.nn.init.normal_(model.classifier.weight)
    processor = UMTVideoProcessor.from_model_config(model.config)
    expected = []
    for start in range(0, 5, 2):
        pixels = processor(videos[start : start + 2], num_clips=2, num_crops=1, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            expected.append(merge_views(model(pixels).logits, 2))
    options = {"batch_size": 4, "num_clips": 2, "num_workers": num_workers}
    found = classify_videos(model, processor, videos, [0] * 5, accelerator, **options)
    np.testing.assert_array_equal(found.scores, torch.cat(expected).numpy())

    detector = build_model()
    frames = [
        KeyFrame(video, "a", "0", key_frame=3, boxes=[[4.0, 4.0, 40.0, 40.0]], labels=[[0]], scores=[1.0])
        for video in videos
    ]
    processor = UMTVideoProcessor.from_model_config(detector.config)
    processor.sampling_strategy, processor.frame_span = "dense", 8
    clips = KeyFrameClips(frames, processor, detector.config.patch_size)
    rows = []
    for start in range(0, 5, 2):
        batch = [clips[row] for row in range(start, min(start + 2, 5))]
        with torch.no_grad():
            logits = detector(
                torch.stack([clip["pixel_values"] for clip in batch]),
                boxes=torch.stack([clip["boxes"] for clip in batch]),
            ).logits
        rows.append(logits.sigmoid()[:, 0])
    found = detect_actions(detector, processor, frames, accelerator, batch_size=2, num_workers=num_workers)
    np.testing.assert_array_equal(found.scores, torch.cat(rows).numpy())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_videos_with_texts_are_read_as_in_a_plain_loop(videos, accelerator, num_workers):
    """Retrieval, multiple choice and question answering read by this alone."""
    processor = UMTVideoProcessor(num_frames=3, size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    batches = plan_shard(5, 2, accelerator)
    found = list(load_video_batches(videos, batches, processor, accelerator, num_workers))
    assert [batch for batch, _ in found] == batches
    for batch, pixels in found:
        expected = torch.stack([read_middle_frames(processor, videos[row]) for row in batch])
        torch.testing.assert_close(pixels, expected, rtol=0, atol=0)


def test_models_are_tested_in_float32_whatever_they_are_stored_in(tmp_path):
    folder = save_model(tmp_path / "model")
    UMTVideoTextForRetrieval.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    assert UMTVideoTextForRetrieval.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16
    arguments = EvaluatedModelArguments(model_name_or_path=str(folder))
    data = EvaluationDataArguments(data="list.json")
    model, _ = load_model_and_processor(UMTVideoTextForRetrieval, arguments, data)
    assert model.dtype == torch.float32


def test_a_test_says_where_its_time_went_and_has_a_time_out(accelerator, caplog):
    data = EvaluationDataArguments(data="list.json", dataloader_timeout_seconds=7)
    model = torch.nn.Linear(1, 1)
    with caplog.at_level(logging.INFO), measured_run(accelerator, data) as run:
        assert run.timeout_seconds == 7
        with evaluation_mode(model, accelerator):
            assert torch.is_inference_mode_enabled()
    assert "% waiting for data, " in caplog.text
    with evaluation_mode(model, accelerator):  # in a training
        assert not torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
    with pytest.raises(ValueError, match="dataloader_timeout_seconds must be at least 0"):
        EvaluationDataArguments(data="list.json", dataloader_timeout_seconds=-1)
