"""Between the event loop and the engine: clients that leave, and answers for the right request."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message

from models.bundle import load_bundle
from service.api.delivery import Delivery
from service.assembly import build_engine
from service.engine.engine import Engine
from service.engine.rows import Answer, Options
from service.errors import EngineDraining
from tests.bundles import random_images
from tests.waiting import LIMIT_S

IMAGES = random_images(40, seed=61)


@pytest.fixture
def engine(bundle_path: Path) -> Iterator[Engine]:
    bundle = load_bundle(bundle_path)
    engine = build_engine(bundle, bundle.costs_mflops[-1], device="cpu", n_lanes=2)
    engine.start()
    yield engine
    engine.drain(LIMIT_S)


def keep_busy(engine: Engine) -> Event:
    """Block the engine's thread until the returned event is set."""
    busy, go_on = Event(), Event()

    def wait() -> None:
        busy.set()
        go_on.wait()

    engine.ask(wait)
    assert busy.wait(LIMIT_S)
    return go_on


async def stays() -> Message:
    await asyncio.sleep(3600)
    raise AssertionError


async def leaves() -> Message:
    return {"type": "http.disconnect"}


def test_a_client_that_leaves_abandons_its_image(engine: Engine) -> None:
    async def ask() -> None:
        delivery = Delivery(engine)
        go_on = keep_busy(engine)
        staying = asyncio.create_task(delivery.classify(IMAGES[0], Options(), stays))
        with pytest.raises(ClientDisconnect):
            await delivery.classify(IMAGES[1], Options(), leaves)
        assert not staying.done()
        go_on.set()
        assert isinstance(await staying, Answer)

    asyncio.run(ask())
    stats = engine.stats()
    assert (stats.submitted, stats.answered, stats.abandoned, stats.in_flight_rows) == (2, 1, 1, 0)


def test_a_cancelled_request_abandons_its_image(engine: Engine) -> None:
    async def ask() -> None:
        go_on = keep_busy(engine)
        task = asyncio.create_task(Delivery(engine).classify(IMAGES[0], Options(), stays))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()

    asyncio.run(ask())
    assert engine.stats().abandoned == 1


def test_every_request_gets_its_own_answer(engine: Engine) -> None:
    async def ask(n_at_once: int) -> list[Answer]:
        delivery = Delivery(engine)
        answers: list[Answer] = []
        for start in range(0, len(IMAGES), n_at_once):
            images = IMAGES[start : start + n_at_once]
            answers += await asyncio.gather(*(delivery.classify(image, Options(), stays) for image in images))
        return answers

    alone, together = asyncio.run(ask(1)), asyncio.run(ask(len(IMAGES)))
    assert [(a.class_id, a.confidence, a.exit) for a in alone] == [(a.class_id, a.confidence, a.exit) for a in together]
    assert len({a.confidence for a in alone}) == len(IMAGES)


def test_a_stopped_engine_is_reported(engine: Engine) -> None:
    engine.drain(LIMIT_S)
    with pytest.raises(EngineDraining):
        asyncio.run(Delivery(engine).classify(IMAGES[0], Options(), stays))
