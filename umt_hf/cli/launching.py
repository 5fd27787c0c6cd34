"""Starts a script of the package through Accelerate's launcher, in this process, and passes its exit code on."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import yaml

from ..runs.cores import count_threads
from ..runs.scripts import LAUNCHER_VARIABLE, MISTAKE_CODE, ScriptEntry

LAUNCH_FILES = Path(__file__).parents[1] / "recipes" / "launch"


@dataclass(frozen=True)
class LaunchOptions:
    """What the launcher takes; `None` leaves it to its configuration file, or to what the machine has.

    Attributes:
        num_processes: Processes on all machines together.
        num_machines: Machines.
        machine_rank: Number of this machine, from 0 on.
        main_process_ip: Address of machine 0.
        main_process_port: Port there.
        accelerate_config: File that `accelerate config` has written, or name of one that ships: `ddp`, `fsdp2`,
            `zero2`, `zero3`.
    """

    num_processes: int | None = None
    num_machines: int | None = None
    machine_rank: int | None = None
    main_process_ip: str | None = None
    main_process_port: int | None = None
    accelerate_config: str | None = None

    def to_flags(self, num_accelerators: int) -> list[str]:
        """Flags of `accelerate launch`.

        Args:
            num_accelerators: GPUs and the like that this machine has.
        """
        shipped = LAUNCH_FILES / f"{self.accelerate_config}.yaml"
        is_shipped = self.accelerate_config is not None and not Path(self.accelerate_config).exists()
        file = str(shipped if is_shipped else self.accelerate_config)
        flags = [] if self.accelerate_config is None else ["--config_file", file]
        for name in ("num_machines", "machine_rank", "main_process_ip", "main_process_port"):
            value = getattr(self, name)
            flags += [] if value is None else [f"--{name}", str(value)]
        if self.accelerate_config is not None:
            # Files that ship are for any number of GPUs.
            number = self.num_processes or (max(num_accelerators, 1) if is_shipped else None)
            return flags + ([] if number is None else ["--num_processes", str(number)])
        num_processes = self.num_processes or max(num_accelerators, 1) * (self.num_machines or 1)
        per_machine = max(num_processes // (self.num_machines or 1), 1)
        # Given, so that the launcher does not list in a warning what it fills in.
        flags += ["--num_processes", str(num_processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
        flags += [] if self.num_machines is not None else ["--num_machines", "1"]
        flags += ["--multi_gpu"] if num_processes > 1 else []
        if num_accelerators == 0:
            # Accelerate gives a process one thread, whatever the machine has. See benchmarks/threads.
            flags += ["--num_cpu_threads_per_process", str(count_threads(per_machine))]
        return flags


def launch(entry: ScriptEntry, arguments: Sequence[str], options: LaunchOptions) -> NoReturn:
    """Run a script and end with its exit code.

    Args:
        entry: Which script.
        arguments: Its flags.
        options: How many processes, and where.

    Raises:
        SystemExit: With the script's exit code; 2 where the launcher cannot start it.
    """
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # Its lines on processes that it ends would bury the script's own sentence.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    num_accelerators = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    flags = options.to_flags(num_accelerators)
    if num_accelerators == 0:
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    command = launch_command_parser().parse_args([*flags, "-m", entry.module, *arguments])
    try:
        with _pass_signals_on():
            launch_command(command)
    except subprocess.CalledProcessError as error:
        raise SystemExit(_to_exit_code(error.returncode)) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = _to_exit_code(failure.exitcode)
        if failure.exitcode < 0:  # it could say nothing itself
            _fail(f"process {rank} was ended by signal {-failure.exitcode}.", code)
        raise SystemExit(code) from None
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None
    except ImportError as error:
        if "deepspeed" not in str(error).lower():
            raise
        needed = "pip install 'umt_hf[deepspeed]'"
        _fail(f"{options.accelerate_config} needs DeepSpeed, which is not installed: run `{needed}`.", MISTAKE_CODE)
    except (OSError, ValueError, yaml.YAMLError) as error:
        where = f"{options.accelerate_config}: " if isinstance(error, yaml.YAMLError) else ""
        _fail(f"{where}{error}", MISTAKE_CODE)
    raise SystemExit(0)


def _fail(message: str, code: int) -> NoReturn:
    """End with an exit code after an error in one line."""
    sys.stderr.write(f"Error: {' '.join(message.split())}\n")
    raise SystemExit(code) from None


def _to_exit_code(code: int) -> int:
    """The shell's code of a process that a signal ended, else its own."""
    return 128 - code if code < 0 else code


@contextlib.contextmanager
def _pass_signals_on() -> Generator[None]:
    """Hand signals on to the script, but for a terminal's Ctrl-C, which all processes of its group get."""
    import psutil

    def hand_on(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and _is_in_foreground():
            return
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(number)

    # Python's own handlers, not SIG_IGN, which the script would inherit.
    handlers: dict[int, Any] = {signal.SIGINT: hand_on, signal.SIGTERM: hand_on}
    # By which schedulers announce the end, see `--preemption_signal`; Windows has none of them.
    named = (getattr(signal, name, None) for name in ("SIGUSR1", "SIGUSR2"))
    handlers |= {number: hand_on for number in named if number is not None}
    former = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _is_in_foreground() -> bool:
    """Whether Ctrl-C of a terminal reaches this process, and with it those that it has started."""
    if os.name == "nt":  # a console has no groups
        return True
    try:
        with open("/dev/tty", "rb") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:  # there is none, as under a scheduler
        return False
