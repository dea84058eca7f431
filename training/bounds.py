"""What no server can do, but every policy is to be seen beside: two oracles above it, and chance below.

Each is a set of operating points in order of cost: the exit at which each of M images leaves, for each of P points.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Exits = NDArray[np.intp]
Answers = NDArray[np.bool_]


@dataclass(frozen=True)
class BoundPoint:
    """A point of a curve that no server can follow."""

    executed_mflops: float
    published_mflops: float
    accuracy: float


def oracle_exits(correct: Answers) -> Exits:
    """The best that any rule for leaving could do with these heads: exits [M, N], from 0, known only with the labels.

    Each image is worth going on with only to the first exit that is right. Ordered by what that costs, point n sends
    every image that is right by exit n to its first right exit and lets the rest leave at exit 1; between points the
    bound is a straight line, and no rule beats it. It counts lucky answers: an image that one head gets right and the
    next ones wrong again.
    """
    return _up_to_each_exit(correct)


def steady_exits(correct: Answers) -> Exits:
    """The same for a rule that goes on only for answers that stay: to the first exit from which on all are right."""
    return _up_to_each_exit(np.minimum.accumulate(correct[:, ::-1], axis=1)[:, ::-1])


def _up_to_each_exit(worth: Answers) -> Exits:
    first = np.where(worth.any(axis=1), worth.argmax(axis=1), 0)[:, None]
    exits: Exits = np.where(first <= np.arange(worth.shape[1]), first, 0)
    return exits


def bound_curve(
    exits: Exits, correct: Answers, executed: Sequence[float], published: Sequence[float]
) -> tuple[BoundPoint, ...]:
    """What points at which images leave at `exits` [M, P] cost and get right."""
    accuracy = np.take_along_axis(correct, exits, axis=1).mean(axis=0)
    spent = (np.asarray(costs)[exits].mean(axis=0) for costs in (executed, published))
    return tuple(BoundPoint(*values) for values in zip(*(a.tolist() for a in (*spent, accuracy)), strict=True))


def random_curve(
    shares: NDArray[np.float64], correct: Answers, executed: Sequence[float], published: Sequence[float]
) -> tuple[BoundPoint, ...]:
    """The least that a rule for leaving should do: images leave in the same shares [P, N], but any of them."""
    columns = (shares @ np.asarray(values) for values in (executed, published, correct.mean(axis=0)))
    return tuple(BoundPoint(*values) for values in zip(*(column.tolist() for column in columns), strict=True))
