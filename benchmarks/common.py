"""What every benchmark shares: interleaved timing, peak memory, medians and spread, the machine, tables, results."""

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

RESULTS_DIR = Path(__file__).parent / "results"
TABLE_BEGIN, TABLE_END = "<!-- results: written by the script -->", "<!-- end of results -->"

T = TypeVar("T")


@dataclass(kw_only=True)
class ReportArguments:
    """Where the report of a benchmark goes."""

    output_dir: Path = field(default=RESULTS_DIR, metadata={"help": "Folder of all results."})
    name: str | None = field(default=None, metadata={"help": "Folder of this machine; by default its hardware."})


class PhaseClock:
    """Splits the time of a repeated step into named phases.

    On CUDA the marks are events in the stream, so that measuring does not make the host wait inside a step.

    Args:
        device: Where the work runs.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._marks: list[tuple[str | None, Any]] = []

    def start(self) -> None:
        """Open a step; what ran since the last mark belongs to no phase."""
        self._marks.append((None, self._now()))

    def mark(self, phase: str) -> None:
        """Close a phase: the time since the last mark is its own. A phase may come several times in a step."""
        self._marks.append((phase, self._now()))

    def compute_phase_seconds(self) -> dict[str, float]:
        """Wait for the device and add up the seconds of each phase over all steps."""
        synchronize(self.device)
        seconds: dict[str, float] = defaultdict(float)
        for (_, before), (phase, after) in zip(self._marks, self._marks[1:], strict=False):
            if phase is not None:
                seconds[phase] += self._elapsed(before, after)
        return dict(seconds)

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _elapsed(self, before: Any, after: Any) -> float:
        return before.elapsed_time(after) / 1000 if self.device.type == "cuda" else after - before


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run_interleaved(cases: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """Measure every case once a round, from another starting case each round.

    What disturbs the machine for a while then falls on all cases, and the ratios within a round hold.

    Args:
        cases: By name, a function that runs the case and returns its measurement.
        repeats: Rounds.

    Returns:
        By name, the measurements in the order of the rounds.
    """
    names = list(cases)
    measurements: dict[str, list[T]] = {name: [] for name in names}
    for repeat in range(repeats):
        start = repeat % len(names)
        for name in names[start:] + names[:start]:
            measurements[name].append(cases[name]())
    return measurements


def run_in_new_process(module: str, job: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Any:
    """Run a module of the benchmarks with a job as its only argument, in JSON, and read its last line.

    Args:
        module: Its name.
        job: What it is to do.
        environment: Variables beside those of this process.

    Raises:
        RuntimeError: If the process fails.
    """
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.run(
        [sys.executable, "-m", module, json.dumps(job)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": path} | dict(environment or {}),
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    if process.returncode:
        raise RuntimeError(f"{module} failed with {job}:\n{process.stderr}")
    return json.loads(process.stdout.splitlines()[-1])


def read_peak_resident_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's getrusage counts the peak of the parent process in
        return int(re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(encoding="utf-8"), re.MULTILINE)[1]) * 1024
    import resource  # on POSIX systems alone

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def summarize(samples: Iterable[float]) -> dict[str, Any]:
    """Median, smallest and largest of the samples, and the samples themselves."""
    samples = list(samples)
    return {"median": statistics.median(samples), "min": min(samples), "max": max(samples), "samples": samples}


def format_spread(summary: Mapping[str, Any] | None, form: str = ".3g") -> str:
    """Write a summary as `median (min-max)`; nothing measured is a dash."""
    if summary is None:
        return "-"
    median, low, high = (format(summary[key], form) for key in ("median", "min", "max"))
    return median if low == high else f"{median} ({low}-{high})"


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Say what the numbers were measured on: hardware and versions, nothing that names the host."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _read_cpu_model(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def name_machine(machine: Mapping[str, Any]) -> str:
    """Derive a folder name from a machine's description, such as `amd-epyc-2-cores`."""
    text = machine["accelerator"] or f"{machine['cpu']} {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def write_results(question: str, report: dict[str, Any], table: str, output_dir: Path, name: str | None) -> Path:
    """Write `<output_dir>/<machine>/<question>.json` and the table beside it.

    A report among the repository's own results also renews the table in the question's README.

    Args:
        question: Name of the benchmark's folder.
        report: Its settings, machine and rows.
        table: The rows as a Markdown table.
        output_dir: Folder of all results.
        name: Folder of this machine; `None` = derived from its description.

    Returns:
        Path of the JSON file.
    """
    machine = report["machine"]
    folder = output_dir / (name or name_machine(machine))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{question}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    hardware = machine["accelerator"] or f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} thread(s)"
    caption = f"{hardware}; torch {machine['torch']}, transformers {machine['transformers']}"
    path.with_suffix(".md").write_text(f"**{caption}**\n\n{table}\n", encoding="utf-8")
    if output_dir.resolve() == RESULTS_DIR.resolve():
        _update_readme(question)
    return path


def _update_readme(question: str) -> None:
    """Put the tables of all machines into the README of a question, between its two marks."""
    readme = Path(__file__).parent / question / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(TABLE_BEGIN)
    _, _, after = rest.partition(TABLE_END)
    tables = [path.read_text(encoding="utf-8") for path in sorted(RESULTS_DIR.glob(f"*/{question}.md"))]
    readme.write_text("\n".join([before + TABLE_BEGIN, "", *tables, TABLE_END]) + after, encoding="utf-8")


def _read_cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine()
