"""Keeps a latency target by lowering the working budget: answers get less accurate before requests are refused.

Plain Python over numbers, without a clock. The engine's thread owns it; only `took` may be called by any thread.
"""

from collections import deque
from math import inf

from service.budget.controller import BudgetController
from service.budget.latency import LatencyControl, LatencyState


class Degrade:
    """Applies the decisions of a `LatencyControl` to the budget and to admission, if there is a target.

    Args:
        budget: its working budget is moved.
        max_rows: images that may be in flight.

    Attributes:
        limited_total_s: seconds since the start in which the working budget was below the one that was set.
    """

    SMALLEST_MOVE = 0.01  # of the working budget
    FULL = 0.6  # share of `max_rows` that counts as full
    REFUSE_FROM = 0.75  # of the target: longest predicted wait at the lowest budget, so that p95 stays below the target

    def __init__(self, budget: BudgetController, max_rows: int) -> None:
        self.limited_total_s = 0.0
        self._budget = budget
        self._full_rows = self.FULL * max_rows
        self._control: LatencyControl | None = None
        self._asked: tuple[float, float | None] = (0.0, None)
        self._reports: deque[float] = deque(maxlen=LatencyControl.MANY)
        self._limited_from_s: float | None = None
        self._noted_s = 0.0

    def took(self, seconds: float) -> None:
        """Report that an answer took `seconds` from the end of its request's body. For any thread, at any time."""
        if self._control is not None:
            self._reports.append(seconds)

    def set(self, budget_mflops: float, target_s: float | None, now_s: float) -> None:
        """Set the budget, and the latency target for which the working budget may be lowered (None: it never is).

        Raises:
            ValueError: the budget is out of range, or the target not a positive time; nothing has changed then.
        """
        if target_s is not None and not 0 < target_s < inf:
            raise ValueError(f"a latency target must be a positive time, not {target_s:g} s")
        working_mflops = self._budget.working_mflops if self._limited_from_s is not None else inf
        if self._control is not None and (budget_mflops, target_s) == self._asked:
            return  # keep what was measured for it
        self._budget.set(budget_mflops)
        self._asked, self._control = (budget_mflops, target_s), None
        self._reports.clear()  # they date from before this target
        if target_s is not None:  # the load is the same as before, so start from the previous working budget
            self._control = LatencyControl(target_s, *self._budget.useful_mflops, working_mflops, now_s)
            self._budget.work_at(working_mflops)
        self._note(now_s)

    def follow(self, now_s: float, in_flight: int, row_s: float) -> None:
        """Move the working budget; call it about once per batch, before images are admitted.

        Args:
            row_s: predicted wait that each image in flight adds.
        """
        control = self._control
        if control is None:
            return
        while self._reports:
            control.answered(self._reports.popleft(), now_s)
        lowest, highest = self._budget.useful_mflops
        wanted = control.budget(now_s, in_flight * row_s, in_flight / self._full_rows)
        for end in (lowest, highest):
            if abs(wanted - end) < self.SMALLEST_MOVE * end:
                wanted = end
        working = min(self._budget.working_mflops, highest)
        if wanted in (lowest, highest) or abs(wanted - working) >= self.SMALLEST_MOVE * working:
            self._budget.work_at(wanted)
        self._note(now_s)

    def bearable_wait_s(self, max_queue_s: float) -> float:
        """The predicted wait beyond which images are refused.

        Predictions rest on what images cost lately, but are judged by what they would be at the lowest budget, hence
        the factor. At the lowest budget, the target is the limit too, so that accepted images are answered in time.
        """
        if self._control is None:
            return max_queue_s
        cost_lately = self._budget.ledger.rolling_average or self._budget.costs[-1]
        if self._is_lowest:
            max_queue_s = min(max_queue_s, self.REFUSE_FROM * self._control.target_s)
        return max_queue_s * max(1.0, cost_lately / self._budget.costs[0])

    def state(self, now_s: float) -> LatencyState | None:
        """The latency target and its effect; None without a target."""
        control = self._control
        if control is None:
            return None
        limited_s = None if self._limited_from_s is None else now_s - self._limited_from_s
        is_lowest = self._is_lowest and limited_s is not None
        return LatencyState(control.target_s, control.p95_s, control.n_answers, limited_s, is_lowest)

    def _note(self, now_s: float) -> None:
        """Account for the time below the budget."""
        if self._limited_from_s is not None:
            self.limited_total_s += now_s - self._noted_s
        if self._budget.ledger.allowance == self._budget.budget:
            self._limited_from_s = None
        elif self._limited_from_s is None:
            self._limited_from_s = now_s
        self._noted_s = now_s

    @property
    def _is_lowest(self) -> bool:
        return self._budget.ledger.allowance == self._budget.costs[0]
