"""What else kept the cores busy while something was measured; for Linux, which tells."""

import os
import time
from pathlib import Path
from typing import Self

STAT = Path("/proc/stat")
N_FIELDS = 8  # user, nice, system, idle, iowait, irq, softirq, steal: what a guest takes is in user
IDLE = (3, 4)


class Neighbours:
    """Notices, while entered, what share of all cores went to others: to other processes, or to other machines."""

    share: float | None = None  # None where it cannot be told

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
    """Seconds that all cores together have worked since the machine began."""
    try:
        ticks = [int(text) for text in STAT.read_text().split("\n", 1)[0].split()[1 : 1 + N_FIELDS]]
        return sum(n for i, n in enumerate(ticks) if i not in IDLE) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None
