"""One training step of each variant, cut into the same phases: teacher, mask, student forward, backward, optimizer."""

from abc import ABC, abstractmethod

import torch
from torch import nn
from transformers import CLIPVisionModelWithProjection, VideoMAEForPreTraining

from benchmarks.common import PhaseClock
from umt_hf.modeling.masking_umt_video import compute_visible_indices, sample_attention_indices, sample_tube_mask
from umt_hf.modeling.modeling_umt_video import UMTVideoForPreTraining
from umt_hf.teachers.clip import UMTTeacher

from . import plain
from .workload import Size, build_student_config, build_teacher_config, build_videomae_config

TEACHER, MASK, FORWARD, BACKWARD, OPTIMIZER = PHASES = (
    "teacher",
    "mask",
    "student forward",
    "backward",
    "optimizer",
)


class TrainingStep(ABC):
    """A step that can be timed.

    Every variant shares what is here: float32 weights, autocast unless the precision is float32, no gradient scaling,
    and AdamW with the published betas and decay (PyTorch's fused kernel).

    Args:
        size: Models and clip shape.
        model: The network that is trained.
        device: Where it runs.
        dtype: Precision of the matrix products.
    """

    flops_of_teacher = 0

    def __init__(self, size: Size, model: nn.Module, device: torch.device, dtype: torch.dtype):
        self.size = size
        self.model = model.to(device).train()
        self.device = device
        self.dtype = dtype
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=1.5e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True
        )

    @property
    @abstractmethod
    def flops_of_student(self) -> int:
        """Operations of forward and backward pass for one clip, the teacher's aside."""

    @abstractmethod
    def compute_loss(
        self, pixel_values: torch.Tensor, clock: PhaseClock, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run everything up to the loss; a mask that is given is used in place of a drawn one."""

    def run_backward(
        self, pixel_values: torch.Tensor, clock: PhaseClock, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run everything up to the gradients and give the loss."""
        clock.start()
        loss = self.compute_loss(pixel_values, clock, mask)
        clock.mark(FORWARD)
        loss.backward()
        clock.mark(BACKWARD)
        return loss.detach()

    def autocast(self) -> torch.autocast:
        """Context in which matrix products run in `dtype`."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def run(self, pixel_values: torch.Tensor, clock: PhaseClock) -> None:
        """Run one complete step."""
        self.run_backward(pixel_values, clock)
        self.optimizer.step()
        self.optimizer.zero_grad()
        clock.mark(OPTIMIZER)


class UMTStep(TrainingStep):
    """`umt_hf`, as its trainer runs it: saliency first, then features at the visible tokens alone.

    The teacher's frozen weights are kept in `dtype`; only the student needs autocast.

    Args:
        size: Models and clip shape.
        device: Where it runs.
        dtype: Precision of the matrix products.
        attn_implementation: Attention kernel of student and teacher, by its name in Transformers.
        is_compiled: Whether student and teacher go through `torch.compile`.
    """

    def __init__(
        self,
        size: Size,
        device: torch.device,
        dtype: torch.dtype,
        attn_implementation: str = "sdpa",
        is_compiled: bool = False,
    ):
        student = UMTVideoForPreTraining._from_config(
            build_student_config(size), attn_implementation=attn_implementation
        )
        tower = CLIPVisionModelWithProjection._from_config(
            build_teacher_config(size), attn_implementation=attn_implementation, dtype=dtype
        )
        super().__init__(size, student, device, dtype)
        self.teacher = UMTTeacher(tower, size.aligned_layers).to(device)
        self.flops_of_teacher = size.count_teacher_flops()
        self.encode, self.project, self.student = self.teacher.encode, self.teacher.project, self.model
        if is_compiled:
            self.encode, self.project = torch.compile(self.encode), torch.compile(self.project)
            self.student = torch.compile(self.model, fullgraph=True)

    @property
    def flops_of_student(self) -> int:
        """Operations of the student's forward and backward pass for one clip."""
        return self.size.count_student_flops()

    def compute_loss(
        self, pixel_values: torch.Tensor, clock: PhaseClock, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Saliency, mask, teacher features at the visible tokens, student, loss."""
        states, saliency = self.encode(pixel_values)
        clock.mark(TEACHER)
        if mask is None:
            visible_indices = sample_attention_indices(saliency, self.size.mask_ratio, num_frames=self.size.frames)
        else:
            visible_indices = compute_visible_indices(mask, self.size.visible_tokens)
        clock.mark(MASK)
        features = self.project(states, pixel_values.shape[0], visible_indices)
        clock.mark(TEACHER)
        with self.autocast():
            return self.student(
                pixel_values,
                visible_indices=visible_indices,
                teacher_features=features,
                normalize_teacher_features=False,
            ).loss


class PlainStep(TrainingStep):
    """The step written from the paper's description; see `plain.py`."""

    def __init__(self, size: Size, device: torch.device, dtype: torch.dtype):
        super().__init__(size, plain.Student(size), device, dtype)
        self.teacher = plain.Teacher(size).to(device).eval().requires_grad_(False)
        # The same useful work as UMTStep's, although this variant does more.
        self.flops_of_teacher = size.count_teacher_flops()

    @property
    def flops_of_student(self) -> int:
        """Operations that the student's forward and backward pass need for one clip."""
        return self.size.count_student_flops()

    def load_weights(self, step: UMTStep) -> None:
        """Take over the weights of a `umt_hf` step."""
        plain.load_student(self.model, step.model.state_dict())
        plain.load_teacher(self.teacher, step.teacher.vision_tower.state_dict())

    def compute_loss(
        self, pixel_values: torch.Tensor, clock: PhaseClock, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Teacher features at all tokens, mask, student, features at the visible ones, loss."""
        with self.autocast():
            features, saliency = self.teacher(pixel_values)
            clock.mark(TEACHER)
            if mask is None:
                mask = plain.draw_mask(saliency, pixel_values.shape[0], self.size.mask_ratio)
            clock.mark(MASK)
            return plain.compute_loss(self.model(pixel_values, mask), features, mask)


class VideoMAEStep(TrainingStep):
    """Transformers' VideoMAE at as many visible tokens: no teacher, a decoder over all tokens, pixels as targets."""

    def __init__(self, size: Size, device: torch.device, dtype: torch.dtype, attn_implementation: str = "sdpa"):
        model = VideoMAEForPreTraining._from_config(
            build_videomae_config(size), attn_implementation=attn_implementation
        )
        super().__init__(size, model, device, dtype)

    @property
    def flops_of_student(self) -> int:
        """Operations of encoder and decoder, forward and backward, for one clip."""
        return self.size.count_videomae_flops()

    def compute_loss(
        self, pixel_values: torch.Tensor, clock: PhaseClock, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Tube mask, encoder, decoder, loss."""
        size = self.size
        if mask is None:
            mask = sample_tube_mask(
                pixel_values.shape[0], size.frames, size.student.patches, size.mask_ratio, device=self.device
            )
        clock.mark(MASK)
        with self.autocast():
            return self.model(pixel_values, bool_masked_pos=mask).loss


VARIANTS = ("umt_hf", "plain", "videomae")
COMPILED = "umt_hf, compiled"


def build_step(
    variant: str, size: Size, device: torch.device, dtype: torch.dtype, attn_implementation: str
) -> TrainingStep:
    """Build a variant at random weights.

    Raises:
        ValueError: If there is no such variant.
    """
    torch.manual_seed(0)
    if variant in ("umt_hf", COMPILED):
        return UMTStep(size, device, dtype, attn_implementation, is_compiled=variant == COMPILED)
    if variant == "plain":
        return PlainStep(size, device, dtype)
    if variant == "videomae":
        return VideoMAEStep(size, device, dtype, attn_implementation)
    raise ValueError(f"variant must be one of {(*VARIANTS, COMPILED)}, got {variant!r}.")
