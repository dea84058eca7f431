"""The engine's counts: every image is counted once, at every moment."""

import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from models.bundle import Bundle
from service.assembly import build_engine
from service.engine.engine import Engine
from service.engine.observer import EngineStats
from service.engine.rows import Answer, Options
from service.errors import EngineTooLate
from tests.bundles import random_images
from tests.waiting import LIMIT_S


class Watch:
    """Looks at the counts when images have been answered, but have not been told yet."""

    def __init__(self) -> None:
        self.engine: Engine
        self.seen: list[EngineStats] = []

    def batch_ran(self, stage: int, seconds: float, queue_seconds: Sequence[float]) -> None:
        pass

    def answered(self, answers: Sequence[Answer]) -> None:
        self.seen.append(self.engine._stats())


@pytest.fixture(scope="module")
def images() -> NDArray[np.uint8]:
    return random_images(60, seed=72)


@pytest.fixture
def watch(bundle: Bundle) -> Iterator[Watch]:
    watch = Watch()
    watch.engine = build_engine(
        bundle, 0.6 * bundle.costs_mflops[-1], device="cpu", n_lanes=2, max_rows=8, observer=watch
    )
    watch.engine.start()
    yield watch
    watch.engine.drain(LIMIT_S)


def test_what_was_submitted_is_in_flight_or_has_ended_once(watch: Watch, images: NDArray[np.uint8]) -> None:
    engine = watch.engine
    for future in [engine.submit(image) for image in images]:
        assert isinstance(future.result(LIMIT_S), Answer)
    with pytest.raises(EngineTooLate):
        engine.submit(images[0], Options(deadline_s=engine.clock() - 1.0)).result(LIMIT_S)
    watch.seen.append(engine.stats())
    assert len(watch.seen) > 2
    for stats in watch.seen:
        ended = stats.answered + stats.refused + stats.abandoned + stats.failed
        assert stats.submitted == ended + stats.in_flight_rows
    assert (stats.answered, stats.refused) == (len(images), 1)


def test_the_predicted_wait_is_that_for_all_images_in_flight(watch: Watch, images: NDArray[np.uint8]) -> None:
    engine, all_in_flight = watch.engine, threading.Event()
    assert isinstance(engine.submit(images[0]).result(LIMIT_S), Answer)
    _, row_s = engine.room

    def look() -> EngineStats:
        all_in_flight.wait(LIMIT_S)
        return engine._stats()

    stats = engine.ask(look)
    futures = [engine.submit(image) for image in images[:5]]
    told_s = engine.overload().wait_s
    all_in_flight.set()
    assert stats.result(LIMIT_S).in_flight_rows == 5
    assert told_s == stats.result().predicted_wait_s == pytest.approx(5 * row_s)
    for future in futures:
        future.result(LIMIT_S)
