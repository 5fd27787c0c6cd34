"""The watch of `make soak` sees what grows; a run of a minute is in `make soak MINUTES=1`."""

import pytest

from tests.faults.soak import HANDLES, IN_FLIGHT, MAX_GROWTH, MEMORY, measure_trend, print_trends

SECONDS = [float(number) for number in range(1200)]


def measure(name: str, function) -> bool:
    return measure_trend(name, SECONDS, [function(second) for second in SECONDS]).is_bad


@pytest.mark.parametrize("name", [*MEMORY, *HANDLES])
def test_growth_is_seen(name):
    """Memory and handles over the bounds; not what goes up and down, or grows while a run warms up."""
    limit = MAX_GROWTH if name in MEMORY else IN_FLIGHT
    assert measure(name, lambda second: 10 + 3 * limit * second // 1200)
    assert not measure(name, lambda second: 10 + 5 * (second % 7 == 0))
    assert not measure(name, lambda second: 10 + 3 * limit * min(second, 250) // 250)
    assert not measure(name, lambda second: 10.0)


def test_slopes_are_per_minute_and_the_table_names_what_grows(capsys):
    trend = measure_trend(HANDLES[0], SECONDS, [100 + second / 60 for second in SECONDS])
    assert trend.slope == pytest.approx(1.0) and trend.largest == pytest.approx(100 + 1199 / 60)
    assert print_trends(1, 500, [trend]) == 1
    assert "Stage 1, 500 steps" in (said := capsys.readouterr().out) and "| grows |" in said
