"""The engine with its threads on a real bundle: correct answers, an exact ledger, and an outcome for every image."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models.bundle import Bundle
from models.exits import confidence, take_exits
from models.scores import score_exits
from service.assembly import build_engine
from service.budget.controller import BudgetController
from service.engine.engine import Engine
from service.engine.lanes import Batch
from service.engine.observer import EngineStats
from service.engine.policies import POLICIES
from service.engine.rows import Answer, Options
from service.engine.scheduler import Scheduler
from service.errors import EngineDraining, EngineError, EngineOverloaded
from service.runners.base import RunnerError, StageOutput
from service.runners.blocks import RowState
from service.runners.onnx import OnnxRunner
from tests.bundles import CLASS_NAMES, MEAN, STD, random_images, tiny_network
from tests.service.virtual import world
from tests.waiting import LIMIT_S, wait_until
from training.export import Normalise

POISON = 255  # an image with this value everywhere makes `FaultyRunner` fail
N_IMAGES = 400


@pytest.fixture(scope="module")
def images() -> NDArray[np.uint8]:
    return random_images(N_IMAGES, seed=7)


@pytest.fixture(scope="module")
def whole(images) -> list[NDArray[np.float32]]:
    """The logits [N, classes] of every exit of the PyTorch network, run whole."""
    with torch.no_grad():
        return [x.numpy() for x in tiny_network()(Normalise(MEAN, STD)(torch.from_numpy(images)))]


class FaultyRunner(OnnxRunner):
    """The real runner, which fails or blocks on demand."""

    gate: threading.Event | None = None
    poisoned_stage = 0

    def prepare(self, stage: int, rows: Sequence[RowState]) -> Callable[[], StageOutput]:
        prepared = super().prepare(stage, rows)

        def run() -> StageOutput:
            if self.gate is not None:
                self.gate.wait(LIMIT_S)
            if stage == 0 and any(row.block.values["images"][row.index].min() == POISON for row in rows):
                raise RuntimeError("poisoned")
            return prepared()

        return run


def faulty_engine(bundle: Bundle, max_rows: int = 8, burst_images: float = 32.0, **options: Any) -> Engine:
    runner = FaultyRunner(bundle, max_rows, n_lanes=2)
    return Engine(
        runner,
        BudgetController(bundle.frontier(), bundle.costs_mflops, bundle.costs_mflops[-1] * 0.6, burst_images),
        Scheduler(runner.n_stages, max_rows),
        bundle.score(),
        bundle.manifest.class_names,
        **{"hang_s": 600.0, **options},  # blocked lanes do not count as hanging
    )


@contextmanager
def running(engine: Engine) -> Iterator[Engine]:
    engine.start()
    try:
        yield engine
    finally:
        engine.drain(LIMIT_S)


def balanced(stats: EngineStats) -> bool:
    ended = stats.answered + stats.refused + stats.abandoned + stats.failed
    return stats.submitted == ended + stats.in_flight_rows


def hold(engine: Engine) -> threading.Event:
    """Block every lane of a faulty engine at its next batch until the event is set."""
    runner = engine._runner
    assert isinstance(runner, FaultyRunner)
    runner.gate = threading.Event()
    return runner.gate


# --- answers ----------------------------------------------------------------------------------------------------


def test_a_block_of_images_gets_the_same_answers_and_those_without_room_are_refused(bundle, images):
    engine = faulty_engine(bundle, max_in_flight_rows=6)
    which = [5, 3, 3, 100, 7, 2, 9, 11]
    told: dict[int, Answer] = {}
    with running(engine):
        alone = [engine.submit(images[i], Options(exit=2)).result(LIMIT_S) for i in which]
        gate = hold(engine)
        entries = engine.submit_all(
            lambda outcomes: told.update(outcomes),
            range(8),
            images,
            which,
            Options(exit=2),  # type: ignore[arg-type]
        )
        engine.flush()
        assert [isinstance(entry, EngineOverloaded) for entry in entries] == [False] * 6 + [True] * 2
        first = entries[0]
        assert not isinstance(first, EngineError)
        engine.abandon(first)
        gate.set()
        wait_until("five answers", lambda: len(told) == 5)
        stats = engine.stats()
    assert (stats.answered, stats.abandoned, stats.refused) == (8 + 5, 1, 2)
    assert balanced(stats)
    assert {token: answer.class_id for token, answer in told.items()} == {k: alone[k].class_id for k in range(1, 6)}
    [late] = engine.submit_all(lambda outcomes: None, [0], images, [0])
    assert isinstance(late, EngineDraining)


def test_images_without_room_or_slot_are_refused_as_overload(bundle, images):
    engine = faulty_engine(bundle, max_in_flight_rows=4)
    runner, made, has_places = engine._runner, [], True
    first_state = runner.first_state

    def first_state_of_few(image: NDArray[np.uint8]) -> RowState:
        if not has_places:
            raise RunnerError("all picture places are taken")
        made.append(image)
        return first_state(image)

    def submit_frame(n_images: int) -> list[bool]:
        entries = engine.submit_all(lambda outcomes: None, range(n_images), images, range(n_images))  # type: ignore
        engine.flush()
        return [isinstance(entry, EngineOverloaded) for entry in entries]

    with running(engine):
        runner.first_state = first_state_of_few
        has_places = False
        with pytest.raises(EngineOverloaded):
            engine.submit(images[0])
        assert submit_frame(3) == [True] * 3
        has_places = True
        gate = hold(engine)
        assert submit_frame(6) == [False] * 4 + [True] * 2
        assert submit_frame(2) == [True] * 2
        assert len(made) == 4
        gate.set()
    stats = engine.stats()
    assert (stats.submitted, stats.refused) == (12, 8)
    assert balanced(stats)


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("max_rows", [1, 13])
def test_answers_are_those_of_the_whole_network(bundle, images, whole, policy, max_rows):
    scores = score_exits(bundle.score(), whole)
    budget_mflops = 0.6 * bundle.costs_mflops[-1]
    options = {"policy": policy, "max_rows": max_rows, "n_lanes": 2, "device": "cpu"}
    with running(build_engine(bundle, budget_mflops, steer=False, burst_images=1e6, **options)) as engine:
        thresholds = engine.budget_state().thresholds
        answers = [future.result(LIMIT_S) for future in [engine.submit(image) for image in images]]
    expected = take_exits(scores, thresholds)
    tied = (np.abs(scores - np.array(thresholds)) < 1e-4).any(axis=1)
    assert len(set(expected.tolist())) == len(whole)  # every exit is tried
    for i, answer in enumerate(answers):
        if tied[i]:
            continue
        logits = whole[expected[i]][i]
        assert answer.exit == expected[i] + 1
        assert answer.class_id == logits.argmax()
        assert answer.label == CLASS_NAMES[answer.class_id]
        assert answer.confidence == pytest.approx(float(confidence(logits[None])[0]), abs=1e-4)
        assert answer.mflops == pytest.approx(bundle.costs_mflops[expected[i]])
        assert answer.reason == ("final" if answer.exit == len(whole) else "confident")
        assert 1 <= answer.batch_rows <= max_rows
        assert answer.compute_ms > 0
        assert answer.queue_ms >= 0
    assert max(answer.batch_rows for answer in answers) > 1 or max_rows == 1


def test_top_k_is_the_softmax_in_order(bundle, images, whole):
    with running(build_engine(bundle, bundle.costs_mflops[-1], device="cpu", exits=False)) as engine:
        futures = [engine.submit(image, Options(top_k=k)) for k, image in zip((1, 3, 10, 50), images, strict=False)]
        answers = [future.result(LIMIT_S) for future in futures]
    for i, (answer, n_wanted) in enumerate(zip(answers, (1, 3, 10, 10), strict=True)):
        logits = whole[-1][i].astype(np.float64)
        shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        assert [class_id for class_id, _ in answer.top_k] == np.argsort(-shares)[:n_wanted].tolist()
        assert [share for _, share in answer.top_k] == pytest.approx(sorted(shares)[::-1][:n_wanted], abs=1e-4)
        assert answer.top_k[0] == (answer.class_id, answer.confidence)


def test_with_exits_off_everything_runs_to_the_end(bundle, images):
    with running(build_engine(bundle, bundle.costs_mflops[0], device="cpu", exits=False)) as engine:
        answers = [future.result(LIMIT_S) for future in [engine.submit(image) for image in images]]
    assert {(answer.exit, answer.reason) for answer in answers} == {(4, "final")}


def test_with_too_small_a_burst_images_leave_at_the_exit_reached(bundle, images):
    budget_mflops = 0.5 * bundle.costs_mflops[-1]
    with running(build_engine(bundle, budget_mflops, device="cpu", burst_images=0.5, steer=False)) as engine:
        answers = [future.result(LIMIT_S) for future in [engine.submit(image) for image in images]]
        state = engine.budget_state()
    assert {"confident", "budget"} <= {answer.reason for answer in answers}
    total = sum(answer.mflops for answer in answers)
    assert total <= (len(answers) + 0.5) * budget_mflops
    assert state.spent_answered_mflops == pytest.approx(total)


def test_many_clients_are_kept_at_the_budget(bundle):
    budget_mflops = 0.5 * bundle.costs_mflops[-1]
    pool = iter(random_images(2_500, seed=11))
    lock = threading.Lock()
    answers: list[Answer] = []

    def client() -> None:
        while True:
            with lock:
                image = next(pool, None)
            if image is None:
                return
            answer = engine.submit(image).result(LIMIT_S)
            with lock:
                answers.append(answer)

    with running(build_engine(bundle, budget_mflops, n_lanes=2, device="cpu")) as engine:
        clients = [threading.Thread(target=client) for _ in range(32)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        state, stats = engine.budget_state(), engine.stats()
    assert 0.985 * budget_mflops <= (state.rolling_mflops or 0) <= 1.01 * budget_mflops
    assert state.spent_answered_mflops == pytest.approx(sum(answer.mflops for answer in answers))
    assert stats.exits == Counter((answer.exit, answer.reason) for answer in answers)
    assert balanced(stats)
    assert (stats.answered, stats.in_flight_rows) == (2_500, 0)


# --- how images end ---------------------------------------------------------------------------------------------


def test_a_failing_batch_fails_only_its_own_images(bundle, images):
    poisoned = np.full_like(images[0], POISON)
    with running(faulty_engine(bundle, max_rows=1)) as engine:
        bad, good = engine.submit(poisoned), [engine.submit(image) for image in images[:20]]
        with pytest.raises(EngineError, match="stage 1 failed: poisoned"):
            bad.result(LIMIT_S)
        assert all(isinstance(future.result(LIMIT_S), Answer) for future in good)
        stats, state = engine.stats(), engine.budget_state()
    assert (stats.answered, stats.failed) == (20, 1)
    assert balanced(stats)
    # The failed one is charged for the stage that it ran, apart from the answers.
    assert state.spent_abandoned_mflops == pytest.approx(bundle.costs_mflops[0])


def test_cancelled_images_run_no_further_and_are_counted(bundle, images):
    with running(faulty_engine(bundle)) as engine:
        gate = hold(engine)
        futures = [engine.submit(image) for image in images[:100]]
        assert all(future.cancel() for future in futures[50:])
        gate.set()
        for future in futures[:50]:
            assert isinstance(future.result(LIMIT_S), Answer)
        with pytest.raises(CancelledError):
            futures[99].result(LIMIT_S)
        stats, state = engine.stats(), engine.budget_state()
    assert (stats.answered, stats.abandoned, stats.in_flight_rows) == (50, 50, 0)
    assert balanced(stats)
    assert state.abandoned == 50
    assert state.spent_abandoned_mflops == 0.0  # all were dropped before they ran


def test_an_image_abandoned_while_it_runs_is_charged_and_ends_with_its_batch(bundle, images):
    with running(
        faulty_engine(bundle, observer=CountingObserver())
    ) as engine:  # which is not notified of empty batches
        gate = hold(engine)
        future = engine.submit(images[0])
        wait_until("its batch runs", lambda: engine.stats().running_batches > 0)
        future.cancel()
        assert engine.stats().in_flight_rows == 1
        gate.set()
        wait_until("the batch has run", lambda: engine.stats().in_flight_rows == 0)
        stats, state = engine.stats(), engine.budget_state()
        assert engine.is_alive
    assert (stats.answered, stats.abandoned) == (0, 1)
    assert state.spent_abandoned_mflops == pytest.approx(bundle.costs_mflops[0])
    assert state.reserved_mflops == 0.0


def test_a_full_engine_refuses_at_once(bundle, images):
    with running(faulty_engine(bundle, max_in_flight_rows=30)) as engine:
        gate = hold(engine)
        futures = [engine.submit(image) for image in images[:30]]
        with pytest.raises(EngineOverloaded, match="30 images are in flight") as refused:
            engine.submit(images[30])
        assert refused.value.in_flight_rows == 30
        gate.set()
        assert all(isinstance(future.result(LIMIT_S), Answer) for future in futures)
        stats = engine.stats()
        assert (stats.answered, stats.refused) == (30, 1)
        assert balanced(stats)
        assert isinstance(engine.submit(images[31]).result(LIMIT_S), Answer)


def test_an_answer_frees_room_for_the_next_image(bundle, images):
    refused: list[EngineError] = []
    n_left, all_told = len(images), threading.Event()

    def sink(outcomes: list[tuple[Any, Any]]) -> None:
        nonlocal n_left
        try:
            for _ in outcomes:
                n_left -= 1
                if n_left >= 20:
                    engine.submit_to(sink, None, images[n_left])
        except EngineError as error:
            refused.append(error)
        if not n_left or refused:
            all_told.set()

    with running(faulty_engine(bundle, max_in_flight_rows=20)) as engine:
        for image in images[:20]:
            engine.submit_to(sink, None, image)
        assert all_told.wait(LIMIT_S)
    assert not refused


def test_draining_answers_what_was_accepted_and_refuses_the_rest(bundle, images):
    engine = faulty_engine(bundle)
    with pytest.raises(EngineDraining, match="not been started"):
        engine.submit(images[0])
    engine.start()
    gate = hold(engine)
    futures = [engine.submit(image) for image in images[:60]]
    drained: Future[bool] = Future()
    thread = threading.Thread(target=lambda: drained.set_result(engine.drain(LIMIT_S)))
    thread.start()
    wait_until("it refuses new ones", lambda: engine._admission.closed is not None)
    with pytest.raises(EngineDraining, match="stopping"):
        engine.submit(images[0])
    assert not drained.done()
    gate.set()
    assert drained.result(LIMIT_S)
    assert all(future.done() and isinstance(future.result(), Answer) for future in futures)
    assert not engine.is_alive
    stats = engine.stats()
    assert (stats.answered, stats.refused, stats.in_flight_rows) == (60, 2, 0)
    assert balanced(stats)
    assert engine.drain(1)  # a second call is harmless
    with pytest.raises(EngineDraining):
        engine.submit(images[0])
    assert engine.set_budget(bundle.costs_mflops[-1]).fraction == 1.0


def test_images_not_answered_within_the_drain_time_fail(bundle, images):
    engine = faulty_engine(bundle)
    engine.start()
    gate = hold(engine)
    futures = [engine.submit(image) for image in images[:40]]
    assert not engine.drain(0.05)
    for future in futures:
        with pytest.raises(EngineError, match="stopped before"):
            future.result(LIMIT_S)
    gate.set()
    stats = engine.stats()
    assert (stats.failed, stats.in_flight_rows) == (40, 0)
    assert balanced(stats)


class BrokenObserver:
    def batch_ran(self, stage: int, seconds: float, queue_seconds: Sequence[float]) -> None:
        raise ZeroDivisionError("a bug")

    def answered(self, answers: Sequence[Answer]) -> None: ...


def require_told(engine, images, what):
    """Break an engine with forty images in flight; all must get an error."""
    engine.start()
    gate = hold(engine)
    futures = [engine.submit(image) for image in images[:40]]
    gate.set()
    for future in futures:
        with pytest.raises(EngineError, match=what):
            future.result(LIMIT_S)


def test_a_broken_engine_fails_all_waiting_images(bundle, images):
    engine = faulty_engine(bundle, observer=BrokenObserver())
    require_told(engine, images, r"broke down \(ZeroDivisionError: a bug\)")
    with pytest.raises(EngineError, match="broke down"):
        engine.submit(images[0])
    assert not engine.is_alive
    assert balanced(engine.stats())
    assert engine.budget_state().reserved_mflops == 0.0
    assert engine.drain(5)


def test_if_the_ledger_breaks_all_images_fail(bundle, images):
    """Once, the first that could not be settled kept all others waiting forever."""

    class BreaksTheBooks(BrokenObserver):
        def batch_ran(self, stage: int, seconds: float, queue_seconds: Sequence[float]) -> None:
            engine._core.budget.costs = ()

    engine = faulty_engine(bundle, observer=BreaksTheBooks())
    require_told(engine, images, r"broke down \(IndexError")
    assert engine.stats().in_flight_rows == 0
    assert balanced(engine.stats())
    assert engine.drain(5)


class Broken:
    """A sink that cannot be looked up in a dictionary."""

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, outcomes: Any) -> None: ...


def test_images_not_yet_admitted_when_it_breaks_fail_as_well(bundle, images):
    engine = faulty_engine(bundle)

    def follow(*_: Any) -> None:
        raise ZeroDivisionError("a bug")

    told: list[tuple[Any, Any]] = []

    def sink(outcomes: list[tuple[Any, Any]]) -> None:
        told.extend(outcomes)

    engine.start()
    engine._degrade.follow = follow  # type: ignore[method-assign]
    for token in range(3):
        engine.submit_to(sink, token, images[token], flush=False)
    engine.flush()
    why = engine.broken.result(LIMIT_S)
    assert "a bug" in str(why)
    assert told == [(0, why), (1, why), (2, why)]
    assert balanced(engine.stats())
    assert engine.stats().in_flight_rows == 0
    assert engine.drain(5)


def test_an_engine_that_cannot_end_its_requests_reports_that_it_is_broken(bundle, images):
    engine = faulty_engine(bundle, max_rows=1)
    engine.start()
    gate = hold(engine)
    for image in images[:3]:  # the first breaks the engine, the others cannot be settled
        engine.submit_to(Broken(), None, image)
    gate.set()
    assert "unhashable" in str(engine.broken.result(LIMIT_S))
    assert not engine.is_alive
    engine.drain(0.0)


# --- guarantees for callers -------------------------------------------------------------------------------------


def test_outcomes_come_once_per_batch_and_a_raising_sink_affects_no_other(bundle, images):
    deliveries: list[list[tuple[Any, Any]]] = []
    all_there = threading.Event()

    def sink(outcomes: list[tuple[Any, Any]]) -> None:
        deliveries.append(outcomes)
        if sum(map(len, deliveries)) == 200:
            all_there.set()
        raise ConnectionError("the client's trouble")

    with running(faulty_engine(bundle, max_rows=32)) as engine:
        gate = hold(engine)
        for token, image in enumerate(images[:200]):
            engine.submit_to(sink, token, image)
        gate.set()
        assert all_there.wait(LIMIT_S)
        assert isinstance(engine.submit(images[0]).result(LIMIT_S), Answer)
    assert sorted(token for outcomes in deliveries for token, _ in outcomes) == list(range(200))
    assert len(deliveries) < 100


@pytest.mark.parametrize("is_behind", [False, True])
def test_while_many_images_wait_the_engine_is_woken_only_if_a_lane_would_idle(bundle, is_behind):
    engine = faulty_engine(bundle)  # not started, so nothing takes batches or messages
    loop, inbox = engine._loop, engine._loop.inbox
    loop._is_behind = is_behind
    ran, waiting = Batch(0, []), Batch(1, [])
    loop._lanes.put(waiting)
    loop._post(ran)
    assert inbox.qsize() == (0 if is_behind else 1)
    assert loop._lanes._queue.get() is waiting
    loop._post(waiting)
    assert inbox.qsize() == (1 if is_behind else 2)
    assert list(loop._ran) == [ran, waiting]


def test_lanes_get_the_batches_they_need_and_more_while_full_batches_wait():
    here = world(max_rows=40)
    for token in range(79):
        here.admit(token, Options())
    assert not here.core.is_behind(2)
    assert [here.core.batches_out(n) for n in (0, 1, 2, 3, 8)] == [0, 3, 4, 6, 16]
    here.admit(79, Options())
    assert here.core.is_behind(2)
    assert [here.core.batches_out(n) for n in (0, 1, 2, 3, 8)] == [0, 3, 5, 6, 16]


class CountingObserver:
    def __init__(self) -> None:
        self.rows: Counter[int] = Counter()
        self.waits: list[float] = []
        self.answers: list[Answer] = []

    def batch_ran(self, stage: int, seconds: float, queue_seconds: Sequence[float]) -> None:
        assert seconds > 0
        self.rows[stage] += len(queue_seconds)
        self.waits += queue_seconds

    def answered(self, answers: Sequence[Answer]) -> None:
        assert len({answer.exit for answer in answers}) == 1
        self.answers += answers


def test_an_observer_is_notified_of_every_row_and_answer(bundle, images):
    observer = CountingObserver()
    with running(faulty_engine(bundle, observer=observer)) as engine:
        answers = [future.result(LIMIT_S) for future in [engine.submit(image) for image in images]]
    assert len(observer.answers) == len(answers)
    assert {id(answer) for answer in observer.answers} == {id(answer) for answer in answers}
    for stage in range(1, 5):
        assert observer.rows[stage] == sum(answer.exit >= stage for answer in answers)
    assert all(wait >= 0 for wait in observer.waits)


def test_the_budget_can_change_under_traffic_and_rejects_values_out_of_range(bundle, images):
    full_mflops = bundle.costs_mflops[-1]
    with running(build_engine(bundle, 0.8 * full_mflops, device="cpu")) as engine:
        futures = [engine.submit(image) for image in images]
        state = engine.set_budget(0.4 * full_mflops)
        assert state.budget_mflops == pytest.approx(0.4 * full_mflops, abs=1e-6)
        with pytest.raises(ValueError, match="out of reach"):
            engine.set_budget(1.01 * full_mflops)
        futures += [engine.submit(image) for image in images]
        assert all(isinstance(future.result(LIMIT_S), Answer) for future in futures)
        assert engine.budget_state().fraction == pytest.approx(0.4, abs=1e-6)


def test_memory_does_not_grow_with_the_images_served(bundle, images):
    """After an image has ended, its request, which the client still holds, keeps none of its state alive."""
    with running(faulty_engine(bundle)) as engine:
        answered = threading.Semaphore(0)
        requests = [engine.submit_to(lambda outcomes: answered.release(len(outcomes)), None, image) for image in images]
        for _ in requests:
            assert answered.acquire(timeout=LIMIT_S)
        assert sum(request.state.block.bytes for request in requests) == 0
