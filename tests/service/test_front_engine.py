"""Two proxies in front of one real engine, as two workers have them, but in this process."""

import asyncio
import random
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import get_clock_info, perf_counter
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from models.bundle import load_bundle
from service.assembly import build_engine
from service.engine import Engine
from service.front import wire
from service.front.calls import RemoteKeeper, RemoteMetrics
from service.front.channel import Channel
from service.front.hub import Hub
from service.front.memory import Layout, SharedMemory
from service.front.proxy import FRAME_IMAGES, RemoteEngine
from service.front.wire import Kind
from service.metrics import Metrics
from service.rows import Answer, EngineDraining, EngineError, EngineOverloaded, Options, Step, Told
from service.target import Keeper, Target
from tests.bundles import CLASS_NAMES, random_images
from tests.waiting import LIMIT_S, wait_until

N_SLOTS = 32
IMAGES = random_images(64, seed=77)


class Front:
    """A hub around a real engine, and two proxies on an event loop of their own."""

    def __init__(self, bundle_path: Path) -> None:
        bundle = load_bundle(bundle_path)
        n_exits = len(bundle.manifest.exits)
        self.n_exits = n_exits
        layout = Layout(n_workers=2, n_slots=N_SLOTS, height_px=32, width_px=32, n_exits=n_exits)
        self.memory = SharedMemory.create(layout)
        metrics = Metrics(bundle.manifest, [self.memory.tally(worker) for worker in range(2)])
        # More than exits drawn at random cost: images that ask for one are to get there.
        budget_mflops = 0.8 * bundle.costs_mflops[-1]
        self.engine: Engine = build_engine(bundle, budget_mflops, n_lanes=2, max_in_flight_rows=48, observer=metrics)
        self.engine.start()
        metrics.watch(self.engine.stats, self.engine.budget_state, bundle)
        self.gone: list[tuple[int, int]] = []
        self.someone_has_gone = threading.Event()
        self.keeper = Keeper(self.engine, Target("fraction", budget_mflops))
        self.hub = Hub(self.engine, metrics, self.keeper, self.memory, lambda worker: None, self._on_gone)
        self.hub.start()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.channels: list[Channel] = []
        self.proxies = [self.connect(worker) for worker in range(2)]

    def connect(self, worker: int) -> RemoteEngine:
        ours, theirs = socket.socketpair()
        channel = Channel(theirs)
        self.channels.append(channel)
        proxy = RemoteEngine(channel, self.memory, worker, CLASS_NAMES, lambda: None, lambda error: None)
        self.hub.attach(worker, ours)

        async def attach() -> None:
            proxy.attach(self.loop)

        self.run(attach())
        return proxy

    def _on_gone(self, worker: int, n_lost: int) -> None:
        self.gone.append((worker, n_lost))
        self.someone_has_gone.set()

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    def close(self) -> None:
        self.engine.drain(10)
        self.hub.stop()
        self.run(asyncio.sleep(0.01))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
        for channel in self.channels:
            channel.close()


@pytest.fixture
def front(bundle_path: Path) -> Iterator[Front]:
    front = Front(bundle_path)
    yield front
    front.close()


def test_the_clock_of_deadlines_is_that_of_the_machine() -> None:
    assert "CLOCK_MONOTONIC" in get_clock_info("perf_counter").implementation


async def settled(proxy: RemoteEngine) -> None:
    """Wait until all slots are free again: every answer or release has come."""
    while len(proxy._free) < N_SLOTS:
        await asyncio.sleep(0.001)


async def answer_of(proxy: RemoteEngine, image: NDArray[np.uint8]) -> Told:
    future: asyncio.Future[Told] = asyncio.get_running_loop().create_future()
    proxy.submit_to(lambda told: future.set_result(told[0][1]), 1, image)
    return await future


@pytest.mark.parametrize("seed", range(2))
def test_no_answer_is_lost_doubled_or_swapped(front: Front, seed: int) -> None:
    """Thousands of images in random bursts from both, some given up: each gets its own answer, once, or none."""
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


def test_the_first_images_of_a_long_turn_do_not_wait_for_its_last(front: Front) -> None:
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


def test_room_is_known_without_asking(front: Front) -> None:
    """One proxy has the engine full; the other refuses by itself."""
    near, far = front.proxies
    outcomes: list[Told] = []

    async def fill() -> None:
        front.engine.ask(lambda: done.wait(LIMIT_S))  # the engine's thread stands still meanwhile
        for image in IMAGES[:N_SLOTS]:
            near.submit_to(lambda told: outcomes.extend(told), 0, image)
        front.memory.board.publish(True, None, N_SLOTS, 0.125)
        with pytest.raises(EngineOverloaded) as refused:
            far.require_room()
        assert refused.value.in_flight_rows == N_SLOTS
        assert refused.value.wait_s == N_SLOTS * 0.125
        done.set()
        await settled(near)
        far.require_room()

    done = threading.Event()
    front.run(fill())
    assert len(outcomes) == N_SLOTS


def test_deadlines_hold_across_processes(front: Front) -> None:
    outcomes: list[Any] = []

    async def ask() -> None:
        proxy = front.proxies[0]
        proxy.submit_to(outcomes.extend, 1, IMAGES[0], Options(deadline_s=perf_counter() - 1.0))
        await settled(proxy)

    front.run(ask())
    [(_, outcome)] = outcomes
    assert not isinstance(outcome, Answer) or outcome.reason == "deadline"


def test_a_workers_death_frees_its_slots_and_its_place_in_the_engine(front: Front) -> None:
    before = front.engine.stats()

    async def die() -> None:
        for image in IMAGES[:20]:
            front.proxies[0].submit_to(lambda told: None, 1, image, Options(exit=front.n_exits))
        await asyncio.sleep(0)
        front.loop.remove_reader(front.channels[0])
        front.channels[0].close()

    began, done = threading.Event(), threading.Event()
    front.engine.ask(lambda: (began.set(), done.wait(LIMIT_S)))  # it answers none of them before it hears of the death
    assert began.wait(LIMIT_S)  # what comes now stays in its inbox
    front.run(die())
    wait_until("the hub has given its requests up", lambda: front.engine._inbox.qsize() > 20)
    done.set()
    assert front.someone_has_gone.wait(LIMIT_S)
    assert front.gone == [(0, 20)]
    wait_until("the engine has let go of them", lambda: front.engine.stats().in_flight_rows == 0)
    stats = front.engine.stats()
    assert (stats.submitted - before.submitted, stats.abandoned, front.memory.in_flight_rows) == (20, 20, 0)

    proxy = front.connect(0)

    assert isinstance(front.run(answer_of(proxy, IMAGES[0])), Answer)


def narrow(channel: Channel) -> None:
    """Have a channel's socket hold a few kilobytes, as little as the kernel allows."""
    channel._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)


def test_answers_that_a_worker_does_not_read_wait_for_it(front: Front) -> None:
    channel = front.hub._links[0].channel
    narrow(channel)
    told: list[tuple[Any, Told]] = []

    async def ask() -> None:
        for i, image in enumerate(IMAGES[:N_SLOTS]):
            options = Options(top_k=10, exit=front.n_exits, steps=True)
            front.proxies[0].submit_to(told.extend, i, image, options, flush=False)
        front.proxies[0].flush()
        wait_until("the socket is full", lambda: channel._unsent)  # meanwhile this event loop reads nothing
        assert isinstance(front.engine.submit(IMAGES[0]).result(LIMIT_S), Answer)  # and the engine goes on
        await settled(front.proxies[0])

    front.run(ask())
    assert Counter(i for i, _ in told) == dict.fromkeys(range(N_SLOTS), front.n_exits)
    assert sum(isinstance(outcome, Answer) for _, outcome in told) == N_SLOTS


def test_what_the_hub_does_not_read_waits_for_it(front: Front) -> None:
    proxy, channel, go_on = front.proxies[0], front.channels[0], threading.Event()
    narrow(channel)
    seconds: list[float] = []
    front.engine.took = seconds.append  # type: ignore[method-assign]
    front.hub._do(lambda: go_on.wait(LIMIT_S))

    async def ask() -> Told:
        for _ in range(10_000):
            proxy.took(0.5)
        proxy.flush()
        assert channel._unsent
        answer = asyncio.create_task(answer_of(proxy, IMAGES[0]))
        await asyncio.sleep(0)
        go_on.set()
        return await answer

    assert isinstance(front.run(ask()), Answer)
    assert seconds == [0.5] * 10_000


@pytest.mark.parametrize(
    "payload", [b"\0", wire.pack_submissions([(0, Options(), (9, 9_999))])], ids=["no frame", "no picture"]
)
def test_a_worker_that_talks_nonsense_is_let_go_and_the_others_are_served(front: Front, payload: bytes) -> None:
    front.channels[0].send(Kind.SUBMIT, payload)
    assert front.someone_has_gone.wait(LIMIT_S)
    assert front.gone == [(0, 0)]
    wait_until("its end is closed too", lambda: not front.proxies[0].is_connected)
    assert isinstance(front.run(answer_of(front.proxies[1], IMAGES[0])), Answer)


def test_an_image_that_the_network_does_not_take_is_its_own_fault_alone(front: Front) -> None:
    told = front.run(answer_of(front.proxies[0], IMAGES[0][:16]))
    assert type(told) is EngineError
    assert "where the network takes" in str(told)
    assert isinstance(front.run(answer_of(front.proxies[0], IMAGES[0])), Answer)
    assert front.memory.in_flight_rows == 0


def test_calls_are_answered_and_their_errors_come_back(front: Front) -> None:
    keeper = RemoteKeeper(front.proxies[0].calls)
    metrics = RemoteMetrics(front.memory.tally(1), front.proxies[1].calls)
    target, state = keeper.read()
    assert target.kind == "fraction"
    other = replace(target, kind="average_mflops", average_mflops=state.budget_mflops * 1.1)
    keeper.set(other)
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


def test_when_the_engines_process_dies_whoever_waits_hears(front: Front) -> None:
    outcomes: list[Any] = []

    async def ask() -> None:
        proxy = front.proxies[0]
        front.engine.ask(lambda: done.wait(LIMIT_S))
        proxy.submit_to(outcomes.extend, 1, IMAGES[0])
        await asyncio.sleep(0)
        front.hub.stop()
        while not outcomes:
            await asyncio.sleep(0.001)
        assert not proxy.is_alive
        with pytest.raises(EngineDraining):
            proxy.submit_to(outcomes.extend, 2, IMAGES[0])

    done = threading.Event()
    front.run(ask())
    done.set()
    assert isinstance(outcomes[0][1], EngineDraining)
    with pytest.raises(EngineDraining):
        RemoteKeeper(front.proxies[0].calls).read()
    assert np.all(front.memory.images(0)[0] == IMAGES[0])
