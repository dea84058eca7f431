"""The measured time per image, whatever images leave for."""

from math import inf
from typing import cast

import pytest

from models.scores import Score
from service.budget.degrade import Degrade
from service.engine.admission import Admission
from service.engine.lanes import Batch
from service.engine.loop import Loop
from service.engine.pace import Pace
from service.engine.rows import Options
from service.runners.base import Runner
from tests.service.simulation import FULL_MFLOPS
from tests.service.virtual import N_EXITS, World, world

IMAGE_S = 0.010
STAGE_S = 0.005
NO_EXIT = 2.0  # a confidence that no image has


class OneLane:
    n_lanes, n_stages = 1, N_EXITS


def loop_around(here: World, target_s: float | None = None) -> Loop:
    """The engine's loop, without its thread."""
    degrade = Degrade(here.core.budget, 1024)
    degrade.set(FULL_MFLOPS, target_s, here.now_s)
    runner, score = cast(Runner, OneLane()), cast(Score, None)
    loop = Loop(here.core, runner, score, Admission(1024), degrade, inf, 600.0, lambda: here.now_s)
    loop.guard.expect([{1: STAGE_S}] * N_EXITS, 32)
    loop.pace = Pace(1, IMAGE_S)
    return loop


def begin(here: World, loop: Loop) -> Batch:
    batch = here.start()
    assert batch is not None
    loop.guard.began(batch, here.now_s)
    return batch


def end(here: World, loop: Loop, batch: Batch) -> None:
    here.now_s += STAGE_S
    here.ran(batch)
    loop._take_back(batch)
    here.deliver()


def two_stages(here: World, loop: Loop, leave: str) -> None:
    """An image that runs two stages, which takes 10 ms, and leaves before or during its next."""
    due_s = here.now_s + 1.9 * STAGE_S if leave == "deadline while it runs" else inf
    request = here.admit(here.now_s, Options(exit=2 if leave == "answer" else N_EXITS, deadline_s=due_s))
    end(here, loop, begin(here, loop))
    batch = begin(here, loop)
    if due_s < inf:
        here.wait_until(due_s)
        here.now_s = batch.started_s
    end(here, loop, batch)
    if leave == "client leaves as it waits":
        here.core.abandon(request)


@pytest.mark.parametrize("leave", ["answer", "deadline while it runs", "client leaves as it waits"])
def test_the_time_per_image_does_not_depend_on_how_images_end(leave: str) -> None:
    here = world()
    loop = loop_around(here)
    for _ in range(500):
        two_stages(here, loop, leave)
    assert here.core.n_ended == 500
    assert loop.pace.row_s == pytest.approx(2 * STAGE_S, rel=0.02)


def test_images_that_leave_before_running_do_not_lower_the_time_per_image() -> None:
    here = world()
    loop = loop_around(here)
    for _ in range(500):
        for _ in range(3):
            here.core.abandon(here.admit(here.now_s, Options()))
        two_stages(here, loop, "answer")
    assert loop.pace.row_s == pytest.approx(2 * STAGE_S, rel=0.02)


@pytest.mark.parametrize("leave", ["deadline while it runs", "client leaves as it waits"])
def test_a_latency_target_is_not_misled_by_images_that_end_early(leave: str) -> None:
    here = world()
    loop = loop_around(here, target_s=1.0)
    for _ in range(500):
        two_stages(here, loop, leave)
    loop.admission.open()
    loop.admission.in_flight = 20  # 0.2 s
    for _ in range(20):
        here.now_s += 0.1
        loop._take_arrivals()
    assert here.core.budget.working_mflops == pytest.approx(FULL_MFLOPS)


@pytest.mark.parametrize("n_rows", [1, 32, 1024])
def test_a_slower_pace_is_adopted(n_rows: int) -> None:
    pace = Pace(2, IMAGE_S)
    for _ in range(20 + 1500 // n_rows):
        pace.ran(n_rows * 20 * IMAGE_S, n_rows)
    assert pace.row_s == pytest.approx(10 * IMAGE_S, rel=0.1)


def test_a_batch_during_which_the_machine_was_suspended_changes_the_pace_little() -> None:
    pace = Pace(2, IMAGE_S)
    for _ in range(100):
        pace.ran(32 * IMAGE_S, 32)
    room_rows = pace.room_rows(1.0, 1024)
    for _ in range(pace.n_lanes):
        pace.ran(600.0, 32)
    assert pace.room_rows(1.0, 1024) > room_rows / 3


def test_the_first_batch_sets_an_unknown_pace() -> None:
    pace = Pace(1, 0.0)
    pace.ran(0.064, 0)
    assert pace.row_s == pytest.approx(0.001)
