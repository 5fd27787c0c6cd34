"""Accuracy and speed of the tour's encoder when it sees a share of its tokens.

python -m benchmarks.kept_tokens.run --folders outputs/moving_shapes
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

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
from benchmarks.pretraining_value.heads import FrameOrderPooling, fit_head
from umt_hf import UMTVideoModel
from umt_hf.inference.loading import load_complete_model, load_video_processor
from umt_hf.moving_shapes.probes import APPEARANCES, MOTIONS, embed_split
from umt_hf.teachers.saliency import load_choosing_teacher

QUESTION = "What do fewer tokens at inference cost in accuracy, and what do they save?"
ALL, RANDOM, CHANGES, SALIENCY = "all tokens", "random", "frame_difference", "teacher_saliency"
SELECTORS = (RANDOM, CHANGES, SALIENCY)
TASKS = {MOTIONS: 4, APPEARANCES: 36}
STRETCH_SECONDS = 0.2


@dataclass(kw_only=True)
class Arguments(ReportArguments):
    """What to measure, on which encoders."""

    folders: list[Path] = field(
        default_factory=lambda: [Path("outputs/moving_shapes")],
        metadata={"help": "Folders that `make demo` has left; those of several seeds are averaged."},
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Of each folder's classifiers and of the random choice."}
    )
    keep_ratios: list[float] = field(
        default_factory=lambda: [0.75, 0.5, 0.35, 0.2, 0.1], metadata={"help": "Shares of the tokens."}
    )
    head_steps: int = field(default=800, metadata={"help": "Optimizer steps of a classifier."})
    batch_size: int = field(default=16, metadata={"help": "Clips that are timed at a time."})
    repeats: int = field(default=5, metadata={"help": "Rounds; each times every choice once."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; by default PyTorch's choice."})


@dataclass(frozen=True)
class Choice:
    """Which tokens the encoder sees."""

    selector: str = ALL
    keep_ratio: float = 1.0
    seed: int = 0

    @property
    def name(self) -> str:
        """The choice in a word."""
        return f"{self.selector} {self.keep_ratio} {self.seed}"


class TourEncoder:
    """The student of a tour, its processor, and the teacher that may choose its tokens.

    Args:
        folder: Of the tour.
    """

    def __init__(self, folder: Path):
        self.processor = load_video_processor(folder / "student")
        self.model = load_complete_model(UMTVideoModel, folder / "student").eval()
        config = self.model.config
        self.teacher = load_choosing_teacher(str(folder / "teacher"), config.image_size // config.patch_size)
        self.pooling = FrameOrderPooling(config.num_frames)

    def encode(self, pixels: torch.Tensor, choice: Choice) -> torch.Tensor:
        """Tokens `(B, V, D)`; the choice is part of the work."""
        config = self.model.config
        config.keep_ratio, config.token_selector_seed = choice.keep_ratio, choice.seed
        saliency = None
        if choice.selector != ALL:
            config.token_selector = choice.selector
            saliency = self.teacher.compute_saliency(pixels) if choice.selector == SALIENCY else None
        return self.model(pixels, saliency=saliency).last_hidden_state

    @torch.no_grad()
    def embed(self, pixels: torch.Tensor, choices: Sequence[Choice]) -> dict[str, torch.Tensor]:
        """One mean per frame, in time order, for each choice: `(B, T * D)`."""
        return {choice.name: self.pooling(self.encode(pixels, choice)) for choice in choices}


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark and give the path of its JSON file."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    if missing := [str(folder) for folder in args.folders if not (folder / "student").is_dir()]:
        sys.exit(f"{missing[0]} has no student: run `make demo`, or name its --output_dir by --folders.")
    accuracies: dict[str, dict[str, list[float]]] = {}
    seconds: dict[str, list[float]] = {}
    for folder in args.folders:
        print(f"Measuring {folder} ...", flush=True)
        encoder = TourEncoder(folder)
        for name, found in measure_accuracy(encoder, folder, args).items():
            own = accuracies.setdefault(name, {task: [] for task in TASKS})
            for task, values in found.items():
                own[task] += values
        for name, found in measure_speed(encoder, folder, args).items():
            seconds.setdefault(name, []).extend(found)
    rows = build_rows(accuracies, seconds, args)
    settings = {name: value for name, value in asdict(args).items() if name not in ("output_dir", "name", "folders")}
    report = {
        "question": QUESTION,
        "machine": describe_machine(torch.device("cpu")),
        "settings": settings | {"num_encoders": len(args.folders)},
        "rows": rows,
    }
    table = format_rows(rows)
    print(table)
    return write_results("kept_tokens", report, table, args.output_dir, args.name)


def list_choices(args: Arguments, seed: int) -> list[Choice]:
    """All tokens, and each share by each selector."""
    shares = [(selector, ratio) for ratio in args.keep_ratios for selector in SELECTORS]
    return [Choice(), *(Choice(selector, ratio, seed if selector == RANDOM else 0) for selector, ratio in shares)]


def name_row(choice: Choice) -> str:
    """What choices of all seeds share."""
    return f"{choice.selector} {choice.keep_ratio}"


def measure_accuracy(encoder: TourEncoder, folder: Path, args: Arguments) -> dict[str, dict[str, list[float]]]:
    """Accuracy on the test clips by row and task, one for each seed; classifiers are fitted on all tokens."""
    train = embed_split(folder / "data", "train", encoder.processor, partial(encoder.embed, choices=[Choice()]))
    choices = list(dict.fromkeys(choice for seed in args.seeds for choice in list_choices(args, seed)))
    test = embed_split(folder / "data", "test", encoder.processor, partial(encoder.embed, choices=choices))
    found: dict[str, dict[str, list[float]]] = {}
    for seed in args.seeds:
        for task, num_classes in TASKS.items():
            head = fit_head(train[Choice().name], train[task], num_classes, args.head_steps, seed)
            for choice in list_choices(args, seed):
                with torch.inference_mode():
                    is_right = head(test[choice.name]).argmax(dim=1) == test[task]
                own = found.setdefault(name_row(choice), {task: [] for task in TASKS})
                own[task].append(is_right.float().mean().item())
    return found


def measure_speed(encoder: TourEncoder, folder: Path, args: Arguments) -> dict[str, list[float]]:
    """Seconds for a batch of test clips by row, one for each round."""
    videos = sorted(str(path) for path in (folder / "data" / "videos" / "test").glob("*.mp4"))[: args.batch_size]
    pixels = encoder.processor(videos, return_tensors="pt")["pixel_values"]
    cases = {}
    for choice in list_choices(args, 0):
        encode = partial(encoder.encode, pixels, choice)
        time_calls(encode, 1)
        count = max(1, round(STRETCH_SECONDS / time_calls(encode, 1)))
        cases[name_row(choice)] = partial(time_calls, encode, count)
    return run_interleaved(cases, args.repeats)


@torch.inference_mode()
def time_calls(encode: Callable[[], torch.Tensor], count: int) -> float:
    """Seconds of a pass, the mean over some."""
    start = time.perf_counter()
    for _ in range(count):
        encode()
    return (time.perf_counter() - start) / count


def build_rows(
    accuracies: dict[str, dict[str, list[float]]], seconds: dict[str, list[float]], args: Arguments
) -> list[dict[str, Any]]:
    """A row for each share and selector: accuracies, what is lost and gained, and the speed."""
    complete = accuracies[name_row(Choice())]
    rows = []
    for choice in list_choices(args, 0):
        own = accuracies[name_row(choice)]
        random = accuracies.get(name_row(Choice(RANDOM, choice.keep_ratio)), complete)
        rows.append(
            {
                "selector": choice.selector,
                "keep_ratio": choice.keep_ratio,
                "accuracy": {task: own[task] for task in TASKS},
                # By seed, so that what a seed's classifier and data do to both does not count.
                "against_all_tokens": {task: compare(own[task], complete[task]) for task in TASKS},
                "against_random": {task: compare(own[task], random[task]) for task in TASKS},
                "speed": summarize(
                    first / mine
                    for first, mine in zip(seconds[name_row(Choice())], seconds[name_row(choice)], strict=True)
                ),
            }
        )
    return rows


def compare(values: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Mean difference of pairs, and its standard error."""
    return describe([value - other for value, other in zip(values, others, strict=True)])


def describe(values: Sequence[float]) -> dict[str, float]:
    """Mean and its standard error; 0 for a single value, which has none."""
    spread = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "standard_error": spread}


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Write the rows as a Markdown table."""
    header = ["tokens", "chosen by", "speed"]
    header += [name for task in TASKS for name in (f"{task}, %", "against all, points", "against random, points")]
    lines = []
    for row in rows:
        cells = [f"{row['keep_ratio']:.0%}", "-" if row["selector"] == ALL else row["selector"]]
        cells.append(format_spread(row["speed"], ".2f"))
        for task in TASKS:
            cells.append(format_points(describe(row["accuracy"][task]), ".1f"))
            cells.append("-" if row["selector"] == ALL else format_points(row["against_all_tokens"][task], "+.1f"))
            is_compared = row["selector"] in (CHANGES, SALIENCY)
            cells.append(format_points(row["against_random"][task], "+.1f") if is_compared else "-")
        lines.append(cells)
    return format_table(header, lines)


def format_points(found: dict[str, float], form: str) -> str:
    """Write a mean with its standard error in percent."""
    return f"{format(100 * found['mean'], form)} ± {100 * found['standard_error']:.1f}"


if __name__ == "__main__":
    main()
