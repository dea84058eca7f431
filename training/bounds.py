"""Bounds to compare policies with, which no server can reach: two oracles above, and random exits below.

The oracles are operating points in order of cost: for each of P points, the exit at which each of M images leaves.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Exits = NDArray[np.intp]
Answers = NDArray[np.bool_]


@dataclass(frozen=True)
class BoundPoint:
    """An operating point of a bound."""

    executed_mflops: float
    published_mflops: float
    accuracy: float


def oracle_exits(correct: Answers) -> Exits:
    """The best that any exit rule could do with these heads, knowing the labels: exits [M, N], from 0.

    No image needs to go further than to its first right exit. Point n sends every image that some exit up to n gets
    right to the first such exit, and lets the rest leave at exit 1. Between points the bound is a straight line, and no
    rule is above it. It counts lucky answers, too: those that are right at one exit and wrong again at later ones.
    """
    return _up_to_each_exit(correct)


def steady_exits(correct: Answers) -> Exits:
    """The same for a rule that goes on only for lasting answers: to the first exit from which on all are right."""
    return _up_to_each_exit(np.minimum.accumulate(correct[:, ::-1], axis=1)[:, ::-1])


def _up_to_each_exit(worth: Answers) -> Exits:
    first = np.where(worth.any(axis=1), worth.argmax(axis=1), 0)[:, None]
    exits: Exits = np.where(first <= np.arange(worth.shape[1]), first, 0)
    return exits


def bound_curve(
    exits: Exits, correct: Answers, executed: Sequence[float], published: Sequence[float]
) -> tuple[BoundPoint, ...]:
    """Cost and accuracy of P operating points at which images leave at `exits` [M, P]."""
    accuracy = np.take_along_axis(correct, exits, axis=1).mean(axis=0)
    spent = (np.asarray(costs)[exits].mean(axis=0) for costs in (executed, published))
    return tuple(BoundPoint(*values) for values in zip(*(a.tolist() for a in (*spent, accuracy)), strict=True))


def random_curve(
    shares: NDArray[np.float64], correct: Answers, executed: Sequence[float], published: Sequence[float]
) -> tuple[BoundPoint, ...]:
    """The least that an exit rule should reach: the same `shares` [P, N] leave at each exit, but chosen at random."""
    columns = (shares @ np.asarray(values) for values in (executed, published, correct.mean(axis=0)))
    return tuple(BoundPoint(*values) for values in zip(*(column.tolist() for column in columns), strict=True))
