"""Runs the service as a child process and reads processes' CPU time. Linux only: reads /proc."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLES = REPOSITORY / "service" / "web" / "samples"  # the images that the page offers


@contextmanager
def on_cores(cores: Set[int] | None) -> Iterator[None]:
    """Pin processes that this thread starts meanwhile, and their children, to `cores`; None: do not pin them."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, before if cores is None else cores)  # child processes inherit the affinity
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def served(arguments: Sequence[str], cores: Set[int] | None = None) -> Iterator[tuple[str, int]]:
    """Serve on a free port, without an access log; yields the address and the process id once it is ready.

    Args:
        arguments: of `python -m service`.
        cores: it is pinned to these.
    """
    command = [sys.executable, "-m", "service", "--port", "0", "--access-log", "off", *arguments]
    with on_cores(cores):
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    with process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if "http://" not in line:
                sys.exit("error: the server did not start; its message is above")
            yield next(word for word in line.split() if word.startswith("http://")), process.pid
        finally:
            process.terminate()


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def cpu_s(pid: int) -> float:
    """User and system time of a process and of its children that have ended; 0 if there is no such process."""
    fields = stat(pid)
    return 0.0 if fields is None else sum(int(ticks) for ticks in fields[11:15]) / TICKS_PER_S


def cpu_with_children_s(pid: int) -> float:
    """The same including running children: with HTTP workers, the whole server."""
    return sum(map(cpu_s, (pid, *children(pid))))


def stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the name (state, parent, group, session, ...); None if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
