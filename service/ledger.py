"""The account of every image and the hard bound over all of them.

Plain Python over integers (multiply-adds), so that totals are exact: no clock, no thread, no array.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

ROLLING_ANSWERS = 1_000


@dataclass(slots=True)
class Account:
    """What one image may spend, has committed to, and has spent (multiply-adds)."""

    allowance: int
    committed: int
    aim: float = 0.0  # what steering means it to spend on average, just below the allowance
    stages: int = 1  # it is committed to, the one it runs or waits for among them
    spent: int = 0


class Ledger:
    """The hard bound: over any n consecutive answers the spending is at most the sum of their allowances plus the cap.

    Proof. Let S be `settled` and R `reserved`, the sum over images in flight of max(0, committed - allowance).
    (1) R <= S always: committing checks it; an answer with excess e takes the same e from S and from R; an answer
    without excess only raises S; a lower cap never cuts S below R. As R >= 0, so is S.
    (2) An answer changes S by at most allowance - spent (the cap can only make it less), so after answers i+1..j:
    0 <= S_j <= S_i + sum(allowances) - sum(spent). With S_i <= cap this is the bound; where the budget was changed
    on the way, cap is the largest of the caps.

    An abandoned image pays for its excess like any other but deposits nothing: the answers pay for it, never the cap.

    With `average_over` a second bound holds: whenever traffic stops, the last so many answers have spent no more than
    their allowances. For at every moment the answers that would be among them, and what the images in flight have
    committed, keep to it. Committing checks that; an answer moves an image from one sum to the other; and a new image
    takes the place of an answer that cannot have cost less. It begins anew with another allowance, needs no more images
    in flight than that, and an image that is abandoned may give its place to an older, dearer answer.
    """

    def __init__(self, allowance: int, burst_images: float, average_over: int = 0) -> None:
        self.burst_images = burst_images
        self.allowance = allowance
        self.cap = int(burst_images * allowance)
        self.settled = self.cap
        self.reserved = 0
        self.answered = 0
        self.abandoned = 0
        self.spent_answered = 0
        self.spent_abandoned = 0
        self._recent: deque[int] = deque()
        self._recent_sum = 0
        self._average_over = average_over
        self._n_in_flight = 0
        self._uncommitted = 0  # their allowances, less what they have committed
        self._balances = [0] * (average_over + 1)  # a ring: after each of the latest answers, under this allowance
        self._begin_average()

    @property
    def rolling_average(self) -> float | None:
        """Mean spending of the last 1,000 answers, in multiply-adds; None before the first."""
        return self._recent_sum / len(self._recent) if self._recent else None

    def open(self, first_cost: int, n_images: int = 1, aim: float = 0.0) -> list[Account]:
        """Admit images and commit them to their first stage, which the budget always covers."""
        allowance = self.allowance
        self.reserved += n_images * max(0, first_cost - allowance)
        self._n_in_flight += n_images
        self._uncommitted += n_images * (allowance - first_cost)
        return [Account(allowance, first_cost, aim) for _ in range(n_images)]

    def commit(self, account: Account, cumulative_cost: int) -> bool:
        """Commit to spending `cumulative_cost` in all, unless a bound forbids it."""
        allowance, committed = account.allowance, account.committed
        # How much more lies beyond the allowance, spelt out: this is done for every image, and `max` takes time.
        more = (cumulative_cost if cumulative_cost > allowance else allowance) - (
            committed if committed > allowance else allowance
        )
        if self.reserved + more > self.settled:
            return False
        step = cumulative_cost - committed
        if self._average_over and not self._average_allows(step):
            return False
        self._uncommitted -= step
        self.reserved += more
        account.committed = cumulative_cost
        account.stages += 1
        return True

    def close(self, accounts: Sequence[Account], answered: bool) -> None:
        """Settle images that have answered, or were given up, with what they have spent."""
        for account in accounts:
            excess, balance = account.committed - account.allowance, account.allowance - account.spent
            if excess > 0:
                self.reserved -= excess
            self._uncommitted += excess
            if balance < 0:
                self.settled += balance
            elif answered and self.settled < self.cap:
                self.settled = min(self.cap, self.settled + balance)
        self._n_in_flight -= len(accounts)
        spent = [account.spent for account in accounts]
        if answered:
            self.answered += len(accounts)
            self.spent_answered += sum(spent)
            self._remember(spent, [account.allowance - account.spent for account in accounts])
        else:
            self.abandoned += len(accounts)
            self.spent_abandoned += sum(spent)

    def _remember(self, spent: Sequence[int], balances: Sequence[int]) -> None:
        """Note answers, for the averages over the latest ones."""
        recent = self._recent
        recent += spent
        self._recent_sum += sum(spent)
        while len(recent) > ROLLING_ANSWERS:
            self._recent_sum -= recent.popleft()
        for balance in balances:
            self._balance += balance
            self._n_balances += 1
            self._balances[self._n_balances % len(self._balances)] = self._balance

    def work_at(self, allowance: int) -> None:
        """Give later admissions another allowance, below what the cap was set for. Balance and cap stay as they are, so
        that an allowance that moves all the time wears the balance down no more than it mints one."""
        self._begin_average()
        self.allowance = allowance

    def set_allowance(self, allowance: int) -> None:
        """Give later admissions another allowance. A lower one shrinks the balance in proportion, a higher one grows
        only the cap: a balance is earned, else changing to and fro would mint it."""
        cap = int(self.burst_images * allowance)
        if cap < self.cap:
            self.settled = max(self.reserved, self.settled * cap // self.cap)
        self.allowance, self.cap = allowance, cap
        self._begin_average()

    def _begin_average(self) -> None:
        self._balance = self._n_balances = 0
        self._balances[0] = 0

    def _average_allows(self, step: int) -> bool:
        """Whether the last answers keep to their allowances if all in flight end with what they have committed, and one
        of them with `step` more."""
        if self._n_balances < self._average_over:
            return True
        n_answered = max(self._average_over - self._n_in_flight, 0)
        before = self._balances[(self._n_balances - n_answered) % len(self._balances)]
        return self._balance - before + self._uncommitted >= step
