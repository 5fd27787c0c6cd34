"""The `umt-hf` command: parses and delegates, holds no logic."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Unmasked Teacher video models: data, checkpoints, features and video search.", no_args_is_help=True
)
data_app = typer.Typer(help="Make data.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@data_app.command("moving-shapes")
def write_moving_shapes(
    directory: Annotated[Path, typer.Argument(help="Folder to write.")],
    seed: Annotated[int, typer.Option(help="Fixes every pixel.")] = 0,
    num_train_clips: Annotated[int, typer.Option(help="Clips to train on.", min=1)] = 3000,
    num_validation_clips: Annotated[int, typer.Option(help="Clips to validate on.", min=1)] = 600,
    num_test_clips: Annotated[int, typer.Option(help="Clips to test on.", min=1)] = 900,
) -> None:
    """Render the embedded data set: real .mp4 files of moving shapes with labels, captions, questions and boxes."""
    from .training.data.moving_shapes import write_moving_shapes as write

    try:
        write(directory, num_train_clips, num_validation_clips, num_test_clips, seed)
    except OSError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(f"Wrote {directory}")


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Released .pth file.", exists=True, dir_okay=False)],
    name: Annotated[str, typer.Argument(help="Its name, for example umt-vit-b16 or umt-vit-l16-k400.")],
    output: Annotated[Path | None, typer.Option(help="Folder to write; by default the name.")] = None,
) -> None:
    """Convert a released checkpoint to a folder that `AutoModel.from_pretrained` loads."""
    from .modeling.convert_umt_checkpoint import build_published_config, convert_checkpoint
    from .processing.video_processing_umt_video import UMTVideoProcessor

    output = output or Path(name)
    try:
        config, task = build_published_config(name)
        report = convert_checkpoint(checkpoint, name, None, output)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    UMTVideoProcessor.from_model_config(config, task).save_pretrained(output)
    typer.echo(f"Wrote {output}: {report}")


@app.command()
def embed(
    videos: Annotated[list[str], typer.Argument(help="Video files and folders; - reads a list from standard input.")],
    model: Annotated[str, typer.Option(help="Folder or Hub id of a stage-2 or retrieval model.")],
    out: Annotated[Path, typer.Option(help="Index folder to make or to add to.")],
    num_frames: Annotated[
        int | None, typer.Option(help="Frames read of each video; by default the processor's.", min=1)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Videos encoded at a time.", min=1)] = 8,
    num_workers: Annotated[int, typer.Option(help="Processes that read ahead; 0 = none.", min=0)] = 2,
    shard_size: Annotated[
        int, typer.Option(help="Videos written at a time; a killed run loses fewer than that.", min=1)
    ] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Encode videos into an index that `umt-hf search` answers from. Only new and changed ones are encoded."""
    import datasets
    from accelerate import PartialState

    from .training.search import embed_videos

    datasets.disable_progress_bars()
    sources = (line for video in videos for line in (sys.stdin.read().splitlines() if video == "-" else [video]))
    try:
        report = embed_videos(sources, model, out, num_frames, batch_size, num_workers, shard_size)
    except (ImportError, OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    if PartialState().is_main_process:
        typer.echo(json.dumps(asdict(report)) if as_json else report.format())
    if report.num_encoded + report.num_unchanged == 0:
        raise typer.Exit(1)


@app.command()
def features(
    videos: Annotated[list[str], typer.Argument(help="Video files and folders; - reads a list from standard input.")],
    model: Annotated[str, typer.Option(help="Folder or Hub id of a UMT model with its processor.")],
    out: Annotated[Path, typer.Option(help="Folder to make or to add to.")],
    level: Annotated[
        str, typer.Option(help="What has a feature: frame, clip (a window) or tubelet (a token).")
    ] = "clip",
    window: Annotated[int | None, typer.Option(help="Frames seen at a time; by default the model's.", min=1)] = None,
    stride: Annotated[
        int | None, typer.Option(help="Frames from a window to the next; by default half a window.", min=1)
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Frames read a second; by default every frame.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows encoded at a time.", min=1)] = 8,
    format: Annotated[
        str, typer.Option(help="safetensors: a file a video; dataset: also a `datasets` dataset of all of them.")
    ] = "safetensors",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Extract features of videos of any length with their timestamps. Only new and changed videos are read."""
    import datasets
    from accelerate import PartialState

    from .training.features import save_features

    datasets.disable_progress_bars()
    sources = (line for video in videos for line in (sys.stdin.read().splitlines() if video == "-" else [video]))
    try:
        report = save_features(sources, model, out, level, window, stride, batch_size, fps, format)
    except (ImportError, OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    if PartialState().is_main_process:
        typer.echo(json.dumps(asdict(report)) if as_json else report.format())
    if report.num_extracted + report.num_unchanged == 0:
        raise typer.Exit(1)


@app.command()
def search(
    index: Annotated[Path, typer.Argument(help="Index folder that `umt-hf embed` has written.")],
    query: Annotated[str, typer.Argument(help="What the video shows.")],
    top_k: Annotated[int, typer.Option(help="Videos to find.", min=1)] = 10,
    rerank: Annotated[bool, typer.Option("--rerank", help="Sort the 32 best by the matching head.")] = False,
    model: Annotated[str | None, typer.Option(help="The index's model, if it has moved.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the videos as JSON.")] = False,
) -> None:
    """Find the videos of an index that fit a text best."""
    from .training.search import VideoSearcher, format_hits

    try:
        hits = VideoSearcher(index, model).search(query, top_k, rerank)
    except (ImportError, OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(json.dumps([asdict(hit) for hit in hits]) if as_json else format_hits(hits))


if __name__ == "__main__":
    app()
