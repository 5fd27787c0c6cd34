"""`make faults`, second part: runs that are killed again and again, each compared with one that never stopped.

python -m tests.faults.kill_runs [--seed 0] [--kills 76] [--jobs 2] [--only "stage 1"]
"""

import argparse
import math
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.cases import CASES, Case, Inputs
from tests.faults.compare import BAD, Findings, check_checkpoints, check_finished
from tests.faults.kill import MOMENTS, Ended, Kill, list_orphans, start_and_wait

MAX_KILLS = 4  # of a run before it may finish
MAX_ROUNDS = 20  # of a case, should kills come too late
MOST_EVENTS = {"write": 14, "deletion": 8, "export": 8}
MOST_DELAY = 0.02  # seconds, so that a kill also meets what Python does not see


@dataclass
class Row:
    """What became of a case.

    Args:
        case: What was run.
        findings: What is wrong.
        kills: By moment.
        rounds: Runs that finished and were compared.
        run_seconds: What a run takes that is not killed.
        seconds: For all of it.
    """

    case: Case
    findings: Findings = field(default_factory=Findings)
    kills: Counter = field(default_factory=Counter)
    rounds: int = 0
    run_seconds: float = 0.0
    seconds: float = 0.0


def draw_kill(moment: str, num_processes: int, run_seconds: float, generator: random.Random) -> Kill:
    """A kill at a moment: at which save and event, how long after it, and of which processes."""
    ranks: tuple[int, ...] = (0,)
    if num_processes > 1:
        ranks = generator.choice([(0,), (1,), (0, 1)])
    if moment == "random":
        return Kill(moment, delay=generator.uniform(0.05, max(run_seconds, 0.1)), ranks=ranks)
    event = generator.randint(1, MOST_EVENTS.get(moment, 1))
    delay = generator.choice([0.0, generator.uniform(0, MOST_DELAY)])
    return Kill(
        moment, count=1 if moment == "export" else generator.randint(1, 2), event=event, delay=delay, ranks=ranks
    )


def note_end(ended: Ended, where: str, findings: Findings, is_finished: bool) -> None:
    """Look at how processes ended beside those that were killed."""
    for rank in ended.hung:
        findings.add("hang", f"{where}: process {rank} after {ended.seconds:.0f} s: {ended.tails[rank][-1500:]}")
    for rank in ended.list_unclear():
        findings.add(
            "unclear last line", f"{where}: process {rank} ({ended.codes[rank]}): {ended.tails[rank][-2500:]}"
        )
    if not is_finished and not ended.killed and not ended.hung:
        findings.add("failed", f"{where}: {ended.codes}: {ended.tails}")


def run_round(
    row: Row,
    inputs: Inputs,
    whole: Path,
    folder: Path,
    moments: list[str],
    generator: random.Random,
) -> None:
    """Kill a run up to `MAX_KILLS` times, let it finish, and compare it.

    Args:
        row: Gets what happens.
        inputs: Data and models.
        whole: Folder of the run that never stopped.
        folder: For this one.
        moments: Of the kills that are still to come; those that were reached are taken away.
        generator: Draws the rest.
    """
    case, run, starts = row.case, folder / "run", 0
    wanted, groups, is_finished = min(len(moments), MAX_KILLS), [], False
    while not is_finished:
        num_processes = case.processes[starts % len(case.processes)]
        kill = draw_kill(moments[0], num_processes, row.run_seconds, generator) if wanted > 0 else None
        words = case.build_words(inputs, run, num_processes)
        if case.form != "shards":
            words += ["--resume_from_checkpoint", "auto"]
        where = f"{case.name}, start {starts + 1} of {folder.name}, {kill}"
        place, is_group = folder / f"start_{starts}", case.form != "shards"
        ended = start_and_wait(case.target, words, place, num_processes, kill, case.environment, 240, is_group)
        starts += 1
        groups += ended.groups
        is_finished = not any(ended.codes)
        if is_finished:  # sooner than expected, on a machine that is not as busy as it was
            row.run_seconds = min(row.run_seconds, ended.seconds)
        note_end(ended, where, row.findings, is_finished)
        if ended.killed and kill is not None:
            row.kills[kill.moment] += 1
            moments.pop(0)
            wanted -= 1
        if run.is_dir():
            check_checkpoints(case, run, whole, row.findings)
        if ended.hung or not (ended.killed or is_finished):
            return
    check_finished(case, run, whole, row.findings)
    for process in list_orphans(groups):
        row.findings.add("left over", f"{case.name}: process {process}")
    row.rounds += 1


def run_case(case: Case, inputs: Inputs, folder: Path, seed: int, wholes: "Wholes") -> Row:
    """All rounds of a case."""
    row, generator, began = Row(case), random.Random(f"{seed} {case.name}"), time.monotonic()
    try:
        whole, row.run_seconds = wholes.get(case)
    except RuntimeError as error:
        row.findings.add("failed", str(error))
        return row
    moments = [case.moments[number % len(case.moments)] for number in range(case.kills)]
    for number in range(MAX_ROUNDS):
        if not moments or row.findings.count("hang"):
            break
        run_round(row, inputs, whole, folder / f"round_{number}", moments, generator)
        if not row.findings.found:
            shutil.rmtree(folder / f"round_{number}")
    row.seconds = time.monotonic() - began
    print(f"{case.name}: {row.kills.total()} kills, {len(row.findings.found)} faults", file=sys.stderr, flush=True)
    return row


class Wholes:
    """Runs that never stop, each made once.

    Args:
        inputs: Data and models.
        folder: For them.
    """

    def __init__(self, inputs: Inputs, folder: Path):
        self.inputs, self.folder = inputs, folder
        self.made: dict[tuple, tuple[Path, float]] = {}
        self.lock = threading.Lock()

    def get(self, case: Case) -> tuple[Path, float]:
        """Folder of the run that a case is compared with, and the seconds that it took."""
        num_processes = min(case.processes)
        sharding = case.sharding if num_processes > 1 else "-"
        key = (case.target, case.build.__name__, num_processes, sharding)
        with self.lock:
            if key not in self.made:
                self.made[key] = self._make(case, num_processes, self.folder / str(len(self.made)))
            return self.made[key]

    def _make(self, case: Case, num_processes: int, folder: Path) -> tuple[Path, float]:
        changes = {} if case.form == "shards" else {"save_total_limit": None}
        words = case.build_words(self.inputs, folder / "run", num_processes, **changes)
        environment = case.environment if num_processes > 1 else {}
        ended = start_and_wait(case.target, words, folder / "start", num_processes, environment=environment)
        if any(ended.codes) or ended.hung:
            raise RuntimeError(f"{case.name}: the run that is not killed fails: {ended.codes}: {ended.tails}")
        return folder / "run", ended.seconds


def print_table(rows: list[Row]) -> int:
    """Show a row for each case, and each finding; returns the number of findings."""
    names = ("stage", "processes", "sharding", "restarts as", "kills", *MOMENTS, "rounds", *BAD, "seconds")
    table = [
        [
            row.case.stage,
            row.case.processes[0],
            row.case.sharding,
            row.case.change,
            row.kills.total(),
            *(row.kills[moment] for moment in MOMENTS),
            row.rounds,
            *(row.findings.count(kind) for kind in BAD),
            f"{row.seconds:.0f}",
        ]
        for row in rows
    ]
    sums = [sum(int(line[number]) for line in table) for number in range(4, len(names))]
    table.append(["all", "", "", "", *sums])
    print("| " + " | ".join(names) + " |")
    print("|" + " --- |" * len(names))
    for line in table:
        print("| " + " | ".join(map(str, line)) + " |")
    for row in rows:
        for kind, where in row.findings.found:
            print(f"{row.case.name}: {kind}: {where}")
    return sum(len(row.findings.found) for row in rows)


def choose_cases(kills: int | None, only: str) -> list[Case]:
    """The cases whose names hold a text, with their shares of a number of kills."""
    cases = [case for case in CASES if only in case.name]
    if kills is None:
        return cases
    total = sum(case.kills for case in cases)
    return [Case(**vars(case) | {"kills": math.ceil(kills * case.kills / total)}) for case in cases]


def main() -> int:
    """Run everything; the exit code says whether something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, help=f"of all cases together; default: {sum(c.kills for c in CASES)}")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--folder", type=Path, help="kept, for a look at what is wrong; default: a temporary one")
    args = parser.parse_args()
    began, cases = time.monotonic(), choose_cases(args.kills, args.only)
    with tempfile.TemporaryDirectory() as name:
        folder = (args.folder or Path(name)).resolve()
        inputs = Inputs(folder / "inputs").prepare()
        wholes = Wholes(inputs, folder / "wholes")
        with ThreadPoolExecutor(args.jobs) as pool:
            rows = list(
                pool.map(
                    lambda number: run_case(cases[number], inputs, folder / f"case_{number}", args.seed, wholes),
                    range(len(cases)),
                )
            )
        faults = print_table(rows)
    kills = sum(row.kills.total() for row in rows)
    missing = sum(case.kills for case in cases) - kills
    print(f"{kills} kills, {faults} faults, {time.monotonic() - began:.0f} s, seed {args.seed}")
    if missing > 0:
        print(f"{missing} kills came too late: their runs had ended.")
    return int(faults > 0 or missing > 0)


if __name__ == "__main__":
    raise SystemExit(main())
