"""The cost-accuracy frontier: the operating points of a network with exits, on a line from the cheapest to the best.

It is built once from held-out images. A position in [0, 1] then maps to thresholds and their expected cost and
accuracy. Look-ups are plain Python over tuples and take microseconds, so a server can use them for steering.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.exits import Calibrator, Outcome, outcomes
from models.optimal import N_PRICES, optimal_thresholds
from models.shares import (
    Floats,
    check_costs,
    ratio_shares,
    solve_exit_probability,
    solve_ratio,
    truncated_geometric_shares,
)

N_POINTS = 257  # operating points tried, at evenly spaced costs from exit 1's to exit N's
TOLERANCE = 0.0005  # of held-out accuracy by which a frontier's end may be below its best point: 0.05 points

Draw = Callable[[Calibrator, NDArray[np.bool_], list[float], int], Floats]


def _by_shares(shares_of: Callable[[list[float], float], Floats]) -> Draw:
    """Draw thresholds at which held-out images leave in given shares, at evenly spaced costs from exit 1 to exit N."""

    def draw(calibrator: Calibrator, correct: NDArray[np.bool_], costs: list[float], n_points: int) -> Floats:
        targets = np.linspace(costs[0], costs[-1], n_points)
        return np.array([calibrator.thresholds(shares_of(costs, cost)) for cost in targets.tolist()])

    return draw


def _geometric(costs: list[float], cost: float) -> Floats:
    return truncated_geometric_shares(solve_exit_probability(costs, cost), len(costs))


def _ratio(costs: list[float], cost: float) -> Floats:
    return ratio_shares(_solved_ratio(tuple(costs), cost), len(costs))


@lru_cache(maxsize=4096)  # bisection takes longer than a threshold vector, and many scores need the same budgets
def _solved_ratio(costs: tuple[float, ...], cost: float) -> float:
    return solve_ratio(costs, cost)


def _optimal(calibrator: Calibrator, correct: NDArray[np.bool_], costs: list[float], n_points: int) -> Floats:
    n_prices = max(2, min(N_PRICES, n_points // 4))
    return optimal_thresholds(calibrator.scores, correct, costs, n_points, n_prices=n_prices)


SHARES: dict[str, Callable[[list[float], float], Floats]] = {"geometric": _geometric, "ratio": _ratio}
"""Exit shares [N] for cumulative costs [N] and a mean cost: BoostNet's Eq. 9 and the form of MSDNet's released code."""
FAMILIES: dict[str, Draw] = {**{name: _by_shares(shares_of) for name, shares_of in SHARES.items()}, "optimal": _optimal}
"""Threshold vectors [P, N] in order of cost: those for given shares, and those searched (`models.optimal`)."""


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """One operating point, with its cost and accuracy as measured on held-out images."""

    position: float  # 0 to 1
    cost: float  # mean per image, in the unit of the frontier's costs
    accuracy: float  # share of images answered right
    shares: tuple[float, ...]  # of the images, by exit
    thresholds: tuple[float, ...]  # by exit, -inf at the last


@dataclass(frozen=True, slots=True)
class Frontier:
    """Operating points in order of cost, measured on held-out images, with linear interpolation in between.

    Position is linear in expected cost, from 0, where everything leaves at exit 1, to 1, beyond which going deeper did
    not help. No threshold decreases along the frontier, so at a higher position every image goes at least as deep: cost
    rises with position on any traffic, at points and between them.

    A threshold that no image reaches is stored just above the highest held-out score, one that all images reach just
    below the lowest, so that both can be interpolated. `at(0)` has -inf, so that no unseen image goes on there.
    """

    family: str
    position: tuple[float, ...]  # P, strictly increasing from 0 to 1; (0.0,) if exit 1 cannot be improved on
    cost: tuple[float, ...]  # P, strictly increasing
    accuracy: tuple[float, ...]  # P
    shares: tuple[tuple[float, ...], ...]  # P x N
    thresholds: tuple[tuple[float, ...], ...]  # P x N
    best_accuracy: tuple[float, ...] = field(init=False)  # P: the running maximum of the accuracy

    def __post_init__(self) -> None:
        object.__setattr__(self, "best_accuracy", tuple(accumulate(self.accuracy, max)))

    def at(self, position: float) -> FrontierPoint:
        """Return the point at `position`; outside [0, 1] the nearer end, for NaN the point at 0."""
        if not position > 0.0 or len(self.position) == 1:
            return self._point(0, (float("-inf"),) * len(self.thresholds[0]))
        above = bisect_right(self.position, position)
        if above == len(self.position):
            return self._point(above - 1, self.thresholds[-1])
        i, j = above - 1, above
        weight = (position - self.position[i]) / (self.position[j] - self.position[i])
        lower, upper = self.thresholds[i], self.thresholds[j]
        return FrontierPoint(
            position,
            self.cost[i] + weight * (self.cost[j] - self.cost[i]),
            self.accuracy[i] + weight * (self.accuracy[j] - self.accuracy[i]),
            tuple([a + weight * (b - a) for a, b in zip(self.shares[i], self.shares[j], strict=True)]),
            (*[a + weight * (b - a) for a, b in zip(lower[:-1], upper[:-1], strict=True)], lower[-1]),
        )

    def _point(self, i: int, thresholds: tuple[float, ...]) -> FrontierPoint:
        return FrontierPoint(self.position[i], self.cost[i], self.accuracy[i], self.shares[i], thresholds)

    def at_cost(self, cost: float) -> FrontierPoint:
        """Return the point of expected cost `cost`, or the nearer end, as a budget need not be spent."""
        spread = self.cost[-1] - self.cost[0]
        return self.at((cost - self.cost[0]) / spread if spread else 0.0)

    def at_accuracy(self, accuracy: float) -> FrontierPoint:
        """Return the cheapest point whose expected accuracy (0 to 1) reaches `accuracy`.

        Raises:
            ValueError: no point reaches it; the message gives the highest accuracy.
        """
        j = bisect_left(self.best_accuracy, accuracy)
        if j == len(self.best_accuracy):
            highest = self.best_accuracy[-1]
            raise ValueError(f"no point reaches an accuracy of {accuracy:g}: the best within reach is {highest:.4f}")
        if j == 0:
            return self.at(0.0)
        before, after = self.accuracy[j - 1], self.accuracy[j]
        weight = (accuracy - before) / (after - before)
        return self.at(self.position[j - 1] + weight * (self.position[j] - self.position[j - 1]))


def build_frontier(
    scores: NDArray[Any],
    correct: NDArray[np.bool_],
    costs_cumulative: Sequence[float],
    family: str | None = None,
    n_points: int = N_POINTS,
) -> Frontier:
    """Calibrate a family of thresholds on held-out images and measure it on them.

    Args:
        scores: exit scores [M, N] of M held-out images.
        correct: whether each exit's answer was right [M, N].
        costs_cumulative: the cumulative cost of leaving at each exit [N].
        family: a key of `FAMILIES`; by default the one of `SHARES` that is more accurate on average over all budgets.
            (Thresholds searched on the same images would have an unfair advantage.)
        n_points: number of mean costs tried, from exit 1's to exit N's; points that cost no more than the previous one
            are dropped.

    The frontier ends at the cheapest point whose held-out accuracy is within `TOLERANCE`, or one image, of the best: on
    a plateau, the best of hundreds of points is the luckiest, often far to the right of the plateau's start. With 5,000
    images 0.05 points are two images, well within the standard error of a paired difference (0.1 to 0.2 points if 25 to
    100 images change sides), so no significant accuracy is given up.

    Raises:
        ValueError: shapes do not match, or a cost or the family is invalid.
    """
    costs = check_costs(costs_cumulative)
    calibrator = Calibrator(scores)
    answers = np.asarray(correct, dtype=bool)
    if answers.shape != calibrator.scores.shape or len(costs) != calibrator.n_exits:
        raise ValueError(
            f"scores {calibrator.scores.shape}, correct {answers.shape} and {len(costs)} costs must be [images, exits] "
            "twice and one cost per exit"
        )
    if family is not None and family not in FAMILIES:
        raise ValueError(f"unknown family {family!r} of thresholds; known: {', '.join(FAMILIES)}")
    names = list(SHARES) if family is None else [family]
    return max((_measure(name, calibrator, answers, costs, n_points) for name in names), key=_mean_accuracy(costs))


def _mean_accuracy(costs: list[float]) -> Callable[[Frontier], float]:
    budgets = np.linspace(costs[0], costs[-1], N_POINTS)
    return lambda frontier: float(np.interp(budgets, frontier.cost, frontier.best_accuracy).mean())


def _measure(
    family: str, calibrator: Calibrator, correct: NDArray[np.bool_], costs: list[float], n_points: int
) -> Frontier:
    drawn = FAMILIES[family](calibrator, correct, costs, n_points if len(costs) > 1 else 1)
    thresholds = _interpolable(drawn, calibrator.scores)
    points: list[tuple[Outcome, tuple[float, ...]]] = []
    for measured, row in zip(outcomes(calibrator.scores, correct, costs, thresholds), thresholds.tolist(), strict=True):
        if not points or measured.mean_cost > points[-1][0].mean_cost:
            points.append((measured, tuple(row)))
    allowed = max(TOLERANCE, 1.0 / len(correct)) + 1e-12
    best = max(measured.accuracy for measured, _ in points)
    end = next(i for i, (measured, _) in enumerate(points) if measured.accuracy >= best - allowed)
    kept = [measured for measured, _ in points[: end + 1]]
    first, spread = kept[0].mean_cost, kept[-1].mean_cost - kept[0].mean_cost
    return Frontier(
        family=family,
        position=tuple((measured.mean_cost - first) / spread if spread else 0.0 for measured in kept),
        cost=tuple(measured.mean_cost for measured in kept),
        accuracy=tuple(measured.accuracy for measured in kept),
        shares=tuple(measured.shares for measured in kept),
        thresholds=tuple(row for _, row in points[: end + 1]),
    )


def _interpolable(thresholds: Floats, scores: Floats) -> Floats:
    """Make thresholds [P, N], in order of cost, non-decreasing and, except at the last exit, finite.

    Quotas alone may let a threshold decrease: at the cheap end, where few images reach it, or because of ties. It is
    therefore lowered to that of any costlier point, which more images determine.
    """
    finite = np.ma.masked_invalid(scores)
    lowest, highest = finite.min(axis=0).filled(0.0), finite.max(axis=0).filled(0.0)
    gap = 1e-3 * (highest - lowest) + 1e-6
    bounded = np.clip(thresholds, lowest - gap, highest + gap)
    bounded[:, -1] = -np.inf
    monotonic: Floats = np.minimum.accumulate(bounded[::-1], axis=0)[::-1]
    return monotonic
