"""Write what a release leaves on a disk, for later versions to load and resume: `make release-fixtures`.

tests/fixtures/releases/<version>/
  videos/  videos.csv  captions.json  what the rest was made from
  teacher/  text_tower/               untrained
  run/                                stage 1: the final model, the checkpoint in the middle, the log of all steps
  classifier/  video_text/            by fine-tuning and by stage 2
  features/  index/                   by `umt-hf features` and `umt-hf embed`
  expected.json                       answers of the models, losses, the order of a search

Files of a version that is released stay as they are.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForVideoClassification, AutoProcessor, AutoVideoProcessor

from tests.e2e.runs import FINE_TUNING, PRETRAINING, read_losses, save_teacher, to_flags
from tests.processes import ENVIRONMENT
from umt_hf import VideoSearcher
from umt_hf.moving_shapes.render import write_moving_shapes
from umt_hf.moving_shapes.tiny_bert import TextTowerArguments, write_text_tower
from umt_hf.version import __version__

RELEASES = Path(__file__).parents[1] / "fixtures" / "releases"
NUM_VIDEOS, STEPS = 4, 4
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SIZES = {"image_size": 32, "patch_size": 8}
COMMON = PRETRAINING | {"num_frames": 2, "per_device_train_batch_size": 2, "teacher_name_or_path": "teacher"}
STAGE1 = {
    **COMMON,
    **TINY,
    **SIZES,
    "train_data": "videos.csv",
    "output_dir": "run",
    "max_steps": STEPS,
    "save_steps": STEPS // 2,
}
STAGE2 = {
    **COMMON,
    "fusion_layer": 1,
    "projection_dim": 8,
    "max_text_tokens": 12,
    "mask_ratio": 0.5,
    "train_corpora": "captions.json",
    "vision_name_or_path": "run",
    "text_name_or_path": "text_tower",
    "output_dir": "video_text",
    "max_steps": 1,
}
FINE_TUNED = {
    **FINE_TUNING,
    "model_name_or_path": "run",
    "train_data": "videos.csv",
    "validation_data": "videos.csv",
    "output_dir": "classifier",
    "max_steps": 1,
}
QUERY = "a red circle moves left"


def run(folder: Path, *words: str | Path) -> None:
    """Run an `umt-hf` command in a folder."""
    command = [sys.executable, "-m", "umt_hf.cli", *map(str, words)]
    subprocess.run(command, cwd=folder, check=True, env=ENVIRONMENT)


def compute_answers(folder: Path) -> dict[str, list]:
    """What the models of a release answer about its first video, and in which order its index gives the videos."""
    video = str(folder / "videos" / "00000.mp4")
    with torch.no_grad():
        encoder = AutoModel.from_pretrained(folder / "run").eval()
        pixels = AutoVideoProcessor.from_pretrained(folder / "run")(video, return_tensors="pt")
        classifier = AutoModelForVideoClassification.from_pretrained(folder / "classifier").eval()
        model = AutoModel.from_pretrained(folder / "video_text").eval()
        processor = AutoProcessor.from_pretrained(folder / "video_text")
        pairs = model(**processor(text=[QUERY, "a blue square"], videos=[video], return_tensors="pt"))
        hits = VideoSearcher(folder / "index", folder / "video_text").search(QUERY, top_k=NUM_VIDEOS)
        return {
            "features": encoder(**pixels).pooler_output[0].tolist(),
            "logits": classifier(**pixels).logits[0].tolist(),
            "logits_per_video": pairs.logits_per_video[0].tolist(),
            "found": [Path(hit.path).name for hit in hits],
            "similarities": [hit.similarity for hit in hits],
        }


def write_sources(folder: Path) -> None:
    """Videos, lists of them, teacher and text tower."""
    shapes = write_moving_shapes(folder / "shapes", NUM_VIDEOS, 1, 1)
    (folder / "videos").mkdir()
    rows = json.loads((shapes / "train_captions.json").read_text())
    for row in rows:
        row["video"] = f"videos/{Path(shutil.copy(shapes / row['video'], folder / 'videos')).name}"
    (folder / "captions.json").write_text(json.dumps(rows, indent=1) + "\n")
    (folder / "videos.csv").write_text("".join(f"{row['video']},{i % 2}\n" for i, row in enumerate(rows)))
    save_teacher(folder / "teacher", **SIZES)
    sizes = {name: TINY[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    write_text_tower(TextTowerArguments(data=str(shapes), output_dir=str(folder / "text_tower"), **sizes))
    shutil.rmtree(shapes)


def write_release(folder: Path) -> None:
    """Run the commands in a folder, and record what came out."""
    write_sources(folder)
    run(folder, "pretrain", "stage1", *to_flags(**STAGE1))
    run(folder, "pretrain", "stage2", *to_flags(**STAGE2))
    run(folder, "finetune", "classification", *to_flags(**FINE_TUNED))
    run(folder, "features", "videos", "--model", "run", "--out", "features", "--num-workers", "0")
    run(folder, "embed", "videos", "--model", "video_text", "--out", "index", "--num-workers", "0")
    expected = compute_answers(folder) | {"losses": read_losses(folder / "run")}
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def main() -> None:
    """Write the folder of this version anew."""
    target = RELEASES / __version__
    with tempfile.TemporaryDirectory(prefix="umt_hf_") as folder:
        write_release(Path(folder))
        shutil.rmtree(target, ignore_errors=True)
        # Without what nothing reads again: the last checkpoints, the lock, a pickle of the Trainer.
        left_out = shutil.ignore_patterns(f"checkpoint-{STEPS}", "checkpoint-1", ".lock", "training_args.bin")
        shutil.copytree(folder, target, ignore=left_out)


if __name__ == "__main__":
    main()
