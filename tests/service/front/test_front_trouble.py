"""Two proxies of one real engine under failures: one end dies, does not read, or sends garbage."""

import asyncio
import socket
import threading
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pytest

from service.engine.rows import Answer, Options, Told
from service.errors import EngineDraining, EngineError, EngineUnsound
from service.front import wire
from service.front.calls import RemoteKeeper
from service.front.channel import Channel
from service.front.wire import Kind
from tests.service.fronts import IMAGES, N_SLOTS, Front, answer_of, settled
from tests.waiting import LIMIT_S, wait_until


def test_a_workers_death_frees_its_slots_and_its_place_in_the_engine(front: Front) -> None:
    before = front.engine.stats()
    for worker in range(2):
        front.memory.set_connections(worker, 3 * worker)

    async def die() -> None:
        for image in IMAGES[:20]:
            front.proxies[0].submit_to(lambda told: None, 1, image, Options(exit=front.n_exits))
        await asyncio.sleep(0)
        front.loop.remove_reader(front.channels[0])
        front.channels[0].close()

    began, done = threading.Event(), threading.Event()
    front.engine.ask(
        lambda: (began.set(), done.wait(LIMIT_S))
    )  # it answers none of them before it is notified of the death
    assert began.wait(LIMIT_S)  # new messages stay in its inbox
    front.run(die())
    wait_until("the hub has given its requests up", lambda: front.engine._loop.inbox.qsize() > 20)
    done.set()
    assert front.someone_has_gone.wait(LIMIT_S)
    assert front.gone == [(0, 20)]
    assert front.memory.least_connections_beside(1) is None  # for which the other would leave new clients
    wait_until("the engine has let go of them", lambda: front.engine.stats().in_flight_rows == 0)
    stats = front.engine.stats()
    assert (stats.submitted - before.submitted, stats.abandoned, front.memory.in_flight_rows) == (20, 20, 0)

    proxy = front.connect(0)

    assert isinstance(front.run(answer_of(proxy, IMAGES[0])), Answer)


def test_workers_know_when_no_stage_can_be_run(front: Front) -> None:
    guard = front.engine._loop.guard
    for why in ("all 2 lanes hang", None):
        front.engine.ask(partial(setattr, guard, "unsound", why)).result(LIMIT_S)
        wait_until("all know it", lambda why=why: [proxy.trouble for proxy in front.proxies] == [why] * 2)  # type: ignore
        told = front.run(answer_of(front.proxies[0], IMAGES[0]))
        assert isinstance(told, Answer if why is None else EngineUnsound)


def narrow(channel: Channel) -> None:
    """Shrink a channel's socket buffers to a few kilobytes, the kernel's minimum."""
    channel._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)


def test_answers_are_queued_for_a_worker_that_does_not_read(front: Front) -> None:
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


def test_messages_are_queued_for_a_hub_that_does_not_read(front: Front) -> None:
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
def test_a_worker_that_sends_garbage_is_disconnected_and_others_are_served(front: Front, payload: bytes) -> None:
    front.channels[0].send(Kind.SUBMIT, payload)
    assert front.someone_has_gone.wait(LIMIT_S)
    assert front.gone == [(0, 0)]
    wait_until("its end is closed too", lambda: not front.proxies[0].is_connected)
    assert isinstance(front.run(answer_of(front.proxies[1], IMAGES[0])), Answer)


def test_an_unsuitable_image_fails_alone(front: Front) -> None:
    told = front.run(answer_of(front.proxies[0], IMAGES[0][:16]))
    assert type(told) is EngineError
    assert "but the network takes" in str(told)
    assert isinstance(front.run(answer_of(front.proxies[0], IMAGES[0])), Answer)
    assert front.memory.in_flight_rows == 0


def test_an_image_larger_than_a_slot_uses_none(front: Front) -> None:
    proxy = front.proxies[0]

    async def ask() -> int:
        with pytest.raises(ValueError, match="reshape"):
            proxy.submit_to(lambda told: None, 1, np.zeros((64, 64, 3), np.uint8))
        return len(proxy._free)

    assert front.run(ask()) == N_SLOTS


def test_when_the_engines_process_dies_waiting_requests_fail(front: Front) -> None:
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


def test_an_unanswered_call_times_out(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.front.calls.CALL_S", 0.05)
    done = threading.Event()
    front.engine.ask(lambda: done.wait(LIMIT_S))  # between batches, it would answer
    with pytest.raises(EngineError, match=r"has not answered for 0\.05 s"):
        RemoteKeeper(front.proxies[0].calls).read()
    done.set()


def test_calls_are_answered_when_no_more_threads_can_be_started(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    assert RemoteKeeper(front.proxies[0].calls).read()[0] == front.keeper.read()[0]


def test_a_hub_that_breaks_down_reports_it(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down() -> None:
        raise MemoryError("no room for a board")

    monkeypatch.setattr(front.hub, "publish", break_down)
    assert str(front.broken.result(LIMIT_S)) == "no room for a board"
