"""How rows are regrouped: when they wait for company, when batches merge, when rows are moved together.

`default` decides by measured cost; the others are there to tell what each part is worth (`python -m benchmarks.engine
--policy all`). Plain functions of numbers; the scheduler asks them.

`default` compacts whatever that costs: a row that runs for nobody is multiply-adds out of the operator's budget, and a
copy is none. The policies that do not compact count what they waste, but do not charge it: it would eat up any budget.
"""

from dataclasses import dataclass
from typing import Literal

from service.engine.costs import CostTable

Choice = Literal["never", "by cost", "always"]


@dataclass(frozen=True, slots=True)
class Policy:
    """Rows that ran together and go on are a group; a batch is made of one group or of several.

    Attributes:
        wait: a queue that could fill no full batch lets others run first, in the hope of more rows.
        merge: rows of different groups share a batch. Before stage 1 there are no groups, and they always do.
        compact: rows that go on are copied together where others lay between them. If not, their group runs as it lies,
            those that have left included, unless it is merged with another one.
    """

    wait: Choice
    merge: Choice
    compact: bool

    def is_ripe(self, costs: CostTable, stage: int, n_rows: int, n_waiting: int, other_s: float) -> bool:
        """Whether `n_rows`, too few for a full batch, run now rather than after another batch, which takes `other_s`.

        To wait costs each of them that time. It may save the fixed part of one batch, to all that wait anywhere.
        """
        if self.wait == "by cost":
            return n_rows * other_s >= costs.fixed_s(stage) * n_waiting
        return self.wait == "never"

    def merges(self, costs: CostTable, stage: int, saved_batches: float, copied_rows: int) -> bool:
        """Whether to share a batch, which saves that many, where so many rows must be copied that would else not be."""
        if self.merge == "by cost":
            return costs.fixed_s(stage) * saved_batches >= costs.copy_s(stage) * copied_rows
        return self.merge == "always"


POLICIES: dict[str, Policy] = {
    "default": Policy(wait="by cost", merge="by cost", compact=True),
    "none": Policy(wait="never", merge="never", compact=False),  # a batch stays together until all have left
    "no-compaction": Policy(wait="by cost", merge="by cost", compact=False),
    "always-compact": Policy(wait="never", merge="never", compact=True),
    "merge-full": Policy(wait="always", merge="always", compact=True),
}
