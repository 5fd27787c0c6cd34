"""Time the way from video files, and from kept frames, to a training batch: by reader, against the published way.

python -m benchmarks.decoding.run
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

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
from umt_hf.processing.decoding import DecoderName, open_video
from umt_hf.processing.train_transforms import PretrainingTransform

from .opening import time_opening
from .peers import PEERS
from .readers import BASELINE, OURS, BatchReader, BatchTime, FrameByFrameReader, UMTReader
from .shards import OURS_FROM_SHARDS, OtherJPEGReader, ShardReader, check_frames, find_jpeg_readers, write_shards
from .videos import VideoSet, list_sets, make_videos

# Mean difference of normalised pixels from the baseline's: about one grey level, for another order of rounding.
AGREEMENT = 0.02

Builder = Callable[[PretrainingTransform], BatchReader]


@dataclass(kw_only=True)
class Arguments(ReportArguments):
    """What to read."""

    videos: list[str] | None = field(default=None, metadata={"help": "Names of the videos; by default all."})
    clips_per_file: int | None = field(
        default=None, metadata={"help": "Clips of each file in a batch; by default 4, of 720p 2."}
    )
    repeats: int = field(default=5, metadata={"help": "Rounds; each reads a batch with every reader."})


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark and give the path of its JSON file."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    torch.set_num_threads(1)
    known = list_sets()
    if unknown := set(args.videos or ()) - set(known):
        raise ValueError(f"videos must be among {known}, got {sorted(unknown)}.")
    rows: list[dict[str, Any]] = []
    unusable: dict[str, str] = {}
    for name in args.videos or known:
        print(f"Reading {name} ...", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            videos = make_videos(name, Path(folder))
            builders, unusable = find_readers(videos.paths[0])
            rows += measure(videos, builders, unusable, Path(folder) / "shards", args)
    report = {
        "question": "How many training clips a second does one core make of video files?",
        "machine": describe_machine(torch.device("cpu")),
        "settings": {name: value for name, value in asdict(args).items() if name not in ("output_dir", "name")},
        "unusable": unusable,
        "rows": rows,
    }
    tables = [format_rows(rows), format_summary(rows), format_opening(rows)]
    notes = [f"Not measured: {name} ({reason})" for name, reason in unusable.items()]
    table = "\n\n".join([*tables, *notes])
    print(table)
    return write_results("decoding", report, table, args.output_dir, args.name)


def find_readers(path: Path) -> tuple[dict[str, Builder], dict[str, str]]:
    """Readers of files that work here, the published way first, and what is wrong with the others."""
    builders: dict[str, Builder] = {BASELINE: FrameByFrameReader}
    for decoder in get_args(DecoderName):
        builders[f"umt_hf, {decoder}"] = partial(_build_umt_reader, decoder)
    builders |= PEERS
    usable, unusable = {}, {}
    for name, build in builders.items():
        try:
            build(PretrainingTransform(16)).read_batch([path], torch.Generator().manual_seed(0))
            usable[name] = build
        except (ImportError, OSError, RuntimeError) as error:
            unusable[name] = str(error).strip().split("\n")[0]
    if BASELINE not in usable:
        raise RuntimeError(f"{BASELINE}, which all others are compared with: {unusable[BASELINE]}")
    return usable, unusable


def _build_umt_reader(decoder: DecoderName, transform: PretrainingTransform) -> UMTReader:
    return UMTReader(transform, decoder)


def measure(
    videos: VideoSet, builders: Mapping[str, Builder], unusable: dict[str, str], folder: Path, args: Arguments
) -> list[dict[str, Any]]:
    """Read batches with all readers in turn and give a row for each."""
    transform = PretrainingTransform(videos.image_size)
    readers = [build(transform) for build in builders.values()]
    check_agreement(readers, videos.paths[:1])
    shards = write_shards(videos.paths, folder)
    lost_levels = check_frames(videos.paths, shards)
    jpeg_readers, missing = find_jpeg_readers()
    unusable |= missing
    kept: list[BatchReader] = [ShardReader(transform, videos.paths, shards)]
    kept += [OtherJPEGReader(*item, transform, videos.paths, shards) for item in jpeg_readers.items()]
    check_agreement(kept, videos.paths[:1])
    readers += kept

    paths = videos.paths * (args.clips_per_file or videos.clips_per_file)
    cases = {reader.name: partial(time_batch, reader, paths, iter(range(args.repeats))) for reader in readers}
    times = run_interleaved(cases, args.repeats)
    opening = time_opening(videos.paths[0], args.repeats, unusable)
    video_bytes = sum(path.stat().st_size for path in videos.paths)
    shard_bytes = sum(path.stat().st_size for path in folder.glob("*.tar"))
    with open_video(videos.paths[0]) as reader:
        described = {
            "video": videos.name,
            "content": videos.content,
            "width": reader.width,
            "height": reader.height,
            "num_frames": reader.num_frames,
            "image_size": videos.image_size,
            "batch_size": len(paths),
        }
    rows = [described | summarize_reader(reader.name, times, len(paths)) for reader in readers]
    for row in rows:
        is_kept = row["reader"] in [reader.name for reader in kept]
        row["bytes_per_video"] = (shard_bytes if is_kept else video_bytes) / len(videos.paths)
    rows[0] |= {"opening_milliseconds": opening, "lost_grey_levels": lost_levels}
    rows[0]["best_reader_relative_to_others"] = compare_with_others(times)
    rows[0]["shard_bytes_relative_to_videos"] = shard_bytes / video_bytes
    return rows


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


def summarize_reader(name: str, times: Mapping[str, list[BatchTime]], batch_size: int) -> dict[str, Any]:
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


def compare_with_others(times: Mapping[str, list[BatchTime]]) -> dict[str, Any]:
    """Our reader of files beside the best of the others, which is the one with the best median."""
    others = {name: compute_rates(found, 1)[1] for name, found in times.items() if name in (BASELINE, *PEERS)}
    best = max(others, key=lambda name: summarize(others[name])["median"])
    return {"best": best, **summarize(map(divide, compute_rates(times[OURS], 1)[1], others[best]))}


def compute_rates(times: Sequence[BatchTime], batch_size: int) -> tuple[list[float], list[float]]:
    """Clips a second of decoding alone, and of decoding and augmentation."""
    decoding = [batch_size / time.decoding for time in times]
    return decoding, [batch_size / (time.decoding + time.augmentation) for time in times]


def divide(rate: float, baseline: float) -> float:
    """Ratio of two rates of the same round."""
    return rate / baseline


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Write the rows as a Markdown table."""
    header = ["video", "size, frames", "reader", "KiB a video", "decoding alone, clips/s"]
    header += ["decoding and augmentation, clips/s", "x published"]
    lines = [
        [
            row["video"],
            f"{row['width']} x {row['height']}, {row['num_frames']}",
            row["reader"],
            f"{row['bytes_per_video'] / 1024:.0f}",
            format_spread(row["decoded_clips_per_core_second"]),
            format_spread(row["batched_clips_per_core_second"]),
            format_spread(row["relative_to_baseline"], ".2f"),
        ]
        for row in rows
    ]
    return format_table(header, lines)


def format_summary(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each video: files beside the best other reader, kept frames beside the published way."""
    header = ["video", "content", "files: x best other", "best other", "shards: x published", "bytes, shards / mp4"]
    lines = []
    for row in rows:
        if row["reader"] != BASELINE:
            continue
        best = row["best_reader_relative_to_others"]
        kept = next(r for r in rows if (r["video"], r["reader"]) == (row["video"], OURS_FROM_SHARDS))
        lines.append([
            row["video"],
            row["content"],
            format_spread(best, ".2f"),
            best["best"],
            format_spread(kept["relative_to_baseline"], ".1f"),
            f"{row['shard_bytes_relative_to_videos']:.2f}",
        ])  # fmt: skip
    return format_table(header, lines)


def format_opening(rows: Sequence[dict[str, Any]]) -> str:
    """What opening costs, a column for each way."""
    firsts = [row for row in rows if row["reader"] == BASELINE]
    ways = list(firsts[0]["opening_milliseconds"])
    lines = [[row["video"], *(format_spread(row["opening_milliseconds"][way]) for way in ways)] for row in firsts]
    return format_table(["opening, ms", *ways], lines)


if __name__ == "__main__":
    main()
