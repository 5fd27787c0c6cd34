"""A tiny VideoMAE of Transformers, pre-trained on the clips by its own loss: pixels of hidden tubes."""

import time
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import VideoMAEConfig, VideoMAEForPreTraining

from umt_hf.modeling.masking_umt_video import sample_tube_mask

from .clips import NUM_FRAMES, load_clips, normalize, sample_frames

# It sees frames at half their size: as many patches as the student, of a quarter of the pixels.
SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "num_frames": NUM_FRAMES,
    "tubelet_size": 2,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 384,
    "decoder_hidden_size": 64,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 256,
    "norm_pix_loss": False,
    "initializer_range": 0.1,  # 1 / sqrt(width): at the usual 0.02 so narrow a model hardly moves in a short run
    "use_mean_pooling": False,
}
TRAINING = {"batch_size": 32, "learning_rate": 3e-3, "mask_ratio": 0.75}


def train_video_teacher(frames: Path, output_dir: Path, max_steps: int, seed: int = 0) -> float:
    """Pre-train it and write its folder.

    Args:
        frames: Folder of the clips; see `load_clips`.
        output_dir: Folder to write.
        max_steps: Optimizer steps.
        seed: Of weights, clips and masks.

    Returns:
        Seconds of processor time.
    """
    started = time.process_time()
    size, side = SIZES["image_size"], SIZES["image_size"] // SIZES["patch_size"]
    # Once, and as a teacher of another size resizes what the student sees.
    resize = partial(F.interpolate, size=(size, size), mode="bicubic", align_corners=False)
    clips = torch.stack([resize(normalize(clip)) for clip in load_clips(frames, "train")])
    torch.manual_seed(seed)
    model = VideoMAEForPreTraining(VideoMAEConfig(**SIZES))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=TRAINING["learning_rate"], betas=(0.9, 0.95), weight_decay=0.05
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, TRAINING["learning_rate"], total_steps=max_steps, pct_start=0.1
    )
    for _ in range(max_steps):
        pixels = sample_frames(clips, torch.randint(len(clips), (TRAINING["batch_size"],)))
        mask = sample_tube_mask(len(pixels), NUM_FRAMES // SIZES["tubelet_size"], side**2, TRAINING["mask_ratio"])
        model(pixels, bool_masked_pos=mask).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.save_pretrained(output_dir)
    return time.process_time() - started
