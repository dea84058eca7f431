"""How a network with exits decides: what one head's logits say of how sure it is, and thresholds from exit shares.

Numpy alone, no torch: the server imports this. Exits are columns, exit 1 first. An image leaves at the first exit whose
score reaches that exit's threshold (`score >= threshold`); the last exit takes whoever gets there. Scores that remember
earlier exits are in `models.scores`, the curve of all operating points is in `models.frontier`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.shares import Floats

Logits = NDArray[np.floating[Any]]
ROUNDING = 1e-9  # images; a share times a count falls this far below the whole number it means


def _check(logits: Logits) -> None:
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits must have the shape [rows, classes] with 2 classes or more, not {logits.shape}")


def _leaders(logits: Logits) -> tuple[Floats, Floats]:
    """Split logits [rows, classes >= 2] into the top one [rows] and all with the top one at -inf, in float64."""
    _check(logits)
    others = np.array(logits, dtype=np.float64, order="C")  # one row is one run of memory, so its sum has one order
    rows = np.arange(len(others))
    top_class = others.argmax(axis=1)
    top = others[rows, top_class]
    others[rows, top_class] = -np.inf
    return top, others


def _odds(logits: Logits) -> tuple[Floats, Floats, Floats]:
    """Return the logit margin [rows], and of all classes but the top one the logits less the runner-up's and their exp.

    Both are [rows, classes], -inf and 0 at the top class: relative to the runner-up nothing over- or underflows.
    """
    top, others = _leaders(logits)
    second = others.max(axis=1)
    others -= second[:, None]
    return top - second, others, np.exp(others)


def _log_odds(margin: Floats, weights: Floats) -> Floats:
    log_odds: Floats = margin - np.log(weights.sum(axis=1))
    return log_odds


def _entropy(margin: Floats, others: Floats, weights: Floats) -> Floats:
    runner_up = np.exp(-margin)
    rest = runner_up * weights.sum(axis=1)
    # Classes without weight add nothing, though 0 x -inf is no number.
    surprise = np.multiply(weights, others - margin[:, None], out=np.zeros_like(weights), where=weights > 0)
    negative: Floats = runner_up * surprise.sum(axis=1) / (1.0 + rest) - np.log1p(rest)
    return negative


def _never_unless_finite(scores: Floats, margin: Floats) -> Floats:
    scores[~(np.isfinite(margin) & np.isfinite(scores))] = -np.inf
    return scores


def max_softmax(logits: Logits) -> Floats:
    """Return the log-odds of the largest softmax output [rows]: top logit minus logsumexp of the others.

    It orders images as the softmax maximum does, the score of MSDNet (ICLR 2018) and BoostNet (AAAI 2023), but does not
    saturate: in float32 many easy images have a maximum of exactly 1.0, and ties break exit quotas.
    """
    with np.errstate(all="ignore"):
        margin, _, weights = _odds(logits)
        return _never_unless_finite(_log_odds(margin, weights), margin)


def logit_margin(logits: Logits) -> Floats:
    """Return the top logit minus the runner-up [rows]."""
    _check(logits)
    leading = np.partition(logits, -2, axis=1)[:, -2:].astype(np.float64)
    if np.isfinite(leading).all():  # a server asks after every batch: all else would take it as long again
        return leading[:, 1] - leading[:, 0]
    with np.errstate(invalid="ignore"):
        margin = leading[:, 1] - leading[:, 0]
        return _never_unless_finite(margin, margin)


def probability_margin(logits: Logits) -> Floats:
    """Return the largest softmax output minus the second, less one [rows]: floats are fine near 0, coarse near 1."""
    return read_softmax(logits)[2]


def entropy(logits: Logits) -> Floats:
    """Return minus the entropy of the softmax in nats [rows], the score of BranchyNet (ICPR 2016)."""
    with np.errstate(all="ignore"):
        margin, others, weights = _odds(logits)
        return _never_unless_finite(_entropy(margin, others, weights), margin)


SCORES: dict[str, Callable[[Logits], Floats]] = {
    "max_softmax": max_softmax,
    "logit_margin": logit_margin,
    "probability_margin": probability_margin,
    "entropy": entropy,
}
"""Exit scores of one head's logits, by name: [rows, classes] to float64 [rows], higher = surer, -inf where the logits
are not finite.

A row's score depends on that row alone, bit for bit, whatever batch it is in. `models.scores` has those that also
remember earlier exits.
"""


def read_softmax(logits: Logits) -> tuple[NDArray[np.intp], Floats, Floats]:
    """Return the leading class, `confidence` and `probability_margin`, [rows] each, of one softmax.

    A server asks for all three after every batch: taken one by one they take twice as long.
    """
    _check(logits)
    rows = np.arange(len(logits))
    leading = logits.argmax(axis=1)
    top = logits[rows, leading]
    finite = np.isfinite(top)
    all_finite = bool(finite.all())
    given = logits
    if not all_finite:
        logits, top = np.where(finite[:, None], logits, 0.0), np.where(finite, top, 0.0)
    weights = np.subtract(logits, top[:, None], dtype=np.float64, order="C")  # one row is one run of memory
    np.exp(weights, out=weights)
    weights[rows, leading] = 0.0
    rest, second = weights.sum(axis=1), weights.max(axis=1)
    share = 1.0 / (1.0 + rest)
    margin = -(rest + second) * share
    if not all_finite or not second.all():  # or a runner-up too small to tell from one of -inf
        margin[~(finite & np.isfinite(np.partition(given, -2, axis=1)[:, -2]))] = -np.inf
        share[~finite] = 0.0
    return leading, share, margin


def confidence(logits: Logits) -> Floats:
    """Return the largest softmax output [rows], in (0, 1]: what people are shown; 0 where the logits are not finite."""
    top = logits.max(axis=1, keepdims=True)
    finite = np.isfinite(top)
    if not finite.all():
        logits, top = np.where(finite, logits, 0.0), np.where(finite, top, 0.0)
    weights = np.subtract(logits, top, dtype=np.float64, order="C")  # one row is one run of memory: see `_leaders`
    largest: Floats = finite[:, 0] / np.exp(weights, out=weights).sum(axis=1)
    return largest


class Calibrator:
    """Held-out scores [M, N], sorted once, from which any number of threshold vectors is drawn.

    Raises:
        ValueError: the scores are empty, not two-dimensional, or hold NaN.
    """

    def __init__(self, scores: NDArray[Any]) -> None:
        self.scores = np.asarray(scores, dtype=np.float64)
        if self.scores.ndim != 2 or 0 in self.scores.shape or np.isnan(self.scores).any():
            raise ValueError(f"scores must have the shape [images, exits] and no NaN; these have {self.scores.shape}")
        self.n_images, self.n_exits = self.scores.shape
        self._order = np.argsort(-self.scores, axis=0, kind="stable").T.copy()  # [N, M], surest image first

    def thresholds(self, shares: Sequence[float] | Floats) -> Floats:
        """Return thresholds [N] at which the held-out images leave in the given shares [N]; the last is -inf.

        The calibration of MSDNet (ICLR 2018): exit by exit, the surest of the images still there leave until the quota
        is full. Quotas are cumulative, `floor(M (q_1 + ... + q_n))` gone by exit n, so no rounding remainder piles up
        at the last exit. Without ties they are met exactly. Images tied at a threshold all leave, since serving
        compares with `>=`; the exits after it take fewer, so ties only save and cannot send the rest to the last exit.
        A threshold lies halfway between the last image to leave and the best to stay, where rounding cannot flip
        either. It is +inf where nobody is to leave and -inf where all that are left do.

        Raises:
            ValueError: the shares are not N numbers in [0, 1] that sum to 1.
        """
        quotas = np.asarray(shares, dtype=np.float64)
        if quotas.shape != (self.n_exits,) or not (quotas >= 0).all() or not abs(quotas.sum() - 1) < 1e-6:
            raise ValueError(f"shares must be {self.n_exits} numbers in [0, 1] that sum to 1, not {quotas.tolist()}")
        gone_by = np.floor(self.n_images * np.cumsum(quotas) + ROUNDING)
        thresholds = np.full(self.n_exits, -np.inf)
        here = np.ones(self.n_images, dtype=bool)
        n_gone = 0
        for exit_index in range(self.n_exits - 1):
            n_leaving = int(gone_by[exit_index]) - n_gone
            if max(n_gone, int(gone_by[exit_index])) >= self.n_images:
                break  # all that are left leave here, and so would any image that comes later
            if n_leaving <= 0:  # by the shares, or because ties took more than theirs before
                thresholds[exit_index] = np.inf
                continue
            order = self._order[exit_index]
            surest_first = self.scores[order[here[order]], exit_index]
            thresholds[exit_index] = _between(surest_first[n_leaving - 1], surest_first[n_leaving:])
            here &= self.scores[:, exit_index] < thresholds[exit_index]
            n_gone = self.n_images - int(here.sum())
        return thresholds


def _between(last_to_leave: float, staying: Floats) -> float:
    """Return a threshold that the first reaches and, ties aside, none of those that stay (best first) do."""
    best_to_stay = staying[np.searchsorted(-staying, -last_to_leave, side="right") :][:1]
    if best_to_stay.size == 0 or not np.isfinite([last_to_leave, best_to_stay[0]]).all():
        return float(last_to_leave)
    middle = 0.5 * float(last_to_leave) + 0.5 * float(best_to_stay[0])
    return middle if middle > best_to_stay[0] else float(last_to_leave)  # neighbouring numbers have none in between


def take_exits(scores: NDArray[Any], thresholds: Sequence[float] | Floats) -> NDArray[np.intp]:
    """Return the exit [M], counted from 0, at which each image of scores [M, N] leaves under thresholds [N]."""
    leaves = np.asarray(scores, dtype=np.float64) >= np.asarray(thresholds, dtype=np.float64)
    leaves[:, -1] = True
    return np.asarray(leaves.argmax(axis=1), dtype=np.intp)


def left_by(scores: NDArray[Any], thresholds: Floats) -> NDArray[np.intp]:
    """Return under how many of P threshold vectors each image has left by exit n: [M, N], rising along exits to P.

    Thresholds [P, N] must not fall along P. So an image leaves at exit n under those of the vectors that it had not
    left under by exit n - 1: all P are taken in one pass over the images. Scores [M, N] hold no NaN.
    """
    counts = np.stack(
        [np.searchsorted(column, values, side="right") for column, values in zip(thresholds.T, scores.T, strict=True)],
        axis=1,
    )
    counts[:, -1] = len(thresholds)
    left: NDArray[np.intp] = np.maximum.accumulate(counts, axis=1)
    return left


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a set of images did under one threshold vector: measured, not targeted."""

    mean_cost: float  # in the unit of the costs given
    accuracy: float  # share of images answered right, 0 to 1
    shares: tuple[float, ...]  # of the images, by exit


def outcome(
    scores: NDArray[Any],
    correct: NDArray[np.bool_],
    costs_cumulative: Sequence[float],
    thresholds: Sequence[float] | Floats,
) -> Outcome:
    """Measure thresholds [N] on images with scores [M, N] whose answers at each exit are `correct` [M, N] or not."""
    exits = take_exits(scores, thresholds)
    counts = np.bincount(exits, minlength=len(costs_cumulative))
    n_right = int(np.asarray(correct)[np.arange(len(exits)), exits].sum())
    mean_cost = math.fsum(count * cost for count, cost in zip(counts.tolist(), costs_cumulative, strict=True))
    return Outcome(mean_cost / len(exits), n_right / len(exits), tuple((counts / len(exits)).tolist()))


def outcomes(
    scores: NDArray[Any], correct: NDArray[np.bool_], costs_cumulative: Sequence[float], thresholds: Floats
) -> list[Outcome]:
    """Measure P threshold vectors [P, N], none falling along P: as `outcome` does each, in one pass."""
    n_images, n_points = len(scores), len(thresholds)
    left = left_by(scores, thresholds)
    before = np.concatenate([np.zeros((n_images, 1), dtype=np.intp), left[:, :-1]], axis=1)
    leaving, right = [], np.zeros(n_points)
    for start, end, answers in zip(before.T, left.T, np.asarray(correct).T, strict=True):
        leaving.append(_covered(start, end, n_points))
        right += _covered(start[answers], end[answers], n_points)
    found = []
    for counts, n_right in zip(np.stack(leaving, axis=1).tolist(), right.tolist(), strict=True):
        mean_cost = math.fsum(count * cost for count, cost in zip(counts, costs_cumulative, strict=True)) / n_images
        found.append(Outcome(mean_cost, n_right / n_images, tuple(count / n_images for count in counts)))
    return found


def _covered(start: NDArray[np.intp], end: NDArray[np.intp], n_points: int) -> Floats:
    """Return how many of the ranges [start, end) cover each of n points [n_points]."""
    opened, closed = (np.bincount(ends, minlength=n_points + 1)[:n_points] for ends in (start, end))
    return np.cumsum(opened - closed).astype(np.float64)
