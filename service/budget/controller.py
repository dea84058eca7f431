"""Keeps the average compute per image within the budget that the operator sets.

Two parts with one task each. `Ledger` enforces the bound: whatever the traffic and the thresholds, any n consecutive
answers spend at most n x budget + burst x budget, and the last 1,000 before traffic stops average within the budget (a
longer window with thousands in flight: `ledger.window_for`). `Steering` moves the thresholds along the frontier so that
steady traffic ends just under the budget, and the ledger hardly ever has to refuse anything.

Plain Python over numbers: no clock, no thread, no array. One owner (the engine's thread) calls it.
"""

from collections.abc import Sequence
from math import isfinite
from typing import Final, Literal

from models.frontier import Frontier
from service.budget.ledger import ROLLING_ANSWERS, Account, Ledger
from service.budget.state import BudgetState
from service.budget.steering import MEGA, Steering

# Each image that goes on moves the thresholds slightly, and computing them takes time: so many images share them.
SAME_THRESHOLD_IMAGES: Final = 4
SAME_THRESHOLD_SHARE: Final = 16  # or a 16th of the batch, if that is more
Reason = Literal["confident", "final", "budget", "deadline", "pinned"]  # the last two by the request's own options


class BudgetController:
    """Decides at every exit which images go on.

    Args:
        frontier: of the network served, with costs in mflops.
        costs_mflops: cumulative executed cost by exit.
        budget_mflops: average per image.
        burst_images: how many budgets any run of answers may overspend in total; see `Ledger`.
        steer: False keeps the thresholds at the budget's point on the frontier; the ledger still bounds spending.
        window_answers: number of last answers that average within the budget; see `ledger.window_for`.

    Raises:
        ValueError: the budget is below the cost of the first exit or above that of the last.
    """

    def __init__(
        self,
        frontier: Frontier,
        costs_mflops: Sequence[float],
        budget_mflops: float,
        burst_images: float = 32.0,
        steer: bool = True,
        window_answers: int = ROLLING_ANSWERS,
    ) -> None:
        self.costs = tuple(round(cost * MEGA) for cost in costs_mflops)
        self.budget = self._checked(budget_mflops)
        self.ledger = Ledger(self.budget, burst_images, window_answers if steer else 0)
        self.steering = Steering(frontier, self.costs, self.ledger.allowance, window_answers)
        self._frontier = frontier
        self._steer = steer
        self._hold()

    @property
    def thresholds(self) -> tuple[float, ...]:
        return self._held.thresholds if self._held else self.steering.thresholds

    def set(self, budget_mflops: float) -> None:
        """Set the budget (average mflops per image) of images admitted from now on.

        Raises:
            ValueError: it is below the cost of the first exit or above that of the last.
        """
        budget = self._checked(budget_mflops)
        if budget == self.budget == self.ledger.allowance:
            return  # setting the same budget repeatedly must not restart the ledger's average each time
        self.budget = budget
        self.ledger.set_allowance(self.budget)
        self.steering.set_budget(self.budget)
        self._hold()

    @property
    def working_mflops(self) -> float:
        """The budget enforced at the moment: the one that was set, or less (`work_at`)."""
        return self.ledger.allowance / MEGA

    @property
    def useful_mflops(self) -> tuple[float, float]:
        """The range of effective working budgets: up to the budget that was set, or the frontier's end if lower."""
        lowest = self.costs[0]
        return lowest / MEGA, max(lowest, min(self.budget, self.steering.highest)) / MEGA

    def work_at(self, mflops: float) -> None:
        """Set the working budget of images admitted from now on, at most the budget that was set; `set` ends it.

        Cheap enough for a budget that moves all the time. From the end of `useful_mflops` on, it is the budget itself.
        """
        lowest, highest = self.useful_mflops
        working = self.budget if mflops >= highest else round(max(mflops, lowest) * MEGA)
        if working != self.ledger.allowance:
            self.ledger.work_at(working)
            self.steering.set_budget(working)
            self._hold()

    def admit(self, n_images: int) -> Account:
        """Open an account for images and commit them to stage 1; returns the account."""
        return self.ledger.open(self.costs[0], n_images, self.steering.admit(n_images))

    def decide(self, accounts: list[Account], passed: int, scores: list[float]) -> list[Reason | None]:
        """Decide which images leave at exit `passed` (from 1), which all have just passed with `scores`. Return for
        each the reason, its account settled; or None if it goes on, committed to the next stage."""
        n_images = len(accounts)
        if passed == len(self.costs):
            self.settle(accounts, passed)
            return ["final"] * n_images
        reasons: list[Reason | None] = ["confident"] * n_images
        step = max(SAME_THRESHOLD_IMAGES, n_images // SAME_THRESHOLD_SHARE)
        held, threshold, start = self._held, 0.0, 0
        while start < n_images:
            if start % step == 0:
                threshold = self.steering.threshold(passed) if held is None else held.thresholds[passed - 1]
            # Advance to where the threshold moves, or another account begins.
            account, stop, n_unsure = accounts[start], start, 0
            end = min(start - start % step + step, n_images)
            while stop < end and accounts[stop] is account:  # mypyc compiles this to a loop in C
                if not scores[stop] >= threshold:  # also true for NaN
                    reasons[stop] = None
                    n_unsure += 1
                stop += 1
            n_going_on = self._commit(account, n_unsure, passed) if n_unsure else 0
            if n_going_on < n_unsure:
                _refuse(reasons, stop, n_unsure - n_going_on)
            if n_going_on < stop - start:
                self._settle(account, stop - start - n_going_on, passed, self.costs[passed - 1], True)
            start = stop
        return reasons

    def _commit(self, account: Account, n_images: int, passed: int) -> int:
        """Commit as many images beyond exit `passed` as the ledger allows; returns how many."""
        n_going_on = self.ledger.commit(account, n_images, self.costs[passed - 1], self.costs[passed])
        if n_going_on < n_images:
            self.steering.refuse(passed, n_images - n_going_on)
        if n_going_on:
            self.steering.go_on(passed, n_going_on)
        return n_going_on

    def settle(self, accounts: list[Account], stages: int, ran: bool = True, answered: bool = True) -> None:
        """Settle images that were answered or, with `answered` False, given up (abandoned, failed, or too late).

        Args:
            stages: number of stages to which they are committed.
            ran: whether they have run, or are running, the last of these; False if they wait for it.
        """
        spent = self.costs[stages - 1] if ran else self.costs[stages - 2] if stages > 1 else 0
        start, n_images = 0, len(accounts)
        while start < n_images:
            account, stop = accounts[start], start + 1
            while stop < n_images and accounts[stop] is account:
                stop += 1
            self._settle(account, stop - start, stages, spent, answered)
            start = stop

    def _settle(self, account: Account, n_images: int, stages: int, spent: int, answered: bool) -> None:
        self.steering.settle(account.aim, n_images, stages, spent, answered)
        self.ledger.close(account, n_images, self.costs[stages - 1], spent, answered)

    def refresh(self) -> None:
        """Update the slowly moving parts of steering; call it once per batch."""
        self.steering.refresh()

    def state(self) -> BudgetState:
        ledger, point = self.ledger, self._held or self.steering.point
        rolling = ledger.rolling_average
        return BudgetState(
            budget_mflops=self.budget / MEGA,
            fraction=self.budget / self.costs[-1],
            working_mflops=self.working_mflops,
            burst_images=ledger.burst_images,
            position=point.position,
            thresholds=self.thresholds,
            expected_mflops=point.cost,
            expected_accuracy=point.accuracy,
            expected_shares=point.shares,
            frontier_limited=self.steering.highest < self.budget,
            rolling_mflops=None if rolling is None else rolling / MEGA,
            settled_mflops=ledger.settled / MEGA,
            reserved_mflops=ledger.reserved / MEGA,
            answered=ledger.answered,
            abandoned=ledger.abandoned,
            spent_answered_mflops=ledger.spent_answered / MEGA,
            spent_abandoned_mflops=ledger.spent_abandoned / MEGA,
        )

    def _checked(self, budget_mflops: float) -> int:
        # Compared in whole multiply-adds: a limit converted from floats may be off by a fraction of one.
        multiply_adds = budget_mflops * MEGA
        budget = round(multiply_adds) if isfinite(multiply_adds) else -1
        if not self.costs[0] <= budget <= self.costs[-1]:
            low, high = self.costs[0] / MEGA, self.costs[-1] / MEGA
            raise ValueError(
                f"a budget of {budget_mflops:g} mflops is out of reach: the first exit costs {low:g} and the last "
                f"{high:g}; give a number between the two"
            )
        return budget

    def _hold(self) -> None:
        """Without steering, hold the thresholds at the budget's point on the frontier."""
        self._held = None if self._steer else self._frontier.at_cost(self.ledger.allowance / MEGA)


def _refuse(reasons: list[Reason | None], stop: int, n_images: int) -> None:
    """Give the reason "budget" to the last `n_images` before `stop` that would have gone on."""
    while n_images:
        stop -= 1
        if reasons[stop] is None:
            reasons[stop] = "budget"
            n_images -= 1
