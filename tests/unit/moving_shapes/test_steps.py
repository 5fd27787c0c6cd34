"""Steps in processes: their order, what runs side by side, what a failure leaves, and the seconds that are counted."""

import multiprocessing
import os
import subprocess
import sys
import time
from multiprocessing.connection import wait

import pytest
import torch

from umt_hf.moving_shapes import caption_search, probes, steps, tour
from umt_hf.moving_shapes.steps import Cost, Step, format_costs, run_steps
from umt_hf.runs.mistakes import UserError

TIMEOUT = 60


def note(folder, name):
    with (folder / "order.txt").open("a") as file:
        file.write(f"{name} {os.getpid()} {torch.get_num_threads()}\n")


def meet(folder, own, other):
    """Return only once the other step runs, too."""
    (folder / own).touch()
    stop = time.monotonic() + TIMEOUT
    while not (folder / other).exists():
        assert time.monotonic() < stop, f"{other} did not start beside {own}"
        time.sleep(0.01)
    print(f"{own} met {other}")


def work(seconds):
    """Use the processor, in a process of the step's as well."""
    command = "import time\nwhile time.process_time() < float({!r}): pass"
    subprocess.run([sys.executable, "-c", command.format(seconds)], check=True)
    stop = time.process_time() + seconds
    while time.process_time() < stop:
        pass


def wait_for_ever(folder):
    (folder / "waits").write_text(str(os.getpid()))
    time.sleep(TIMEOUT)
    (folder / "came_to_its_end").touch()


def fail(folder, kind):
    stop = time.monotonic() + TIMEOUT
    while not (folder / "waits").exists() and time.monotonic() < stop:
        time.sleep(0.01)
    raise kind("clip 7 is broken")


def add_ranks(folder):
    """Join the other processes of the step, as Accelerate does, and count them."""
    torch.distributed.init_process_group("gloo")
    total = torch.tensor(float(torch.distributed.get_rank()))
    torch.distributed.all_reduce(total)
    print(f"{os.environ['RANK']} of {os.environ['WORLD_SIZE']}: {total.item():g}, {torch.get_num_threads()} thread")
    torch.distributed.destroy_process_group()
    note(folder, f"rank {os.environ['LOCAL_RANK']}")
    work(0.3)


def fail_alone(folder):
    """The second process fails, the first one waits for it."""
    if os.environ["RANK"] == "1":
        fail(folder, ValueError)
    wait_for_ever(folder)


def leave_alone(folder, name):
    """Fail if another step runs."""
    (folder / f"{name}_runs").touch()
    time.sleep(0.2)
    assert [path.name for path in folder.glob("*_runs")] == [f"{name}_runs"]
    (folder / f"{name}_runs").unlink(missing_ok=True)
    note(folder, name)


@pytest.fixture(params=["fork", pytest.param("spawn", marks=pytest.mark.heavy)])
def context(request, monkeypatch):
    if request.param not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {request.param}")
    monkeypatch.setattr(steps, "_choose_context", lambda: multiprocessing.get_context(request.param))


def test_steps_run_in_processes_once_what_they_need_is_done(context, tmp_path, capsys):
    plan = {
        "last": Step(function=note, arguments=(tmp_path, "last"), needs=frozenset({"first", "second", "of before"})),
        "second": Step(function=note, arguments=(tmp_path, "second"), needs=frozenset({"first"}), num_threads=1),
        "first": Step(function=note, arguments=(tmp_path, "first"), command="umt-hf first"),
    }
    costs = run_steps(plan, 1, tmp_path / "logs", "seed 0, ")
    rows = [line.split() for line in (tmp_path / "order.txt").read_text(encoding="utf-8").splitlines()]
    assert [name for name, _, _ in rows] == ["first", "second", "last"] and list(costs) == list(plan)
    assert len({process for _, process, _ in rows} | {str(os.getpid())}) == 4 and rows[1][2] == "1"
    assert "[seed 0, 1/3] first\n  umt-hf first\n[seed 0, 2/3] second\n" in capsys.readouterr().out
    assert not (tmp_path / "logs").exists()


def test_two_lanes_run_side_by_side_and_the_second_one_writes_to_a_file(tmp_path, capfd):
    plan = {
        "one": Step(function=meet, arguments=(tmp_path, "one", "two")),
        "two of them": Step(function=meet, arguments=(tmp_path, "two", "one"), is_beside=True),
    }
    run_steps(plan, 2, tmp_path / "logs")
    printed = capfd.readouterr().out
    assert "one met two" in printed and "two met one" not in printed
    assert (tmp_path / "logs" / "two_of_them.txt").read_text(encoding="utf-8") == "two met one\n"


def test_seconds_count_processes_of_a_step(tmp_path):
    cost = run_steps({"work": Step(function=work, arguments=(0.5,))}, 1, tmp_path)["work"]
    assert 1.0 <= cost.cpu < 20 and cost.wall >= 0.5
    table = format_costs({"work": Cost(2.4, 3.6)}, Cost(9.0, 4.0))
    assert "| work | 2 | 4 |\n| everything | 9 | 4 |" in table


def test_processes_of_a_step_join_and_the_first_one_speaks(context, tmp_path, capfd):
    step = Step(function=add_ranks, arguments=(tmp_path,), num_threads=1, num_processes=2)
    cost = run_steps({"add up": step}, 2, tmp_path / "logs")["add up"]
    printed = capfd.readouterr().out
    assert "0 of 2: 1, 1 thread\n" in printed and "1 of 2" not in printed
    log = tmp_path / "logs" / "add_up_1.txt"
    assert "1 of 2: 1, 1 thread\n" in log.read_text(encoding="utf-8") and f"process 1 writes to {log}" in printed
    rows = (tmp_path / "order.txt").read_text(encoding="utf-8").splitlines()
    assert sorted(row.split()[1] for row in rows) == ["0", "1"]
    assert cost.cpu >= 4 * 0.3  # of both, and of what they have started
    assert "RANK" not in os.environ


def test_a_step_of_several_processes_waits_for_room(tmp_path):
    plan = {
        "one": Step(function=leave_alone, arguments=(tmp_path, "one"), is_beside=True),
        "two": Step(function=add_ranks, arguments=(tmp_path,), num_processes=2),
        "three": Step(function=leave_alone, arguments=(tmp_path, "three"), needs=frozenset({"two"})),
    }
    run_steps(plan, 2, tmp_path / "logs")
    rows = [line.rsplit(" ", 2)[0] for line in (tmp_path / "order.txt").read_text(encoding="utf-8").splitlines()]
    assert rows[0] == "one" and rows[-1] == "three" and sorted(rows[1:3]) == ["rank 0", "rank 1"]
    # Wider than the lanes, it has them all.
    run_steps({"two": plan["two"]}, 1, tmp_path / "logs")


def test_the_process_that_failed_is_the_one_that_is_named(tmp_path):
    plan = {"shared": Step(function=fail_alone, arguments=(tmp_path,), num_processes=2)}
    with pytest.raises(UserError, match=r"'shared' failed with code 2; it says why in .*shared_1\.txt"):
        run_steps(plan, 2, tmp_path / "logs")
    assert (tmp_path / "logs" / "shared_1.txt").read_text(encoding="utf-8").endswith("Error: clip 7 is broken\n")
    assert not multiprocessing.active_children() and not (tmp_path / "came_to_its_end").exists()


def test_a_step_that_ends_at_once_is_not_waited_for_without_end(tmp_path, monkeypatch):
    start = steps._start

    def start_and_join(*arguments):
        found = start(*arguments)
        for part in found.processes:
            part.process.join()
        return found

    def wait_for_some_time(sentinels):
        assert (ended := wait(sentinels, TIMEOUT)), "nothing that ends is waited for"
        return ended

    monkeypatch.setattr(steps, "_start", start_and_join)
    monkeypatch.setattr(steps, "wait", wait_for_some_time)
    plan = {name: Step(function=note, arguments=(tmp_path, name)) for name in ("a", "b")}
    assert list(run_steps(plan, 2, tmp_path)) == ["a", "b"]


@pytest.mark.parametrize(
    ("kind", "code", "said"),
    [
        (ValueError, 2, "Error: clip 7 is broken\n"),
        (UserError, 2, "Error: clip 7 is broken\n"),
        (RuntimeError, 1, "RuntimeError: clip 7 is broken\n"),  # a bug: with its traceback
    ],
)
def test_a_failure_is_named_and_stops_the_others(tmp_path, kind, code, said):
    plan = {
        "waits": Step(function=wait_for_ever, arguments=(tmp_path,)),
        "fails": Step(function=fail, arguments=(tmp_path, kind), is_beside=True),
        "never": Step(function=note, arguments=(tmp_path, "never"), needs=frozenset({"fails"})),
    }
    with pytest.raises(UserError, match=rf"'fails' failed with code {code}; it says why in .*fails\.txt"):
        run_steps(plan, 2, tmp_path / "logs")
    spoken = (tmp_path / "logs" / "fails.txt").read_text(encoding="utf-8")
    assert spoken.endswith(said) and ("Traceback" in spoken) == (code == 1)
    assert not multiprocessing.active_children()
    assert not (tmp_path / "order.txt").exists() and not (tmp_path / "came_to_its_end").exists()


def test_a_circle_is_refused(tmp_path):
    plan = {
        name: Step(function=note, arguments=(tmp_path, name), needs=frozenset({other}))
        for name, other in (("a", "b"), ("b", "a"))
    }
    with pytest.raises(UserError, match="a, b need each other"):
        run_steps(plan, 2, tmp_path)


def test_an_accelerator_is_not_taken_into_a_fork(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert steps._choose_context().get_start_method() == "spawn"


@pytest.mark.parametrize("module", [tour, probes, caption_search])
def test_a_folder_without_a_name_is_refused(module, capsys):
    """It would be the current folder."""
    with pytest.raises(SystemExit, match="2"):
        module.main(["--output_dir", ""])
    assert "--output_dir: it is empty: give it a name" in capsys.readouterr().err
