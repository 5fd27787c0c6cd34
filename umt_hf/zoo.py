"""The zoo: every released UMT checkpoint by our name, with its source, its settings and its published figures.

Source: Li et al., "Unmasked Teacher", ICCV 2023, and the model zoos of the published code; data in `zoo.yaml`.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from rich.table import Table

DIRECTIONS = {"text_to_video": "text to video", "video_to_text": "video to text", "values": None}


@dataclass(frozen=True)
class PublishedFigure:
    """One number of a published table.

    Args:
        protocol: What was done: "classification", "action_detection", "zero_shot_retrieval", "retrieval" or
            "question_answering".
        data_set: Name of the test data.
        metric: What the number is.
        value: The number, percent.
        source: Address of the table.
        views: Frames x crops x clips, where the table says.
    """

    protocol: str
    data_set: str
    metric: str
    value: float
    source: str
    views: str | None = None


@dataclass(frozen=True)
class ZooEntry:
    """A checkpoint: what it is, where it comes from, how its model is fed.

    Args:
        name: Ours, as `build_published_config` takes it.
        task: As for `convert_state_dict`.
        size: "b16" or "l16".
        frames: Frames of a clip.
        resolution: Side of a frame, in pixels.
        trained_on: Names of the data sets, in the order of training.
        repo: Hub repository of the file.
        revision: Of the repository.
        file: Path in the repository; `None` for a model that was never released.
        data_set: Name of the data set fine-tuned on, if any.
        num_labels: Classes of the head, if any.
        class_names: File of the package with names of the first or all classes.
        unnamed: Why some or all classes have no names.
        starts_from: Our name of the checkpoint that training started from.
        recipe: Name of our recipe of this run.
        tokenizer: Hub id of the tokenizer, of models with text.
        max_text_tokens: Tokens of a text, of models with text.
        processor: Settings of the video processor that differ from what the model's configuration gives.
        code_url: Published code.
        code_license: Licence of the published code.
        weights_license: Licence of the weights; "unknown" = none is known here.
        compute: What training cost, where it was published.
        figures: Published figures.
        notes: What the published zoo gets wrong, and other reservations.
    """

    name: str
    task: str
    size: str
    frames: int
    resolution: int
    trained_on: tuple[str, ...]
    repo: str
    revision: str
    file: str | None
    code_url: str
    code_license: str
    weights_license: str
    data_set: str | None = None
    num_labels: int | None = None
    class_names: str | None = None
    unnamed: str | None = None
    starts_from: str | None = None
    recipe: str | None = None
    tokenizer: str | None = None
    max_text_tokens: int | None = None
    processor: dict[str, Any] = field(default_factory=dict)
    compute: str | None = None
    figures: tuple[PublishedFigure, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def url(self) -> str | None:
        """Page of the file on the Hub."""
        return None if self.file is None else f"https://huggingface.co/{self.repo}/blob/{self.revision}/{self.file}"

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return dataclasses.asdict(self)


@cache
def read_zoo_file() -> dict[str, Any]:
    """Contents of `zoo.yaml`."""
    # Beside this file: to ask for the package's resources would import the package, which completion does without.
    return yaml.safe_load(Path(__file__).with_name("zoo.yaml").read_text(encoding="utf-8"))


def load_task_titles() -> dict[str, str]:
    """Tasks, and what the table calls them."""
    return read_zoo_file()["tasks"]


@cache
def load_zoo() -> dict[str, ZooEntry]:
    """All entries by name, in the order of `zoo.yaml`."""
    data = read_zoo_file()
    return {name: _build_entry(name, dict(fields), data) for name, fields in data["entries"].items()}


def _build_entry(name: str, fields: dict[str, Any], data: dict[str, Any]) -> ZooEntry:
    source, data_sets = data["source"], data["data_sets"]
    tables = fields.pop("figures", {})
    data_set = data_sets[fields["data_set"]] if "data_set" in fields else {}
    fields["trained_on"] = tuple(data_sets[key]["name"] for key in fields["trained_on"])
    fields["notes"] = tuple(fields.get("notes", ()))
    origin = ("repo", "revision", "code_url", "code_license", "weights_license")
    values: dict[str, Any] = {
        "name": name,
        "figures": tuple(_list_figures(tables, data)),
        **{key: data_set.get(key) for key in ("num_labels", "class_names", "unnamed")},
        **{key: source[key] for key in origin},
        **fields,
        "data_set": data_set.get("name"),
    }
    return ZooEntry(**values)


def _list_figures(tables: dict[str, Any], data: dict[str, Any]) -> Iterable[PublishedFigure]:
    for protocol, sets in tables.items():
        known = data["protocols"][protocol]
        for data_set, row in sets.items():
            for key, direction in DIRECTIONS.items():
                for metric, value in zip(known["metrics"], row.get(key, ()), strict=False):
                    yield PublishedFigure(
                        protocol=protocol,
                        data_set=data["data_sets"][data_set]["name"],
                        metric=metric if direction is None else f"{direction} {metric}",
                        value=value,
                        source=data["source"]["tables"][known["table"]],
                        views=row.get("views"),
                    )


def find_entry(name: str) -> ZooEntry:
    """The entry of that name, or of that released file.

    Args:
        name: Our name, or the name of a released file such as `b16_ptk710_f8_res224.pth`.

    Raises:
        ValueError: If there is none; it names the nearest ones.
    """
    zoo = load_zoo()
    files = {entry.file.rsplit("/", 1)[-1]: entry for entry in zoo.values() if entry.file is not None}
    if name in zoo or name in files:
        return zoo.get(name) or files[name]
    # Names differ by a few letters, and a typing mistake is the usual cause.
    near = difflib.get_close_matches(name, [*zoo, *files], n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"No released checkpoint is called {name!r}.{hint} `umt-hf zoo` lists them.")


def find_task(word: str) -> str | None:
    """The task that a word names, as `--task` takes it or as the table shows it."""
    tasks = load_task_titles()
    return next((task for task, title in tasks.items() if word.lower().replace("-", "_") in (task, title)), None)


def filter_zoo(task: str | None = None, size: str | None = None, text: str | None = None) -> list[ZooEntry]:
    """Entries that fit all that is given.

    Args:
        task: As for `convert_state_dict`.
        size: "b16" or "l16".
        text: Looked for in names, files and data sets, whatever its case.

    Raises:
        ValueError: If there is no such task or size.
    """
    sizes = sorted({entry.size for entry in load_zoo().values()})
    for kind, value, known in (("task", task, list(load_task_titles())), ("size", size, sizes)):
        if value is not None and value not in known:
            raise ValueError(f"{kind} must be one of {', '.join(known)}, got {value!r}.")
    return [
        entry
        for entry in load_zoo().values()
        if task in (None, entry.task)
        and size in (None, entry.size)
        and (text is None or text.lower() in f"{entry.name} {entry.file} {' '.join(entry.trained_on)}".lower())
    ]


def build_zoo_table(entries: Sequence[ZooEntry]) -> "Table":
    """Entries, one per line, 80 columns wide."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    # 80 columns are what a terminal has at least.
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("task", no_wrap=True)
    table.add_column("clip", no_wrap=True)
    table.add_column("published", no_wrap=True)
    for entry in entries:
        clip = f"{entry.frames:>2} x {entry.resolution}"
        table.add_row(entry.name, load_task_titles()[entry.task], clip, summarize_figures(entry))
    return table


def summarize_figures(entry: ZooEntry) -> str:
    """The one figure that says most about an entry, or nothing."""
    if not entry.figures:
        return ""
    first = entry.figures[0]
    short = {"top-1 accuracy": "top-1", "frame mAP at IoU 0.5": "mAP", "text to video R@1": "R@1"}
    # Zero-shot and fine-tuned figures are not comparable, and stand in one column.
    zero_shot = ", zero-shot" if first.protocol == "zero_shot_retrieval" else ""
    return f"{first.value} {short[first.metric]}{zero_shot}"


def build_entry_table(entry: ZooEntry) -> "Table":
    """All that is known of one entry."""
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for label, value in (
        ("name", entry.name),
        ("task", load_task_titles()[entry.task]),
        ("source", entry.url),
        ("clip", f"{entry.frames} frames of {entry.resolution} pixels"),
        ("trained on", ", ".join(entry.trained_on)),
        ("starts from", entry.starts_from),
        ("classes", entry.num_labels and f"{entry.num_labels} of {entry.data_set}"),
        ("no names", entry.unnamed and f"{entry.unnamed}; `umt-hf convert --labels FILE` sets them"),
        ("texts", entry.tokenizer and f"{entry.max_text_tokens} tokens of {entry.tokenizer}"),
        ("recipe", entry.recipe),
        ("licence", f"weights: {entry.weights_license}; published code: {entry.code_license}"),
        ("compute", entry.compute),
    ):
        if value:
            table.add_row(label, value)
    figures: dict[str, list[str]] = {}
    for figure in entry.figures:
        heading = f"{figure.protocol.replace('_', ' ')}, {figure.data_set}"
        views = f", views {figure.views}" if figure.views else ""
        figures.setdefault(heading, []).append(f"{figure.metric} {figure.value}{views}")
    for i, (heading, values) in enumerate(figures.items()):
        table.add_row("" if i else "published", "\n".join([heading, *(f"  {value}" for value in values)]))
    for i, source in enumerate(dict.fromkeys(figure.source for figure in entry.figures)):
        table.add_row("" if i else "table", source)
    for i, note in enumerate(entry.notes):
        table.add_row("" if i else "notes", note)
    return table
