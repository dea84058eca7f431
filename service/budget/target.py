"""The budget that an operator sets, in its three forms, and the range allowed for each."""

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Literal, Protocol, get_args

from models.frontier import Frontier, FrontierPoint
from service.budget.state import BudgetState

Kind = Literal["average_mflops", "fraction", "accuracy"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Limits are displayed rounded; a request for a limit as displayed must not be refused for its last digit.
SLACK = 1e-6


class TargetError(ValueError):
    """A budget outside the network's range; the message names the range and the remedy."""


@dataclass(frozen=True, slots=True)
class Target:
    """A budget: the average to keep, in mflops per image, and the form in which it was requested.

    With `latency_s`, the average is lowered as far as needed for 95 % of the answers to take no longer than that.
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
        first_mflops, self.full_mflops = exit_mflops[0], exit_mflops[-1]
        self.allowed: dict[Kind, tuple[float, float]] = {
            "average_mflops": (first_mflops, self.full_mflops),
            "fraction": (first_mflops / self.full_mflops, 1.0),
            "accuracy": (frontier.at(0.0).accuracy, frontier.best_accuracy[-1]),
        }

    def resolve(self, kind: Kind, value: float) -> Target:
        """Convert a `value` of this kind to a target.

        Raises:
            TargetError: no average cost from the first exit's to the last's corresponds to it.
        """
        lowest, highest = self.allowed[kind]
        if not lowest - SLACK * abs(lowest) <= value <= highest + SLACK * abs(highest):
            raise TargetError(self._why_not(kind, value))
        value = min(max(value, lowest), highest)
        if kind == "accuracy":
            value = self.frontier.at_accuracy(value).cost
        elif kind == "fraction":
            value *= self.full_mflops
        return Target(kind, value)

    def expected(self, average_mflops: float) -> FrontierPoint:
        """The results to expect of a budget on images like the held-out ones."""
        return self.frontier.at_cost(average_mflops)

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
        # Seven digits err by less than SLACK, so limits are accepted as named here.
        return f"{kind} {value:.7g} {why}: give a value from {lowest:.7g} to {highest:.7g}."


class _Engine(Protocol):
    def set_budget(self, budget_mflops: float, latency_s: float | None) -> BudgetState: ...
    def budget_state(self) -> BudgetState: ...


class Keeper:
    """Holds the budget as it was requested; the engine, created with the same one, enforces it."""

    def __init__(self, engine: _Engine, target: Target) -> None:
        self._engine = engine
        self._target = target
        # The engine's budget and the request behind it are set and read together, from several threads.
        self._lock = Lock()

    def read(self) -> tuple[Target, BudgetState]:
        """The budget as it was requested, and its state in the engine."""
        with self._lock:
            return self._target, self._engine.budget_state()

    def set(self, target: Target) -> BudgetState:
        """Set another budget; returns its state in the engine, even if another thread sets a different one next."""
        with self._lock:
            state = self._engine.set_budget(target.average_mflops, target.latency_s)
            self._target = target
            return state
