"""Scheduling policies: when rows wait for more, when batches merge, and when rows are moved together.

`default` decides by measured cost; the others exist to measure what each part contributes (`python -m benchmarks.engine
--policy all`). Plain functions of numbers, called by the scheduler.

`default` compacts at any cost: running a row that has been answered spends multiply-adds of the operator's budget, a
copy spends none. The policies without compaction count this waste but do not charge it, as it would use up any budget.
"""

from dataclasses import dataclass
from typing import Literal

from service.engine.costs import CostTable

Choice = Literal["never", "by cost", "always"]


@dataclass(frozen=True, slots=True)
class Policy:
    """Rows that ran together and go on are a group; a batch is made of one group or of several.

    Attributes:
        wait: whether a queue with too few rows for a full batch lets other queues run first, to gather more rows.
        merge: whether rows of different groups share a batch. Before stage 1 there are no groups: rows always do.
        compact: whether rows that go on are copied together. If not, and unless it is merged with another, their whole
            group runs as it lies in memory, including rows that have left.
    """

    wait: Choice
    merge: Choice
    compact: bool

    def is_ripe(self, costs: CostTable, stage: int, n_rows: int, n_waiting: int, other_s: float) -> bool:
        """Whether `n_rows`, too few for a full batch, run now rather than after another batch, which takes `other_s`.

        Waiting costs each of them `other_s`. It may save the fixed cost of one batch for all rows waiting anywhere.
        """
        if self.wait == "by cost":
            return n_rows * other_s >= costs.fixed_s(stage) * n_waiting
        return self.wait == "never"

    def merges(self, costs: CostTable, stage: int, saved_batches: float, copied_rows: int) -> bool:
        """Whether to merge, which saves `saved_batches` but makes it necessary to copy `copied_rows`."""
        if self.merge == "by cost":
            return costs.fixed_s(stage) * saved_batches >= costs.copy_s(stage) * copied_rows
        return self.merge == "always"


POLICIES: dict[str, Policy] = {
    "default": Policy(wait="by cost", merge="by cost", compact=True),
    "none": Policy(wait="never", merge="never", compact=False),  # a batch stays together until all its rows have left
    "no-compaction": Policy(wait="by cost", merge="by cost", compact=False),
    "always-compact": Policy(wait="never", merge="never", compact=True),
    "merge-full": Policy(wait="always", merge="always", compact=True),
}
