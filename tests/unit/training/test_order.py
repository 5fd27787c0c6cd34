"""Orders of videos do not depend on how a step is dealt out, and a run goes on in them with other processes."""

from itertools import islice

import numpy as np
import pytest
import torch
from datasets import Dataset

from umt_hf.data.streams import Shards
from umt_hf.training.corpora import JoinedTable, count_epoch_rows, draw_order
from umt_hf.training.order import (
    PlannedBatch,
    RunShape,
    StepShape,
    TrackedPlan,
    count_steps,
    plan_batches,
    plan_mixed_batches,
)

# Batch per process, processes, accumulated batches: 8 videos a step.
SHAPES = [(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2), (1, 8, 1), (1, 2, 4)]
# The last ones leave a rest that fills a batch, and no step.
LENGTHS = [8, 17, 24, 30, 31]


def build_table(length: int) -> Dataset:
    return Dataset.from_dict({"video": list(map(str, range(length)))})


def take_steps(plan_of, processes: int, accumulation: int, count: int, position=None) -> list[tuple[set, dict]]:
    """What all processes together take at each step, and where the run is then."""
    plans = [
        list(islice(plan_of(StepShape(processes, rank, accumulation), position), count * accumulation))
        for rank in range(processes)
    ]
    steps = []
    for step in range(count):
        batches = [batch for plan in plans for batch in plan[step * accumulation : (step + 1) * accumulation]]
        keys = [(request.corpus, *request.key) for batch in batches for request in batch.requests]
        assert len(set(keys)) == len(keys)
        (position,) = {str(batch.position): batch.position for batch in batches}.values()
        steps.append((set(keys), position))
    return steps


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("size", "processes", "accumulation"), SHAPES[1:])
def test_a_step_has_the_same_videos_in_every_shape(length, size, processes, accumulation):
    table = build_table(length)
    whole = take_steps(lambda shape, position: plan_batches(table, 8, 3, shape, position), 1, 1, 9)

    def plan(shape, position):
        return plan_batches(table, size, 3, shape, position)

    assert take_steps(plan, processes, accumulation, 9) == whole
    assert count_steps(table, size, StepShape(processes, 0, accumulation)) == length // 8
    for step in (1, 4):
        assert take_steps(plan, processes, accumulation, 9 - step, whole[step - 1][1]) == whole[step:]


@pytest.mark.parametrize("lengths", [(9, 8), (17, 30), (24, 31)])
@pytest.mark.parametrize(("processes", "accumulation"), [(2, 1), (1, 2), (1, 4), (2, 2)])
def test_a_step_of_several_tables_has_the_same_videos_in_every_shape(lengths, processes, accumulation):
    tables = [build_table(length) for length in lengths]
    whole = take_steps(lambda shape, position: plan_mixed_batches(tables, [4, 8], 3, shape, position), 1, 1, 12)
    sizes = [4 // (processes * accumulation), 8 // (processes * accumulation)]

    def plan(shape, position):
        return plan_mixed_batches(tables, sizes, 3, shape, position)

    assert take_steps(plan, processes, accumulation, 12) == whole
    for step in (1, 5, 10):
        assert take_steps(plan, processes, accumulation, 12 - step, whole[step - 1][1]) == whole[step:]


@pytest.mark.parametrize("step", [1, 2, 3, 5])
@pytest.mark.parametrize(("size", "accumulation"), [(2, 1), (5, 1), (4, 3)])
def test_with_steps_of_another_size_the_next_videos_come(step, size, accumulation):
    """Of the epoch that was begun none comes twice."""
    table = build_table(31)
    before = take_steps(lambda shape, position: plan_batches(table, 8, 3, shape, position), 1, 1, step)
    epoch = before[-1][1]["epoch"]
    after = take_steps(
        lambda shape, position: plan_batches(table, size, 3, shape, position), 1, accumulation, 14, before[-1][1]
    )
    seen = [key for keys, _ in [*before, *after] for key in keys if key[2] == epoch]
    assert len(seen) == len(set(seen))
    # No more are left out than a step lacks.
    assert len(table) - len(seen) < size * accumulation


@pytest.mark.parametrize("step", [1, 3, 6, 8])
def test_with_steps_of_another_size_the_next_videos_of_each_table_come(step):
    tables = [build_table(length) for length in (21, 33)]
    before = take_steps(lambda shape, position: plan_mixed_batches(tables, [2, 8], 3, shape, position), 1, 1, step)
    epoch, place = before[-1][1]["epoch"], before[-1][1]
    sizes = [3, 5]
    after = take_steps(lambda shape, position: plan_mixed_batches(tables, sizes, 3, shape, position), 1, 1, 16, place)
    for number, table in enumerate(tables):
        seen = [key for keys, _ in [*before, *after] for key in keys if key[0] == number and key[2] == epoch]
        assert len(seen) == len(set(seen)) and len(table) - len(seen) < sizes[number]
    # Changed back, mid-epoch, the run goes on from there.
    again = take_steps(
        lambda shape, position: plan_mixed_batches(tables, [2, 8], 3, shape, position), 1, 1, 9, after[1][1]
    )
    taken = [*before, *after[:2], *again]
    for number in range(2):
        seen = [key for keys, _ in taken for key in keys if key[0] == number and key[2] == epoch]
        assert len(seen) == len(set(seen))


def test_a_table_has_to_fill_a_step():
    with pytest.raises(ValueError, match="7 videos do not fill one batch of 2 in 2 process.* and 2 accumulated ones"):
        next(plan_batches(build_table(7), 2, 0, StepShape(2, 0, 2)))


def list_rows(batches: list[PlannedBatch]) -> list:
    return [request for batch in batches for request in batch.requests]


class Rows(Shards):
    """Shards whose rows are their numbers."""

    def _read(self, number: int) -> dict:
        return {"video": str(number)}


SHARDED = Rows(np.array([0, 7, 12, 21, 30]), shuffle_rows=10)


def test_shards_are_shuffled_by_part_and_within_those_that_are_mixed():
    order = draw_order(SHARDED, 3, 0)
    assert sorted(order.tolist()) == list(range(30)) and order.tolist() != list(range(30))
    assert torch.equal(order, draw_order(SHARDED, 3, 0)) and not torch.equal(order, draw_order(SHARDED, 3, 1))
    parts = [int(np.searchsorted(SHARDED.starts, row, side="right")) for row in order.tolist()]
    # So many rows that two parts hold them: never more than two parts at a time, and these in no order.
    firsts = sorted((parts.index(part), len(parts) - parts[::-1].index(part)) for part in set(parts))
    assert max(sum(first <= place < last for first, last in firsts) for place in range(30)) == 2
    for run in (2, 3):
        rows = Rows(SHARDED.starts, shuffle_rows=100, run=run)
        assert sorted(draw_order(rows, 0, 0).tolist()) == list(range(30))


@pytest.mark.parametrize(("size", "processes", "accumulation"), SHAPES[1:])
def test_a_step_of_shards_has_the_same_videos_in_every_shape(size, processes, accumulation):
    """And a run goes on in them with other processes; corpora with weights alike."""
    tables = [SHARDED, JoinedTable([SHARDED, build_table(9), build_table(14)], [0.5, 2, 1])]
    for table in tables:
        whole = take_steps(lambda shape, at, table=table: plan_batches(table, 8, 3, shape, at), 1, 1, 13)

        def plan(shape, position, table=table):
            return plan_batches(table, size, 3, shape, position)

        assert take_steps(plan, processes, accumulation, 13) == whole
        for step in (1, 4, 8):
            assert take_steps(plan, processes, accumulation, 13 - step, whole[step - 1][1]) == whole[step:]


def test_weights_say_how_often_a_corpus_is_passed_over_in_an_epoch():
    table = JoinedTable([SHARDED, build_table(9), build_table(14)], [0.5, 2, 1])
    assert len(table) == 53 and count_epoch_rows(table) == 15 + 18 + 14 and count_steps(table, 4) == 11
    epochs = [draw_order(table, 5, epoch).tolist() for epoch in range(4)]
    for order in epochs:
        assert len(set(order)) == len(order) == 47  # repeated rows have keys of their own
        rows = [number % 53 for number in order]
        assert sorted(row for row in rows if row >= 39) == list(range(39, 53))
        assert sorted(row for row in rows if 30 <= row < 39) == sorted([*range(30, 39)] * 2)
        assert table[order[0]]["video"] == table[rows[0]]["video"]
    halves = [[row for row in order if row < 30] for order in epochs]
    # The other half comes in the next epoch.
    assert sorted(halves[0] + halves[1]) == sorted(halves[2] + halves[3]) == list(range(30))
    assert [table[number]["video"] for number in (0, 29, 30, 39, 52)] == ["0", "29", "0", "0", "13"]


def test_a_checkpoint_that_counted_rows_of_a_stream_is_refused():
    with pytest.raises(ValueError, match="is from a version that streamed data in another order; start anew"):
        next(plan_batches(build_table(8), 2, 0, position={"streamed_rows": 12}))


def test_positions_wait_for_their_batches():
    plan = TrackedPlan(plan_batches(build_table(8), 2, 0))
    asked = iter(plan)
    ahead = [next(asked) for _ in range(3)]
    got = list(plan.track({"rows": len(requests)} for requests in ahead))
    assert [batch["position"]["row"] for batch in got] == [2, 4, 6]


def test_shapes_in_words():
    shape = RunShape(2, 3, [4, 8], 100)
    assert shape.videos_per_step == [24, 48] and shape.videos_per_batch == [8, 16]
    assert shape.describe() == "2 process(es) x 4 and 8 videos x 3 batch(es)"
