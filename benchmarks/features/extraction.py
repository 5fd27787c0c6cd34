"""One extraction of features, streamed or all at once, in a separate process, so that the peak is its own."""

import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.common import read_peak_resident_memory, run_in_new_process
from umt_hf import UMTVideoConfig, UMTVideoModel, UMTVideoProcessor
from umt_hf.inference.features import extract_features, plan_windows
from umt_hf.processing.decoding import open_video

# With the GNU allocator's moving threshold, blocks of a few MB stay in the process after they are freed, and the peak
# creeps up with what was held in passing. At a fixed one they go back, and the peak is what is held at a time.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "200000"}
STREAMED, AT_ONCE = "umt_hf, windows streamed", "decode everything, then encode"
IMAGE_SIZE, WINDOW = 224, 8
# Small, since its size is not the question: the more it holds, the less the two ways differ.
ENCODER = {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 768}


@dataclass(frozen=True)
class ExtractionJob:
    """What to run."""

    way: str
    video: str
    features: str
    fps: float
    batch_size: int
    threads: int


@dataclass(frozen=True)
class Extraction:
    """Peak resident memory beyond what the imports took, in bytes; windows; wall-clock seconds."""

    peak_bytes: int
    num_windows: int
    seconds: float


def measure_extraction(job: ExtractionJob) -> Extraction:
    """Extract in a new process; the features are left in the file that the job names.

    Raises:
        RuntimeError: If the process fails, for want of memory for example.
    """
    return Extraction(**run_in_new_process("benchmarks.features.extraction", asdict(job), ALLOCATOR))


def run_job(job: ExtractionJob) -> dict[str, Any]:
    """Extract in this process."""
    imports = read_peak_resident_memory()
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    model = UMTVideoModel(UMTVideoConfig(image_size=IMAGE_SIZE, num_frames=WINDOW, **ENCODER)).eval()
    processor = UMTVideoProcessor.from_model_config(model.config)
    start = time.perf_counter()
    if job.way == STREAMED:
        features = extract_features(
            job.video, model, processor, "clip", WINDOW, WINDOW, job.batch_size, job.fps
        ).features
    else:
        features = extract_at_once(job, model, processor)
    seconds = time.perf_counter() - start
    np.save(job.features, features)
    return asdict(Extraction(read_peak_resident_memory() - imports, len(features), seconds))


@torch.inference_mode()
def extract_at_once(job: ExtractionJob, model: UMTVideoModel, processor: UMTVideoProcessor) -> np.ndarray:
    """The baseline: all frames of the video are read, then all prepared, then encoded in the same batches."""
    with open_video(job.video) as reader:
        plan = plan_windows(reader.compute_timestamps(), WINDOW, WINDOW, model.config.tubelet_size, job.fps)
        frames = reader.get_frames(plan.frames.tolist())
    inputs = processor(frames, do_sample_frames=False, num_clips=1, num_crops=1, return_tensors="pt")
    pixel_values = inputs["pixel_values"][0]
    windows = [pixel_values[start : start + WINDOW] for start in plan.starts]
    features = [
        model(torch.stack(windows[i : i + job.batch_size])).pooler_output
        for i in range(0, len(windows), job.batch_size)
    ]
    return torch.cat(features).numpy()


if __name__ == "__main__":
    print(json.dumps(run_job(ExtractionJob(**json.loads(sys.argv[1])))))
