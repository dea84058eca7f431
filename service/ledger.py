"""The account of every image and the hard bound over all of them.

Plain Python over integers (multiply-adds), so that totals are exact: no clock, no thread, no array.
"""

from collections import deque
from dataclasses import dataclass

ROLLING_ANSWERS = 1_000


@dataclass(slots=True)
class Account:
    """What one image may spend, has committed to, and has spent (multiply-adds)."""

    allowance: int
    committed: int
    stages: int = 1  # it is committed to, the one it runs or waits for among them
    spent: int = 0
    aim: float = 0.0  # what steering means it to spend on average, just below the allowance


class Ledger:
    """The hard bound: over any n consecutive answers the spending is at most the sum of their allowances plus the cap.

    Proof. Let S be `settled` and R `reserved`, the sum over images in flight of max(0, committed - allowance).
    (1) R <= S always: committing checks it; an answer with excess e takes the same e from S and from R; an answer
    without excess only raises S; a lower cap never cuts S below R. As R >= 0, so is S.
    (2) An answer changes S by at most allowance - spent (the cap can only make it less), so after answers i+1..j:
    0 <= S_j <= S_i + sum(allowances) - sum(spent). With S_i <= cap this is the bound; where the budget was changed
    on the way, cap is the largest of the caps.

    An abandoned image pays for its excess like any other but deposits nothing: the answers pay for it, never the cap.
    """

    def __init__(self, allowance: int, burst_images: float) -> None:
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

    @property
    def rolling_average(self) -> float | None:
        """Mean spending of the last 1,000 answers, in multiply-adds; None before the first."""
        return self._recent_sum / len(self._recent) if self._recent else None

    def open(self, first_cost: int) -> Account:
        """Admit an image and commit it to its first stage, which the budget always covers."""
        account = Account(self.allowance, first_cost)
        self.reserved += max(0, first_cost - account.allowance)
        return account

    def commit(self, account: Account, cumulative_cost: int) -> bool:
        """Commit to spending `cumulative_cost` in all, unless the settled balance cannot cover the excess."""
        more = max(0, cumulative_cost - account.allowance) - max(0, account.committed - account.allowance)
        if self.reserved + more > self.settled:
            return False
        self.reserved += more
        account.committed = cumulative_cost
        account.stages += 1
        return True

    def close(self, account: Account, answered: bool) -> None:
        """Settle an image that has answered, or was given up, with what it has spent."""
        self.reserved -= max(0, account.committed - account.allowance)
        balance = account.allowance - account.spent
        if balance < 0:
            self.settled += balance
        elif answered:
            self.settled = max(self.settled, min(self.cap, self.settled + balance))
        if not answered:
            self.abandoned += 1
            self.spent_abandoned += account.spent
            return
        self.answered += 1
        self.spent_answered += account.spent
        self._recent.append(account.spent)
        self._recent_sum += account.spent
        if len(self._recent) > ROLLING_ANSWERS:
            self._recent_sum -= self._recent.popleft()

    def work_at(self, allowance: int) -> None:
        """Give later admissions another allowance, below what the cap was set for. Balance and cap stay as they are, so
        that an allowance that moves all the time wears the balance down no more than it mints one."""
        self.allowance = allowance

    def set_allowance(self, allowance: int) -> None:
        """Give later admissions another allowance. A lower one shrinks the balance in proportion, a higher one grows
        only the cap: a balance is earned, else changing to and fro would mint it."""
        cap = int(self.burst_images * allowance)
        if cap < self.cap:
            self.settled = max(self.reserved, self.settled * cap // self.cap)
        self.allowance, self.cap = allowance, cap
