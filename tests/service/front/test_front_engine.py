"""Two proxies of one real engine: every image gets its own answer; other calls of workers."""

import asyncio
import random
import threading
from collections import Counter
from dataclasses import replace
from time import get_clock_info, perf_counter
from typing import Any

import pytest

from service.engine.rows import Answer, Options, Step, Told
from service.errors import EngineOverloaded
from service.front.calls import RemoteKeeper, RemoteMetrics
from service.front.proxy import FRAME_IMAGES
from tests.service.fronts import IMAGES, N_SLOTS, Front, settled
from tests.waiting import LIMIT_S, wait_until


def test_processes_share_the_clock_of_deadlines() -> None:
    assert "CLOCK_MONOTONIC" in get_clock_info("perf_counter").implementation


@pytest.mark.parametrize("seed", range(2))
def test_no_answer_is_lost_doubled_or_swapped(front: Front, seed: int) -> None:
    """Thousands of images in random bursts from both, some cancelled: each gets its own answer once, or none."""
    expected = {
        (i, exit_number): front.engine.submit(image, Options(exit=exit_number, top_k=3)).result(LIMIT_S)
        for i, image in enumerate(IMAGES)
        for exit_number in range(1, front.n_exits + 1)
    }
    before = front.engine.stats()
    told: dict[tuple[int, int], list[Told]] = {}
    given_up: set[tuple[int, int]] = set()
    asked: dict[tuple[int, int], tuple[int, int, bool]] = {}
    n_full = Counter[int]()
    random_of = random.Random(seed)

    def sink(outcomes: list[tuple[Any, Told]]) -> None:
        for token, outcome in outcomes:
            told.setdefault(token, []).append(outcome)

    async def ask(worker: int, n_images: int) -> None:
        proxy = front.proxies[worker]
        for n in range(n_images):
            image, exit_number, steps = random_of.randrange(64), random_of.randint(1, front.n_exits), n % 5 == 0
            token = (worker, n)
            try:
                options = Options(exit=exit_number, top_k=3, steps=steps)
                ticket = proxy.submit_to(sink, token, IMAGES[image], options)
            except EngineOverloaded:
                n_full[worker] += 1
                await asyncio.sleep(0.001)
                continue
            asked[token] = (image, exit_number, steps)
            if random_of.random() < 0.1:
                given_up.add(token)
                asyncio.get_running_loop().call_later(random_of.random() * 0.01, proxy.abandon, ticket)
            if random_of.random() < 0.05:
                await asyncio.sleep(random_of.random() * 0.005)
        await settled(proxy)

    async def both() -> None:
        await asyncio.gather(ask(0, 1500), ask(1, 1500))

    front.run(both())
    assert n_full.keys() == {0, 1}  # both came to the end of their slots
    n_refused = 0
    for token, (image, exit_number, steps) in asked.items():
        outcomes = told.pop(token, [])
        if not outcomes or not isinstance(outcomes[-1], Answer):
            refused = len(outcomes) == 1 and isinstance(outcomes[0], EngineOverloaded)
            n_refused += refused
            assert refused or token in given_up, outcomes
            continue
        *way, answer = outcomes
        right = expected[image, exit_number]
        assert (answer.class_id, answer.label, answer.exit) == (right.class_id, right.label, right.exit)
        assert answer.confidence == pytest.approx(right.confidence, abs=1e-5)
        assert [step.exit for step in way if isinstance(step, Step)] == (list(range(1, exit_number)) if steps else [])
    assert not told
    stats = front.engine.stats()
    assert stats.in_flight_rows == 0
    assert stats.submitted - before.submitted == len(asked)
    answered = stats.answered - before.answered
    assert answered + stats.abandoned - before.abandoned + stats.refused - before.refused == len(asked)
    assert front.memory.in_flight_rows == 0


def test_the_first_images_of_a_long_loop_turn_do_not_wait_for_its_last(front: Front) -> None:
    told: list[tuple[Any, Told]] = []

    async def ask() -> None:
        for i in range(FRAME_IMAGES + 1):
            front.proxies[0].submit_to(told.extend, i, IMAGES[i], flush=False)
        while len(told) < FRAME_IMAGES:
            await asyncio.sleep(0.001)
        front.proxies[0].flush()
        await settled(front.proxies[0])

    front.run(ask())
    assert sorted(i for i, _ in told) == list(range(FRAME_IMAGES + 1))


def test_workers_know_the_room_without_a_call(front: Front) -> None:
    """When one proxy has filled the engine, the other refuses without a call."""
    near, far = front.proxies
    outcomes: list[Told] = []

    async def fill() -> None:
        front.engine.ask(lambda: done.wait(LIMIT_S))  # the engine's thread stands still meanwhile
        for image in IMAGES[:N_SLOTS]:
            near.submit_to(lambda told: outcomes.extend(told), 0, image)
        front.memory.board.publish(True, None, N_SLOTS, 0.125)
        assert not far.has_room
        refused = far.overload()
        assert refused.in_flight_rows == N_SLOTS
        assert refused.wait_s == N_SLOTS * 0.125
        done.set()
        await settled(near)
        assert far.has_room

    done = threading.Event()
    front.run(fill())
    assert len(outcomes) == N_SLOTS


def test_abandoned_images_leave_the_room_to_others_once_the_engine_has_let_go_of_them(front: Front) -> None:
    async def abandon() -> None:
        proxy = front.proxies[0]
        tickets = [proxy.submit_to(lambda told: None, i, image) for i, image in enumerate(IMAGES[:3])]
        for ticket in tickets:
            proxy.abandon(ticket)
        while front.engine._loop.inbox.qsize() < 3:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        assert front.memory.in_flight_rows == 3
        done.set()
        await settled(proxy)

    begun, done = threading.Event(), threading.Event()
    front.engine.ask(lambda: begun.set() or done.wait(LIMIT_S))
    assert begun.wait(LIMIT_S)  # from now on the engine takes nothing from its inbox
    front.run(abandon())
    wait_until("other workers know it", lambda: front.memory.in_flight_rows == 0)


def test_deadlines_hold_across_processes(front: Front) -> None:
    outcomes: list[Any] = []

    async def ask() -> None:
        proxy = front.proxies[0]
        proxy.submit_to(outcomes.extend, 1, IMAGES[0], Options(deadline_s=perf_counter() - 1.0))
        await settled(proxy)

    front.run(ask())
    [(_, outcome)] = outcomes
    assert not isinstance(outcome, Answer) or outcome.reason == "deadline"


def test_calls_return_results_and_errors(front: Front) -> None:
    keeper = RemoteKeeper(front.proxies[0].calls)
    metrics = RemoteMetrics(front.memory.tally(1), front.proxies[1].calls)
    target, state = keeper.read()
    assert target.kind == "fraction"
    other = replace(target, kind="average_mflops", average_mflops=state.budget_mflops * 1.1)
    assert keeper.set(other).budget_mflops == pytest.approx(other.average_mflops)
    assert RemoteKeeper(front.proxies[1].calls).read()[0] == other
    assert front.engine.budget_state().budget_mflops == pytest.approx(other.average_mflops)
    told: list[float] = []
    front.engine.took = told.append  # type: ignore[method-assign]
    for seconds in (0.25, 0.125):
        front.loop.call_soon_threadsafe(front.proxies[0].took, seconds)
    wait_until("both times are told", lambda: told == [0.25, 0.125])
    with pytest.raises(ValueError, match="budget"):
        keeper.set(replace(other, average_mflops=1e9))
    front.memory.tally(0).count("answered")
    metrics.count("answered")
    text = metrics.exposition(is_ready=True)[0].decode()
    assert 'requests_total{outcome="answered"} 2.0' in text
    assert "exitserve_ready 1.0" in text
    assert "exitserve_in_flight_rows 0.0" in text
