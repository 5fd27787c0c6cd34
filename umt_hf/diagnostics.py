"""What works on this machine, found out by trying it: libraries, video readers, attention, GPU and precision.

This file imports nothing but the standard library at its top, so that it runs where a library is broken.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from rich.table import Table

Status = Literal["ok", "missing", "broken"]

# Name of a distribution -> name to import it by.
REQUIRED = {
    "torch": "torch", "torchvision": "torchvision", "transformers": "transformers", "accelerate": "accelerate",
    "datasets": "datasets", "peft": "peft", "av": "av",
}  # fmt: skip
OPTIONAL = {
    "decord2": ("decord", "pip install decord2 (imported as decord; pyav reads all that it reads)"),
    "torchcodec": (
        "torchcodec",
        "pip install 'umt_hf[torchcodec]', and FFmpeg: from the system's packages, or pip install torchcodec-ffmpeg "
        "and call torchcodec_ffmpeg.install() before torchcodec is imported",
    ),
    "lancedb": ("lancedb", "pip install 'umt_hf[search]', for umt-hf embed and search"),
    "gradio": ("gradio", "pip install 'umt_hf[demo]', for umt-hf demo"),
    "flash-attn": ("flash_attn", "pip install 'umt_hf[flash-attn]', on a machine with a CUDA GPU"),
}
DECODERS = ("pyav", "decord", "torchcodec")
DECODER_PACKAGES = {"decord": "decord2", "torchcodec": "torchcodec"}
ATTENTIONS = ("sdpa", "eager", "flex_attention", "flash_attention_2")
NAME_WIDTH = 2 + len("torch + torchvision")  # of the longest name, with what it is indented by
PROBE_LEVELS = (40, 90, 140, 190)  # grey level of each frame of the video that readers are tried on
PROBE_TOLERANCE = 12
OFFLINE_FLAGS = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


@dataclass(frozen=True)
class Finding:
    """One thing that was tried.

    Attributes:
        area: Group that it belongs to.
        name: What was tried.
        status: "ok"; "missing" = not there; "broken" = there, but it fails.
        detail: Version, or the reason.
        advice: What to do; empty where nothing is to be done.
        is_required: Whether the package cannot work without it.
    """

    area: str
    name: str
    status: Status
    detail: str
    advice: str = ""
    is_required: bool = False


def examine_machine() -> Iterator[Finding]:
    """Try everything, one thing after the other. Nothing is downloaded, and nothing is left on the disk."""
    is_usable = True
    for found in chain(_examine_packages(), _examine_torchvision()):
        is_usable = is_usable and not has_failed([found])
        yield found
    if is_usable:
        own = _try("packages", "umt_hf", lambda: importlib.import_module("umt_hf").__version__, is_required=True)
        yield own
        if own.status == "ok":
            yield from chain(_examine_decoders(), _examine_attention(), _examine_devices())
    yield from _examine_settings()


def has_failed(findings: Iterable[Finding]) -> bool:
    """Whether something that is required is missing or broken."""
    return any(found.is_required and found.status != "ok" for found in findings)


def build_rows(found: Finding, is_first: bool) -> "Table":
    """Lay out a finding for a terminal, with what to do below one that is not ok; columns are those of all others.

    Args:
        found: What was found.
        is_first: Whether it is the first one of its area, whose name then comes before it.
    """
    from rich.table import Table
    from rich.text import Text

    colors = {"ok": "green", "missing": "yellow", "broken": "red"}
    table = Table.grid(padding=(0, 1))
    table.add_column(width=NAME_WIDTH)
    table.add_column(width=max(map(len, colors)))
    table.add_column()
    if is_first:
        table.add_row(Text(found.area, style="bold"))
    detail = Text(found.detail)
    if found.advice:
        detail.append(f"\n-> {found.advice}", style="dim")
    table.add_row(f"  {found.name}", Text(found.status, style=colors[found.status]), detail)
    return table


def _try(area: str, name: str, probe: Callable[[], str], advice: str = "", is_required: bool = False) -> Finding:
    """Run a probe that gives a detail; whatever it raises is the finding."""
    try:
        return Finding(area, name, "ok", probe(), is_required=is_required)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return Finding(area, name, "broken", reason, advice, is_required)


def _examine_packages() -> Iterator[Finding]:
    yield Finding("packages", "python", "ok", platform.python_version(), is_required=True)
    specifiers = _read_specifiers("umt_hf")
    for name, module in REQUIRED.items():
        yield _examine_package(
            name, module, specifiers.get(name, ""), f"pip install '{name}{specifiers.get(name, '')}'", True
        )
    for name, (module, advice) in OPTIONAL.items():
        if name == "decord2" and _find_version("decord") is not None:
            yield _examine_decord()
        else:
            yield _examine_package(name, module, specifiers.get(name, ""), advice, False)


def _examine_decord() -> Finding:
    """The former package: beside `decord2`, each has overwritten files of the other."""
    version, fork = _find_version("decord"), _find_version("decord2")
    if fork is None:
        advice = "pip uninstall decord, then pip install decord2: the maintained fork, imported by the same name"
        return Finding("packages", "decord2", "missing", f"decord {version} is installed in its place", advice)
    advice = "pip uninstall decord decord2, then pip install decord2: removing one alone leaves the other in pieces"
    detail = f"decord {version} and decord2 {fork} are both installed, in the same folder"
    return Finding("packages", "decord2", "broken", detail, advice)


def _examine_package(name: str, module: str, specifier: str, advice: str, is_required: bool) -> Finding:
    from packaging.specifiers import SpecifierSet

    if not _is_installed(module):
        return Finding("packages", name, "missing", "not installed", advice, is_required)

    def probe() -> str:
        imported = importlib.import_module(module)
        version = _find_version(name) or getattr(imported, "__version__", "of unknown version")
        if specifier and not SpecifierSet(specifier).contains(version, prereleases=True):
            raise ImportError(f"version {version} is installed, {specifier} is needed")
        return version

    return _try("packages", name, probe, advice, is_required)


def _is_installed(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None  # else it is a folder that happens to have the name


def _find_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read_specifiers(distribution: str) -> dict[str, str]:
    """Versions that an installed distribution asks for, by name; empty where it has no metadata."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        lines = []
    return {requirement.name: str(requirement.specifier) for requirement in map(Requirement, lines)}


def _examine_torchvision() -> Iterator[Finding]:
    """Versions that fit each other; a mismatch breaks every model of Transformers."""

    def probe() -> str:
        import torch
        import torchvision
        from packaging.specifiers import SpecifierSet

        pair = f"torchvision {torchvision.__version__} with torch {torch.__version__}"
        wanted = _read_specifiers("torchvision").get("torch", "")
        if not SpecifierSet(wanted).contains(torch.__version__, prereleases=True):
            raise ImportError(f"{pair} do not belong together: it needs torch{wanted}")
        kept = torchvision.ops.nms(torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1]]), torch.tensor([0.5, 0.9]), 0.5)
        if kept.tolist() != [1]:
            raise RuntimeError("torchvision.ops.nms gives a wrong result")
        return pair

    advice = "install both anew, from one index: pip install --upgrade torch torchvision"
    yield _try("packages", "torch + torchvision", probe, advice, is_required=True)


def _examine_decoders() -> Iterator[Finding]:
    """Read a video of four frames with each reader; an import alone proves nothing for torchcodec."""
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder) / "probe.mp4"
        written = _try("video readers", "pyav", lambda: _write_probe_video(video), "pip install --upgrade av", True)
        if written.status != "ok":
            yield written
            return
        for name in DECODERS:
            package = DECODER_PACKAGES.get(name, "")
            advice = OPTIONAL[package][1] if package else "pip install --upgrade av"
            if package and not _is_installed(OPTIONAL[package][0]):
                yield Finding("video readers", name, "missing", "not installed", advice)
            else:
                yield _try(
                    "video readers", name, lambda name=name: _read_probe_video(video, name), advice, name == "pyav"
                )


def _write_probe_video(path: Path) -> str:
    import av
    import numpy as np

    # Some readers are not trusted with MPEG-4 Part 2, but its encoder is FFmpeg's own, in every build.
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for level in PROBE_LEVELS:
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def _read_probe_video(path: Path, decoder: Any) -> str:
    from .processing.decoding import open_video

    with open_video(path, decoder) as reader:
        levels = reader.get_frames(range(reader.num_frames)).mean(axis=(1, 2, 3)).tolist()
    if len(levels) != len(PROBE_LEVELS) or any(
        abs(found - true) > PROBE_TOLERANCE for found, true in zip(levels, PROBE_LEVELS, strict=True)
    ):
        raise RuntimeError(f"frames of levels {list(PROBE_LEVELS)} came back as {[round(level) for level in levels]}")
    return "decodes"


def _examine_attention() -> Iterator[Finding]:
    """Run a small encoder with each implementation, and compare it with the written-out one."""
    import torch

    device = _find_device()
    for name in ATTENTIONS:
        if name == "flash_attention_2":
            if not _is_installed("flash_attn"):
                yield Finding("attention", name, "missing", "flash-attn is not installed", OPTIONAL["flash-attn"][1])
                continue
            if device.type != "cuda":
                yield Finding("attention", name, "missing", "needs a CUDA GPU", "use sdpa, the default")
                continue
        dtype = torch.bfloat16 if name == "flash_attention_2" else torch.float32
        advice = "use attn_implementation='sdpa', the default" if name != "sdpa" else "pip install --upgrade torch"
        yield _try(
            "attention",
            name,
            lambda name=name, dtype=dtype: _run_attention(name, device, dtype),
            advice,
            name == "sdpa",
        )


def _run_attention(name: str, device: "torch.device", dtype: "torch.dtype") -> str:
    import torch

    from .modeling.configuration_umt_video import UMTVideoConfig
    from .modeling.modeling_umt_video import UMTVideoModel

    config = UMTVideoConfig(
        image_size=64, num_frames=8, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        num_aligned_layers=1,
    )  # fmt: skip
    # Flex attention compiles itself, which takes a minute of C++ on a CPU; what it computes shows without.
    stance = torch.compiler.set_stance("force_eager" if device.type == "cpu" else "default")
    with torch.random.fork_rng(), torch.no_grad(), stance, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = UMTVideoModel(config).eval()
        model.to(device, dtype)
        clip = torch.randn(1, 8, 3, 64, 64, device=device, dtype=dtype)
        model.set_attn_implementation("eager")
        expected = model(clip).last_hidden_state
        model.set_attn_implementation(name)
        difference = float((model(clip).last_hidden_state - expected).abs().max())
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    if not difference <= tolerance:
        raise RuntimeError(f"differs from eager attention by {difference:.1e}")
    return f"runs on {device.type}" + ("" if name == "eager" else f", within {difference:.0e} of eager")


def _find_device() -> "torch.device":
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _examine_devices() -> Iterator[Finding]:
    import torch

    device = _find_device()
    if device.type == "cuda":
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            detail = (
                f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, compute capability {facts.major}.{facts.minor}"
            )
            yield Finding("devices", f"cuda:{index}", "ok", f"{detail}, CUDA {torch.version.cuda}")
    elif device.type == "mps":
        yield Finding("devices", "mps", "ok", platform.machine())
    elif shutil.which("nvidia-smi") is not None:
        detail = f"nvidia-smi is there, but PyTorch (built for CUDA {torch.version.cuda or 'none'}) sees no GPU"
        yield Finding("devices", "cuda", "broken", detail, "install a PyTorch that fits the driver")
    else:
        yield Finding("devices", "GPU", "missing", "none found; everything runs on the CPU")
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        yield _try("precision", name, lambda dtype=dtype: _multiply(device, dtype), "use mixed_precision no")


def _multiply(device: "torch.device", dtype: "torch.dtype") -> str:
    import torch

    matrix = torch.full((64, 64), 0.125, device=device)
    with torch.autocast(device.type, dtype):
        product = matrix @ matrix
    if product.dtype != dtype or product.float().unique().tolist() != [1.0]:
        raise RuntimeError(f"a product that is 1 came back as {product.dtype}, {product.float().unique().tolist()}")
    is_native = (
        device.type != "cuda" or dtype != torch.bfloat16 or torch.cuda.is_bf16_supported(including_emulation=False)
    )
    return f"autocast works on {device.type}" + ("" if is_native else ", emulated: use float16")


def _describe_threads() -> str:
    """Threads and loader workers of a run that `umt-hf` starts on a CPU, and why as many."""
    from .runs.cores import count_physical_cores, count_threads, count_workers, read_given_threads

    given = read_given_threads() is not None
    reason = "as OMP_NUM_THREADS says" if given else f"{count_physical_cores()} physical cores / --num_processes"
    return f"a run on the CPU computes with {count_threads()} ({reason}) and reads with {count_workers()} workers"


def _examine_settings() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    detail = f"{cores} cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}"
    if _is_installed("torch"):
        threads = _try("settings", "cpu", lambda: str(importlib.import_module("torch").get_num_threads()))
        detail += f", PyTorch uses {threads.detail} threads" if threads.status == "ok" else ""
    yield Finding("settings", "cpu", "ok", detail)
    yield _try("settings", "threads", _describe_threads, "set OMP_NUM_THREADS to a number")
    flags = [f"{name}={os.environ[name]}" for name in OFFLINE_FLAGS if os.environ.get(name)]
    endpoint = os.environ.get("HF_ENDPOINT")
    detail = (", ".join(flags) + ": the Hub is not asked") if flags else "offline flags are not set: the Hub is asked"
    yield Finding("settings", "Hub", "ok", detail + (f" at {endpoint}" if endpoint and not flags else ""))
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    is_writable = os.access(next(folder for folder in (cache, *cache.parents) if folder.exists()), os.W_OK)
    advice = "" if is_writable else "set HF_HOME to a folder that you may write"
    yield Finding("settings", "cache", "ok" if is_writable else "broken", str(cache), advice)


__all__ = ["Finding", "build_rows", "examine_machine", "has_failed"]
