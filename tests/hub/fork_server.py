"""Runs `umt-hf` and `python` in forks of a process that has imported everything; see `tests.hub.newcomer`.

    python -m tests.hub.fork_server SOCKET

Released checkpoints are narrow here. A verb that starts a script calls it; what the launcher does with a process is
tested in `tests/e2e/test_launching.py`.
"""

import importlib
import json
import os
import socket
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tests.preloaded  # noqa: F401 (imported once for all)
from tests.hub.released import NARROW
from umt_hf import cli
from umt_hf.cli import scripts
from umt_hf.hub_cards import released_checkpoints
from umt_hf.runs.scripts import ScriptEntry

build_published_config = released_checkpoints.build_published_config


def build_narrow_config(name: str) -> tuple[Any, str]:
    config, task = build_published_config(name)
    text = getattr(config, "text_config", None)
    for part in (getattr(config, "vision_config", config), text):
        for key, value in NARROW.items() if part is not None else ():
            setattr(part, key, value)
    if text is not None:
        text.encoder_width = NARROW["hidden_size"]
    return config, task


def call_script(entry: ScriptEntry, arguments: Sequence[str], _: Any) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    sys.argv = [entry.command, *arguments]
    importlib.import_module(entry.module).main(arguments)


def run(name: str, arguments: list[str]) -> int:
    """What the program does; its exit code."""
    try:
        if name == "python":
            exec(compile(sys.stdin.read(), "<stdin>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = [name, *arguments]
            cli.app(prog_name=name)
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except KeyboardInterrupt:
        return 130
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def serve(connection: socket.socket) -> None:
    message, descriptors, _, _ = socket.recv_fds(connection, 1 << 18, 3)
    started = json.loads(message)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
        os.chdir(started["folder"])
        os.environ.clear()
        os.environ.update(started["environment"])
        code = run(started["name"], started["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    for descriptor in descriptors:
        os.close(descriptor)
    connection.sendall(f"{pid}\n".encode())
    _, status = os.waitpid(pid, 0)
    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def main(address: str) -> None:
    released_checkpoints.build_published_config = build_narrow_config
    scripts.launch = call_script
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        print("ready", flush=True)
        while True:
            connection, _ = server.accept()
            with connection:
                serve(connection)


if __name__ == "__main__":
    main(str(Path(sys.argv[1])))
