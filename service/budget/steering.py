"""Moves along the frontier so that the spending of steady traffic averages just under the budget.

Plain Python over numbers: no clock, no thread, no array. Costs inside are multiply-adds, those of a frontier mflops.
"""

from math import pi, tan
from typing import Final

from models.frontier import Frontier, FrontierPoint
from service.budget.ledger import ROLLING_ANSWERS
from service.budget.trail import Trail

MEGA: Final = 1_000_000
QUARTER_TURN: Final = pi / 2


class Steering:
    """A balance over all images, forecast to the end of those in flight, and thresholds that keep it where it belongs.

    Every image is admitted with an aim and settles with what it spent; `_settled` is the sum of the differences. What
    is controlled is the forecast: `_settled`, plus the aims of the images in flight, less what each is expected to
    spend in all, given the exits it has passed. A decision moves the forecast at once, long before the answer, so the
    loop has no delay and may be quick. It steers for the cost

        aim + (forecast - reference) / HORIZON_IMAGES + integral

    and as the forecast already integrates the error in cost, the average is right without the last term; that one only
    brings the forecast back to its reference where live images lastingly differ from the calibration. It stands still
    while the frontier cannot go where it should, and the forecast is bounded: traffic that cannot use its budget does
    not save it up.

    What an observer sees is the average of the last 1,000 answers (or `window_answers`), that is, the balance now less
    the balance 1,000 answers ago: the *margin*, were traffic to stop now. It is to lie within `BAND_IMAGES` of its
    middle. Hence
    * the reference follows the deviation that the balance had where the coming window starts (`ECHO` of it, so that old
      deviations die out);
    * hard images answer last: when traffic stops, the window ends with the excess of all that were in flight, so the
      aim stays below the budget by that much, too. Excess beyond `MAX_EXCESS_SHARE`, for which no aim makes room, is
      left out of the margin, as long as so many are in flight: they are not to starve where there are always as many;
    * the nearer the margin is to an end of the band, the steeper it steers back (the tangent is what keeps a random
      walk between two walls with the least effort);
    * swings cost accuracy, and images in flight can still put the margin right when traffic stops. So with many in
      flight it looks further ahead and lets the margin stray (`_relax`), until their number falls below what it was.
    The last word has the ledger: whatever the margin, an image goes on only if the average allows it. Where it refuses
    many, steering has been misled, and is told (`refuse`).
    """

    AIM_UNDER: Final = 0.004  # of the budget; with what is kept for images in flight the average ends at 0.995 of it
    HORIZON_IMAGES: Final = 24.0  # shorter is tighter, but thresholds that swing cost accuracy
    LONGEST_HORIZON_IMAGES: Final = 70.0
    HORIZON_IN_FLIGHT: Final = 3.0  # between the two it is so many times the images in flight
    INTEGRAL_IMAGES: Final = 1_000.0  # time constant
    ECHO: Final = 0.5
    BAND_IMAGES: Final = 5.0  # half of it
    STEEPEST_AT: Final = 0.85  # of that; beyond, it pulls no harder
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
        self._owed = 0.0  # the same, less what these images are expected to spend
        self._settled = 0.0
        self._settled_mean = 0.0
        self._excess_mean = 0.0  # of what the images in flight are expected to spend beyond their aims
        self._integral = 0.0
        self._usual_cost = 0.0  # for which thresholds were steered, on average: the operating point
        self._n_answers = 0  # since the running means were brought up to date,
        self._errors = 0.0  # and how far off the forecast was, summed over them
        self._n_refused = 0  # of the images that have answered meanwhile, those that the ledger ended
        self._middle = 0.0  # of the band, as a forecast
        self.set_budget(budget)

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Those of this moment, one per exit."""
        return self._point_at(self._wanted()).thresholds

    def threshold(self, passed: int) -> float:
        """That of one exit, from 1."""
        return self._thresholds[passed - 1][self._step_at(self._wanted())]

    @property
    def point(self) -> FrontierPoint:
        """The operating point, without the swing of the moment."""
        return self._point_at(self._usual_cost)

    def set_budget(self, budget: int) -> None:
        """Aim images admitted from now on at another budget.

        The forecast stays where it was: what images in flight will now spend less, or more, than they were admitted for
        is neither handed to others nor asked back, so that a new budget holds at once, however often it changes.
        """
        self._budget = budget
        self._integral = min(max(self._integral, -0.5 * budget), 0.5 * budget)
        self._usual_cost = budget * (1.0 - self.AIM_UNDER) + self._integral
        self._follow_operating_point()
        self._settled_mean = self._settled
        self._trail: Trail = Trail(self._window, self._settled)
        self.refresh()

    def admit(self, n_images: int) -> float:
        """Note that images come in; returns what each of them is to spend on average."""
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
        """Note that images with an aim have answered, or were given up, that were committed to `stages` and have spent
        so much each."""
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

        What that saves counts as spent, else thresholds that are too generous look right: what they overspend is what
        the ledger takes back. For the same reason the integral, which such traffic has wound up, falls with every one.
        """
        self._n_refused += n_images
        self._settled -= n_images * max(0.0, self._expected[passed] - self._costs[passed - 1])

    def refresh(self) -> None:
        """Bring what follows slowly up to date; once a batch is often enough."""
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
        """Have the running means and the integral follow the answers that came since."""
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
        """Look ahead as far as the images in flight allow, and the less far the fewer of the usual number are left."""
        shortest = self.HORIZON_IMAGES
        longest = max(shortest, min(self.LONGEST_HORIZON_IMAGES, self.HORIZON_IN_FLIGHT * self._n_in_flight_mean))
        self._usual = self._n_in_flight / self._n_in_flight_mean if self._n_in_flight_mean else 1.0
        self._horizon = shortest + (longest - shortest) * min(max(6.0 * self._usual - 5.0, 0.0), 1.0)
        # As steep as the horizon at the middle of the band; less where the margin may stray.
        self._steepness = self.BAND_IMAGES * self._budget / shortest * (shortest / self._horizon) ** 2

    def _follow_operating_point(self) -> None:
        """Expect of images in flight what they spend on average where thresholds are, on average.

        What is expected of them anew is nothing that they have saved or spent: the forecast stays where it was. With
        thousands in flight it would else move by more than it is bounded to, and lastingly so, one way.
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
        """What an image spends in all at the operating point, by exits passed."""
        shares = self.point.shares
        going_on = spending = 0.0
        expected = [0.0] * len(self._costs)
        for i in range(len(self._costs) - 1, -1, -1):
            going_on += shares[i]
            spending += shares[i] * self._costs[i]
            expected[i] = spending / going_on if going_on > 1e-9 else float(self._costs[i])
        return expected
