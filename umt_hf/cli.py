"""The `umt-hf` command: parses and delegates, holds no logic."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Unmasked Teacher video models: data and checkpoints.", no_args_is_help=True)
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
        config, _ = build_published_config(name)
        report = convert_checkpoint(checkpoint, name, None, output)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    UMTVideoProcessor.from_model_config(config).save_pretrained(output)
    typer.echo(f"Wrote {output}: {report}")


if __name__ == "__main__":
    app()
