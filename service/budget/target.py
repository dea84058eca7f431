"""The budget that an operator sets, in its three forms, and the range allowed for each."""

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Literal, Protocol, get_args

from models.frontier import Frontier, FrontierPoint
from service.budget.state import BudgetState

Kind = Literal["average_mflops", "fraction", "accuracy"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Costs come back from JSON rounded; asking for a limit as it was shown must not be refused for the last digit.
SLACK = 1e-6


class TargetError(ValueError):
    """A budget outside what the network can do; the message names the range and the remedy."""


@dataclass(frozen=True, slots=True)
class Target:
    """A budget: the average that is kept, in mflops per image, and how it was asked for.

    With `latency_s`, less is kept where 95 % of the answers would take longer.
    """

    kind: Kind
    average_mflops: float
    latency_s: float | None = None


class Targets:
    """Converts a requested budget into an average cost.

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


class _Engine(Protocol):
    def set_budget(self, budget_mflops: float, latency_s: float | None) -> BudgetState: ...
    def budget_state(self) -> BudgetState: ...


class Keeper:
    """Holds the budget as it was requested; the engine, created with it, enforces the number."""

    def __init__(self, engine: _Engine, target: Target) -> None:
        self._engine = engine
        self._target = target
        # For several threads: the engine's budget and the request behind it are set and read together.
        self._lock = Lock()

    def read(self) -> tuple[Target, BudgetState]:
        """The budget as it was asked for, and what the engine says of it."""
        with self._lock:
            return self._target, self._engine.budget_state()

    def set(self, target: Target) -> BudgetState:
        """Keep another one from now on; returns what the engine says of it, whatever others set next."""
        with self._lock:
            state = self._engine.set_budget(target.average_mflops, target.latency_s)
            self._target = target
            return state
