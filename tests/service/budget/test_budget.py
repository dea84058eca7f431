"""The ledger's bound under any interleaving, and where steering ends under many kinds of traffic."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.frontier import build_frontier
from service.assembly import default_burst_images
from service.budget.controller import BudgetController
from service.budget.ledger import Account, Ledger
from tests.service.simulation import COSTS_MFLOPS, FULL_MFLOPS, frontier, population, simulate, worst_window

FRONTIER = frontier()
BURST_IMAGES = 32


def controller(fraction: float, burst_images: float = BURST_IMAGES, steer: bool = True) -> BudgetController:
    return BudgetController(FRONTIER, COSTS_MFLOPS, fraction * FULL_MFLOPS, burst_images, steer)


# --- the ledger -------------------------------------------------------------------------------------------------

COSTS = (100, 170, 260, 300, 410)
ACTIONS = ["admit", "go on", "go on", "go on together", "run", "answer", "answer", "answer together", "abandon"]
ACTION = st.tuples(st.sampled_from([*ACTIONS, "set", "work"]), st.integers(0, 2**31))


@dataclass(eq=False)
class Flight:
    account: Account
    stages: int = 1
    spent: int = 0

    @property
    def committed(self) -> int:
        return COSTS[self.stages - 1]

    def goes_on(self, ledger: Ledger) -> bool:
        """Whether it may, and does."""
        if self.stages == len(COSTS) or not ledger.commit(self.account, 1, self.committed, COSTS[self.stages]):
            return False
        self.stages += 1
        return True


@settings(max_examples=300, deadline=None)
@given(st.lists(ACTION, max_size=200), st.integers(100, 410), st.sampled_from([0, 0.5, 1, 3.7, 10]))
def test_no_window_of_answers_overspends_whatever_the_order(actions, allowance, burst):
    ledger = Ledger(allowance, burst)
    flights: list[Flight] = []
    answers: list[tuple[int, int]] = []
    highest_cap = ledger.cap
    for action, number in actions:
        flight = flights[number % len(flights)] if flights else None
        if action == "admit":
            n_images = 1 + number % 3
            account = ledger.open(COSTS[0], n_images)
            flights += [Flight(account) for _ in range(n_images)]
        elif action == "set":
            ledger.set_allowance(100 + number % 311)
            highest_cap = max(highest_cap, ledger.cap)
        elif action == "work":
            ledger.work_at(100 + number % 311)
        elif flight is None:
            continue
        elif action == "run":
            flight.spent = flight.committed
        elif action == "go on":
            flight.goes_on(ledger)
        elif action == "go on together":
            alike = [f for f in flights if (f.account, f.stages) == (flight.account, flight.stages)]
            if flight.stages < len(COSTS):
                further = COSTS[flight.stages]
                n_going_on = ledger.commit(flight.account, len(alike), flight.committed, further)
                assert n_going_on == len(alike) or not ledger.commit(flight.account, 1, flight.committed, further)
                for one in alike[:n_going_on]:
                    one.stages += 1
        else:
            # All images of its account at the same stage, or only this one.
            seen = (flight.account, flight.stages, flight.spent)
            alike = [f for f in flights if (f.account, f.stages, f.spent) == seen]
            ending = alike if action == "answer together" else [flight]
            for one in ending:
                flights.remove(one)
            answered = action != "abandon"
            ledger.close(flight.account, len(ending), flight.committed, flight.spent, answered)
            answers += [(f.spent, f.account.allowance) for f in ending] if answered else []
        assert 0 <= ledger.reserved <= ledger.settled <= highest_cap
        assert ledger.reserved == sum(max(0, f.committed - f.account.allowance) for f in flights)
    for start in range(len(answers)):
        over = 0
        for spent, allowed in answers[start:]:
            over += spent - allowed
            assert over <= highest_cap
    assert ledger.spent_answered == sum(spent for spent, _ in answers)
    recent = [spent for spent, _ in answers[-1000:]]
    assert ledger.rolling_average == (sum(recent) / len(recent) if recent else None)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["admit", "go on", "go on", "answer"]), st.integers(0, 2**31)), max_size=200),
    st.integers(100, 410),
)
def test_whenever_traffic_stops_the_last_answers_keep_the_budget(actions, allowance):
    window = 6
    ledger = Ledger(allowance, 100, average_over=window)  # the other bound does not apply
    flights: list[Flight] = []
    spent: list[int] = []
    was_kept = False
    for action, number in actions:
        flight = flights[number % len(flights)] if flights else None
        if action == "admit":
            if len(flights) < window:
                flights.append(Flight(ledger.open(COSTS[0])))
        elif flight is None:
            continue
        elif action == "go on":
            flight.goes_on(ledger)
        else:
            flights.remove(flight)
            ledger.close(flight.account, 1, flight.committed, flight.committed, answered=True)
            spent.append(flight.committed)
        if len(spent) < window:
            continue
        n_older = window - len(flights)
        would_be = sum(spent[len(spent) - n_older :]) + sum(flight.committed for flight in flights)
        is_kept = would_be <= window * allowance
        assert is_kept or not was_kept
        was_kept = is_kept


def test_what_would_put_the_average_over_the_allowance_is_refused():
    ledger = Ledger(100, 100, average_over=4)
    for spent in (100, 160, 70, 60):  # 390 in all
        account = ledger.open(50)
        assert ledger.commit(account, 1, 50, spent) == 1
        ledger.close(account, 1, spent, spent, answered=True)
    # The first, of 100, would no longer count: 290 and what the new one spends.
    account = ledger.open(50)
    assert ledger.commit(account, 1, 50, 111) == 0
    assert ledger.commit(account, 1, 50, 110) == 1


def test_a_batch_decision_equals_decisions_one_by_one():
    for average_over, most in ((0, 2), (4, 1)):  # 100 in all beyond the allowances; on average none
        together, one_by_one = (Ledger(100, 1, average_over) for _ in range(2))
        for ledger in (together, one_by_one):
            ledger.close(ledger.open(100, 4), 4, 100, 100, answered=True)
        assert together.commit(together.open(50, 3), 3, 50, 150) == most
        account = one_by_one.open(50, 3)
        assert [one_by_one.commit(account, 1, 50, 150) for _ in range(3)] == [1] * most + [0] * (3 - most)
        assert together.reserved == one_by_one.reserved == 50 * most


def test_images_share_an_account_while_allowance_and_aim_are_equal():
    ledger = Ledger(100, 1)
    first = ledger.open(50, aim=99.0)
    assert ledger.open(50, 3, aim=99.0) is first
    assert ledger.open(50, aim=98.0) is not first
    other = ledger.open(50, aim=99.0)
    ledger.work_at(90)
    assert ledger.open(50, aim=99.0).allowance == 90
    assert (first.allowance, first.aim, other.aim) == (100, 99.0, 99.0)


def test_the_rolling_average_covers_the_last_thousand_answers():
    ledger = Ledger(100, 1)
    for spent, n_images in ((7, 500), (3, 300), (3, 700)):
        ledger.close(ledger.open(1, n_images), n_images, 1, spent, answered=True)
    assert ledger.rolling_average == 3.0


def test_abandoned_images_save_nothing_but_pay_their_excess():
    ledger = Ledger(100, 4)
    ledger.settled = 200
    ledger.close(ledger.open(50), 1, 50, 50, answered=False)
    ledger.close(ledger.open(50, 2), 2, 50, 0, answered=False)  # before they ran
    assert ledger.settled == 200
    assert (ledger.abandoned, ledger.abandoned_unspent) == (3, 2)
    dear = ledger.open(50)
    assert ledger.commit(dear, 1, 50, 180) == 1
    ledger.close(dear, 1, 180, 180, answered=False)
    assert (ledger.settled, ledger.reserved) == (120, 0)


def test_changing_the_budget_back_and_forth_creates_no_savings():
    ledger = Ledger(400, 10)
    for _ in range(5):
        ledger.set_allowance(100)
        ledger.set_allowance(400)
    assert ledger.settled <= 1000


def test_changing_the_budget_back_and_forth_does_not_reduce_the_balance():
    """It once shrank with every lower budget: continual changes by a program cut a quarter of the images short."""
    ledger = Ledger(400, 10)
    ledger.close(ledger.open(400), 1, 400, 3400, answered=True)  # a little more than half of the burst is left
    for _ in range(100):
        ledger.set_allowance(360)
        ledger.set_allowance(400)
    assert ledger.settled == 1000


# --- the controller ---------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    fractions=st.lists(st.floats(0.23, 1.0), min_size=1, max_size=4),
    burst=st.sampled_from([1.0, 4.0, 32.0]),
    harder=st.floats(-3, 3),
    n_clients=st.integers(1, 80),
    steer=st.booleans(),
)
def test_every_window_keeps_the_bound_and_the_ledger_balances(seed, fractions, burst, harder, n_clients, steer):
    budget = controller(fractions[0], burst, steer)
    caps = [budget.ledger.cap]

    def change(n_answers: int) -> None:
        if n_answers % 100 == 0:
            budget.set(fractions[n_answers // 100 % len(fractions)] * FULL_MFLOPS)
            caps.append(budget.ledger.cap)

    run = simulate(budget, population(500, seed, harder), n_clients, at_answer=change)
    assert len(run.spent) == 500
    assert worst_window(run) <= max(caps)
    assert all(spent == budget.costs[exit_index] for spent, exit_index in zip(run.spent, run.exits, strict=True))
    state = budget.state()
    assert budget.ledger.spent_answered == sum(run.spent)
    assert state.answered == 500
    assert state.reserved_mflops == 0


def test_decisions_follow_threshold_then_ledger():
    budget = controller(0.4, burst_images=1.0, steer=False)
    thresholds = FRONTIER.at_cost(0.4 * FULL_MFLOPS).thresholds
    assert budget.thresholds == thresholds
    sure = [budget.admit(1)]
    assert budget.decide(sure, 1, [thresholds[0]]) == ["confident"]
    unsure = [budget.admit(1)]
    reasons = []
    for passed in range(1, 5):
        reasons += budget.decide(unsure, passed, [-1e9])
    # 0.4 x 60.3 M and a burst of as much: 48.2 M in all, enough for four exits (42.1 M) and not for five (51.8 M).
    assert reasons == [None, None, None, "budget"]
    other = [budget.admit(1)]
    # The first took 18.0 M of the 24.1: exit 2 is within the budget itself, exit 3 would take 8.5 M more.
    assert [budget.decide(other, passed, [-1e9])[0] for passed in (1, 2)] == [None, "budget"]


def test_if_the_bound_allows_part_of_a_batch_that_part_continues():
    budget = controller(0.4, burst_images=1.0, steer=False)  # 24.1 M each, and 24.1 M beyond it in all
    accounts = [budget.admit(8)] * 8
    assert budget.decide(accounts, 1, [-1e9] * 8) == [None] * 8
    reasons = budget.decide(accounts, 2, [-1e9, 1e9] * 4)  # exit 3 takes 8.5 M more
    assert reasons == [None, "confident", None, "confident", "budget", "confident", "budget", "confident"]
    assert budget.state().answered == 6
    assert budget.ledger.reserved == 2 * (budget.costs[2] - budget.budget)


def test_every_image_leaves_at_the_last_exit():
    budget = controller(1.0)
    account = [budget.admit(1)]
    assert [budget.decide(account, passed, [-1e9])[0] for passed in range(1, 7)] == [None] * 5 + ["final"]


def test_images_with_nan_scores_do_not_leave_early():
    budget = controller(0.6)
    assert budget.decide([budget.admit(1)], 1, [math.nan]) == [None]


def test_a_budget_at_a_fractional_cost_is_in_range():
    costs = [0.05, 0.14400000000000002]
    scores, correct = np.array([[0.0, 1.0], [1.0, 1.0]]), np.array([[False, True], [True, True]])
    budget = BudgetController(build_frontier(scores, correct, costs), costs, costs[-1])
    assert budget.budget == 144_000


@pytest.mark.parametrize("bad", [0.0, 13.3, 60.4, -1.0, math.nan, math.inf, 1e308])
def test_a_budget_out_of_reach_is_refused_with_both_ends(bad):
    with pytest.raises(ValueError, match=r"first exit costs 13\.392 and the last 60\.308"):
        BudgetController(FRONTIER, COSTS_MFLOPS, bad)
    budget = controller(0.5)
    with pytest.raises(ValueError, match="out of reach"):
        budget.set(bad)
    assert budget.state().budget_mflops == pytest.approx(0.5 * FULL_MFLOPS, abs=1e-6)


def test_the_state_describes_the_budget_that_was_set_even_while_less_is_worked_at():
    budget = controller(1.0)
    as_set = budget.state()
    assert (as_set.fraction, as_set.frontier_limited) == (1.0, True)
    budget.work_at(0.3 * FULL_MFLOPS)
    state = budget.state()
    assert state.working_mflops == pytest.approx(0.3 * FULL_MFLOPS, rel=1e-6)
    for name in ("budget_mflops", "fraction", "frontier_limited"):
        assert getattr(state, name) == getattr(as_set, name), name


def test_working_budgets_between_the_frontiers_end_and_a_budget_beyond_it_have_no_effect():
    assert controller(0.4).useful_mflops == pytest.approx((COSTS_MFLOPS[0], 0.4 * FULL_MFLOPS), rel=1e-6)
    budget = controller(1.0)
    assert budget.useful_mflops == pytest.approx((COSTS_MFLOPS[0], FRONTIER.cost[-1]))
    budget.work_at(FRONTIER.cost[-1])
    assert budget.working_mflops == pytest.approx(FULL_MFLOPS)


# --- where steering ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.25, 0.4, 0.6, 0.8])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_steady_traffic_ends_within_one_percent_under_the_budget(fraction, seed):
    images = population(5_000, seed)
    budget = controller(fraction)
    run = simulate(budget, images)
    assert 0.99 <= run.rolling[-1] <= 1.0
    assert max(run.rolling[999:]) <= 1 + BURST_IMAGES / 1000
    assert run.reasons.count("budget") <= 5  # the ledger refused almost nothing
    point = FRONTIER.at_cost(fraction * FULL_MFLOPS)
    exits = (images[0] >= np.array(point.thresholds)).argmax(axis=1)
    offline = images[1][np.arange(len(exits)), exits].mean()
    assert np.mean(run.right) >= offline - 0.008  # 0.8 % less compute and swinging thresholds; measured 0.001 to 0.006


@pytest.mark.parametrize("n_clients", [1, 8, 128, 256])
def test_it_ends_just_under_the_budget_at_any_concurrency(n_clients):
    run = simulate(controller(0.4), population(5_000, 5), n_clients)
    assert 0.99 <= run.rolling[-1] <= 1.0


@pytest.mark.parametrize(("n_clients", "n_lanes"), [(512, 2), (1_024, 2), (512, 8)])
def test_with_a_thousand_in_flight_the_budget_is_still_spent(n_clients, n_lanes):
    """When traffic stops, hard images are answered last; the reserve for them must not starve earlier ones."""
    n_images = 12_000
    budget = controller(0.4, default_burst_images(n_lanes, max_rows=32))
    run = simulate(budget, population(n_images, 25), n_clients, n_lanes)
    steady = run.spent[2 * n_clients : n_images - 2 * n_clients]
    assert 0.96 <= np.mean(steady) / budget.budget <= 1.0
    assert worst_window(run) <= budget.ledger.cap
    if n_clients < 1_000:
        assert run.rolling[-1] <= 1.0


@pytest.mark.parametrize("n_lanes", [2, 8])
def test_the_default_burst_leaves_the_ledger_nothing_to_refuse_at_full_load(n_lanes):
    burst_images = default_burst_images(n_lanes, max_rows=32)
    n_clients = 64 * n_lanes
    run = simulate(controller(0.4, burst_images), population(5_000, 6), n_clients, n_lanes)
    # Some at the end, where all in flight must fit into the average of the last 1,000.
    assert run.reasons[:-n_clients].count("budget") <= 0.002 * len(run.reasons)
    assert max(run.rolling[999:]) <= 1 + burst_images / 1000
    if n_lanes == 8:  # a bound too tight for the images in flight costs accuracy
        tight = simulate(controller(0.4, 32), population(5_000, 6), n_clients=64 * n_lanes, n_lanes=n_lanes)
        assert tight.reasons.count("budget") > 0.02 * len(
            tight.reasons
        )  # ten times as many, as steering's guard reserves more


@pytest.mark.parametrize(("before", "after"), [(0.25, 0.7), (0.7, 0.25), (0.3, 0.4), (0.8, 0.4)])
def test_a_new_budget_is_reached_within_two_thousand_images(before, after):
    budget = controller(before)
    run = simulate(
        budget, population(5_500, 7), at_answer=lambda n: budget.set(after * FULL_MFLOPS) if n == 2_500 else None
    )
    # Under traffic, the average is lower by what the images in flight will spend above theirs.
    assert all(0.97 <= level <= 1 + BURST_IMAGES / 1000 for level in run.rolling[3_700:])
    assert 0.99 <= run.rolling[-1] <= 1.0


def test_setting_the_same_budget_repeatedly_changes_nothing():
    images = tuple(np.concatenate(parts) for parts in zip(population(1_500, 1), population(500, 101, 1.5), strict=True))
    left_alone, set_again = controller(0.4), controller(0.4)
    expected = simulate(left_alone, images)
    run = simulate(set_again, images, at_answer=lambda n: set_again.set(0.4 * FULL_MFLOPS) if n % 100 == 0 else None)
    assert run.rolling[-1] <= 1.0
    assert run.spent == expected.spent
    set_again.work_at(0.3 * FULL_MFLOPS)
    set_again.set(0.4 * FULL_MFLOPS)  # the same, but not what is worked at
    assert set_again.working_mflops == pytest.approx(0.4 * FULL_MFLOPS)


def test_setting_the_budget_at_every_answer_cuts_no_image_short():
    budget = controller(0.4, 32.0)

    def change(n_answers: int) -> None:
        budget.set((0.36, 0.44)[n_answers % 2] * FULL_MFLOPS)

    run = simulate(budget, population(4_000, seed=11), n_clients=64, at_answer=change)
    assert run.reasons[1_000:].count("budget") < 30
    assert sum(run.spent[1_000:]) > 0.93 * sum(run.allowances[1_000:])


def test_a_continuously_moving_working_budget_is_kept_as_exactly():
    images = population(6_000, 8)
    budget = controller(0.8)
    run = simulate(
        budget,
        images,
        at_answer=lambda n: budget.work_at((0.4 + 0.1 * np.sin(n / 40)) * FULL_MFLOPS) if n % 20 == 0 else None,
    )
    assert worst_window(run) <= budget.ledger.cap
    assert sum(run.spent[1_000:]) == pytest.approx(sum(run.allowances[1_000:]), rel=0.015)
    assert set(run.reasons) <= {"confident", "final"}
    thresholds = np.array(FRONTIER.at_cost(np.mean(run.spent[1_000:]) / 1e6).thresholds)
    exits = (images[0] >= thresholds).argmax(axis=1)
    offline = images[1][np.arange(len(exits)), exits].mean()
    assert np.mean(run.right) >= offline - 0.012  # steering at a fixed budget keeps to 0.008


@pytest.mark.parametrize("fraction", [0.25, 0.4, 0.6, 0.8])
def test_a_stream_of_only_hard_images_keeps_the_budget(fraction):
    scores, right = population(40_000, 11)
    thresholds = np.array(FRONTIER.at_cost(0.6 * FULL_MFLOPS).thresholds)
    hard = (scores >= thresholds).argmax(axis=1) == len(COSTS_MFLOPS) - 1
    run = simulate(controller(fraction), (scores[hard][:4_000], right[hard][:4_000]))
    assert len(run.spent) == 4_000
    assert max(run.rolling[999:]) <= 1 + BURST_IMAGES / 1000
    assert 0.988 <= run.rolling[-1] <= 1.0


@pytest.mark.parametrize("harder", [1.0, -0.5])
def test_traffic_unlike_the_calibration_ends_just_under_the_budget(harder):
    run = simulate(controller(0.4), population(5_000, 13, harder))
    assert 0.988 <= run.rolling[-1] <= 1.0


def test_hard_traffic_after_easy_traffic_finds_no_savings_beyond_the_burst():
    easy, hard = population(4_000, 17, harder=-4.0), population(3_000, 18, harder=1.5)
    run = simulate(controller(0.6), (np.concatenate([easy[0], hard[0]]), np.concatenate([easy[1], hard[1]])))
    assert run.rolling[3_999] < 0.9  # because it cannot be spent
    assert max(run.rolling[999:]) <= 1 + BURST_IMAGES / 1000
    assert 0.985 <= run.rolling[-1] <= 1.0


@pytest.mark.parametrize(("n_clients", "max_rows"), [(64, 32), (256, 256), (1_024, 256)])
@pytest.mark.parametrize("hardness", [0.4, 0.02])
def test_steering_recovers_after_a_single_image_sent_repeatedly(n_clients, max_rows, hardness):
    """One picture leaves steering nothing to steer by; seen on a GPU after a load generator had sent one: 15 % of the
    images after it, and in simulation 57 %, were ended by the ledger as long as traffic went on."""
    scores, right = population(12_000, 31)
    one = np.argsort(-scores.mean(axis=1))[int(hardness * len(scores))]
    images = (
        np.concatenate([scores[[one] * 12_000], scores]),
        np.concatenate([right[[one] * 12_000], right]),
    )
    run = simulate(controller(0.4, default_burst_images(2, max_rows)), images, n_clients, max_rows=max_rows)
    assert run.reasons[-6_000:].count("budget") <= 0.02 * 6_000
    assert 0.97 <= np.mean(run.spent[-6_000:]) / controller(0.4).budget <= 1.01


def test_a_budget_beyond_the_frontier_is_a_ceiling():
    budget = controller(1.0)
    run = simulate(budget, population(3_000, 19))
    state = budget.state()
    assert state.frontier_limited
    assert not controller(0.5).state().frontier_limited
    assert state.position == 1.0
    assert run.rolling[-1] * FULL_MFLOPS == pytest.approx(FRONTIER.cost[-1], rel=0.03)


def test_abandoned_images_leave_steering_in_balance():
    budget = controller(0.4)
    rng = np.random.default_rng(23)
    spent = []
    for scores in population(6_000, 23)[0].tolist():
        account = [budget.admit(1)]
        gone_at = rng.integers(0, 5) if rng.random() < 0.3 else None
        for stage, score in enumerate(scores):
            if stage == gone_at:
                budget.settle(account, stage + 1, answered=False)
                break
            if budget.decide(account, stage + 1, [score]) != [None]:
                spent.append(budget.costs[stage])
                break
        budget.refresh()
    state = budget.state()
    assert state.abandoned > 500
    assert state.answered == len(spent)
    assert state.spent_answered_mflops * 1e6 == pytest.approx(sum(spent))
    # Images abandoned halfway have spent, too, at the expense of the answers.
    assert 0.9 <= np.mean(spent[-1000:]) / budget.ledger.allowance <= 1.0
