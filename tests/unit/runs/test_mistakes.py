"""The line that a script ends with."""

import signal

import pytest

from umt_hf.runs.mistakes import DivergenceError, end_in_one_line


@pytest.fixture(autouse=True)
def sigterm():
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def end(*errors: Exception) -> None:
    """Raise the first error, and each further one while the one before is on its way out."""
    with end_in_one_line(lambda: ""):
        _raise(list(errors))


def _raise(errors: list[Exception]) -> None:
    if errors:
        try:
            _raise(errors[:-1])
        finally:
            raise errors[-1]


def test_an_error_that_comes_while_another_is_on_its_way_out_does_not_hide_it(capsys):
    with pytest.raises(SystemExit) as caught:
        end(KeyError("cause"), DivergenceError("Step 3: the rate is too high."), RuntimeError("worker is killed"))
    assert caught.value.code == 3
    assert capsys.readouterr().err.splitlines() == ["Error: Step 3: the rate is too high."]


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="a fault"):
        end(KeyError("cause"), RuntimeError("a fault"))
