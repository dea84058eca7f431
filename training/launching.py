"""Starts several processes that train together. The launcher does not import torch, which takes seconds."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from math import inf
from types import FrameType

import typer

BAD_INPUT = 2  # exit status of a process that reports an error of the user's
LOST_ANOTHER = 3  # exit status of a process that lost another one of its group: not the cause, so it reports nothing
TELLING_S = 30.0
LAUNCHER = "EXITSERVE_LAUNCHER"  # environment variable with the launcher's process ID
GO_ON = "give the same command again to resume"


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run `python -m training` with these arguments in `count` processes that train together; return the exit status.

    SIGINT (Ctrl-C) and SIGTERM are passed on as SIGTERM: the processes save and stop, as they also do when this one is
    gone; a second SIGINT kills them. They ignore the terminal's SIGINT themselves: while modules are imported,
    KeyboardInterrupt may be swallowed. When one fails, the others are terminated once the cause is reported, or after
    `TELLING_S`. Bad input is found by all and reported by process 0. What a process can't report of its own end (a
    signal) is reported here. Both signal handlers are restored afterwards.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    group |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), LAUNCHER: str(os.getpid())}
    command = [sys.executable, "-m", "training", *arguments]
    before = {signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN)}  # which the processes inherit
    workers = [
        subprocess.Popen(command, env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]
    stops: list[int] = []  # signals that asked for the end
    killed = False

    def end() -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()

    def stop(number: int, _: FrameType | None) -> None:
        nonlocal killed
        killed |= bool(stops) and number == signal.SIGINT
        stops.append(number)
        if not killed:
            return end()
        for worker in workers:
            worker.kill()

    before[signal.SIGTERM] = signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    failed: dict[int, int] = {}  # statuses by rank, in the order in which they came
    ends_s = inf  # deadline for terminating the others
    running = True
    try:
        while running:
            time.sleep(0.1)
            statuses = [worker.poll() for worker in workers]
            running = None in statuses
            if not failed and any(statuses):
                ends_s = time.monotonic() + TELLING_S
            failed |= {rank: status for rank, status in enumerate(statuses) if status and rank not in failed}
            is_reported = failed.get(0) == BAD_INPUT or set(failed.values()) - {BAD_INPUT, LOST_ANOTHER}
            if ends_s < inf and (is_reported or time.monotonic() >= ends_s):
                end()
                ends_s = inf
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if not failed:
        return 0
    of_stopping = {-signal.SIGTERM, LOST_ANOTHER, *([-signal.SIGKILL] if killed else [])}
    if stops and set(failed.values()) <= of_stopping:  # stopped before training began, or killed
        return 128 + stops[0]
    rank = next((rank for rank, status in failed.items() if status != LOST_ANOTHER), min(failed))
    if unreported := _unreported(rank, failed):
        typer.echo(f"error: {unreported}", err=True)
    return abs(failed[rank])


def orphaned() -> bool:
    """Whether this process was started by a launcher that has since ended."""
    return os.environ.get(LAUNCHER, str(os.getppid())) != str(os.getppid())


def _unreported(rank: int, failed: Mapping[int, int]) -> str | None:
    """Why a group failed, if process `rank`, the cause, did not report it; None if it did."""
    status = failed[rank]
    if status < 0:
        memory = " (out of memory?)" if -status == signal.SIGKILL else ""
        return f"process {rank} was killed by signal {-status}{memory}; {GO_ON}"
    if status == LOST_ANOTHER:
        return f"the processes lost contact with each other; {GO_ON}"
    if status == BAD_INPUT and failed.get(0, 0) != BAD_INPUT:  # only process 0 reports it
        return f"process {rank} failed on an error that process 0 did not hit; run with --processes 1 to see it"
    return None
