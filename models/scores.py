"""Exit scores as a server asks for them: exit by exit, with what a row remembers of the exits it has passed.

One contract for all, used the same by calibration, evaluation and the service. A `Score` is called with the exit, its
logits and the rows' histories, and returns scores and new histories. A history is a fixed number of float64 a row, and
nothing else is kept between exits: rows may be regrouped at will as long as each takes its own along. Numpy alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from models.exits import SCORES, Logits, confidence, logit_margin, probability_margin, read_softmax
from models.shares import Floats


class Score(Protocol):
    """How sure an exit is that a row may leave, given what the exits before it said.

    A row's score depends on that row alone, bit for bit, whatever batch it is in. It is never NaN, and -inf where
    logits are not finite. One score may be used by several threads at once.
    """

    @property
    def history_width(self) -> int:
        """Numbers that a row carries from exit to exit; 0 where a score looks at one head alone."""
        ...

    def start(self, n_rows: int) -> Floats:
        """Return the histories [n_rows, history_width] of rows that have not passed an exit."""
        ...

    def __call__(self, exit_index: int, logits: Logits, history: Floats) -> tuple[Floats, Floats]:
        """Score one exit.

        Args:
            exit_index: from 0; exits come in order.
            logits: [rows, classes] of that exit.
            history: [rows, history_width] as the exit before returned it, or `start`; it is not changed.

        Returns:
            scores [rows], higher = surer, and the rows' new histories [rows, history_width].
        """
        ...


@dataclass(frozen=True, slots=True)
class HeadScore:
    """A score of one head's logits alone (`models.exits.SCORES`)."""

    function: Callable[[Logits], Floats]
    history_width: int = 0

    def start(self, n_rows: int) -> Floats:
        return np.zeros((n_rows, 0))

    def __call__(self, exit_index: int, logits: Logits, history: Floats) -> tuple[Floats, Floats]:
        return self.function(logits), history

    def read(self, logits: Logits) -> tuple[NDArray[np.intp], Floats, Floats]:
        """Return leading classes, their confidences and the scores, [rows] each: all that a server asks of a head."""
        if self.function is probability_margin:
            return read_softmax(logits)
        return logits.argmax(axis=1), confidence(logits), self.function(logits)


@dataclass(frozen=True, slots=True)
class Patience:
    """How many exits in a row have agreed with this one (PABEE, NeurIPS 2020); the logit margin breaks ties.

    Counts alone give no more operating points than exits, so equal counts are ranked by the margin m, as m / (1 + m).
    History: the last prediction and the count.
    """

    history_width: int = 2

    def start(self, n_rows: int) -> Floats:
        return np.full((n_rows, 2), (-1.0, 0.0))

    def __call__(self, exit_index: int, logits: Logits, history: Floats) -> tuple[Floats, Floats]:
        predictions, ranks = _predictions(logits), _within_one(logits)
        counts = np.where(predictions == history[:, 0], history[:, 1] + 1.0, 0.0)
        return counts + ranks, np.column_stack([predictions, counts])


@dataclass(frozen=True, slots=True)
class Vote:
    """The share of exits so far that agree with the most common answer; the logit margin breaks ties.

    Shares of n exits are multiples of 1/n, and the margin m moves a score by less than one of them: m / (1 + m) / n.
    History: the predictions so far, -1 where there is none.
    """

    history_width: int  # the number of exits

    def start(self, n_rows: int) -> Floats:
        return np.full((n_rows, self.history_width), -1.0)

    def __call__(self, exit_index: int, logits: Logits, history: Floats) -> tuple[Floats, Floats]:
        n_votes = exit_index + 1
        votes = history.copy()
        votes[:, exit_index] = _predictions(logits)
        cast = votes[:, :n_votes]
        most = (cast[:, :, None] == cast[:, None, :]).sum(axis=2).max(axis=1)
        return (most + _within_one(logits)) / n_votes, votes


def _predictions(logits: Logits) -> Floats:
    predictions: Floats = logits.argmax(axis=1).astype(np.float64)
    return predictions


def _within_one(logits: Logits) -> Floats:
    """Rank rows by their logit margin, in [0, 1); -inf where logits are not finite."""
    margin = logit_margin(logits)
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(margin), margin / (1.0 + margin), -np.inf)


def score_exits(score: Score, logits: Sequence[Logits] | NDArray[Any]) -> Floats:
    """Return the scores [rows, N] of rows that pass all N exits; logits are [N][rows, classes]."""
    history = score.start(len(logits[0]))
    columns = []
    for exit_index, at_exit in enumerate(logits):
        scores, history = score(exit_index, at_exit, history)
        columns.append(scores)
    return np.stack(columns, axis=1)


def plain_scores(n_exits: int) -> dict[str, Score]:
    """Return every score that needs no fitting, by name."""
    heads: dict[str, Score] = {name: HeadScore(function) for name, function in SCORES.items()}
    return {**heads, "patience": Patience(), "vote": Vote(n_exits)}
