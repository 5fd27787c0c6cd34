"""Runs scripts as `python -m` does, in forked processes, and looks at what their users' mistakes say."""

import importlib
import re
import signal
import sys
from collections.abc import Sequence

from tests.processes import Output, run_ranks
from umt_hf.runs import mistakes


def run_script(module: str, words: Sequence[str], patience: float = 60.0) -> None:
    """What `python -m MODULE WORDS` does, in this process."""
    mistakes.SECONDS_TO_BE_STOPPED = patience
    # A job that a shell has put in the background ignores it, and so would all that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [module, *words]
    importlib.import_module(f"umt_hf.{module}").main()


def fail(module: str, words: Sequence[str], exit_code: int = 2, **options) -> Output:
    """Run a script that is to fail; give what it wrote."""
    return run_ranks(
        run_script, module, [str(word) for word in words], num_processes=1, exit_code=exit_code, **options
    )


def read_error(output: Output) -> str:
    """The line that names the mistake: the last one, the only one of its kind, without a traceback."""
    lines = [line for line in output.stderr.splitlines() if line.strip()]
    assert "Traceback" not in output.stderr, output.stderr
    found = [line for line in lines if re.match(r"(Process \d+: )?(Error:|Interrupted|Terminated)", line)]
    assert len(found) == 1 and found[0] == lines[-1], output.stderr
    return found[0]
