"""The commands for many videos, and the same work with everything decoded before the model runs."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from umt_hf import (
    UMTVideoConfig,
    UMTVideoForVideoClassification,
    UMTVideoProcessor,
    UMTVideoTextConfig,
    UMTVideoTextForRetrieval,
    UMTVideoTextProcessor,
    embed_videos,
)
from umt_hf.inference.classification import LabelOptions, load_classifier, merge_views
from umt_hf.inference.engine import choose_dtype, inference_run
from umt_hf.inference.features import load_encoder, name_features, plan_windows, save_features
from umt_hf.inference.labels.files import label_files
from umt_hf.inference.loading import resolve_device
from umt_hf.inference.search import VideoTextEncoder
from umt_hf.processing.decoding import open_video
from umt_hf.processing.processing_umt_video_text import build_tokenizer

COMMANDS = ("features", "embed", "classify")
ENGINE, AT_ONCE = "umt_hf", "decode everything, then the model"
WAYS = (ENGINE, AT_ONCE)
WINDOW, IMAGE_SIZE, NUM_CLASSES = 8, 224, 10
PIECES = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "video"]
TEXT = {
    "vocab_size": len(PIECES), "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 128, "fusion_layer": 1, "max_position_embeddings": 32,
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What to run on which videos.

    Args:
        command: One of `COMMANDS`.
        videos: Files.
        models: Folder with the models of `save_models`.
        fps: Frames a second that features are made of.
        batch_size: Windows, videos or views at a time.
        num_workers: Processes that read ahead; `None`: as a command chooses.
    """

    command: str
    videos: tuple[str, ...]
    models: Path
    fps: float
    batch_size: int
    num_workers: int | None


@dataclass(frozen=True)
class Found:
    """Seconds from the start to the last result on the disk, its known parts, and results that can be read."""

    seconds: float
    waiting_seconds: float
    model_seconds: float
    results: np.ndarray | None


def save_models(folder: Path, hidden_size: int, num_hidden_layers: int) -> None:
    """Write an untrained classifier, which is the encoder too, and a dual encoder."""
    torch.manual_seed(0)
    vision = {
        "image_size": IMAGE_SIZE, "num_frames": WINDOW, "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers, "num_attention_heads": hidden_size // 64,
        "intermediate_size": 4 * hidden_size, "num_aligned_layers": 1,
    }  # fmt: skip
    config = UMTVideoConfig(**vision, num_labels=NUM_CLASSES)
    classifier = UMTVideoForVideoClassification(config)
    torch.nn.init.normal_(classifier.classifier.weight)
    classifier.save_pretrained(folder / "classify")
    processor = UMTVideoProcessor.from_model_config(config)
    processor.save_pretrained(folder / "classify")
    both = {"vision_config": vision, "text_config": TEXT | {"encoder_width": hidden_size}, "projection_dim": 64}
    UMTVideoTextForRetrieval(UMTVideoTextConfig(**both)).save_pretrained(folder / "embed")
    UMTVideoTextProcessor(processor, build_tokenizer(PIECES)).save_pretrained(folder / "embed")


def run_command(job: Job, out: Path) -> Found:
    """Run a command as a user does, into a new folder."""
    begin, options = time.perf_counter(), {"batch_size": job.batch_size, "num_workers": job.num_workers}
    with inference_run() as run:
        if job.command == "features":
            save_features(job.videos, job.models / "classify", out, "clip", WINDOW, WINDOW, fps=job.fps, **options)
        elif job.command == "embed":
            embed_videos(job.videos, job.models / "embed", out, **options)
        else:
            classifier = load_classifier(job.models / "classify")
            label_options = LabelOptions(NUM_CLASSES, num_clips=1, num_crops=1, show_progress=False, **options)
            label_files(classifier, job.videos, out / "labels.jsonl", label_options)
    seconds = time.perf_counter() - begin
    return Found(seconds, run.waiting_seconds, run.model_seconds, read_results(job, out))


def read_results(job: Job, out: Path) -> np.ndarray | None:
    """What a command has written, in the order of the videos; an index has its own form."""
    if job.command == "features":
        return np.concatenate([load_file(name_features(out, video))["features"] for video in job.videos])
    if job.command == "embed":
        return None
    lines = [json.loads(line) for line in (out / "labels.jsonl").read_text(encoding="utf-8").splitlines()]
    scores = {line["path"]: {one["label"]: one["probability"] for one in line["labels"]} for line in lines}
    names = [f"LABEL_{number}" for number in range(NUM_CLASSES)]
    return np.array([[scores[video][name] for name in names] for video in job.videos])


@torch.inference_mode()
def run_at_once(job: Job, out: Path) -> Found:
    """The baseline: all videos are decoded and prepared in this process, then the model sees them in full batches."""
    begin, device = time.perf_counter(), resolve_device(None)
    model, processor, encode = load(job, device)
    reading = time.perf_counter()
    if job.command == "features":
        pixel_values = torch.cat([read_windows(video, processor, model, job.fps) for video in job.videos])
    else:
        options = {"num_clips": 1, "num_crops": 1, "return_tensors": "pt"}
        pixel_values = torch.cat([processor(video, **options)["pixel_values"] for video in job.videos])
    computing = time.perf_counter()
    parts = [encode(part.to(device, model.dtype)).float().cpu() for part in pixel_values.split(job.batch_size)]
    done = time.perf_counter()
    results = torch.cat(parts).numpy()
    out.mkdir(parents=True)
    np.save(out / "results.npy", results)
    return Found(time.perf_counter() - begin, computing - reading, done - computing, results)


def load(job: Job, device: torch.device) -> tuple[Any, UMTVideoProcessor, Any]:
    """Model, video processor, and what computes results from `pixel_values`."""
    dtype = choose_dtype(None, device)
    if job.command == "embed":
        encoder = VideoTextEncoder(job.models / "embed", device=device, dtype=dtype)
        return encoder.model, encoder.processor.video_processor, lambda pixels: encoder.encode_videos(pixels)[0]
    if job.command == "classify":
        classifier = load_classifier(job.models / "classify")
        own = classifier.model
        return own, classifier.processor, lambda pixels: merge_views(own(pixel_values=pixels).logits, 1)
    model, processor = load_encoder(job.models / "classify")
    model = model.to(device, dtype)
    return model, processor, lambda pixels: model(pixel_values=pixels).pooler_output


def read_windows(video: str, processor: UMTVideoProcessor, model: Any, fps: float) -> torch.Tensor:
    """All windows of a video, `(W, T, C, H, W)`."""
    with open_video(video) as reader:
        plan = plan_windows(reader.compute_timestamps(), WINDOW, WINDOW, model.config.tubelet_size, fps)
        frames = reader.get_frames(plan.frames.tolist())
    inputs = processor(frames, do_sample_frames=False, num_clips=1, num_crops=1, return_tensors="pt")
    pixels = inputs["pixel_values"][0]
    pixels = torch.cat([pixels, pixels[-1:].expand(plan.num_padded, -1, -1, -1)])
    return torch.stack([pixels[start : start + WINDOW] for start in plan.starts])


def check_agreement(job: Job, found: Found, baseline: Found) -> None:
    """Compare what both ways have computed.

    Raises:
        RuntimeError: If it differs by more than rounding.
    """
    results = found.results
    if results is None:  # an index's vectors, by the reader and the encoder that fill it
        encoder = VideoTextEncoder(job.models / "embed", device="cpu")
        files = [type("File", (), {"path": video})() for video in job.videos]
        with torch.inference_mode():
            batches = encoder.read_batches(files, job.batch_size)
            results = torch.cat([encoder.encode_videos(batch.pixel_values)[0] for batch in batches]).numpy()
    tolerance = 1e-5 if resolve_device(None).type == "cpu" else 5e-2  # bfloat16 on a GPU
    if baseline.results is None or results.shape != baseline.results.shape:
        raise RuntimeError(f"{job.command}: the two ways have results of other shapes: not the same work.")
    if not np.allclose(results, baseline.results, atol=tolerance):
        raise RuntimeError(f"{job.command}: the two ways have other results: not the same work.")
