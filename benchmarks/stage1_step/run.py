"""Time one complete stage-1 step against a plain implementation of it and against VideoMAE.

python -m benchmarks.stage1_step.run
python -m benchmarks.stage1_step.run --device cuda --sizes b16 l16 --attn flash_attention_2 --compile
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import HfArgumentParser

from benchmarks.common import (
    PhaseClock,
    ReportArguments,
    describe_machine,
    format_spread,
    format_table,
    run_interleaved,
    summarize,
    synchronize,
    write_results,
)
from umt_hf.modeling.masking_umt_video import sample_random_mask

from .memory import MemoryJob, measure_peak_memory, measure_saved_bytes
from .steps import (
    COMPILED,
    PHASES,
    PLAIN,
    UMT,
    VARIANTS,
    PlainStep,
    TrainingStep,
    UMTStep,
    build_step,
    choose_compiler,
)
from .workload import SIZES, sample_pixel_values

# Largest difference of loss and of gradient norm, relative, between umt_hf and the plain step.
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
MATMUL_SIDE = {"cpu": 2048, "cuda": 8192}
STRETCH_SECONDS = 1.0


@dataclass(frozen=True)
class Case:
    """A setting in which variants are compared."""

    size: str
    dtype: str
    batch_size: int
    variants: tuple[str, ...]


# What runs by default on a CPU. Compilers take a minute where a model has many layers.
CPU_CASES = (
    Case("tiny", "float32", 32, (*VARIANTS, COMPILED)),
    Case("b16", "float32", 1, VARIANTS),
    Case("b16-2+2", "float32", 4, (UMT, PLAIN, COMPILED)),
    Case("tiny", "bfloat16", 32, (UMT, PLAIN)),
    Case("b16-2+2", "bfloat16", 2, (UMT, PLAIN)),
)


@dataclass(kw_only=True)
class Arguments(ReportArguments):
    """What to time, and on what."""

    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    sizes: list[str] | None = field(
        default=None,
        metadata={"help": f"Some of {list(SIZES)}; by default five cases on CPU (see README), b16 l16 on CUDA."},
    )
    batch_size: int | None = field(default=None, metadata={"help": "Clips in a step; by default as the size says."})
    dtype: Literal["float32", "bfloat16"] | None = field(
        default=None, metadata={"help": "With sizes: by default float32 on CPU; bfloat16 (autocast) on CUDA."}
    )
    attn: str = field(default="sdpa", metadata={"help": "Attention of umt_hf and VideoMAE, Transformers' name."})
    compile: bool = field(default=False, metadata={"help": "With sizes: time umt_hf under torch.compile too."})
    steps: int | None = field(
        default=None, metadata={"help": "Steps timed at a stretch; by default as many as fill a second."}
    )
    repeats: int = field(default=3, metadata={"help": "Rounds; each times every variant once."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; by default PyTorch's choice."})
    measure_memory: bool | None = field(
        default=None,
        metadata={"help": "Run each variant in a separate process too, for its peak memory; by default on CUDA."},
    )

    def __post_init__(self) -> None:
        if unknown := set(self.sizes or ()) - SIZES.keys():
            raise ValueError(f"sizes must be among {list(SIZES)}, got {sorted(unknown)}.")
        if self.measure_memory is None:
            self.measure_memory = self.is_cuda

    @property
    def is_cuda(self) -> bool:
        """Whether there is an accelerator."""
        return torch.device(self.device).type == "cuda"

    def list_cases(self) -> list[Case]:
        """What is compared."""
        if not (self.sizes or self.dtype or self.compile or self.batch_size or self.is_cuda):
            return list(CPU_CASES)
        sizes = self.sizes or (["b16", "l16"] if self.is_cuda else ["tiny", "b16"])
        dtype = self.dtype or ("bfloat16" if self.is_cuda else "float32")
        variants = (*VARIANTS, COMPILED) if self.compile else VARIANTS
        return [Case(size, dtype, self._choose_batch_size(size), variants) for size in sizes]

    def _choose_batch_size(self, size: str) -> int:
        own = SIZES[size].cuda_batch_size if self.is_cuda else SIZES[size].cpu_batch_size
        return self.batch_size or own


@dataclass(frozen=True)
class Stretch:
    """Measurement of some steps run one after another."""

    clips_per_second: float
    phase_seconds: dict[str, float]


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark and give the path of its JSON file."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, in convolutions too
    rows, agreement = [], {}
    for case in args.list_cases():
        print(f"Timing {case.size} on {device} in {case.dtype}, {case.batch_size} clips a step ...", flush=True)
        own_rows, agreement[f"{case.size}, {case.dtype}"] = measure_case(case, device, args)
        rows += own_rows
    settings = {name: value for name, value in asdict(args).items() if name not in ("output_dir", "name")}
    report = {
        "question": "How fast is one complete stage-1 step?",
        "machine": describe_machine(device),
        "settings": settings,
        "agreement": agreement,
        "rows": rows,
    }
    table = format_rows(rows)
    print(table)
    return write_results("stage1_step", report, table, args.output_dir, args.name)


def measure_case(case: Case, device: torch.device, args: Arguments) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A row for each variant, and the losses and norms by which they agree."""
    size, dtype = SIZES[case.size], getattr(torch, case.dtype)
    memory = {variant: measure_memory(case, variant, args) for variant in case.variants}
    pixel_values = sample_pixel_values(size, case.batch_size, device)
    # In the order of building, since each precision resets Accelerate's state.
    steps = {variant: build_step(variant, size, device, dtype, args.attn) for variant in case.variants}
    steps[PLAIN].load_weights(steps[UMT])
    agreement = check_agreement(steps[UMT], steps[PLAIN], pixel_values)
    saved = {
        variant: None if variant == COMPILED else measure_saved_bytes(step, sample_pixel_values(size, 2, device))
        for variant, step in steps.items()
    }
    rows = time_variants(steps, pixel_values, args)
    for row, variant in zip(rows, case.variants, strict=True):
        row |= {
            "variant": name_variant(variant, device),
            "size": case.size,
            "dtype": case.dtype,
            "peak_memory_bytes": memory[variant],
            "saved_bytes_per_clip": saved[variant],
            "saved_relative_to_plain": saved[variant] and saved[variant] / saved[PLAIN],
        }
    return rows, agreement


def name_variant(variant: str, device: torch.device) -> str:
    """Name for the table, with the compiler that was used."""
    return f"{variant} by {choose_compiler(device.type)}" if variant == COMPILED else variant


def measure_memory(case: Case, variant: str, args: Arguments) -> int | None:
    """Peak memory of a variant in a separate process, in bytes; `None` where it is not asked for."""
    if not args.measure_memory:
        return None
    return measure_peak_memory(
        MemoryJob(
            variant=variant,
            size=case.size,
            batch_size=case.batch_size,
            device=args.device,
            dtype=case.dtype,
            attn=args.attn,
            threads=torch.get_num_threads(),
        )
    )


def check_agreement(step: UMTStep, plain_step: PlainStep, pixel_values: torch.Tensor) -> dict[str, float]:
    """Compare loss and gradient norm of `umt_hf` and the plain step, given the same weights and the same mask.

    Returns:
        Both losses and both gradient norms.

    Raises:
        RuntimeError: If they differ by more than the precision explains.
    """
    size = step.size
    mask = sample_random_mask(pixel_values.shape[0] * size.frames, size.student.patches, size.mask_ratio)
    mask = mask.view(pixel_values.shape[0], -1).to(pixel_values.device)
    found = {}
    for name, each in (("umt_hf", step), ("plain", plain_step)):
        loss = each.run_backward(pixel_values, PhaseClock(each.device), mask)
        norm = torch.nn.utils.get_total_norm([p.grad for p in each.model.parameters() if p.grad is not None])
        found |= {f"loss of {name}": float(loss), f"gradient norm of {name}": float(norm)}
        each.optimizer.zero_grad()
    for quantity in ("loss", "gradient norm"):
        ours, other = found[f"{quantity} of umt_hf"], found[f"{quantity} of plain"]
        if not abs(ours - other) <= AGREEMENT[step.dtype] * other:
            raise RuntimeError(f"umt_hf and the plain step disagree, so their speeds cannot be compared: {found}")
    return found


def time_variants(steps: dict[str, TrainingStep], pixel_values: torch.Tensor, args: Arguments) -> list[dict[str, Any]]:
    """Time all variants in turn, with a large matrix product beside them, and give a row for each."""
    device, dtype = pixel_values.device, steps[UMT].dtype
    cases = {}
    for variant, step in steps.items():
        seconds = time_one_step(step, pixel_values)
        num_steps = args.steps or max(1, round(STRETCH_SECONDS / seconds))
        cases[variant] = partial(run_stretch, step, pixel_values, num_steps)
    ceiling = "ceiling"
    stretches = run_interleaved(cases | {ceiling: partial(measure_matmul_rate, device, dtype)}, args.repeats)
    ceilings = stretches.pop(ceiling)
    return [
        summarize_variant(variant, steps[variant], stretches, ceilings) | {"batch_size": pixel_values.shape[0]}
        for variant in steps
    ]


def time_one_step(step: TrainingStep, pixel_values: torch.Tensor) -> float:
    """Warm up and give the seconds of a step thereafter."""
    run_stretch(step, pixel_values, 1)
    return pixel_values.shape[0] / run_stretch(step, pixel_values, 1).clips_per_second


def run_stretch(step: TrainingStep, pixel_values: torch.Tensor, num_steps: int) -> Stretch:
    """Run steps without waiting for the device between them."""
    clock = PhaseClock(step.device)
    synchronize(step.device)
    start = time.perf_counter()
    for _ in range(num_steps):
        step.run(pixel_values, clock)
    synchronize(step.device)
    seconds = time.perf_counter() - start
    return Stretch(num_steps * pixel_values.shape[0] / seconds, clock.compute_phase_seconds())


def measure_matmul_rate(device: torch.device, dtype: torch.dtype, min_seconds: float = 0.2) -> float:
    """Operations per second of a large square matrix product: what the machine can give."""
    side = MATMUL_SIDE[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    result = left @ right
    synchronize(device)
    start, products = time.perf_counter(), 0
    while time.perf_counter() - start < min_seconds:
        for _ in range(10 if device.type == "cuda" else 1):
            torch.matmul(left, right, out=result)
            products += 1
        synchronize(device)
    return products * 2 * side**3 / (time.perf_counter() - start)


def summarize_variant(
    variant: str, step: TrainingStep, stretches: dict[str, list[Stretch]], ceilings: Sequence[float]
) -> dict[str, Any]:
    """Medians and spreads of a variant; ratios are taken within a round."""
    own = stretches[variant]
    rates = [stretch.clips_per_second for stretch in own]
    flops = {"student": step.flops_of_student, "teacher": step.flops_of_teacher}
    shares = {
        phase: summarize(stretch.phase_seconds.get(phase, 0) / sum(stretch.phase_seconds.values()) for stretch in own)
        for phase in PHASES
    }
    plain_rates = [stretch.clips_per_second for stretch in stretches[PLAIN]]
    return {
        "variant": variant,
        "clips_per_second": summarize(rates),
        "relative_to_plain": summarize(rate / plain for rate, plain in zip(rates, plain_rates, strict=True)),
        "phase_shares": shares,
        "flops_per_clip": flops,
        "matmul_flops_per_second": summarize(ceilings),
        "ceiling_fraction": {
            "with_teacher": summarize_fraction(sum(flops.values()), rates, ceilings),
            "without_teacher": summarize_fraction(flops["student"], rates, ceilings),
        },
    }


def summarize_fraction(flops: int, rates: Sequence[float], ceilings: Sequence[float]) -> dict[str, Any]:
    """Share of the matrix product's rate that the counted operations reach."""
    return summarize(flops * rate / ceiling for rate, ceiling in zip(rates, ceilings, strict=True))


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Write the rows as a Markdown table."""
    has_memory = any(row["peak_memory_bytes"] is not None for row in rows)
    header = ["size", "batch", "precision", "variant", "clips/s", "x plain", "of matmul ceiling"]
    header += ["saved for backward, MiB a clip", "x plain", *(["peak memory, GiB"] if has_memory else [])]
    header += [f"{phase}, %" for phase in PHASES]
    return format_table(header, [format_row(row, has_memory) for row in rows])


def format_row(row: dict[str, Any], has_memory: bool) -> list[str]:
    """Write one line of the table."""
    memory, saved, ratio = row["peak_memory_bytes"], row["saved_bytes_per_clip"], row["saved_relative_to_plain"]
    peak = ["-" if memory is None else f"{memory / 2**30:.2f}"] if has_memory else []
    return [
        row["size"],
        str(row["batch_size"]),
        row["dtype"],
        row["variant"],
        format_spread(row["clips_per_second"]),
        format_spread(row["relative_to_plain"], ".2f"),
        format_spread(row["ceiling_fraction"]["with_teacher"], ".0%"),
        "-" if saved is None else f"{saved / 2**20:.1f}",
        "-" if ratio is None else f"{ratio:.2f}",
        *peak,
        *(f"{share['median'] * 100:.0f}" for share in row["phase_shares"].values()),
    ]


if __name__ == "__main__":
    main()
