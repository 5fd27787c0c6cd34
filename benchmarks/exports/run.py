"""Compare a classifier with its exports: accuracy on held-out clips, speed and size, in float32 and int8.

python -m benchmarks.exports.run --folder outputs/moving_shapes
"""

import csv
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import HfArgumentParser

from benchmarks.common import (
    ReportArguments,
    describe_machine,
    format_spread,
    format_table,
    run_interleaved,
    summarize,
    write_results,
)
from umt_hf import VideoClassifier
from umt_hf.inference.export import export_model

QUESTION = "What does an exported classifier answer, how fast, and what do 8 bits cost?"
PYTORCH = "PyTorch"
# Format, and whether in 8 bits.
VARIANTS: dict[str, tuple[str, bool]] = {
    "ONNX Runtime": ("onnx", False),
    "ONNX Runtime, int8 weights": ("onnx", True),
    "OpenVINO": ("openvino", False),
    "OpenVINO, int8 weights": ("openvino", True),
}
AGREEMENT = 1e-3  # of the largest logit, for exports in float32


@dataclass(kw_only=True)
class Arguments(ReportArguments):
    """What to compare."""

    folder: Path = field(default=Path("outputs/moving_shapes"), metadata={"help": "Of `make demo`: data and student."})
    classifier: Path | None = field(
        default=None, metadata={"help": "Default: the folder's, which is fine-tuned from its student if need be."}
    )
    epochs: int = field(default=10, metadata={"help": "Of that fine-tuning."})
    variants: list[str] = field(default_factory=lambda: list(VARIANTS), metadata={"help": "Exports to compare."})
    max_clips: int = field(default=900, metadata={"help": "Held-out clips at most."})
    batch_size: int = field(default=8, metadata={"help": "Clips in a call that is timed."})
    calls: int = field(default=8, metadata={"help": "Calls of each variant in a round."})
    repeats: int = field(default=7, metadata={"help": "Rounds; each times every variant."})
    threads: int = field(default=1, metadata={"help": "Of PyTorch and of both runtimes."})


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark and give the path of its JSON file."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    torch.set_num_threads(args.threads)
    classifier = args.classifier or find_classifier(args.folder, args.epochs)
    paths, labels = read_list(args.folder / "data" / "test_appearance.csv", args.max_clips)
    sizes = {PYTORCH: measure_size(classifier)}
    models = {PYTORCH: VideoClassifier(classifier, device="cpu")}
    with tempfile.TemporaryDirectory() as work:
        for number, name in enumerate(args.variants):
            format, int8 = VARIANTS[name]
            print(f"Exporting: {name} ...", flush=True)
            out = Path(work) / str(number)
            sizes[name] = export_model(classifier, out, format, int8=int8).size_bytes
            models[name] = VideoClassifier(out)
        clips = [models[PYTORCH].processor(path, return_tensors="pt")["pixel_values"] for path in paths]
        logits = {name: compute_logits(model, clips, args.batch_size) for name, model in models.items()}
        check_agreement(logits)
        seconds = time_calls(models, clips, args)
    rows = [build_row(name, logits, labels, seconds, sizes, args) for name in models]
    settings = {name: value for name, value in asdict(args).items() if name not in ("output_dir", "name", "folder")}
    settings |= {"classifier": None, "clips": len(clips)}
    report = {
        "question": QUESTION,
        "machine": describe_machine(torch.device("cpu")),
        "settings": settings,
        "rows": rows,
    }
    table = format_rows(rows)
    print(table)
    return write_results("exports", report, table, args.output_dir, args.name)


def find_classifier(folder: Path, epochs: int) -> Path:
    """The folder's classifier, fine-tuned from its student where there is none yet.

    Raises:
        SystemExit: If the folder has no student either.
    """
    classifier, student, data = folder / "classifier", folder / "student", folder / "data"
    if (classifier / "config.json").is_file():
        return classifier
    if not (student / "config.json").is_file():
        raise SystemExit(f"{folder} has no student: run `make demo` first, or give a classifier by --classifier.")
    print(f"Fine-tuning {classifier} for {epochs} epochs ...", flush=True)
    command = [sys.executable, "-m", "umt_hf.finetuning.classification", "--model_name_or_path", str(student)]
    for split in ("train", "validation"):
        command += [f"--{split}_data", str(data / f"{split}_appearance.csv")]
    command += ["--output_dir", str(classifier), "--num_train_epochs", str(epochs), "--learning_rate", "1e-3"]
    command += ["--per_device_train_batch_size", "32", "--use_cpu", "true", "--report_to", "none"]
    subprocess.run([*command, "--save_total_limit", "1"], check=True)
    return classifier


def read_list(path: Path, count: int) -> tuple[list[str], np.ndarray]:
    """Files and classes of up to `count` rows, spread over a list of `path,label`."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    rows = rows[:: max(len(rows) // count, 1)][:count]
    return [str(path.parent / row[0]) for row in rows], np.array([int(row[-1]) for row in rows])


def measure_size(folder: Path) -> int:
    """Bytes of a model's weights and configuration."""
    return sum((folder / name).stat().st_size for name in ("config.json", "model.safetensors"))


@torch.inference_mode()
def compute_logits(model: VideoClassifier, clips: Sequence[torch.Tensor], batch_size: int) -> np.ndarray:
    """Logits of all clips, `(clips, classes)`, averaged over the views of each."""
    logits = []
    for start in range(0, len(clips), batch_size):
        batch = clips[start : start + batch_size]
        found = model.model(pixel_values=torch.cat(batch)).logits.float()
        logits += [views.mean(0).numpy() for views in found.split([len(views) for views in batch])]
    return np.stack(logits)


def check_agreement(logits: dict[str, np.ndarray]) -> None:
    """Make sure that exports in float32 do the same work as PyTorch.

    Raises:
        RuntimeError: If their logits differ by more than rounding.
    """
    exact = logits[PYTORCH]
    for name, found in logits.items():
        if name != PYTORCH and not VARIANTS[name][1] and np.abs(found - exact).max() > AGREEMENT * np.abs(exact).max():
            raise RuntimeError(f"{name} has other logits than {PYTORCH}: not the same work.")


def time_calls(
    models: dict[str, VideoClassifier], clips: Sequence[torch.Tensor], args: Arguments
) -> dict[str, list[float]]:
    """Seconds of a call of each variant, round by round."""
    batch = torch.cat(list(clips[: args.batch_size]))
    return run_interleaved(
        {name: build_case(model, batch, args.calls) for name, model in models.items()}, args.repeats
    )


def build_case(model: VideoClassifier, batch: torch.Tensor, calls: int) -> Callable[[], float]:
    """A function that times the calls of a variant, after one that is not counted."""

    @torch.inference_mode()
    def measure() -> float:
        model.model(pixel_values=batch)
        start = time.perf_counter()
        for _ in range(calls):
            model.model(pixel_values=batch)
        return (time.perf_counter() - start) / calls

    return measure


def build_row(
    name: str,
    logits: dict[str, np.ndarray],
    labels: np.ndarray,
    seconds: dict[str, list[float]],
    sizes: dict[str, int],
    args: Arguments,
) -> dict[str, Any]:
    """What is known of a variant; points are percentages of the clips."""
    exact = logits[PYTORCH].argmax(-1) == labels
    own = logits[name].argmax(-1) == labels
    # Of the same clips, so that the error is that of the difference, far below that of each accuracy.
    lost = 100 * (exact.astype(float) - own)
    return {
        "variant": name,
        "accuracy": 100 * float(own.mean()),
        "drop_points": float(lost.mean()),
        "drop_standard_error": float(lost.std(ddof=1) / len(lost) ** 0.5),
        "same_answers": 100 * float((logits[name].argmax(-1) == logits[PYTORCH].argmax(-1)).mean()),
        "clips_per_second": summarize(args.batch_size / one for one in seconds[name]),
        "relative_to_pytorch": summarize(
            other / one for one, other in zip(seconds[name], seconds[PYTORCH], strict=True)
        ),
        "size_bytes": sizes[name],
    }


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Write the rows as a Markdown table."""
    header = [
        "variant",
        "accuracy, %",
        "drop, points (standard error)",
        "same answers, %",
        "clips/s",
        "x PyTorch",
        "MiB",
    ]
    lines = [
        [
            row["variant"],
            f"{row['accuracy']:.1f}",
            f"{row['drop_points']:.2f} ({row['drop_standard_error']:.2f})" if row["variant"] != PYTORCH else "-",
            f"{row['same_answers']:.1f}",
            format_spread(row["clips_per_second"]),
            format_spread(row["relative_to_pytorch"], ".2f"),
            f"{row['size_bytes'] / 2**20:.2f}",
        ]
        for row in rows
    ]
    return format_table(header, lines)


if __name__ == "__main__":
    main()
