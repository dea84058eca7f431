"""Fitted exit scores, which predict from the margins of this head and the previous one whether going on pays.

The weights are plain numbers, one row per exit, fitted by `training.predicting`. No torch here.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from models.exits import Logits, logit_margin
from models.shares import Floats

FEATURES = (
    "logit_margin",
    "agrees",
    "previous_logit_margin",
    "agrees_x_logit_margin",
    "agrees_x_previous_logit_margin",
)
"""The inputs of a predictor at one exit: this head's margin, whether the previous head predicted the same class, and
its margin; with the products, rows where both agree have a linear function of their own. At exit 1, which has no
previous head, all but the first are 0. More features (log-odds, entropy, the head's 128 inputs) did not improve the
scores, see `docs/scores.md`."""
HISTORY_WIDTH = 2  # the last prediction, and its margin
NOBODY = -1.0  # the prediction where there was no head, or where its logits were not finite


def no_history(n_rows: int) -> Floats:
    """Return the histories [n_rows, HISTORY_WIDTH] of rows that have not passed an exit."""
    history = np.zeros((n_rows, HISTORY_WIDTH))
    history[:, 0] = NOBODY
    return history


def see(logits: Logits, history: Floats) -> tuple[Floats, Floats]:
    """Return the features [rows, FEATURES] of one exit's logits [rows, classes], and the new histories of the rows.

    The margin of rows whose logits are not finite is -inf.
    """
    margin = logit_margin(logits)
    finite = np.isfinite(margin)
    new = np.empty_like(history)
    new[:, 0] = np.where(finite, logits.argmax(axis=1), NOBODY)
    new[:, 1] = np.where(finite, margin, 0.0)
    features = np.empty((len(margin), len(FEATURES)))
    features[:, 0] = margin
    features[:, 1] = (new[:, 0] == history[:, 0]) & finite
    features[:, 2] = history[:, 1]
    features[:, 3] = features[:, 1] * new[:, 1]
    features[:, 4] = features[:, 1] * history[:, 1]
    return features, new


def features_of(logits: Sequence[Logits] | NDArray[Any]) -> Floats:
    """Return the features [rows, N, FEATURES] of rows that pass all N exits; logits are [N][rows, classes]."""
    history = no_history(len(logits[0]))
    columns = []
    for at_exit in logits:
        features, history = see(at_exit, history)
        columns.append(features)
    return np.stack(columns, axis=1)


class Predictor:
    """A score that is linear in `FEATURES`, or the difference of two probabilities whose log-odds are.

    Args:
        gain: [N, FEATURES + 1], the bias last: the log-odds that going on helps, because this exit is wrong and a later
            one right. Without `loss` the score is its negative, the log-odds that going on does not help.
        loss: [N, FEATURES + 1] or None: the log-odds that going on harms, because this exit is right and the last one
            wrong. With it, the score is P(harms) - P(helps), the expected loss of accuracy by going on.

    Raises:
        ValueError: the shapes do not match, or a number is not finite.
    """

    history_width = HISTORY_WIDTH

    def __init__(self, gain: ArrayLike, loss: ArrayLike | None = None) -> None:
        self.gain = np.asarray(gain, dtype=np.float64)
        self.loss = None if loss is None else np.asarray(loss, dtype=np.float64)
        for weights in (self.gain, self.gain if self.loss is None else self.loss):
            shape = (len(self.gain), len(FEATURES) + 1)
            if weights.shape != shape or not len(weights) or not np.isfinite(weights).all():
                raise ValueError(
                    f"a predictor's weights must be finite numbers [exits, {shape[1]}], as many for loss as for gain, "
                    f"not {weights.shape}"
                )

    def start(self, n_rows: int) -> Floats:
        return no_history(n_rows)

    def __call__(self, exit_index: int, logits: Logits, history: Floats) -> tuple[Floats, Floats]:
        features, new = see(logits, history)
        return self.of_features(exit_index, features), new

    def of_features(self, exit_index: int, features: NDArray[np.floating[Any]]) -> Floats:
        """Return the scores [rows] of one exit from its features [rows, FEATURES]."""
        with np.errstate(invalid="ignore"):
            helps = linear_log_odds(self.gain[exit_index], features)
            score = -helps if self.loss is None else _probability(linear_log_odds(self.loss[exit_index], features))
            if self.loss is not None:
                score -= _probability(helps)
        score[~(np.isfinite(features[:, 0]) & np.isfinite(score))] = -np.inf
        return score

    def of_all_features(self, features: NDArray[np.floating[Any]]) -> Floats:
        """Return the scores [rows, N] from the features [rows, N, FEATURES] of all exits."""
        return np.stack([self.of_features(i, features[:, i]) for i in range(len(self.gain))], axis=1)


def linear_log_odds(weights: Floats, features: NDArray[np.floating[Any]]) -> Floats:
    """Return the log-odds [rows] of a logistic model from features [rows, n]; weights [n + 1], the bias last."""
    # Not a matrix product, whose order of summation may depend on the number of rows.
    total: Floats = (features * weights[:-1]).sum(axis=1) + weights[-1]
    return total


def _probability(log_odds: Floats) -> Floats:
    # Not by tanh, which neither over- nor underflows, either, but near 0 is too coarse for ranking.
    small = np.exp(-np.abs(log_odds))
    probability: Floats = np.where(log_odds < 0, small, 1.0) / (1.0 + small)
    return probability
