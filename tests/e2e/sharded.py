"""Processes whose weights are divided by FSDP2, with the launch file that ships.

Accelerate divides weights on accelerators alone. Here each process says that it has one, which no process had.
"""

from collections.abc import Callable
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

from tests.processes import Output, run_ranks
from umt_hf import training

LAUNCH = Path(training.__file__).parents[1] / "recipes" / "launch"


def build_environment(file: Path) -> dict[str, str]:
    """Variables by which `accelerate launch --config_file FILE` tells a script how weights are divided."""
    arguments = launch_command_parser().parse_args(["--config_file", str(file), "-m", "umt_hf.training.stage1"])
    arguments, *_ = _validate_launch_command(arguments)
    variables = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in variables.items() if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))}


def run_as_on_accelerators(main: Callable, arguments: list[str]) -> None:
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    main(arguments)


def run_sharded(main: Callable, arguments: list[str]) -> Output:
    """A script in two processes, as with `accelerate launch --config_file .../fsdp2.yaml`."""
    return run_ranks(
        run_as_on_accelerators, main, arguments, environment=build_environment(LAUNCH / "fsdp2.yaml"), timeout=400
    )
