"""One engine for all inference: workers read ahead, the model runs, and a run says what it waited for.

Whatever answers for many videos reads them by `read_ahead`. A command or a test is one `inference_run`: within it
models run without gradients, float32 may use TF32 on a GPU, workers have a time-out, and time is counted.
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset, default_collate

from ..data.in_flight import noted
from ..data.loaders import NamingDataLoader

DType = Literal["float32", "bfloat16", "float16"]
TIMEOUT_SECONDS = 600
END = object()


@dataclass
class InferenceRun:
    """What a run of a command or a test has done so far.

    Attributes:
        timeout_seconds: For which workers may give nothing before the run ends and names the videos; 0: for ever.
        waiting_seconds: In which the model had nothing to do, since no batch was there.
        model_seconds: In the model, with the way to the device and back.
        reading_seconds: Of decoding and processing, summed over the processes that read.
        num_workers: Processes that read beside this one, at most.
        began: When it began, in seconds of a clock without a known start.
    """

    timeout_seconds: float = TIMEOUT_SECONDS
    waiting_seconds: float = 0.0
    model_seconds: float = 0.0
    reading_seconds: float = 0.0
    num_workers: int = 0
    began: float = field(default_factory=time.perf_counter)

    def format(self) -> str:
        """Say in one line where the time went."""
        total = max(time.perf_counter() - self.began, 1e-9)
        waiting, model = self.waiting_seconds / total, self.model_seconds / total
        readers = f"{self.num_workers} worker processes" if self.num_workers > 1 else "one worker process"
        where = readers if self.num_workers else "this process"
        return (
            f"{total:.1f} s: {waiting:.0%} waiting for data, {model:.0%} in the model, "
            f"{max(1 - waiting - model, 0):.0%} other; decoding and processing took {self.reading_seconds:.1f} s in "
            f"{where}."
        )


_run: ContextVar[InferenceRun | None] = ContextVar("inference_run", default=None)


@contextmanager
def inference_run(
    say: Callable[[str], object] | None = None, timeout_seconds: float = TIMEOUT_SECONDS
) -> Generator[InferenceRun]:
    """Count the time of a command or a test that trains nothing.

    Args:
        say: Gets a line at the end on where the time went.
        timeout_seconds: See `InferenceRun`.
    """
    former = _run.get()
    run = InferenceRun(timeout_seconds)
    _run.set(run)
    try:
        yield run
    finally:
        _run.set(former)
        if former is not None:  # a run that is part of another one
            former.waiting_seconds += run.waiting_seconds
            former.model_seconds += run.model_seconds
            former.reading_seconds += run.reading_seconds
            former.num_workers = max(former.num_workers, run.num_workers)
    if say is not None:
        say(run.format())


@contextmanager
def in_model() -> Generator[None]:
    """Count what happens inside as time of the model, in a run; results on the host count until they are there."""
    run, began = _run.get(), time.perf_counter()
    try:
        yield
    finally:
        if run is not None:
            run.model_seconds += time.perf_counter() - began


@contextmanager
def without_gradients(device: torch.device, is_standalone: bool | None = None) -> Generator[None]:
    """Run a model for its answers alone.

    Args:
        device: Where it runs; on a GPU float32 products may use TF32 (10 bits of mantissa) in a run.
        is_standalone: Whether the model is not being trained meanwhile; default: whether this is in a run. What a
            model keeps in inference mode can meet no gradient later.
    """
    is_standalone = _run.get() is not None if is_standalone is None else is_standalone
    if not is_standalone:
        with torch.no_grad():
            yield
        return
    precision = torch.get_float32_matmul_precision() if allows_tf32(device) else None
    if precision is not None:
        torch.set_float32_matmul_precision("high")
    try:
        with torch.inference_mode():
            yield
    finally:
        if precision is not None:
            torch.set_float32_matmul_precision(precision)


def allows_tf32(device: torch.device) -> bool:
    """Whether products of float32 may be computed in TF32 on a device."""
    return device.type == "cuda"


def choose_dtype(name: str | None, device: torch.device, mixed_precision: str = "no") -> torch.dtype:
    """What a model's weights are computed in.

    Args:
        name: As it was asked for; default: bfloat16 on a GPU that has it, float32 elsewhere and under autocast.
        device: Where the model will run.
        mixed_precision: Accelerate's; anything but "no" is autocast, which wants float32 weights.

    Raises:
        ValueError: If the name is unknown.
    """
    if name is not None:
        if name not in get_args(DType):
            raise ValueError(f"dtype must be one of {list(get_args(DType))}, got {name!r}.")
        return getattr(torch, name)
    if device.type != "cuda" or mixed_precision != "no":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


def name_dtype(dtype: torch.dtype) -> str:
    """Name of a type, as `--dtype` takes it."""
    return str(dtype).removeprefix("torch.")


def compile_model(model: nn.Module, backend: str = "inductor") -> None:
    """Compile the video tower of a model, in place: its batches have few shapes, and weights keep their names.

    Args:
        model: A tower, or a model that holds one.
        backend: Of `torch.compile`.
    """
    tower: Any = getattr(model, "vision_model", model)
    tower.compile(backend=backend, dynamic=False)


def read_ahead(
    dataset: Dataset,
    batches: Iterable[Sequence[Any]] | None,
    num_workers: int | None,
    *,
    videos: Sequence[Any] | Mapping[Any, Any] | None = None,
    collate_fn: Callable[[list[Any]], Any] = default_collate,
    pin_memory: bool = False,
) -> Generator[Any]:
    """Read in worker processes while the model runs: the loader of all inference.

    Args:
        dataset: What is read.
        batches: Rows of each batch, in order; `None`: the dataset is a stream, whose items come one by one.
        num_workers: Processes that read; 0: this one; `None`: its share of the machine's cores, from 1 to 4.
        videos: Path, or `{"path", "bytes"}`, of each row, by which a read that never ends is named.
        collate_fn: Makes a batch of the items of its rows.
        pin_memory: Whether batches are put where a GPU takes them from fastest.

    Yields:
        Batches in the order of the plan, whatever the number of workers.

    Raises:
        StuckReadingError: If workers give nothing for the run's time-out, or one has died.
    """
    run = _run.get() or InferenceRun(timeout_seconds=0)
    timed: Dataset = _TimedRows(dataset, videos) if batches is not None else _TimedStream(dataset)
    options: dict[str, Any] = {"batch_size": None, "collate_fn": _keep}
    if batches is not None:
        options = {"batch_sampler": batches, "collate_fn": partial(_collate, collate_fn)}
    loader = NamingDataLoader(timed, num_workers, run.timeout_seconds, pin_memory=pin_memory, **options)
    run.num_workers = max(run.num_workers, loader.num_workers)
    began = time.perf_counter()
    items: Iterator[Any] = iter(loader)
    while True:
        item: Any = next(items, END)
        run.waiting_seconds += time.perf_counter() - began
        if item is END:
            return
        batch, seconds = item
        run.reading_seconds += seconds
        yield batch
        began = time.perf_counter()


class _TimedRows(Dataset):
    """Rows of a dataset, each with the seconds that it took."""

    def __init__(self, dataset: Any, videos: Sequence[Any] | Mapping[Any, Any] | None):
        self.dataset, self.videos = dataset, videos

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, float]:
        began = time.perf_counter()
        with noted(None if self.videos is None else self.videos[index], index):
            item = self.dataset[index]
        return item, time.perf_counter() - began


class _TimedStream(IterableDataset):
    """Items of a stream, each with the seconds that it took."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __iter__(self) -> Iterator[tuple[Any, float]]:
        began = time.perf_counter()
        for item in self.stream:
            yield item, time.perf_counter() - began
            began = time.perf_counter()


def _keep(item: Any) -> Any:
    return item


def _collate(collate_fn: Callable[[list[Any]], Any], timed: Sequence[tuple[Any, float]]) -> tuple[Any, float]:
    items, seconds = zip(*timed, strict=True)
    return collate_fn(list(items)), sum(seconds)


__all__ = ["InferenceRun", "choose_dtype", "inference_run", "read_ahead"]
