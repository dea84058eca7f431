"""Decides which rows run next, and which run together: one queue per stage, rows regrouped at every exit.

Plain Python: the caller passes the time and runs what is picked. Stages are counted from 0. A row is any hashable
object. It may wait in one queue only, which is not checked.
"""

from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from math import inf
from typing import Generic, TypeVar

from service.engine.costs import CostTable
from service.engine.policies import POLICIES
from service.runners.limits import RowLimits

Row = TypeVar("Row", bound=Hashable)


class _Group(Generic[Row]):
    """Rows added together: arrivals, or the rows of one batch that go on. Taken from the front, or dropped anywhere.

    Attributes:
        joined: the rows are adjacent in memory, so they need no copy to run as a batch of their own.
        due_s: the rows' deadlines, inf for a row without one; None if no row has one.
    """

    __slots__ = ("_first", "_rows", "added_s", "due_s", "joined")

    def __init__(self, rows: Sequence[Row], added_s: float, joined: bool, due_s: Sequence[float] | None) -> None:
        self.added_s, self.joined = added_s, joined
        self.due_s = None if due_s is None else list(due_s)
        self._rows = list(rows)
        self._first = 0  # rows before this index have been taken

    @property
    def n_rows(self) -> int:
        """Rows that wait."""
        return len(self._rows) - self._first

    def n_due(self, n_rows: int) -> int:
        """How many of the first `n_rows` waiting rows have a deadline."""
        if self.due_s is None:
            return 0
        return sum(due_s < inf for due_s in self.due_s[self._first : self._first + n_rows])

    def waiting_due_s(self) -> Sequence[float]:
        return () if self.due_s is None else self.due_s[self._first :]

    def take(self, n_rows: int) -> list[Row]:
        """Take up to `n_rows` rows from the front."""
        rows = self._rows[self._first : self._first + n_rows]
        self._first += len(rows)
        return rows

    def waiting(self) -> Sequence[Row]:
        return self._rows[self._first :]

    def drop(self, row: Row) -> bool:
        """Remove a row; returns whether it had a deadline."""
        i = self._rows.index(row, self._first)
        del self._rows[i]
        return self.due_s is not None and self.due_s.pop(i) < inf


class _Queue(Generic[Row]):
    """Groups of rows, oldest first.

    Attributes:
        n_rows: rows that wait.
        n_due: rows among them that have a deadline.
    """

    __slots__ = ("groups", "n_due", "n_rows")

    def __init__(self) -> None:
        self.groups: deque[_Group[Row]] = deque()
        self.n_rows = self.n_due = 0

    def head(self) -> _Group[Row] | None:
        while self.groups and not self.groups[0].n_rows:
            self.groups.popleft()
        return self.groups[0] if self.groups else None

    def due_s(self, n_rows: int) -> Iterator[float]:
        """Deadlines of the first `n_rows` rows, leaving out groups in which no row has one."""
        for group in self.groups:
            yield from group.waiting_due_s()[:n_rows]
            n_rows -= group.n_rows
            if n_rows <= 0:
                return


class Scheduler(Generic[Row]):
    """One queue per stage; `pick` takes the next batch from one of them.

    It is work-conserving: `pick` returns None only when every queue is empty. In order of preference, it runs
    1. a queue with a deadline so near that no other batch fits before it (at most every other time);
    2. the deepest queue that is full, whose head has waited for `max_wait_s`, or that is ripe: waiting for more rows
       would cost its rows more than a larger batch saves (`Policy.is_ripe`). Deep rows have cost the most, and their
       answers free memory and clients soonest;
    3. the longest queue.
    A batch is taken from the queue's front, oldest first. It grows by further groups of rows while merging them saves
    more than it costs in copies (`Policy.merges`).

    No row starves. Once it has waited for `max_wait_s`, only these are picked before it: older rows of its queue, rows
    of deeper queues and, at most every other time, rows with a deadline. Rows got into deeper queues by picks of older
    rows; rows picked from shallower queues queue up behind it. So with W rows in the scheduler, each of which can go
    deeper at most `n_stages` times, it is picked at most `2 x W x n_stages` picks later, or `W x n_stages` without
    deadlines. With full batches it is about `W / max_rows x n_stages`.

    Args:
        n_stages: stages, one queue each.
        max_rows: rows of the largest batch.
        max_wait_s: how long a queue may wait for a larger batch while others run.
        costs: batch times, updated by the caller; without it, all costs are 0 and no queue waits.
        policy: a key of `POLICIES`.

    Attributes:
        costs: may be replaced, once they have been measured.
        limits: batch size limits by stage; the caller reports batches that ran or failed.
        policy: the policy chosen.

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
        self.limits = RowLimits(n_stages, max_rows)
        self.max_wait_s = max_wait_s
        self.costs = costs or CostTable([{1: 0.0}] * n_stages)
        self.policy = POLICIES[policy]
        self._queues: list[_Queue[Row]] = [_Queue() for _ in range(n_stages)]
        self._n_rows = 0
        self._groups: dict[Row, tuple[int, _Group[Row]]] | None = None  # (stage, group) by row; None if out of date
        self._hurried = False  # the last batch was picked for a deadline

    def __len__(self) -> int:
        return self._n_rows

    @property
    def max_rows(self) -> int:
        """Rows of the largest batch; a stage may be limited to fewer (`limits`) if memory runs out."""
        return self.limits.max_rows

    def queued_rows(self, stage: int) -> int:
        return self._queues[stage].n_rows

    def add(
        self,
        rows: Sequence[Row],
        stage: int,
        now_s: float,
        joined: bool = False,
        due_s: Sequence[float] | None = None,
    ) -> None:
        """Queue rows for a stage: arrivals for stage 0, or the rows of one batch that go on to the next stage.

        Args:
            rows: in memory order.
            stage: from 0.
            now_s: the time.
            joined: the rows are adjacent in memory, so they can run together without a copy.
            due_s: the rows' deadlines, inf for a row without one; None if no row has one.
        """
        group = _Group(rows, now_s, joined, due_s)
        queue = self._queues[stage]
        queue.groups.append(group)
        queue.n_rows += len(rows)
        self._n_rows += len(rows)
        self._groups = None
        if due_s is not None:
            queue.n_due += group.n_due(len(rows))

    def drop(self, row: Row) -> int | None:
        """Remove a row from its queue; returns the stage for which it waited, None if it was not waiting.

        Rows are dropped far less often than they are added and picked. So the index of waiting rows is built at the
        first drop, and serves until rows are next added or picked.
        """
        if self._groups is None:
            waiting = [(stage, group) for stage, queue in enumerate(self._queues) for group in queue.groups]
            self._groups = {row: (stage, group) for stage, group in waiting for row in group.waiting()}
        found = self._groups.pop(row, None)
        if found is None:
            return None
        stage, group = found
        queue = self._queues[stage]
        queue.n_due -= group.drop(row)
        queue.n_rows -= 1
        self._n_rows -= 1
        return stage

    def drop_all(self) -> list[tuple[int, Row]]:
        """Remove all rows; returns them with the stages for which they waited."""
        waiting = [
            (stage, row)
            for stage, queue in enumerate(self._queues)
            for group in queue.groups
            for row in group.take(group.n_rows)
        ]
        self._queues = [_Queue() for _ in self._queues]
        self._n_rows, self._groups = 0, None
        return waiting

    def pick(self, now_s: float) -> tuple[int, list[Row]] | None:
        """Take the next batch: its stage and its rows, oldest first; None if nothing waits."""
        if not self._n_rows:
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
                or self.policy.is_ripe(costs, stage, n_rows, self._n_rows, other_s)
            ):
                return stage
        return longest

    def _is_overdue(self, stage: int, now_s: float) -> bool:
        head = self._queues[stage].head()
        return head is not None and now_s - head.added_s >= self.max_wait_s

    def _hurrying(self, now_s: float, other_s: float) -> int | None:
        """The deepest stage where a deadline among the first rows can be met now, but not after another batch.

        If it cannot be met even now, the row is answered from an earlier exit. In stage 0's queue a row has passed no
        exit, so it is hurried until its deadline: once it runs, it is answered.
        """
        for stage in range(len(self._queues) - 1, -1, -1):
            queue = self._queues[stage]
            if not queue.n_due:
                continue
            run_s = self.costs.seconds(stage, min(queue.n_rows, self.limits.rows[stage]))
            soonest_s = now_s + run_s if stage else now_s
            if any(soonest_s <= due_s < now_s + other_s + run_s for due_s in queue.due_s(self.limits.rows[stage])):
                return stage
        return None

    def _take(self, stage: int) -> list[Row]:
        queue, max_rows = self._queues[stage], self.limits.rows[stage]
        rows: list[Row] = []
        uncopied_rows = 0  # rows of this batch that need no copy unless it grows
        while len(rows) < max_rows and (group := queue.head()):
            if stage and rows and not self._merges(stage, len(rows), uncopied_rows, group):
                break
            uncopied_rows = group.n_rows if group.joined and not rows else 0
            n_more = max_rows - len(rows)
            queue.n_due -= group.n_due(n_more)
            rows += group.take(n_more)
        queue.n_rows -= len(rows)
        self._n_rows -= len(rows)
        self._groups = None
        return rows

    def _merges(self, stage: int, n_rows: int, uncopied_rows: int, group: _Group[Row]) -> bool:
        """Whether to add another group, or as many of its first rows as fit, to a batch of `n_rows`."""
        n_more = min(group.n_rows, self.limits.rows[stage] - n_rows)
        if n_more < group.n_rows and not self.policy.compact:
            return False  # without compaction, a group runs as a whole
        copied_rows = uncopied_rows + (n_more if group.joined else 0)
        return self.policy.merges(self.costs, stage, n_more / group.n_rows, copied_rows)
