"""The pages that users read, the commands and Python in them, and stand-ins on which these run.

A page runs in a copy of the prepared folder, block after block, in this process. Where a page names a folder or a file
that is not there yet, add it to `STAND_INS` or `prepare`; where a command takes long, cut it in `CUTS`; where it
cannot run here, add it to `NOT_RUN` with the reason.
"""

import ast
import importlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import fsspec
import typer
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from datasets import Dataset, Video
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    HfArgumentParser,
    SiglipVisionConfig,
    SiglipVisionModel,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VideoMAEImageProcessor,
    pipeline,
)
from typer.testing import CliRunner

from tests.e2e.conftest import ROOT
from tests.unit.inference import test_features, test_search
from tests.unit.video_files import cut_start
from umt_hf import (
    UMTVideoConfig,
    UMTVideoForActionDetection,
    UMTVideoForPreTraining,
    UMTVideoForVideoClassification,
    UMTVideoProcessor,
    UMTVideoTextForPreTraining,
    UMTVideoTextForQuestionAnswering,
    UMTVideoTextForRetrieval,
    cli,
)
from umt_hf.cli.scripts import translate_precision
from umt_hf.hub_cards.sentence_transformers import write_sentence_transformers_files
from umt_hf.moving_shapes.tiny_bert import TextTowerArguments, write_text_tower
from umt_hf.runs.config import parse_config
from umt_hf.runs.scripts import GROUP_TITLES, SCRIPTS

PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))]

# Folders that pages name, and the untrained model that stands there.
STAND_INS = {
    "umt-vit-b16": UMTVideoForPreTraining,
    "outputs/umt-vit-b16": UMTVideoForPreTraining,
    "outputs/mine": UMTVideoForPreTraining,
    "outputs/stage1": UMTVideoForPreTraining,
    "umt-vit-b16-k400": UMTVideoForVideoClassification,
    "outputs/umt-vit-b16-k710": UMTVideoForVideoClassification,
    "umt-vit-b16-25m-msrvtt": UMTVideoTextForRetrieval,
    "umt-vit-b16-25m-msvd-qa": UMTVideoTextForQuestionAnswering,
    "outputs/classifier": UMTVideoForVideoClassification,
    "outputs/detector": UMTVideoForActionDetection,
    "outputs/video_text": UMTVideoTextForPreTraining,
    "outputs/umt-vit-b16-5m": UMTVideoTextForPreTraining,
    "outputs/moving_shapes/video_text": UMTVideoTextForPreTraining,
    "outputs/retrieval": UMTVideoTextForRetrieval,
    "outputs/answers": UMTVideoTextForQuestionAnswering,
}

SIZES_OF_VIDEOMAE = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size", "image_size",
    "num_frames",
)  # fmt: skip

# Those that a page writes itself, before it reads them.
WRITTEN_BY = {
    "README.md": ["outputs/mine", "outputs/classifier", "outputs/video_text"],
    "docs/classification.md": ["outputs/classifier"],
    "docs/detection.md": ["outputs/detector"],
    "docs/tour.md": ["outputs/stage1", "outputs/video_text"],
    "docs/video_text.md": ["outputs/umt-vit-b16-5m", "outputs/answers"],
}

# Commands and blocks of Python that do not run here, by page and how they start, and why. Arguments are parsed, names
# of targets, extras and imports looked up all the same.
_LOOPBACK = "needs a Hub; tests/hub runs it on the loopback Hub"
_SERVED = "serves a page until it is interrupted; tests/space drives it in a browser"
_WITHOUT_BITSANDBYTES = {
    f"import torch\nimport umt_hf\nfrom {library}": "needs bitsandbytes"
    for library in ("transformers import AutoModel, BitsAndBytesConfig", "peft")
    if not importlib.util.find_spec("bitsandbytes")
}
_WITHOUT_RUNTIMES = (
    {}
    if all(map(importlib.util.find_spec, ("onnxruntime", "onnxscript", "openvino")))
    else dict.fromkeys(
        ("umt-hf export", "umt-hf classify videos/talk.mp4 --model classifier_onnx", "from umt_hf import Exported"),
        "needs the extra export; `make test-extras` runs it",
    )
)
_WITHOUT_RAY = (
    {} if importlib.util.find_spec("ray") else {"import os\n\nimport ray": "needs ray; `make test-extras` runs it"}
)
_BLOCKS_OF_LIBRARIES = {
    "import umt_hf\nfrom sentence_transformers": "sentence_transformers",
    "from glob import glob\n\nimport lancedb": "sentence_transformers",
    "import mteb": "mteb",
}
_WITHOUT_SENTENCE_TRANSFORMERS = {
    start: f"needs {library}; `make test-extras` runs it"
    for start, library in _BLOCKS_OF_LIBRARIES.items()
    if not importlib.util.find_spec(library)
}
NOT_RUN = {
    "any page": {
        "git clone": "needs a network",
        "cd ": "is a step inside a clone",
        "pip install": "needs a network",
        "make ": "takes minutes",
        "pre-commit install": "changes the clone",
        "umt-hf convert": "needs a released file; tests of conversion make one of its names and shapes",
    },
    "README.md": dict.fromkeys(("umt-hf demo", "umt-hf push"), "tests/hub/test_readme.py runs it"),
    "docs/demo.md": {
        "umt-hf demo": _SERVED,
        "from umt_hf.demo.app": _SERVED,
    },
    "docs/deployment.md": _WITHOUT_RUNTIMES,
    "docs/features.md": {
        "ffmpeg": "is a program of others; tests/unit/inference/test_streaming.py writes to the command"
    },
    "docs/detection.md": {
        "umt-hf finetune detection --config detection_ava": "needs AVA's files",
    },
    "docs/precision.md": _WITHOUT_BITSANDBYTES,
    "docs/sentence_transformers.md": _WITHOUT_SENTENCE_TRANSFORMERS,
    "docs/vbench.md": {"python examples/vbench": "is in a clone; tests/e2e/test_vbench.py runs it"},
    "docs/search.md": {
        "import multiprocess": "loads the package in two more processes; tests/unit/inference/test_batches.py runs it",
        **_WITHOUT_RAY,
    },
    "docs/hub_deployment.md": {
        "umt-hf push": _LOOPBACK,
        "umt-hf demo": "needs a Hub; tests/demo/test_space.py runs it on the loopback Hub",
        "hf jobs": "rents a machine",
    },
    "docs/hub.md": {
        "umt-hf evaluate classification": "needs a Hub; tests/e2e/test_published_figures.py runs it",
        "umt-hf push": _LOOPBACK,
        "hf download": _LOOPBACK,
        "umt-hf pretrain stage1": _LOOPBACK,
        "from umt_hf.hub_cards.publishing": _LOOPBACK,
        "import umt_hf\nfrom transformers import AutoModelForVideoClassification\n": _LOOPBACK,
        "from transformers import AutoModelForVideoClassification, AutoVideoProcessor\n": _LOOPBACK,
        "model.push_to_hub": _LOOPBACK,
    },
}

_TINY_RUN = "--report_to none --dataloader_num_workers 0 --logging_steps 1"
_TINY_TRAINER = (
    f"{_TINY_RUN} --use_cpu true --bf16 false --disable_tqdm true --save_strategy no --eval_strategy no "
    "--load_best_model_at_end false --max_steps 1 --num_frames 2 --per_device_train_batch_size 2 "
    "--per_device_eval_batch_size 2"
)
_TINY_PRETRAINING = (
    f"{_TINY_RUN} --teacher_name_or_path teacher --teacher_image_size 32 --num_aligned_layers 1 --num_frames 2 "
    "--drop_path_rate 0 --per_device_train_batch_size 2 --max_steps 2 --warmup_steps 1 --mixed_precision no"
)
# Flags behind those of a page, which make a run of seconds on stand-ins out of it.
CUTS = {
    "umt_hf.training.stage1": f"{_TINY_PRETRAINING} --image_size 32 --hidden_size 16 --num_hidden_layers 2 "
    "--num_attention_heads 2 --intermediate_size 32",
    "umt_hf.training.stage2": f"{_TINY_PRETRAINING} --text_name_or_path bert --fusion_layer 1 --projection_dim 8 "
    "--batch_sizes 2 --rerank_top_k 2",
    "umt_hf.finetuning.classification": f"{_TINY_TRAINER} --image_size 32",
    "umt_hf.finetuning.retrieval": f"{_TINY_TRAINER} --max_text_tokens 8",
    "umt_hf.finetuning.question_answering": f"{_TINY_TRAINER} --max_question_tokens 8",
    "umt_hf.finetuning.detection": f"{_TINY_TRAINER} --image_size 32 --short_side 32",
    "umt_hf.evaluation.detection": "--dataloader_num_workers 0 --num_pictured 0",
    "umt_hf.evaluation.classification": "--dataloader_num_workers 0",
    "umt_hf.evaluation.zero_shot": "--dataloader_num_workers 0",
    "umt_hf.evaluation.retrieval": "--dataloader_num_workers 0 --num_frames 2 --max_text_tokens 8",
    "umt_hf.evaluation.question_answering": "--dataloader_num_workers 0 --num_frames 2 --max_text_tokens 8",
    "umt_hf.evaluation.moments": "--dataloader_num_workers 0 --num_frames 2 --max_text_tokens 8",
    "umt_hf.evaluation.multiple_choice": "--dataloader_num_workers 0 --num_frames 2 --max_text_tokens 8",
    "umt-hf embed": "--num-workers 0",
    "umt-hf classify": "--num-workers 0",
    "umt-hf data": "--num-train-clips 40 --num-validation-clips 2 --num-test-clips 2",
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str


def read_blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text()
    blocks = []
    for found in re.finditer(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        blocks.append(Block(page, text[: found.start()].count("\n") + 2, found[1], found[2]))
    assert 2 * len(blocks) == len(re.findall(r"^\s*```", text, re.MULTILINE)), (
        f"{page}: a fence that this does not read"
    )
    return blocks


def split_commands(text: str) -> Iterator[list[str]]:
    """Words of each command of a shell block."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            yield words[:end]
            words = words[end + 1 :]


def prepare(folder: Path, shapes: Path) -> Path:
    """Write stand-ins for everything that pages name: models, videos, lists."""
    for name, kind in STAND_INS.items():
        write_stand_in(folder / name, kind)
    config = CLIPVisionConfig(
        image_size=32,
        patch_size=16,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        projection_dim=12,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder / "teacher")
    write_text_tower(
        TextTowerArguments(
            data=str(shapes),
            output_dir=str(folder / "bert"),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )
    write_videomae(folder / "videomae")
    write_siglip(folder / "google" / "siglip2-base-patch16-224")
    (folder / "b16_ptk710_f8_res224.pth").touch()
    shutil.copy(ROOT / "examples" / "upstream" / "umt_models.py", folder)
    (folder / "vocab.txt").write_text("\n".join(test_search.SPECIAL + test_search.WORDS))
    write_media(folder, sorted((shapes / "videos" / "train").iterdir()))
    write_lists(folder, shapes)
    return folder


class StandInStore(MemoryFileSystem):
    """What `s3://` is for a page: files of this process."""

    protocol = "s3"
    store: dict = {}
    pseudo_dirs: list = [""]


def fill_store(folder: Path) -> None:
    """Put videos and lists of the prepared folder into the bucket that pages name."""
    store = fsspec.filesystem("s3")
    lines = {"train": [], "val": []}
    for label, source in (("run", "1.mp4"), ("jump", "2.mp4")):
        content = (folder / "videos" / "train" / label / source).read_bytes()
        for number in range(3):
            name = f"videos/{label}/{number}.mp4"
            store.pipe_file(f"s3://my-bucket/{name}", content)
            lines["val" if number == 2 else "train"].append(f"{name},{label}\n")
    for name, own in lines.items():
        store.pipe_file(f"s3://my-bucket/{name}.csv", "".join(own).encode())


def load_clips_as_msrvtt(*_, **__) -> Dataset:
    """What mteb would download for its tasks of MSR-VTT: the clips of the current folder."""
    rows = json.loads(Path("msrvtt_ret_test1k.json").read_text())
    columns = {"caption": [row["caption"] for row in rows], "video": [f"msrvtt/{row['video']}" for row in rows]}
    return Dataset.from_dict(columns).cast_column("video", Video(decode=False))


def write_stand_in(folder: Path, kind: type) -> None:
    if kind.__name__.startswith("UMTVideoText"):
        write_sentence_transformers_files(test_search.save_model(folder, kind))
        return
    labels = {} if kind is UMTVideoForPreTraining else {"num_labels": 710 if "k710" in folder.name else 6}
    config = UMTVideoConfig(**test_features.TINY | {"num_aligned_layers": 1, "teacher_hidden_size": 12} | labels)
    kind(config).save_pretrained(folder)
    task = "detection" if kind is UMTVideoForActionDetection else None
    UMTVideoProcessor.from_model_config(config, task).save_pretrained(folder)


def write_videomae(folder: Path) -> None:
    """What those have who come from Transformers' own VideoMAE."""
    sizes = {name: test_features.TINY[name] for name in SIZES_OF_VIDEOMAE}
    VideoMAEForVideoClassification(VideoMAEConfig(**sizes)).save_pretrained(folder)
    crop = {"height": sizes["image_size"], "width": sizes["image_size"]}
    VideoMAEImageProcessor(size={"shortest_edge": sizes["image_size"]}, crop_size=crop).save_pretrained(folder)


def write_siglip(folder: Path) -> None:
    """A teacher of another kind than CLIP, by the name of a released one."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 16}
    SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=32, patch_size=16)).save_pretrained(folder)


def write_media(folder: Path, clips: list[Path]) -> None:
    places = ["video.mp4", "clip.mp4", "run.mp4", "videos/talk.mp4"]
    places += ["videos/train/run/1.mp4", "videos/train/jump/2.mp4"]
    places += ["videos/validation/run/3.mp4", "videos/validation/jump/4.mp4"]
    places += ["outputs/moving_shapes/data/videos/test/00000.mp4"]
    for root in ("my_videos", "more_videos", "DATA", "webvid", "msrvtt", "videos", "videos/k400"):
        places += [f"{root}/{number}.mp4" for number in range(4)]
    for number, place in enumerate(places):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        os.link(clips[number % len(clips)], folder / place)
    cut_start(clips[0], folder / "camera.mkv", 0)  # copied into what can be read forwards
    (folder / "cc3m").mkdir()
    for number, color in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (40, 48), color).save(folder / "cc3m" / f"{number}.png")


def write_lists(folder: Path, shapes: Path) -> None:
    captions = json.loads((shapes / "train_captions.json").read_text())
    questions = json.loads((shapes / "train_questions.json").read_text())

    def write(name: str, rows: list) -> None:
        (folder / name).write_text(json.dumps(rows))

    pairs = [{"video": f"{i}.mp4", "caption": captions[i]["caption"]} for i in range(4)]
    for name in ("webvid_train.json", "msrvtt_ret_test1k.json", "train.json", "val.json"):
        write(name, pairs)
    write("cc3m_train.json", [{"image": f"{i}.png", "caption": f"a square {i}"} for i in range(4)])
    asked = [{"video": f"{i}.mp4", **{key: questions[i][key] for key in ("question", "answer")}} for i in range(4)]
    for name in ("qa_train.json", "qa_val.json", "qa_test.json"):
        write(name, asked)
    write("answers.json", json.loads((shapes / "answers.json").read_text()))
    (folder / "boxes").mkdir()
    boxes = [{"box": [4, 4, 30, 40], "labels": ["run"], "score": 0.9}, {"box": [20, 8, 60, 60], "labels": ["wave"]}]
    for name in ("train", "validation", "detector"):
        rows = [{"video": f"../videos/{i}.mp4", "key_seconds": 0.5, "objects": boxes} for i in range(4)]
        write(f"boxes/{name}.json", rows)
    tour = folder / "outputs" / "moving_shapes" / "data"
    (tour / "appearance_labels.json").write_text((shapes / "appearance_labels.json").read_text())
    (tour / "test_appearance.csv").write_text("videos/test/00000.mp4,3\n")
    (folder / "k400").mkdir()
    (folder / "few.csv").write_text("run/0.mp4,0\njump/0.mp4,1\n")
    for split in ("train", "val", "test"):
        (folder / "k400" / f"{split}.csv").write_text("0.mp4,0\n1.mp4,399\n2.mp4,7\n3.mp4,7\n")


def run_block(block: Block) -> None:
    """Run a block in the current folder, as its page's reader does."""
    if block.language == "python":
        tree = ast.parse(block.text, f"{block.page}:{block.line}")
        if find_reason(block.page, block.text) or find_missing_feature(block.text):
            imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
            tree.body = [node for node in imports if not names_missing_extra(node)]
        exec(compile(tree, f"{block.page}:{block.line}", "exec"), {})
    elif block.language == "bash":
        for words in split_commands(block.text):
            run_command(words, find_reason(block.page, " ".join(words) + " ") is None)
    elif block.language == "yaml":
        Path("recipe.yaml").write_text(block.text)
        parse_module("umt_hf.training.stage1", ["--config", "recipe.yaml"])
    elif block.language == "json":
        json.loads(block.text)
    else:
        # `sh`: a loop, which tests/e2e/test_restarting.py runs.
        assert block.language in ("", "bibtex", "sh"), (
            f"{block.page}:{block.line}: nothing here runs {block.language!r}"
        )


def names_missing_extra(node: ast.Import | ast.ImportFrom) -> bool:
    """Whether a line imports a large library that only `make test-extras` installs, and that is not here."""
    name = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
    root = (name or "").split(".")[0].replace("umt_models", "mteb")  # a file that imports it
    return root in ("mteb", "ray", "sentence_transformers") and importlib.util.find_spec(root) is None


def find_missing_feature(code: str) -> str | None:
    """Why Python does not run with the installed versions, or `None`."""
    if 'pipeline("video-classification"' in code and "video_processor" not in inspect.signature(pipeline).parameters:
        return "before it took video processors, the pipeline read the frames itself and wanted an image processor"
    return None


def find_reason(page: str, text: str) -> str | None:
    """Why a command or a block of Python does not run here, or `None`."""
    reasons = NOT_RUN["any page"] | NOT_RUN.get(page, {})
    return next((reason for start, reason in reasons.items() if text.startswith(start)), None)


def run_command(words: list[str], is_run: bool = True) -> None:
    """Run a command in this process; or, without `is_run`, parse its arguments only."""
    AcceleratorState._reset_state(reset_partial_state=True)
    match words:
        case ["umt-hf", group, verb, *arguments] if group in GROUP_TITLES:
            entry = next(entry for entry in SCRIPTS if (entry.group, entry.verb) == (group, verb))
            # The launcher takes its flags, and the script gets the rest.
            context = find_command(typer.main.get_command(cli.app), [group, verb]).make_context(verb, arguments)
            (run_module if is_run else parse_module)(entry.module, translate_precision(entry, context.args))
        case ["umt-hf", *arguments]:
            (run_cli if is_run else parse_cli)(arguments)
        case ["accelerate", "launch", *arguments]:
            launched = launch_command_parser().parse_args(arguments)
            assert launched.module, f"{words}: -m is missing"
            if launched.training_script == "umt_hf.cli":
                (run_cli if is_run else parse_cli)(launched.training_script_args)
            else:
                (run_module if is_run else parse_module)(launched.training_script, launched.training_script_args)
        case ["hf", "jobs", "uv", "run", *arguments] if not is_run:
            parse_job(arguments)
        case ["make", *targets] if not is_run:
            assert set(targets) <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)), (
                targets
            )
        case ["pip", "install", what] if not is_run:
            extras = re.findall(r"\[(\w+)\]", what)
            assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras), what
        case _:
            assert not is_run, f"nothing here runs {shlex.join(words)!r}: see `run_command` and NOT_RUN"


def run_cli(arguments: list[str]) -> None:
    cut = shlex.split(CUTS.get(f"umt-hf {arguments[0]}", ""))
    result = CliRunner().invoke(cli.app, [*arguments, *cut])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, f"umt-hf {shlex.join(arguments)}: {result.output}"


def parse_cli(arguments: list[str]) -> None:
    command = typer.main.get_command(cli.app)
    find_command(command, arguments).callback = lambda **_: None
    command(arguments, standalone_mode=False)


def parse_job(arguments: list[str]) -> None:
    """Parse a command of the Hub's own `hf jobs uv run`, and the one of ours that the Job runs."""
    hub_cli = importlib.import_module("huggingface_hub.cli.hf").app
    if not hasattr(hub_cli, "get_command"):  # of an older huggingface_hub, which Typer made
        hub_cli = typer.main.get_command(hub_cli)
    for word in ("jobs", "uv", "run"):
        hub_cli = hub_cli.get_command(click.Context(hub_cli), word)
    found = hub_cli.make_context("run", list(arguments)).params
    run_command([found["script"], *found["script_args"]], is_run=False)
    # An unknown flag would be taken for the script, and one without a value would take the script.
    assert found["script"] == "umt-hf" and found["secrets"] == ["HF_TOKEN"], found


def find_command(command, arguments: list[str]):
    """The command or sub-command that arguments of `umt-hf` name."""
    for word in arguments:
        if not hasattr(command, "commands"):
            break
        command = command.commands[word]
    return command


def run_module(name: str, arguments: list[str]) -> None:
    module, cut = importlib.import_module(name), CUTS[name]
    if "--teacher_weights" in arguments:  # an image teacher and a video one
        cut = cut.replace("--teacher_name_or_path teacher", "--teacher_name_or_path teacher videomae")
    module.main([*arguments, *shlex.split(cut)])


def parse_module(name: str, arguments: list[str]) -> None:
    on_cpu = ["--use_cpu", "true"] if "--use_cpu" in list_flags(name) else []
    parse_config(importlib.import_module(name).SECTIONS, [*arguments, *on_cpu])


def list_flags(name: str) -> set[str]:
    """Flags of a script or a command: `umt_hf.training.stage1`, `umt-hf embed`, `accelerate launch`."""
    if name.startswith("umt_hf."):
        sections = importlib.import_module(name).SECTIONS.values()
        return {"--config", *HfArgumentParser(tuple(sections))._option_string_actions}
    if name == "accelerate launch":
        return set(launch_command_parser()._option_string_actions)
    command = find_command(typer.main.get_command(cli.app), name.split()[1:])
    commands = [command, *getattr(command, "commands", {}).values()]
    return {"--help", *(flag for own in commands for parameter in own.params for flag in parameter.opts)}


def list_named_scripts(text: str) -> set[str]:
    """Scripts and commands that a text names."""
    files = [path for path in (ROOT / "umt_hf").rglob("*.py") if "\nSECTIONS" in path.read_text()]
    known = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files}
    scripts = known & set(re.findall(r"umt_hf(?:\.\w+)+", text))
    scripts |= {entry.module for entry in SCRIPTS if entry.command in text}
    groups = typer.main.get_command(cli.app).commands
    commands = {f"umt-hf {word}" for word in re.findall(r"umt-hf (\w+)", text) if word in groups}
    return scripts | commands | ({"umt-hf"} if "umt-hf" in text else set())
