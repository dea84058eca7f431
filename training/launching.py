"""Several processes that train together, started by one that does without torch: to import it takes seconds."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from math import inf
from types import FrameType
from typing import Any

BAD_INPUT = 2  # the exit status of a process that was given some
TELLING_S = 30.0


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run `python -m training` with these arguments in `count` processes that train together; return the exit status.

    SIGTERM is passed on (Ctrl-C reaches them from the terminal): they save and stop. When one fails, so do the others.
    Bad input all of them find, and the first tells it, for which it has `TELLING_S`. Both signals are the caller's
    again afterwards.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    group |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    command = [sys.executable, "-m", "training", *arguments]
    workers = [
        subprocess.Popen(command, env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]

    def end(_: int | None = None, __: FrameType | None = None) -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()

    handlers: dict[signal.Signals, Any] = {signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: end}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    status = 0  # of the first that failed
    ends_s = inf  # when the others are ended
    running = True
    try:
        while running:
            time.sleep(0.1)
            statuses = [worker.poll() for worker in workers]
            running = None in statuses
            if not status and any(statuses):
                status = next(s for s in statuses if s)
                ends_s = time.monotonic() + (TELLING_S if status == BAD_INPUT else 0.0)
            if time.monotonic() >= ends_s:
                end()
                ends_s = inf
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return abs(status)
