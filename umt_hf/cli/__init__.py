"""The `umt-hf` command: parses and delegates, holds no logic."""

import importlib.metadata
import json
import logging
import sys
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from .errors import Mistake, OneLineGroup
from .scripts import add_scripts
from .word_lists import ListCommand

MODELS, VIDEOS, DATA, HUB = "Models", "Videos", "Data", "Hub and machine"

# `--num_frames` is `--num-frames` and `moving_shapes` is `moving-shapes`, in every verb.
SPELLING = {"token_normalize_func": lambda word: word.replace("_", "-")}

app = typer.Typer(cls=OneLineGroup, no_args_is_help=True, rich_markup_mode="markdown", context_settings=SPELLING)
data_app = typer.Typer(no_args_is_help=True)
add_scripts(app)
app.add_typer(data_app, name="data", help="Make data to try things on.", rich_help_panel=DATA)


Task = Literal[
    "pretraining", "classification", "detection", "video_text_pretraining", "retrieval", "question_answering"
]


Videos = Annotated[
    list[str], typer.Argument(help="Video files, folders and URLs; - reads a list from standard input.")
]


Convert = Annotated[
    bool,
    typer.Option("--convert", help="Convert a released checkpoint that is not on this machine, once, into the cache."),
]
NumWorkers = Annotated[
    int | None,
    typer.Option(help="Processes that read ahead; default: as the machine has cores, 1 to 4; 0: none.", min=0),
]
KeepRatio = Annotated[
    float | None,
    typer.Option(
        help="Share of each frame's tokens that the encoder sees, in (0, 1]; fewer are faster and less accurate. "
        "Default: the model's."
    ),
]
TokenSelector = Annotated[
    Literal["random", "frame_difference", "teacher_saliency"] | None,
    typer.Option(help="Which tokens are kept; default: the model's, frame_difference."),
]
ChoosingTeacher = Annotated[
    str | None,
    typer.Option("--teacher-name-or-path", help="CLIP, SigLIP or DINO whose saliency chooses, for teacher_saliency."),
]
TimeoutSeconds = Annotated[
    int,
    typer.Option(help="Seconds that these processes may give nothing before the command ends; 0: for ever.", min=0),
]
DType = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="What the model is computed in; default: bfloat16 on a GPU that has it, else float32."),
]
TorchCompile = Annotated[
    bool, typer.Option("--torch-compile", help="Compile the video tower by `torch.compile`; pays for many videos.")
]

Window = Annotated[
    float | None, typer.Option(help="Seconds of a moment; default: every video is taken as one, whatever its length.")
]
Stride = Annotated[
    float | None, typer.Option(help="Seconds from a moment to the next; default: the window, so that none overlap.")
]
DATES = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"]


def complete_zoo(incomplete: str) -> list[str]:
    """Names of released checkpoints that begin so, for the completion of a shell."""
    from ..zoo import load_zoo

    return [name for name in load_zoo() if name.startswith(incomplete)]


def show_version(is_asked: bool) -> None:
    """Print the version and end."""
    if is_asked:
        typer.echo(f"umt-hf {importlib.metadata.version('umt_hf')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Unmasked Teacher (UMT) video models: classify, question, search and describe videos; prepare and share models.

    Results go to standard output, progress and messages to standard error. Exit code 0 means that something worked, 1
    that nothing did, 2 that the command was used in a wrong way.
    """


@contextmanager
def report_mistakes() -> Generator[None]:
    """Turn errors that a user can fix into one message and exit code 2, faults of the machine into code 4.

    The libraries' remarks are left out.
    """
    from ..runs.mistakes import MISTAKES, UserError, choose_exit_code, read_rank, summarize
    from ..runs.noise import quiet_libraries

    try:
        # Transformers reports what it loads; here the command speaks.
        with quiet_libraries(read_rank(), logging.ERROR):
            yield
    except (*MISTAKES, UserError) as error:
        mistake = Mistake(summarize(error))
        mistake.exit_code = choose_exit_code(error)
        raise mistake from error


@contextmanager
def report_misspelling() -> Generator[None]:
    """Turn an unknown name into one message and exit code 2, without PyTorch."""
    try:
        yield
    except ValueError as error:
        raise Mistake(str(error)) from error


def convert_model(model: str | None, convert: bool) -> None:
    """Convert a released checkpoint that is not on this machine, if the command was asked to; loaders find it then."""
    if convert and model is not None:
        from ..hub_cards.released_names import resolve_released

        resolve_released(model, convert=True, announce=lambda line: typer.echo(line, err=True))


def build_kept_tokens(keep_ratio: float | None, selector: Any, teacher: str | None) -> Any:
    """Which tokens an encoder sees, from the options of a command."""
    from ..runs.arguments import KeptTokenArguments

    return KeptTokenArguments(keep_ratio=keep_ratio, token_selector=selector, teacher_name_or_path=teacher)


@contextmanager
def report_unreadable() -> Generator[None]:
    """Turn a video that cannot be read into one message and exit code 1."""
    from ..processing.decoding import VideoDecodingError

    try:
        yield
    except VideoDecodingError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


def read_sources(videos: Iterable[str]) -> Iterator[str]:
    """Files and folders as given; for `-`, the lines of standard input."""
    return (line for video in videos for line in (sys.stdin.read().splitlines() if video == "-" else [video]))


def print_report(report: Any, as_json: bool) -> None:
    """Print a dataclass as JSON, or as its own lines for people; of several processes the main one does."""
    # Under `accelerate launch` every process comes here, and one report is enough. Nobody is asked for it: `prepare`
    # forms no group, and one of its processes may be gone.
    from ..runs.mistakes import read_rank

    if read_rank() == 0:
        typer.echo(json.dumps(asdict(report)) if as_json else report.format())


@data_app.command("moving-shapes")
def render_moving_shapes(
    directory: Annotated[Path, typer.Argument(help="Folder to write.")],
    seed: Annotated[int, typer.Option(help="Fixes every pixel.")] = 0,
    num_train_clips: Annotated[int, typer.Option(help="Clips to train on.", min=1)] = 3000,
    num_validation_clips: Annotated[int, typer.Option(help="Clips to validate on.", min=1)] = 600,
    num_test_clips: Annotated[int, typer.Option(help="Clips to test on.", min=1)] = 900,
    low_data_ratio: Annotated[
        float | None, typer.Option(help="Share of the training clips in train_low_data.")
    ] = None,
    corruption: Annotated[list[str], typer.Option(help="noise, blur, ...: adds damaged test clips; repeatable.")] = [],  # noqa: B006
    severity: Annotated[
        Literal["mild", "medium", "strong"], typer.Option(help="How strong the corruptions are.")
    ] = "medium",
    num_corrupted_clips: Annotated[int | None, typer.Option(help="Test clips damaged; default: all.")] = None,
    num_moment_videos: Annotated[
        int, typer.Option(help="Adds so many videos of three actions each, with their times, as test_moments.", min=0)
    ] = 0,
) -> None:
    """Render real .mp4 files of moving shapes, with labels, captions, questions and boxes.

    Example: `umt-hf data moving-shapes shapes --num-train-clips 300`
    """
    from ..moving_shapes.render import write_moving_shapes as write
    from ..moving_shapes.variants import write_corrupted_test, write_low_data, write_moments

    with report_mistakes():
        write(directory, num_train_clips, num_validation_clips, num_test_clips, seed)
        if low_data_ratio is not None:
            write_low_data(directory, low_data_ratio)
        for name in corruption:
            write_corrupted_test(directory, name, severity, num_corrupted_clips)
        if num_moment_videos:
            write_moments(directory, num_moment_videos)
    typer.echo(f"Wrote {directory}")


@app.command(rich_help_panel=MODELS)
def zoo(
    query: Annotated[
        str | None,
        typer.Argument(
            help="A name, shown with all that is known; a task; or text to look for in names.",
            autocompletion=complete_zoo,
        ),
    ] = None,
    task: Annotated[Task | None, typer.Option(help="Checkpoints of one task.")] = None,
    size: Annotated[Literal["b16", "l16"] | None, typer.Option(help="Checkpoints of one size.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the entries as JSON.")] = False,
) -> None:
    """List the released checkpoints, with their published figures."""
    from rich.console import Console

    from ..zoo import build_entry_table, build_zoo_table, filter_zoo, find_entry, find_task, load_zoo

    if query is not None and task is None and (named := find_task(query)):
        query, task = None, cast("Task", named)
    # A name shows all that is known of one entry; anything else filters.
    is_name = query is not None and query in load_zoo()
    with report_misspelling():
        entries = [find_entry(query)] if query is not None and is_name else filter_zoo(task, size, query)
        if query is not None and not entries and task is size is None:
            find_entry(query)
    if as_json:
        found = [entry.to_dict() for entry in entries]
        # A list for a filter, also of one entry, so that scripts can rely on it.
        typer.echo(json.dumps(found[0] if is_name else found))
    elif is_name:
        Console().print(build_entry_table(entries[0]))
    else:
        Console().print(build_zoo_table(entries))
    if not entries:
        raise typer.Exit(1)


@app.command(rich_help_panel=MODELS)
def convert(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="Name from `umt-hf zoo`, which is downloaded, or a .pth file.", autocompletion=complete_zoo
        ),
    ],
    name: Annotated[
        str | None,
        typer.Argument(help="Checkpoint name for a local .pth file; guessed from the file name by default."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write; default: the name.")] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit to download; default: the zoo's.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or Hub id of a BERT, or vocab.txt, for models with text.")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="Names of the classes: JSON, CSV or text.", exists=True)] = None,
    max_shard_size: Annotated[str, typer.Option(help="Size of the largest weight file.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Make a verified folder out of a released checkpoint: weights, processor and model card."""
    from ..zoo import find_entry

    # A misspelt name is found before PyTorch is loaded.
    if name is None and not Path(checkpoint).suffix and not Path(checkpoint).exists():
        with report_misspelling():
            find_entry(checkpoint)
    from ..hub_cards.released_checkpoints import convert_released_checkpoint

    options = {"revision": revision, "tokenizer": tokenizer, "labels": labels, "max_shard_size": max_shard_size}
    with report_mistakes():
        found = convert_released_checkpoint(checkpoint, name, output, overwrite=overwrite, **options)
    typer.echo(json.dumps(asdict(found)) if as_json else found.format())


@app.command(rich_help_panel=MODELS)
def export(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a UMT model with its processor.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    format: Annotated[Literal["onnx", "openvino", "torch"], typer.Option(help="Runtime that is to answer.")] = "onnx",
    part: Annotated[
        Literal["model", "encoder", "video", "text"],
        typer.Option(help="model: both towers of a dual encoder; encoder: that of videos; video, text: one tower."),
    ] = "model",
    int8: Annotated[bool, typer.Option("--int8", help="Make the weights integers of 8 bits.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that exists.")] = False,
    convert: Convert = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Export a model to another runtime, with its processor: for any number of frames and any size.

    What is written is compared with the model, over several shapes.

    Example: `umt-hf export umt-vit-b16-k400 --format openvino --out exported`
    """
    from ..inference.export import export_model
    from .results import announce

    with report_mistakes():
        convert_model(model, convert)
        report = export_model(model, out, format, part, int8, overwrite, announce)
    print_report(report, as_json)


@app.command(rich_help_panel=MODELS)
def card(
    folder: Annotated[Path, typer.Argument(help="Finished folder: a run's, or a converted one.", exists=True)],
    repo_id: Annotated[str | None, typer.Option(help="Where it is, or will be, on the Hub: name/model.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print metadata and headings as JSON.")] = False,
) -> None:
    """Write the model card of a folder, README.md, from what the folder records."""
    from ..hub_cards.card import describe_card, write_model_card

    with report_mistakes():
        path = write_model_card(folder, repo_id=repo_id)
    typer.echo(json.dumps(describe_card(path)) if as_json else f"Wrote {path}")


@app.command(rich_help_panel=HUB)
def push(
    folder: Annotated[Path, typer.Argument(help="Finished model folder: trained, fine-tuned or converted.")],
    repo: Annotated[str, typer.Argument(help="Repository: a name in your account, or account/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, made if it does not exist; default: main.")] = None,
    no_code: Annotated[
        bool, typer.Option("--no-code", help="Without the source files that trust_remote_code=True needs.")
    ] = False,
    handler: Annotated[
        bool, typer.Option("--handler/--no-handler", help="With the handler.py that Inference Endpoints call.")
    ] = False,
    with_predictions: Annotated[
        bool, typer.Option("--with-predictions", help="With predictions.json, which names every held-out video.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the commit as JSON.")] = False,
) -> None:
    """Publish a model folder on the Hub. Run again after a failure, it sends only what is missing.

    Paths of this machine are cut down to their last part in what goes up; the folder stays as it is.
    """
    from ..hub_cards.publishing import PublishingError, push_folder

    def announce(names: list[str]) -> None:
        typer.echo(f"Uploading {len(names)} files to {repo}: {', '.join(names)}.", err=True)

    options = {"private": private or None, "revision": revision, "with_code": not no_code, "with_handler": handler}
    with report_mistakes():
        try:
            url = push_folder(folder, repo, **options, with_predictions=with_predictions, announce=announce)
        except PublishingError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(1) from error
    typer.echo(json.dumps({"commit_url": url}) if as_json else f"Pushed {folder}: {url}")


@app.command(rich_help_panel=HUB)
def demo(
    classifier: Annotated[str | None, typer.Option(help="Folder or Hub id of a classifier.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Of a CLIP, SigLIP or DINO, whose saliency is drawn.")] = None,
    student: Annotated[str | None, typer.Option(help="Of a stage-1 model that the teacher trained.")] = None,
    video_text: Annotated[str | None, typer.Option(help="Of a stage-2 or retrieval model; searches --videos.")] = None,
    question_answering: Annotated[str | None, typer.Option(help="Of a model that answers questions.")] = None,
    videos: Annotated[str | None, typer.Option(help="Folder of videos to pick from and to search.")] = None,
    index: Annotated[str | None, typer.Option(help="Folder to keep the search index in.")] = None,
    convert: Convert = False,
    max_upload_mb: Annotated[int, typer.Option(help="Megabytes of an uploaded clip at most.")] = 500,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait at a time; more are refused.")] = 32,
    timeout_seconds: Annotated[int, typer.Option(help="For one request's work; then it is stopped.")] = 120,
    host: Annotated[str | None, typer.Option(help="Address to listen at; default: this machine alone.")] = None,
    port: Annotated[int | None, typer.Option(help="Default: the first free one from 7860 on.")] = None,
    share: Annotated[bool, typer.Option("--share", help="Make a public link by way of Gradio's servers.")] = False,
    push: Annotated[
        str | None, typer.Option(metavar="REPO", help="Make this Space on the Hub instead of serving the page.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the Space a private one.")] = False,
) -> None:
    """Serve a page to try models in the browser: labels, the teacher's saliency, search, questions.

    Without models and videos: those that `make demo` has left in outputs/moving_shapes, if it has.
    """
    from ..demo.settings import MODELS, TOUR_FOLDER, DemoSettings
    from ..demo.space import push_space
    from ..hub_cards.publishing import PublishingError
    from ..runs.noise import quiet_libraries

    try:
        settings = DemoSettings(
            classifier=classifier,
            teacher=teacher,
            student=student,
            video_text=video_text,
            question_answering=question_answering,
            videos=videos,
            index=index,
            max_upload_mb=max_upload_mb,
            max_waiting=max_waiting,
            timeout_seconds=timeout_seconds,
        )
        for model in (classifier, student, video_text, question_answering):
            convert_model(model, convert)
        if push is not None:
            typer.echo(f"Pushed {push_space(push, settings, private)}")
            return
        if settings.are_empty and not (found := DemoSettings.find()).are_empty:
            typer.echo(f"Showing what `make demo` has left in {TOUR_FOLDER}; the options of this command show others.")
            settings = replace(settings, **{name: getattr(found, name) for name in (*MODELS, "videos")})
        from ..demo.app import launch_demo  # says so where Gradio is missing

        with quiet_libraries(verbosity=logging.ERROR):
            launch_demo(settings, host, port, share)
    except PublishingError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    except (ImportError, OSError, ValueError) as error:
        raise Mistake(str(error)) from error


@app.command(rich_help_panel=VIDEOS)
def embed(
    videos: Videos,
    model: Annotated[str, typer.Option(help="Folder or Hub id of a stage-2 or retrieval model.")],
    out: Annotated[str, typer.Option(help="Index to make or to add to: a folder, or an address such as s3://...")],
    num_frames: Annotated[
        int | None, typer.Option(help="Frames read of each video or moment; default: the processor's.", min=1)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Videos or moments encoded at a time.", min=1)] = 8,
    num_workers: NumWorkers = None,
    shard_size: Annotated[
        int, typer.Option(help="Rows written at a time, or those of half a minute; a killed run loses these.", min=1)
    ] = 1000,
    window: Window = None,
    stride: Stride = None,
    store: Annotated[
        Literal["none", "tokens", "keys"],
        typer.Option(
            help="What is stored of each row for --rerank, which then encodes no video: the encoder's tokens, or the "
            "larger and quicker keys and values of the fusion layers."
        ),
    ] = "none",
    store_dtype: Annotated[
        Literal["float16", "float32"] | None, typer.Option(help="Precision in which it is stored; default: float16.")
    ] = None,
    keep_ratio: KeepRatio = None,
    token_selector: TokenSelector = None,
    teacher: ChoosingTeacher = None,
    dtype: DType = None,
    torch_compile: TorchCompile = False,
    dataloader_timeout_seconds: TimeoutSeconds = 600,
    convert: Convert = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Encode videos into an index for `umt-hf search`, or moments of them.

    Only new and changed videos are encoded.

    Example: `umt-hf embed my_videos/ --model outputs/video_text --out index`
    """
    from ..inference.search import embed_videos
    from .results import announce, describe_folder, report_interruption

    sources = read_sources(videos)
    with report_interruption(lambda: describe_folder(out)), report_mistakes():
        convert_model(model, convert)
        tokens = build_kept_tokens(keep_ratio, token_selector, teacher)
        report = embed_videos(
            sources,
            model,
            out,
            num_frames,
            batch_size,
            num_workers,
            shard_size,
            announce,
            tokens=tokens,
            window=window,
            stride=stride,
            dtype=dtype,
            torch_compile=torch_compile,
            dataloader_timeout_seconds=dataloader_timeout_seconds,
            store=store,
            store_dtype=store_dtype,
        )
    print_report(report, as_json)
    if report.num_encoded + report.num_unchanged == 0:
        raise typer.Exit(1)


@app.command(rich_help_panel=DATA)
def prepare(
    videos: Annotated[
        list[str],
        typer.Argument(
            help="Lists with captions and labels, tars, video files and folders; - reads names from standard input."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the shards, to make or to complete.")],
    num_frames: Annotated[int, typer.Option(help="Frames kept of each video.", min=1)] = 32,
    short_side: Annotated[int, typer.Option(help="Pixels of the shorter side; smaller videos stay.", min=1)] = 256,
    quality: Annotated[int, typer.Option(help="Of the JPEG pictures.", min=1, max=100)] = 85,
    videos_per_shard: Annotated[int, typer.Option(help="Videos in a tar.", min=1)] = 256,
    split: Annotated[
        str, typer.Option(help="Split that the tars are named after; of tars by split, the one that is read.")
    ] = "train",
    data_root: Annotated[
        str | None, typer.Option(help="Folder that relative paths of lists start from; default: the list's.")
    ] = None,
    num_workers: Annotated[
        int | None,
        typer.Option(help="Processes that read and write; default: as the machine has cores, 1 to 4; 0: none.", min=0),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Keep a few small frames of each video in tars, which pre-training reads much faster than the videos.

    Only shards that are missing are written, also after a kill. Unreadable videos are listed in unreadable.txt, and
    tried again by the same command once their files have changed.

    Example: `umt-hf prepare captions.json --out shards`
    """
    from ..data.prepare import ShardSettings, prepare_shards
    from .results import announce, describe_folder, report_interruption

    sources = list(read_sources(videos))
    settings = ShardSettings(num_frames, short_side, quality, videos_per_shard, split)
    with report_interruption(lambda: describe_folder(out)), report_mistakes():
        report = prepare_shards(sources, out, settings, data_root, num_workers, announce)
    print_report(report, as_json)
    if report.num_unreadable == report.num_videos:
        raise typer.Exit(1)


@app.command(rich_help_panel=VIDEOS)
def features(
    videos: Videos,
    model: Annotated[str, typer.Option(help="Folder or Hub id of a UMT model with its processor.")],
    out: Annotated[Path, typer.Option(help="Folder to make or to add to.")],
    level: Annotated[
        Literal["frame", "clip", "tubelet"],
        typer.Option(help="What has a feature: a frame, a clip (a window) or a tubelet (a token)."),
    ] = "clip",
    window: Annotated[int | None, typer.Option(help="Frames seen at a time; default: the model's.", min=1)] = None,
    stride: Annotated[
        int | None, typer.Option(help="Frames from a window to the next; default: a window, each frame once.", min=1)
    ] = None,
    stride_seconds: Annotated[
        float | None, typer.Option(help="Seconds from a window to the next, instead of frames; for clips.")
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Frames read per second; default: every frame.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows encoded at a time.", min=1)] = 8,
    num_workers: NumWorkers = None,
    format: Annotated[
        Literal["safetensors", "dataset", "npy"],
        typer.Option(
            help="safetensors: a file per video; dataset: also one `datasets` dataset; npy: also an array per video."
        ),
    ] = "safetensors",
    keep_ratio: KeepRatio = None,
    token_selector: TokenSelector = None,
    teacher: ChoosingTeacher = None,
    dtype: DType = None,
    torch_compile: TorchCompile = False,
    dataloader_timeout_seconds: TimeoutSeconds = 600,
    convert: Convert = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Extract features of videos of any length, with their timestamps.

    Only new and changed videos are read.

    Example: `umt-hf features my_videos/ --model umt-vit-b16 --out features --fps 4`
    """
    from ..inference.features import save_features
    from .results import announce, describe_folder, report_interruption

    sources = read_sources(videos)
    with report_interruption(lambda: describe_folder(out)), report_mistakes():
        convert_model(model, convert)
        tokens = build_kept_tokens(keep_ratio, token_selector, teacher)
        report = save_features(
            sources,
            model,
            out,
            level,
            window,
            stride,
            batch_size,
            fps,
            format,
            announce,
            stride_seconds=stride_seconds,
            num_workers=num_workers,
            dtype=dtype,
            tokens=tokens,
            torch_compile=torch_compile,
            dataloader_timeout_seconds=dataloader_timeout_seconds,
        )
    print_report(report, as_json)
    if report.num_extracted + report.num_unchanged == 0:
        raise typer.Exit(1)


@app.command(rich_help_panel=VIDEOS)
def search(
    index: Annotated[str, typer.Argument(help="Index that `umt-hf embed` has written.")],
    query: Annotated[str, typer.Argument(help="What the video shows.")],
    top_k: Annotated[int, typer.Option(help="Videos to find.", min=1)] = 10,
    rerank: Annotated[bool, typer.Option("--rerank", help="Sort the 32 best by the matching head.")] = False,
    exact: Annotated[bool, typer.Option("--exact", help="Compare with all vectors, also of a large index.")] = False,
    path: Annotated[
        str | None, typer.Option(help="Search paths of this pattern alone, such as '*/kitchen/*'.")
    ] = None,
    min_duration: Annotated[float | None, typer.Option(help="Seconds that a video has at least.")] = None,
    max_duration: Annotated[float | None, typer.Option(help="Seconds that a video has at most.")] = None,
    after: Annotated[
        datetime | None, typer.Option(help="Files that have changed since then, or on that day.", formats=DATES)
    ] = None,
    before: Annotated[
        datetime | None, typer.Option(help="Files that have not changed since then.", formats=DATES)
    ] = None,
    save_frames: Annotated[
        Path | None, typer.Option(help="Folder for a strip of pictures of each result.", file_okay=False)
    ] = None,
    model: Annotated[str | None, typer.Option(help="The index's model, if it has moved.")] = None,
    convert: Convert = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the videos as JSON.")] = False,
) -> None:
    """Find the videos of an index that fit a text best, and when in them, if the index has moments.

    Example: `umt-hf search index "a dog runs" --rerank`
    """
    from ..data.video_files import SkippedVideo
    from ..inference.moments import save_strips
    from ..inference.search import CHANGED_SINCE, SearchFilter, VideoSearcher, format_hits
    from .results import announce

    with report_mistakes():
        filters = SearchFilter(path, min_duration, max_duration, after, before)
        convert_model(model, convert)
        hits = VideoSearcher(index, model, announce=announce).search(query, top_k, rerank, exact, filters)
        if not hits and filters is not None:
            announce("No video passes the filters.")
        if hits or as_json:
            typer.echo(json.dumps([asdict(hit) for hit in hits]) if as_json else format_hits(hits))
        if save_frames is not None:
            # Of another file a strip would show what was not found.
            found = [(hit.path, hit.start_seconds, hit.end_seconds) for hit in hits if not hit.has_changed]
            changed = [
                SkippedVideo(hit.path, f"it was {CHANGED_SINCE}; embed it again") for hit in hits if hit.has_changed
            ]
            for video in [*save_strips(found, save_frames)[1], *changed]:
                announce(video.format("no strip of"))


@app.command(cls=ListCommand, rich_help_panel=VIDEOS)
def classify(
    videos: Videos,
    model: Annotated[
        str, typer.Option(help="Folder or Hub id of a fine-tuned classifier; with --labels of a model with text.")
    ],
    labels: Annotated[
        list[str] | None,
        typer.Option(help="Classes as texts, for a model that was not trained on them: names, or files of names."),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            help="Prompts with {} for the class, files of prompts, or video, plain, clip_kinetics or clip_ucf101. "
            "Default: 'a video of {}'."
        ),
    ] = None,
    top_k: Annotated[int, typer.Option(help="How many classes per video to print.", min=1)] = 5,
    num_clips: Annotated[
        int | None, typer.Option(help="Clips per video, averaged; default: the processor's.", min=1)
    ] = None,
    num_crops: Annotated[
        int | None, typer.Option(help="Crops per clip, averaged; default: the processor's.", min=1)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Views classified at a time.", min=1)] = 8,
    num_workers: NumWorkers = None,
    keep_ratio: KeepRatio = None,
    token_selector: TokenSelector = None,
    teacher: ChoosingTeacher = None,
    dtype: DType = None,
    torch_compile: TorchCompile = False,
    dataloader_timeout_seconds: TimeoutSeconds = 600,
    window: Window = None,
    stride: Stride = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Folder for a picture of each video's timeline; needs --window.", file_okay=False),
    ] = None,
    convert: Convert = False,
    out: Annotated[
        Path | None,
        typer.Option(help="File of JSON lines to make or to add to; a killed command goes on where it was."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the classes as JSON.")] = False,
) -> None:
    """Print the likeliest classes of videos, or of moments of them, or write them to a file, each as it comes.

    Videos that cannot be read are listed with their reasons.

    Example: `umt-hf classify my_videos/ --model umt-vit-b16-k400 --num-clips 4 --num-crops 3 --out results.jsonl`

    Zero-shot: `umt-hf classify my_videos/ --model umt-vit-b16-25m --labels "a dog" "a cat"`
    """
    from ..inference.classification import LabelOptions, LabelReport
    from ..inference.engine import inference_run
    from ..inference.labels.files import label_files
    from .results import ResultPrinter, announce, announce_once, report_interruption
    from .timelines import iterate_labels, plan_timelines
    from .zero_shot import load_for_labels

    printer = ResultPrinter(as_json, None if out is None else str(out))
    with report_interruption(printer.describe), report_mistakes():
        windows, draw = plan_timelines(window, stride, plot)
        convert_model(model, convert)
        tokens = build_kept_tokens(keep_ratio, token_selector, teacher)
        options = LabelOptions(
            top_k,
            num_clips,
            num_crops,
            batch_size,
            num_workers,
            dataloader_timeout_seconds=dataloader_timeout_seconds,
        )
        classifier = load_for_labels(model, labels or [], template, dtype, torch_compile, tokens)
        sources = read_sources(videos)
        if out is None:
            with inference_run(announce_once, dataloader_timeout_seconds):
                printer.print_labels(iterate_labels(classifier, sources, options, windows, draw))
            printer.print_end(LabelReport((), tuple(sorted(printer.skipped, key=lambda video: video.path))))
        else:
            report = label_files(classifier, sources, out, options, announce, printer.count, windows, draw)
            printer.num_labelled = report.num_classified + report.num_unchanged
            print_report(report, as_json)
    if not printer.num_labelled:
        raise typer.Exit(1)


@app.command(rich_help_panel=VIDEOS)
def stream(
    source: Annotated[
        str, typer.Argument(help="File that is still being written, - for standard input, or URL with --protocol.")
    ],
    model: Annotated[str, typer.Option(help="Folder or Hub id of a classifier, or of any UMT model for features.")],
    window: Annotated[int | None, typer.Option(help="Frames seen at a time; default: the model's.", min=1)] = None,
    stride: Annotated[
        int | None, typer.Option(help="Frames from a window to the next; default: a window.", min=1)
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Frames read per second; default: every frame.")] = None,
    top_k: Annotated[int, typer.Option(help="How many classes per window to print.", min=1)] = 1,
    protocol: Annotated[
        Literal["http", "https", "rtmp", "rtsp", "srt", "tcp", "udp"] | None,
        typer.Option(help="Protocol of a URL; default: no network."),
    ] = None,
    wait_seconds: Annotated[
        float, typer.Option(help="The stream is over when nothing has come for that long.", min=0)
    ] = 10,
    convert: Convert = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print each window as a line of JSON.")] = False,
) -> None:
    """Classify a video while it is written or sent, window by window; of other models, print features as JSON lines.

    Example: `ffmpeg -i camera.mp4 -f mpegts - | umt-hf stream - --model umt-vit-b16-k400 --fps 8`
    """
    from ..data.lists.paths import require_video
    from ..inference.streaming import open_answers
    from .results import report_interruption, until_nobody_reads

    count = 0
    with report_interruption(lambda: f"{count} windows were answered."), report_mistakes(), report_unreadable():
        if source != "-" and protocol is None:
            require_video(source)
        convert_model(model, convert)
        given = sys.stdin.buffer if source == "-" else source
        for answer in open_answers(given, model, window, stride, fps, top_k, protocol, wait_seconds):
            # At once, for whoever reads the other end of a pipe.
            with until_nobody_reads():
                typer.echo(json.dumps(answer.to_dict()) if as_json else answer.format())
                sys.stdout.flush()
            count += 1


@app.command(rich_help_panel=VIDEOS)
def ask(
    video: Annotated[str, typer.Argument(help="Video file or URL.")],
    question: Annotated[str, typer.Argument(help="In words.")],
    model: Annotated[str, typer.Option(help="Folder or Hub id of a question-answering model.")],
    answers: Annotated[
        Path | None,
        typer.Option(help="JSON list of answers to rank; default: the model's words.", exists=True, dir_okay=False),
    ] = None,
    top_k: Annotated[int, typer.Option(help="How many ranked answers to print.", min=1)] = 5,
    convert: Convert = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
) -> None:
    """Answer a question about a video.

    In the model's own words, or with a closed list, ranked.

    Example: `umt-hf ask video.mp4 "what is the man doing?" --model outputs/answers --answers answers.json`
    """
    from ..data.annotations import load_answers
    from ..data.lists.paths import require_video
    from ..inference.question_answering import VideoAnswerer

    with report_mistakes(), report_unreadable():
        convert_model(model, convert)
        require_video(video)
        candidates = None if answers is None else load_answers(str(answers))
        reply = VideoAnswerer(model).answer(video, question, candidates, top_k)
    typer.echo(json.dumps(reply.to_dict()) if as_json else reply.format())


@app.command(rich_help_panel=VIDEOS)
def detect(
    video: Annotated[str, typer.Argument(help="Video file or URL, or folder of one-second files.")],
    model: Annotated[str, typer.Option(help="Folder or Hub id of an action detector.")],
    boxes: Annotated[
        list[str], typer.Option("--boxes", help='Box of a person, "x1,y1,x2,y2" in pixels of the video; repeatable.')
    ] = [],  # noqa: B006
    boxes_file: Annotated[
        Path | None, typer.Option(help="JSON list of boxes, [[x1, y1, x2, y2], ...].", exists=True, dir_okay=False)
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="When the frame with the boxes is shown.")] = None,
    frame: Annotated[int | None, typer.Option(help="Number of that frame, from 0 on, instead.", min=0)] = None,
    top_k: Annotated[int, typer.Option(help="How many actions per box to print.", min=1)] = 5,
    convert: Convert = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print boxes and actions as JSON.")] = False,
) -> None:
    """Name the actions of persons in given boxes.

    Boxes come from a person detector, or from a look at the frame.

    Example: `umt-hf detect video.mp4 --model outputs/detector --boxes "12,30,80,200" --seconds 2.5`
    """
    from ..data.key_frames import parse_box, read_boxes
    from ..data.lists.paths import require_video
    from ..inference.detection import ActionDetector

    with report_mistakes(), report_unreadable():
        # Mistakes in the arguments come first: loading a model takes seconds.
        given = [*map(parse_box, boxes), *(read_boxes(boxes_file) if boxes_file else [])]
        if not given:
            raise ValueError('Give at least one box: --boxes "x1,y1,x2,y2", or --boxes-file.')
        if (seconds is None) == (frame is None):
            raise ValueError("Give --seconds or --frame, one of them.")
        require_video(video)
        convert_model(model, convert)
        report = ActionDetector(model).detect(video, given, seconds, frame, top_k)
    typer.echo(json.dumps(asdict(report)) if as_json else report.format())


@app.command(rich_help_panel=MODELS)
def info(
    model: Annotated[str, typer.Argument(help="Model folder or Hub id.")],
    num_clips: Annotated[
        int | None, typer.Option(help="Clips per video to count; default: the processor's.", min=1)
    ] = None,
    num_crops: Annotated[
        int | None, typer.Option(help="Crops per clip to count; default: the processor's.", min=1)
    ] = None,
    convert: Convert = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """Describe a model: task, parameters, FLOPs, labels, settings.

    No weight is loaded, and of a Hub id no weight is downloaded.

    Example: `umt-hf info umt-vit-b16-k400 --num-clips 4 --num-crops 3`
    """
    from ..hub_cards.model_info import describe_model

    with report_mistakes():
        convert_model(model, convert)
        report = describe_model(model, num_clips, num_crops)
    print_report(report, as_json)


@app.command(rich_help_panel=HUB)
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say what works on this machine, and what to install.

    Libraries are imported, video readers read a video, attention runs. Exit code 1 if something required fails.
    """
    from rich.console import Console

    from ..diagnostics import build_rows, examine_machine, has_failed

    findings = []
    # On one console, so that the lines and the sign that more is tried do not overwrite each other.
    console = Console(stderr=as_json)
    with console.status("Trying what works ..."):
        for found in examine_machine():
            if not as_json:
                console.print(build_rows(found, is_first=not findings or findings[-1].area != found.area))
            findings.append(found)
    if as_json:
        typer.echo(json.dumps([asdict(found) for found in findings]))
    if has_failed(findings):
        raise typer.Exit(1)
