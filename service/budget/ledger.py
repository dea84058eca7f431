"""The accounts of images, and the hard bound over all of them.

Plain Python over integers (multiply-adds), so that totals are exact: no clock, no thread, no array.
"""

from dataclasses import dataclass
from typing import Final

from service.budget.trail import Trail

ROLLING_ANSWERS: Final = 1_000
MANY_IN_FLIGHT: Final = 1_024
WINDOW_IN_FLIGHT: Final = 4


def window_for(max_in_flight: int) -> int:
    """How many last answers must average within the budget, given how many images may be in flight.

    Hard images answer last, so those of many answers are in flight together. If these answers outnumber the window, the
    easy ones among them have left it, and the hard ones would have to be cut short.
    """
    return ROLLING_ANSWERS if max_in_flight <= MANY_IN_FLIGHT else WINDOW_IN_FLIGHT * max_in_flight


@dataclass(slots=True, eq=False)
class Account:
    """What each image admitted together may spend (multiply-adds): one object for all of them.

    What an image has committed and spent follows from its stage.
    """

    allowance: int
    aim: float = 0.0  # the average spending that steering aims at, just below the allowance


class Ledger:
    """The hard bound: over any n consecutive answers the spending is at most the sum of their allowances plus the cap.

    Proof. Let S be `settled` and R `reserved`, the sum over images in flight of max(0, committed - allowance).
    (1) R <= S always: committing checks it; an answer with excess e takes the same e from S and from R; an answer
    without excess only raises S; a lower cap never cuts S below R. As R >= 0, also S >= 0.
    (2) An answer changes S by at most allowance - spent (the cap can only make it less), so after answers i+1..j:
    0 <= S_j <= S_i + sum(allowances) - sum(spent). With S_i <= cap this is the bound; if the budget was changed in
    between, cap is the largest of the caps.

    An abandoned image pays for its excess like any other but deposits nothing: the answers pay for it, never the cap.

    With `average_over`, a second bound holds: whenever traffic stops, the last `average_over` answers have spent no
    more than their allowances. Invariant: the answers that would then be among them, plus what the images in flight
    have committed, keep to it. Committing checks this; an answer moves an image from one sum to the other; a new image
    replaces an answer that cannot have cost less. The bound starts over with every new allowance and presumes at most
    `average_over` images in flight. Exception: an abandoned image may bring an older, dearer answer back into the sum.
    """

    def __init__(self, allowance: int, burst_images: float, average_over: int = 0) -> None:
        self.burst_images = burst_images
        self.allowance = allowance
        self.cap = int(burst_images * allowance)
        self.settled = self.cap
        self.reserved = 0
        self.answered = 0
        self.abandoned = 0  # given up, failed, or too late
        self.abandoned_unspent = 0  # those among them that had spent nothing
        self.spent_answered = 0
        self.spent_abandoned = 0
        self._spent: Trail = Trail(ROLLING_ANSWERS, 0)  # of `spent_answered`
        self._newest = Account(allowance)
        self._average_over = average_over
        self._n_in_flight = 0
        self._uncommitted = 0  # allowances of the images in flight, less what they have committed
        self._begin_average()

    @property
    def rolling_average(self) -> float | None:
        """Mean spending of the last 1,000 answers, in multiply-adds; None before the first."""
        n_answers = min(self.answered, ROLLING_ANSWERS)
        return (self.spent_answered - self._spent.ago(n_answers)) / n_answers if n_answers else None

    def open(self, first_cost: int, n_images: int = 1, aim: float = 0.0) -> Account:
        """Admit images and commit them to their first stage, which the budget always covers; returns their account."""
        allowance, account = self.allowance, self._newest
        self.reserved += n_images * max(0, first_cost - allowance)
        self._n_in_flight += n_images
        self._uncommitted += n_images * (allowance - first_cost)
        if account.allowance != allowance or account.aim != aim:  # otherwise the newest account serves for these, too
            self._newest = account = Account(allowance, aim)
        return account

    def commit(self, account: Account, n_images: int, committed: int, cumulative_cost: int) -> int:
        """Raise the commitment of images from `committed` to `cumulative_cost` each, for as many as the bounds allow;
        returns how many."""
        allowance, step = account.allowance, cumulative_cost - committed
        excess = max(cumulative_cost, allowance) - max(committed, allowance)
        if n_images * excess > self.settled - self.reserved:
            n_images = (self.settled - self.reserved) // excess
        if self._average_over and n_images:
            free = self._free_of_average
            if free is not None and n_images * step > free:
                n_images = max(0, free // step)
        self._uncommitted -= n_images * step
        self.reserved += n_images * excess
        return n_images

    def close(self, account: Account, n_images: int, committed: int, spent: int, answered: bool) -> None:
        """Settle images that were answered or given up; `committed` and `spent` are per image."""
        excess, balance = committed - account.allowance, account.allowance - spent
        if excess > 0:
            self.reserved -= n_images * excess
        self._uncommitted += n_images * excess
        if balance < 0:
            self.settled += n_images * balance
        elif answered and self.settled < self.cap:
            self.settled = min(self.cap, self.settled + n_images * balance)
        self._n_in_flight -= n_images
        if answered:
            if self._average_over:
                self._balances.add(self._balances.now, balance, n_images)
            self._spent.add(self.spent_answered, spent, n_images)
            self.answered += n_images
            self.spent_answered += n_images * spent
        else:
            self.abandoned += n_images
            if not spent:
                self.abandoned_unspent += n_images
            self.spent_abandoned += n_images * spent

    def work_at(self, allowance: int) -> None:
        """Give later admissions another allowance, at most the one that the cap is for. Balance and cap stay as they
        are, so that an allowance that moves all the time neither creates nor wears down a balance."""
        self._begin_average()
        self.allowance = allowance

    def set_allowance(self, allowance: int) -> None:
        """Give later admissions another allowance. A lower one cuts the balance at its cap; a higher one raises only
        the cap. So switching back and forth neither creates a balance nor wears it down further."""
        cap = int(self.burst_images * allowance)
        self.settled = max(self.reserved, min(self.settled, cap))
        self.allowance, self.cap = allowance, cap
        self._begin_average()

    def _begin_average(self) -> None:
        self._balances: Trail = Trail(self._average_over, 0)  # of allowance - spent, summed over answers since then

    @property
    def _free_of_average(self) -> int | None:
        """How much more the images in flight may commit together so that, whenever traffic stops, the last answers keep
        to their allowances; None if there is no limit yet."""
        if self._balances.n_answers < self._average_over:
            return None
        balance: int = self._balances.now - self._balances.ago(self._average_over - self._n_in_flight)
        return balance + self._uncommitted
