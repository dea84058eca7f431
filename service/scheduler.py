"""Decides which rows run next, and together: one queue per stage, rows regrouped at every exit.

Plain Python: the caller tells the time and runs what is picked. Stages are counted from 0 here. A row is any hashable
object and waits in at most one queue.
"""

from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Generic, TypeVar

Row = TypeVar("Row", bound=Hashable)


@dataclass(slots=True, eq=False)
class _Entry(Generic[Row]):
    row: Row | None  # None once dropped: whoever comes upon it skips it
    added_s: float
    group: int  # rows added together


@dataclass(slots=True, eq=False)
class _Queue(Generic[Row]):
    entries: deque[_Entry[Row]] = field(default_factory=deque)
    n_rows: int = 0  # those not dropped

    def head(self) -> _Entry[Row] | None:
        while self.entries and self.entries[0].row is None:
            self.entries.popleft()
        return self.entries[0] if self.entries else None


@dataclass(frozen=True, slots=True)
class Policy:
    """How the next batch is chosen, from queues of which one at least is not empty.

    The deepest queue that is ripe runs, and if none is, the longest (the deeper of two). A queue is ripe with enough
    rows for an efficient batch, or with `wait` False with any, or once its head has waited long enough.
    """

    wait: bool = True
    merge: bool = True  # False: only rows that have been together since stage 0 share a batch


POLICIES: dict[str, Policy] = {
    "default": Policy(),
    "deepest": Policy(wait=False),
    "no-merge": Policy(wait=False, merge=False),  # compaction alone
}


def ripe_rows(fixed_s: float, per_row_s: float, max_rows: int, max_fixed_share: float = 0.15) -> int:
    """Return the rows from which the fixed part of `fixed + rows x per_row` is at most `max_fixed_share` of it.

    At most an eighth of `max_rows`: to wait for more holds back answers, and keeps dear rows in flight, for little.
    """
    if fixed_s <= 0 or per_row_s <= 0:
        return 1
    efficient = ceil(fixed_s * (1 - max_fixed_share) / (per_row_s * max_fixed_share))
    return max(1, min(efficient, max_rows // 8))


class Scheduler(Generic[Row]):
    """One queue per stage; `pick` takes the next batch from one of them.

    Work is conserved: `pick` returns None only when every queue is empty. Rows wait to be merged only while others run,
    and deep rows go first: they have cost the most, and their answers free memory and clients soonest.

    No row starves. Once it has waited `max_wait_s`, only older rows of its queue and rows of deeper queues can be
    picked before it, and what is deeper was let there by picks of older rows: with W rows in the scheduler, each of
    which can go deeper `n_stages` times at most, it is picked at the latest `W x n_stages` picks later. Where batches
    are full it is about `W / max_rows x n_stages`.

    Args:
        n_stages: stages, one queue each.
        max_rows: the largest batch.
        max_wait_s: how long a queue may wait to become an efficient batch while others run.
        ripe: per stage, the rows from which a batch is efficient; see `ripe_rows`.
        policy: a key of `POLICIES`.

    Raises:
        ValueError: the policy is unknown, or a number is out of range.
    """

    def __init__(
        self,
        n_stages: int,
        max_rows: int = 32,
        max_wait_s: float = 0.05,
        ripe: Sequence[int] | None = None,
        policy: str = "default",
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"unknown scheduling policy {policy!r}: give one of {', '.join(POLICIES)}")
        if n_stages < 1 or max_rows < 1 or max_wait_s < 0:
            raise ValueError("n_stages and max_rows must be at least 1, max_wait_s at least 0")
        self.max_rows = max_rows
        self.max_wait_s = max_wait_s
        self.ripe = tuple(ripe) if ripe is not None else (1,) * n_stages
        self._policy = POLICIES[policy]
        self._queues: list[_Queue[Row]] = [_Queue() for _ in range(n_stages)]
        self._place: dict[Row, tuple[_Queue[Row], _Entry[Row]]] = {}
        self._n_groups = 0

    def __len__(self) -> int:
        return len(self._place)

    def queued_rows(self, stage: int) -> int:
        return self._queues[stage].n_rows

    def add(self, rows: Iterable[Row], stage: int, now_s: float) -> None:
        """Queue rows for a stage: arrivals for stage 0, or the survivors of one batch for the stage after it.

        Raises:
            ValueError: a row already waits.
        """
        queue = self._queues[stage]
        self._n_groups += 1
        for row in rows:
            if row in self._place:
                raise ValueError(f"{row!r} already waits")
            entry = _Entry(row, now_s, self._n_groups)
            self._place[row] = queue, entry
            queue.entries.append(entry)
            queue.n_rows += 1

    def drop(self, row: Row) -> bool:
        """Take a row out of its queue; False if it does not wait in any (it runs, or is gone)."""
        place = self._place.pop(row, None)
        if place is None:
            return False
        queue, entry = place
        entry.row = None
        queue.n_rows -= 1
        return True

    def pick(self, now_s: float) -> tuple[int, list[Row]] | None:
        """Take the next batch: its stage and its rows, oldest first; None if nothing waits."""
        if not self._place:
            return None
        stage = self._choose(now_s)
        return stage, self._take(stage)

    def _choose(self, now_s: float) -> int:
        for stage in range(len(self._queues) - 1, -1, -1):
            queue = self._queues[stage]
            if not queue.n_rows:
                continue
            head = queue.head()
            overdue = head is not None and now_s - head.added_s >= self.max_wait_s
            if overdue or not self._policy.wait or queue.n_rows >= self.ripe[stage]:
                return stage
        return max(range(len(self._queues)), key=lambda stage: (self._queues[stage].n_rows, stage))

    def _take(self, stage: int) -> list[Row]:
        queue = self._queues[stage]
        entries = queue.entries
        rows: list[Row] = []
        group = None if self._policy.merge or stage == 0 else entries[0].group  # before stage 0 a batch is made up
        while entries and len(rows) < self.max_rows and group in (None, entries[0].group):
            row = entries.popleft().row
            if row is not None:
                rows.append(row)
                del self._place[row]
        queue.n_rows -= len(rows)
        return rows
