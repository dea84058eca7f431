"""Tests shared by the two runners that keep row states in slots: regrouping, parallel lanes, a whole engine."""

import gc
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from models.bundle import Bundle
from models.exits import confidence
from service.budget.controller import BudgetController
from service.engine.engine import Engine
from service.engine.rows import Answer, Options
from service.engine.scheduler import Scheduler
from service.runners.base import Runner, StageOutput
from service.runners.blocks import RowState, keep
from service.runners.slots import Slots
from service.runners.slotted import SlotRunner
from tests.service.engine.test_engine import balanced, running

MAX_ROWS = 16
# Parts of messages, shared with the tests that need a GPU, where a rewording would otherwise show only there.
TOO_LITTLE_MEMORY = "too little memory for {} images at once"
TOO_LITTLE_FOR_ANY = "too little memory even for single images"
Check = Callable[[int, Sequence[int], StageOutput], None]
"""Called with a stage (from 0), the indices of the images that ran together, and the output."""


def all_free(slots: Slots) -> bool:
    gc.collect()
    return slots.n_free == slots.n_slots


def close(found: NDArray[Any], expected: NDArray[Any], tolerance: float = 1e-4) -> None:
    """Check that numbers differ by at most `tolerance` times the largest expected magnitude."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * float(np.abs(expected).max()))


def logits_of(runner: Runner, images: Iterable[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
    """The logits [n_images, classes] of every exit, with all images in one batch per stage."""
    rows: Sequence[RowState] = [runner.first_state(image) for image in images]
    logits = []
    for stage in range(runner.n_stages):
        output = runner.run(stage, rows)
        logits.append(output.logits)
        rows = output.states
    return logits


def regroup_at_random(runner: SlotRunner[Any], images: NDArray[np.uint8], seed: int, check: Check) -> None:
    """Run images in batches of random sizes, shuffled if `seed` is odd; a fifth leaves at each exit."""
    rng = np.random.default_rng(seed)
    waiting = [(i, runner.first_state(image)) for i, image in enumerate(images)]
    for stage in range(runner.n_stages):
        survivors: list[tuple[int, RowState]] = []
        order = rng.permutation(len(waiting)) if seed % 2 else np.arange(len(waiting))
        while len(order):
            size = int(rng.integers(1, MAX_ROWS + 1))
            batch, order = [waiting[j] for j in order[:size]], order[size:]
            output = runner.run(stage, [row for _, row in batch])
            ids = [i for i, _ in batch]
            check(stage, ids, output)
            kept = [j for j in range(len(batch)) if rng.random() < 0.8] if stage + 1 < runner.n_stages else []
            survivors += [(ids[j], state) for j, state in zip(kept, keep(output.block, kept), strict=True)]
        waiting = survivors
    del output, batch, survivors, waiting
    assert all_free(runner.slots)


def run_side_by_side(runner: SlotRunner[Any], images: NDArray[np.uint8], check: Check) -> None:
    """Run images in one thread more than there are lanes, in two batches per stage each."""

    def through(part: int) -> None:
        ids = range(part, len(images), 13)
        rows: Sequence[RowState] = [runner.first_state(images[i]) for i in ids]
        for stage in range(runner.n_stages):
            first, rest = runner.run(stage, rows[:5]), runner.run(stage, rows[5:])
            check(stage, ids[:5], first)
            check(stage, ids[5:], rest)
            rows = [*first.states, *rest.states]

    with ThreadPoolExecutor(runner.n_lanes + 1) as threads:
        list(threads.map(through, [*range(13)] * 2))
    assert all_free(runner.slots)


def engine_around(
    runner: Runner, bundle: Bundle, policy: str = "default", steer: bool = True, **options: Any
) -> Engine:
    """An engine with a budget of 60 % of the full cost."""
    budget = BudgetController(bundle.frontier(), bundle.costs_mflops, 0.6 * bundle.costs_mflops[-1], 1000, steer)
    scheduler: Scheduler[Any] = Scheduler(runner.n_stages, runner.max_rows, policy=policy)
    return Engine(runner, budget, scheduler, bundle.score(), bundle.manifest.class_names, **options)


def answer_all(
    runner: SlotRunner[Any],
    bundle: Bundle,
    images: NDArray[np.uint8],
    logits: Sequence[NDArray[np.float32]],
    tolerance: float,
) -> None:
    """Check an engine's answers against the logits of their exits, with regrouping, cancellations and a pinned exit."""
    engine = engine_around(runner, bundle)
    with running(engine):
        futures = [engine.submit(image, Options(top_k=1 + i % 3)) for i, image in enumerate(images)]
        pinned = engine.submit(images[0], Options(exit=3, steps=True, top_k=10))
        for future in futures[5::20]:
            future.cancel()
        left = set()
        for i, future in enumerate(futures):
            if future.cancelled():
                continue
            answer = future.result(60)
            assert isinstance(answer, Answer)
            own = logits[answer.exit - 1][i]
            assert answer.class_id == own.argmax()
            assert answer.confidence == pytest.approx(float(confidence(own[None])[0]), abs=tolerance)
            assert [class_id for class_id, _ in answer.top_k] == np.argsort(-own)[: 1 + i % 3].tolist()
            left.add(answer.exit)
        assert pinned.result(60).exit == 3
        assert len(left) > 1
        stats = engine.stats()
    assert balanced(stats)
    del futures, future, pinned
    # Except for slots that idle lanes keep for their last batches.
    assert runner.slots.n_free >= runner.slots.n_slots - 2 * runner.n_lanes * runner.max_rows
