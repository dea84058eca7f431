"""Monitors running batches: detects failures, hangs, and a runner that can no longer run any stage.

Plain Python: the engine's thread passes the time and acts on the results. A batch that does not return in time is given
up, and its lane counts as lost until it does. After several consecutive failures of images run alone, a trial (blank
images through every stage) tells bad images from a runner that can run nothing. Such a runner is *unsound* until a
trial succeeds.
"""

from collections.abc import Mapping, Sequence
from math import ceil, inf

from service.engine.lanes import TRIAL, Batch

# How long a batch may run is counted in looks (checks), not in seconds: while a machine is suspended or starved of CPU
# time, it does not look either.
LOOK_EVERY_S = 0.2
HANG_S = 0.8  # a hang also needs `SLOWDOWN` times the duration at warm-up
SLOWDOWN = 20.0
TRIAL_LOOKS = 25
FAILURES_BEFORE_TRIAL = 3
TRIAL_EVERY_S = 1.0


class Guard:
    """See the module.

    Args:
        n_lanes: batches that run at once.
        hang_s: longest run of a batch; `SLOWDOWN` times its duration at warm-up, if that is longer.

    Attributes:
        running: batches with the lanes, and how often each was seen running.
        lanes_lost: lanes whose batch was given up and has not returned.
        unsound: why no stage can be run; None while they can.
        n_failed, n_hung: batches, since the start.
    """

    def __init__(self, n_lanes: int, hang_s: float = HANG_S) -> None:
        self.n_lanes = n_lanes
        self.hang_s = hang_s
        self.running: dict[Batch, int] = {}
        self.lanes_lost = 0
        self.unsound: str | None = None
        self.n_failed = self.n_hung = 0
        self._looks: list[int] = []  # after which a batch is given up, by stage
        self._failures = 0  # in a row
        self._trial: Batch | None = None
        self._next_look_s = inf
        self._next_trial_s = inf

    @property
    def lanes_left(self) -> int:
        return self.n_lanes - self.lanes_lost

    @property
    def next_s(self) -> float:
        """When `look` or `trial` is due next; inf if neither is."""
        look_s = self._next_look_s if self.running else inf
        return look_s if look_s < self._next_trial_s else self._next_trial_s

    def expect(self, stage_seconds: Sequence[Mapping[int, float]], max_rows: int) -> None:
        """Learn how long a full batch of each stage takes, from seconds by batch rows."""
        slowest = [max(seconds * max_rows / rows for rows, seconds in by_rows.items()) for by_rows in stage_seconds]
        # A batch seen n times has run for n - 1 intervals at least.
        self._looks = [1 + ceil(max(self.hang_s, seconds * SLOWDOWN) / LOOK_EVERY_S) for seconds in slowest]

    def began(self, batch: Batch, now_s: float) -> None:
        if not self.running:
            self._next_look_s = now_s + LOOK_EVERY_S
        self.running[batch] = 0

    def ended(self, batch: Batch, now_s: float) -> bool:
        """Note that a batch has returned. False if its rows are not to be handled: given up, or a trial."""
        self.running.pop(batch, None)
        if batch.hung:
            self.lanes_lost -= 1
            if self._trial is None:  # otherwise the running trial decides
                self._next_trial_s = now_s if self.unsound else inf
        if batch is self._trial:
            self._trial = None
            if batch.error is None:
                self._failures, self.unsound, self._next_trial_s = 0, None, inf
            else:
                self.unsound = self.unsound or f"every batch fails ({batch.error})"
                self._next_trial_s = now_s + TRIAL_EVERY_S
        if batch.given_up or batch.stage == TRIAL:
            return False
        if batch.error is None:
            self._failures = 0
        else:
            self.n_failed += 1
            self._failures += len(batch.rows) <= 1  # the rows of a larger batch are retried alone first
        return True

    def trial(self, now_s: float) -> Batch | None:
        """A trial to run now, if one is due."""
        wanted = now_s >= self._next_trial_s or (self.unsound is None and self._failures >= FAILURES_BEFORE_TRIAL)
        if not wanted or self._trial is not None or not self.lanes_left:
            return None
        self._trial = Batch(TRIAL, [])
        self._next_trial_s = inf
        return self._trial

    def look(self, now_s: float) -> list[Batch]:
        """Give up batches that hang, and those queued behind them on their lanes; returns both.

        Call it when `next_s` has come.
        """
        if now_s < self._next_look_s:
            return []
        self._next_look_s = now_s + LOOK_EVERY_S
        hung = []
        for batch, seen in list(self.running.items()):
            if not batch.started_s:
                continue  # not begun
            self.running[batch] = seen + 1
            if seen + 1 >= (TRIAL_LOOKS if batch.stage == TRIAL else self._looks[batch.stage]):
                hung.append(batch)
        for batch in hung:
            del self.running[batch]
            batch.given_up = batch.hung = True
            self.lanes_lost += 1
            self.n_hung += 1
            if batch is self._trial:
                self._trial = None
                self._next_trial_s = now_s + TRIAL_EVERY_S
        for batch in [batch for batch in self.running if batch.behind in hung]:
            del self.running[batch]
            batch.given_up = True
            hung.append(batch)
        if hung and not self.lanes_left:
            self.unsound = f"all {self.n_lanes} lanes hang"
            self._next_trial_s = inf  # set when the first lane comes back
        return hung

    def give_up_all(self) -> None:
        """Give up all running batches except a trial."""
        for batch in self.running:
            batch.given_up = batch.stage != TRIAL
        self.running = {batch: seen for batch, seen in self.running.items() if batch.stage == TRIAL}
