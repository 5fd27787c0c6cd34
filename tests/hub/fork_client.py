"""Becomes `umt-hf` and `python` in the shell of `tests.hub.newcomer`: adds flags, and starts the program or a fork."""

import json
import os
import signal
import socket
import sys

SETTINGS = {}


def main() -> int:
    arguments = sys.argv[1:]
    line = " ".join([SETTINGS["name"], *arguments]) + " "
    for start, flags in SETTINGS["appended"].items():
        if line.startswith(f"{start} "):
            arguments += flags
    if SETTINGS["address"] is None:
        os.execv(SETTINGS["real"][0], [*SETTINGS["real"], *arguments])
    started = {
        "name": SETTINGS["name"],
        "arguments": arguments,
        "folder": os.getcwd(),
        "environment": dict(os.environ),
    }
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(SETTINGS["address"])
        socket.send_fds(server, [json.dumps(started).encode()], [0, 1, 2])
        answers = server.makefile()
        pid = int(answers.readline())
        signal.signal(signal.SIGINT, lambda number, _: os.kill(pid, number))
        return int(answers.readline())


sys.exit(main())
