"""What the demo states, each with what was measured, what it is compared with, and whether it holds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# How seldom chance may give as much.
LEVEL = 0.01
# "Well above" random weights.
FACTOR = 1.5


@dataclass(frozen=True)
class Statement:
    """One that a run can confirm or refute.

    Attributes:
        text: What is stated.
        measured: Share of right answers.
        reference: Share that it is compared with.
        reference_name: What has that share.
        holds: Whether it is confirmed.
    """

    text: str
    measured: float
    reference: float
    reference_name: str
    holds: bool


def list_statements(results: Mapping[str, Any]) -> list[Statement]:
    """The statements on one seed, as far as its results go.

    Args:
        results: Content of `results.json` by the key "stage1", of `results_stage2.json` by "stage2", or one of them.
    """
    found = []
    if (stage1 := results.get("stage1")) is not None:
        accuracy, num_clips = stage1["accuracy"], stage1["num_clips"]
        student, untrained = (
            accuracy[f"{name}, mean"]["appearance, linear"] for name in ("student", "random weights")
        )
        is_above = is_beyond_chance(student, untrained, num_clips) and student >= FACTOR * untrained
        text = "stage 1: the features tell colour and shape far better than those of random weights"
        found.append(Statement(text, student, untrained, "random weights", is_above))
        motion = accuracy["student, ordered"]["motion, MLP"]
        text = "stage 1: the frames' features, in order, tell the motion"
        found.append(Statement(text, motion, 1 / 4, "chance", is_beyond_chance(motion, 1 / 4, num_clips)))
    if (stage2 := results.get("stage2")) is not None:
        recall, chance = stage2["recall"], stage2["chance"]
        for row, column, count, text in (
            ("reranked", "all", stage2["num_texts"], "a caption finds one of its clips first among all, re-ranked"),
            ("dual", "appearance", stage2["num_clips"], "a clip finds its colour and shape first among 36 captions"),
        ):
            measured = recall[row][column]
            holds = is_beyond_chance(measured, chance[column], count)
            found.append(Statement(f"stage 2: {text}", measured, chance[column], "chance", holds))
    return found


def is_beyond_chance(share: float, chance: float, num_trials: int) -> bool:
    """Whether guesses that are right with probability `chance` are right as often in fewer than 1 of 100 tests.

    Args:
        share: Share of right answers, in [0, 1].
        chance: Probability of a right guess, in [0, 1].
        num_trials: Answers.
    """
    hits = round(share * num_trials)
    below = sum(
        math.comb(num_trials, count) * chance**count * (1 - chance) ** (num_trials - count) for count in range(hits)
    )
    return 1 - below < LEVEL


def format_statements(seeds: Sequence[Sequence[Statement]]) -> str:
    """Table of the statements; where there are several seeds, with the values of each."""
    lines = ["| statement | measured | compared with | holds |", "| --- | --- | --- | --- |"]
    for rows in zip(*seeds, strict=True):
        measured = ", ".join(f"{row.measured:.3f}" for row in rows)
        references = list(dict.fromkeys(f"{row.reference:.3f}" for row in rows))
        count = sum(row.holds for row in rows)
        holds = ("yes" if count else "NO") if len(rows) == 1 else f"{count} of {len(rows)}"
        reference = f"{rows[0].reference_name} {', '.join(references)}"
        lines.append(f"| {rows[0].text} | {measured} | {reference} | {holds} |")
    return "\n".join(lines)
