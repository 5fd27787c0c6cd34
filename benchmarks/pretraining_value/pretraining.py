"""The starts: weights as drawn, and pre-trained in each way."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import CLIPVisionConfig, VideoMAEForPreTraining

from umt_hf import UMTVideoConfig, UMTVideoForPreTraining, UMTVideoModel, UMTVideoProcessor
from umt_hf.modeling.masking_umt_video import sample_tube_mask
from umt_hf.moving_shapes import tiny_clip
from umt_hf.runs.config import dump_config, parse_config
from umt_hf.training import stage1
from umt_hf.training.alignment import build_grid
from umt_hf.training.checkpointing import export_run
from umt_hf.training.trainer import build_accelerator, build_schedule, train

from . import settings
from .jobs import finish_run, measure, start_run
from .settings import Budget, describe_pretraining, list_flags
from .videomae import build_videomae, take_encoder


def train_teacher(folder: Path, max_steps: int) -> None:
    """The tiny CLIP of `make demo`, unless it is there."""
    if not (folder / "teacher" / "config.json").is_file():
        data, output = str(folder / "data"), str(folder / "teacher")
        tiny_clip.train_teacher(tiny_clip.TinyCLIPArguments(data=data, output_dir=output, max_steps=max_steps))


def pretrain(folder: Path, seed: int, start: str, budget: Budget) -> None:
    """Weights of a start: drawn, and then pre-trained as its name says."""
    output = folder / "finetune" / f"seed_{seed}" / start
    if (result := start_run(output, **describe_pretraining(start, budget))) is None:
        return
    with measure(result):
        scratch = output / "scratch" if start != "scratch" else output
        encoder = build_student(seed)
        encoder.save_pretrained(scratch)
        if start != "scratch":
            save_stage1_start(encoder, scratch, folder / "teacher")
        flags = {
            "train_data": folder / "finetune" / "frames" / "train_motion.csv",
            "teacher_name_or_path": folder / "teacher",
            "num_aligned_layers": 1,
            "mask_type": settings.MASK_TYPES.get(start, "tube"),
            "mask_ratio": settings.MASK_RATIO,
            "model_name_or_path": scratch,
            "output_dir": output,
            "max_steps": budget.pretraining_steps,
            "seed": seed,
            **settings.PRETRAINING,
        }
        if start in settings.MASK_TYPES:
            stage1.main(list_flags(flags))
        elif start == "pixel":
            reconstruct_pixels(list_flags(flags))
    finish_run(output, result)


def build_student(seed: int) -> UMTVideoModel:
    """An encoder with fresh weights, the same for every start of a seed."""
    torch.manual_seed(seed)
    return UMTVideoModel(
        UMTVideoConfig(
            **settings.STUDENT,
            initializer_range=settings.INITIALIZER_RANGE,
            position_embedding_frames=settings.STUDENT["num_frames"],
            position_embedding_image_size=settings.STUDENT["image_size"],
        )
    )


def save_stage1_start(encoder: UMTVideoModel, folder: Path, teacher: Path) -> None:
    """The encoder with an alignment head for the teacher, as stage 1 goes on from."""
    config = UMTVideoConfig.from_dict(encoder.config.to_dict())
    config.num_aligned_layers = 1
    config.teacher_hidden_size = CLIPVisionConfig.from_pretrained(teacher).projection_dim
    student = UMTVideoForPreTraining(config)
    student.vision_model.load_state_dict(encoder.state_dict())
    student.save_pretrained(folder)


def reconstruct_pixels(flags: list[str]) -> None:
    """Pre-train the encoder as VideoMAE does: no teacher, tube masks, a decoder, normalised pixels as targets.

    Clips, order, optimizer and schedule are stage 1's own; only the loss and what is exported differ.
    """

    class PixelStage(stage1.Stage1):
        def forward_step(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
            grid, noise = build_grid(self.config), batch["mask_noise"]
            shape = (len(noise), grid.num_frames, grid.patches_per_frame)
            mask = sample_tube_mask(*shape, settings.MASK_RATIO, noise=noise[:, : grid.patches_per_frame])
            return {"pixel_loss": self.model(batch["pixel_values"], bool_masked_pos=mask).loss}

        def export(self, accelerator: Accelerator, folder: Path) -> None:
            videomae: VideoMAEForPreTraining = accelerator.unwrap_model(self.model)
            encoder = take_encoder(videomae, UMTVideoModel(student.config))
            processor = UMTVideoProcessor.from_model_config(student.config)
            export_run(accelerator, encoder, processor, dump_config(self.resolved), folder)

    parsed = parse_config(stage1.SECTIONS, flags)
    model, _, _, data, augmentation, training = parsed
    accelerator = build_accelerator(training)
    student = UMTVideoModel.from_pretrained(model.model_name_or_path)
    student.config.use_final_norm = False
    resolved = dict(zip(stage1.SECTIONS, parsed, strict=True))
    stage = PixelStage(build_videomae(student), None, data, augmentation, training, stage1.load_tables(data), resolved)
    train(stage, training, accelerator, build_schedule(training, None, 1), data.max_skipped_ratio)
