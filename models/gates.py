"""Exit scores of JEI-DNN (ICLR 2024): one gate per exit, and the probability left for the gates after it.

Gate l is a linear layer on four features of its head's softmax, and g_l the sigmoid of its output. An image leaves at
exit l with the probability P_l = max(0, min(g_l, 1 - g_1 - ... - g_(l-1))). As published it leaves at the first exit
where pi_l = P_l / (the probability left there) reaches one half; as a score, any threshold can be used. `training.jei`
fits gates. No torch here.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from models.exits import Logits
from models.predictor import linear_log_odds
from models.shares import Floats

GATE_FEATURES = ("confidence", "entropy", "probability_margin", "powered_entropy")
"""The inputs of a gate, from its head's softmax p: its maximum, its entropy in nats, its margin, and the entropy of
the softmax of twice the logits, which is p squared and normalised."""
PUBLISHED_THRESHOLD = math.log(0.5)  # of `GateScore`: pi_l = 1/2
SPENT = 2.0**-53  # least probability left, so that a score stays finite


def see_softmax(logits: Logits) -> Floats:
    """Return the `GATE_FEATURES` [rows, 4] of one exit's logits [rows, classes]; NaN where those are not finite."""
    with np.errstate(all="ignore"):
        shifted = np.array(logits, dtype=np.float64, order="C")  # rows contiguous: see `exits._odds`
        shifted -= shifted.max(axis=1, keepdims=True)
        weights = np.exp(shifted)
        total = weights.sum(axis=1)
        powered = weights * weights
        powered_total = powered.sum(axis=1)
        second = np.partition(weights, -2, axis=1)[:, -2]
        # Classes without weight contribute nothing, but 0 x -inf would be NaN.
        np.maximum(shifted, -1e4, out=shifted)
        features = np.stack(
            [
                1.0 / total,
                np.log(total) - (weights * shifted).sum(axis=1) / total,
                (1.0 - second) / total,
                np.log(powered_total) - 2.0 * (powered * shifted).sum(axis=1) / powered_total,
            ],
            axis=1,
        )
        features[~np.isfinite(logits).all(axis=1)] = np.nan
    return features


class GateScore:
    """log of g_l / (1 - g_1 - ... - g_(l-1)): the log of pi_l where pi_l < 1, and distinct values where pi_l is 1.

    pi_l itself is 1 for many images, and tied images can only leave together. If the gates sum to more than 1, which
    does not occur for images that leave as published, the score is above all others.

    Args:
        weights: [N, 5], the bias last; zeros for the last exit, which has no gate.

    Raises:
        ValueError: the weights have another shape or are not finite.
    """

    history_width = 1  # the probability left: 1 - g_1 - ... - g_(l-1)

    def __init__(self, weights: ArrayLike) -> None:
        self.weights = np.asarray(weights, dtype=np.float64)
        if (
            self.weights.ndim != 2
            or self.weights.shape[1] != len(GATE_FEATURES) + 1
            or not len(self.weights)
            or not np.isfinite(self.weights).all()
        ):
            raise ValueError(
                f"a gate's weights must be finite numbers [exits, {len(GATE_FEATURES) + 1}], not {self.weights.shape}"
            )

    def start(self, n_rows: int) -> Floats:
        return np.ones((n_rows, 1))

    def __call__(self, exit_index: int, logits: Logits, history: Floats) -> tuple[Floats, Floats]:
        features = see_softmax(logits)
        finite = np.isfinite(features).all(axis=1)
        if exit_index == len(self.weights) - 1:
            return np.where(finite, 0.0, -np.inf), history
        scores, left = self.of_log_odds(linear_log_odds(self.weights[exit_index], features), history[:, 0])
        scores[~finite] = -np.inf
        return scores, np.where(finite, left, history[:, 0])[:, None]

    @staticmethod
    def of_log_odds(log_odds: Floats, left: Floats) -> tuple[Floats, Floats]:
        """Return the scores [rows] for a gate's log-odds [rows], and the probability left of each row after it."""
        with np.errstate(invalid="ignore"):  # for rows whose logits are not finite
            log_gate = -np.logaddexp(0.0, -log_odds)
        return log_gate - np.log(np.maximum(left, SPENT)), left - np.exp(log_gate)


def gate_scores(weights: NDArray[Any], features: Floats) -> Floats:
    """Return the scores [rows, N] of rows that pass all N exits, from the features [rows, N, 4] of all."""
    scores = np.zeros(features.shape[:2])
    left = np.ones(len(features))
    for i in range(features.shape[1] - 1):
        scores[:, i], left = GateScore.of_log_odds(linear_log_odds(weights[i], features[:, i]), left)
    return scores


def exit_probabilities(weights: NDArray[Any], features: Floats) -> Floats:
    """Return P_l [rows, N] from the features [rows, N, 4] of all exits; the last has the probability left."""
    probabilities = np.zeros(features.shape[:2])
    left = np.ones(len(features))
    for i in range(features.shape[1] - 1):
        gate = np.exp(-np.logaddexp(0.0, -linear_log_odds(weights[i], features[:, i])))
        probabilities[:, i] = np.maximum(0.0, np.minimum(gate, left))
        left = left - gate
    probabilities[:, -1] = np.maximum(0.0, left)
    return probabilities
