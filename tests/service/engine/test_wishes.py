"""Requests with options, under a virtual clock: their exits, reasons and charges."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.budget.controller import BudgetController
from service.engine.core import Core
from service.engine.rows import ENDED, Options
from service.engine.scheduler import Scheduler
from service.engine.wishes import Deadlines
from service.errors import EngineTooLate
from tests.service.simulation import COSTS_MFLOPS, FULL_MFLOPS
from tests.service.virtual import CLASS_NAMES, N_EXITS, World, curve, spent_is_what_answers_say, world

NEVER = 2.0  # no softmax output reaches it: such an image goes on as long as it may


def test_only_requests_without_options_are_plain() -> None:
    assert Options().is_plain
    assert Options(top_k=7).is_plain
    for wish in ({"exit": 1}, {"min_confidence": 0.0}, {"max_mflops": 20.0}, {"deadline_s": 1.0}, {"steps": True}):
        assert not Options(**wish).is_plain


@pytest.mark.parametrize("wanted", range(1, N_EXITS + 1))
@pytest.mark.parametrize("exits", [True, False])
def test_a_pinned_image_answers_at_its_exit(wanted: int, exits: bool) -> None:
    here = world(exits=exits)
    here.admit("a", Options(exit=wanted))
    here.run()
    answer = here.answer("a")
    assert (answer.exit, answer.reason) == (wanted, "pinned")
    assert answer.mflops == pytest.approx(COSTS_MFLOPS[wanted - 1])


@pytest.mark.parametrize(
    ("least", "exit_", "reason"),
    [(0.0, 1, "confident"), (0.6, 2, "confident"), (0.9, 3, "confident"), (NEVER, 6, "final")],
)
def test_an_image_leaves_at_the_first_exit_with_its_requested_confidence(least: float, exit_: int, reason: str) -> None:
    here = world()
    here.admit("a", Options(min_confidence=least))
    here.run()
    assert (here.answer("a").exit, here.answer("a").reason) == (exit_, reason)


def test_a_confidence_is_reached_by_its_equal() -> None:
    here = world()
    here.admit("a", Options(exit=3))
    here.run()
    here.admit("b", Options(min_confidence=here.answer("a").confidence))
    here.run()
    assert here.answer("b").exit == 3


@pytest.mark.parametrize(("cap", "exit_"), [(COSTS_MFLOPS[0], 1), (30.0, 2), (COSTS_MFLOPS[3], 4)])
def test_an_image_goes_no_deeper_than_its_cost_limit_allows(cap: float, exit_: int) -> None:
    here = world()
    here.admit("a", Options(max_mflops=cap, min_confidence=NEVER))
    here.run()
    assert (here.answer("a").exit, here.answer("a").reason) == (exit_, "budget")
    assert here.answer("a").mflops <= cap


def test_a_cost_limit_of_an_answers_cost_reaches_its_exit() -> None:
    dear = 16_258_069
    assert dear > dear / 1e6 * 1e6  # true for one number in ninety
    costs = (COSTS_MFLOPS[0], dear / 1e6, *COSTS_MFLOPS[2:])
    here = World(Core(BudgetController(curve(), costs, FULL_MFLOPS, steer=False), Scheduler(N_EXITS), CLASS_NAMES))
    here.admit("a", Options(exit=2))
    here.run()
    here.admit("b", Options(max_mflops=here.answer("a").mflops, min_confidence=NEVER))
    here.run()
    assert here.answer("b").exit == 2


def test_a_cost_limit_above_the_full_cost_changes_nothing() -> None:
    here = world()
    here.admit("plain", Options())
    here.admit("capped", Options(max_mflops=1e6))
    here.run()
    assert here.answer("plain") == here.answer("capped")


def test_the_ledger_overrides_every_option() -> None:
    """All images request the last exit at the budget of the first: the burst is spent, and the rest leave earlier."""
    here = world(budget_mflops=COSTS_MFLOPS[0], burst_images=10.0, max_rows=1)
    tokens = list(range(40))
    for token in tokens:
        here.admit(token, Options(exit=N_EXITS))
    here.run()
    reasons = [here.answer(token).reason for token in tokens]
    assert set(reasons) == {"pinned", "budget"}
    assert sum(here.answer(token).mflops for token in tokens) <= (len(tokens) + 10) * COSTS_MFLOPS[0] + 1e-6
    assert spent_is_what_answers_say(here, tokens)


# --- deadlines --------------------------------------------------------------------------------------------------


def test_the_best_answer_so_far_leaves_at_the_deadline_while_its_next_stage_runs() -> None:
    here = world()
    request = here.admit("a", Options(exit=N_EXITS, deadline_s=here.now_s + 0.025))  # stages end at 10, 20, 30 ms
    here.run()
    answer = here.answer("a")
    assert (answer.exit, answer.reason) == (2, "deadline")
    assert answer.mflops == pytest.approx(COSTS_MFLOPS[2])  # stage 3 ran in vain, and is charged
    assert here.core.n_answered == here.core.n_ended == 1
    assert spent_is_what_answers_say(here, ["a"])
    assert request.state is ENDED


def test_a_batch_keeps_the_states_that_its_lane_has_yet_to_read() -> None:
    here = world()
    request = here.admit("a", Options(exit=N_EXITS, deadline_s=here.now_s + 1))
    batch = here.start()
    assert batch is not None
    here.finish(batch)
    batch = here.start()  # handed to a lane, not begun yet
    assert batch is not None
    here.wait_until(here.now_s + 2)
    assert here.answer("a").reason == "deadline"
    assert batch.states[0] is not ENDED
    here.finish(batch)
    assert request.state is ENDED
    assert here.start() is None


def test_the_best_answer_so_far_leaves_while_it_waits() -> None:
    here = world()
    request = here.admit("a", Options(exit=N_EXITS, deadline_s=here.now_s + 1))
    batch = here.start()
    assert batch is not None
    here.finish(batch)
    here.wait_until(here.now_s + 2)
    assert (here.answer("a").exit, here.answer("a").reason) == (1, "deadline")
    assert here.answer("a").mflops == pytest.approx(COSTS_MFLOPS[0])  # stage 2 was committed but never ran
    assert request.state is ENDED
    assert here.start() is None
    assert spent_is_what_answers_say(here, ["a"])


def test_before_the_first_exit_a_deadline_waits_for_it_or_fails() -> None:
    here = world()
    here.admit("runs", Options(exit=N_EXITS, deadline_s=here.now_s + 0.005))
    batch = here.start()
    here.admit("waits", Options(deadline_s=here.now_s + 0.005))
    here.wait_until(here.now_s + 0.01)
    assert isinstance(here.outcome("waits"), EngineTooLate)
    assert batch is not None
    here.finish(batch)
    assert (here.answer("runs").exit, here.answer("runs").reason) == (1, "deadline")
    assert (here.core.n_answered, here.core.n_late, here.core.n_ended) == (1, 1, 2)
    assert here.start() is None
    assert spent_is_what_answers_say(here, ["runs"])


def test_an_image_that_is_confident_in_time_does_not_wait_for_its_deadline() -> None:
    here = world()
    here.admit("a", Options(min_confidence=0.0, deadline_s=here.now_s + 0.010))
    here.run()
    here.wait_until(here.now_s + 1)
    assert here.answer("a").reason == "confident"


def test_a_client_that_leaves_before_its_deadline_is_not_answered() -> None:
    here = world()
    request = here.admit("a", Options(exit=N_EXITS, deadline_s=here.now_s + 0.015))
    batch = here.start()
    assert batch is not None
    here.core.abandon(request)
    here.wait_until(here.now_s + 0.02)
    here.finish(batch)
    assert here.told == []
    assert (here.core.n_abandoned, here.core.n_ended) == (1, 1)


def test_deadlines_of_finished_images_use_no_memory() -> None:
    here, deadlines = world(), Deadlines()
    for number in range(10_000):
        request = here.admit(number, Options(deadline_s=1e6 + number))
        deadlines.add(request)
        if number % 100:
            request.state = ENDED
    assert len(deadlines._heap) <= 2 * 100 + Deadlines.FEW
    due = deadlines.pop_due(inf)
    assert [request.token for request in due] == list(range(0, 10_000, 100))
    assert deadlines.next_s == inf


# --- steps ------------------------------------------------------------------------------------------------------


def test_every_exit_passed_is_reported_before_the_answer() -> None:
    here = world()
    here.admit("a", Options(top_k=2, exit=4, steps=True))
    here.run()
    steps, answer = here.steps("a"), here.answer("a")
    assert [step.exit for step in steps] == [1, 2, 3]
    assert [step.mflops for step in steps] == pytest.approx(COSTS_MFLOPS[:3])
    assert [step.score for step in steps] == [0.0, 1.0, 2.0]
    assert [step.confidence for step in steps] == sorted(step.confidence for step in steps)
    assert all(step.label == "bee" and len(step.top_k) == 2 for step in steps)
    assert [step.threshold for step in steps] == list(here.core.budget.thresholds[:3])
    assert (answer.score, answer.threshold) == (3.0, here.core.budget.thresholds[3])
    assert [token for token, _ in here.told] == ["a"] * 4
    assert here.told[-1][1] is answer


def test_without_the_steps_option_only_the_answer_is_reported() -> None:
    here = world()
    here.admit("a", Options())
    here.admit("b", Options(exit=4))
    here.run()
    assert len(here.told) == 2
    assert here.answer("a").score is here.answer("a").threshold is None


# --- all combined -----------------------------------------------------------------------------------------------

WISHES = st.builds(
    lambda exit_, least, cap, deadline_ms, steps: (exit_, least, cap, deadline_ms, steps),
    st.none() | st.integers(1, N_EXITS),
    st.none() | st.floats(0, 1),
    st.just(inf) | st.floats(COSTS_MFLOPS[0], FULL_MFLOPS),
    st.just(inf) | st.floats(0, 100),
    st.booleans(),
)


@given(st.lists(st.tuples(WISHES, st.sampled_from(["stays", "leaves"]), st.integers(0, 30)), max_size=25))
def test_with_any_options_every_image_gets_one_outcome_and_the_ledger_is_exact(
    arrivals: list[tuple[tuple[int | None, float | None, float, float, bool], str, int]],
) -> None:
    here: World = world(budget_mflops=0.5 * FULL_MFLOPS, burst_images=4.0, max_rows=4)
    requests = {}
    for token, ((exit_, least, cap, deadline_ms, steps), _, pause_ms) in enumerate(arrivals):
        options = Options(2, exit_, least, cap, here.now_s + deadline_ms / 1e3, steps)
        requests[token] = here.admit(token, options)
        if pause_ms > 20 and (batch := here.start()) is not None:
            for other, (_, way, _) in enumerate(arrivals[:token]):
                if way == "leaves":
                    here.core.abandon(requests[other])
            here.wait_until(here.now_s + pause_ms / 1e3)
            here.finish(batch)
    here.run()
    core, ledger = here.core, here.core.budget.ledger
    outcomes = [token for token, told in here.told if not hasattr(told, "score") or hasattr(told, "reason")]
    assert len(outcomes) == len(set(outcomes)) == core.n_answered + core.n_late
    assert core.n_ended == len(arrivals) == core.n_answered + core.n_late + core.n_abandoned
    assert ledger.reserved == 0
    assert ledger.answered == core.n_answered
    answers = [here.answer(token) for token in outcomes if not isinstance(here.outcome(token), EngineTooLate)]
    assert ledger.spent_answered == sum(round(answer.mflops * 1e6) for answer in answers)
    assert ledger.spent_answered <= len(answers) * ledger.allowance + ledger.cap
    assert all(request.state is ENDED for request in requests.values())
    for token in outcomes:
        options, answer = requests[token].options, here.outcome(token)
        if not isinstance(answer, EngineTooLate):
            ran = answer.mflops if answer.reason != "deadline" else COSTS_MFLOPS[answer.exit - 1]  # type: ignore
            assert ran <= max(options.max_mflops, COSTS_MFLOPS[0]) + 1e-6
            assert [step.exit for step in here.steps(token)] == (
                list(range(1, len(here.steps(token)) + 1)) if options.steps else []
            )
