"""Starts, monitors and stops a server with all its processes. Linux only: reads /proc."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

from benchmarks.processes import REPOSITORY, cpu_s, stat


@dataclass
class Tree:
    """The processes of one server, found anew at each call by parent and by session."""

    process: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(cls, command: Sequence[str], environment: Mapping[str, str], log: Path) -> "Tree":
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        return cls(process, log)

    @property
    def exit_code(self) -> int | None:
        """None while its first process runs."""
        return self.process.poll()

    def pids(self) -> list[int]:
        """Ids of the running processes: the first one, its descendants, and all in its session."""
        parents: dict[int, int] = {}
        found = set()
        for path in Path("/proc").iterdir():
            if path.name.isdecimal() and (fields := stat(int(path.name))) is not None:
                parents[int(path.name)] = int(fields[1])
                if int(fields[3]) == self.process.pid:
                    found.add(int(path.name))
        found.add(self.process.pid)
        grown = True
        while grown:
            more = {pid for pid, parent in parents.items() if parent in found} - found
            found |= more
            grown = bool(more)
        return sorted(pid for pid in found if pid in parents)

    def cpu_s(self) -> float:
        """User and system time so far of the running processes and of their children that have ended."""
        return sum(cpu_s(pid) for pid in self.pids())

    def memory_mib(self) -> float:
        """Current proportional set size, which counts shared memory once."""
        total_kib = 0
        for pid in self.pids():
            try:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            except OSError:
                continue
            total_kib += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return total_kib / 1024

    def terminate(self) -> None:
        """Send SIGTERM to the first process, as a process manager does."""
        self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float) -> bool:
        """True once the first process has ended."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """Kill all of its processes that still run, and wait for them to end."""
        pids = self.pids()
        for pid in pids:
            _signal(pid, signal.SIGKILL)
        self.process.wait()
        deadline_s = monotonic() + 5
        while any(Path(f"/proc/{pid}").exists() for pid in pids) and monotonic() < deadline_s:
            sleep(0.02)


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
