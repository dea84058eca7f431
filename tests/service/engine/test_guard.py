"""Which batches are given up, and when a runner counts as unsound, under a virtual clock."""

import pytest

from service.engine.guard import FAILURES_BEFORE_TRIAL, LOOK_EVERY_S, TRIAL_EVERY_S, Guard
from service.engine.lanes import TRIAL, Batch
from service.engine.pace import Pace
from service.engine.rows import ENDED, PLAIN, Request

STAGE_SECONDS = ({1: 0.001, 8: 0.008}, {8: 0.1})  # full batches of 32: 32 ms and 400 ms


def guard(n_lanes: int = 2, hang_s: float = 0.8) -> Guard:
    made = Guard(n_lanes, hang_s)
    made.expect(STAGE_SECONDS, 32)
    return made


def begin(guard: Guard, now_s: float, stage: int = 0) -> Batch:
    batch = Batch(stage, [])
    guard.began(batch, now_s)
    batch.started_s = now_s + 1e-6  # 0 means not begun
    return batch


def end(guard: Guard, batch: Batch, now_s: float, error: Exception | None = None) -> bool:
    batch.error = error
    return guard.ended(batch, now_s)


def look_until(guard: Guard, start_s: float, end_s: float) -> list[tuple[float, Batch]]:
    """Let the guard look at its own times; returns what it gave up, and when."""
    found = []
    now_s = start_s
    while guard.next_s <= end_s:
        now_s = max(now_s, guard.next_s)
        found += [(now_s, batch) for batch in guard.look(now_s)]
    return found


def test_a_batch_that_does_not_come_back_is_given_up_within_a_second() -> None:
    here = guard()
    batch = begin(here, 10.0)
    [(when_s, given_up)] = look_until(here, 10.0, 20.0)
    assert given_up is batch
    assert 10.8 <= when_s <= 11.0 + 1e-9
    assert (here.lanes_left, here.n_hung, here.unsound) == (1, 1, None)
    assert not end(here, batch, 30.0)  # too late for its result, but its lane is back
    assert here.lanes_left == 2


def test_batches_launched_behind_a_hanging_one_are_given_up_with_it() -> None:
    here = guard()
    batch, other = begin(here, 0.0), begin(here, 0.0, stage=1)
    behind, behind_other = Batch(0, [], behind=batch), Batch(0, [], behind=other)
    here.began(behind, 0.0)
    here.began(behind_other, 0.0)
    [(when_s, given_up), (_, with_it)] = look_until(here, 0.0, 2.0)
    assert when_s <= 1.0 + 1e-9
    assert (given_up, with_it) == (batch, behind)
    assert (here.lanes_left, here.n_hung) == (1, 1)
    assert not end(here, batch, 3.0)
    assert not end(here, behind, 3.0)
    assert here.lanes_left == 2
    assert end(here, other, 3.0)


def test_a_slow_stage_is_given_the_time_it_needs() -> None:
    here = guard()
    begin(here, 0.0, stage=1)
    [(when_s, _)] = look_until(here, 0.0, 20.0)
    assert when_s == pytest.approx(20 * 0.4, abs=1.1 * LOOK_EVERY_S)


def test_suspending_the_machine_gives_up_no_batch() -> None:
    here = guard()
    batch = begin(here, 0.0)
    assert here.look(3600.0) == []  # one look, after an hour
    assert end(here, batch, 3600.1)
    assert here.next_s == float("inf")


def test_a_batch_behind_another_one_is_not_running() -> None:
    here = guard(n_lanes=1)
    first, waiting = begin(here, 0.0), Batch(0, [])
    here.began(waiting, 0.0)
    assert [batch for _, batch in look_until(here, 0.0, 5.0)] == [first]
    assert not waiting.given_up


def test_with_all_lanes_hanging_it_is_unsound_until_one_returns_and_a_trial_succeeds() -> None:
    here = guard()
    batches = [begin(here, 0.0) for _ in range(2)]
    assert len(look_until(here, 0.0, 1.1)) == 2
    assert here.unsound == "all 2 lanes hang"
    assert here.trial(5.0) is None  # nothing can run it
    assert here.next_s == float("inf")
    end(here, batches[0], 9.0)
    trial = here.trial(9.0)
    assert trial is not None
    assert trial.stage == TRIAL
    here.began(trial, 9.0)
    assert here.trial(9.1) is None  # one at a time
    assert not end(here, trial, 9.2)
    assert here.unsound is None


def test_a_lane_that_returns_during_a_trial_starts_no_other() -> None:
    here = guard()
    batches = [begin(here, 0.0) for _ in range(2)]
    look_until(here, 0.0, 1.1)
    end(here, batches[0], 9.0)
    trial = here.trial(9.0)
    assert trial is not None
    here.began(trial, 9.0)
    trial.started_s = 9.0
    end(here, batches[1], 9.01)
    assert here.next_s == pytest.approx(9.0 + LOOK_EVERY_S)  # not now, and now again, until the trial is over
    assert not end(here, trial, 9.2, RuntimeError("no memory"))
    assert here.next_s == pytest.approx(9.2 + TRIAL_EVERY_S)


def test_after_repeated_failures_a_trial_distinguishes_images_from_the_runner() -> None:
    here, bad = guard(), RuntimeError("no memory")
    for _ in range(FAILURES_BEFORE_TRIAL - 1):
        assert end(here, begin(here, 0.0), 0.0, bad)
    assert end(here, begin(here, 0.0), 0.0)  # a success resets the count
    for _ in range(FAILURES_BEFORE_TRIAL):
        assert here.trial(0.0) is None
        end(here, begin(here, 0.0), 0.0, bad)
    trial = here.trial(0.0)
    assert trial is not None
    here.began(trial, 0.0)
    end(here, trial, 0.1)  # it runs, so the images were the cause
    assert here.unsound is None
    assert here.trial(1.0) is None
    for _ in range(FAILURES_BEFORE_TRIAL):
        end(here, begin(here, 2.0), 2.0, bad)
    trial = here.trial(2.0)
    assert trial is not None
    here.began(trial, 2.0)
    end(here, trial, 2.1, bad)
    assert here.unsound == "every batch fails (no memory)"
    assert here.trial(2.2) is None
    assert here.next_s == pytest.approx(2.1 + TRIAL_EVERY_S)
    again = here.trial(2.1 + TRIAL_EVERY_S)
    assert again is not None
    here.began(again, 3.1)
    end(here, again, 3.2)
    assert here.unsound is None
    assert here.n_failed == 2 + 3 + 3


def test_failures_of_batches_whose_images_are_run_again_alone_need_no_trial() -> None:
    here = guard()
    for _ in range(FAILURES_BEFORE_TRIAL):
        batch = begin(here, 0.0)
        batch.rows = [Request(None, lambda told: None, PLAIN, ENDED)] * 2
        assert end(here, batch, 0.0, RuntimeError("no memory"))
    assert here.n_failed == FAILURES_BEFORE_TRIAL
    assert here.trial(0.0) is None


# --- the pace ---------------------------------------------------------------------------------------------------


def test_the_pace_follows_the_time_per_image() -> None:
    pace = Pace(n_lanes=2, image_s=0.001)
    assert pace.row_s == pytest.approx(0.0005)
    for _ in range(200):
        pace.ran(0.040, 10)  # 4 ms per image
    assert pace.row_s == pytest.approx(0.002, rel=0.1)
    for _ in range(400):
        pace.ran(0.010, 10)
    assert pace.row_s == pytest.approx(0.0005, rel=0.1)
    pace.ran(0.010, 0)  # no image left after this one, but it took time
    assert pace.row_s > 0.0005


def test_the_room_follows_from_the_maximum_wait() -> None:
    pace = Pace(n_lanes=2, image_s=0.004)
    assert pace.room_rows(1.0, 1024) == 500
    assert pace.room_rows(1.0, 100) == 100
    assert pace.room_rows(0.001, 100) == 4  # lanes must still have work
    assert pace.room_rows(float("inf"), 100) == 100
    assert Pace(2, 0.0).room_rows(1.0, 64) == 64


def test_a_single_stall_does_not_stop_admission() -> None:
    pace = Pace(n_lanes=2, image_s=0.001)
    pace.ran(1.0, 1)
    assert pace.room_rows(1.0, 1024) > 100
