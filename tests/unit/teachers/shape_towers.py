"""Tiny towers of other kinds than CLIP, trained on moving shapes within seconds, and where their saliency lies."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from umt_hf import UMTTeacher
from umt_hf.moving_shapes.render import FRAME_SIZE
from umt_hf.moving_shapes.tiny_clip import ATTRIBUTES, LabeledFrames, compute_contrastive_loss
from umt_hf.processing.decoding import open_video

from .towers import KINDS

PATCH_SIZE = 16
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": FRAME_SIZE}
SIZES |= {"patch_size": PATCH_SIZE}
OWN = {"siglip": {"intermediate_size": 192}, "dinov2": {}, "dinov3_vit": {"intermediate_size": 192}}
IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
STATISTICS = {"siglip": ([0.5] * 3, [0.5] * 3)}  # those of the others are ImageNet's


class CaptionTable(nn.Module):
    """What stands for a text tower: a vector per word, of which a caption has four."""

    def __init__(self, width: int):
        super().__init__()
        self.words = nn.ModuleList(nn.Embedding(len(words), width) for words in ATTRIBUTES.values())
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, caption_ids: torch.Tensor) -> torch.Tensor:
        ids = np.unravel_index(caption_ids.numpy(), [len(words) for words in ATTRIBUTES.values()])
        vectors = [table(torch.from_numpy(np.asarray(part))) for table, part in zip(self.words, ids, strict=True)]
        return torch.stack(vectors).sum(dim=0)


def train_tower(kind: str, frames: LabeledFrames, seed: int, max_steps: int) -> PreTrainedModel:
    """Match frames with their captions, as CLIP and SigLIP are trained; a DINO-like one learns by its class token."""
    torch.manual_seed(seed)
    config_name, class_name, _ = KINDS[kind]
    tower: Any = getattr(transformers, class_name)(getattr(transformers, config_name)(**SIZES, **OWN[kind]))
    if kind == "siglip":  # at its own scale the probe attends to all patches alike for thousands of steps
        head = getattr(tower, "vision_model", tower).head
        nn.init.normal_(head.probe)
        nn.init.normal_(head.attention.in_proj_weight[: 2 * SIZES["hidden_size"]], std=0.3)
    captions = CaptionTable(SIZES["hidden_size"])
    parameters = [*tower.parameters(), *captions.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max_steps, pct_start=0.1)
    mean, std = (
        torch.tensor(x).view(3, 1, 1) for x in STATISTICS.get(kind, (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(max_steps):
        rows = torch.randint(len(frames.pixels), (64,), generator=generator)
        pictures = F.normalize(tower((frames.pixels[rows].float() / 255 - mean) / std).pooler_output, dim=-1)
        texts = F.normalize(captions(frames.caption_ids[rows]), dim=-1)
        loss = compute_contrastive_loss(captions.scale.exp() * pictures @ texts.T, frames.caption_ids[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    return tower.eval()


def measure_share_on_shape(teacher: UMTTeacher, data: Path, split: str) -> tuple[float, float]:
    """Share of the saliency that lies in the boxes of the shapes, and share of the area that they cover.

    A patch that a box cuts counts by the part inside.
    """
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in IMAGENET)
    shares, areas = [], []
    for clip in json.loads((data / f"{split}_boxes.json").read_text()):
        (shape,) = clip["objects"]
        with open_video(data / clip["video"]) as reader:
            pixels = torch.from_numpy(reader.get_frames(range(len(shape["boxes"])))).permute(0, 3, 1, 2)
        saliency = teacher.compute_saliency(((pixels.float() / 255 - mean) / std)[None])
        inside = torch.zeros(len(pixels), clip["height"], clip["width"])
        for frame, (left, top, right, bottom) in zip(inside, shape["boxes"], strict=True):
            frame[int(top) : int(bottom), int(left) : int(right)] = 1
        parts = F.avg_pool2d(inside[:, None], PATCH_SIZE).flatten(1)
        shares.append(((saliency * parts).sum(dim=1) / saliency.sum(dim=1)).mean())
        areas.append(inside.mean())
    return torch.stack(shares).mean().item(), torch.stack(areas).mean().item()
