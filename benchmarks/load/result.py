"""What a run of load found."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.load.arrivals import Times

STATUS_NAMES = {0: "connection ended", -1: "unanswered"}


@dataclass(frozen=True)
class Result:
    """Every request of one run: R of them, in order of sending. Times are seconds from the start."""

    intended_s: Times  # [R] when it was meant to be sent
    sent_s: Times  # [R]
    done_s: Times  # [R] NaN where no answer came
    statuses: NDArray[np.int16]  # [R] of HTTP; 0: its connection ended first, -1: no answer by the end
    image_index: NDArray[np.int64]  # [R] which of the images
    bodies: list[bytes]  # [R] of the answers
    seconds: float  # from the start until sending stopped, in an open loop until the last answer where that is later
    client_cpu_s: float
    stopped_early: bool  # too many were late: see `open_loop`

    @property
    def n_sent(self) -> int:
        return len(self.statuses)

    @property
    def answered(self) -> NDArray[np.bool_]:
        """[R] answered with status 200."""
        return np.equal(self.statuses, 200)

    @property
    def achieved_rate(self) -> float:
        """Answers with status 200 a second."""
        in_time = self.answered & (self.done_s <= self.seconds)
        return float(in_time.sum()) / self.seconds if self.seconds else 0.0

    @property
    def latency_ms(self) -> Times:
        """[R] from the intended moment to the answer; infinite where there was none or it was an error."""
        return np.where(self.answered, (self.done_s - self.intended_s) * 1e3, np.inf)

    def percentile_ms(self, percent: float, of_all: bool = True) -> float:
        """A percentile of the latency; `of_all` counts failures as infinitely late, else only answers count."""
        latencies = self.latency_ms if of_all else self.latency_ms[self.answered]
        return float(np.percentile(latencies, percent, method="higher")) if len(latencies) else float("nan")

    @property
    def failures(self) -> dict[str, int]:
        """How many ended otherwise than with status 200, by what they ended with."""
        found = Counter(int(status) for status in self.statuses if status != 200)
        return {STATUS_NAMES.get(status, str(status)): found[status] for status in sorted(found)}

    @property
    def late_sending_ms(self) -> float:
        """99th percentile of how late the client itself was; it is part of the latencies."""
        return float(np.percentile((self.sent_s - self.intended_s) * 1e3, 99)) if self.n_sent else 0.0

    def summary(self, offered_rate: float | None = None) -> dict[str, Any]:
        """The numbers a person wants; latencies are those of the answers, failures are counted beside them."""
        return {
            "offered_per_s": offered_rate,
            "achieved_per_s": self.achieved_rate,
            "sent": self.n_sent,
            "answered": int(self.answered.sum()),
            "failures": self.failures,
            **{f"p{p}_ms": self.percentile_ms(p, of_all=False) for p in (50, 95, 99)},
            "max_ms": self.percentile_ms(100, of_all=False),
            "late_sending_p99_ms": self.late_sending_ms,
            "seconds": self.seconds,
            "client_cpu_share": self.client_cpu_s / self.seconds if self.seconds else 0.0,
            "client_cpu_us_per_request": 1e6 * self.client_cpu_s / self.n_sent if self.n_sent else 0.0,
        }
