"""Time the way from video files to a training batch, by decoder, against decord with PIL frame by frame.

python -m benchmarks.decoding.run
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import HfArgumentParser

from benchmarks.common import (
    RESULTS_DIR,
    describe_machine,
    format_spread,
    format_table,
    run_interleaved,
    summarize,
    write_results,
)
from umt_hf.processing.decoding import DecoderName, open_video
from umt_hf.processing.train_transforms import PretrainingTransform

from .readers import BASELINE, BatchReader, BatchTime, FrameByFrameReader, UMTReader
from .videos import VideoSet, collect_videos

# Mean difference of normalised pixels from the baseline's: about one grey level, for another order of rounding.
AGREEMENT = 0.02


@dataclass(kw_only=True)
class Arguments:
    """What to read."""

    videos: list[str] | None = field(default=None, metadata={"help": "Names of the videos; by default all."})
    clips_per_file: int = field(default=4, metadata={"help": "Clips of each file in a batch."})
    repeats: int = field(default=5, metadata={"help": "Rounds; each reads a batch with every reader."})
    output_dir: Path = field(default=RESULTS_DIR, metadata={"help": "Folder of all results."})
    name: str | None = field(default=None, metadata={"help": "Folder of this machine; by default its hardware."})


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark and give the path of its JSON file."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        videos = collect_videos(Path(directory))
        if unknown := set(args.videos or ()) - videos.keys():
            raise ValueError(f"videos must be among {list(videos)}, got {sorted(unknown)}.")
        decoders, unusable = find_decoders(videos["moving_shapes"].paths[0])
        rows = []
        for name in args.videos or videos:
            print(f"Reading {name} ...", flush=True)
            rows += time_readers(videos[name], decoders, args)
    report = {
        "question": "How many training clips a second does one core make of video files?",
        "machine": describe_machine(torch.device("cpu")),
        "settings": {name: value for name, value in asdict(args).items() if name not in ("output_dir", "name")},
        "unusable_decoders": unusable,
        "rows": rows,
    }
    table = format_rows(rows)
    print(table)
    return write_results("decoding", report, table, args.output_dir, args.name)


def find_decoders(path: Path) -> tuple[list[DecoderName], dict[str, str]]:
    """Tell which decoders work here, and what is wrong with the others."""
    usable, unusable = [], {}
    for decoder in get_args(DecoderName):
        try:
            open_video(path, decoder).close()
            usable.append(decoder)
        except ImportError as error:
            unusable[decoder] = str(error).split("\n")[0]
    return usable, unusable


def time_readers(videos: VideoSet, decoders: Sequence[DecoderName], args: Arguments) -> list[dict[str, Any]]:
    """Read batches with all readers in turn and give a row for each."""
    transform = PretrainingTransform(videos.image_size)
    readers = [FrameByFrameReader(transform), *(UMTReader(transform, decoder) for decoder in decoders)]
    paths = videos.paths * args.clips_per_file
    check_agreement(readers, paths[:1])
    cases = {reader.name: partial(time_batch, reader, paths, iter(range(args.repeats))) for reader in readers}
    times = run_interleaved(cases, args.repeats)
    with open_video(videos.paths[0]) as reader:
        described = {
            "video": videos.name,
            "width": reader.width,
            "height": reader.height,
            "num_frames": reader.num_frames,
            "image_size": videos.image_size,
            "batch_size": len(paths),
        }
    return [described | summarize_reader(reader.name, times, len(paths)) for reader in readers]


def check_agreement(readers: Sequence[BatchReader], paths: Sequence[Path]) -> None:
    """Compare the batches that the readers make of the same draws; it warms them up, too.

    Raises:
        RuntimeError: If one differs from the first reader's by more than rounding.
    """
    batches = [reader.read_batch(paths, torch.Generator().manual_seed(0))[0] for reader in readers]
    for reader, batch in zip(readers, batches, strict=True):
        difference = (batch - batches[0]).abs().mean().item()
        if not difference <= AGREEMENT:
            raise RuntimeError(
                f"{paths[0].name}: {reader.name} differs from {readers[0].name} by {difference:.3f} on average, so "
                "their speeds cannot be compared."
            )


def time_batch(reader: BatchReader, paths: Sequence[Path], seeds: Iterator[int]) -> BatchTime:
    """Read one batch; the same round has the same draws for every reader."""
    return reader.read_batch(paths, torch.Generator().manual_seed(next(seeds)))[1]


def summarize_reader(name: str, times: dict[str, list[BatchTime]], batch_size: int) -> dict[str, Any]:
    """Medians and spreads of a reader; ratios are taken within a round."""
    decoding, total = compute_rates(times[name], batch_size)
    baseline_decoding, baseline_total = compute_rates(times[BASELINE], batch_size)
    return {
        "reader": name,
        "decoded_clips_per_core_second": summarize(decoding),
        "batched_clips_per_core_second": summarize(total),
        "decoding_relative_to_baseline": summarize(map(divide, decoding, baseline_decoding)),
        "relative_to_baseline": summarize(map(divide, total, baseline_total)),
    }


def compute_rates(times: Sequence[BatchTime], batch_size: int) -> tuple[list[float], list[float]]:
    """Clips a second of decoding alone, and of decoding and augmentation."""
    decoding = [batch_size / time.decoding for time in times]
    return decoding, [batch_size / (time.decoding + time.augmentation) for time in times]


def divide(rate: float, baseline: float) -> float:
    """Ratio of two rates of the same round."""
    return rate / baseline


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Write the rows as a Markdown table."""
    header = ["video", "size, frames", "reader", "decoding alone, clips/s", "x baseline"]
    header += ["decoding and augmentation, clips/s", "x baseline"]
    lines = [
        [
            row["video"],
            f"{row['width']} x {row['height']}, {row['num_frames']}",
            row["reader"],
            format_spread(row["decoded_clips_per_core_second"]),
            format_spread(row["decoding_relative_to_baseline"], ".2f"),
            format_spread(row["batched_clips_per_core_second"]),
            format_spread(row["relative_to_baseline"], ".2f"),
        ]
        for row in rows
    ]
    return format_table(header, lines)


if __name__ == "__main__":
    main()
