"""What pre-training on 8 to 512 GPUs needs: a model of its costs, whose tables are those of docs/scaling.md.

python -m benchmarks.scale.model
python -m benchmarks.scale.model --write true
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from benchmarks.common import RESULTS_DIR, TABLE_BEGIN, TABLE_END, format_table
from benchmarks.stage1_step.workload import SIZES
from umt_hf.training.reporting.flops import PEAK_TFLOPS

from .counting import TEXTS, Counts, count
from .loop import DDP, FSDP2
from .run import predict_traffic

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
GIB = 2**30
WEIGHT_BYTES, GRADIENT_BYTES, MOMENT_BYTES = 4, 4, 8  # float32 weights, as the scripts train; AdamW has two moments
PRECISION, TEACHER_BYTES = "bf16", 2  # of the recipes
SAVED_BYTES = 2 * WEIGHT_BYTES + MOMENT_BYTES  # model.safetensors, and weights and moments to resume from
MEASURED_ROWS, LISTED_ROWS = 10_000_000, 25_000_000
RAW, SHARDS = "umt_hf, pyav", "umt_hf, shards (PIL)"  # readers of benchmarks/decoding
MEASURED, COUNTED, ESTIMATE, SHEET, RECIPE = "measured", "counted", "estimate", "data sheet", "recipe"


@dataclass(frozen=True)
class Model:
    """A model and stage of the tables.

    Args:
        name: As the tables have it.
        size: One of `SIZES`.
        is_stage2: Whether with text.
        batch_size: Clips of a step and GPU, as the recipe has it.
        save_steps: Steps between checkpoints, as the recipe has it.
    """

    name: str
    size: str
    is_stage2: bool
    batch_size: int
    save_steps: int

    def count(self) -> Counts:
        """What its step costs."""
        return count(SIZES[self.size], TEXTS[self.size] if self.is_stage2 else None)


MODELS = (
    Model("B/16 stage 1", "b16", False, 64, 2500),
    Model("L/16 stage 1", "l16", False, 64, 2500),
    Model("B/16 stage 2", "b16", True, 128, 4000),
    Model("L/16 stage 2", "l16", True, 128, 4000),
)
# What is trained: words, stage 2 or not, clips.
COURSES = (
    ("stage 1: 0.65 M videos, 201 epochs", False, 0.65e6 * 201),
    ("stage 1: 0.65 M videos, 800 epochs", False, 0.65e6 * 800),
    ("stage 1: 25 M videos, 10 epochs", False, 25e6 * 10),
    ("stage 2: 25 M pairs, 10 epochs", True, 25e6 * 10),
)


@dataclass(kw_only=True)
class Arguments:
    """What the model assumes; whatever is not counted or measured may be set."""

    device: str = field(default="H100", metadata={"help": f"One of {', '.join(PEAK_TFLOPS)}."})
    utilisation: list[float] = field(
        default_factory=lambda: [0.3, 0.4, 0.5],
        metadata={
            "help": "Shares of the device's peak that a step may reach, teacher included; the tables need three."
        },
    )
    gpus: list[int] = field(default_factory=lambda: [8, 32, 128, 512], metadata={"help": "Numbers of GPUs."})
    network_gb: float = field(default=25.0, metadata={"help": "GB/s that a GPU sends to other machines; estimate."})
    disk_gb: float = field(default=1.0, metadata={"help": "GB/s at which a checkpoint is written; estimate."})
    video_mb: float = field(default=0.6, metadata={"help": "MB of a video or of a row of kept frames; estimate."})
    save_steps: int | None = field(
        default=None, metadata={"help": "Steps between checkpoints; default: as the recipes have it."}
    )
    write: bool = field(default=False, metadata={"help": "Put the tables into docs/scaling.md."})

    def __post_init__(self) -> None:
        if self.device not in PEAK_TFLOPS:
            raise ValueError(f"device must be one of {', '.join(PEAK_TFLOPS)}, got {self.device!r}.")
        if len(self.utilisation) != 3 or not all(0 < share <= 1 for share in self.utilisation):
            raise ValueError(f"utilisation takes three shares from 0 to 1, got {self.utilisation}.")

    @property
    def peak(self) -> float:
        """Operations per second of a device at most."""
        return PEAK_TFLOPS[self.device] * 1e12


def main(arguments: Sequence[str] | None = None) -> str:
    """Print the tables, and give them."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    text = format_tables({model: model.count() for model in MODELS}, args)
    print(text)
    if args.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(TABLE_BEGIN)
        _, _, after = rest.partition(TABLE_END)
        PAGE.write_text(f"{before}{TABLE_BEGIN}\n\n{text}\n\n{TABLE_END}{after}", encoding="utf-8")
    return text


def format_tables(counts: dict[Model, Counts], args: Arguments) -> str:
    """All tables of the page, each under its heading."""
    measured = read_measured(RESULTS_DIR)
    tables = {
        "Inputs": format_inputs(measured, args),
        "A clip": format_clips(counts),
        "Clips a second": format_speeds(counts, args),
        "Memory of a GPU": format_memory(counts, args),
        "Bytes of a step": format_traffic(counts, args),
        "Input": format_input(counts, measured, args),
        "Checkpoints": format_checkpoints(counts, args),
        "Starting": format_starts(measured),
        "Hours": format_hours(counts, args),
    }
    return "\n\n".join(f"### {title}\n\n{table}" for title, table in tables.items())


@dataclass(frozen=True)
class Measured:
    """Figures of benchmarks/results.

    Args:
        readers: Clips per second and core, by what is read.
        lists: Seconds for `MEASURED_ROWS` rows: form of the list -> first process, and every later one.
    """

    readers: dict[str, float]
    lists: dict[str, tuple[float, float]]


def read_measured(results: Path) -> Measured:
    """Figures of the first machine that has each table."""
    readers: dict[str, float] = {}
    for words, side, reader in (
        ("340 x 256 files", (340, 256), RAW),
        ("720p files", (1280, 720), RAW),
        ("kept frames", (340, 256), SHARDS),
    ):
        for row in _read_rows(results, "decoding"):
            if (row["width"], row["height"]) == side and row["reader"] == reader:
                readers.setdefault(words, row["batched_clips_per_core_second"]["median"])
    lists = {
        row["form"]: (row["first"]["seconds"], row["second"]["seconds"])
        for row in _read_rows(results, "annotations")
        if row["num_rows"] == MEASURED_ROWS
    }
    return Measured(readers, lists)


def _read_rows(results: Path, question: str) -> Iterator[dict[str, Any]]:
    for file in sorted(results.glob(f"*/{question}.json"))[:1]:
        yield from json.loads(file.read_text(encoding="utf-8"))["rows"]


def format_inputs(measured: Measured, args: Arguments) -> str:
    """What the tables start from, and how each is known."""
    rows = [
        ["operations, weights and saved bytes of a clip", "see below", COUNTED, "`benchmarks.scale.counting`"],
        ["bytes of a step per weight", "see below", COUNTED, "`benchmarks.scale.run`"],
        [f"peak of one {args.device}, bf16", f"{args.peak / 1e12:g} TFLOP/s", SHEET, "`--device`"],
        [
            "share of it that a step reaches",
            ", ".join(f"{u:.0%}" for u in args.utilisation),
            ESTIMATE,
            "`--utilisation`",
        ],
        ["a GPU sends to other machines", f"{args.network_gb:g} GB/s", ESTIMATE, "`--network_gb`"],
        ["a checkpoint is written at", f"{args.disk_gb:g} GB/s", ESTIMATE, "`--disk_gb`"],
        ["a video, or its kept frames", f"{args.video_mb:g} MB", ESTIMATE, "`--video_mb`"],
        ["clips of a step and GPU", "64 in stage 1, 128 in stage 2", RECIPE, "`stage1_umt_vit_*`, `stage2_umt_vit_*`"],
    ]
    rows.append(["videos of the published stage 1, Kinetics-710", "0.65 M", ESTIMATE, ""])
    rows += [
        [f"a core reads {words}", f"{rate:.3g} clips/s", MEASURED, "`benchmarks.decoding`"]
        for words, rate in measured.readers.items()
    ]
    rows.append([f"lists of {MEASURED_ROWS / 1e6:g} M rows", "see below", MEASURED, "`benchmarks.annotations`"])
    return format_table(["what", "value", "how it is known", "from"], rows)


def format_clips(counts: dict[Model, Counts]) -> str:
    """Weights, operations and saved bytes."""
    header = ["model", "weights, M", "teacher, M", "student, TFLOP", "teacher, TFLOP", "together"]
    header += ["saved per clip, MiB", "saved per step, MiB"]
    rows = [
        [
            model.name,
            f"{found.parameters / 1e6:.0f}",
            f"{found.teacher_parameters / 1e6:.0f}",
            f"{found.student_flops / 1e12:.3f}",
            f"{found.teacher_flops / 1e12:.3f}",
            f"{count_flops(found) / 1e12:.3f}",
            f"{found.clip_bytes / 2**20:.0f}",
            f"{found.copy_bytes / 2**20:.0f}",
        ]
        for model, found in counts.items()
    ]
    return format_table(header, rows)


def count_flops(found: Counts) -> float:
    """Operations of a clip, the teacher's included."""
    return found.student_flops + found.teacher_flops


def compute_rate(found: Counts, utilisation: float, args: Arguments) -> float:
    """Clips per second of a GPU."""
    return utilisation * args.peak / count_flops(found)


def format_speeds(counts: dict[Model, Counts], args: Arguments) -> str:
    """Clips per second of a GPU by utilisation, and seconds of a step."""
    low, middle, high = sorted(args.utilisation)
    header = ["model", *(f"clips/s at {share:.0%}" for share in (low, middle, high)), f"ms a step at {middle:.0%}"]
    rows = []
    for model, found in counts.items():
        rates = [compute_rate(found, share, args) for share in (low, middle, high)]
        step = 1000 * model.batch_size / rates[1]
        rows.append([model.name, *(f"{rate:,.0f}" for rate in rates), f"{step:.0f}"])
    return format_table(header, rows)


def format_memory(counts: dict[Model, Counts], args: Arguments) -> str:
    """GiB of a GPU with DDP, and what FSDP2 leaves of the divided part."""
    header = ["model", "trained", "teacher", "copies", "clips", "together"]
    header += [f"trained with fsdp2 on {gpus} GPUs" for gpus in args.gpus[:2]]
    rows = []
    for model, found in counts.items():
        parts = list_memory(found, model.batch_size)
        divided = [(parts[0] / gpus + gathered_bytes(found)) / GIB for gpus in args.gpus[:2]]
        cells = [*parts, sum(parts)]
        rows.append([model.name, *(f"{part / GIB:.1f}" for part in cells), *(f"{part:.2f}" for part in divided)])
    return format_table(header, rows)


def list_memory(found: Counts, batch_size: int) -> list[float]:
    """Bytes with DDP: what is trained, the teacher, copies of weights for a step, what clips keep."""
    trained = (WEIGHT_BYTES + GRADIENT_BYTES + MOMENT_BYTES) * found.parameters
    return [trained, TEACHER_BYTES * found.teacher_parameters, found.copy_bytes, batch_size * found.clip_bytes]


def gathered_bytes(found: Counts) -> float:
    """Bytes that FSDP2 holds beside a GPU's share: the root, a layer and the next one, and a layer's gradients."""
    return 2 * (found.root_parameters + 2 * found.largest_layer) + 2 * found.largest_layer  # in bf16


def format_traffic(counts: dict[Model, Counts], args: Arguments) -> str:
    """Bytes that a GPU sends in a step, and the share of the step that sending takes."""
    _, middle, _ = sorted(args.utilisation)
    header = ["model", "kind", *(f"{gpus} GPUs, GB" for gpus in args.gpus)]
    header += [f"sending at {args.network_gb:g} GB/s over the step at {middle:.0%}"]
    rows = []
    for model, found in counts.items():
        seconds = model.batch_size / compute_rate(found, middle, args)
        for kind in (DDP, FSDP2):
            traffic = predict_traffic(kind, found.parameters, found.root_parameters, PRECISION)
            sent = [traffic.count_sent(gpus) / 1e9 for gpus in args.gpus]
            share = sent[-1] / args.network_gb / seconds
            rows.append([model.name, kind, *(f"{each:.2f}" for each in sent), f"{share:.0%}"])
    return format_table(header, rows)


def format_input(counts: dict[Model, Counts], measured: Measured, args: Arguments) -> str:
    """Clips, cores and bytes that a GPU needs."""
    _, middle, _ = sorted(args.utilisation)
    header = ["model", f"clips/s at {middle:.0%}", *(f"cores for {words}" for words in measured.readers)]
    header += ["read by a GPU, MB/s", f"by {args.gpus[-1]} GPUs, GB/s"]
    rows = []
    for model, found in counts.items():
        rate = compute_rate(found, middle, args)
        cores = [f"{rate / own:.0f}" if rate > own else f"{rate / own:.1f}" for own in measured.readers.values()]
        read = rate * args.video_mb
        rows.append([model.name, f"{rate:,.0f}", *cores, f"{read:,.0f}", f"{read * args.gpus[-1] / 1000:,.0f}"])
    return format_table(header, rows)


def format_checkpoints(counts: dict[Model, Counts], args: Arguments) -> str:
    """Bytes and seconds of a save, and their share of the time between saves."""
    _, middle, _ = sorted(args.utilisation)
    header = ["model", "model.safetensors, GB", "training_state, GB", "three of them, GB"]
    header += [f"s at {args.disk_gb:g} GB/s", "steps between saves", f"share of their time at {middle:.0%}"]
    rows = []
    for model, found in counts.items():
        exported = WEIGHT_BYTES * found.parameters / 1e9
        total = SAVED_BYTES * found.parameters / 1e9
        seconds = total / args.disk_gb
        steps = model.save_steps if args.save_steps is None else args.save_steps
        between = steps * model.batch_size / compute_rate(found, middle, args)
        cells = [exported, total - exported, 3 * total]
        rows.append(
            [
                model.name,
                *(f"{cell:.2f}" for cell in cells),
                f"{seconds:.1f}",
                f"{steps:,}",
                f"{seconds / between:.1%}",
            ]
        )
    return format_table(header, rows)


def format_starts(measured: Measured) -> str:
    """Seconds until a list of 25 M rows is a table: measured ones, longer in proportion."""
    scale = LISTED_ROWS / MEASURED_ROWS
    header = ["list", f"{MEASURED_ROWS / 1e6:g} M rows, first process, s", "every other start, s"]
    header += [f"{LISTED_ROWS / 1e6:g} M rows, first process, s (estimate)", "every other start, s (estimate)"]
    rows = [
        [form, *map(format_short, found), *(format_short(value * scale) for value in found)]
        for form, found in measured.lists.items()
    ]
    return format_table(header, rows)


def format_short(value: float) -> str:
    """A number with two digits that matter."""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def format_hours(counts: dict[Model, Counts], args: Arguments) -> str:
    """Hours of a course on some GPUs: at the middle utilisation, and at the highest and lowest."""
    low, middle, high = sorted(args.utilisation)
    header = ["course", "model", *(f"{gpus} GPUs" for gpus in args.gpus)]
    rows = []
    for words, is_stage2, clips in COURSES:
        for model, found in counts.items():
            if model.is_stage2 == is_stage2:
                seconds = [clips / compute_rate(found, share, args) / 3600 for share in (middle, high, low)]
                cells = [[format_short(value / gpus) for value in seconds] for gpus in args.gpus]
                rows.append([words, model.name.split()[0], *(f"{own} ({least}-{most})" for own, least, most in cells)])
    return format_table(header, rows)


if __name__ == "__main__":
    main()
