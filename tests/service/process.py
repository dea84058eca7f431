"""Starts a real server process on a free port, from the command line."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

from tests.waiting import LIMIT_S

PROGRAM = (sys.executable, "-m", "service")
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class ServerProcess:
    process: subprocess.Popen[str]
    url: str
    port: int
    log: Path

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = LIMIT_S) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout_s)


def command(*arguments: str) -> list[str]:
    return [*PROGRAM, *arguments]


def environment(**variables: str) -> dict[str, str]:
    """The environment of this process, without settings of the server, plus `variables`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EXITSERVE_")}
    return {**kept, "PYTHONUNBUFFERED": "1", **variables}


@contextmanager
def running_server(
    bundle: Path, log: Path, *arguments: str, program: Sequence[str] = PROGRAM, **variables: str
) -> Iterator[ServerProcess]:
    """Start the server `program` and wait until it prints that it is ready; kill it at the end if it still runs."""
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*program, "--bundle", str(bundle), "--port", "0", *arguments],
            cwd=REPOSITORY,
            env=environment(**variables),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    try:
        line = _first_line(process, 5 * LIMIT_S)
        assert "http://" in line, f"{line!r}; the log says: {log.read_text()}"
        url = next(word for word in line.split() if word.startswith("http://"))
        yield ServerProcess(process, url, int(url.rsplit(":", 1)[1]), log)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _first_line(process: subprocess.Popen[str], timeout_s: float) -> str:
    lines: Queue[str] = Queue()
    stdout = process.stdout
    assert stdout is not None
    threading.Thread(target=lambda: lines.put(stdout.readline()), daemon=True).start()
    return lines.get(timeout=timeout_s)
