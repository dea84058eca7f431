"""How busy other processes kept the cores during a measurement (Linux only)."""

import os
import time
from pathlib import Path
from typing import Self

STAT = Path("/proc/stat")
N_FIELDS = 8  # user, nice, system, idle, iowait, irq, softirq, steal; the fields for guests are included in user
IDLE = (3, 4)


class Neighbours:
    """A context manager that measures the share of all cores that went to other processes or virtual machines."""

    share: float | None = None  # None if it cannot be determined

    def __enter__(self) -> Self:
        self._before = _busy_s(), time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        busy_before_s, own_before_s, began_s = self._before
        busy_s = _busy_s()
        if busy_before_s is None or busy_s is None:
            return
        others_s = busy_s - busy_before_s - (time.process_time() - own_before_s)
        cores_s = (time.perf_counter() - began_s) * (os.cpu_count() or 1)
        self.share = min(1.0, max(0.0, others_s / cores_s))


def _busy_s() -> float | None:
    """Busy seconds of all cores together since the machine started; None if unknown."""
    try:
        ticks = [int(text) for text in STAT.read_text().split("\n", 1)[0].split()[1 : 1 + N_FIELDS]]
        return sum(n for i, n in enumerate(ticks) if i not in IDLE) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None
