"""How many workers and threads a process gets."""

from pathlib import Path

import pytest

from umt_hf.cli.launching import LaunchOptions
from umt_hf.data.loaders import build_loader
from umt_hf.finetuning.trainer import FinetuningArguments
from umt_hf.runs import cores
from umt_hf.runs.arguments import WorkerArguments


@pytest.fixture
def machine(monkeypatch):
    """Gives the machine a number of cores, and no number of threads."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def build(physical: int, usable: int | None = None) -> None:
        monkeypatch.setattr(cores, "count_usable_cores", lambda: usable or physical)
        monkeypatch.setattr("psutil.cpu_count", lambda logical=True: physical)

    return build


@pytest.mark.parametrize(
    "usable,processes,expected", [(1, 1, 1), (2, 1, 2), (3, 1, 3), (64, 1, 4), (8, 4, 2), (2, 8, 1)]
)
def test_workers_are_a_share_of_the_cores(usable, processes, expected, machine, monkeypatch, tmp_path):
    machine(usable)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert cores.count_workers() == expected
    assert build_loader([1], [[0]], None).num_workers == expected
    assert FinetuningArguments(output_dir=str(tmp_path), use_cpu=True).dataloader_num_workers == expected
    assert WorkerArguments().dataloader_num_workers is None
    assert build_loader([1], [[0]], 0).num_workers == 0


@pytest.mark.parametrize(
    "physical,usable,processes,expected", [(2, 4, 1, 2), (8, 8, 2, 4), (8, 3, 1, 3), (2, 2, 3, 1)]
)
def test_threads_are_a_share_of_the_physical_cores(physical, usable, processes, expected, machine):
    machine(physical, usable)
    assert cores.count_threads(processes) == expected
    flags = LaunchOptions(num_processes=processes).to_flags(num_accelerators=0)
    assert flags[flags.index("--num_cpu_threads_per_process") + 1] == str(expected)
    assert "--num_cpu_threads_per_process" not in LaunchOptions().to_flags(num_accelerators=1)


@pytest.mark.parametrize("given,expected", [("3", 3), ("1", 1), ("4,2", 4), ("", 2), ("many", 2), ("0", 2)])
def test_omp_num_threads_wins(given, expected, machine, monkeypatch):
    machine(2)
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert cores.count_threads() == expected
    flags = LaunchOptions().to_flags(num_accelerators=0)
    assert flags[flags.index("--num_cpu_threads_per_process") + 1] == str(expected)


def test_launch_files_that_ship_take_the_accelerators_that_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = LaunchOptions(accelerate_config="fsdp2").to_flags(num_accelerators=4)
    assert flags[0] == "--config_file" and Path(flags[1]).name == "fsdp2.yaml" and Path(flags[1]).is_file()
    assert flags[-2:] == ["--num_processes", "4"]
    # A file of that name comes first, and has its own number.
    (tmp_path / "fsdp2").write_text("num_processes: 2")
    assert LaunchOptions(accelerate_config="fsdp2").to_flags(4) == ["--config_file", "fsdp2"]
