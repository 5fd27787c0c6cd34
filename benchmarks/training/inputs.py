"""What a run starts from: videos with captions, and models with random weights, which do not change the speed."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import CLIPVisionModelWithProjection

from benchmarks.decoding.videos import write_kinetics_like
from benchmarks.stage1_step.workload import SIZES, Size, build_student_config, build_teacher_config
from umt_hf import UMTVideoForPreTraining
from umt_hf.moving_shapes.render import write_moving_shapes
from umt_hf.moving_shapes.tiny_bert import TextTowerArguments, write_text_tower

NUM_FILES = {"tiny": 256, "b16": 8, "l16": 8}
NUM_ROWS = 2048  # of lists in which videos of true size come again and again
STAGE1, STAGE2 = STAGES = ("stage1", "stage2")


@dataclass(frozen=True)
class Inputs:
    """Files of a run.

    Args:
        size: One of `SIZES`.
        train_data: Paths and labels.
        captions: The same videos with captions.
        teacher: CLIP's vision tower.
        student: Where stage 2 starts.
        text_tower: BERT, with a tokenizer.
    """

    size: str
    train_data: Path
    captions: Path
    teacher: Path
    student: Path
    text_tower: Path


def write_inputs(size: str, folder: Path) -> Inputs:
    """Render videos and save models: moving shapes for "tiny", a Kinetics-like video for the others."""
    shapes, torch_seed = folder / "shapes", 0
    write_moving_shapes(shapes, num_train_clips=NUM_FILES["tiny"], num_validation_clips=1, num_test_clips=1)
    train_data, captions = shapes / "train.csv", shapes / "train_captions.json"
    if size != "tiny":
        train_data, captions = _write_long_list(shapes, NUM_FILES[size], folder)
    torch.manual_seed(torch_seed)
    inputs = Inputs(size, train_data, captions, folder / "teacher", folder / "student", folder / "text_tower")
    CLIPVisionModelWithProjection(build_teacher_config(SIZES[size])).save_pretrained(inputs.teacher)
    UMTVideoForPreTraining(build_student_config(SIZES[size])).save_pretrained(inputs.student)
    encoder = SIZES[size].student
    write_text_tower(
        TextTowerArguments(
            data=str(shapes),
            output_dir=str(inputs.text_tower),
            hidden_size=encoder.width,
            num_hidden_layers=4 if size == "tiny" else 12,
            num_attention_heads=encoder.heads,
        )
    )
    return inputs


def _write_long_list(shapes: Path, num_files: int, folder: Path) -> tuple[Path, Path]:
    """Lists of `NUM_ROWS` rows over a few copies of one video of true size."""
    videos = folder / "videos"
    videos.mkdir()
    first = videos / "0.mp4"
    write_kinetics_like(first)
    for number in range(1, num_files):
        (videos / f"{number}.mp4").write_bytes(first.read_bytes())
    names = [f"{number % num_files}.mp4" for number in range(NUM_ROWS)]
    texts = [row["caption"] for row in json.loads((shapes / "train_captions.json").read_text(encoding="utf-8"))]
    rows = [{"video": name, "caption": texts[i % len(texts)]} for i, name in enumerate(names)]
    (videos / "train.csv").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    (videos / "train_captions.json").write_text(json.dumps(rows), encoding="utf-8")
    return videos / "train.csv", videos / "train_captions.json"


def build_flags(stage: str, inputs: Inputs) -> dict[str, object]:
    """Flags of a run of a stage, those of its length, batch and loader aside."""
    size = SIZES[inputs.size]
    common = {
        "teacher_name_or_path": inputs.teacher,
        "teacher_image_size": size.teacher.image_size,
        "num_aligned_layers": size.aligned_layers,
        "num_frames": size.frames,
        "drop_path_rate": 0.0,
        "horizontal_flip_probability": 0.5,
        "learning_rate": 1e-4,
        "scale_learning_rate": "false",
        "warmup_steps": 2,
        "report_to": "none",
        "save_steps": 10**9,
        "disable_tqdm": "true",
    }
    if stage == STAGE1:
        return common | _list_sizes(size) | {"train_data": inputs.train_data}
    fields = {"vision_name_or_path": inputs.student, "text_name_or_path": inputs.text_tower}
    fields |= {"fusion_layer": 2 if inputs.size == "tiny" else 9, "projection_dim": 64, "max_text_tokens": 12}
    return common | fields | {"train_corpora": inputs.captions, "pair_by": "caption"}


def _list_sizes(size: Size) -> dict[str, int]:
    student = size.student
    return {
        "image_size": student.image_size,
        "patch_size": student.patch_size,
        "hidden_size": student.width,
        "num_hidden_layers": student.layers,
        "num_attention_heads": student.heads,
        "intermediate_size": student.width * student.mlp_ratio,
    }
