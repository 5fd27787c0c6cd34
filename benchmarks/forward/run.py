"""Time the forward pass of video encoders of one width, by frames and by the share of tokens that ours keeps.

python -m benchmarks.forward.run
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import HfArgumentParser

from benchmarks.common import (
    ReportArguments,
    describe_machine,
    format_spread,
    format_table,
    run_interleaved,
    summarize,
    synchronize,
    write_results,
)
from umt_hf.modeling.selection_umt_video import select_tokens

from .encoders import (
    Encoder,
    Shape,
    build_timesformer,
    build_umt,
    build_videomae,
    build_vjepa2,
    copy_to_videomae,
)

QUESTION = "How fast is the encoder beside those of Transformers?"
ALL, HALVED, VIDEOMAE = "umt_hf", "VideoMAE, tubelets of 2", "VideoMAE, tubelets of 1"
TOLERANCE = 1e-4
STRETCH_SECONDS = 0.5


@dataclass(kw_only=True)
class Arguments(ReportArguments):
    """What to time, and on what."""

    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    frames: list[int] = field(
        default_factory=lambda: [8, 16, 32, 64], metadata={"help": "Frames of a clip, even numbers."}
    )
    keep_ratios: list[float] = field(
        default_factory=lambda: [0.5, 0.2], metadata={"help": "Shares of tokens that ours keeps in further rows."}
    )
    token_selector: Literal["random", "frame_difference"] = field(
        default="frame_difference", metadata={"help": "How they are chosen; the choice is timed, too."}
    )
    layers: int | None = field(
        default=None, metadata={"help": "Layers of each encoder; by default 2 on CPU, 12 on CUDA."}
    )
    width: int = field(default=768, metadata={"help": "Width of a token."})
    heads: int = field(default=12, metadata={"help": "Heads of the attention."})
    image_size: int = field(default=224, metadata={"help": "Side of a frame, in pixels."})
    patch_size: int = field(default=16, metadata={"help": "Side of a patch, in pixels."})
    batch_size: int | None = field(default=None, metadata={"help": "Clips at a time; by default 1 on CPU, 8 on CUDA."})
    dtype: Literal["float32", "bfloat16"] | None = field(
        default=None, metadata={"help": "Of weights and pixels; by default float32 on CPU, bfloat16 on CUDA."}
    )
    repeats: int = field(default=5, metadata={"help": "Rounds; each times every encoder once."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; by default PyTorch's choice."})

    def __post_init__(self) -> None:
        is_cuda = torch.device(self.device).type == "cuda"
        self.dtype = self.dtype or ("bfloat16" if is_cuda else "float32")
        self.layers = self.layers or (12 if is_cuda else 2)
        self.batch_size = self.batch_size or (8 if is_cuda else 1)
        if odd := [count for count in self.frames if count < 2 or count % 2]:
            raise ValueError(f"frames must be even, for tubelets of 2, got {odd}.")

    @property
    def shape(self) -> Shape:
        """Sizes that all encoders share."""
        assert self.layers is not None
        return Shape(self.width, self.layers, self.heads, self.image_size, self.patch_size)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark and give the path of its JSON file."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    device, rows, agreement = torch.device(args.device), [], {}
    for count in args.frames:
        print(f"Timing clips of {count} frames on {device} in {args.dtype} ...", flush=True)
        torch.manual_seed(0)
        encoders = build_encoders(args, count)
        pixels = torch.randn(args.batch_size, count, 3, args.image_size, args.image_size)
        if count == min(args.frames):
            agreement = check_agreement(encoders, pixels[:1], args)
        for encoder in encoders.values():
            encoder.model.to(device, getattr(torch, args.dtype))
        pixels = pixels.to(device, getattr(torch, args.dtype))
        rows += [row | {"frames": count} for row in time_encoders(encoders, pixels, args.repeats)]
    settings = {name: value for name, value in asdict(args).items() if name not in ("output_dir", "name")}
    report = {
        "question": QUESTION,
        "machine": describe_machine(device),
        "settings": settings,
        "agreement": agreement,
        "rows": rows,
    }
    table = format_rows(rows)
    print(table)
    return write_results("forward", report, table, args.output_dir, args.name)


def name_kept(keep_ratio: float) -> str:
    """Row of ours with a share of its tokens."""
    return f"{ALL}, {keep_ratio:.0%} of the tokens"


def build_encoders(args: Arguments, num_frames: int) -> dict[str, Encoder]:
    """All that are timed, in evaluation mode, by the name of their row."""
    shape = args.shape
    encoders = {ALL: build_umt(shape, num_frames)}
    encoders |= {
        name_kept(ratio): build_umt(shape, num_frames, ratio, args.token_selector) for ratio in args.keep_ratios
    }
    encoders |= {
        VIDEOMAE: build_videomae(shape, num_frames, 1),
        HALVED: build_videomae(shape, num_frames, 2),
        "V-JEPA 2, tubelets of 1": build_vjepa2(shape, num_frames, 1),
        "V-JEPA 2, tubelets of 2": build_vjepa2(shape, num_frames, 2),
        "TimeSformer": build_timesformer(shape, num_frames),
    }
    for encoder in encoders.values():
        encoder.model.eval()
    return encoders


@torch.inference_mode()
def check_agreement(encoders: Mapping[str, Encoder], pixels: torch.Tensor, args: Arguments) -> dict[str, float]:
    """Make sure that the rows are what they are called.

    Ours gives VideoMAE's tokens with the same weights, and with fewer tokens what it gives for those by their indices;
    every encoder has as many tokens as its row says.

    Returns:
        Largest differences.

    Raises:
        RuntimeError: If one of this does not hold.
    """
    own = encoders[ALL].model
    copy_to_videomae(own, encoders[VIDEOMAE].model)
    expected = encoders[ALL].encode(pixels)
    found = {VIDEOMAE: float((encoders[VIDEOMAE].encode(pixels) - expected).abs().max())}
    side = args.image_size // args.patch_size
    for ratio in args.keep_ratios:
        name = name_kept(ratio)
        encoders[name].model.load_state_dict(own.state_dict())
        indices = select_tokens(pixels, (pixels.shape[1], side, side), ratio, args.token_selector)
        given = own(pixels, visible_indices=indices).last_hidden_state
        found[name] = float((encoders[name].encode(pixels) - given).abs().max())
    for name, encoder in encoders.items():
        if (count := encoder.encode(pixels).shape[1]) != encoder.num_tokens:
            raise RuntimeError(f"{name} has {count} tokens, not {encoder.num_tokens}.")
    if wrong := {name: value for name, value in found.items() if not value < TOLERANCE}:
        raise RuntimeError(f"Not the same work: tokens differ by {wrong}.")
    return found


def time_encoders(encoders: Mapping[str, Encoder], pixels: torch.Tensor, repeats: int) -> list[dict[str, Any]]:
    """A row for each encoder, timed in turn."""
    cases = {}
    for name, encoder in encoders.items():
        time_calls(encoder, pixels, 1)
        seconds = time_calls(encoder, pixels, 1)
        cases[name] = partial(time_calls, encoder, pixels, max(1, round(STRETCH_SECONDS / seconds)))
    found = run_interleaved(cases, repeats)
    return [
        {
            "encoder": name,
            "tokens": encoders[name].num_tokens,
            "batch_size": len(pixels),
            "clips_per_second": summarize(len(pixels) / seconds for seconds in found[name]),
            # How many times as fast ours is, with all tokens and with each share of them.
            "speed_of_ours": {
                ours: summarize(other / own for own, other in zip(found[ours], found[name], strict=True))
                for ours in encoders
                if ours.startswith(ALL)
            },
        }
        for name in encoders
    ]


@torch.inference_mode()
def time_calls(encoder: Encoder, pixels: torch.Tensor, count: int) -> float:
    """Seconds of a forward pass, the mean over some."""
    synchronize(pixels.device)
    start = time.perf_counter()
    for _ in range(count):
        encoder.encode(pixels)
    synchronize(pixels.device)
    return (time.perf_counter() - start) / count


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Write the rows as a Markdown table."""
    ours = list(rows[0]["speed_of_ours"])
    header = ["frames", "encoder", "tokens", "clips/s", *(f"speed of {name}" for name in ours)]
    lines = [
        [
            str(row["frames"]),
            row["encoder"],
            str(row["tokens"]),
            format_spread(row["clips_per_second"]),
            *(format_spread(row["speed_of_ours"][name], ".2f") for name in ours),
        ]
        for row in rows
    ]
    return format_table(header, lines)


if __name__ == "__main__":
    main()
