"""One training step of each variant, cut into the same phases: teacher, mask, student forward, backward, optimizer."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from transformers import CLIPVisionModelWithProjection, VideoMAEForPreTraining

from benchmarks.common import PhaseClock
from umt_hf.modeling.masking_umt_video import compute_visible_indices, sample_tube_mask
from umt_hf.modeling.modeling_umt_video import UMTVideoForPreTraining
from umt_hf.teachers.quantization import quantize_teacher
from umt_hf.teachers.teacher import UMTTeacher
from umt_hf.training.alignment import compute_targets
from umt_hf.training.arguments import PretrainingArguments
from umt_hf.training.optimization import build_optimizer
from umt_hf.training.step.compilation import choose_compilation, compile_stage
from umt_hf.training.step.forward import align_student
from umt_hf.training.step.guard import NonfiniteSteps, StepGuard
from umt_hf.training.step.update import run_micro_batch, with_total

from . import plain
from .workload import Size, build_student_config, build_teacher_config, build_videomae_config

TEACHER, FORWARD, BACKWARD, OPTIMIZER = PHASES = ("teacher and mask", "student forward", "backward", "optimizer")
LEARNING_RATE = 1.5e-4
PRECISIONS = {torch.float32: "no", torch.bfloat16: "bf16"}
FALLBACK = "aot_eager"


def build_accelerator(device: torch.device, dtype: torch.dtype) -> Accelerator:
    """Accelerate for a precision, which a process otherwise has once and for all."""
    precision = PRECISIONS[dtype]
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision=precision, cpu=device.type == "cpu")


def sample_mask_noise(size: Size, pixel_values: torch.Tensor) -> torch.Tensor:
    """The exponential noise that comes with clips, `(B, N)`."""
    return torch.empty(pixel_values.shape[0], size.tokens, device=pixel_values.device).exponential_()


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
            model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.05, fused=True
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
    """`umt_hf`: the step of its training loop, with Accelerate, its optimizer and its guard against bad gradients.

    Only the loop's surroundings are left out: reading clips, logging, saving. There is no stochastic depth.

    Args:
        size: Models and clip shape.
        device: Where it runs.
        dtype: Precision of the run; the frozen teacher's weights have it too.
        attn_implementation: Attention kernel of student and teacher, by its name in Transformers.
        compiler: Backend of `torch.compile` for student and teacher; `None` = not compiled.
        quantization: As `--teacher_quantization`.
    """

    def __init__(
        self,
        size: Size,
        device: torch.device,
        dtype: torch.dtype,
        attn_implementation: str = "sdpa",
        compiler: str | None = None,
        quantization: str | None = None,
    ):
        self.size, self.device, self.dtype = size, device, dtype
        self.accelerator = build_accelerator(device, dtype)
        self.args = PretrainingArguments(torch_compile_backend=compiler, report_to="none")
        self.model: Any = UMTVideoForPreTraining._from_config(
            build_student_config(size), attn_implementation=attn_implementation
        )
        tower = CLIPVisionModelWithProjection._from_config(
            build_teacher_config(size), attn_implementation=attn_implementation, dtype=dtype
        )
        self.teacher = UMTTeacher(tower, size.aligned_layers).to(device)
        if quantization is not None:
            quantize_teacher(self.teacher, quantization)
        self.other_teachers = ()
        self.config, self.compute_targets = self.model.config, compute_targets
        optimizer = build_optimizer(self.model, self.args, LEARNING_RATE, device)
        compile_stage(self, choose_compilation(self.args, self.accelerator))
        self.model, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.model.train()
        self.flops_of_teacher = size.count_teacher_flops()
        self.guard, self.step = StepGuard(NonfiniteSteps(), limit=10), 0

    @property
    def flops_of_student(self) -> int:
        """Operations of the student's forward and backward pass for one clip."""
        return self.size.count_student_flops()

    def autocast(self) -> Any:
        """Accelerate's context, which it also puts around the student's forward."""
        return self.accelerator.autocast()

    def compute_loss(
        self, pixel_values: torch.Tensor, clock: PhaseClock, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Forward part of a step, with the given mask in place of a drawn one."""
        with self._marked(clock, mask):
            return with_total(self.forward_step(self._build_batch(pixel_values)))["loss"]

    def forward_step(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """As stage 1 has it."""
        return align_student(self, batch)

    def run(self, pixel_values: torch.Tensor, clock: PhaseClock) -> None:
        """Run one complete step, as the loop does."""
        clock.start()
        with self._marked(clock):
            done = run_micro_batch(
                self, self.accelerator, self.optimizer, self._build_batch(pixel_values), LEARNING_RATE, None
            )
            assert done.is_bad is not None
            self.guard.add(self.step, done.is_bad)
            self.step += 1
        clock.mark(OPTIMIZER)

    def _build_batch(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pixel_values": pixel_values, "mask_noise": sample_mask_noise(self.size, pixel_values)}

    @contextmanager
    def _marked(self, clock: PhaseClock, mask: torch.Tensor | None = None) -> Iterator[None]:
        """Mark the phases of what runs within, from outside: the code that is timed is the loop's."""
        own_targets, own_backward = self.compute_targets, self.accelerator.backward

        def marked_targets(*args: Any) -> Any:
            if mask is None:
                targets = own_targets(*args)
            else:
                visible = compute_visible_indices(mask, self.size.visible_tokens)
                targets = self.teacher.align_visible(args[1], lambda _: visible)
            clock.mark(TEACHER)
            return targets

        def marked_backward(loss: torch.Tensor, **kwargs: Any) -> None:
            clock.mark(FORWARD)
            own_backward(loss, **kwargs)
            clock.mark(BACKWARD)

        self.compute_targets, self.accelerator.backward = marked_targets, marked_backward
        try:
            yield
        finally:
            self.compute_targets, self.accelerator.backward = own_targets, own_backward


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
            if mask is None:
                mask = plain.draw_mask(saliency, pixel_values.shape[0], self.size.mask_ratio)
            clock.mark(TEACHER)
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
        clock.mark(TEACHER)
        with self.autocast():
            return self.model(pixel_values, bool_masked_pos=mask).loss


UMT, PLAIN, VIDEOMAE = VARIANTS = ("umt_hf", "plain", "videomae")
COMPILED = "umt_hf, compiled"


@cache
def choose_compiler(device_type: str) -> str:
    """Backend of `torch.compile`: inductor where it can build a kernel on this machine, else one without kernels."""
    try:
        torch.compile(lambda x: x.sin() + 1, backend="inductor")(torch.ones(8, device=device_type))
    except Exception as error:  # whatever a compiler that is missing or unfit raises
        print(f"Inductor does not work here, so {FALLBACK} stands in for it: {str(error).splitlines()[0]}")
        return FALLBACK
    return "inductor"


def build_step(
    variant: str, size: Size, device: torch.device, dtype: torch.dtype, attn_implementation: str
) -> TrainingStep:
    """Build a variant at random weights.

    Raises:
        ValueError: If there is no such variant.
    """
    torch.manual_seed(0)
    if variant in (UMT, COMPILED):
        compiler = choose_compiler(device.type) if variant == COMPILED else None
        return UMTStep(size, device, dtype, attn_implementation, compiler)
    if variant == PLAIN:
        return PlainStep(size, device, dtype)
    if variant == VIDEOMAE:
        return VideoMAEStep(size, device, dtype, attn_implementation)
    raise ValueError(f"variant must be one of {(*VARIANTS, COMPILED)}, got {variant!r}.")
