"""Searches thresholds for the best trade-off of accuracy against cost on held-out images.

For a price mu per unit of cost, it maximises mean(correct - mu x cost). With the other exits' thresholds fixed, each
image that reaches an exit has a known value if it leaves there, and another if it goes on. The best threshold is where
the cumulative sum of the differences, most confident image first, is highest. Exits are processed from the last to the
first until nothing changes: coordinate ascent, which never gets worse, from several starts.

Such a search overfits its images. Scores are therefore quantised to `N_LEVELS` levels with equal numbers of images,
the two halves of the images are searched separately, and the mean of the two, in levels, is returned.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from models.shares import Floats

Ints = NDArray[np.intp]
N_LEVELS = 200
N_PRICES = 49
MAX_PASSES = 25


def optimal_thresholds(
    scores: Floats,
    correct: NDArray[np.bool_],
    costs_cumulative: Sequence[float],
    n_points: int,
    n_prices: int = N_PRICES,
) -> Floats:
    """Return thresholds [n_points, N], from the cheapest to the most accurate, interpolated in levels between prices.

    Args:
        scores: [M, N], no NaN.
        correct: [M, N].
        costs_cumulative: [N].
        n_points: number of vectors to return, 2 or more.
        n_prices: number of prices tried; points in between are interpolated.
    """
    n_images, n_exits = scores.shape
    edges, levels = _levels(scores)
    costs = np.asarray(costs_cumulative, dtype=np.float64)
    dearest = 1.0 / float(np.diff(costs).min()) if n_exits > 1 else 1.0
    prices = np.concatenate([np.geomspace(dearest, 1e-4 * dearest, n_prices - 1), [0.0]])
    parts = [np.arange(half, n_images, 2) for half in (0, 1)] if n_images >= 4 else [np.arange(n_images)]
    found = np.mean([_sweep(levels[rows], correct[rows], costs, prices, len(edges)) for rows in parts], axis=0)
    # Make cuts non-decreasing as the price falls: each is lowered to those of lower prices, based on more images.
    cuts = np.minimum.accumulate(found[::-1], axis=0)[::-1]
    distinct = np.concatenate([[True], (np.diff(cuts, axis=0) != 0).any(axis=1)])
    cuts = cuts[distinct]
    places, wanted = np.arange(len(cuts)), np.linspace(0, len(cuts) - 1, n_points)
    thresholds = np.full((n_points, n_exits), -np.inf)
    for i in range(n_exits - 1):
        cut = np.interp(wanted, places, cuts[:, i])
        thresholds[:, i] = np.interp(cut, np.arange(len(edges)), edges[:, i])
    return thresholds


def _levels(scores: Floats) -> tuple[Floats, Ints]:
    """Return the scores [levels + 1, N] at which levels begin and end, and the level [M, N] of each score.

    Leaving at level k or above means `score >= edges[k]`; the last edge is above all scores.
    """
    n_images, n_exits = scores.shape
    n_levels = min(N_LEVELS, n_images)
    finite = np.ma.masked_invalid(scores)
    lowest, highest = finite.min(axis=0).filled(0.0), finite.max(axis=0).filled(0.0)  # 0 where no score is finite
    ranked = np.sort(np.where(np.isfinite(scores), scores, lowest), axis=0)
    starts = ranked[(np.arange(n_levels) * n_images) // n_levels]
    edges = np.concatenate([starts, highest[None] + 1e-3 * (highest - lowest)[None] + 1e-6])
    columns = [np.searchsorted(edges[:-1, i], scores[:, i], side="right") - 1 for i in range(n_exits)]
    return edges, np.maximum(np.stack(columns, axis=1), 0)


def _sweep(levels: Ints, correct: NDArray[np.bool_], costs: Floats, prices: Floats, n_cuts: int) -> Floats:
    """Return the best cuts [prices, N] found for each price: images leave exit n at level cuts[n] or above."""
    n_exits = levels.shape[1]
    early, late = np.zeros(n_exits, dtype=np.intp), np.full(n_exits, n_cuts - 1, dtype=np.intp)
    late[-1] = 0
    best = early
    found = np.empty((len(prices), n_exits))
    for k, price in enumerate(prices.tolist()):
        values = correct - price * costs
        reached = [_ascend(levels, values, start, n_cuts) for start in (best, late)]
        _, best = max(reached, key=lambda pair: pair[0])
        found[k] = best
    return found


def _ascend(levels: Ints, values: Floats, start: Ints, n_cuts: int) -> tuple[float, Ints]:
    """Run coordinate ascent from `start`; return the mean value reached and the cuts [N]."""
    n_images, n_exits = levels.shape
    cuts = start.copy()
    for _ in range(MAX_PASSES):
        before = cuts.copy()
        stays = levels < cuts  # at each exit, whether or not an image reaches it
        gets_to = np.ones((n_exits, n_images), dtype=bool)
        for i, j in pairwise(range(n_exits)):
            gets_to[j] = gets_to[i] & stays[:, i]
        later = values[:, -1]
        for i in range(n_exits - 2, -1, -1):
            here = values[:, i]
            # Cuts of earlier exits are still those that `gets_to` was computed from.
            gains = np.bincount(levels[:, i], weights=(here - later) * gets_to[i], minlength=n_cuts)
            from_level = np.concatenate([np.cumsum(gains[::-1])[::-1][: n_cuts - 1], [0.0]])
            if from_level.max() > from_level[cuts[i]] + 1e-9:
                cuts[i] = int(from_level.argmax())
            later = np.where(levels[:, i] >= cuts[i], here, later)
        if (cuts == before).all():
            break
    return float(later.mean()), cuts
