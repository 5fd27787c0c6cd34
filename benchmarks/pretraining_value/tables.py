"""The tables and the picture."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from umt_hf.plots import AccuracyPanel, plot_accuracy

from . import settings


def report(folder: Path, seeds: Sequence[int], jobs: Sequence[str]) -> None:
    """Print the tables, write them to `tables.md`, and draw `accuracy.png`."""
    names = list(dict.fromkeys(name.partition("/")[2] for name in jobs if name != "teacher"))
    results = {
        name: [
            json.loads((folder / f"seed_{seed}" / name / "result.json").read_text(encoding="utf-8")) for seed in seeds
        ]
        for name in names
    }
    parts = [format_results(results, "full"), format_results(results, "low"), format_corrupted(results)]
    tables = "\n\n".join(parts) + "\n"
    print(tables)
    (folder / "tables.md").write_text(tables, encoding="utf-8")
    panels = []
    sizes = {
        data: len((folder / "frames" / f"{split}_motion.csv").read_text(encoding="utf-8").splitlines())
        for data, split in settings.SPLITS.items()
    }
    for data in settings.SPLITS:
        for task, num_classes in settings.TASKS.items():
            curves = {
                settings.STARTS[start]: [result["curve"] for result in results[f"{start}_{task}_{data}"]]
                for start in settings.STARTS
                if f"{start}_{task}_{data}" in results
            }
            panels.append(AccuracyPanel(f"{task}, {sizes[data]} training clips", curves, 1 / num_classes))
    plot_accuracy(panels, folder / "accuracy.png")
    print(f"Tables:  {folder / 'tables.md'}\nPicture: {folder / 'accuracy.png'}")


def format_results(results: dict[str, list[dict]], data: str) -> str:
    """Test accuracy of every start on both tasks, with the encoder frozen and fine-tuned, and what it cost."""
    title = {"full": "all training clips", "low": "a tenth of them"}[data]
    header = [title, "pre-training, CPU seconds"]
    header += [f"{task}, {state}" for task in settings.TASKS for state in ("frozen", "fine-tuned")]
    lines = [f"| {' | '.join(header)} |", "| --- |" + " --- |" * (len(header) - 1)]
    for start in settings.STARTS if data == "full" else settings.LOW_DATA_STARTS:
        seconds = [run["cpu_seconds"] for run in results[start]]
        cells = [settings.STARTS[start], "0" if start == "scratch" else format_mean(seconds, 0)]
        for task in settings.TASKS:
            name = f"{task}_{data}"
            cells.append(format_mean([run[name] for run in results[f"{start}_heads"]]))
            cells.append(format_mean([run["test"] for run in results[f"{start}_{name}"]]))
        lines.append(f"| {' | '.join(cells)} |")
    chance = [f"{1 / num_classes:.3f}" for num_classes in settings.TASKS.values() for _ in range(2)]
    return "\n".join([*lines, f"| chance |  | {' | '.join(chance)} |"])


def format_corrupted(results: dict[str, list[dict]]) -> str:
    """Accuracy on corrupted test clips."""
    names = ["intact", *settings.CORRUPTIONS]
    header = [f"fine-tuned on all clips; {settings.SEVERITY} corruption", *(name.replace("_", " ") for name in names)]
    lines = [f"| {' | '.join(header)} |", "| --- |" + " --- |" * len(names)]
    for task in settings.TASKS:
        for start in settings.CORRUPTED_STARTS:
            runs = [run["corrupted"] for run in results[f"{start}_{task}_full"]]
            cells = [format_mean([run[name] for run in runs]) for name in names]
            lines.append(f"| {task}, {settings.STARTS[start]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def format_mean(values: Sequence[float], digits: int = 3) -> str:
    """Mean and, of several seeds, standard deviation."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"
