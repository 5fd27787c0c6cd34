"""Processes among which DeepSpeed divides optimizer state, and with ZeRO-3 weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import PartialState
from accelerate.utils.launch import prepare_deepspeed_cmd_env

from tests.e2e.sharded import LAUNCH
from tests.processes import Output, run_ranks


def build_environment(stage: int) -> dict[str, str]:
    """Variables by which `accelerate launch --config_file zero<stage>.yaml` speaks to a script."""
    file = LAUNCH / f"zero{stage}.yaml"
    arguments = launch_command_parser().parse_args(["--config_file", str(file), "-m", "umt_hf.training.stage1"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    _, variables = prepare_deepspeed_cmd_env(arguments)
    named = {name: value for name, value in variables.items() if name.startswith("ACCELERATE_")}
    return named | {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "false"}


def write_zero3_file(folder: Path) -> Path:
    """DeepSpeed's own file, by which each weight is divided: usually small ones are not."""
    path = folder / "zero3.json"
    division = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    automatic = (
        "train_micro_batch_size_per_gpu",
        "train_batch_size",
        "gradient_accumulation_steps",
        "gradient_clipping",
    )
    path.write_text(json.dumps({"zero_optimization": division} | dict.fromkeys(automatic, "auto")))
    return path


def run_on_gloo(main: Callable, arguments: list[str]) -> None:
    import deepspeed

    # It would compile a C++ extension at its start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # On a CPU Accelerate takes no backend by itself.
    PartialState(backend="gloo")
    main(arguments)


def run_zero(stage: int, *arguments: Any) -> Output:
    """A script in two processes, as with `accelerate launch --config_file .../zero<stage>.yaml`.

    Args:
        stage: Of ZeRO.
        arguments: Perhaps DeepSpeed's own file, which decides then; the script's `main`; its command line.
    """
    *file, main, flags = arguments
    environment = build_environment(stage)
    if file:
        environment |= {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file[0]), "ACCELERATE_CONFIG_DS_FIELDS": ""}
    return run_ranks(run_on_gloo, main, flags, environment=environment, timeout=400)
