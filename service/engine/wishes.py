"""Decides for requests that are not plain: a pinned exit, a confidence, a cost limit, a deadline, steps.

Only the engine's thread calls these functions, and only for such requests.
"""

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from math import inf
from typing import Final

import numpy as np
from numpy.typing import NDArray

from models.exits import confidence
from service.budget.controller import BudgetController, Reason
from service.budget.steering import MEGA
from service.engine.rows import ENDED, Head, Options, Request, Step

NEVER_SURE = float("nan")  # reaches no threshold, not even -inf


def decide(budget: BudgetController, row: Request, head: Head, now_s: float) -> Reason | None:
    """Return why a row leaves at `head`, and settle its account; or commit it to the next stage and return None.

    A pinned exit comes first, then confidence, then the limits: the deadline, the request's own cost, the ledger.
    """
    reason = _own_reason(budget, row.options, head, now_s)
    if reason is not None:
        budget.settle([row.account], head.exit)
        return reason
    return budget.decide([row.account], head.exit, [_own_score(row.options, head)])[0]


def _own_score(options: Options, head: Head) -> float:
    """The score to compare with the server's threshold."""
    if options.exit is not None:
        return NEVER_SURE
    if options.min_confidence is not None:
        return inf if _largest(head.logits) >= options.min_confidence else NEVER_SURE
    return head.score


def _own_reason(budget: BudgetController, options: Options, head: Head, now_s: float) -> Reason | None:
    """Why a row leaves because of its own options; None if the server's budget decides."""
    if options.exit == head.exit:
        return "pinned"
    if head.exit < len(budget.costs) and not _own_score(options, head) >= budget.thresholds[head.exit - 1]:
        if now_s >= options.deadline_s:
            return "deadline"
        if budget.costs[head.exit] / MEGA > options.max_mflops:  # compared as answers report it: clients send it back
            return "budget"
    return None


def step(row: Request, head: Head, class_names: Sequence[str]) -> Step:
    """The step that reports the result of `head`."""
    best = top_k(head, row.options.top_k)
    return Step(
        class_id=head.class_id,
        label=class_names[head.class_id],
        confidence=best[0][1],
        top_k=best,
        exit=head.exit,
        mflops=head.mflops,
        score=head.score,
        threshold=head.threshold,
    )


def top_k(head: Head, k: int) -> tuple[tuple[int, float], ...]:
    """The k best classes of a head and their softmax outputs, best first."""
    largest = _largest(head.logits)
    return ((head.class_id, largest),) if k == 1 else rank(head.logits[None], [largest], k)[0]


def rank(logits: NDArray[np.float32], largest: Sequence[float], k: int) -> list[tuple[tuple[int, float], ...]]:
    """The k best classes of logits [rows, classes] and their softmax outputs; `largest` [rows]: each row's first.

    A row's result depends on that row alone, bit for bit.
    """
    best = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    leading = logits[np.arange(len(best))[:, None], best].astype(np.float64)
    shares = np.exp(leading - leading[:, :1]) * np.asarray(largest)[:, None]
    return [tuple(zip(*row, strict=True)) for row in zip(best.tolist(), shares.tolist(), strict=True)]


def _largest(logits: NDArray[np.float32]) -> float:
    return float(confidence(logits[None])[0])


class Deadlines:
    """A heap of requests by deadline. It may still hold some that have ended; they are never returned."""

    FEW: Final = 256

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Request]] = []
        self._n = 0  # breaks ties by age, so that requests are never compared
        self._many = self.FEW

    @property
    def next_s(self) -> float:
        """The earliest deadline; inf if there is none."""
        return self._heap[0][0] if self._heap else inf

    def add(self, request: Request) -> None:
        self._n += 1
        heappush(self._heap, (request.options.deadline_s, self._n, request))
        if len(self._heap) > self._many:  # most requests end long before their deadline
            self._heap = [entry for entry in self._heap if entry[2].state is not ENDED]
            heapify(self._heap)
            self._many = max(self.FEW, 2 * len(self._heap))

    def pop_due(self, now_s: float) -> list[Request]:
        """Remove and return requests whose deadline has come."""
        due = []
        while self._heap and self._heap[0][0] <= now_s:
            request = heappop(self._heap)[2]
            if request.state is not ENDED:
                due.append(request)
        return due
