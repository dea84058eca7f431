"""A snapshot of the budget and its totals, for the routes, the metrics and the page."""

from dataclasses import dataclass

from service.budget.latency import LatencyState


@dataclass(frozen=True, slots=True)
class BudgetState:
    """A snapshot that can be sent to any process. Costs are mflops (millions of multiply-adds), averages per image."""

    budget_mflops: float  # as set
    fraction: float  # the same, as a fraction of the full network
    working_mflops: float  # what is enforced now: the budget, or less (`BudgetController.work_at`)
    burst_images: float
    position: float  # on the frontier, 0 to 1: the average, without the current swing
    thresholds: tuple[float, ...]  # current, one per exit, finite or +-inf
    expected_mflops: float  # this and the next two: results of held-out images at `position`
    expected_accuracy: float
    expected_shares: tuple[float, ...]
    frontier_limited: bool  # the frontier ends below the budget: going deeper gained nothing on held-out images
    rolling_mflops: float | None  # mean over the last 1,000 answers; None before the first
    settled_mflops: float
    reserved_mflops: float
    answered: int
    abandoned: int  # given up by their clients, failed, or refused because their deadline had passed
    spent_answered_mflops: float
    spent_abandoned_mflops: float
    latency: LatencyState | None = None  # if there is a latency target
