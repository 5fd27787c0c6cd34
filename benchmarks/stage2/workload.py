"""The work that is timed: a video-text model with its teacher, at random weights, and a batch of noise and words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CLIPVisionModelWithProjection

from benchmarks.stage1_step.steps import LEARNING_RATE, build_accelerator, sample_mask_noise
from benchmarks.stage1_step.workload import (
    SIZES,
    Size,
    build_student_config,
    build_teacher_config,
    sample_pixel_values,
)
from umt_hf.modeling.configuration_umt_video_text import (
    STAGE2_VISION_FIELDS,
    UMTTextConfig,
    UMTVideoTextConfig,
)
from umt_hf.modeling.modeling_umt_video_text import UMTVideoTextForPreTraining
from umt_hf.teachers.teacher import UMTTeacher
from umt_hf.training.alignment import compute_targets
from umt_hf.training.arguments import PretrainingArguments
from umt_hf.training.optimization import build_optimizer
from umt_hf.training.reporting.flops import FlopMeter
from umt_hf.training.step.compilation import choose_compilation, compile_stage
from umt_hf.training.step.forward import join_video_and_text
from umt_hf.training.step.guard import NonfiniteSteps, StepGuard
from umt_hf.training.step.update import run_micro_batch

LOSSES = ("uta", "vtc", "vtm", "mlm")
NUM_FRAMES = 4
TEXT_LENGTH = 32


@dataclass(frozen=True)
class Pair:
    """A video encoder with its teacher, and the text tower.

    Args:
        video: Stage 1's size of that name, on clips of 4 frames.
        text_width: Width of the text tower; the last quarter of its layers looks at the video.
        text_layers: Its layers.
        text_heads: Its heads.
        vocabulary: Words.
        projection_dim: Width of the vectors that are contrasted.
        cpu_batch_size: Pairs in a step on a CPU.
        cuda_batch_size: Likewise on CUDA.
    """

    video: Size
    text_width: int
    text_layers: int
    text_heads: int
    vocabulary: int
    projection_dim: int
    cpu_batch_size: int
    cuda_batch_size: int


def _cut(name: str) -> Size:
    own = SIZES[name]
    return Size(own.student, own.teacher, own.teacher_channels, own.aligned_layers, 0, 0, NUM_FRAMES, own.mask_ratio)


# Text towers as BERT's base and large ones.
SIZES_OF_PAIRS = {
    "tiny": Pair(_cut("tiny"), 128, 4, 4, 1000, 64, 16, 64),
    "b16": Pair(_cut("b16"), 768, 12, 12, 30522, 512, 4, 64),
    "l16": Pair(_cut("l16"), 1024, 24, 16, 30522, 512, 1, 64),
}


class Stage2Step:
    """A step of the training loop with all four losses, or some.

    Args:
        name: Of `SIZES_OF_PAIRS`.
        device: Where it runs.
        dtype: Precision of the run.
        compiler: Backend of `torch.compile`; `None` = not compiled.
    """

    def __init__(
        self,
        name: str,
        device: torch.device,
        dtype: torch.dtype,
        compiler: str | None = None,
    ):
        torch.manual_seed(0)
        size = SIZES_OF_PAIRS[name]
        self.size, self.device = size, device
        self.accelerator = build_accelerator(device, dtype)
        self.args = PretrainingArguments(torch_compile_backend=compiler, report_to="none")
        self.model: Any = UMTVideoTextForPreTraining._from_config(build_config(size))
        tower = CLIPVisionModelWithProjection._from_config(build_teacher_config(size.video), dtype=dtype)
        self.own_teacher = UMTTeacher(tower, size.video.aligned_layers).to(device)
        self.config, self.compute_targets = self.model.config, compute_targets
        self.teacher: UMTTeacher | None = self.own_teacher
        optimizer = build_optimizer(self.model, self.args, LEARNING_RATE, device)
        compile_stage(self, choose_compilation(self.args, self.accelerator))
        self.model, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.model.train()
        self.guard, self.step = StepGuard(NonfiniteSteps(), limit=10), 0

    def choose(self, losses: Sequence[str]) -> None:
        """Compute these of `LOSSES` from now on; without "uta" there is neither teacher nor mask."""
        for name in LOSSES:
            setattr(self.config, f"{name}_loss_weight", float(name in losses))
        self.teacher = self.own_teacher if "uta" in losses else None

    def forward_step(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """As stage 2 has it."""
        return join_video_and_text(self, batch)

    def run(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Run one complete step and give its losses."""
        done = run_micro_batch(self, self.accelerator, self.optimizer, batch, LEARNING_RATE, None)
        assert done.is_bad is not None
        self.guard.add(self.step, done.is_bad)
        self.step += 1
        return done.losses

    def count_flops(self, batch: dict[str, Any]) -> tuple[int, int]:
        """Operations of the student, forward and backward, and of the teacher, for the batch."""
        return FlopMeter(self.model, self.forward_step, self.accelerator).measure(batch)


def build_config(size: Pair) -> UMTVideoTextConfig:
    """Configuration of the model, without stochastic depth or dropout."""
    vision = build_student_config(size.video).to_dict() | STAGE2_VISION_FIELDS
    text = UMTTextConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.text_width,
        num_hidden_layers=size.text_layers,
        num_attention_heads=size.text_heads,
        intermediate_size=4 * size.text_width,
        fusion_layer=size.text_layers * 3 // 4,
        encoder_width=size.video.student.width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return UMTVideoTextConfig(vision_config=vision, text_config=text.to_dict(), projection_dim=size.projection_dim)


def sample_pairs(size: Pair, batch_size: int, device: torch.device) -> dict[str, Any]:
    """Noise for pixels and words, as the loader gives them."""
    pixel_values = sample_pixel_values(size.video, batch_size, device)
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(110, size.vocabulary, (batch_size, TEXT_LENGTH), generator=generator)
    words[:, 0] = 101
    return {
        "pixel_values": pixel_values,
        "mask_noise": sample_mask_noise(size.video, pixel_values),
        "input_ids": words.to(device),
        "attention_mask": torch.ones_like(words).to(device),
        "pair_ids": torch.arange(batch_size, device=device),
    }
