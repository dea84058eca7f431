"""Exit shares for a budget: the shares of images to leave at each exit, for a given mean cost.

Shares are of all images, first exit first, and sum to 1. No torch here.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def check_costs(costs_cumulative: Sequence[float]) -> list[float]:
    """Return cumulative costs [N] as floats.

    Raises:
        ValueError: there are none, or they are not positive, finite and strictly increasing.
    """
    costs = [float(cost) for cost in costs_cumulative]
    if not costs or costs[0] <= 0 or not math.isfinite(costs[-1]) or not all(a < b for a, b in pairwise(costs)):
        raise ValueError(f"cumulative costs must be positive, finite and strictly increasing, not {costs}")
    return costs


def truncated_geometric_shares(p: float, n_exits: int) -> Floats:
    """Return shares [N] where at every exit but the last a share `p` of those that reach it leave (BoostNet Eq. 9)."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"the exit probability must be in [0, 1], not {p}")
    reaching = np.power(1.0 - p, np.arange(n_exits), dtype=np.float64)
    return np.concatenate([p * reaching[:-1], reaching[-1:]])


def ratio_shares(ratio: float, n_exits: int) -> Floats:
    """Return shares [N] proportional to ratio^n, the form behind published curves (MSDNet's code); 1 is uniform.

    Ratio 0 sends all images to exit 1, infinity to exit N.
    """
    if not ratio >= 0.0:
        raise ValueError(f"the ratio of exit shares must be 0 or more, not {ratio}")
    # The largest power is 1, so that neither end overflows.
    exponents = np.arange(n_exits) if ratio <= 1.0 else np.arange(n_exits)[::-1]
    powers = np.power(ratio if ratio <= 1.0 else 1.0 / ratio, exponents, dtype=np.float64)
    shares: Floats = powers / powers.sum()
    return shares


def _cost_and_slope(going_on: float, costs: list[float]) -> tuple[float, float]:
    """Return the mean cost, the sum over n of x^(n-1) c_n, and its derivative, by Horner's scheme (BoostNet Eq. 9).

    c_n is the cost of part n only, and x = 1 - p the share that goes on from each exit.
    """
    cost = slope = 0.0
    for part in reversed([costs[0], *(b - a for a, b in pairwise(costs))]):
        slope = slope * going_on + cost
        cost = cost * going_on + part
    return cost, slope


def solve_exit_probability(costs_cumulative: Sequence[float], budget: float) -> float:
    """Return the p in [0, 1] of expected cost `budget` (BoostNet Eq. 9).

    By Newton's method from 0.5, with bisection where it would leave a shrinking bracket.

    Raises:
        ValueError: the budget is outside [cost of exit 1, cost of exit N], where no p exists.
    """
    costs = check_costs(costs_cumulative)
    _check_budget(costs, budget)
    if budget <= costs[0]:
        return 1.0
    if budget >= costs[-1]:
        return 0.0
    low, high, x = 0.0, 1.0, 0.5  # x = 1 - p; the cost rises with it
    for _ in range(100):
        cost, slope = _cost_and_slope(x, costs)
        if cost > budget:
            high = x
        else:
            low = x
        newton = x - (cost - budget) / slope
        guarded = newton if low < newton < high else 0.5 * (low + high)
        if abs(guarded - x) <= 1e-16:
            break
        x = guarded
    return 1.0 - x


def solve_ratio(costs_cumulative: Sequence[float], budget: float) -> float:
    """Return the ratio whose `ratio_shares` cost `budget` on average, by bisection over ratio / (1 + ratio).

    Raises:
        ValueError: the budget is outside [cost of exit 1, cost of exit N].
    """
    costs = check_costs(costs_cumulative)
    _check_budget(costs, budget)
    if budget >= costs[-1]:
        return math.inf if len(costs) > 1 else 0.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        too_dear = middle < 1.0 and float(ratio_shares(middle / (1.0 - middle), len(costs)) @ costs) > budget
        low, high = (low, middle) if too_dear else (middle, high)
    return low / (1.0 - low) if low < 1.0 else math.inf  # a budget within rounding of the last exit's cost


def _check_budget(costs: Sequence[float], budget: float) -> None:
    """Raise ValueError if the budget is outside [cost of exit 1, cost of exit N]."""
    if not costs[0] <= budget <= costs[-1]:
        raise ValueError(f"budget {budget:g} is outside the exits' costs: give {costs[0]:g} to {costs[-1]:g}")
