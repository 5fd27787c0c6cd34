"""Follow README.md with models of true size, in the processes that a newcomer starts, and time each block.

    python -m tests.hub.check_readme          # `make test-readme`: minutes, 10 GB of disk
    python -m tests.hub.check_readme --narrow # as tests/hub/test_readme.py does it

What each block writes is printed behind it.
"""

import argparse
import signal
import tempfile
import time
from pathlib import Path

from tests.hub.newcomer import Pasted, find_faults, follow_readme


def print_block(pasted: Pasted) -> None:
    lines = "".join(f"    {line}\n" for line in pasted.output.splitlines())
    head = pasted.block.text.splitlines()[0]
    print(
        f"README.md:{pasted.block.line}: {head}\n{lines}    -> {pasted.seconds:.1f} s, CPU {pasted.cpu_seconds:.1f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--narrow", action="store_true", help="Narrow models, commands in forks.")
    parser.add_argument("--timeout", type=float, default=600, help="Seconds for a block.")
    arguments = parser.parse_args()
    # In the background of a shell Ctrl-C is ignored, and the demo that is to end by it would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rows, num_failed = [], 0
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="check_readme_") as folder:
        for pasted in follow_readme(Path(folder), arguments.narrow, arguments.timeout):
            print_block(pasted)
            faults = find_faults(pasted, Path(folder) / "here")
            num_failed += bool(faults)
            times = f"{pasted.seconds:7.1f} s, CPU {pasted.cpu_seconds:6.1f} s"
            rows.append(f"{times}  README.md:{pasted.block.line:<4} {'; '.join(faults) or 'as expected'}")
    print(*rows, sep="\n")
    print(f"{len(rows)} blocks in {time.perf_counter() - start:.0f} s, files for the Hub included")
    if num_failed:
        raise SystemExit(f"{num_failed} blocks failed")


if __name__ == "__main__":
    main()
