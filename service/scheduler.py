"""Decides which rows run next, and together: one queue per stage, rows regrouped at every exit.

Plain Python: the caller tells the time and runs what is picked. Stages are counted from 0 here. A row is any hashable
object and waits in at most one queue.
"""

from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import inf
from typing import Generic, TypeVar

from service.costs import CostTable
from service.limits import RowLimits
from service.policies import POLICIES

Row = TypeVar("Row", bound=Hashable)


@dataclass(slots=True, eq=False)
class _Group:
    """Rows added together: arrivals, or those of one batch that go on."""

    joined: bool  # they lie side by side, and as a batch of their own need no copy
    n_rows: int = 0  # that wait


@dataclass(slots=True, eq=False)
class _Entry(Generic[Row]):
    row: Row | None  # None once dropped: whoever comes upon it skips it
    added_s: float
    due_s: float
    group: _Group


@dataclass(slots=True, eq=False)
class _Queue(Generic[Row]):
    entries: deque[_Entry[Row]] = field(default_factory=deque)
    n_rows: int = 0  # those not dropped
    n_due: int = 0  # of these, with a deadline

    def head(self) -> _Entry[Row] | None:
        while self.entries and self.entries[0].row is None:
            self.entries.popleft()
        return self.entries[0] if self.entries else None

    def left(self, entry: _Entry[Row]) -> None:
        """Account for a row that was taken or dropped."""
        self.n_rows -= 1
        entry.group.n_rows -= 1
        if entry.due_s < inf:
            self.n_due -= 1


class Scheduler(Generic[Row]):
    """One queue per stage; `pick` takes the next batch from one of them.

    Work is conserved: `pick` returns None only when every queue is empty. In this order, it runs
    1. a queue in which a row's deadline comes too close for another batch before it (every other time at most);
    2. the deepest queue that is full, or whose head has waited for `max_wait_s`, or that is ripe: to wait for company
       would cost its rows more than a larger batch saves (`Policy.is_ripe`). Deep rows have cost the most, and their
       answers free memory and clients soonest;
    3. the longest queue.
    A batch is taken from the queue's front, oldest first; it grows by further groups of rows while merging them saves
    more than it copies (`Policy.merges`).

    No row starves. Once it has waited `max_wait_s`, nothing is picked before it but older rows of its queue, rows of
    deeper queues, and, every other time at most, rows with a deadline. What is deeper was let there by picks of older
    rows; rows picked from shallower queues come to wait behind it. So with W rows in the scheduler, each of which can
    go deeper `n_stages` times at most, it is picked at the latest `2 x W x n_stages` picks later; without deadlines
    `W x n_stages`. Where batches are full it is about `W / max_rows x n_stages`.

    Args:
        n_stages: stages, one queue each.
        max_rows: the largest batch.
        max_wait_s: how long a queue may wait to become a larger batch while others run.
        costs: what batches take, followed by the caller; without it, nothing costs anything, and no queue waits.
        policy: a key of `POLICIES`.

    Attributes:
        costs: may be replaced, once they have been measured.
        limits: of batches, by stage; told by the caller of those that ran and failed.
        policy: what the key stands for.

    Raises:
        ValueError: the policy is unknown, or a number is out of range.
    """

    def __init__(
        self,
        n_stages: int,
        max_rows: int = 32,
        max_wait_s: float = 0.05,
        costs: CostTable | None = None,
        policy: str = "default",
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"unknown scheduling policy {policy!r}: give one of {', '.join(POLICIES)}")
        if n_stages < 1 or max_rows < 1 or max_wait_s < 0:
            raise ValueError("n_stages and max_rows must be at least 1, max_wait_s at least 0")
        self.max_rows = max_rows
        self.limits = RowLimits(n_stages, max_rows)
        self.max_wait_s = max_wait_s
        self.costs = costs or CostTable([{1: 0.0}] * n_stages)
        self.policy = POLICIES[policy]
        self._queues: list[_Queue[Row]] = [_Queue() for _ in range(n_stages)]
        self._place: dict[Row, tuple[_Queue[Row], _Entry[Row]]] = {}
        self._hurried = False  # the last batch was picked for a deadline

    def __len__(self) -> int:
        return len(self._place)

    def queued_rows(self, stage: int) -> int:
        return self._queues[stage].n_rows

    def add(
        self,
        rows: Iterable[Row],
        stage: int,
        now_s: float,
        joined: bool = False,
        due_s: Sequence[float] | None = None,
    ) -> None:
        """Queue rows for a stage: arrivals for stage 0, or those of one batch that go on to the stage after it.

        Args:
            rows: in the order in which they lie in memory.
            stage: from 0.
            now_s: the time.
            joined: they lie side by side, so that they can run together without being copied.
            due_s: the rows' deadlines, infinite where a row has none; None where none has.

        Raises:
            ValueError: a row already waits.
        """
        queue, group = self._queues[stage], _Group(joined)
        for i, row in enumerate(rows):
            if row in self._place:
                raise ValueError(f"{row!r} already waits")
            entry = _Entry(row, now_s, inf if due_s is None else due_s[i], group)
            self._place[row] = queue, entry
            queue.entries.append(entry)
            queue.n_rows += 1
            group.n_rows += 1
            if entry.due_s < inf:
                queue.n_due += 1

    def drop(self, row: Row) -> bool:
        """Take a row out of its queue; False if it does not wait in any (it runs, or is gone)."""
        place = self._place.pop(row, None)
        if place is None:
            return False
        queue, entry = place
        entry.row = None
        queue.left(entry)
        return True

    def pick(self, now_s: float) -> tuple[int, list[Row]] | None:
        """Take the next batch: its stage and its rows, oldest first; None if nothing waits."""
        if not self._place:
            return None
        stage = self._choose(now_s)
        return stage, self._take(stage)

    def _choose(self, now_s: float) -> int:
        queues, costs = self._queues, self.costs
        longest = max(range(len(queues)), key=lambda stage: (queues[stage].n_rows, stage))
        other_s = costs.seconds(longest, min(queues[longest].n_rows, self.limits.rows[longest]))
        hurried = None if self._hurried else self._hurrying(now_s, other_s)
        self._hurried = hurried is not None
        if hurried is not None:
            return hurried
        for stage in range(len(queues) - 1, -1, -1):
            n_rows = queues[stage].n_rows
            if n_rows and (
                n_rows >= self.limits.rows[stage]
                or self._is_overdue(stage, now_s)
                or self.policy.is_ripe(costs, stage, n_rows, len(self._place), other_s)
            ):
                return stage
        return longest

    def _is_overdue(self, stage: int, now_s: float) -> bool:
        head = self._queues[stage].head()
        return head is not None and now_s - head.added_s >= self.max_wait_s

    def _hurrying(self, now_s: float, other_s: float) -> int | None:
        """The deepest stage of which a row at the front has just the time left to run it, but for no batch before it.

        A deadline too near even for that is met with the answer at hand. A row that has none, before stage 0, hurries
        until the last moment: what has begun is answered.
        """
        for stage in range(len(self._queues) - 1, -1, -1):
            queue = self._queues[stage]
            if not queue.n_due:
                continue
            run_s = self.costs.seconds(stage, min(queue.n_rows, self.limits.rows[stage]))
            soonest_s = now_s + run_s if stage else now_s
            for entry in islice(queue.entries, self.limits.rows[stage]):
                if entry.row is not None and soonest_s <= entry.due_s < now_s + other_s + run_s:
                    return stage
        return None

    def _take(self, stage: int) -> list[Row]:
        queue = self._queues[stage]
        entries, max_rows = queue.entries, self.limits.rows[stage]
        rows: list[Row] = []
        group: _Group | None = None
        uncopied_rows = 0  # of this batch, were it not to grow
        while entries and len(rows) < max_rows:
            entry = entries[0]
            if entry.row is not None:
                if stage and entry.group is not group:
                    if group is not None and not self._merges(stage, len(rows), uncopied_rows, entry.group):
                        break
                    uncopied_rows = entry.group.n_rows if group is None and entry.group.joined else 0
                    group = entry.group
                rows.append(entry.row)
                del self._place[entry.row]
                queue.left(entry)
            entries.popleft()
        return rows

    def _merges(self, stage: int, n_rows: int, uncopied_rows: int, group: _Group) -> bool:
        """Whether a batch of `n_rows` takes in (the first of) another group as well."""
        n_more = min(group.n_rows, self.limits.rows[stage] - n_rows)
        if n_more < group.n_rows and not self.policy.compact:
            return False  # a part of a group could not run as the whole lies
        copied_rows = uncopied_rows + (n_more if group.joined else 0)
        return self.policy.merges(self.costs, stage, n_more / group.n_rows, copied_rows)
