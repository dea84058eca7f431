"""Moves the thresholds along the frontier so that the spending of steady traffic averages just under the budget.

Plain Python over numbers: no clock, no thread, no array. Costs here are multiply-adds; a frontier's are mflops.
"""

from math import pi, tan
from typing import Final

from models.frontier import Frontier, FrontierPoint
from service.budget.ledger import ROLLING_ANSWERS
from service.budget.trail import Trail

MEGA: Final = 1_000_000
QUARTER_TURN: Final = pi / 2


class Steering:
    """Feedback control of a balance over all images, forecast to the end of those in flight, by the thresholds.

    Every image is admitted with an aim and settles with what it spent; `_settled` is the sum of the differences. The
    controlled variable is the forecast: `_settled`, plus the aims of the images in flight, less what each is expected
    to spend in total, given the exits that it has passed. A decision moves the forecast at once, long before the
    answer, so the loop has no delay and may be fast. The cost steered for is

        aim + (forecast - reference) / HORIZON_IMAGES + integral

    As the forecast already integrates the error in cost, the average is right without the integral, which only returns
    the forecast to its reference if live images differ lastingly from the calibration. The integral is frozen while the
    frontier limits the cost, and the forecast is bounded: traffic that cannot use its budget saves nothing up.

    Observers see the average of the last 1,000 answers (or `window_answers`): the balance now less the balance 1,000
    answers ago. The *margin* is this difference, were traffic to stop now. It should lie within `BAND_IMAGES` of its
    middle. Hence:
    * The reference follows the deviation of the balance at the start of the coming window (`ECHO` of it, so that old
      deviations die out).
    * Hard images answer last: when traffic stops, the window ends with the excess of all images in flight, so the aim
      is below the budget by that much, too. Excess beyond `MAX_EXCESS_SHARE`, for which the aim makes no room, is left
      out of the margin while so many are in flight: otherwise images would starve if there are always as many.
    * The nearer the margin is to an end of the band, the more steeply it steers back (the tangent keeps a random walk
      between two walls with the least effort).
    * Swings cost accuracy, and images in flight can still correct the margin when traffic stops. So with many in
      flight it looks further ahead and lets the margin stray (`_relax`), until their number falls below the usual.
    The ledger has the last word: whatever the margin, an image goes on only if the average allows it. If it refuses
    many, steering has been misled, and accounts for it (`refuse`).
    """

    AIM_UNDER: Final = 0.004  # of the budget; with what is kept for images in flight, the average ends at 0.995 of it
    HORIZON_IMAGES: Final = 24.0  # the shortest; shorter is tighter, but swinging thresholds cost accuracy
    LONGEST_HORIZON_IMAGES: Final = 70.0
    HORIZON_IN_FLIGHT: Final = 3.0  # between the two, the longest horizon is this times the images in flight
    INTEGRAL_IMAGES: Final = 1_000.0  # time constant
    ECHO: Final = 0.5
    BAND_IMAGES: Final = 5.0  # half of the band's width
    STEEPEST_AT: Final = 0.85  # of `BAND_IMAGES`; beyond it, the correction grows no further
    MEAN_IMAGES: Final = 500.0  # time constant of the running means below
    MAX_FORECAST_IMAGES: Final = 16.0
    MAX_EXCESS_SHARE: Final = 0.008  # of the window
    TABLE_STEPS: Final = 1_024

    def __init__(
        self, frontier: Frontier, costs: tuple[int, ...], budget: int, window_answers: int = ROLLING_ANSWERS
    ) -> None:
        self._costs, self._window = costs, window_answers
        self._table = [frontier.at(i / self.TABLE_STEPS) for i in range(self.TABLE_STEPS + 1)]
        self._thresholds = [[point.thresholds[i] for point in self._table] for i in range(len(costs))]  # by exit
        self._lowest, self.highest = self._table[0].cost * MEGA, self._table[-1].cost * MEGA
        reach = self.highest - self._lowest
        self._steps_per_cost = self.TABLE_STEPS / reach if reach > 0 else 0.0
        self._in_flight = [0] * len(costs)  # images, by exits passed
        self._n_in_flight = 0
        self._n_in_flight_mean = 0.0
        self._aims = 0.0  # of the images in flight
        self._owed = 0.0  # `_aims`, less what the images in flight are expected to spend
        self._settled = 0.0
        self._settled_mean = 0.0
        self._excess_mean = 0.0  # mean of what the images in flight are expected to spend beyond their aims
        self._integral = 0.0
        self._usual_cost = 0.0  # mean of the cost steered for: the operating point
        self._n_answers = 0  # since the running means were updated
        self._errors = 0.0  # of the forecast, summed over these answers
        self._n_refused = 0  # images that the ledger ended since then
        self._middle = 0.0  # of the band, as a value of the forecast
        self.set_budget(budget)

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The current thresholds, one per exit."""
        return self._point_at(self._wanted()).thresholds

    def threshold(self, passed: int) -> float:
        """The current threshold of exit `passed` (from 1)."""
        return self._thresholds[passed - 1][self._step_at(self._wanted())]

    @property
    def point(self) -> FrontierPoint:
        """The operating point: where the thresholds are on average, without their current swing."""
        return self._point_at(self._usual_cost)

    def set_budget(self, budget: int) -> None:
        """Aim images admitted from now on at another budget.

        The forecast stays as it is: what images in flight will now spend less, or more, than they were admitted for is
        neither passed on to others nor claimed back. So a new budget holds at once, however often it changes.
        """
        self._budget = budget
        self._integral = min(max(self._integral, -0.5 * budget), 0.5 * budget)
        self._usual_cost = budget * (1.0 - self.AIM_UNDER) + self._integral
        self._follow_operating_point()
        self._settled_mean = self._settled
        self._trail: Trail = Trail(self._window, self._settled)
        self.refresh()

    def admit(self, n_images: int) -> float:
        """Note that images are admitted; returns what each of them is to spend on average."""
        self._in_flight[0] += n_images
        self._n_in_flight += n_images
        self._aims += n_images * self._aim
        self._owed += n_images * (self._aim - self._expected[0])
        return self._aim

    def go_on(self, passed: int, n_images: int) -> None:
        """Note that images go on beyond exit `passed` (1-based)."""
        self._in_flight[passed - 1] -= n_images
        self._in_flight[passed] += n_images
        self._owed += n_images * (self._expected[passed - 1] - self._expected[passed])

    def settle(self, aim: float, n_images: int, stages: int, spent: int, answered: bool) -> None:
        """Note that images were answered or given up, which were admitted with `aim`, committed to `stages`, and have
        spent `spent` each."""
        earned = (aim if answered else min(aim, spent)) - spent
        self._aims -= n_images * aim
        if answered:
            self._trail.add(self._settled, earned, n_images)
        self._settled += n_images * earned
        self._owed += n_images * (self._expected[stages - 1] - aim)
        self._in_flight[stages - 1] -= n_images
        self._n_in_flight -= n_images
        if answered:
            self._n_answers += n_images
            self._errors += n_images * (self._settled + self._owed - self._reference)

    def refuse(self, passed: int, n_images: int) -> None:
        """Note that the ledger ends images at exit `passed` that would have gone on.

        What this saves counts as spent; otherwise thresholds that let too many images go on would look right, because
        the ledger takes back what they overspend. For the same reason the integral, which such traffic has wound up,
        falls with every refusal.
        """
        self._n_refused += n_images
        self._settled -= n_images * max(0.0, self._expected[passed] - self._costs[passed - 1])

    def refresh(self) -> None:
        """Update what changes slowly; once per batch is often enough."""
        self._follow_answers()
        self._follow_operating_point()
        most = self.MAX_FORECAST_IMAGES * self._budget
        self._settled = min(max(self._settled, -most - self._owed), most - self._owed)
        self._relax()
        at_window_start: float = self._trail.ago(self._window - self._n_in_flight)
        deviation = self.ECHO * (at_window_start - self._settled_mean)
        self._reference = min(max(deviation, -0.5 * most), 0.5 * most)
        self._middle = at_window_start - self._excess_paid - self._excess_unpaid * min(self._usual, 1.0)

    def _follow_answers(self) -> None:
        """Update the running means and the integral by the answers since the last call."""
        if not self._n_answers:
            return
        share = 1.0 - (1.0 - 1.0 / self.MEAN_IMAGES) ** self._n_answers
        self._n_in_flight_mean += share * (self._n_in_flight - self._n_in_flight_mean)
        self._settled_mean += share * (self._settled - self._settled_mean)
        self._excess_mean += share * (-self._owed - self._excess_mean)
        wanted = self._wanted()
        self._usual_cost += share * (min(max(wanted, self._lowest), self.highest) - self._usual_cost)
        too_low, too_high = wanted <= self._lowest, wanted >= self.highest
        if (self._errors > 0 or not too_low) and (self._errors < 0 or not too_high):
            moved = self._integral + self._errors / (self._horizon * self.INTEGRAL_IMAGES)
            self._integral = min(max(moved, -0.5 * self._budget), 0.5 * self._budget)
        if self._integral > 0:
            self._integral *= (1.0 - 1.0 / self.MEAN_IMAGES) ** self._n_refused
        self._n_answers, self._errors, self._n_refused = 0, 0.0, 0

    def _relax(self) -> None:
        """Set the horizon: longer with more images in flight on average, shorter once fewer than usual are left."""
        shortest = self.HORIZON_IMAGES
        longest = max(shortest, min(self.LONGEST_HORIZON_IMAGES, self.HORIZON_IN_FLIGHT * self._n_in_flight_mean))
        self._usual = self._n_in_flight / self._n_in_flight_mean if self._n_in_flight_mean else 1.0
        self._horizon = shortest + (longest - shortest) * min(max(6.0 * self._usual - 5.0, 0.0), 1.0)
        # Scaled to the gain of the shortest horizon; less with a longer one, which lets the margin stray.
        self._steepness = self.BAND_IMAGES * self._budget / shortest * (shortest / self._horizon) ** 2

    def _follow_operating_point(self) -> None:
        """Update the aim, and what images in flight are expected to spend, to the operating point.

        A changed expectation is neither saving nor spending, so the forecast stays as it is. With thousands in flight,
        it would otherwise move by more than its bound, and lastingly in one direction.
        """
        excess = min(max(self._excess_mean, 0.0), self.MAX_EXCESS_SHARE * self._window * self._budget)
        self._excess_paid, self._excess_unpaid = excess, max(self._excess_mean - excess, 0.0)
        self._aim = self._budget * (1.0 - self.AIM_UNDER) - excess / self._window
        self._expected = self._expected_costs()
        owed = self._aims - sum(n * cost for n, cost in zip(self._in_flight, self._expected, strict=True))
        self._settled += self._owed - owed
        self._owed = owed

    def _wanted(self) -> float:
        forecast = self._settled + self._owed
        wanted = self._aim + self._integral + (forecast - self._reference) / self._horizon
        off = (forecast - self._middle) / (self.BAND_IMAGES * self._budget)
        off = min(max(off, -self.STEEPEST_AT), self.STEEPEST_AT)
        return wanted + self._steepness * (tan(QUARTER_TURN * off) / QUARTER_TURN - off)

    def _point_at(self, cost: float) -> FrontierPoint:
        return self._table[self._step_at(cost)]

    def _step_at(self, cost: float) -> int:
        step = int((cost - self._lowest) * self._steps_per_cost)
        return 0 if step < 0 else step if step < self.TABLE_STEPS else self.TABLE_STEPS

    def _expected_costs(self) -> list[float]:
        """What an image spends in total at the operating point, by exits passed."""
        shares = self.point.shares
        going_on = spending = 0.0
        expected = [0.0] * len(self._costs)
        for i in range(len(self._costs) - 1, -1, -1):
            going_on += shares[i]
            spending += shares[i] * self._costs[i]
            expected[i] = spending / going_on if going_on > 1e-9 else float(self._costs[i])
        return expected
