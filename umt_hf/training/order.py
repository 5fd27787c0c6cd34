"""Which videos each step takes: the order of an epoch, dealt out to processes, and where a run is in it.

An order depends on the seed, the epoch and the number of videos of a step, all processes and accumulated batches
together. So two runs with equal steps see the same videos at each, whatever shares their processes take, and a run
that is resumed with other shares goes on where it was.
"""

import random
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from .clips import ClipRequest, build_generator
from .corpora import TrainingTable, count_epoch_rows, draw_order

Position = dict[str, Any]  # as `counters.json` has it
OTHER_POSITION = (
    "The checkpoint is from a version that streamed data in another order; start anew from its folder, which is a "
    "model folder, with `--model_name_or_path`."
)


class PlannedBatch(NamedTuple):
    """What a process reads at once.

    Args:
        requests: Videos.
        position: Where the run is after the step that the batch belongs to.
    """

    requests: list[ClipRequest]
    position: Position


@dataclass(frozen=True)
class StepShape:
    """How the videos of an optimizer step are dealt out.

    Args:
        num_processes: Processes.
        process_index: This one.
        accumulation_steps: Batches of a process that make a step.
    """

    num_processes: int = 1
    process_index: int = 0
    accumulation_steps: int = 1

    def count_videos(self, batch_size: int) -> int:
        """Videos of a step, whose batches have `batch_size` videos in each process."""
        return batch_size * self.num_processes * self.accumulation_steps

    def deal(self, rows: Sequence[int], batch_size: int) -> Iterator[Sequence[int]]:
        """Batches of this process, of the rows of a step."""
        for batch in range(self.accumulation_steps):
            first = (batch * self.num_processes + self.process_index) * batch_size
            yield rows[first : first + batch_size]


@dataclass(frozen=True)
class RunShape:
    """What a checkpoint remembers of how its run was laid out.

    Args:
        num_processes: Processes.
        gradient_accumulation_steps: Batches of a process that make a step.
        batch_sizes: Videos that a process takes at a time, for each kind of batch.
        total_steps: Length of the schedule.
    """

    num_processes: int
    gradient_accumulation_steps: int
    batch_sizes: list[int]
    total_steps: int

    @property
    def videos_per_step(self) -> list[int]:
        """Videos of a step, for each kind of batch."""
        return [size * self.num_processes * self.gradient_accumulation_steps for size in self.batch_sizes]

    @property
    def videos_per_batch(self) -> list[int]:
        """Videos that all processes take at a time, for each kind of batch: those that are contrasted."""
        return [size * self.num_processes for size in self.batch_sizes]

    def describe(self) -> str:
        """The shape in words."""
        sizes = " and ".join(map(str, self.batch_sizes))
        return f"{self.num_processes} process(es) x {sizes} videos x {self.gradient_accumulation_steps} batch(es)"


class TrackedPlan:
    """The requests of planned batches, for a loader, which asks ahead; positions wait until their batches are there.

    Args:
        plan: Batches in order.
    """

    def __init__(self, plan: Iterator[PlannedBatch]):
        self.plan = plan
        self.positions: deque[Position] = deque()

    def __iter__(self) -> Iterator[list[ClipRequest]]:
        for batch in self.plan:
            self.positions.append(batch.position)
            yield batch.requests

    def track(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Give each batch of the loader its `position`."""
        for batch in batches:
            yield {**batch, "position": self.positions.popleft()}


def count_steps(
    table: TrainingTable,
    batch_size: int,
    shape: StepShape | None = None,
    kind: str = "video",
    flag: str = "per_device_train_batch_size",
) -> int:
    """Steps per epoch.

    Args:
        table: Rows.
        batch_size: Rows that a process takes at a time.
        shape: How many batches a step takes.
        kind: What a row holds, for the error.
        flag: What sets the batch size, for the error.

    Raises:
        ValueError: If the rows do not fill one step.
    """
    shape = shape or StepShape()
    rows = count_epoch_rows(table)
    count = rows // shape.count_videos(batch_size)
    if count == 0:
        most = rows // shape.count_videos(1)
        cure = f"set --{flag} to {most} or less" if most else "use fewer processes, or accumulate fewer batches"
        accumulated = f" and {shape.accumulation_steps} accumulated ones" if shape.accumulation_steps > 1 else ""
        raise ValueError(
            f"{rows} {kind}s do not fill one batch of {batch_size} in {shape.num_processes} process(es)"
            f"{accumulated}; {cure}."
        )
    return count


def plan_batches(
    table: TrainingTable,
    batch_size: int,
    seed: int,
    shape: StepShape | None = None,
    position: Position | None = None,
) -> Iterator[PlannedBatch]:
    """Endless batches of one process over a table, or over shards.

    Each epoch is a new permutation; its last rows that do not fill a step are left out.

    Args:
        table: Rows.
        batch_size: Videos per batch of a process.
        seed: Seed of the run.
        shape: How steps are dealt out.
        position: `{"epoch": ..., "row": ...}`, the rows of the epoch's order that the run has taken; `None` = it
            begins.

    Raises:
        ValueError: If the table is smaller than one step, or the position is one of an older version.
    """
    shape = shape or StepShape()
    count_steps(table, batch_size, shape)
    if position is not None and "row" not in position:
        raise ValueError(OTHER_POSITION)
    epoch, row = (position["epoch"], position["row"]) if position else (0, 0)
    per_step = shape.count_videos(batch_size)
    while True:
        # One permutation, dealt out to the processes in turn: no row comes twice in an epoch.
        order = draw_order(table, seed, epoch)
        while row + per_step <= len(order):
            rows = order[row : row + per_step].tolist()
            row += per_step
            for dealt in shape.deal(rows, batch_size):
                requests = [ClipRequest(number, (seed, epoch, number)) for number in dealt]
                yield PlannedBatch(requests, {"epoch": epoch, "row": row})
        epoch, row = epoch + 1, 0


def plan_mixed_batches(
    tables: Sequence[TrainingTable],
    batch_sizes: Sequence[int],
    seed: int,
    shape: StepShape | None = None,
    position: Position | None = None,
) -> Iterator[PlannedBatch]:
    """Endless batches of one process, each from one table; at each step all processes take the same table.

    An epoch goes through every table once, in an order of steps that is drawn anew. Accumulated batches of a step are
    of one table too.

    Args:
        tables: Rows; no batch mixes two tables.
        batch_sizes: Rows per batch of a process, for each table.
        seed: Seed of the run.
        shape: How steps are dealt out.
        position: Where the run is, as the last batch before has it; `None` = it begins. With steps of another size the
            rest of the epoch is put into a new order.

    Raises:
        ValueError: If a table is smaller than one step.

    Source: the published loader of several media.
    """
    shape = shape or StepShape()
    for table, size in zip(tables, batch_sizes, strict=True):
        count_steps(table, size, shape)
    per_step = [shape.count_videos(size) for size in batch_sizes]
    lengths = [count_epoch_rows(table) for table in tables]
    place = MixedPosition(0, [0] * len(tables), 0, per_step)
    if position is not None:
        place = MixedPosition(**position).adapt(lengths, per_step, seed)
    # Else row i of all tables would be drawn alike.
    seeds = [build_generator(seed, number).initial_seed() for number in range(len(tables))]
    while True:
        # All processes draw the same order: they gather vectors of one shape at every step.
        steps = place.list_steps(lengths, seed)
        orders = [draw_order(table, own, place.epoch) for table, own in zip(tables, seeds, strict=True)]
        rows = place.count_taken(steps)
        for passed, number in enumerate(steps[place.passed :], start=place.passed + 1):
            taken = orders[number][rows[number] : rows[number] + per_step[number]].tolist()
            rows[number] += per_step[number]
            after = asdict(place) | {"passed": passed}
            for dealt in shape.deal(taken, batch_sizes[number]):
                key = (seeds[number], place.epoch)
                yield PlannedBatch([ClipRequest(row, (*key, row), number) for row in dealt], after)
        place = MixedPosition(place.epoch + 1, [0] * len(tables), 0, per_step)


@dataclass(frozen=True)
class MixedPosition:
    """Where a run over several tables is.

    Args:
        epoch: Its epoch.
        starts: Rows of each table that were taken in the epoch before the order of steps was drawn.
        passed: Steps taken in that order.
        videos_per_step: Rows that a step takes, for each table.
    """

    epoch: int
    starts: list[int]
    passed: int
    videos_per_step: list[int]

    def list_steps(self, lengths: Sequence[int], seed: int) -> list[int]:
        """Which table each step of the rest of the epoch is from, from `starts` on."""
        counts = [
            (length - start) // size
            for length, start, size in zip(lengths, self.starts, self.videos_per_step, strict=True)
        ]
        return sample_table_order(counts, seed, self.epoch, *(self.starts if any(self.starts) else ()))

    def count_taken(self, steps: Sequence[int]) -> list[int]:
        """Rows of each table that the run has taken in the epoch."""
        passed = Counter(steps[: self.passed])
        return [
            start + passed[number] * size
            for number, (start, size) in enumerate(zip(self.starts, self.videos_per_step, strict=True))
        ]

    def adapt(self, lengths: Sequence[int], videos_per_step: list[int], seed: int) -> "MixedPosition":
        """The same place for steps of another size."""
        if videos_per_step == self.videos_per_step:
            return self
        return MixedPosition(self.epoch, self.count_taken(self.list_steps(lengths, seed)), 0, videos_per_step)


def sample_table_order(counts: Sequence[int], seed: int, epoch: int, *starts: int) -> list[int]:
    """Which table each step of an epoch is from: all steps of all tables, shuffled.

    Args:
        counts: Steps of each table.
        seed: Seed of the run.
        epoch: Number of the epoch.
        *starts: Rows that were taken before, where the rest of an epoch is put into order.
    """
    return shuffle_tables(counts, random.Random(build_generator(seed, epoch, *starts).initial_seed()))


def shuffle_tables(counts: Sequence[int], source: random.Random) -> list[int]:
    """The numbers 0, 1, ... of the tables, each as often as `counts` says, shuffled by `source`."""
    order = [number for number, count in enumerate(counts) for _ in range(count)]
    source.shuffle(order)
    return order
