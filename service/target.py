"""The number that an operator sets, in the three ways to say it, and what may be asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from models.frontier import Frontier, FrontierPoint

Kind = Literal["average_mflops", "fraction", "accuracy"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Costs come back from JSON rounded; asking for a limit as it was shown must not be refused for the last digit.
SLACK = 1e-6


class TargetError(ValueError):
    """A budget outside what the network can do; the message names the range and the remedy."""


@dataclass(frozen=True, slots=True)
class Target:
    """A budget: the average that is kept, in mflops per image, and how it was asked for."""

    kind: Kind
    average_mflops: float


class Targets:
    """Turns what was asked for into an average cost.

    Args:
        frontier: expected accuracy against mean cost in mflops.
        exit_mflops: cumulative cost by exit.
    """

    def __init__(self, frontier: Frontier, exit_mflops: Sequence[float]) -> None:
        self.frontier = frontier
        self.first_mflops, self.full_mflops = exit_mflops[0], exit_mflops[-1]
        self.allowed: dict[Kind, tuple[float, float]] = {
            "average_mflops": (self.first_mflops, self.full_mflops),
            "fraction": (self.first_mflops / self.full_mflops, 1.0),
            "accuracy": (frontier.at(0.0).accuracy, frontier.best_accuracy[-1]),
        }

    def resolve(self, kind: Kind, value: float) -> Target:
        """Return the target that `value` asks for.

        Raises:
            TargetError: no average cost from the first exit's to the last's gives it.
        """
        lowest, highest = self.allowed[kind]
        if not lowest - SLACK * abs(lowest) <= value <= highest + SLACK * abs(highest):
            raise TargetError(self._why_not(kind, value))
        value = min(max(value, lowest), highest)
        if kind == "accuracy":
            value = self.frontier.at(self.frontier.position_at_accuracy(value)).cost
        elif kind == "fraction":
            value *= self.full_mflops
        return Target(kind, min(max(value, self.first_mflops), self.full_mflops))

    def expected(self, average_mflops: float) -> FrontierPoint:
        """What a budget will bring on images like the held-out ones."""
        return self.frontier.at(self.frontier.position_at_cost(average_mflops))

    def _why_not(self, kind: Kind, value: float) -> str:
        lowest, highest = self.allowed[kind]
        below = {
            "average_mflops": "is below what the first exit costs, which every image runs",
            "fraction": "is below what the first exit costs, which every image runs",
            "accuracy": "is below what the first exit alone reaches",
        }
        above = {
            "average_mflops": "is above what the last exit costs",
            "fraction": "is more than the whole network",
            "accuracy": "is more than this network reached on its held-out images",
        }
        why = above[kind] if value > highest else below[kind]
        # Seven digits err by less than SLACK: the limits named here are taken when they are sent back.
        return f"{kind} {value:.7g} {why}: give a value from {lowest:.7g} to {highest:.7g}."
