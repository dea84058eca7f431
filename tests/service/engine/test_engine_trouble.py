"""An engine whose runner fails, hangs or dies: which images are answered, and how the engine recovers."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from models.bundle import Bundle
from service.budget.controller import BudgetController
from service.engine.engine import Engine
from service.engine.rows import Answer, Options
from service.engine.scheduler import Scheduler
from service.errors import EngineError, EngineLost, EngineOverloaded, EngineUnsound
from service.runners.base import FatalRunnerError, StageOutput
from service.runners.blocks import RowState
from service.runners.onnx import OnnxRunner
from tests.bundles import random_images
from tests.service.engine.test_engine import balanced, running
from tests.waiting import LIMIT_S, wait_until

POISON = 255
HANG_S = 3.0  # no running batch takes this long, even on a loaded machine


@pytest.fixture(scope="module")
def images() -> NDArray[np.uint8]:
    return random_images(40, seed=37)


class TroubledRunner(OnnxRunner):
    """The real runner, with failures of batches chosen by the test."""

    befall: Callable[[int, Sequence[RowState]], None] | None = None

    def prepare(self, stage: int, rows: Sequence[RowState]) -> Callable[[], StageOutput]:
        prepared = super().prepare(stage, rows)

        def run() -> StageOutput:
            if self.befall is not None:
                self.befall(stage, rows)
            return prepared()

        return run


def troubled(
    bundle: Bundle,
    hang_s: float = 600.0,
    max_rows: int = 8,
    runner_class: type[TroubledRunner] = TroubledRunner,
    **options: float,
) -> tuple[Engine, TroubledRunner]:
    runner = runner_class(bundle, max_rows, n_lanes=2)
    budget = BudgetController(bundle.frontier(), bundle.costs_mflops, bundle.costs_mflops[-1], burst_images=1000)
    scheduler = Scheduler(runner.n_stages, max_rows)
    names = bundle.manifest.class_names
    return Engine(runner, budget, scheduler, bundle.score(), names, hang_s=hang_s, **options), runner  # type: ignore


def is_poisoned(row: RowState) -> bool:
    return "images" in row.block.values and row.block.values["images"][row.index].min() == POISON


def test_of_a_failing_batch_only_the_cause_fails(bundle: Bundle, images: NDArray[np.uint8]) -> None:
    def poison(stage: int, rows: Sequence[RowState]) -> None:
        if any(map(is_poisoned, rows)):
            raise RuntimeError("poisoned")

    engine, runner = troubled(bundle)
    with running(engine):
        runner.befall = poison
        go_on = threading.Event()
        engine.ask(lambda: go_on.wait(LIMIT_S))  # so that all have arrived when the first batch is formed
        futures = [engine.submit(image) for image in images[:7]]
        bad = engine.submit(np.full_like(images[0], POISON))
        go_on.set()
        assert all(isinstance(future.result(LIMIT_S), Answer) for future in futures)
        with pytest.raises(EngineError, match="stage 1 failed: poisoned"):
            bad.result(LIMIT_S)
        stats, state = engine.stats(), engine.budget_state()
    assert (stats.answered, stats.failed, stats.failed_batches) == (7, 1, 2)
    assert balanced(stats)
    assert engine.trouble is None
    assert state.reserved_mflops == 0.0


def test_if_memory_is_short_for_a_batch_its_stages_batches_become_smaller(
    bundle: Bundle, images: NDArray[np.uint8]
) -> None:
    def no_memory(stage: int, rows: Sequence[RowState]) -> None:
        if stage == 1 and len(rows) > 2:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 8388608")

    engine, runner = troubled(bundle)
    with running(engine):
        runner.befall = no_memory
        for _ in range(4):
            futures = [engine.submit(image, Options(exit=4)) for image in images]
            assert all(isinstance(future.result(LIMIT_S), Answer) for future in futures)
        stats = engine.stats()
        assert stats.max_batch_rows == (8, 2, 8, 8)
        assert stats.failed_batches <= 8  # four with the lanes at a time: once of 8 rows, once of 4
        assert engine.trouble is None
        assert stats.answered == 4 * len(images)


def test_if_the_runner_has_memory_for_fewer_rows_batches_are_limited(bundle: Bundle, images: NDArray[np.uint8]) -> None:
    class Short(TroubledRunner):
        def warm_up(self, limit_s: float = 1.0) -> Sequence[Mapping[int, float]]:
            self.max_rows = 3
            return super().warm_up(limit_s)

    def too_many(stage: int, rows: Sequence[RowState]) -> None:
        if len(rows) > 3:
            raise RuntimeError("there is no bucket for so many")

    engine, runner = troubled(bundle, runner_class=Short)
    runner.befall = too_many
    with running(engine):
        assert engine.max_rows == 3
        for future in [engine.submit(image) for image in images]:
            assert isinstance(future.result(LIMIT_S), Answer)
        stats = engine.stats()
    assert (stats.failed_batches, stats.max_batch_rows) == (0, (3,) * 4)


def test_an_image_that_no_runner_can_run_does_not_close_the_server(bundle: Bundle, images: NDArray[np.uint8]) -> None:
    def poison(stage: int, rows: Sequence[RowState]) -> None:
        if any(map(is_poisoned, rows)):
            raise RuntimeError("poisoned")

    engine, runner = troubled(bundle)
    with running(engine):
        runner.befall = poison
        for _ in range(6):
            with pytest.raises(EngineError, match="poisoned"):
                engine.submit(np.full_like(images[0], POISON)).result(LIMIT_S)
        assert engine.trouble is None
        assert isinstance(engine.submit(images[0]).result(LIMIT_S), Answer)


def fail_all(
    engine: Engine, runner: TroubledRunner, images: NDArray[np.uint8], error: Exception, kind: type[EngineError]
) -> None:
    """Make every batch fail once all images are in; all must get an error."""
    all_in = threading.Event()

    def fail(stage: int, rows: Sequence[RowState]) -> None:
        all_in.wait(LIMIT_S)
        raise error

    runner.befall = fail
    futures = [engine.submit(image) for image in images]
    all_in.set()
    for future in futures:
        with pytest.raises(kind, match=str(error)):
            future.result(LIMIT_S)


def test_a_runner_that_fails_everything_is_not_ready_and_comes_back(bundle: Bundle, images: NDArray[np.uint8]) -> None:
    engine, runner = troubled(bundle)
    with running(engine):
        fail_all(engine, runner, images, RuntimeError("device lost"), EngineError)
        wait_until("it is in trouble", lambda: engine.trouble is not None)
        assert engine.trouble == "every batch fails (device lost)"
        with pytest.raises(EngineUnsound, match="device lost"):
            engine.submit(images[0])
        stats = engine.stats()
        assert (stats.failed, stats.in_flight_rows) == (len(images), 0)
        assert balanced(stats)
        runner.befall = None
        wait_until("it is well again", lambda: engine.trouble is None)
        assert isinstance(engine.submit(images[0]).result(LIMIT_S), Answer)
        assert engine.budget_state().reserved_mflops == 0.0


def test_images_of_a_hanging_lane_are_answered_by_the_other(bundle: Bundle, images: NDArray[np.uint8]) -> None:
    hung, go_on = threading.Event(), threading.Event()

    def hang_once(stage: int, rows: Sequence[RowState]) -> None:
        if not hung.is_set():
            hung.set()
            go_on.wait(2 * LIMIT_S)

    engine, runner = troubled(bundle, hang_s=HANG_S)
    with running(engine):
        runner.befall = hang_once
        futures = [engine.submit(image) for image in images]
        assert all(isinstance(future.result(LIMIT_S), Answer) for future in futures)
        assert engine.trouble is None
        assert engine.stats().hung_batches == 1
        go_on.set()  # the lane returns late and is used again
        wait_until("both lanes are used", lambda: engine._loop.guard.lanes_left == 2)
        assert all(isinstance(engine.submit(image).result(LIMIT_S), Answer) for image in images)
        stats = engine.stats()
    assert (stats.answered, stats.failed) == (2 * len(images), 0)
    assert balanced(stats)


def test_if_every_lane_hangs_images_fail_and_the_engine_recovers(bundle: Bundle, images: NDArray[np.uint8]) -> None:
    go_on = threading.Event()

    def hang(stage: int, rows: Sequence[RowState]) -> None:
        go_on.wait(2 * LIMIT_S)

    engine, runner = troubled(bundle, hang_s=HANG_S)
    with running(engine):
        runner.befall = hang
        futures = [engine.submit(image) for image in images]
        for future in futures:
            with pytest.raises(EngineUnsound, match="2 lanes hang"):
                future.result(LIMIT_S)
        with pytest.raises(EngineUnsound):
            engine.submit(images[0])
        runner.befall = None
        go_on.set()
        wait_until("it is well again", lambda: engine.trouble is None)
        assert isinstance(engine.submit(images[0]).result(LIMIT_S), Answer)
        stats, state = engine.stats(), engine.budget_state()
    assert (stats.failed, stats.answered) == (len(images), 1)
    assert balanced(stats)
    assert state.reserved_mflops == 0.0


def test_deadlines_are_met_while_the_runner_hangs(bundle: Bundle, images: NDArray[np.uint8]) -> None:
    go_on = threading.Event()

    def hang_at_two(stage: int, rows: Sequence[RowState]) -> None:
        if stage == 1:
            go_on.wait(2 * LIMIT_S)

    engine, runner = troubled(bundle)
    with running(engine):
        runner.befall = hang_at_two
        future = engine.submit(images[0], Options(exit=4, deadline_s=engine.clock() + 3.0))
        answer = future.result(LIMIT_S)
        assert (answer.exit, answer.reason) == (1, "deadline")
        go_on.set()
        assert isinstance(engine.submit(images[1]).result(LIMIT_S), Answer)


def test_beyond_the_maximum_wait_it_refuses_with_a_retry_time(bundle: Bundle, images: NDArray[np.uint8]) -> None:
    def slow(stage: int, rows: Sequence[RowState]) -> None:
        time.sleep(0.02 * len(rows))

    engine, runner = troubled(bundle, max_queue_s=0.2)
    with running(engine):
        runner.befall = slow
        for _ in range(8):  # until the engine has measured how slow the runner is
            for future in [engine.submit(image) for image in images[:4]]:
                future.result(LIMIT_S)
        refused: list[EngineOverloaded] = []
        accepted = []
        for image in images:
            try:
                accepted.append(engine.submit(image))
            except EngineOverloaded as error:
                refused.append(error)
        assert refused
        assert accepted
        assert all(0.1 < error.wait_s < 20.0 for error in refused)
        assert "will take about" in str(refused[0])
        assert not engine.has_room
        assert engine.overload().in_flight_rows > 0
        assert all(isinstance(future.result(LIMIT_S), Answer) for future in accepted)
        stats = engine.stats()
        assert stats.refused == len(refused)
        assert stats.room_rows < len(images)
        assert balanced(stats)


def test_a_lost_device_ends_the_engine_and_fails_all_images(bundle: Bundle, images: NDArray[np.uint8]) -> None:
    engine, runner = troubled(bundle)
    with running(engine):
        error = FatalRunnerError("CUDA error: an illegal memory access was encountered")
        fail_all(engine, runner, images, error, EngineLost)
        assert "illegal memory access" in str(engine.broken.result(LIMIT_S))
        assert not engine.is_alive
        with pytest.raises(EngineLost):
            engine.submit(images[0])
        stats = engine.stats()
    assert (stats.failed, stats.in_flight_rows) == (len(images), 0)
    assert balanced(stats)
    assert engine.budget_state().reserved_mflops == 0.0


def test_a_stopped_engine_does_not_count_as_broken(bundle: Bundle, images: NDArray[np.uint8]) -> None:
    engine, _ = troubled(bundle)
    with running(engine):
        engine.submit(images[0]).result(LIMIT_S)
    assert not engine.broken.done()
