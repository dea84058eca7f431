"""A running sum over answers, and its value a given number of answers ago.

Plain Python over numbers. Answers come in batches and often move the sum equally, so it is stored as runs.
"""

from bisect import bisect_left, bisect_right
from typing import Any

Number = Any  # int (exact) or float; mypyc cannot compile a type variable of the two


class Trail:
    """The value of a sum after each of the last `length` answers. Memory: a few numbers per run of answers.

    Args:
        length: how many answers to look back at most.
        start: the sum before the first answer.

    Attributes:
        n_answers: since the start.
    """

    def __init__(self, length: int, start: Number) -> None:
        self.n_answers = 0
        self._length = length
        # By runs of answers with equal steps: the number of answers at its end, the sum there, and the step.
        self._ends = [0]
        self._sums: list[Number] = [start]
        self._steps: list[Number] = [start]  # placeholder: no answer lies before the start

    @property
    def now(self) -> Number:
        """The sum after the last answer."""
        return self._sums[-1]

    def add(self, before: Number, step: Number, n_answers: int) -> None:
        """Record that answers moved the sum by `step` each, starting from `before`."""
        self.n_answers += n_answers
        self._ends.append(self.n_answers)
        self._sums.append(before + n_answers * step)
        self._steps.append(step)
        if len(self._ends) > 2 * self._length:
            self._forget()

    def ago(self, n_answers: int) -> Number:
        """The sum before the last `n_answers`, or the oldest known if that is longer ago."""
        at = max(self.n_answers - max(n_answers, 0), self._ends[0])
        i = bisect_left(self._ends, at)
        return self._sums[i] - (self._ends[i] - at) * self._steps[i]

    def _forget(self) -> None:
        """Drop runs older than `length` answers. Done rarely: deleting from a list's front is expensive."""
        n_old = bisect_right(self._ends, self.n_answers - self._length) - 1
        del self._ends[:n_old], self._sums[:n_old], self._steps[:n_old]
