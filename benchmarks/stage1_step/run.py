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
    RESULTS_DIR,
    PhaseClock,
    describe_machine,
    format_spread,
    format_table,
    run_interleaved,
    summarize,
    synchronize,
    write_results,
)
from umt_hf.modeling.masking_umt_video import sample_random_mask

from .memory import MemoryJob, measure_peak_memory
from .steps import COMPILED, PHASES, VARIANTS, PlainStep, TrainingStep, UMTStep, build_step
from .workload import SIZES, sample_pixel_values

# Largest difference of loss and of gradient norm, relative, between umt_hf and the plain step.
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
MATMUL_SIDE = {"cpu": 2048, "cuda": 8192}


@dataclass(kw_only=True)
class Arguments:
    """What to time, and on what."""

    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    sizes: list[str] | None = field(
        default=None, metadata={"help": f"Some of {list(SIZES)}; by default tiny b16 on CPU, b16 l16 on CUDA."}
    )
    batch_size: int | None = field(default=None, metadata={"help": "Clips in a step; by default as the size says."})
    dtype: Literal["float32", "bfloat16"] | None = field(
        default=None, metadata={"help": "By default float32 on CPU; bfloat16 (autocast) on CUDA."}
    )
    attn: str = field(default="sdpa", metadata={"help": "Attention of umt_hf and VideoMAE, Transformers' name."})
    compile: bool = field(default=False, metadata={"help": "Time umt_hf under torch.compile too."})
    steps: int | None = field(
        default=None, metadata={"help": "Steps timed at a stretch; by default as many as fill a second."}
    )
    repeats: int = field(default=5, metadata={"help": "Rounds; each times every variant once."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; by default PyTorch's choice."})
    measure_memory: bool = field(default=True, metadata={"help": "Run each variant in a separate process too."})
    output_dir: Path = field(default=RESULTS_DIR, metadata={"help": "Folder of all results."})
    name: str | None = field(default=None, metadata={"help": "Folder of this machine; by default its hardware."})

    def __post_init__(self) -> None:
        is_cuda = torch.device(self.device).type == "cuda"
        self.sizes = self.sizes or (["b16", "l16"] if is_cuda else ["tiny", "b16"])
        self.dtype = self.dtype or ("bfloat16" if is_cuda else "float32")
        if unknown := set(self.sizes) - SIZES.keys():
            raise ValueError(f"sizes must be among {list(SIZES)}, got {sorted(unknown)}.")

    @property
    def variants(self) -> tuple[str, ...]:
        """What is compared."""
        return (*VARIANTS, COMPILED) if self.compile else VARIANTS

    def choose_batch_size(self, size: str) -> int:
        """Clips in a step."""
        is_cuda = torch.device(self.device).type == "cuda"
        return self.batch_size or (SIZES[size].cuda_batch_size if is_cuda else SIZES[size].cpu_batch_size)


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
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, in convolutions too
    memory = measure_memory(args)
    rows, agreement = [], {}
    for size in args.sizes:
        print(f"Timing {size} on {device} in {args.dtype} ...", flush=True)
        pixel_values = sample_pixel_values(SIZES[size], args.choose_batch_size(size), device)
        steps = {variant: build_step(variant, SIZES[size], device, dtype, args.attn) for variant in args.variants}
        steps["plain"].load_weights(steps["umt_hf"])
        agreement[size] = check_agreement(steps["umt_hf"], steps["plain"], pixel_values)
        rows += [row | {"size": size, "dtype": args.dtype} for row in time_variants(steps, pixel_values, args)]
    for row in rows:
        row["peak_memory_bytes"] = memory.get((row["size"], row["variant"]))
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


def measure_memory(args: Arguments) -> dict[tuple[str, str], int]:
    """Peak memory of each variant at each size, in bytes."""
    if not args.measure_memory:
        return {}
    return {
        (size, variant): measure_peak_memory(
            MemoryJob(
                variant=variant,
                size=size,
                batch_size=args.choose_batch_size(size),
                device=args.device,
                dtype=args.dtype,
                attn=args.attn,
                threads=torch.get_num_threads(),
            )
        )
        for size in args.sizes
        for variant in args.variants
    }


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
    device, dtype = pixel_values.device, steps["umt_hf"].dtype
    cases = {}
    for variant, step in steps.items():
        seconds = time_one_step(step, pixel_values)
        num_steps = args.steps or max(1, round(1 / seconds))
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
    plain_rates = [stretch.clips_per_second for stretch in stretches["plain"]]
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
    header = ["size", "batch", "precision", "variant", "clips/s", "x plain", "peak memory, GiB"]
    header += ["of matmul ceiling", "the same, student's work alone", *(f"{phase}, %" for phase in PHASES)]
    return format_table(header, map(format_row, rows))


def format_row(row: dict[str, Any]) -> list[str]:
    """Write one line of the table."""
    memory = row["peak_memory_bytes"]
    return [
        row["size"],
        str(row["batch_size"]),
        row["dtype"],
        row["variant"],
        format_spread(row["clips_per_second"]),
        format_spread(row["relative_to_plain"], ".2f"),
        "-" if memory is None else f"{memory / 2**30:.2f}",
        format_spread(row["ceiling_fraction"]["with_teacher"], ".0%"),
        format_spread(row["ceiling_fraction"]["without_teacher"], ".0%"),
        *(f"{share['median'] * 100:.0f}" for share in row["phase_shares"].values()),
    ]


if __name__ == "__main__":
    main()
