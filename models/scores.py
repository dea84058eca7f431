"""Exit scores computed exit by exit, with a history per row of the exits passed.

Calibration, evaluation and the service use the same interface. A `Score` is called with the exit, its logits and the
rows' histories, and returns scores and new histories. A history is a fixed number of float64 per row. Nothing else is
kept between exits, so rows may be regrouped freely as long as each keeps its history. No torch here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from models.exits import SCORES, Logits, confidence, logit_margin, probability_margin, read_softmax
from models.shares import Floats


class Score(Protocol):
    """An exit's confidence that a row may leave, given the results of earlier exits.

    A row's score depends only on that row, bit for bit, whatever its batch. It is never NaN, and -inf if the logits are
    not finite. Several threads may use one score concurrently.
    """

    @property
    def history_width(self) -> int:
        """Numbers that a row carries from exit to exit; 0 if the score uses one head only."""
        ...

    def start(self, n_rows: int) -> Floats:
        """Return the histories [n_rows, history_width] of rows that have not passed an exit."""
        ...

    def __call__(self, exit_index: int, logits: Logits, history: Floats) -> tuple[Floats, Floats]:
        """Score one exit.

        Args:
            exit_index: from 0; exits come in order.
            logits: [rows, classes] of that exit.
            history: [rows, history_width] as the previous exit or `start` returned it; it is not changed.

        Returns:
            scores [rows], higher is more confident, and the new histories [rows, history_width].
        """
        ...


@dataclass(frozen=True, slots=True)
class HeadScore:
    """A score of one head's logits only (`models.exits.SCORES`)."""

    function: Callable[[Logits], Floats]
    history_width: int = 0

    def start(self, n_rows: int) -> Floats:
        return np.zeros((n_rows, 0))

    def __call__(self, exit_index: int, logits: Logits, history: Floats) -> tuple[Floats, Floats]:
        return self.function(logits), history

    def read(self, logits: Logits) -> tuple[NDArray[np.intp], Floats, Floats]:
        """Return the top classes, their confidences and the scores, [rows] each: all that a server needs."""
        if self.function is probability_margin:
            return read_softmax(logits)
        return logits.argmax(axis=1), confidence(logits), self.function(logits)


@dataclass(frozen=True, slots=True)
class Patience:
    """The number of consecutive exits that agree with this one (PABEE, NeurIPS 2020); the logit margin breaks ties.

    Counts alone allow no more operating points than exits, so equal counts are ranked by the margin m, as m / (1 + m).
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
    History: the predictions so far, -1 if there is none.
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
    """Map the logit margin to [0, 1), in the same order; -inf if the logits are not finite."""
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
