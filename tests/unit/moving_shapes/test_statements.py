"""What the demo states: each holds where it is far from what it is compared with, and not where it is chance."""

import math

import pytest
import torch

from umt_hf.moving_shapes.statements import format_statements, is_beyond_chance, list_statements


def build_results(student=0.3, untrained=0.12, motion=0.4, recall=0.05, appearance=0.15):
    accuracy = {
        "student, mean": {"appearance, linear": student},
        "random weights, mean": {"appearance, linear": untrained},
        "student, ordered": {"motion, MLP": motion},
    }
    stage2 = {
        "dual": {"all": 0.0, "appearance": appearance, "motion": 0.25},
        "reranked": {"all": recall, "motion": 0.25},
    }
    chance = {"all": 1 / 140, "appearance": 1 / 36, "motion": 1 / 4}
    return {
        "stage1": {"accuracy": accuracy, "num_clips": 400},
        "stage2": {"recall": stage2, "chance": chance, "num_clips": 400, "num_texts": 140},
    }


def test_statements_hold_on_what_was_seen_and_name_what_they_compare():
    statements = list_statements(build_results())
    assert [statement.holds for statement in statements] == [True] * 4
    assert [statement.reference for statement in statements] == [0.12, 0.25, 1 / 140, 1 / 36]
    assert [statement.reference_name for statement in statements] == ["random weights", *3 * ["chance"]]
    assert len(list_statements({"stage1": build_results()["stage1"]})) == 2


@pytest.mark.parametrize(
    ("changed", "position"),
    [
        ({"student": 0.17}, 0),  # more than random weights, and not well above them
        ({"motion": 0.29}, 1),
        ({"recall": 3 / 140}, 2),
        ({"appearance": 0.045}, 3),
    ],
)
def test_each_statement_can_fail(changed, position):
    holds = [statement.holds for statement in list_statements(build_results(**changed))]
    assert holds == [number != position for number in range(4)]


@pytest.mark.parametrize(("trials", "chance"), [(140, 1 / 140), (400, 1 / 36), (400, 1 / 4)])
def test_chance_seldom_passes(trials, chance):
    """Counted over 20,000 runs of guesses; and what is well beyond chance does pass."""
    draws = torch.distributions.Binomial(trials, torch.tensor(chance))
    torch.manual_seed(0)
    passes = [is_beyond_chance(hits / trials, chance, trials) for hits in range(trials + 1)]
    guesses = draws.sample((20000,)).int().tolist()
    assert sum(passes[hits] for hits in guesses) / len(guesses) < 0.012
    first = passes.index(True)
    assert trials * chance < first <= trials * chance + 3 * math.sqrt(trials * chance) + 2 and all(passes[first:])


def test_table_of_one_seed_and_of_several():
    good, bad = list_statements(build_results()), list_statements(build_results(motion=0.25))
    single = format_statements([bad])
    assert "| 0.250 | chance 0.250 | NO |" in single and single.count("| yes |") == 3
    several = format_statements([good, bad, good])
    assert "| 0.400, 0.250, 0.400 | chance 0.250 | 2 of 3 |" in several and several.count("| 3 of 3 |") == 3
