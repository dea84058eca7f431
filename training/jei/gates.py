"""The gates' targets and class weights, and fitting gates to them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.gates import GATE_FEATURES, gate_scores
from training.predicting import folds_of, logistic_regression

Floats = NDArray[np.float64]
MOST_WEIGHT = 5.0  # of an image at which a gate should open; others have weight 1


@dataclass(frozen=True)
class Shown:
    """Outputs of N heads for M images, to which gates are fitted."""

    features: Floats  # [M, N, GATE_FEATURES]
    losses: Floats  # [M, N]: cross-entropy in nats

    def of(self, rows: NDArray[Any]) -> "Shown":
        return Shown(self.features[rows], self.losses[rows])


def best_exits(losses: Floats, cost_shares: Sequence[float], trade_off: float) -> NDArray[np.intp]:
    """The exit [M], from 0, at which cross-entropy plus `trade_off` times the cost share is least.

    Args:
        losses: [M, N].
        cost_shares: [N], cumulative cost of stopping at each exit, as a share of the last exit's; the last is 1.
    """
    best: NDArray[np.intp] = (losses + trade_off * np.asarray(cost_shares)).argmin(axis=1)
    return best


def gate_targets(best: NDArray[np.intp], n_exits: int) -> NDArray[np.bool_]:
    """Whether each gate should open for each image [M, N - 1]: those of its best exit and of all later ones."""
    targets: NDArray[np.bool_] = np.arange(n_exits - 1) >= best[:, None]
    return targets


def class_weights(best: NDArray[np.intp], n_exits: int) -> Floats:
    """Weights [N - 1] of images at which a gate should open: as published, the number of images whose best exit is
    another, over the number whose best exit is this one, but at most `MOST_WEIGHT`.

    Where an exit is the best for all images, the weight is 1: the published one is 0, with which the gate would learn
    nothing, stay at one half, and send images on that should leave."""
    n_best = np.bincount(best, minlength=n_exits)[:-1]
    n_others = len(best) - n_best
    return np.where(n_others == 0, 1.0, np.minimum(MOST_WEIGHT, n_others / np.maximum(n_best, 1e-9)))


def fit_gates(
    shown: Shown, cost_shares: Sequence[float], trade_off: float, weights_from: Shown | None = None
) -> Floats:
    """Fit all gates to images: weights [N, 5], the bias last, zeros at the last exit.

    Each is a logistic regression with five weights, so the published loss (binary cross-entropy, class weights) has one
    minimum. Newton's method reaches it; the published code takes 200 steps of SGD a turn towards it.

    Args:
        weights_from: images whose best exits determine the class weights; by default the same.
    """
    n_exits = shown.losses.shape[1]
    targets = gate_targets(best_exits(shown.losses, cost_shares, trade_off), n_exits)
    counted = best_exits((weights_from or shown).losses, cost_shares, trade_off)
    weights = np.zeros((n_exits, len(GATE_FEATURES) + 1))
    for i, weight in enumerate(class_weights(counted, n_exits)):
        counts = np.where(targets[:, i], weight, 1.0)
        weights[i] = logistic_regression(shown.features[:, i], targets[:, i], counts=counts)
    return weights


@dataclass(frozen=True)
class FoldedGates:
    """Gates fitted to all held-out images and, for each fold, to all but the images in it."""

    weights: Floats  # [N, 5]
    by_fold: Floats  # [folds, N, 5]
    fold: NDArray[np.intp]  # [M]: each image's fold

    def scores(self, features: Floats) -> Floats:
        """Scores [M, N] of the held-out images' features [M, N, 4], each by gates that were not fitted to it."""
        scores = np.empty(features.shape[:2])
        for k, weights in enumerate(self.by_fold):
            scores[self.fold == k] = gate_scores(weights, features[self.fold == k])
        return scores


def fit_on_heldout(heldout: Shown, cost_shares: Sequence[float], trade_off: float, seed: int) -> FoldedGates:
    """Fit gates to the held-out images by cross-fitting: each image has gates that were not fitted to it."""
    fold = folds_of(len(heldout.losses), seed)
    by_fold = [fit_gates(heldout.of(fold != k), cost_shares, trade_off) for k in np.unique(fold)]
    return FoldedGates(fit_gates(heldout, cost_shares, trade_off), np.stack(by_fold), fold)


def fit_on_training(train: Shown, heldout: Shown, cost_shares: Sequence[float], trade_off: float) -> FoldedGates:
    """Fit gates to the training images, as published; held-out images determine only the class weights."""
    weights = fit_gates(train, cost_shares, trade_off, heldout)
    return FoldedGates(weights, weights[None], np.zeros(len(heldout.losses), dtype=np.intp))
