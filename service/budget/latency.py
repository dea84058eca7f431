"""The control law of a latency target: how far to lower the budget, from measured latencies and predicted waits.

Plain Python over numbers: no clock, no thread, no array. `service.budget.degrade` applies its decisions.
"""

from collections import deque
from dataclasses import dataclass
from math import ceil, exp, log

MAX_LATENCY_MS = 600_000  # largest target accepted


@dataclass(frozen=True, slots=True)
class LatencyState:
    """A snapshot of a latency target's effect on the budget."""

    target_s: float
    p95_s: float | None  # of the latest answers; None if they are too few
    n_answers: int  # on which `p95_s` is based
    limited_s: float | None  # how long the working budget has been below the one that was set; None if it is not
    is_lowest: bool  # the working budget is limited and cannot fall further


class LatencyControl:
    """Finds the highest budget at which 95 % of the answers take no longer than `target_s`.

    It moves the logarithm of the budget, as the sum of two terms:

    * *Slow*, from measured latencies: the integral of -log(p95 / aim), where the aim is `AIM` of the target. It counts
      windows, not seconds (`FALL` and `RISE` are for a window of new answers), so that it is as stable at two answers a
      second, when a window takes long to fill, as at ten thousand. Just below the aim (within `STILL`) it rests.
    * *Quick*, from the predicted wait for the images in flight, which is known long before any answer is late. From
      `BEGIN` of the target on, the budget falls as (predicted wait) ** -`SLOPE`. This alone keeps a queue from growing;
      the slow term decides the length at which it stops.

    If fewer images may be in flight than the target allows, a full room counts, in both terms, as a wait as long as the
    target; otherwise images would be refused for which there is time at a lower budget.

    The window holds the answers of the last second (of four targets, if that is longer), and at least `FEW` if so many
    came in the last `MEMORY_S`. If fewer did, there is no percentile, and the budget rises.

    Simulated (six exits, 2 lanes, target 50 ms, Poisson arrivals at 1.5 times the capacity at a full budget, 16 s): p95
    is 43 ms; 2 % of single seconds have a p95 above 50 ms; accuracy is 0.1 to 0.3 points below that of fixed thresholds
    at the same cost, as with steering at a fixed budget. The transition from light load to six times that capacity,
    four tenths of it refused, takes half a second.

    Args:
        target_s: for the 95th percentile.
        lowest, highest: limits of the budget, in any unit.
        start: the initial budget, if within the limits; else the nearer limit.
        now_s: the time.
    """

    AIM = 0.85
    STILL = 0.1  # in units of the logarithm
    FALL, RISE = 1.0, 0.5
    BEGIN = 0.5
    SLOPE = 0.7
    FEW = 20
    MANY = 2_048  # answers in a window, at most
    MEMORY_S = 10.0
    LOOK_EVERY_S = 0.05

    def __init__(self, target_s: float, lowest: float, highest: float, start: float, now_s: float) -> None:
        self.target_s = target_s
        self.p95_s: float | None = None
        self.n_answers = 0
        self._highest = highest
        self._deepest = log(lowest / highest)  # log(budget / highest) lies between this and 0
        self._slow = log(min(max(start, lowest), highest) / highest)
        self._load = 0.0  # predicted wait / target, or fullness if larger; like the next, smoothed over one `target_s`
        self._fullness = 0.0
        self._window_s = max(1.0, 4.0 * target_s)
        self._memory_s = max(self.MEMORY_S, self._window_s)
        self._answers: deque[tuple[float, float]] = deque(maxlen=self.MANY)  # (time of the answer, its latency)
        self._n_new = 0
        self._now_s = self._looked_s = now_s

    def answered(self, seconds: float, now_s: float) -> None:
        """Note an answer that took `seconds`."""
        self._answers.append((now_s, seconds))
        self._n_new += 1

    def budget(self, now_s: float, predicted_wait_s: float, fullness: float) -> float:
        """Return the working budget; call it about once per batch.

        Args:
            predicted_wait_s: of an image that arrives now.
            fullness: images in flight over the number that counts as full.
        """
        if now_s - self._looked_s >= self.LOOK_EVERY_S:
            self._look(now_s)
        news = 1.0 - exp((self._now_s - now_s) / self.target_s)
        self._load += (max(predicted_wait_s / self.target_s, fullness) - self._load) * news
        self._fullness += (fullness - self._fullness) * news
        self._now_s = now_s
        excess = self._load / self.BEGIN
        quick = -self.SLOPE * log(excess) if excess > 1.0 else 0.0
        return self._highest * exp(max(self._deepest, self._slow + quick))

    def _look(self, now_s: float) -> None:
        """Measure the percentile, and move the slow term."""
        answers = self._answers
        while answers and answers[0][0] < now_s - self._memory_s:
            answers.popleft()
        while len(answers) > self.FEW and answers[0][0] < now_s - self._window_s:
            answers.popleft()
        self.n_answers = len(answers)
        if self.n_answers < self.FEW:
            self.p95_s = None
            step = self.RISE * (now_s - self._looked_s) / self._window_s
        else:
            took = sorted(seconds for _, seconds in answers)
            self.p95_s = took[ceil(0.95 * len(took)) - 1]
            load = max(self.p95_s / self.target_s, self._fullness, 1e-6)
            too_long = min(max(log(load / self.AIM), -1.0), 1.0)
            gain = self.FALL if too_long > 0.0 else self.RISE if too_long < -self.STILL else 0.0
            step = -gain * too_long * min(1.0, self._n_new / len(answers))
        self._slow = min(0.0, max(self._deepest, self._slow + step))
        self._n_new = 0
        self._looked_s = now_s
